"""A fused block before attention and after it, each in one compiled call; or whole blocks in one call.

At one position a row, the values between two matrices are a few hundred numbers, and torch's dispatch costs
more than their arithmetic.  The matrices are node/model/weights/kernels.py's, and attention is
node/model/attention's.  Everything is float32 on the CPU, but the stores of keys and values may be bfloat16.
Importing this module imports numba.

Each row is computed by itself in one order, so its result has the same bits alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import overload
from torch import Tensor

from node.model.attention.stores import keep
from node.model.weights import kernels
from node.model.weights.compiling import compiled
from node.model.weights.low_rank_kernel import word

# Sums may be taken in lanes and products fused, so that the compiler makes vectors.  NaN and infinity
# keep their meaning.
_FAST = {"reassoc", "nsz", "contract", "arcp"}
_f = np.float32
# The linears of a block that an adapter may add to, in the order of its table.
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_HIDDEN = "float32[:, ::1]"
SLICE_OUTS = 32  # of the outputs: those of a panel


def _compiled(signature: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile now, or read from the cache: a first step must not wait seconds for a compiler."""
    return partial(compiled, signature=signature, fastmath=_FAST)


@njit(nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _normed(x: Any, weight: Any, eps: Any, out: Any) -> None:
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
def _norm_and_rotate(head: Any, weight: Any, eps: Any, cos: Any, sin: Any, rotary: Any) -> None:
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


@njit(nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _rotated_and_kept(
    qkv: Any, heads: Any, store: Any, positions: Any, slots: Any, cos: Any, sin: Any, rotary: Any,
    query_norm: Any, key_norm: Any, eps: Any,
) -> None:  # fmt: skip
    """Rotate queries and keys in place and put keys and values into the stores; see `halves`."""
    key_heads, size = store[2], store[3]
    for row in range(qkv.shape[0]):
        row_cos, row_sin = cos[positions[row]], sin[positions[row]]
        line, slot = qkv[row], slots[row]
        for head in range(heads):
            _norm_and_rotate(line[head * size : (head + 1) * size], query_norm, eps, row_cos, row_sin, rotary)
        for head in range(heads, heads + key_heads):
            _norm_and_rotate(line[head * size : (head + 1) * size], key_norm, eps, row_cos, row_sin, rotary)
        first, width = heads * size, key_heads * size
        keep(line[first : first + width], store[0] + slot * width * store[4], store[4])
        first += width
        keep(line[first : first + width], store[1] + slot * width * store[4], store[4])


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


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _multiplied_alone(size: Any, matrix: Any, x: Any, out: Any) -> None:
    rows, outs = out.shape
    k, to = x.shape[1], out.ctypes.data
    given = (size, x.ctypes.data, matrix[0], matrix[1], matrix[2], to, rows, outs, k, outs)
    if kernels.call_at(matrix[3], given) == 0:
        raise MemoryError


@njit(nogil=True, parallel=True)  # type: ignore[untyped-decorator]
def _multiplied_in_slices(size: Any, matrix: Any, x: Any, out: Any, slices: Any) -> None:
    """Each slice of the outputs in a thread; a row's bits are those of one thread.

    Slices begin at multiples of SLICE_OUTS; they have as many outputs at least.
    """
    rows, outs = out.shape
    k, x_at, to = x.shape[1], x.ctypes.data, out.ctypes.data
    w, scale, bias, address = matrix[0], matrix[1], matrix[2], matrix[3]
    answers = np.empty(slices, np.int64)
    for part in prange(slices):
        first = part * outs // slices // SLICE_OUTS * SLICE_OUTS
        last = (part + 1) * outs // slices // SLICE_OUTS * SLICE_OUTS if part + 1 < slices else outs
        scale_at, bias_at = scale + first * 4 if scale else 0, bias + first * 4 if bias else 0
        given = (
            size, x_at, w + first * k * size, scale_at, bias_at, to + first * 4, rows, last - first, k, outs
        )  # fmt: skip
        answers[part] = kernels.call_at(address, given)
    if answers.min() == 0:
        raise MemoryError


def _multiplied(size: Any, threads: Any, matrix: Any, x: Any, out: Any) -> Any:
    """out [rows, outs] = x [rows, k] times a matrix (see `addresses_of`)."""


@overload(_multiplied)  # type: ignore[untyped-decorator]
def _multiplied_by_type(size: Any, threads: Any, matrix: Any, x: Any, out: Any) -> Any:
    def alone(size: Any, threads: Any, matrix: Any, x: Any, out: Any) -> Any:
        _multiplied_alone(size, matrix, x, out)

    def together(size: Any, threads: Any, matrix: Any, x: Any, out: Any) -> Any:
        rows, outs = out.shape
        slices = kernels.compiled_slices_for(rows * outs * x.shape[1], outs, threads)
        if slices == 1:
            _multiplied_alone(size, matrix, x, out)
        else:
            _multiplied_in_slices(size, matrix, x, out, slices)

    return alone if isinstance(threads, types.NoneType) else together


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _updated(updates: Any, block: Any, site: Any, x: Any, out: Any, first: Any, outs: Any) -> None:
    """out[:, first : first + outs] += the low-rank products of a site with x, where there are updates."""
    if updates:
        to = out.ctypes.data + first * 4
        given = (updates, block, site, len(SITES), x.ctypes.data, x.shape[1], to, out.shape[1], outs)
        if kernels.call_at(word(updates, 0), given) == 0:
            raise MemoryError


@njit(nogil=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _gated(gate_up: Any, out: Any) -> None:
    """out [rows, inner] = silu(gate) * up, of gate_up [rows, 2 * inner]."""
    # numpy's rules for a division by zero, which does not occur: to raise would make no vectors.
    inner = out.shape[1]
    powers = np.empty(inner, np.float32)
    for row in range(out.shape[0]):
        gate, up, result = gate_up[row, :inner], gate_up[row, inner:], out[row]
        for i in range(inner):
            powers[i] = -abs(gate[i])
        _exp_in_place(powers)
        for i in range(inner):
            power = powers[i]
            above = _f(1) if gate[i] >= 0 else power
            result[i] = gate[i] * above / (_f(1) + power) * up[i]


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _projected(
    how: Any, matrix: Any, norm: Any, eps: Any, hidden: Any, normed: Any, qkv: Any, heads: Any, store: Any,
    updates: Any, block: Any,
) -> None:  # fmt: skip
    """Queries, keys and values; how: item, size and threads of `halves`; normed: room for [rows, hidden]."""
    _, size, threads = how
    _normed(hidden, norm, eps, normed)
    _multiplied(size, threads, matrix, normed, qkv)
    queries, others = heads * store[3], store[2] * store[3]
    _updated(updates, block, 0, normed, qkv, 0, queries)
    _updated(updates, block, 1, normed, qkv, queries, others)
    _updated(updates, block, 2, normed, qkv, queries + others, others)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _scratch(rows: int, width: int, inner: int) -> Any:
    """Room for `_added`: float32 [rows, width], [rows, 2 * inner], [rows, inner]."""
    return (
        np.empty((rows, width), np.float32),
        np.empty((rows, 2 * inner), np.float32),
        np.empty((rows, inner), np.float32),
    )


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _added(
    how: Any, matrices: Any, norm: Any, eps: Any, attended: Any, hidden: Any, scratch: Any, updates: Any,
    block: Any,
) -> None:  # fmt: skip
    """The block after attention, added to hidden; matrices: out, gate_up, down."""
    _, size, threads = how
    out, gate_up, down = matrices
    given, both, gated = scratch
    width, inner = hidden.shape[1], gated.shape[1]
    _multiplied(size, threads, out, attended, given)
    _updated(updates, block, 3, attended, given, 0, width)
    _add(given, hidden)
    _normed(hidden, norm, eps, given)
    _multiplied(size, threads, gate_up, given, both)
    _updated(updates, block, 4, given, both, 0, inner)
    _updated(updates, block, 5, given, both, inner, inner)
    _gated(both, gated)
    _multiplied(size, threads, down, gated, given)
    _updated(updates, block, 6, gated, given, 0, width)
    _add(given, hidden)


@cache
def halves(dtype: torch.dtype, *, together: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """A block before and after attention, each in one call, for weights of this dtype.

    before(item, size, threads, matrix, norm, eps, hidden, qkv, heads, store, positions, slots, cos,
    sin, rotary, query_norm, key_norm, updates, block): norm, one product for queries, keys and values,
    rotary, stores.
    after(item, size, threads, out, norm, eps, gate_up, down, inner, attended, hidden, updates, block): the
    product after attention, norm, gated MLP (SwiGLU, arXiv:2002.05202), both added to hidden.

    together: whether for several threads, else `threads` is None.  One function serves all dtypes.
    item, size: 0 and the bytes of a weight.  matrix, out, gate_up, down: see `addresses_of`.
    inner: outputs of the gate.  hidden: [rows, hidden_size].  qkv: [rows, (heads + 2 * key_heads) *
    head_dim].  attended: [rows, heads * head_dim].  store: see `place_of` in fused_block.py.
    positions, slots: of each row.  cos, sin: [positions, head_dim].  query_norm, key_norm: [head_dim], or
    empty where the model has none.  updates: the address of what adapters add in this step (see
    node/model/weights/low_rank_kernel.py), 0 for nothing; block: the place in the adapters' tables.
    """

    def before(
        item: Any, size: Any, threads: Any, matrix: Any, norm: Any, eps: Any, hidden: Any, qkv: Any,
        heads: Any, store: Any, positions: Any, slots: Any, cos: Any, sin: Any, rotary: Any,
        query_norm: Any, key_norm: Any, updates: Any, block: Any,
    ) -> None:  # fmt: skip
        normed = np.empty(hidden.shape, np.float32)
        _projected(
            (item, size, threads), matrix, norm, eps, hidden, normed, qkv, heads, store, updates, block
        )
        _rotated_and_kept(qkv, heads, store, positions, slots, cos, sin, rotary, query_norm, key_norm, eps)

    def after(
        item: Any, size: Any, threads: Any, out: Any, norm: Any, eps: Any, gate_up: Any, down: Any,
        inner: Any, attended: Any, hidden: Any, updates: Any, block: Any,
    ) -> None:  # fmt: skip
        scratch = _scratch(len(hidden), hidden.shape[1], inner)
        _added(
            (item, size, threads), (out, gate_up, down), norm, eps, attended, hidden, scratch, updates, block
        )

    threads = "int64" if together else "none"
    matrix, vector, integers = "int64[::1]", "float32[::1]", "int64[::1]"
    of_before = (
        f"{matrix}, {vector}, float32, {_HIDDEN}, {_HIDDEN}, int64, {integers}, {integers},"
        f" {integers}, {_HIDDEN}, {_HIDDEN}, boolean, {vector}, {vector},"
        " int64, int64"
    )
    of_after = f"{matrix}, {vector}, float32, {matrix}, {matrix}, int64, {_HIDDEN}, {_HIDDEN}, int64, int64"
    return _for(threads, before, of_before), _for(threads, after, of_after)


def _for(threads: str, function: Callable[..., None], arguments: str) -> Callable[..., None]:
    return _compiled(f"void(int64, int64, {threads}, {arguments})")(function)


@njit(nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _add(given: Any, hidden: Any) -> None:
    for row in range(hidden.shape[0]):
        for i in range(hidden.shape[1]):
            hidden[row, i] += given[row, i]


# A block as `run` takes it: the places of numbers in a row of its table.  They are addresses but for INNER,
# ROTARY, SCALE (the bits of a float32) and WINDOW.  A matrix has four numbers, see `addresses_of`.
QKV, OUT, GATE_UP, DOWN = range(0, 16, 4)
NORM, MLP_NORM, QUERY_NORM, KEY_NORM, INNER, ROTARY, SCALE, WINDOW, COLUMNS = range(16, 25)


@cache
def run() -> Callable[..., None]:
    """Blocks of a decode step, one after the other in one call, for one thread.

    Between two compiled calls the interpreter's own code and objects come from far away: a block's weights
    have driven them out of the nearer caches.

    run(size, blocks, epsilons, hidden, qkv, attended, heads, stores, positions, slots, cos, sin, attend,
    rows_at, updates, first): size: bytes of a weight.  blocks: int64 [blocks, COLUMNS].  epsilons: float32
    [blocks].  hidden: float32 [rows, hidden_size], in place.  qkv, attended, positions, slots, cos, sin,
    updates: as of `halves`.  stores: int64 [blocks, 5], see `place_of`.  attend: the address of
    attention (node/model/attention/decode.py).  rows_at: int64 [4], its arguments from `table` to `page`.
    first: the place of the first block in the adapters' tables.
    """

    def blocks_of(
        size: Any, blocks: Any, epsilons: Any, hidden: Any, qkv: Any, attended: Any, heads: Any, stores: Any,
        positions: Any, slots: Any, cos: Any, sin: Any, attend: Any, rows_at: Any, updates: Any, first: Any,
    ) -> None:  # fmt: skip
        rows, width = hidden.shape
        scratch = _scratch(rows, width, blocks[0, INNER])
        how = (0, size, None)
        for index in range(len(blocks)):
            block, store, eps = blocks[index], stores[index], epsilons[index]
            key_heads, head_dim = store[2], store[3]
            norm, mlp_norm = _vector(block[NORM], width), _vector(block[MLP_NORM], width)
            query_norm, key_norm = _vector(block[QUERY_NORM], head_dim), _vector(block[KEY_NORM], head_dim)
            _projected(
                how, block[QKV:OUT], norm, eps, hidden, scratch[0], qkv, heads, store, updates, first + index
            )
            _rotated_and_kept(
                qkv, heads, store, positions, slots, cos, sin, block[ROTARY] != 0, query_norm, key_norm, eps
            )
            given = (
                qkv.ctypes.data, qkv.shape[1], rows, key_heads, heads // key_heads, head_dim, store[0],
                store[1], rows_at[0], rows_at[1], rows_at[2], rows_at[3], block[SCALE], block[WINDOW],
                attended.ctypes.data,
            )  # fmt: skip
            if kernels.call_at(attend, given) == 0:
                raise MemoryError
            matrices = block[OUT:GATE_UP], block[GATE_UP:DOWN], block[DOWN:NORM]
            _added(how, matrices, mlp_norm, eps, attended, hidden, scratch, updates, first + index)

    table, integers = "int64[:, ::1]", "int64[::1]"
    return _compiled(
        f"void(int64, {table}, float32[::1], {_HIDDEN}, {_HIDDEN}, {_HIDDEN}, int64, {table}, {integers},"
        f" {integers}, {_HIDDEN}, {_HIDDEN}, int64, {integers}, int64, int64)"
    )(blocks_of)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _vector(address: int, size: int) -> Any:
    """Float32 numbers at an address; none at 0."""
    return carray(kernels.floats_at(address), size if address else 0)


def addresses_of(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Any:
    """A matrix for `halves`: the addresses of its parts, 0 for a missing part, and of its product's code."""
    parts = [0 if part is None else part.data_ptr() for part in (weight, scale, bias)]
    return np.array([*parts, kernels.product_of(weight.dtype).address], np.int64)
