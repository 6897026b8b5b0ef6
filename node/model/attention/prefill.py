"""Attention of many new positions of a row over the pages of a page pool: a chunk of a prompt.

The tiles and the running softmax of FlashAttention (arXiv:2205.14135, 2307.08691).  A tile of keys and values
is taken out of the pages once for all queries of a key head: keys are turned, so that a register holds one
number of many keys.  A few queries at a time meet it, with their sums in registers, and nothing as large as
queries times keys is ever kept.  Tiles that no query of a group may see are left out.

A CPU that multiplies bfloat16 (`tiles.PAIRS`) gets keys and values of this dtype as they are, two numbers in
each 32 bits.  Queries and weights are rounded to bfloat16 there: they lose as much as keys and values have.

Tiles of keys begin at fixed positions and each query is computed in one order, so its result has the same
bits in any chunk.  Importing this module imports numba.
"""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import overload
from torch.nn import functional

from node.model.attention.stores import shortened, shorts_at, words_at
from node.model.attention.tiles import (
    CACHE_LINE,
    PAIRS,
    REGISTERS,
    fetch,
    largest,
    outer,
    powers_of,
)
from node.model.weights.compiling import Kernel, callback, compiled
from node.model.weights.kernels import LANES, call_at, floats_at
from node.model.weights.low_rank_kernel import word

FAST = {"reassoc", "nsz", "contract", "arcp"}  # NaN and infinity keep their meaning
KEYS = 256  # of a tile: with heads of 64 numbers it takes 128 KiB, and a second-level cache has 256 or more
ROWS = 12 if REGISTERS == 32 else 6  # queries of a tile: two vectors of keys each fill the registers
QUERY_BYTES = 512 * 1024  # of the queries and sums that one tile of keys is read for
_LINE = KEYS + LANES  # floats between the scores of two queries: not a power of two
_f, _i = np.float32, np.int32
_LOG2_E = np.float32(1.4426950408889634)
_ARGUMENTS = 18
MUCH_SLOWER = 1.5  # times torch's seconds: then torch's attention is taken
TRIES = 3  # of each way when they are measured
ONE_BITS = int(np.float32(1).view(np.int32))


def _taken(
    kind: Any, item: int, width: int, store: int, size: int, page: int, table: int, begin: int, end: int,
    turned: bool, out: Any,
) -> None:  # fmt: skip
    """One head's numbers of the positions [begin, end): out [positions, size], turned [size, KEYS].

    store: the address of the head in slot 0.  width: numbers of a slot.  A kind of pairs: two in 32
    bits, of neighbours in a head, turned [size / 2, KEYS], or of two positions [positions / 2, size], where
    0 follows an odd last one.
    """


@overload(_taken)  # type: ignore[untyped-decorator]
def _taken_by_kind(
    kind: Any, item: int, width: int, store: int, size: int, page: int, table: int, begin: int, end: int,
    turned: bool, out: Any,
) -> Any:  # fmt: skip
    return _taken_in_pairs if not kind.dtype.signed else _taken_wide


