"""Low-rank additions to the outputs of a matrix, another adapter for each group of rows.

    out[row] += scale * (x[row] @ A.T) @ B.T        (LoRA, arXiv:2106.09685)

The compiled halves of a block (node/model/weights/decode_kernels.py) call it by its address, so a block
without adapters pays for a comparison with 0, and one compiled variant of the halves serves both.

A decode step with many adapters reads all of their values and uses each for a row or two: memory bounds it.
So values stay in bfloat16, or in the float32 that a client trains, and are widened in registers.  x @ A.T is
a product of node/model/weights/kernels.py, called by its address too.  The second product has a sum of
`rank` numbers for each output; B lies in tiles of LANES outputs, [tile][rank][LANES], so that its numbers are
read in the order in which they lie, once for all rows of a group.  Each sum has one order, in ascending rank,
so a row's bits are the same alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from node.model.weights import kernels
from node.model.weights.compiling import callback

LANES = kernels.LANES

# The table of an adapter, int64 [blocks, sites, ENTRY], has for each linear: the address of A [rank, in], the
# address of B in tiles, the rank (0: nothing is added), the scale (float32, in the lower half), and the bytes
# of a value.
ENTRY = 5
A, B, RANK, SCALE, BYTES = range(ENTRY)
# The updates of a step, int64 [HEAD + GROUP * groups]: the address of the compiled function, the number of
# groups, the addresses of the products with values of 2 and of 4 bytes; then for each group the address of
# its adapter's table at block 0, its first row, the row after it.
HEAD, GROUP = 4, 3
CODE = (0, 2, 3)  # places of addresses of compiled functions

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTE = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_F32, LANES)
_ROWS, _TILES = 4, 4  # of a step in the second product: 16 sums and 4 vectors of weights in registers
_WIDE_ROWS = _ROWS if LANES == 16 else 2  # 16 registers hold half as many


@intrinsic  # type: ignore[untyped-decorator]
def word(context: Any, address: Any, index: Any) -> Any:
    """The int64 number `index` at an address."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        base = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load(builder.gep(base, [arguments[1]]))

    return types.int64(types.int64, types.int64), write


@intrinsic  # type: ignore[untyped-decorator]
def _number(context: Any, address: Any) -> Any:
    """The float32 number at an address."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _F32.as_pointer()))

    return types.float32(types.int64), write


@intrinsic  # type: ignore[untyped-decorator]
def _copy(context: Any, source: Any, to: Any, count: Any) -> Any:
    """Copy `count` float32 numbers from one address to another."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, to, count = arguments
        with cgutils.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, _I64(4))
            number, place = (
                builder.inttoptr(builder.add(base, offset), _F32.as_pointer()) for base in (source, to)
            )
            builder.store(builder.load(number, align=4), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), write


class _Expansion:
    """Writes the code of one step of the second product: `rows` rows of t times `tiles` tiles of B.

    item: LLVM's type of a value of B: i16 for the upper half of a float32, or i32 for all of it.
    """

    def __init__(self, builder: Any, rows: int, tiles: int, item: ir.IntType) -> None:
        self.build, self.rows, self.tiles, self.item = builder, rows, tiles, item
        module = builder.module
        fma = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        self.fma = cgutils.get_or_insert_function(module, fma, f"llvm.fmuladd.v{LANES}f32")
        take = ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        self.prefetch = cgutils.get_or_insert_function(module, take, "llvm.prefetch.p0i8")

    def write(self, t: Any, b: Any, rank: Any, scale: Any, out: Any, stride: Any) -> None:
        """The whole code.  t: address of float32 [rows, rank]; b: of the tiles; stride: of rows of out."""
        build = self.build
        before = build.block
        head, inside, after = (build.append_basic_block(name) for name in ("head", "inside", "after"))
        build.branch(head)
        build.position_at_end(head)
        j = build.phi(_I64)
        j.add_incoming(_I64(0), before)
        sums = [build.phi(_VECTOR) for _ in range(self.rows * self.tiles)]
        for each in sums:
            each.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
        build.cbranch(build.icmp_signed("<", j, rank), inside, after)
        build.position_at_end(inside)
        for each, now in zip(sums, self._added(sums, t, b, rank, j), strict=True):
            each.add_incoming(now, build.block)
        j.add_incoming(build.add(j, _I64(1)), build.block)
        build.branch(head)
        build.position_at_end(after)
        factor = self._spread(scale)
        for row in range(self.rows):
            for tile in range(self.tiles):
                index = build.add(build.mul(_I64(row), stride), _I64(tile * LANES))
                pointer = self._pointer(out, index, 4, _VECTOR)
                more = build.fmul(sums[row * self.tiles + tile], factor)
                build.store(build.fadd(build.load(pointer, align=4), more), pointer, align=4)

    def _added(self, sums: Sequence[Any], t: Any, b: Any, rank: Any, j: Any) -> list[Any]:
        """The sums with t[row, j] * B[tile, j] added."""
        build, item_bytes = self.build, self.item.width // 8
        weights = []
        for tile in range(self.tiles):
            line = build.add(build.mul(_I64(tile), rank), j)
            pointer = self._pointer(b, line, LANES * item_bytes, ir.VectorType(self.item, LANES))
            weights.append(self._wide(build.load(pointer, align=item_bytes)))
        # A step reads its tiles next to each other and goes on in the order of the memory.
        ahead = build.add(b, build.mul(j, _I64(self.tiles * LANES * item_bytes)))
        for offset in range(0, self.tiles * LANES * item_bytes, kernels.CACHE_LINE):
            pointer = build.inttoptr(build.add(ahead, _I64(kernels.AHEAD_BYTES + offset)), _BYTE)
            build.call(self.prefetch, [pointer, _I32(0), _I32(3), _I32(1)])  # to read, keep it, data
        now = []
        for row in range(self.rows):
            place = build.add(build.mul(_I64(row), rank), j)
            x = self._spread(build.load(self._pointer(t, place, 4, _F32), align=4))
            for tile, weight in enumerate(weights):
                now.append(build.call(self.fma, [x, weight, sums[row * self.tiles + tile]]))
        return now

    def _wide(self, values: Any) -> Any:
        wide = ir.VectorType(_I32, LANES)
        if self.item is _I32:
            return self.build.bitcast(values, _VECTOR)
        sixteen = ir.Constant(wide, [16] * LANES)
        return self.build.bitcast(self.build.shl(self.build.zext(values, wide), sixteen), _VECTOR)

    def _spread(self, number: Any) -> Any:
        one = self.build.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _I32(0))
        lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        return self.build.shuffle_vector(one, one, lanes)

    def _pointer(self, base: Any, index: Any, size: int, kind: Any) -> Any:
        address = self.build.add(base, self.build.mul(index, _I64(size)))
        return self.build.inttoptr(address, kind.as_pointer())


