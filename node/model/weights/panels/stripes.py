"""Products with weights of 8 bits in an order of their own, by instructions for bytes (AVX-512 VNNI).

`vpdpbusd` adds four products of unsigned with signed bytes to each lane of 32 bits.  A 16-bit number of x
plus 32,768 is two unsigned bytes, so its products take two of these instructions for every 64 weights, as
many as `vpdpwssd` takes, and no weight is widened.  With h and l, the sums of the upper and of the lower
bytes' products, and s, the sum of an output's weights, the sum of all products is

    256 * (h - 128 * s) + l

and exact: it is rounded once, as in node/model/weights/kernels.py, so a row has the same bits in both orders.

Weights lie in stripes (order.py), which one row of x reads as one stream.  A tile is an outer product, as in
BLIS (Van Zee and van de Geijn, ACM TOMS 41(3), 2015): the outputs of a stripe in the lanes of its vectors,
and a few rows of x, whose groups of four k are broadcast.  No lanes are added at the end.  A stripe stays in
a cache for all rows of x, and meanwhile the tiles ask for the memory of the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from node.model.weights import kernels
from node.model.weights.kernels import (
    _F32,
    _I8,
    _I32,
    _I64,
    _VECTOR,
    CACHE_LINE,
    _integers,
    _IntegerTile,
    _mask,
)
from node.model.weights.panels.integer_panels import _aligned, _copied, build_vector
from node.model.weights.panels.order import GROUP, OUTS, STRIPES

LANES = 16
VECTORS = OUTS // LANES
VECTOR_BYTES = 64
CHUNK = VECTOR_BYTES  # bytes of x that are split at once
MOST_ROWS = 6  # of a tile: two sums for each row and vector fill 24 registers
LEAST_ROWS = 4  # of one of several tiles
AHEAD_BYTES = 8192  # distance of the prefetch where one tile computes a stripe
# Of x in a tile.  One row asks for no memory: the CPU's own prefetch of its stream is faster.  Two ask for
# the first cache, more for the second one, which holds a stripe.
NEAR_ROWS = 2
LEFT = 128  # 32,768 / 256
_INTEGERS = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, VECTOR_BYTES)
# Before LLVM 22 its function for vpdpbusd takes the bytes of each lane as one number.
_OPERANDS = _BYTES if binding.llvm_version_info[0] >= 22 else _INTEGERS
ALONE, FIRST, LATER = range(3)  # a stripe's only tile, or one of several: the first one adds the weights


class _Bytes(_IntegerTile):
    """A tile of `rows` rows and a stripe's outputs."""

    def write_stripe(self, given: Sequence[Any], place: int) -> None:
        """The code.  place: among the tiles of a stripe.  given: addresses and lengths as i64:

        x: of the rows, `line` bytes apart, see `_in_bytes`.  w: the stripe.  totals: int32 [OUTS], LEFT times
        the sum of each output's weights, which the first tile writes.  x_scale, scale, bias, out, stride: as
        of a tile.  groups: of four k.  ahead: memory to ask for, in the first `lines` groups.
        """
        x, line, w, totals, x_scale, scale, bias, out, stride, groups, ahead, lines = given
        build, pairs = self.build, self.rows * VECTORS
        kind = ir.FunctionType(_INTEGERS, [_INTEGERS, _OPERANDS, _OPERANDS])
        multiply = cgutils.get_or_insert_function(build.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        rows = [build.add(x, build.mul(line, _I64(row))) for row in range(self.rows)]
        ones = build.bitcast(ir.Constant(_BYTES, [1] * VECTOR_BYTES), _OPERANDS)
        level = 3 if self.rows <= NEAR_ROWS else 2
        asked_lines = 0 if self.rows == 1 else VECTORS if place == ALONE else 1

        def body(sums: list[Any], group: Any) -> list[Any]:
            w_at = build.add(w, build.mul(group, _I64(VECTORS * VECTOR_BYTES)))
            weights = [
                build.load(self._at(w_at, vector * VECTOR_BYTES, _OPERANDS), align=1)
                for vector in range(VECTORS)
            ]
            now: list[Any] = []

            def add(numbers: Any) -> None:
                for weight in weights:
                    now.append(build.call(multiply, [sums[len(now)], numbers, weight]))

            for part in (0, 1):  # of a number: its lower and its upper byte
                for row in rows:
                    at = build.add(row, build.mul(group, _I64(2 * GROUP)))
                    few = self._everywhere(build.load(self._at(at, part * GROUP, _I32), align=4))
                    add(build.bitcast(few, _OPERANDS))
            if place != LATER:
                add(ones)
            return now

        def asking(sums: list[Any], group: Any) -> list[Any]:
            asked = build.add(ahead, build.mul(group, _I64(asked_lines * CACHE_LINE)))
            for number in range(asked_lines):
                pointer = build.inttoptr(build.add(asked, _I64(number * CACHE_LINE)), _I8.as_pointer())
                build.call(self.prefetch, [pointer, _I32(0), _I32(level), _I32(1)])  # to read, data
            return body(sums, group)

        count = 2 * pairs + (VECTORS if place != LATER else 0)
        sums = self._loop([_integers(0)] * count, _I64(0), lines, 1, asking)
        sums = self._loop(sums, lines, groups, 1, body) if place != ALONE else sums
        places = [self._at(totals, vector * VECTOR_BYTES, _INTEGERS) for vector in range(VECTORS)]
        if place == LATER:
            taken = [build.load(each, align=VECTOR_BYTES) for each in places]
        else:
            taken = [build.shl(each, _integers(LEFT.bit_length() - 1)) for each in sums[2 * pairs :]]
        if place == FIRST:
            for each, at in zip(taken, places, strict=True):
                build.store(each, at, align=VECTOR_BYTES)
        upper = [build.sub(each, taken[pair % VECTORS]) for pair, each in enumerate(sums[pairs : 2 * pairs])]
        self._answer(self.rounded(self._in_halves(sums[:pairs], upper)), x_scale, scale, bias, out, stride)

    def _in_halves(self, low: list[Any], high: list[Any]) -> list[Any]:
        """256 * high + low as multiples of 65,536, then the rest of each; see `halves`."""
        build = self.build
        upper, lower = [], []
        for one, two in zip(low, high, strict=True):
            upper.append(build.add(build.ashr(two, _integers(8)), build.ashr(one, _integers(16))))
            rest = build.shl(build.and_(two, _integers(0xFF)), _integers(8))
            lower.append(build.add(rest, build.and_(one, _integers(0xFFFF))))
        return upper + lower

    def _answer(self, sums: list[Any], x_scale: Any, scale: Any, bias: Any, out: Any, stride: Any) -> None:
        """out[row, out] = sum * scale[out] * x_scale[row] + bias[out]; scale and bias may be 0 for none."""
        build = self.build
        lines = [build.add(out, build.mul(build.mul(_I64(row), stride), _I64(4))) for row in range(self.rows)]
        scales, biases = self._numbers_or(scale, 1.0), self._numbers_or(bias, -0.0)  # change no number
        for row, line in enumerate(lines):
            row_scale = self._everywhere(build.load(self._at(x_scale, 4 * row, _F32), align=4))
            for vector in range(VECTORS):
                value = build.fmul(sums[row * VECTORS + vector], scales[vector])
                value = build.fadd(build.fmul(value, row_scale), biases[vector])
                build.store(value, self._at(line, vector * VECTOR_BYTES, _VECTOR), align=4)

    def _numbers_or(self, address: Any, other: float) -> list[Any]:
        """Float32 numbers of the tile's outputs, or another number where the address is 0."""
        build = self.build
        before = build.block
        there, after = build.append_basic_block("there"), build.append_basic_block("after")
        build.cbranch(build.icmp_signed("==", address, _I64(0)), after, there)
        build.position_at_end(there)
        found = [
            build.load(self._at(address, vector * VECTOR_BYTES, _VECTOR), align=4)
            for vector in range(VECTORS)
        ]
        build.branch(after)
        build.position_at_end(after)
        phis = []
        for each in found:
            phi = build.phi(_VECTOR)
            phi.add_incoming(ir.Constant(_VECTOR, [other] * LANES), before)
            phi.add_incoming(each, there)
            phis.append(phi)
        return phis

    def _everywhere(self, number: Any) -> Any:
        one = build_vector(self.build, number)
        return self.build.shuffle_vector(one, one, _mask([0] * LANES))

    def _at(self, base: Any, offset: int, kind: Any) -> Any:
        return self.build.inttoptr(self.build.add(base, _I64(offset)), kind.as_pointer())


def _tile(rows: int, place: int) -> Any:
    """A function for compiled code: computes one tile.  given: see `_Bytes.write_stripe`."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(context: Any, given: Any) -> Any:
        def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            values = [builder.extract_value(arguments[0], index) for index in range(len(given))]
            _Bytes(builder, rows, VECTORS, _I8).write_stripe(values, place)
            return context.get_dummy_value()

        return types.void(given), write

    return tile


_alone_1, _alone_2, _alone_3, _alone_4, _alone_5, _alone_6 = (
    _tile(rows, ALONE) for rows in range(1, MOST_ROWS + 1)
)
_first_4, _first_5, _first_6 = (_tile(rows, FIRST) for rows in range(LEAST_ROWS, MOST_ROWS + 1))
_later_4, _later_5, _later_6 = (_tile(rows, LATER) for rows in range(LEAST_ROWS, MOST_ROWS + 1))


@intrinsic  # type: ignore[untyped-decorator]
def _split(context: Any, source: Any, target: Any) -> Any:
    """CHUNK / 2 numbers of 16 bits -> for each GROUP its lower bytes, then its upper bytes plus LEFT."""

    def write(context: Any, build: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, target = arguments
        numbers = build.load(build.inttoptr(source, _BYTES.as_pointer()), align=2)
        order = [group + place for group in range(0, CHUNK, 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        split = build.shuffle_vector(numbers, numbers, _mask(order))
        left = ir.Constant(_BYTES, ([0] * GROUP + [-LEFT] * GROUP) * (CHUNK // 8))
        build.store(build.xor(split, left), build.inttoptr(target, _BYTES.as_pointer()), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), write


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _in_bytes(codes: int, m: int, k: int, line: int, target: int, short: int) -> None:
    """Rows of 16-bit numbers [m, k] as `_split` leaves them, `line` bytes apart; zeros after the last k."""
    for row in range(m):
        source, to = codes + row * k * 2, target + row * line
        whole = k * 2 // CHUNK * CHUNK
        for at in range(0, whole, CHUNK):
            _split(source + at, to + at)
        if whole < k * 2:
            _copied(source + whole, short, k * 2 - whole, CHUNK)
            _split(short, to + whole)


@njit(nogil=True, fastmath=False)  # type: ignore[untyped-decorator]
def _alone(rows: int, given: Any) -> None:
    if rows == 1:
        _alone_1(given)
    elif rows == 2:
        _alone_2(given)
    elif rows == 3:
        _alone_3(given)
    elif rows == 4:
        _alone_4(given)
    elif rows == 5:
        _alone_5(given)
    else:
        _alone_6(given)


@njit(nogil=True, fastmath=False)  # type: ignore[untyped-decorator]
def _one_of_several(rows: int, is_first: bool, given: Any) -> None:
    if is_first:
        if rows == 4:
            _first_4(given)
        elif rows == 5:
            _first_5(given)
        else:
            _first_6(given)
    elif rows == 4:
        _later_4(given)
    elif rows == 5:
        _later_5(given)
    else:
        _later_6(given)


@njit(nogil=True, fastmath=False)  # type: ignore[untyped-decorator]
def product(
    x: int, x_scale: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
) -> None:
    """out [m, n] (rows `stride` numbers apart) = x [m, k] @ w [n, k].T * scale [n] * x_scale [m] + bias [n].

    x: int16.  w: stripes.  All are addresses and lengths.
    """
    line = (k * 2 + CHUNK - 1) // CHUNK * CHUNK
    of_rows, rows_at = _aligned(m * line + CHUNK)
    of_totals, totals = _aligned(OUTS * 4)
    _in_bytes(x, m, k, line, rows_at, rows_at + m * line)
    tiles, groups = (m + MOST_ROWS - 1) // MOST_ROWS, k // GROUP
    lines = groups
    if tiles > 1:  # they ask for the next stripe, each for a part
        lines = min((k * OUTS // CACHE_LINE + tiles - 1) // tiles, groups)
    for column in range(0, n, OUTS):
        w_at, scale_at = w + column * k, scale + column * 4 if scale else 0
        bias_at = bias + column * 4 if bias else 0
        ahead, row = w_at + (AHEAD_BYTES if tiles == 1 else k * OUTS), 0
        for left in range(tiles, 0, -1):
            rows = (m - row + left - 1) // left
            if tiles > 1:
                rows = max(rows, LEAST_ROWS)
            at = min(row, m - rows)  # the last tile is moved back over computed rows: equal bits
            given = (
                rows_at + at * line, line, w_at, totals, x_scale + at * 4, scale_at, bias_at,
                out + (at * stride + column) * 4, stride, groups, ahead, lines,
            )  # fmt: skip
            if tiles == 1:
                _alone(rows, given)
            else:
                _one_of_several(rows, row == 0, given)
            ahead += lines * CACHE_LINE
            row = at + rows
    kernels._hold((of_rows, of_totals))


def offer() -> None:
    """Have the kernels multiply weights in STRIPES, where this CPU can."""
    if kernels.IN_STRIPES:
        kernels.take_order(kernels.ITEMS[STRIPES], product)