def _taken_wide(
    kind: Any, item: int, width: int, store: int, size: int, page: int, table: int, begin: int, end: int,
    turned: bool, out: Any,
) -> None:  # fmt: skip
    for at in range(begin, end):
        slot = word(table, at // page) * page + at % page
        address, row = store + slot * width * item, at - begin
        if item == 4:
            wide = carray(floats_at(address), size)
            if turned:
                for d in range(size):
                    out[d * KEYS + row] = wide[d]
            else:
                for d in range(size):
                    out[row * size + d] = wide[d]
        else:
            short, bits = carray(shorts_at(address), size), out.view(np.int32)
            if turned:
                for d in range(size):
                    bits[d * KEYS + row] = np.int32(short[d]) << np.int32(16)
            else:
                for d in range(size):
                    bits[row * size + d] = np.int32(short[d]) << np.int32(16)


def _taken_in_pairs(
    kind: Any, item: int, width: int, store: int, size: int, page: int, table: int, begin: int, end: int,
    turned: bool, out: Any,
) -> None:  # fmt: skip
    words = out.view(np.int32)
    for at in range(begin, end):
        row, address = at - begin, store + (word(table, at // page) * page + at % page) * width * item
        if turned:
            given = carray(words_at(address), size // 2)
            for d in range(size // 2):
                words[d * KEYS + row] = given[d]
        else:
            short, line, upper = carray(shorts_at(address), size), row // 2 * size, row % 2
            for d in range(size):
                number = _i(short[d])
                words[line + d] = words[line + d] | number << _i(16) if upper else number & _i(0xFFFF)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _weights_of(kind: Any, scores: int, low: int, high: int, sums: int, size: int, state: Any) -> None:
    """Scores [low, high) of one query become weights; its sums shrink where a larger score came.

    state: the largest score and the total so far.
    """
    lanes = len(kind)
    first, last = low - low % lanes, high + -high % lanes
    row = carray(floats_at(scores), last)
    for i in range(first, low):
        row[i] = -np.inf
    for i in range(high, last):
        row[i] = -np.inf
    found, before = largest(kind, scores + first * 4, last - first), state[0]
    if found > before:
        factor = np.exp2(before - found)
        state[1] *= factor
        values = carray(floats_at(sums), size)
        for i in range(size):
            values[i] *= factor
        state[0] = before = found
    state[1] += powers_of(kind, scores, first, last, before)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _columns(
    kind: Any, a: int, a_row: int, a_step: int, b: int, b_step: int, out: int, out_row: int, count: int,
    columns: int, kept: int,
) -> None:  # fmt: skip
    """Products of a tile of queries with `columns` columns, whole vectors; see `outer`."""
    lanes, at = len(kind), 0
    while at < columns:
        if columns - at >= 2 * lanes:
            outer(kind, ROWS, 2, a, a_row, a_step, b + at * 4, b_step, out + at * 4, out_row, count, kept)
            at += 2 * lanes
        else:
            outer(kind, ROWS, 1, a, a_row, a_step, b + at * 4, b_step, out + at * 4, out_row, count, kept)
            at += lanes


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _tile(
    kind: Any, pair: int, group: int, size: int, first: int, count: int, position: int, window: int,
    begin: int, end: int, places: tuple[int, int, int, int, int], states: Any,
) -> None:  # fmt: skip
    """Queries [first, first + ROWS) of `count` meet the keys at the positions [begin, end).

    pair: bfloat16 numbers in 32 bits, or 1.
    position: of query 0; `group` queries have one position.  places: queries, keys, values, scores, sums.
    """
    queries, keys, values, scores, sums = places
    lanes, last, half = len(kind), min(first + ROWS, count), 2 // pair  # half: 16 bits of a weight
    lowest, highest = position + first // group, position + (last - 1) // group
    low = max(0, lowest + 1 - window - begin) if window else 0
    high = min(end, highest + 1) - begin
    if low >= high:
        return
    low, wide = low - low % lanes, high + -high % lanes
    _columns(
        kind, queries + first * size * 4, 4, ROWS * 4, keys + low * 4, KEYS * 4, scores + low * 4, _LINE * 4,
        size // pair, wide - low, 0,
    )  # fmt: skip
    sums_at = sums + first * size * 4
    for i in range(ROWS):
        row, at = carray(shorts_at(scores + i * _LINE * 4), wide * half), position + (first + i) // group
        from_, to = max(0, at + 1 - window - begin) if window else 0, min(end, at + 1) - begin
        if first + i >= last or from_ >= to:
            from_ = to = low
        else:
            own = scores + i * _LINE * 4
            _weights_of(kind, own, from_, to, sums_at + i * size * 4, size, states[first + i])
        for j in range(low * half, (from_ - from_ % lanes) * half):
            row[j] = 0
        for j in range(to * half, wide * half):
            row[j] = 0
    _columns(
        kind, scores + low * 2 * half, _LINE * 4, 4, values + low // pair * size * 4, size * 4, sums_at,
        size * 4, (high - low + pair - 1) // pair, size, 1,
    )  # fmt: skip


@njit(nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _queries(
    pair: int, q: int, q_stride: int, group: int, size: int, count: int, scale: Any, out: Any
) -> None:
    """`count` queries times the scale, in tiles [size, ROWS]; the last tile is filled up with zeros.

    In pairs of bfloat16, the first half of a tile: [size / 2, ROWS].
    """
    words = out.view(np.int32)
    for i in range(count + -count % ROWS):
        tile = i // ROWS * ROWS * size + i % ROWS
        if i < count:
            given = carray(floats_at(q + (i // group * q_stride + i % group * size) * 4), size)
            if pair == 2:
                for d in range(0, size, 2):
                    low, high = shortened(given[d] * scale), shortened(given[d + 1] * scale)
                    words[tile + d // 2 * ROWS] = (low & _i(0xFFFF)) | high << _i(16)
            else:
                for d in range(size):
                    out[tile + d * ROWS] = given[d] * scale
        else:
            for d in range(size):
                out[tile + d * ROWS] = _f(0)


@njit(nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _block(
    kind: Any, sizes: tuple[int, int, int, int, int], q: int, q_stride: int, tokens: int, keys: int,
    values: int, table: int, position: int, page: int, scale: Any, window: int, out: int, scratch: Any,
) -> None:  # fmt: skip
    """Attention of `tokens` positions from `position` on, for the queries of one key head.

    q, out: of the head's first query.  keys, values: of the head in slot 0.  scratch: see `_floats`.
    """
    item, key_heads, group, size, pair = sizes
    width, count = key_heads * size, tokens * group
    padded = count + -count % ROWS
    base = scratch.ctypes.data + -scratch.ctypes.data % CACHE_LINE
    keys_at, values_at = base, base + KEYS * size * 4
    scores = base + 2 * KEYS * size * 4
    sums = scores + ROWS * _LINE * 4
    queries = sums + padded * size * 4
    states = carray(floats_at(queries + padded * size * 4), (padded, 2))
    _queries(pair, q, q_stride, group, size, count, scale, carray(floats_at(queries), padded * size))
    values_of_all = carray(floats_at(sums), padded * size)
    for i in range(padded * size):
        values_of_all[i] = _f(0)
    for i in range(padded):
        states[i, 0], states[i, 1] = -np.inf, _f(0)
    turned, straight = carray(floats_at(keys_at), KEYS * size), carray(floats_at(values_at), KEYS * size)
    last = position + tokens
    begin = max(0, position + 1 - window) if window else 0
    begin -= begin % KEYS
    while begin < last:
        end = min(begin + KEYS, last)
        _taken(kind, item, width, keys, size, page, table, begin, end, True, turned)
        _taken(kind, item, width, values, size, page, table, begin, end, False, straight)
        places = (queries, keys_at, values_at, scores, sums)
        ahead, tiles = min(last - end, KEYS), padded // ROWS
        for first in range(0, padded, ROWS):
            for at in range(end + first // ROWS * ahead // tiles, end + (first // ROWS + 1) * ahead // tiles):
                offset = (word(table, at // page) * page + at % page) * width * item
                fetch(keys + offset, size * item)
                fetch(values + offset, size * item)
            _tile(kind, pair, group, size, first, count, position, window, begin, end, places, states)
        begin = end
    for i in range(count):
        answer = carray(floats_at(out + (i // group * width * group + i % group * size) * 4), size)
        factor = _f(1) / states[i, 1]
        for d in range(size):
            answer[d] = values_of_all[i * size + d] * factor


@cache
def attention(lanes: int, item_bytes: int) -> Any:
    """Attention of a chunk of each row, for other compiled code, which calls it by address.

    attend(q, q_stride, rows, tokens, key_heads, group, head_dim, keys, values, item_bytes, table,
    table_stride, position, page, scale, window, out, part) -> 1, or 0 where memory lacks; all int64.
    q: float32 [rows * tokens, key_heads * group * head_dim], q_stride numbers apart.
    keys, values: a block's stores [slots, key_heads, head_dim] of float32 or bfloat16.
    table: int64 [rows, table_stride]: the rows' pages.  position: of the first of `tokens` positions, which
    are in the stores.  scale: the bits of a float32.
    window: the number of positions that attention reads, 0 for all.
    out: float32 [rows * tokens, key_heads * group * head_dim].  part: of `_parts_of`; -1 for all.

    lanes: head_dim is a multiple of them.  item_bytes: 2 for stores of bfloat16 that is multiplied as it is.
    """
    kind = (np.uint16(0) if item_bytes == 2 else np.int32(0),) * lanes  # a part of the cache's key
    pair = 4 // item_bytes

    def attend(
        q: int, q_stride: int, rows: int, tokens: int, key_heads: int, group: int, size: int, keys: int,
        values: int, item: int, table: int, table_stride: int, position: int, page: int, scale: int,
        window: int, out: int, part: int,
    ) -> int:  # fmt: skip
        most = max(1, min(tokens, QUERY_BYTES // (8 * size * group)))
        blocks = (tokens + most - 1) // most
        count = most * group + ROWS
        scratch = np.empty(2 * (KEYS + count) * size + ROWS * _LINE + 2 * count + CACHE_LINE, np.float32)
        sizes, factor = (item, key_heads, group, size, pair), np.int32(scale).view(np.float32) * _LOG2_E
        start, stop = (part, part + 1) if part >= 0 else (0, rows * key_heads * blocks)
        for unit in range(start, stop):
            row, head, first = unit // blocks // key_heads, unit // blocks % key_heads, unit % blocks * most
            line, at = row * tokens + first, head * group * size
            _block(
                kind, sizes, q + (line * q_stride + at) * 4, q_stride, min(most, tokens - first),
                keys + head * size * item, values + head * size * item, table + row * table_stride * 8,
                position + first, page, factor, window, out + (line * key_heads * group * size + at) * 4,
                scratch,
            )  # fmt: skip
        return 1 if scratch.size else 0  # the scratch lives until here

    return callback(attend, types.int64(*[types.int64] * _ARGUMENTS))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _parts_of(rows: int, tokens: int, key_heads: int, group: int, size: int) -> int:
    """The parts of a step that threads may compute at once."""
    most = max(1, min(tokens, QUERY_BYTES // (8 * size * group)))
    return rows * key_heads * ((tokens + most - 1) // most)


def _called(
    address: int, q: int, q_stride: int, rows: int, tokens: int, key_heads: int, group: int, size: int,
    keys: int, values: int, item: int, table: int, table_stride: int, position: int, page: int, scale: int,
    window: int, out: int,
) -> None:  # fmt: skip
    given = (
        q, q_stride, rows, tokens, key_heads, group, size, keys, values, item, table, table_stride, position,
        page, scale, window, out, -1,
    )  # fmt: skip
    if call_at(address, given) == 0:
        raise MemoryError


def _in_parts(
    address: int, q: int, q_stride: int, rows: int, tokens: int, key_heads: int, group: int, size: int,
    keys: int, values: int, item: int, table: int, table_stride: int, position: int, page: int, scale: int,
    window: int, out: int,
) -> None:  # fmt: skip
    done = 0
    parts = _parts_of(rows, tokens, key_heads, group, size)
    for part in prange(parts):
        done += call_at(
            address,
            (
                q, q_stride, rows, tokens, key_heads, group, size, keys, values, item, table, table_stride,
                position, page, scale, window, out, part,
            ),
        )  # fmt: skip
    if done < parts:
        raise MemoryError


@cache
def attend_for(dtype: torch.dtype, *, together: bool) -> Kernel:
    """`attention` over stores of this dtype for Python, without `part`.

    together: by the threads that `kernels.team` has given.

    Raises MemoryError.
    """
    signature = types.void(*[types.int64] * _ARGUMENTS)
    by_address = compiled(_in_parts, signature, parallel=True) if together else compiled(_called, signature)
    return partial(by_address, attention(LANES, dtype.itemsize if PAIRS else 4).address)


@cache
def is_chosen(head_dim: int) -> bool:
    """Whether chunks go through this kernel on this machine and not through torch's attention.

    Measured once, in some milliseconds.  torch's must be much faster, so that noise does not choose.
    """
    if head_dim % LANES:
        return False
    own, of_torch = _seconds(head_dim)
    return own < MUCH_SLOWER * of_torch


def _seconds(head_dim: int) -> tuple[float, float]:
    """Of this kernel and of torch's, for a small chunk behind others, one thread each."""
    tokens, behind, heads, page = 64, 448, 4, 16
    length, attend = tokens + behind, attend_for(torch.float32, together=False)
    q, out = torch.zeros(tokens, heads * head_dim), torch.empty(tokens, heads * head_dim)
    keys, values = (torch.zeros(length, 1, head_dim) for _ in range(2))
    table = np.arange(length // page)
    given = (
        q.data_ptr(), heads * head_dim, 1, tokens, 1, heads, head_dim, keys.data_ptr(), values.data_ptr(), 4,
        table.ctypes.data, len(table), behind, page, ONE_BITS, 0, out.data_ptr(),
    )  # fmt: skip
    places = torch.arange(length)
    mask, read = places <= places[behind:, None], places
    queries = q.view(1, tokens, heads, head_dim).transpose(1, 2)

    def by_torch() -> None:
        k, v = (store.index_select(0, read)[None].transpose(1, 2) for store in (keys, values))
        functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)

    found = []
    for compute in (lambda: attend(*given), by_torch):
        times = []
        for _ in range(TRIES):
            began = time.thread_time()
            compute()
            times.append(time.thread_time() - began)
        found.append(min(times))
    return found[0], found[1]
