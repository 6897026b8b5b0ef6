"""Products of many rows with weights of bfloat16, of rows rounded to bfloat16 (AVX-512 BF16).

`vdpbf16ps` adds two products of bfloat16 to each float32 lane, so it does twice as many as a product of
float32, and no weight is widened.  A row is rounded to 8 significant bits for it, as in a model that computes
in bfloat16; sums, and all that lies between two products, stay in float32.

A tile is an outer product, as in BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015): two vectors of
outputs and a few rows, whose pairs of k are broadcast.  Each sum is taken in ascending k in one lane, so a
row has the same bits in any number of rows.  They are not the bits of node/model/weights/kernels.py, which
keeps rows in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from node.model.attention.tiles import PAIRS
from node.model.weights import kernels
from node.model.weights.compiling import callback
from node.model.weights.kernels import _F32, _I16, _I32, _I64, _mask
from node.model.weights.panels.integer_panels import ALIGNED, _aligned, _copied, _Outer, _transposed

IS_USABLE = PAIRS  # on this CPU
LANES = 16
ROWS, VECTORS = 12, 2  # of a tile: its sums fill the registers
OUTS = VECTORS * LANES
VECTOR_BYTES = 4 * LANES
CHUNK = 2 * LANES  # of k that is put into order at once

_FLOATS, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, LANES)


class _Products(_Outer):
    """A tile of ROWS rows and OUTS outputs."""

    def write_all(self, given: Sequence[Any]) -> None:
        """The code.  given: addresses and lengths as i64:

        x: pairs of bfloat16, [pairs, ROWS]; w: [pairs, OUTS]; bias, out, stride: as of a tile.
        """
        x, w, bias, out, stride, pairs = given
        build = self.build
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTEGERS, _INTEGERS])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        self.multiply = cgutils.get_or_insert_function(build.module, kind, name)
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = self._loop([zero] * (ROWS * VECTORS), _I64(0), pairs, 1, self._pair(x, w))
        for row in range(ROWS):
            line = build.add(out, build.mul(build.mul(_I64(row), stride), _I64(4)))
            for vector in range(VECTORS):
                offset, value = _I64(vector * VECTOR_BYTES), sums[row * VECTORS + vector]
                value = self._given(value, bias, out, offset, build.fadd)
                build.store(value, self._at(line, offset, _FLOATS), align=4)

    def _product(self, x: Any, weight: Any, total: Any) -> Any:
        x, weight = (self.build.bitcast(each, _INTEGERS) for each in (x, weight))
        return self.build.call(self.multiply, [total, x, weight])


@intrinsic  # type: ignore[untyped-decorator]
def _tile(context: Any, given: Any) -> Any:
    """Compute a tile.  given: see `write_all`."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        values = [builder.extract_value(arguments[0], index) for index in range(len(given))]
        _Products(builder, ROWS, VECTORS, _I32).write_all(values)
        return context.get_dummy_value()

    return types.void(given), write


