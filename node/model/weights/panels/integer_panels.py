"""Products of many rows with weights of 8 bits: rows of 16-bit integers, and panels of 16-bit integers.

A tile is an outer product, as in BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015): two vectors of
outputs and a few rows, whose pairs of k are broadcast.  No lanes have to be added at the end.  The whole sum
is exact and rounded once, as in node/model/weights/kernels.py, so the two give a row the same bits.

A piece of k of the matrix for one tile of outputs is put into the order of the tile, 16 KiB, and stays in
the L1 cache while all rows are multiplied.  Between two pieces the rows' upper and lower sums lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from node.model.weights import kernels
from node.model.weights.compiling import callback
from node.model.weights.kernels import _F32, _I8, _I16, _I32, _I64, _VECTOR, LANES, _IntegerTile, _mask

ROWS, VECTORS = 12 if LANES == 16 else 6, 2  # of a tile: its sums fill the registers
OUTS = VECTORS * LANES
PIECE = 512  # of k: a whole sum of this many products fits 32 bits
assert PIECE * kernels.LARGEST * 128 < 1 << 31
CHUNK = 2 * LANES  # of k that is put into order at once
VECTOR_BYTES = 4 * LANES
ALIGNED = 64
SUMS_BYTES = 2 * ROWS * VECTORS * VECTOR_BYTES  # of a tile: upper and lower
_INTEGERS = ir.VectorType(_I32, LANES)
_PAIRS = ir.VectorType(_I16, 2 * LANES)


class _Outer(_IntegerTile):
    """A tile of ROWS rows and OUTS outputs."""

    def write_piece(self, given: Sequence[Any]) -> None:
        """The code of one piece of k.  given: addresses and lengths as i64:

        x: pairs of 16-bit numbers, [pairs, ROWS]; w: [pairs, OUTS]; sums: of the pieces before.
        x_scale, scale, bias, out, stride: as of a tile.  pairs: of this piece; first, last: of the pieces.
        """
        x, w, sums_at, x_scale, scale, bias, out, stride, pairs, first, last = given
        build = self.build
        count = ROWS * VECTORS
        sums = self._loop([kernels._integers(0)] * count, _I64(0), pairs, 1, self._pair(x, w))
        halves = self.halves(sums)
        places = [self._at(sums_at, _I64(index * VECTOR_BYTES), _INTEGERS) for index in range(2 * count)]
        halves = self._with_earlier(halves, places, first)
        ends, goes_on, done = (build.append_basic_block(name) for name in ("ends", "goes_on", "done"))
        build.cbranch(build.icmp_signed("!=", last, _I64(0)), ends, goes_on)
        build.position_at_end(goes_on)
        for each, place in zip(halves, places, strict=True):
            build.store(each, place, align=VECTOR_BYTES)
        build.branch(done)
        build.position_at_end(ends)
        self._answer(self.rounded(halves), x_scale, scale, bias, out, stride)
        build.branch(done)
        build.position_at_end(done)

    def _pair(self, x: Any, w: Any) -> Any:
        build = self.build

        def body(sums: list[Any], k: Any) -> list[Any]:
            w_at = build.add(w, build.mul(k, _I64(VECTORS * VECTOR_BYTES)))
            weights = [
                build.load(self._at(w_at, _I64(index * VECTOR_BYTES), _PAIRS), align=VECTOR_BYTES)
                for index in range(VECTORS)
            ]
            x_at, now = build.add(x, build.mul(k, _I64(4 * ROWS))), []
            for row in range(ROWS):
                pair = build.load(self._at(x_at, _I64(4 * row), _I32), align=4)
                both = build.bitcast(self._everywhere(pair), _PAIRS)
                now += [
                    self._product(both, weight, sums[row * VECTORS + index])
                    for index, weight in enumerate(weights)
                ]
            return now

        return body

    def _with_earlier(self, halves: list[Any], places: list[Any], first: Any) -> list[Any]:
        build = self.build
        before = build.block
        there, after = build.append_basic_block("there"), build.append_basic_block("after")
        build.cbranch(build.icmp_signed("!=", first, _I64(0)), after, there)
        build.position_at_end(there)
        more = [
            build.add(each, build.load(place, align=VECTOR_BYTES))
            for each, place in zip(halves, places, strict=True)
        ]
        build.branch(after)
        build.position_at_end(after)
        phis = []
        for each, other in zip(halves, more, strict=True):
            phi = build.phi(_INTEGERS)
            phi.add_incoming(each, before)
            phi.add_incoming(other, there)
            phis.append(phi)
        return phis

    def _answer(self, sums: list[Any], x_scale: Any, scale: Any, bias: Any, out: Any, stride: Any) -> None:
        """out[row, out] = sum * scale[out] * x_scale[row] + bias[out]; a missing part's address is 0."""
        build = self.build
        for row in range(ROWS):
            line = build.add(out, build.mul(build.mul(_I64(row), stride), _I64(4)))
            row_scale = self._everywhere(build.load(self._at(x_scale, _I64(4 * row), _F32), align=4))
            for index in range(VECTORS):
                offset, value = _I64(index * VECTOR_BYTES), sums[row * VECTORS + index]
                value = self._given(value, scale, out, offset, build.fmul)
                value = build.fmul(value, row_scale)
                value = self._given(value, bias, out, offset, build.fadd)
                build.store(value, self._at(line, offset, _VECTOR), align=4)

    def _given(self, value: Any, address: Any, other: Any, offset: Any, combine: Any) -> Any:
        """The value combined with the numbers at an address, unless it is 0; `other` may be read as well."""
        build = self.build
        none = build.icmp_signed("==", address, _I64(0))
        numbers = build.load(self._at(build.select(none, other, address), offset, _VECTOR), align=4)
        return build.select(none, value, combine(value, numbers))

    def _everywhere(self, number: Any) -> Any:
        one = build_vector(self.build, number)
        return self.build.shuffle_vector(one, one, _mask([0] * LANES))

    def _at(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.build.inttoptr(self.build.add(base, offset), kind.as_pointer())


def build_vector(builder: Any, number: Any) -> Any:
    """A vector whose first lane is a number."""
    empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    return builder.insert_element(empty, number, _I32(0))


@intrinsic  # type: ignore[untyped-decorator]
def _tile(context: Any, given: Any) -> Any:
    """Compute one piece of k of a tile.  given: see `write_piece`."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        values = [builder.extract_value(arguments[0], index) for index in range(len(given))]
        _Outer(builder, ROWS, VECTORS, _I16).write_piece(values)
        return context.get_dummy_value()

    return types.void(given), write


@intrinsic  # type: ignore[untyped-decorator]
def _put_outs(context: Any, source: Any, line: Any, target: Any) -> Any:
    """CHUNK numbers of 8 bits of OUTS rows, `line` bytes apart, into the order of a tile, in 16 bits."""

    def write(context: Any, build: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, line, target = arguments
        narrow = ir.VectorType(_I8, CHUNK)
        for vector in range(VECTORS):
            rows = []
            for row in range(LANES):
                at = build.add(source, build.mul(line, _I64(vector * LANES + row)))
                numbers = build.load(build.inttoptr(at, narrow.as_pointer()), align=1)
                rows.append(build.bitcast(build.sext(numbers, _PAIRS), _INTEGERS))
            for pair, values in enumerate(_transposed(build, rows)):
                at = build.add(target, _I64((pair * VECTORS + vector) * VECTOR_BYTES))
                build.store(values, build.inttoptr(at, _INTEGERS.as_pointer()), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), write


def _transposed(build: Any, rows: list[Any]) -> list[Any]:
    """LANES vectors of LANES numbers as their columns, in as many steps as a number of lanes has bits."""
    rows = list(rows)
    half = 1
    while half < LANES:
        low = _mask([lane if not lane & half else LANES + lane - half for lane in range(LANES)])
        high = _mask([lane + half if not lane & half else LANES + lane for lane in range(LANES)])
        for one in range(LANES):
            if not one & half:
                pair = rows[one], rows[one + half]
                rows[one], rows[one + half] = (build.shuffle_vector(*pair, mask) for mask in (low, high))
        half *= 2
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def _put_row_pairs(context: Any, source: Any, line: Any, target: Any, pairs: Any) -> Any:
    """Pairs of 16-bit numbers of ROWS rows, `line` bytes apart, into the order of a tile."""

    def write(context: Any, build: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, line, target, pairs = arguments

        def body(none: list[Any], pair: Any) -> list[Any]:
            for row in range(ROWS):
                at = build.add(build.add(source, build.mul(line, _I64(row))), build.mul(pair, _I64(4)))
                to = build.add(target, build.add(build.mul(pair, _I64(4 * ROWS)), _I64(4 * row)))
                number = build.load(build.inttoptr(at, _I32.as_pointer()), align=2)
                build.store(number, build.inttoptr(to, _I32.as_pointer()), align=4)
            return none

        _Outer(build, ROWS, VECTORS, _I16)._loop([], _I64(0), pairs, 1, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), write


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _aligned(size: int) -> tuple[Any, int]:
    """Memory of `size` bytes, and its first address that is aligned."""
    memory = np.empty(size + ALIGNED, np.int8)
    return memory, (memory.ctypes.data + ALIGNED - 1) // ALIGNED * ALIGNED


@intrinsic  # type: ignore[untyped-decorator]
def _bytes_at(context: Any, address: Any) -> Any:
    """An address as a pointer to int8."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.inttoptr(arguments[0], _I8.as_pointer())

    return types.CPointer(types.int8)(types.int64), write


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _rows_in_order(codes: int, m: int, k: int, row_bytes: int, rows_at: int) -> None:
    """All rows, int16 [m, k], into the order of tiles; an odd k gets a zero."""
    pairs = k // 2
    for tile in range((m + ROWS - 1) // ROWS):
        first = codes + min(tile * ROWS, m - ROWS) * k * 2
        target = rows_at + tile * row_bytes
        _put_row_pairs(first, k * 2, target, pairs)
        if k % 2:
            for row in range(ROWS):
                _copied(first + (row * k + k - 1) * 2, target + (pairs * ROWS + row) * 4, 2, 4)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _copied(source: int, target: int, count: int, whole: int) -> None:
    """Copy `count` bytes, and fill up with zeros to `whole` bytes."""
    given, taken = carray(_bytes_at(source), count), carray(_bytes_at(target), whole)
    for i in range(count):
        taken[i] = given[i]
    for i in range(count, whole):
        taken[i] = 0


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _outs_in_order(w: int, k: int, start: int, stop: int, panel_at: int, short_at: int) -> None:
    """Numbers [start, stop) of OUTS rows of a matrix [., k], into the order of a tile."""
    for at in range(start, stop, CHUNK):
        target = panel_at + (at - start) // 2 * VECTORS * VECTOR_BYTES
        if at + CHUNK <= stop:
            _put_outs(w + at, k, target)
        else:
            for row in range(OUTS):
                _copied(w + row * k + at, short_at + row * CHUNK, stop - at, CHUNK)
            _put_outs(short_at, CHUNK, target)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _product(
    x: int, x_scale: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
) -> None:
    """out [m, n] (rows `stride` numbers apart) = x [m, k] @ w [n, k].T * scale [n] * x_scale [m] + bias [n].

    x: int16, w: int8.  At least ROWS rows, OUTS outputs and one k.  All are addresses and lengths.
    """
    row_tiles = (m + ROWS - 1) // ROWS
    row_bytes = -(-((k + 1) // 2 * ROWS * 4) // ALIGNED) * ALIGNED
    of_rows, rows_at = _aligned(row_tiles * row_bytes)
    of_panel, panel_at = _aligned((PIECE + CHUNK) // 2 * VECTORS * VECTOR_BYTES)
    of_short, short_at = _aligned(OUTS * CHUNK)
    of_sums, sums_at = _aligned(row_tiles * SUMS_BYTES if k > PIECE else 0)
    _rows_in_order(x, m, k, row_bytes, rows_at)
    for first in range(0, n, OUTS):
        column = min(first, n - OUTS)  # the last tile is moved back over computed outputs: equal bits
        scale_at = scale + column * 4 if scale else 0
        bias_at = bias + column * 4 if bias else 0
        for start in range(0, k, PIECE):
            stop = min(start + PIECE, k)
            _outs_in_order(w + column * k, k, start, stop, panel_at, short_at)
            for tile in range(row_tiles):
                row = min(tile * ROWS, m - ROWS)
                _tile(
                    (
                        rows_at + tile * row_bytes + start // 2 * ROWS * 4, panel_at,
                        sums_at + tile * SUMS_BYTES, x_scale + row * 4, scale_at, bias_at,
                        out + (row * stride + column) * 4, stride, (stop - start + 1) // 2,
                        1 if start == 0 else 0, 1 if stop == k else 0,
                    )
                )  # fmt: skip
    kernels._hold((of_rows, of_panel, of_short, of_sums))


@cache
def product() -> Any:
    """As `kernels.product_of(torch.int8)`, for at least ROWS rows and OUTS outputs: others answer 0.

    k: at most EXACT_WIDTH.
    """

    def multiply_integers(
        size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
    ) -> int:
        if m < ROWS or n < OUTS or k < 1 or k > kernels.EXACT_WIDTH:
            return 0
        codes, scales, memory = kernels._in_16_bits(x, m, k)
        _product(codes.ctypes.data, scales.ctypes.data, w, scale, bias, out, m, n, k, stride)
        kernels._hold((memory, scales))
        return 1

    return callback(multiply_integers, types.int64(*[types.int64] * 10))
