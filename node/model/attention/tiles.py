"""The innermost loops of attention, in LLVM's own language: a tile's sums stay in registers.

A compiler that vectorises a sum chooses another order for every shape of tile.  Here each sum has one order
for every tile, so a query's result has the same bits with any queries next to it.

Keys and values lie in the stores of a page pool as float32, or as bfloat16, the upper half of a float32.

Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload

from node.model.weights.kernels import LANES

REGISTERS = 32 if LANES == 16 else 16  # of vectors
_FEATURES = (numba.config.CPU_FEATURES or get_host_cpu_features()).split(",")
# Whether the CPU multiplies pairs of bfloat16 and adds both products to a float32: vdpbf16ps.
PAIRS = LANES == 16 and "+avx512bf16" in _FEATURES
FLOAT_BYTES, BRAIN_BYTES = 4, 2  # of a float32 and of a bfloat16
IN_PAIRS = -2  # in place of an item's bytes: two bfloat16 numbers in a lane
CACHE_LINE = 64

# 2^r for r in [-0.5, 0.5], to 2e-8: the powers of r from the sixth down.
_EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)

_F32, _VOID = ir.FloatType(), ir.VoidType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


class _Writer:
    """Writes vectors of `width` float32 numbers and loops over them.  Addresses are i64."""

    def __init__(self, builder: Any, width: int) -> None:
        self.build = builder
        self.width = width
        self.vector = ir.VectorType(_F32, width)
        self.words = ir.VectorType(_I32, width)
        self.zero = ir.Constant(self.vector, [0.0] * width)
        module = builder.module
        kind = ir.FunctionType(_VOID, [_I8.as_pointer(), _I32, _I32, _I32])
        self._prefetch = cgutils.get_or_insert_function(module, kind, "llvm.prefetch.p0i8")

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c."""
        return self.call("fmuladd", a, b, c)

    def of_pairs(self, a: Any, b: Any, c: Any) -> Any:
        """c plus the products of both bfloat16 numbers in each 32 bits of a and b; see PAIRS."""
        kind = ir.FunctionType(self.vector, [self.vector, self.words, self.words])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.width}"
        return self.build.call(cgutils.get_or_insert_function(self.build.module, kind, name), [c, a, b])

    def shortened(self, x: Any) -> Any:
        """A vector of float32 as bfloat16, in 16 bits; see PAIRS."""
        shorts = ir.VectorType(_I16, self.width)
        kind = ir.FunctionType(shorts, [self.vector])
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * self.width}"
        return self.build.call(cgutils.get_or_insert_function(self.build.module, kind, name), [x])

    def at(self, base: Any, offset: Any) -> Any:
        """An address some bytes further.  offset: an i64 or a number."""
        offset = _I64(offset) if isinstance(offset, int) else offset
        return self.build.add(base, offset)

    def load(self, address: Any, kind: Any = None) -> Any:
        """A vector, or a value of this type, at any address."""
        kind = kind or self.vector
        align = kind.element.width // 8 if isinstance(getattr(kind, "element", None), ir.IntType) else 4
        return self.build.load(self.build.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Put a vector there."""
        self.build.store(value, self.build.inttoptr(address, value.type.as_pointer()), align=align)

    def spread(self, address: Any, kind: Any = _F32) -> Any:
        """The number of this type there in all lanes."""
        return self.all(self.load(address, kind))

    def widened(self, address: Any, item_bytes: int) -> Any:
        """A vector of float32, of float32 or bfloat16 numbers there."""
        if item_bytes == FLOAT_BYTES:
            return self.load(address)
        wide = self.words
        upper = self.load(address, ir.VectorType(_I16, self.width))
        sixteen = ir.Constant(wide, [16] * self.width)
        return self.build.bitcast(self.build.shl(self.build.zext(upper, wide), sixteen), self.vector)

    def zipped(self, one: Any, two: Any, vectors: int) -> list[Any]:
        """Bfloat16 numbers at an address, in the lower half of a lane each, and those of `two` or 0 above."""
        halves, found, width = ir.VectorType(_I16, 2 * self.width), [], self.width
        for first in range(0, vectors - vectors % 2, 2):
            a = self.load(self.at(one, first * width * BRAIN_BYTES), halves)
            b = ir.Constant(halves, [0] * 2 * width)
            if two is not None:
                b = self.load(self.at(two, first * width * BRAIN_BYTES), halves)
            for begin in (0, width):
                places = [lane for i in range(begin, begin + width) for lane in (i, i + 2 * width)]
                found.append(self.build.bitcast(self.build.shuffle_vector(a, b, lanes(places)), self.words))
        if vectors % 2:
            at = (vectors - 1) * width * BRAIN_BYTES
            shorts = ir.VectorType(_I16, width)
            found.append(self.build.zext(self.load(self.at(one, at), shorts), self.words))
            if two is not None:
                upper = self.widened(self.at(two, at), BRAIN_BYTES)
                found[-1] = self.build.or_(found[-1], self.build.bitcast(upper, self.words))
        return found

    def prefetch_all(self, address: Any, size: int) -> None:
        """Ask for the lines of `size` bytes there, to read them soon."""
        for offset in range(0, size, CACHE_LINE):
            self.ask(self.at(address, offset))

    def ask(self, address: Any) -> list[Any]:
        """Ask for the line there, to read it soon; nothing."""
        pointer = self.build.inttoptr(address, _I8.as_pointer())
        # To read, for the second level, data.  The first level keeps few requests under way: 10 GB/s and 15.
        self.build.call(self._prefetch, [pointer, _I32(0), _I32(2), _I32(1)])
        return []

    def call(self, name: str, *arguments: Any) -> Any:
        """An operation of LLVM's on vectors."""
        kind = ir.FunctionType(self.vector, [self.vector] * len(arguments))
        found = cgutils.get_or_insert_function(self.build.module, kind, f"llvm.{name}.v{self.width}f32")
        return self.build.call(found, arguments)

    def all(self, number: Any) -> Any:
        """A number, or a value, in all lanes."""
        if isinstance(number, float):
            return ir.Constant(self.vector, [number] * self.width)
        undefined = ir.Constant(ir.VectorType(number.type, self.width), ir.Undefined)
        first = self.build.insert_element(undefined, number, _I32(0))
        return self.build.shuffle_vector(first, undefined, lanes([0] * self.width))

    def larger(self, a: Any, b: Any) -> Any:
        """The larger number of each lane; where a is no number, b."""
        return self.build.select(self.build.fcmp_ordered(">", a, b), a, b)

    def exp2(self, x: Any) -> Any:
        """2^x for x <= 0, to about 2 units in the last place; 0 far below 2^-126.  NaN stays NaN."""
        build = self.build
        scales = self.width == 16  # the exponent is added by one instruction of AVX-512's
        if scales:
            x = self.larger(self.all(-200.0), x)  # the rest of -infinity is no number
        n = self.call("floor", build.fadd(x, self.all(0.5)))
        r = build.fsub(x, n)
        p = self.all(_EXP2[0])
        for factor in _EXP2[1:]:
            p = self.fma(p, r, self.all(factor))
        if scales:
            kind = ir.FunctionType(self.vector, [self.vector] * 3 + [_I16, _I32])
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            added = cgutils.get_or_insert_function(build.module, kind, name)
            return build.call(added, [p, n, self.zero, _I16(-1), _I32(4)])  # all lanes, rounded as usual
        wide = self.words
        power = build.add(build.fptosi(n, wide), ir.Constant(wide, [127] * self.width))
        power = build.bitcast(build.shl(power, ir.Constant(wide, [23] * self.width)), self.vector)
        below = build.fcmp_ordered("<", x, self.all(-126.0))
        return build.select(below, self.zero, build.fmul(p, power))

    def loop(self, carried: list[Any], start: Any, stop: Any, step: Any, body: Callable[..., Any]) -> Any:
        """body(carried, i) -> the next ones, for i in start, start + step ... below stop; the last ones."""
        build = self.build
        before = build.block
        head, inside, after = (build.append_basic_block(name) for name in ("head", "inside", "after"))
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(_I64)
        index.add_incoming(start, before)
        phis = [build.phi(each.type) for each in carried]
        for phi, each in zip(phis, carried, strict=True):
            phi.add_incoming(each, before)
        build.cbranch(build.icmp_signed("<", index, stop), inside, after)
        build.position_at_end(inside)
        for phi, each in zip(phis, body(list(phis), index), strict=True):
            phi.add_incoming(each, build.block)
        index.add_incoming(build.add(index, step), build.block)
        build.branch(head)
        build.position_at_end(after)
        return list(phis)

    def added(self, sums: list[Any]) -> list[Any]:
        """The sum of each vector, `width` of them in a vector, in order.

        Lane i is added to lane i + width / 2, and so on down to two.  Two vectors are joined before each
        addition, which changes no pair of lanes.
        """
        blocks, vectors = self.width, list(sums)  # blocks: lanes that belong to one sum
        while blocks > 1:
            half, joined = blocks // 2, []
            for first in range(0, len(vectors), 2):
                one, two = vectors[first], vectors[min(first + 1, len(vectors) - 1)]
                low = [lane for lane in range(2 * self.width) if lane % blocks < half]
                parts = (lanes(low), lanes([lane + half for lane in low]))
                joined.append(self.build.fadd(*(self.build.shuffle_vector(one, two, m) for m in parts)))
            vectors, blocks = joined, half
        return vectors


def lanes(numbers: Sequence[int]) -> ir.Constant:
    """A mask of a shuffle."""
    return ir.Constant(ir.VectorType(_I32, len(numbers)), list(numbers))


def _typed(kind: Any, constants: Sequence[Any], count: int, write: Callable[..., None]) -> Any:
    """The answer of an intrinsic of a kind, constants and `count` int64: write(builder, constants, given).

    kind: a tuple of an integer of a number's size for each lane, of which only the type is used; of uint16
    for lanes of two bfloat16 numbers each (PAIRS).
    """
    if not isinstance(kind, types.UniTuple) or not all(
        isinstance(e, types.IntegerLiteral) for e in constants
    ):
        return None
    item_bytes = kind.dtype.bitwidth // 8 if kind.dtype.signed else IN_PAIRS
    numbers = [kind.count, item_bytes, *(each.literal_value for each in constants)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        write(builder, numbers, arguments[1 + len(constants) :])
        return context.get_dummy_value()

    return types.void(kind, *constants, *[types.int64] * count), generate


def _write_scores(builder: Any, constants: Sequence[int], arguments: Sequence[Any]) -> None:
    width, item_bytes, rows, keys = constants
    q, q_stride, key, key_stride, ahead, out, out_stride, size = arguments
    to, pairs = _Writer(builder, width), item_bytes == IN_PAIRS
    product = to.of_pairs if pairs else to.fma
    if pairs:
        item_bytes, size = FLOAT_BYTES, builder.lshr(size, _I64(1))
    key_rows = [to.at(key, builder.mul(_I64(i), key_stride)) for i in range(keys)]
    q_rows = [to.at(q, builder.mul(_I64(i), q_stride)) for i in range(rows)]

    def body(sums: list[Any], index: Any) -> list[Any]:
        offset, q_offset = builder.mul(index, _I64(item_bytes)), builder.mul(index, _I64(FLOAT_BYTES))
        to.prefetch_all(to.at(ahead, builder.mul(index, _I64(item_bytes * keys))), width * item_bytes * keys)
        queries = [to.load(to.at(row, q_offset), to.words if pairs else to.vector) for row in q_rows]
        for i in range(keys):
            address = to.at(key_rows[i], offset)
            vector = to.load(address, to.words) if pairs else to.widened(address, item_bytes)
            for row, query in enumerate(queries):
                sums[row * keys + i] = product(query, vector, sums[row * keys + i])
        return sums

    zeros = [to.zero] * (rows * keys)
    sums = to.added(to.loop(zeros, _I64(0), size, _I64(width), body))
    for row in range(rows):
        address = to.at(out, builder.mul(_I64(row), out_stride))
        first = row * keys
        while first < (row + 1) * keys:
            vector, lane = divmod(first, width)
            count = min(width - lane, (row + 1) * keys - first)
            part = builder.shuffle_vector(sums[vector], sums[vector], lanes(range(lane, lane + count)))
            to.store(part, to.at(address, (first - row * keys) * 4))
            first += count


@intrinsic  # type: ignore[untyped-decorator]
def fetch(context: Any, address: Any, size: Any) -> Any:
    """Ask for the lines of `size` bytes at an address, to read them soon."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        to = _Writer(builder, LANES)
        to.loop([], _I64(0), arguments[1], _I64(CACHE_LINE), lambda _, i: to.ask(to.at(arguments[0], i)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), write


@intrinsic  # type: ignore[untyped-decorator]
def scores(
    context: Any, kind: Any, rows: Any, keys: Any, q: Any, q_stride: Any, key: Any,
    key_stride: Any, ahead: Any, out: Any, out_stride: Any, size: Any,
) -> Any:  # fmt: skip
    """The products of `rows` queries with `keys` keys, each the sum over a head of `size` numbers.

    rows, keys: constants.  q: float32 queries, or bfloat16 in pairs.  key: keys of the kind's numbers.
    ahead: an address whose lines are fetched meanwhile, laid out as the keys.  Strides: bytes.
    out: float32 [rows, keys].
    """
    return _typed(kind, (rows, keys), 8, _write_scores)


def _write_weighted(builder: Any, constants: Sequence[int], arguments: Sequence[Any]) -> None:
    width, item_bytes, rows, vectors = constants
    weight, weight_stride, value, value_stride, ahead, out, out_stride, count = arguments
    to, pairs = _Writer(builder, width), item_bytes == IN_PAIRS
    item_bytes = BRAIN_BYTES if pairs else item_bytes
    places = [
        to.at(to.at(out, builder.mul(_I64(row), out_stride)), i * width * FLOAT_BYTES)
        for row in range(rows)
        for i in range(vectors)
    ]
    weights = [to.at(weight, builder.mul(_I64(row), weight_stride)) for row in range(rows)]
    read = vectors * width * item_bytes  # of a position

    def added(sums: list[Any], parts: list[Any], factors: list[Any]) -> list[Any]:
        product = to.of_pairs if pairs else to.fma
        for i, part in enumerate(parts):
            for row, factor in enumerate(factors):
                sums[row * vectors + i] = product(factor, part, sums[row * vectors + i])
        return sums

    def single(sums: list[Any], index: Any) -> list[Any]:
        own = to.at(value, builder.mul(index, value_stride))
        to.prefetch_all(to.at(ahead, builder.mul(index, _I64(read))), read)
        factors = [to.spread(to.at(each, builder.mul(index, _I64(FLOAT_BYTES)))) for each in weights]
        parts = [to.widened(to.at(own, i * width * item_bytes), item_bytes) for i in range(vectors)]
        return added(sums, parts, factors)

    def pair(sums: list[Any], index: Any) -> list[Any]:
        own = to.at(value, builder.mul(index, value_stride))
        to.prefetch_all(to.at(ahead, builder.mul(index, _I64(read))), 2 * read)
        factors = [to.spread(to.at(each, builder.mul(index, _I64(BRAIN_BYTES))), _I32) for each in weights]
        return added(sums, to.zipped(own, to.at(own, value_stride), vectors), factors)

    def last(sums: list[Any], index: Any) -> list[Any]:
        own = to.at(value, builder.mul(index, value_stride))
        factors = []
        for each in weights:
            short = to.load(to.at(each, builder.mul(index, _I64(BRAIN_BYTES))), _I16)
            factors.append(to.all(builder.zext(short, _I32)))
        return added(sums, to.zipped(own, None, vectors), factors)

    sums = [to.load(place) for place in places]
    if pairs:
        even = builder.and_(count, _I64(-2))
        sums = to.loop(sums, _I64(0), even, _I64(2), pair)
        sums = to.loop(sums, even, count, _I64(1), last)
    else:
        sums = to.loop(sums, _I64(0), count, _I64(1), single)
    for place, total in zip(places, sums, strict=True):
        to.store(total, place)


@intrinsic  # type: ignore[untyped-decorator]
def weighted(
    context: Any, kind: Any, rows: Any, vectors: Any, weight: Any, weight_stride: Any,
    value: Any, value_stride: Any, ahead: Any, out: Any, out_stride: Any, count: Any,
) -> Any:  # fmt: skip
    """out += the sum of `count` values, each times its weight, for `rows` queries.

    rows, vectors: constants; a row of out is `vectors` vectors.
    weight: float32 [rows, count], or bfloat16 in pairs.  value, ahead, strides: see `scores`.
    """
    return _typed(kind, (rows, vectors), 8, _write_weighted)


def _write_outer(builder: Any, constants: Sequence[int], arguments: Sequence[Any]) -> None:
    width, item_bytes, rows, vectors = constants
    a, a_row, a_step, b, b_step, out, out_row, count, kept = arguments
    to = _Writer(builder, width)
    pairs = item_bytes == IN_PAIRS
    number, vector, product = (_I32, to.words, to.of_pairs) if pairs else (_F32, to.vector, to.fma)
    places = [
        to.at(to.at(out, builder.mul(_I64(row), out_row)), i * width * 4)
        for row in range(rows)
        for i in range(vectors)
    ]
    a_rows = [to.at(a, builder.mul(_I64(row), a_row)) for row in range(rows)]

    def body(sums: list[Any], index: Any) -> list[Any]:
        b_here, a_here = to.at(b, builder.mul(index, b_step)), builder.mul(index, a_step)
        parts = [to.load(to.at(b_here, i * width * 4), vector) for i in range(vectors)]
        for row in range(rows):
            factor = to.spread(to.at(a_rows[row], a_here), number)
            for i, part in enumerate(parts):
                place = row * vectors + i
                sums[place] = product(factor, part, sums[place])
        return sums

    before, there, after = builder.block, builder.append_basic_block("there"), None
    after = builder.append_basic_block("begin")
    builder.cbranch(builder.icmp_signed("==", kept, _I64(0)), after, there)
    builder.position_at_end(there)
    old = [to.load(place) for place in places]
    builder.branch(after)
    builder.position_at_end(after)
    begin = []
    for each in old:
        phi = builder.phi(to.vector)
        phi.add_incoming(to.zero, before)
        phi.add_incoming(each, there)
        begin.append(phi)
    whole = builder.sub(count, builder.srem(count, _I64(4)))

    def four(sums: list[Any], index: Any) -> list[Any]:
        for i in range(4):
            sums = body(sums, builder.add(index, _I64(i)))
        return sums

    sums = to.loop(begin, _I64(0), whole, _I64(4), four)
    sums = to.loop(sums, whole, count, _I64(1), body)
    for place, total in zip(places, sums, strict=True):
        to.store(total, place)


@intrinsic  # type: ignore[untyped-decorator]
def outer(
    context: Any, kind: Any, rows: Any, vectors: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any,
    out: Any, out_row: Any, count: Any, kept: Any,
) -> Any:  # fmt: skip
    """out [rows, vectors * width] = the sum over i in [0, count) of a[:, i] times b[i], float32.

    rows, vectors: constants.  a: at a + row * a_row + i * a_step.  b: rows at b + i * b_step.
    A kind of pairs: a and b have two bfloat16 numbers for each i.
    Steps: bytes.  kept: 0, or not 0 to go on with what is in out.
    """
    return _typed(kind, (rows, vectors), 9, _write_outer)


def _write_largest(builder: Any, width: int, x: Any, count: Any) -> Any:
    to = _Writer(builder, width)
    first = to.load(x)

    def body(found: list[Any], index: Any) -> list[Any]:
        here = to.at(x, builder.mul(index, _I64(FLOAT_BYTES)))
        return [
            to.larger(to.load(to.at(here, i * width * FLOAT_BYTES)), each) for i, each in enumerate(found)
        ]

    four = builder.sub(count, builder.srem(count, _I64(4 * width)))
    found = to.loop([first] * 4, _I64(0), four, _I64(4 * width), body)
    found[0] = to.loop(found[:1], four, count, _I64(width), body)[0]
    most = to.larger(to.larger(found[0], found[1]), to.larger(found[2], found[3]))
    half = width // 2
    while half:
        upper = builder.shuffle_vector(most, most, lanes([(i + half) % width for i in range(width)]))
        most = to.larger(upper, most)
        half //= 2
    return builder.extract_element(most, _I32(0))


@intrinsic  # type: ignore[untyped-decorator]
def largest(context: Any, kind: Any, x: Any, count: Any) -> Any:
    """The largest of `count` float32 numbers at x, a multiple of the lanes; NaN is passed over."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return _write_largest(builder, kind.count, *arguments[1:])

    return types.float32(kind, types.int64, types.int64), generate


def _write_powers(builder: Any, width: int, x: Any, out: Any, count: Any, most: Any) -> Any:
    """out: None to write over x, else the address of bfloat16."""
    to = _Writer(builder, width)
    most = to.all(most)

    def body(sums: list[Any], index: Any) -> list[Any]:
        now = []
        for i, total in enumerate(sums):
            place = builder.add(index, _I64(i * width))
            address = to.at(x, builder.mul(place, _I64(FLOAT_BYTES)))
            power = to.exp2(builder.fsub(to.load(address), most))
            if out is None:
                to.store(power, address)
            else:
                to.store(to.shortened(power), to.at(out, builder.mul(place, _I64(BRAIN_BYTES))), 2)
            now.append(builder.fadd(total, power))
        return now

    two = builder.sub(count, builder.srem(count, _I64(2 * width)))
    one, other = to.loop([to.zero, to.zero], _I64(0), two, _I64(2 * width), body)
    (one,) = to.loop([one], two, count, _I64(width), body)
    return builder.extract_element(to.added([builder.fadd(one, other)])[0], _I32(0))


@intrinsic  # type: ignore[untyped-decorator]
def powers(context: Any, kind: Any, x: Any, count: Any, most: Any) -> Any:
    """The `count` float32 numbers at x, a multiple of the lanes, become 2^(x - most); their sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        x, count, most = arguments[1:]
        return _write_powers(builder, kind.count, x, None, count, most)

    return types.float32(kind, types.int64, types.int64, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def short_powers(context: Any, kind: Any, x: Any, out: Any, count: Any, most: Any) -> Any:
    """`powers` that go to `out` as bfloat16; the sum is that of float32.  See PAIRS.

    out may lie in x, where no number is read any more.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return _write_powers(builder, kind.count, *arguments[1:])

    return types.float32(kind, types.int64, types.int64, types.int64, types.float32), generate


def powers_of(kind: Any, scores: int, first: int, last: int, most: Any) -> Any:
    """Scores [first, last) become weights, of a kind of pairs as bfloat16 from the same address on."""


@overload(powers_of)  # type: ignore[untyped-decorator]
def _powers_of_by_kind(kind: Any, scores: int, first: int, last: int, most: Any) -> Any:
    def wide(kind: Any, scores: int, first: int, last: int, most: Any) -> Any:
        return powers(kind, scores + first * 4, last - first, most)

    def short(kind: Any, scores: int, first: int, last: int, most: Any) -> Any:
        return short_powers(kind, scores + first * 4, scores + first * 2, last - first, most)

    return short if not kind.dtype.signed else wide