@intrinsic  # type: ignore[untyped-decorator]
def _put_outs(context: Any, source: Any, line: Any, target: Any) -> Any:
    """CHUNK weights of OUTS rows, `line` bytes apart, into the order of a tile."""

    def write(context: Any, build: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, line, target = arguments
        for vector in range(VECTORS):
            rows = []
            for row in range(LANES):
                at = build.add(source, build.mul(line, _I64(vector * LANES + row)))
                rows.append(build.load(build.inttoptr(at, _INTEGERS.as_pointer()), align=2))
            for pair, values in enumerate(_transposed(build, rows)):
                at = build.add(target, _I64((pair * VECTORS + vector) * VECTOR_BYTES))
                build.store(values, build.inttoptr(at, _INTEGERS.as_pointer()), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), write


@intrinsic  # type: ignore[untyped-decorator]
def _put_rows(context: Any, source: Any, line: Any, target: Any) -> Any:
    """CHUNK numbers of float32 of ROWS rows, `line` bytes apart, rounded, into the order of a tile.

    Writes LANES - ROWS pairs too many.
    """

    def write(context: Any, build: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, line, target = arguments
        name, rows = "llvm.x86.avx512bf16.cvtneps2bf16.512", []
        shorten = cgutils.get_or_insert_function(build.module, ir.FunctionType(_SHORTS, [_FLOATS]), name)
        for row in range(ROWS):
            at, halves = build.add(source, build.mul(line, _I64(row))), []
            for half in range(2):
                place = build.add(at, _I64(half * VECTOR_BYTES))
                numbers = build.load(build.inttoptr(place, _FLOATS.as_pointer()), align=4)
                halves.append(build.call(shorten, [numbers]))
            rows.append(build.bitcast(build.shuffle_vector(*halves, _mask(range(CHUNK))), _INTEGERS))
        rows += [ir.Constant(_INTEGERS, ir.Undefined)] * (LANES - ROWS)
        for pair, values in enumerate(_transposed(build, rows)):
            at = build.add(target, _I64(pair * ROWS * 4))
            build.store(values, build.inttoptr(at, _INTEGERS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), write


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _rows_in_order(x: int, m: int, k: int, row_bytes: int, rows_at: int, short: int) -> None:
    """All rows, float32 [m, k], into the order of tiles, rounded; zeros after the last k."""
    whole = k // CHUNK * CHUNK
    for tile in range((m + ROWS - 1) // ROWS):
        first = x + min(tile * ROWS, m - ROWS) * k * 4
        target = rows_at + tile * row_bytes
        for at in range(0, whole, CHUNK):
            _put_rows(first + at * 4, k * 4, target + at * 2 * ROWS)
        if whole < k:
            for row in range(ROWS):
                _copied(first + (row * k + whole) * 4, short + row * CHUNK * 4, (k - whole) * 4, CHUNK * 4)
            _put_rows(short, CHUNK * 4, target + whole * 2 * ROWS)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _outs_in_order(w: int, k: int, panel_at: int, short: int) -> None:
    """OUTS rows of a matrix [., k], into the order of a tile; zeros after the last k."""
    whole = k // CHUNK * CHUNK
    for at in range(0, whole, CHUNK):
        _put_outs(w + at * 2, k * 2, panel_at + at * 2 * OUTS)
    if whole < k:
        for row in range(OUTS):
            _copied(w + (row * k + whole) * 2, short + row * CHUNK * 2, (k - whole) * 2, CHUNK * 2)
        _put_outs(short, CHUNK * 2, panel_at + whole * 2 * OUTS)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _product(x: int, w: int, bias: int, out: int, m: int, n: int, k: int, stride: int) -> None:
    """out [m, n] (rows `stride` numbers apart) = rounded x [m, k] @ w [n, k].T + bias [n].

    x: float32, w: bfloat16.  At least ROWS rows, OUTS outputs and one k.  All are addresses and lengths.
    """
    row_tiles, padded = (m + ROWS - 1) // ROWS, (k + CHUNK - 1) // CHUNK * CHUNK
    row_bytes = -(-(padded * 2 * ROWS + VECTOR_BYTES) // ALIGNED) * ALIGNED
    of_rows, rows_at = _aligned(row_tiles * row_bytes)
    of_panel, panel_at = _aligned(padded * 2 * OUTS)
    of_short, short = _aligned(OUTS * CHUNK * 4)
    _rows_in_order(x, m, k, row_bytes, rows_at, short)
    for first in range(0, n, OUTS):
        column = min(first, n - OUTS)  # the last tile is moved back over computed outputs: equal bits
        bias_at = bias + column * 4 if bias else 0
        _outs_in_order(w + column * k * 2, k, panel_at, short)
        for tile in range(row_tiles):
            row = min(tile * ROWS, m - ROWS)
            to = out + (row * stride + column) * 4
            _tile((rows_at + tile * row_bytes, panel_at, bias_at, to, stride, (k + 1) // 2))
    kernels._hold((of_rows, of_panel, of_short))


@cache
def product() -> Any:
    """As `kernels.product_of(torch.bfloat16)`, for rows rounded to bfloat16: at least ROWS, and OUTS outputs.

    Others are answered by 0, and scales are not read.  Where `IS_USABLE`.
    """

    def multiply_bfloat16(
        size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
    ) -> int:
        if m < ROWS or n < OUTS or k < 1:
            return 0
        _product(x, w, bias, out, m, n, k, stride)
        return 1

    return callback(multiply_bfloat16, types.int64(*[types.int64] * 10))
