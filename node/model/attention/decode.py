"""Attention of single new positions over the pages of a page pool: a decode step, or a few of each session.

A row's positions are read in pieces, and of each piece all heads, in the order of the memory.  The softmax
goes along with the pieces (arXiv:1805.02867): the largest score so far, the sum, and the values' sums, which
shrink when a larger score comes.  Lines of a later page are fetched while a page is read.  Neighbouring rows
that are positions of one session, each one position further, read every page once for all of them.

Pieces begin at fixed positions and each query is computed in one order, so its result has the same bits alone
and with any rows next to it.  Importing this module imports numba.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types

from node.model.attention.stores import shortened, words_at
from node.model.attention.tiles import CACHE_LINE, PAIRS, REGISTERS, largest, powers_of, scores, weighted
from node.model.weights.compiling import Kernel, callback, compiled
from node.model.weights.kernels import LANES, call_at, floats_at
from node.model.weights.low_rank_kernel import word

# Sums may be taken in lanes and products fused, so that the compiler makes vectors.  NaN and infinity
# keep their meaning.
FAST = {"reassoc", "nsz", "contract", "arcp"}
PIECE = 256  # positions: keys of SmolLM2's 3 heads and their scores lie in a first-level cache's neighbour
AHEAD_PAGES = 3  # the page whose lines are fetched is so many further
RUN = 16  # positions of one session that are read together
ROW = PIECE + 32  # floats of a row of weights, with room for a last vector
LEAST_PAIRS = 8  # in the lanes of a vector
TILE_KEYS = 8  # at the most: a page has a multiple of it
# The sums of a tile: keys for two to four queries, vectors of values for four.
_KEYS_2, _KEYS_3, _KEYS_4, _VECTORS_4 = (8, 8, 4, 4) if REGISTERS == 32 else (4, 4, 2, 2)
_f, _i = np.float32, np.int32
_LOG2_E = np.float32(1.4426950408889634)
_ITEMS = {torch.bfloat16: np.int16(0), torch.float32: np.int32(0)}
_ARGUMENTS = 15


@njit(nogil=True)  # type: ignore[untyped-decorator]
def tile_rows(group: int) -> int:
    """Queries of the next tile, of `group` that are left: at most four, no last one alone."""
    return group if group <= 4 else 3 if group in (5, 6, 9) else 4


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _scores(
    kind: Any, item: int, group: int, size: int, first: int, last: int, stride: int, q: int, key: int,
    ahead: int, out: int,
) -> None:  # fmt: skip
    """Scores of a head's `group` queries with the keys [first, last) of a page, in whole tiles."""
    line, row = size * 4, 0
    while row < group:
        rows = tile_rows(group - row)
        q_at, out_at = q + row * line, out + row * ROW * 4
        step = 8 if rows == 1 else _KEYS_2 if rows == 2 else _KEYS_3 if rows == 3 else _KEYS_4
        for at in range(first - first % step, last, step):
            k, a, o = key + at * stride, ahead + at * size * item, out_at + at * 4
            if rows == 1:
                scores(kind, 1, 8, q_at, line, k, stride, a, o, ROW * 4, size)
            elif rows == 2:
                scores(kind, 2, _KEYS_2, q_at, line, k, stride, a, o, ROW * 4, size)
            elif rows == 3:
                scores(kind, 3, _KEYS_3, q_at, line, k, stride, a, o, ROW * 4, size)
            else:
                scores(kind, 4, _KEYS_4, q_at, line, k, stride, a, o, ROW * 4, size)
        row += rows


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _weighted(
    kind: Any, item: int, group: int, size: int, count: int, stride: int, weight: int, value: int,
    ahead: int, out: int,
) -> None:  # fmt: skip
    """out += `count` values of a head times the weights of its `group` queries."""
    row = 0
    while row < group:
        rows = tile_rows(group - row)
        w_at, out_at = weight + row * ROW * 4, out + row * size * 4
        at = 0
        while at < size:
            whole = (_VECTORS_4 if rows == 4 else 4) * len(kind)
            tile = whole <= size - at
            v, a, o = value + at * item, ahead + at * count * item, out_at + at * 4
            if rows == 1 and tile:
                weighted(kind, 1, 4, w_at, ROW * 4, v, stride, a, o, size * 4, count)
            elif rows == 2 and tile:
                weighted(kind, 2, 4, w_at, ROW * 4, v, stride, a, o, size * 4, count)
            elif rows == 3 and tile:
                weighted(kind, 3, 4, w_at, ROW * 4, v, stride, a, o, size * 4, count)
            elif rows == 4 and tile:
                weighted(kind, 4, _VECTORS_4, w_at, ROW * 4, v, stride, a, o, size * 4, count)
            else:
                for one in range(rows):
                    w_one, o_one = w_at + one * ROW * 4, o + one * size * 4
                    weighted(kind, 1, 1, w_one, ROW * 4, v, stride, a, o_one, size * 4, count)
            at += whole if tile else len(kind)
        row += rows