def _expansion(rows: int, tiles: int) -> Any:
    """A function for compiled code: computes one step of the second product.  item: a value's type."""

    @intrinsic  # type: ignore[untyped-decorator]
    def expansion(
        context: Any, item: Any, t: Any, b: Any, rank: Any, scale: Any, out: Any, stride: Any
    ) -> Any:
        kind = {types.int16: _I16, types.int32: _I32}[item]

        def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            _Expansion(builder, rows, tiles, kind).write(*arguments[1:])
            return context.get_dummy_value()

        address = types.int64
        return types.void(item, address, address, address, types.float32, address, address), write

    return expansion


_one_wide, _one_narrow = _expansion(1, _TILES), _expansion(1, 1)
_rows_wide, _rows_narrow = _expansion(_WIDE_ROWS, _TILES), _expansion(_WIDE_ROWS, 1)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _expanded(
    item: Any, size: int, t: int, b: int, rank: int, scale: Any, out: int, stride: int, rows: int, outs: int,
    spare: int,
) -> None:  # fmt: skip
    """out [rows, outs] += scale * t [rows, rank] @ B.T, rows of out `stride` apart.

    spare: address of LANES float32 numbers for a tile that is not full.
    """
    tile_bytes = rank * LANES * size
    column = 0
    while column < outs:
        at = b + column // LANES * tile_bytes
        left = outs - column
        full = min(left, LANES)
        row = 0
        while row < rows:
            many = rows - row >= _WIDE_ROWS and left >= LANES
            t_at, out_at = t + row * rank * 4, out + (row * stride + column) * 4
            if left >= _TILES * LANES:
                if many:
                    _rows_wide(item, t_at, at, rank, scale, out_at, stride)
                else:
                    _one_wide(item, t_at, at, rank, scale, out_at, stride)
            elif many:
                _rows_narrow(item, t_at, at, rank, scale, out_at, stride)
            else:
                to = out_at if left >= LANES else spare
                if left < LANES:
                    _copy(out_at, spare, full)
                _one_narrow(item, t_at, at, rank, scale, to, stride)
                if left < LANES:
                    _copy(spare, out_at, full)
            row += _WIDE_ROWS if many else 1
        column += _TILES * LANES if left >= _TILES * LANES else LANES


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _group(
    item: Any, size: int, product: int, entry: int, x: int, k: int, out: int, stride: int, outs: int,
    rows: int,
) -> None:  # fmt: skip
    rank = word(entry, RANK)
    t = np.empty(rows * rank + LANES, np.float32)
    to = t.ctypes.data
    given = (size, x, word(entry, A), 0, 0, to, rows, rank, k, rank)
    if kernels.call_at(product, given) == 0:
        raise MemoryError
    scale, spare = _number(entry + 8 * SCALE), to + rows * rank * 4
    _expanded(item, size, to, word(entry, B), rank, scale, out, stride, rows, outs, spare)
    kernels._hold(t)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _added(
    updates: int, block: int, site: int, sites: int, x: int, k: int, out: int, stride: int, outs: int
) -> None:
    """out [rows, outs] += each group's low-rank product with x [rows, k], rows of out `stride` apart."""
    for group in range(word(updates, 1)):
        at = updates + 8 * (HEAD + GROUP * group)
        first, last = word(at, 1), word(at, 2)
        entry = word(at, 0) + 8 * ENTRY * (sites * block + site)
        if word(entry, RANK) == 0:
            continue
        x_at, out_at = x + first * k * 4, out + first * stride * 4
        if word(entry, BYTES) == 2:
            _group(np.int16(0), 2, word(updates, 2), entry, x_at, k, out_at, stride, outs, last - first)
        else:
            _group(np.int32(0), 4, word(updates, 3), entry, x_at, k, out_at, stride, outs, last - first)


@cache
def function() -> Any:
    """The compiled function; the first call compiles it, in seconds, or reads it from the cache."""

    def add(
        updates: int, block: int, site: int, sites: int, x: int, k: int, out: int, stride: int, outs: int
    ) -> int:
        _added(updates, block, site, sites, x, k, out, stride, outs)
        return 1

    return callback(add, types.int64(*[types.int64] * 9))


def head(groups: int) -> list[int]:
    """The first numbers of a step's updates: HEAD of them."""
    products = [kernels.product_of(dtype).address for dtype in (torch.bfloat16, torch.float32)]
    return [int(function().address), groups, *products]
