"""What a decode step does beside its matrices, compiled by numba: norms, rotary, attention over pages.

At one position a row these are a few hundred numbers each, and torch's dispatch costs more than
computing them; attention over an arena's pages would have to gather them first.  Everything is
float32 on the CPU.  Importing this module imports numba.

Each row is computed by itself in one order, so its result has the same bits alone and in any batch.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numba.core.errors import NumbaError

# Sums may be taken in lanes and products fused: that is what makes vectors of them.  NaN and infinity
# keep their meaning.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_f = np.float32
_HIDDEN, _STORE, _TABLE = "float32[:, ::1]", "float32[:, :, ::1]", "int64[:, :]"


def _compiled(signature: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile now, or read from the cache: a first step must not wait seconds for a compiler."""

    def compile_now(function: Callable[..., None]) -> Callable[..., None]:
        try:
            compiled: Any = njit(signature, nogil=True, fastmath=_FAST, cache=True)(function)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, NumbaError):
            # No folder that can be written, a full disk, a file that somebody cut short.
            compiled = njit(signature, nogil=True, fastmath=_FAST)(function)
        return compiled  # type: ignore[no-any-return]

    return compile_now


@_compiled(f"void({_HIDDEN}, float32[::1], float32, {_HIDDEN})")
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """out [rows, hidden] = x / rms(x) * weight (arXiv:1910.07467)."""
    for row in range(x.shape[0]):
        values, result = x[row], out[row]
        total = _f(0)
        for i in range(values.size):
            total += values[i] * values[i]
        factor = _f(1) / np.sqrt(total / _f(values.size) + eps)
        for i in range(values.size):
            result[i] = values[i] * factor * weight[i]


@njit(nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _norm_and_turn(head: Any, weight: Any, eps: Any, cos: Any, sin: Any, rotary: Any) -> None:
    """Normalise one head in place, if there is a weight, and rotate it by its position's angles."""
    half = head.size // 2
    if weight.size:
        total = _f(0)
        for i in range(head.size):
            total += head[i] * head[i]
        factor = _f(1) / np.sqrt(total / _f(head.size) + eps)
        for i in range(head.size):
            head[i] = head[i] * factor * weight[i]
    if rotary:
        for i in range(half):
            a, b = head[i], head[i + half]
            head[i] = a * cos[i] - b * sin[i]
            head[i + half] = b * cos[i + half] + a * sin[i + half]


@_compiled(
    f"void({_HIDDEN}, int64, {_STORE}, {_STORE}, int64[::1], int64[::1], {_HIDDEN}, {_HIDDEN}, boolean,"
    " float32[::1], float32[::1], float32)"
)
def rotate_and_keep(
    qkv: Any,
    heads: Any,
    keys: Any,
    values: Any,
    positions: Any,
    slots: Any,
    cos: Any,
    sin: Any,
    rotary: Any,
    query_norm: Any,
    key_norm: Any,
    eps: Any,
) -> None:
    """Rotate queries and keys in place and put keys and values into the arena.

    qkv: [rows, (heads + 2 * key_heads) * head_dim].  keys, values: a block's stores [slots, key_heads,
    head_dim].  positions, slots: of each row.  cos, sin: [positions, head_dim].  query_norm, key_norm:
    [head_dim], or empty where the model has none.
    """
    key_heads, size = keys.shape[1], keys.shape[2]
    for row in range(qkv.shape[0]):
        turn, turn_sin = cos[positions[row]], sin[positions[row]]
        line, slot = qkv[row], slots[row]
        for head in range(heads):
            _norm_and_turn(line[head * size : (head + 1) * size], query_norm, eps, turn, turn_sin, rotary)
        for head in range(key_heads):
            first = (heads + head) * size
            _norm_and_turn(line[first : first + size], key_norm, eps, turn, turn_sin, rotary)
            keys[slot, head] = line[first : first + size]
            first += key_heads * size
            values[slot, head] = line[first : first + size]


@njit(nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _exp_in_place(x: Any) -> None:
    """e^x for x <= 0, to about 2 units in the last place (the polynomial of Cephes' expf)."""
    for i in range(x.size):
        value = max(x[i], _f(-87.0))
        n = np.floor(value * _f(1.4426950408889634) + _f(0.5))
        r = value - n * _f(0.693359375) + n * _f(2.12194440e-4)
        p = _f(1.9875691500e-4)
        p = p * r + _f(1.3981999507e-3)
        p = p * r + _f(8.3334519073e-3)
        p = p * r + _f(4.1665795894e-2)
        p = p * r + _f(1.6666665459e-1)
        p = p * r + _f(5.0000001201e-1)
        p = p * r * r + r + _f(1)
        x[i] = p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _softmax(scores: Any, scale: Any) -> None:
    """In place, of scores * scale."""
    most = scores[0]
    for j in range(scores.size):
        most = max(most, scores[j])
    for j in range(scores.size):
        scores[j] = (scores[j] - most) * scale
    _exp_in_place(scores)
    total = _f(0)
    for j in range(scores.size):
        total += scores[j]
    total = _f(1) / total
    for j in range(scores.size):
        scores[j] *= total


@cache
def attention(head_dim: int, group: int) -> Callable[..., None]:
    """Attention of one new position of each row, for heads of this size and so many queries a key head.

    attend(q, keys, values, table, lengths, page, scale, window, out): q [rows, heads * head_dim], more
    may follow in each row; keys, values: a block's stores; table [rows, pages]: where the rows' pages
    are; lengths [rows]: positions to look at, the new one included; window: how many of these, 0 for
    all; out [rows, heads * head_dim].  Compiled for the two numbers, so that its loops have fixed ends.
    """
    width = head_dim * group

    # Its free variables are numbers only: with compiled functions among them it could not be cached.
    def attend(
        q: Any,
        keys: Any,
        values: Any,
        table: Any,
        lengths: Any,
        page: Any,
        scale: Any,
        window: Any,
        out: Any,
    ) -> None:
        for row in range(q.shape[0]):
            length = lengths[row]
            first = max(0, length - window) if window > 0 else 0
            scores = np.empty((group, length - first), np.float32)
            pages = table[row]
            for head in range(keys.shape[1]):
                query = q[row, head * width : (head + 1) * width]
                result = out[row, head * width : (head + 1) * width]
                at = 0
                for number in range(first // page, (length + page - 1) // page):
                    base = pages[number] * page
                    begin, end = max(first - number * page, 0), min(page, length - number * page)
                    for slot in range(base + begin, base + end):
                        key = keys[slot, head]
                        for i in range(group):
                            total = _f(0)
                            for d in range(head_dim):
                                total += query[i * head_dim + d] * key[d]
                            scores[i, at] = total
                        at += 1
                for i in range(group):
                    _softmax(scores[i], scale)
                for d in range(width):
                    result[d] = _f(0)
                at = 0
                for number in range(first // page, (length + page - 1) // page):
                    base = pages[number] * page
                    begin, end = max(first - number * page, 0), min(page, length - number * page)
                    for slot in range(base + begin, base + end):
                        value = values[slot, head]
                        for i in range(group):
                            weight = scores[i, at]
                            for d in range(head_dim):
                                result[i * head_dim + d] += weight * value[d]
                        at += 1

    signature = (
        f"void(float32[:, ::1], {_STORE}, {_STORE}, {_TABLE}, int64[::1], int64, float32, int64, {_HIDDEN})"
    )
    return _compiled(signature)(attend)