@njit(nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _softmax(kind: Any, heads: int, size: int, weights: int, low: int, high: int, sums: int) -> None:
    """Go on with each head's softmax over the scores [low, high) of a piece, which become weights.

    weights: float32 [heads, ROW].  sums: of the values so far, float32 [heads, head_dim], then the largest
    score and the total of the powers so far, [heads] each.
    """
    most = carray(floats_at(sums + heads * size * 4), heads)
    total = carray(floats_at(sums + (size + 1) * heads * 4), heads)
    lanes = len(kind)
    count = (high - low + lanes - 1) // lanes * lanes
    for head in range(heads):
        row = weights + (head * ROW + low) * 4
        padding = carray(floats_at(row), count)
        for i in range(high - low, count):
            padding[i] = -np.inf
        found, before = largest(kind, row, count), most[head]
        if found > before:
            factor = np.exp2(before - found)
            total[head] *= factor
            values = carray(floats_at(sums + head * size * 4), size)
            for i in range(size):
                values[i] *= factor
            most[head] = before = found
        total[head] += powers_of(kind, weights + head * ROW * 4, low, low + count, before)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _part(seen: int, window: int, begin: int, end: int) -> Any:
    """The positions of [begin, end) that a query reads which sees `seen` positions, of them `window`."""
    first = max(begin, seen - window) if window else begin
    return first, max(first, min(end, seen))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _piece(
    kind: Any, item: int, sizes: tuple[int, int, int, int], row: tuple[int, int, int, int], begin: int,
    end: int, page: int, stores: tuple[int, int, int], scratch: tuple[int, int, int, int],
) -> None:  # fmt: skip
    """The positions [begin, end) of one piece for some positions of a row.

    sizes: key heads, queries of each, numbers of a head, bytes of a weight.
    row: their number, the positions that the first one sees, the window, the row's pages.
    stores: keys, values, and the last page of the row.  scratch: see `_run`.
    """
    key_heads, group, size, weight_bytes = sizes
    count, seen, window, table = row
    keys, values, very_last = stores
    queries, sums, weights, each = scratch
    slot, head_bytes, base = key_heads * size * item, size * item, begin // PIECE * PIECE
    first_page, last_page = begin // page, (end - 1) // page
    pages = last_page + 1 - first_page  # the values of a piece follow its keys, and the next piece its values
    for at in range(begin - begin % TILE_KEYS, end, TILE_KEYS):
        number, offset = at // page, at % page * slot
        key = keys + word(table, number) * page * slot + offset
        if number + AHEAD_PAGES <= last_page:
            following = keys + word(table, number + AHEAD_PAGES) * page * slot + offset
        else:
            further = min(number + AHEAD_PAGES - pages, last_page)
            following = values + word(table, further) * page * slot + offset
        for head in range(key_heads):
            for i in range(count):
                low, high = _part(seen + i, window, max(begin, at), min(end, at + TILE_KEYS))
                if low < high:
                    q, out = queries + i * each, weights + i * each + (at - base) * 4
                    _scores(
                        kind, item, group, size, low - at, high - at, slot, q + head * group * size * 4,
                        key + head * head_bytes, following + head * TILE_KEYS * head_bytes,
                        out + head * group * ROW * 4,
                    )  # fmt: skip
    for i in range(count):
        low, high = _part(seen + i, window, begin, end)
        if low < high:
            own = weights + i * each
            _softmax(kind, key_heads * group, size, own, low - base, high - base, sums + i * each)
    for number in range(first_page, last_page + 1):
        value = values + word(table, number) * page * slot
        further = min(number + AHEAD_PAGES, very_last)
        following = (values if further <= last_page else keys) + word(table, further) * page * slot
        for head in range(key_heads):
            for i in range(count):
                low, high = _part(seen + i, window, max(begin, number * page), min(end, (number + 1) * page))
                if low < high:
                    weight, out = weights + i * each + (low - base) * weight_bytes, sums + i * each
                    _weighted(
                        kind, item, group, size, high - low, slot, weight + head * group * ROW * 4,
                        value + (low - number * page) * slot + head * head_bytes,
                        following + head * page * head_bytes, out + head * group * size * 4,
                    )  # fmt: skip


@njit(nogil=True, fastmath=FAST)  # type: ignore[untyped-decorator]
def _run(
    kind: Any, item: int, sizes: tuple[int, int, int, int], row: tuple[int, int, int, int], q: int,
    q_stride: int, scale: Any, page: int, stores: tuple[int, int], out: int, scratch: int,
) -> None:  # fmt: skip
    """Attention of some positions of one row, each one further than the one before; see `_piece`.

    scratch: for each of them queries and sums of values [heads, head_dim], the largest scores and the totals
    [heads], and weights [heads, ROW], float32.  Queries and weights in pairs take the first half of a row.
    """
    key_heads, group, size, weight_bytes = sizes
    count, seen, window, _ = row
    keys, values = stores
    heads = key_heads * group
    each = heads * (2 * size + 2 + ROW) * 4
    for i in range(count):
        given = carray(floats_at(q + i * q_stride * 4), heads * size)
        own = carray(floats_at(scratch + i * each), heads * (2 * size + 2))
        if weight_bytes == 2:
            pairs = carray(words_at(scratch + i * each), heads * size)
            for head in range(heads):
                for d in range(size // 2):
                    at = head * size + 2 * d
                    low, high = shortened(given[at] * scale), shortened(given[at + 1] * scale)
                    pairs[head * size + d] = (low & _i(0xFFFF)) | high << _i(16)
        else:
            for d in range(heads * size):
                own[d] = given[d] * scale
        for d in range(heads * size):
            own[heads * size + d] = _f(0)
        for head in range(heads):
            own[heads * 2 * size + head] = -np.inf
            own[heads * (2 * size + 1) + head] = _f(0)
    places = (scratch, scratch + heads * size * 4, scratch + heads * (2 * size + 2) * 4, each)
    stop, begin = seen + count - 1, max(0, seen - window) if window else 0
    while begin < stop:
        end = min(stop, begin // PIECE * PIECE + PIECE)
        _piece(kind, item, sizes, row, begin, end, page, (keys, values, (stop - 1) // page), places)
        begin = end
    for i in range(count):
        answer = carray(floats_at(out + i * heads * size * 4), (heads, size))
        own = carray(floats_at(places[1] + i * each), heads * (size + 2))
        for head in range(heads):
            factor = _f(1) / own[heads * (size + 1) + head]
            for d in range(size):
                answer[head, d] = own[head * size + d] * factor


def lanes_of(head_dim: int) -> int:
    """The lanes of the widest vectors that a head of this size consists of; ValueError for an odd size."""
    lanes = min(LANES, head_dim & -head_dim)
    if lanes < 2:
        raise ValueError(f"heads of an even size are computed, not of {head_dim}")
    return lanes


def takes_pairs(head_dim: int) -> bool:
    """Whether bfloat16 heads of this size are multiplied as they are, by queries and weights in bfloat16."""
    return PAIRS and head_dim % (2 * LEAST_PAIRS) == 0


def attention(dtype: torch.dtype, head_dim: int) -> Any:
    """Attention of new positions over stores of this dtype, for compiled code, which calls it by address.

    attend(q, q_stride, rows, key_heads, group, head_dim, keys, values, table, table_stride, seen, page,
    scale, window, out) -> 1, or 0 where memory lacks; all int64.  q: float32 [rows, key_heads * group *
    head_dim], rows q_stride numbers apart.  keys, values: a block's stores [slots, key_heads, head_dim].
    table: int64 [rows, table_stride]: the rows' pages.  seen: int64 [rows]: positions to read, the new one
    included.  page: positions in a page.  scale: the bits of a float32.  window: the number of positions that
    attention reads, 0 for all.  out: float32 [rows, key_heads * group * head_dim].
    """
    if dtype == torch.bfloat16 and takes_pairs(head_dim):
        return _attention(dtype, lanes_of(head_dim // 2), in_pairs=True)
    return _attention(dtype, lanes_of(head_dim), in_pairs=False)


@cache
def _attention(dtype: torch.dtype, lanes: int, *, in_pairs: bool) -> Any:
    kind = (np.uint16(0) if in_pairs else _ITEMS[dtype],) * lanes  # a part of the cache's key
    item, weight_bytes = dtype.itemsize, 2 if in_pairs else 4

    def attend(
        q: int, q_stride: int, rows: int, key_heads: int, group: int, size: int, keys: int, values: int,
        table: int, table_stride: int, seen: int, page: int, scale: int, window: int, out: int,
    ) -> int:  # fmt: skip
        sizes, line = (key_heads, group, size, weight_bytes), table_stride * 8
        heads = key_heads * group
        factor = np.int32(scale).view(np.float32) * _LOG2_E
        scratch = np.empty(min(rows, RUN) * heads * (2 * size + 2 + ROW) + CACHE_LINE // 4, np.float32)
        aligned = scratch.ctypes.data + -scratch.ctypes.data % CACHE_LINE
        row = 0
        while row < rows:
            pages, own = word(table + row * line, 0), word(seen, row)
            last = row + 1
            while last < min(rows, row + RUN) and word(table + last * line, 0) == pages:
                if word(seen, last) != own + last - row:
                    break
                last += 1
            _run(
                kind, item, sizes, (last - row, own, window, table + (last - 1) * line),
                q + row * q_stride * 4, q_stride, factor, page, (keys, values), out + row * heads * size * 4,
                aligned,
            )  # fmt: skip
            row = last
        return 1 if scratch.size else 0  # the scratch lives until here

    return callback(attend, types.int64(*[types.int64] * _ARGUMENTS))


def _called(
    address: int, q: int, q_stride: int, rows: int, key_heads: int, group: int, size: int, keys: int,
    values: int, table: int, table_stride: int, seen: int, page: int, scale: int, window: int, out: int,
) -> None:  # fmt: skip
    given = (
        q, q_stride, rows, key_heads, group, size, keys, values, table, table_stride, seen, page, scale,
        window, out,
    )  # fmt: skip
    if call_at(address, given) == 0:
        raise MemoryError


@cache
def attend_for(dtype: torch.dtype, head_dim: int) -> Kernel:
    """`attention` for Python."""
    by_address = compiled(_called, types.void(*[types.int64] * (1 + _ARGUMENTS)))
    return partial(by_address, attention(dtype, head_dim).address)
