"""Products of float32 rows with a matrix of 8, 16 or 32 bit numbers, compiled for this CPU by numba.

A decode step reads every weight once and computes little with it, so memory bounds its time: int8 weights
take a quarter of float32's.  torch has no fast product of float32 rows with int8 weights
(`_weight_int8pack_mm` needs bfloat16 activations and hardware for them), hence these kernels.

The work is cut into tiles of a few rows by a few outputs, the sums of one tile in registers.  Each
weight that is read is converted once for all rows of its tile.  The loops of a tile are written in
LLVM's own language, because a compiler that vectorises a sum chooses another order for every shape of tile.
Here each sum of float32 has one order for every tile, with L lanes in this CPU's vectors:

    L partial sums, of the products that fall into each lane of the whole vectors, in ascending k;
    the L added in pairs (i and i + L / 2, and so on down to the last two);
    then the remaining products in ascending k; then times the scale; then plus the bias.

So a row's result has the same bits alone, in a batch of any size and with any number of threads.

There are two kinds of tiles.  One multiplies float32 with weights converted to float32.  For int8
weights on CPUs that multiply 16-bit integers (AVX2, better AVX-512, best VNNI) there is another kind: each
row of x is rounded to 16 bits with a scale of its own, its largest value / 32767, and the products are
added as integers, exactly, two for each lane of 32 bits; the whole sum is rounded once, so it is the same on
all such CPUs.  An instruction does twice as many products.  One
instruction widens the weights; converting half as many to float32 takes two.  Rounding x adds an error of
about 1e-5 of the row's norm, a hundredth of the error of the weights' 8 bits.

A step of one row is bounded by memory, and how its reads lie there decides.  The four rows of a tile lie
one after the other while they are short: hardware prefetchers do not follow four places so close to each
other, and the tile asks for the memory in its own order, some KiB ahead and so across the matrices that
follow.  Four long rows would be read before that order reaches them.  They are taken from four quarters of
the matrix instead, so that each tile goes on where the last one ended in each quarter: four long streams, as
the prefetchers expect.

Int8 weights in an order of their own have their own tiles (node/model/weights/panels/stripes.py), with equal
bits.

A caller's fast mathematics, which numba hands down, would change the order: functions with sums refuse it.

Importing this module imports numba.  A kernel is compiled at its first use (a few seconds), and kept in the
user's cache for every process with these sources (node/model/weights/kernel_cache.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload
from torch import Tensor

from node.model.weights.compiling import Kernel, callback, compiled
from node.model.weights.panels import order
from node.model.weights.panels.order import STRIPES

# numba takes a layer of threads when the first code for several is compiled or read.  With the layer of
# OpenMP, torch too would compute with these threads from then on; the third needs a library of its own.
numba.config.THREADING_LAYER = "workqueue"

_FEATURES = frozenset((numba.config.CPU_FEATURES or get_host_cpu_features()).split(","))
LANES = 16 if "+avx512bw" in _FEATURES else 8  # of 32 bits in a vector
INTEGERS = "+avx2" in _FEATURES  # whether int8 weights are multiplied with 16-bit integers
IN_STRIPES = {"+avx512bw", "+avx512vnni"} <= _FEATURES  # whether weights in stripes can be multiplied
# Measured on an AMD EPYC with SmolLM2's matrices and with rows of 2,048 and 4,096 numbers, for each item.
AHEAD_BYTES = 8192  # distance of the prefetch ahead of its reads, of a tile for one row of x
FAR_AHEAD_BYTES = 16384  # of a tile for several rows of x
SHORT_TILE_BYTES = 6144  # of the four rows of a tile for one row of x, if they lie next to each other
SHORT_WIDE_BYTES = 4096  # of items of more than a byte
STREAM_AHEAD_BYTES = {1: 384, 2: 384, 4: 128}  # distance of the prefetch in each of four streams, by item
PANEL_BYTES = 96 * 1024  # of the weights used for all rows before the next weights: a part of the L2 cache
SLICE_WORK = 1 << 23  # products in the smallest slice for a thread: handing it over takes 0.2 ms
CACHE_LINE = 64
LARGEST = 32767  # the 16-bit value of a row's largest number
INFINITY = 0xFF << 24  # the bits of float32 without the sign
# Of k: so many products of 16-bit and 8-bit numbers, in half of a sum's lanes, fit 32 bits surely.  The
# halves of the sums (see _IntegerTile) are below 2^24, and so exact in float32, up to a k of EXACT_WIDTH.
EXACT_NUMBERS = 1024
EXACT_WIDTH = 1 << 16
assert EXACT_NUMBERS // 2 * LARGEST * 128 < 1 << 31

_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_VECTOR = ir.VectorType(_F32, LANES)


class _Tile:
    """Writes the code of one tile: `rows` rows of x times `outs` rows of the matrix.

    item: LLVM's type of a weight: i8, i16 for the upper half of a float32, or i32 for all of it.
    """

    numbers = LANES  # of x in a vector
    x_bytes = 4
    unrolled = 4  # vectors in one iteration of the loop; more only takes longer to compile

    def __init__(self, builder: Any, rows: int, outs: int, item: ir.IntType) -> None:
        self.build = builder
        self.rows, self.outs, self.item = rows, outs, item
        self.item_bytes = item.width // 8
        module = builder.module
        self.fma = cgutils.get_or_insert_function(
            module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        self.prefetch = cgutils.get_or_insert_function(
            module,
            ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
            "llvm.prefetch.p0i8",
        )

    def write(
        self, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any, stride: Any, k: Any
    ) -> None:
        """The whole code.  The arguments are addresses as i64; scales and bias have 0 for none.

        stride: numbers in a row of out.  k: numbers in a row of x and in a row of w.
        """
        self.x, self.w, self.k = x, w, k
        whole = self.build.sub(k, self.build.srem(k, _I64(self.numbers)))
        sums = self._singles(self._added(self._whole_vectors(whole)), whole)
        self._finish(sums, x_scale, scale, bias, out, stride)

    def _whole_vectors(self, stop: Any) -> list[Any]:
        """The partial sums of k in [0, stop), a float32 vector for each pair."""
        return self._vectors([ir.Constant(_VECTOR, [0.0] * LANES)] * (self.rows * self.outs), _I64(0), stop)

    def _vectors(self, sums: list[Any], start: Any, stop: Any) -> list[Any]:
        """Go on with `sums` for k in [start, stop), which are whole vectors."""
        build = self.build
        stride = self.numbers * self.unrolled
        whole = build.sub(stop, build.srem(build.sub(stop, start), _I64(stride)))
        sums = self._loop(sums, start, whole, stride, self._iteration)
        return self._loop(sums, whole, stop, self.numbers, self._products) if self.unrolled > 1 else sums

    def _loop(
        self, sums: list[Any], start: Any, stop: Any, step: int, body: Callable[..., list[Any]]
    ) -> list[Any]:
        """Go on with `sums` for k in [start, stop), `step` at a time: body(sums, k) gives the next ones."""
        build = self.build
        before = build.block
        head, inside, after = (build.append_basic_block(name) for name in ("head", "inside", "after"))
        build.branch(head)
        build.position_at_end(head)
        k = build.phi(_I64)
        k.add_incoming(start, before)
        phis = [build.phi(each.type) for each in sums]
        for phi, each in zip(phis, sums, strict=True):
            phi.add_incoming(each, before)
        build.cbranch(build.icmp_signed("<", k, stop), inside, after)
        build.position_at_end(inside)
        for phi, each in zip(phis, body(list(phis), k), strict=True):
            phi.add_incoming(each, build.block)
        k.add_incoming(build.add(k, _I64(step)), build.block)
        build.branch(head)
        build.position_at_end(after)
        return list(phis)

    def _products(self, sums: list[Any], k: Any) -> list[Any]:
        """x[row, k] * w[out, k] added to the sum of each pair, for a vector of numbers at k."""
        weights = [self._weights(out, k, self.numbers) for out in range(self.outs)]
        now = []
        for row in range(self.rows):
            x = self._x(row, k, self.numbers)
            now += [self._product(x, weight, sums[row * self.outs + i]) for i, weight in enumerate(weights)]
        return now

    def _iteration(self, sums: list[Any], k: Any) -> list[Any]:
        """A few vectors one after the other."""
        self._ask_ahead(k, self.numbers * self.unrolled)
        for vector in range(self.unrolled):
            sums = self._products(sums, self.build.add(k, _I64(vector * self.numbers)))
        return sums

    def _singles(self, sums: list[Any], start: Any) -> list[Any]:
        """Go on with the sums of all pairs, LANES in a vector, for k in [start, K), one at a time."""

        def body(sums: list[Any], k: Any) -> list[Any]:
            x = self._spread(self._packed([self._x(row, k, 1) for row in range(self.rows)]), self._row_of)
            w = self._spread(
                self._packed([self._weights(out, k, 1) for out in range(self.outs)]), self._out_of
            )
            return [self.build.call(self.fma, each) for each in zip(x, w, sums, strict=True)]

        return self._loop(sums, start, self.k, 1, body)

    def _row_of(self, pair: int) -> int:
        return pair // self.outs

    def _out_of(self, pair: int) -> int:
        return pair % self.outs

    def _packed(self, numbers: list[Any]) -> Any:
        """Numbers as a vector."""
        vector = ir.Constant(ir.VectorType(numbers[0].type, len(numbers)), ir.Undefined)
        for index, number in enumerate(numbers):
            vector = self.build.insert_element(vector, number, _I32(index))
        return vector

    def _spread(self, few: Any, place: Callable[[int], int]) -> list[Any]:
        """The number of each pair, LANES in a vector."""
        pairs = self.rows * self.outs
        lanes = [place(pair) if pair < pairs else 0 for pair in range(-(-pairs // LANES) * LANES)]
        return [
            self.build.shuffle_vector(few, few, _mask(lanes[first : first + LANES]))
            for first in range(0, len(lanes), LANES)
        ]

    def _product(self, x: Any, weight: Any, total: Any) -> Any:
        return self.build.call(self.fma, [x, weight, total])

    def _x(self, row: int, k: Any, width: int) -> Any:
        return self._load(self.x, self.x_bytes, row, k, _many(_F32, width))

    def _weights(self, out: int, k: Any, width: int) -> Any:
        """Weights as float32, exactly."""
        weights = self._load(self.w, self.item_bytes, out, k, _many(self.item, width))
        wide, number = _many(_I32, width), _many(_F32, width)
        if self.item is _I32:
            return self.build.bitcast(weights, number)
        if self.item is _I8:
            return self.build.sitofp(self.build.sext(weights, wide), number)
        sixteen = ir.Constant(wide, [16] * width) if width > 1 else _I32(16)
        return self.build.bitcast(self.build.shl(self.build.zext(weights, wide), sixteen), number)

    def _load(self, base: Any, size: int, row: int, k: Any, kind: Any) -> Any:
        index = self.build.add(self.build.mul(_I64(row), self.k), k)
        address = self.build.add(base, self.build.mul(index, _I64(size)))
        # A tensor that is mapped from a file may begin at any address.
        return self.build.load(self.build.inttoptr(address, kind.as_pointer()), align=1)

    def _ask_ahead(self, k: Any, step: int) -> None:
        """Prefetch the bytes that one iteration of the loop reads.

        The rows of tiles lie one after the other, so the prefetch follows the order of the memory.  Tiles
        for several rows ask for the second cache: the first one has few places for memory under way, and
        their reads of x take turns with it.
        """
        build = self.build
        ahead, level = (AHEAD_BYTES, 3) if self.rows == 1 else (FAR_AHEAD_BYTES, 2)
        begin = build.add(self.w, build.mul(k, _I64(self.outs * self.item_bytes)))
        for offset in range(0, step * self.outs * self.item_bytes, 64):
            address = build.add(begin, _I64(ahead + offset))
            pointer = build.inttoptr(address, _I8.as_pointer())
            build.call(self.prefetch, [pointer, _I32(0), _I32(level), _I32(1)])  # to read, data

    def _added(self, sums: list[Any]) -> list[Any]:
        """The sum of each vector, LANES of them in a vector, in the order of the pairs."""
        return self._joined(sums, self.build.fadd)

    def _joined(
        self, sums: list[Any], add: Callable[..., Any], blocks: int = LANES, last: int = 1
    ) -> list[Any]:
        """Add the lanes of each sum until `last` of them are left.  blocks: the lanes of one sum.

        Two vectors are joined before each addition, so that one addition serves both.  The pairs of lanes
        do not depend on the joining.
        """
        vectors = list(sums)
        while blocks > last:
            half = blocks // 2
            joined = []
            for first in range(0, len(vectors), 2):
                one, two = vectors[first], vectors[min(first + 1, len(vectors) - 1)]
                low = [lane for lane in range(2 * LANES) if lane % blocks < half]
                high = [lane + half for lane in low]
                joined.append(add(*(self.build.shuffle_vector(one, two, _mask(m)) for m in (low, high))))
            vectors, blocks = joined, half
        return vectors

    def _finish(self, sums: list[Any], x_scale: Any, scale: Any, bias: Any, out: Any, stride: Any) -> None:
        """out[row, out] = sum * scale[out] * x_scale[row] + bias[out]."""
        build = self.build
        sums = self._with(sums, scale, self.outs, self._out_of, build.fmul)
        sums = self._with(sums, x_scale, self.rows, self._row_of, build.fmul)
        sums = self._with(sums, bias, self.outs, self._out_of, build.fadd)
        for row in range(self.rows):
            vector, lane = divmod(row * self.outs, LANES)
            following = sums[min(vector + 1, len(sums) - 1)]
            own = build.shuffle_vector(sums[vector], following, _mask(range(lane, lane + self.outs)))
            self._store(own, out, build.mul(_I64(row), stride))

    def _with(
        self,
        sums: list[Any],
        address: Any,
        count: int,
        place: Callable[[int], int],
        combine: Callable[..., Any],
    ) -> list[Any]:
        """Each sum combined with its own number out of `count`, unless `address` is 0."""
        build = self.build
        before = build.block
        there, after = build.append_basic_block("there"), build.append_basic_block("after")
        build.cbranch(build.icmp_signed("==", address, _I64(0)), after, there)
        build.position_at_end(there)
        numbers = self._spread(self._numbers(address, count), place)
        combined = [combine(each, number) for each, number in zip(sums, numbers, strict=True)]
        build.branch(after)
        build.position_at_end(after)
        phis = []
        for each, other in zip(sums, combined, strict=True):
            phi = build.phi(_VECTOR)
            phi.add_incoming(each, before)
            phi.add_incoming(other, there)
            phis.append(phi)
        return phis

    def _numbers(self, address: Any, count: int) -> Any:
        """Float32 numbers of the tile's rows or of its outputs, as a vector."""
        pointer = self.build.inttoptr(address, ir.VectorType(_F32, count).as_pointer())
        return self.build.load(pointer, align=4)

    def _store(self, numbers: Any, base: Any, index: Any) -> None:
        address = self.build.add(base, self.build.mul(index, _I64(4)))
        self.build.store(numbers, self.build.inttoptr(address, numbers.type.as_pointer()), align=4)


class _IntegerTile(_Tile):
    """A tile with x in 16-bit integers and weights in 8-bit: products are added in pairs, as integers.

    A sum of many 32-bit numbers is two of them: of their upper 16 bits, and of their lower 16 bits.
    """

    numbers = 2 * LANES
    x_bytes = 2
    unrolled = (
        1  # LLVM would reorder sums of integers in one iteration, and each would take several instructions
    )

    def __init__(self, builder: Any, rows: int, outs: int, item: ir.IntType) -> None:
        super().__init__(builder, rows, outs, item)
        short, wide = ir.VectorType(_I16, 2 * LANES), ir.VectorType(_I32, LANES)
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        self.pairs = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(wide, [short, short]), name
        )

    def _whole_vectors(self, stop: Any) -> list[Any]:
        """The upper sums of all pairs, LANES of them in a vector, then their lower sums."""
        build = self.build
        zeros = [_integers(0)] * (self.rows * self.outs)

        def piece(start: Any) -> list[Any]:
            whole = build.add(start, _I64(EXACT_NUMBERS))
            until = build.select(build.icmp_signed("<", whole, stop), whole, stop)
            sums = self._joined(self._vectors(zeros, start, until), build.add, LANES, 2)
            halves = self.halves(sums)
            few = len(sums)
            return [
                each for part in (halves[:few], halves[few:]) for each in self._joined(part, build.add, 2)
            ]

        def body(totals: list[Any], start: Any) -> list[Any]:
            return [build.add(total, each) for total, each in zip(totals, piece(start), strict=True)]

        return self._loop(piece(_I64(0)), _I64(EXACT_NUMBERS), stop, EXACT_NUMBERS, body)

    def halves(self, sums: list[Any]) -> list[Any]:
        """The upper 16 bits of these numbers, then the lower ones: numbers = upper * 65536 + lower."""
        upper = [self.build.ashr(each, _integers(16)) for each in sums]
        return upper + [self.build.and_(each, _integers(0xFFFF)) for each in sums]

    def rounded(self, halves: list[Any]) -> list[Any]:
        """The numbers of upper and lower sums as float32, rounded once where both are below 2^24."""
        build, count = self.build, len(halves) // 2
        factor = ir.Constant(_VECTOR, [65536.0] * LANES)
        floats = [build.sitofp(each, _VECTOR) for each in halves]
        return [
            build.call(self.fma, [upper, factor, lower])
            for upper, lower in zip(floats[:count], floats[count:], strict=True)
        ]

    def _added(self, sums: list[Any]) -> list[Any]:
        return sums  # as `_whole_vectors` leaves them

    def _singles(self, sums: list[Any], start: Any) -> list[Any]:
        build = self.build

        def body(sums: list[Any], k: Any) -> list[Any]:
            x = [build.sext(self._load(self.x, self.x_bytes, row, k, _I16), _I32) for row in range(self.rows)]
            w = [build.sext(self._weight(out, k), _I32) for out in range(self.outs)]
            products = [
                build.mul(*each)
                for each in zip(
                    self._spread(self._packed(x), self._row_of),
                    self._spread(self._packed(w), self._out_of),
                    strict=True,
                )
            ]
            return [build.add(total, each) for total, each in zip(sums, self.halves(products), strict=True)]

        return self.rounded(self._loop(sums, start, self.k, 1, body))

    def _weight(self, out: int, k: Any) -> Any:
        return self._load(self.w, self.item_bytes, out, k, self.item)

    def _product(self, x: Any, weight: Any, total: Any) -> Any:
        return self.build.add(total, self.build.call(self.pairs, [x, weight]))  # with VNNI one instruction

    def _x(self, row: int, k: Any, width: int) -> Any:
        return self._load(self.x, self.x_bytes, row, k, _many(_I16, width))

    def _weights(self, out: int, k: Any, width: int) -> Any:
        weights = self._load(self.w, self.item_bytes, out, k, _many(self.item, width))
        return self.build.sext(weights, ir.VectorType(_I16, width))


def _integers(number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, LANES), [number] * LANES)


class _Streams(_Tile):
    """Mixed into a tile of one row of x: its outputs are `stride` apart in the matrix and in the answer."""

    def write(
        self, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any, stride: Any, k: Any
    ) -> None:
        """As of a tile, but for the stride: of the tile's outputs."""
        self.stride = stride
        super().write(x, x_scale, w, scale, bias, out, stride, k)

    def _place(self, base: Any, output: int, size: Any) -> Any:
        """The address that belongs to an output of the tile, `size` bytes for each output of the matrix."""
        return self.build.add(base, self.build.mul(self.build.mul(_I64(output), self.stride), size))

    def _load(self, base: Any, size: int, row: int, k: Any, kind: Any) -> Any:
        line = self._place(base, row, self.build.mul(self.k, _I64(size)))
        return super()._load(line, size, 0, k, kind)

    def _ask_ahead(self, k: Any, step: int) -> None:
        """Prefetch a line of each stream, or in turn where a step is a part of a line."""
        build, read = self.build, step * self.item_bytes
        level = 2 if self.item_bytes == 4 else 3  # as fast as reading alone is for each
        line = build.mul(self.k, _I64(self.item_bytes))
        ahead = build.add(build.mul(k, _I64(self.item_bytes)), _I64(STREAM_AHEAD_BYTES[self.item_bytes]))
        steps = max(CACHE_LINE // read, 1)  # that read a line
        for place in range(0, self.outs, steps):
            output = _I64(place)
            if steps > 1:
                output = build.add(output, build.urem(build.udiv(k, _I64(step)), _I64(steps)))
            base = build.add(build.mul(build.mul(output, self.stride), line), build.add(self.w, ahead))
            for offset in range(0, read, CACHE_LINE):
                pointer = build.inttoptr(build.add(base, _I64(offset)), _I8.as_pointer())
                build.call(self.prefetch, [pointer, _I32(0), _I32(level), _I32(1)])

    def _numbers(self, address: Any, count: int) -> Any:
        if count == 1:
            return super()._numbers(address, count)
        places = [self._place(address, output, _I64(4)) for output in range(count)]
        return self._packed(
            [self.build.load(self.build.inttoptr(each, _F32.as_pointer()), align=4) for each in places]
        )

    def _store(self, numbers: Any, base: Any, index: Any) -> None:
        for output in range(self.outs):
            place = self.build.inttoptr(self._place(base, output, _I64(4)), _F32.as_pointer())
            self.build.store(self.build.extract_element(numbers, _I32(output)), place, align=4)


class _IntegerStreams(_Streams, _IntegerTile):
    pass


def _many(kind: Any, width: int) -> Any:
    return ir.VectorType(kind, width) if width > 1 else kind


def _mask(lanes: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))


def _tile(
    rows: int, outs: int, floats: type[_Tile] = _Tile, integers: type[_IntegerTile] = _IntegerTile
) -> Any:
    """A function for compiled code: computes one tile.

    item: a number of the weights' type.  x_scale: 0 where x is float32; 16-bit integers have one.
    """

    def writer(tile: type[_Tile], kind: ir.IntType) -> Any:
        def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            tile(builder, rows, outs, kind).write(*arguments[2:])
            return context.get_dummy_value()

        return write

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        context: Any, x_item: Any, item: Any, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any,
        stride: Any, k: Any,
    ) -> Any:  # fmt: skip
        kind = {types.int8: _I8, types.int16: _I16, types.int32: _I32}[item]
        style = integers if x_item == types.int16 else floats
        return types.void(x_item, item, *[types.int64] * 8), writer(style, kind)

    return tile


# The sums fill the registers (32 of AVX-512, else 16) besides the weights and x.  A sum waits four cycles
# for its last addition, so fewer than eight sums leave the CPU idle.  The sizes for 16 registers were
# measured as the best.
_OUTS = (4, 4, 4, 4, 4, 4) if LANES == 16 else (4, 4, 3, 3, 2, 2)  # by rows, from one on
_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (
    _tile(rows, outs) for rows, outs in enumerate(_OUTS, 1)
)
_tile_1x1 = _tile(1, 1)
_streams = _tile(1, _OUTS[0], _Streams, _IntegerStreams)
_OUTS_1, _OUTS_2, _OUTS_3, _OUTS_4, _OUTS_5, _OUTS_6 = _OUTS


@njit(nogil=True, fastmath=False)  # type: ignore[untyped-decorator]
def _one_row(
    x_item: Any, item: Any, size: int, x: int, x_scale: int, w: int, scale: int, bias: int, out: int, n: int,
    k: int,
) -> None:  # fmt: skip
    """`_rows` for one row of x, in streams; at least as many outputs as there are streams."""
    scaled, biased = 4 if scale else 0, 4 if bias else 0
    stride = n // _OUTS_1
    for at in range(stride + (n - stride * _OUTS_1)):
        # The outputs after the streams' are the last ones of the last stream, moved on.
        first = at if at < stride else n - 1 - (_OUTS_1 - 1) * stride - (at - stride)
        _streams(
            x_item, item, x, x_scale, w + first * k * size, scale + first * scaled, bias + first * biased,
            out + first * 4, stride, k,
        )  # fmt: skip


@njit(nogil=True, fastmath=False)  # type: ignore[untyped-decorator]
def _rows(
    x_item: Any, item: Any, sizes: tuple[int, int], x: int, x_scale: int, w: int, scale: int, bias: int,
    out: int, m: int, n: int, k: int, stride: int,
) -> None:  # fmt: skip
    """out [m, n] (rows `stride` numbers apart) = x [m, k] @ w [n, k].T * scale [n] * x_scale [m] + bias [n].

    x_item, item: numbers of the types of x and of the weights; sizes: their bytes.  The others:
    addresses and lengths.
    """
    x_size, size = sizes
    if m == 1 and _OUTS_1 * k * size > (SHORT_TILE_BYTES if size == 1 else SHORT_WIDE_BYTES) and n >= _OUTS_1:
        _one_row(x_item, item, size, x, x_scale, w, scale, bias, out, n, k)
        return
    scaled = 4 if scale else 0
    x_scaled = 4 if x_scale else 0
    biased = 4 if bias else 0
    panel = max(PANEL_BYTES // max(k * size, 1) // 12, 1) * 12
    for first in range(0, n, panel):
        last = min(first + panel, n)
        row = 0
        while row < m:
            left = m - row
            # Six rows at a time; the remaining rows by the cheapest pair of tiles.
            rows = 4 if left in (7, 8) else min(left, 6)
            outs = _OUTS_1
            if rows == 2:
                outs = _OUTS_2
            elif rows == 3:
                outs = _OUTS_3
            elif rows == 4:
                outs = _OUTS_4
            elif rows == 5:
                outs = _OUTS_5
            elif rows == 6:
                outs = _OUTS_6
            if last - first < outs:
                rows = outs = 1
            column = first
            while column < last:
                # The last tile is moved back over computed outputs: it writes equal bits.
                at = min(column, last - outs)
                x_at, w_at = x + row * k * x_size, w + at * k * size
                x_scale_at = x_scale + row * x_scaled
                scale_at, bias_at = scale + at * scaled, bias + at * biased
                out_at = out + (row * stride + at) * 4
                if outs == 1:
                    _tile_1x1(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 1:
                    _tile_1(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 2:
                    _tile_2(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 3:
                    _tile_3(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 4:
                    _tile_4(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                elif rows == 5:
                    _tile_5(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                else:
                    _tile_6(x_item, item, x_at, x_scale_at, w_at, scale_at, bias_at, out_at, stride, k)
                column += outs
            row += rows


# `_rows` for weights in another order, without types and sizes, by the type of their items.  The modules of
# these orders, which import this one, put it here.
_orders: dict[Any, Any] = {}


def take_order(item: Any, product: Any) -> None:
    """From now on weights of this type are multiplied by `product`, see `_by_order`."""
    _orders[item] = product


def _by_order(
    x_item: Any, item: Any, sizes: Any, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any, m: Any,
    n: Any, k: Any, stride: Any,
) -> Any:  # fmt: skip
    """`_rows`, of weights in rows or in another order."""


@overload(_by_order)  # type: ignore[untyped-decorator]
def _by_order_of_type(
    x_item: Any, item: Any, sizes: Any, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any, m: Any,
    n: Any, k: Any, stride: Any,
) -> Any:  # fmt: skip
    product = _orders.get(item)
    if product is not None:

        def in_order(
            x_item: Any, item: Any, sizes: Any, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any,
            m: Any, n: Any, k: Any, stride: Any,
        ) -> Any:  # fmt: skip
            product(x, x_scale, w, scale, bias, out, m, n, k, stride)

        return in_order

    def in_rows(
        x_item: Any, item: Any, sizes: Any, x: Any, x_scale: Any, w: Any, scale: Any, bias: Any, out: Any,
        m: Any, n: Any, k: Any, stride: Any,
    ) -> Any:  # fmt: skip
        _rows(x_item, item, sizes, x, x_scale, w, scale, bias, out, m, n, k, stride)

    return in_rows


@intrinsic  # type: ignore[untyped-decorator]
def floats_at(context: Any, address: Any) -> Any:
    """An address as a pointer to float32."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.inttoptr(arguments[0], _F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), write


@njit(nogil=True, fastmath={"nsz", "reassoc", "arcp"})  # type: ignore[untyped-decorator]
def _in_16_bits(x: int, m: int, k: int) -> tuple[Any, Any, Any]:
    """x, float32 [m, k] -> codes, int16 [m, k], the scale of each row, float32 [m], and the codes' memory.

    A row with NaN or infinity has the scale NaN, so that its results are NaN.
    """
    values = carray(floats_at(x), (m, k))
    memory = np.empty(m * k + CACHE_LINE // 2, np.int16)
    first = -memory.ctypes.data % CACHE_LINE // 2
    codes = memory[first : first + m * k].reshape(m, k)
    scales = np.empty(m, np.float32)
    for row in range(m):
        line, codes_of = values[row], codes[row]
        bits, largest = line.view(np.uint32), np.uint32(0)
        for i in range(k):  # as integers without signs they have the same order, and make vectors
            largest = max(largest, np.uint32(bits[i] << np.uint32(1)))
        most = np.uint32(largest >> np.uint32(1)).view(np.float32)
        sound = largest < INFINITY
        factor = np.float32(LARGEST) / most if most > 0 and sound else np.float32(0)
        scales[row] = most * np.float32(1 / LARGEST) if sound else np.float32(np.nan)
        for i in range(k):
            codes_of[i] = np.int16(np.rint(line[i] * factor))
    return codes, scales, memory


def _given(item: Any, x: Any, m: Any, k: Any) -> Any:
    """x in the form of the tiles for these weights, as (number of its type, bytes, address, scales, memory).

    The memory holds x and its scales: the caller keeps it until the product is done.
    """


@overload(_given)  # type: ignore[untyped-decorator]
def _given_by_type(item: Any, x: Any, m: Any, k: Any) -> Any:
    if (item == types.int8 and INTEGERS) or item in _orders:

        def integers(item: Any, x: Any, m: Any, k: Any) -> Any:
            codes, scales, memory = _in_16_bits(x, m, k)
            return np.int16(0), 2, codes.ctypes.data, scales.ctypes.data, (memory, scales)

        return integers

    def floats(item: Any, x: Any, m: Any, k: Any) -> Any:
        return np.float32(0), 4, x, 0, None

    return floats


def slices_for(products: int, outs: int, threads: int) -> int:
    """The number of parts of a product: a part costs more than handing it over."""
    return max(1, min(threads, products // SLICE_WORK, outs // 64))


compiled_slices_for = njit(nogil=True)(slices_for)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _hold(memory: Any) -> None:
    """Use `memory` once more, so that it is not freed earlier."""


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _whole(
    item: Any, size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int,
    stride: int, slices: int,
) -> None:  # fmt: skip
    x_item, x_size, x_at, x_scale, memory = _given(item, x, m, k)
    _by_order(x_item, item, (x_size, size), x_at, x_scale, w, scale, bias, out, m, n, k, stride)
    _hold(memory)


_STRIPE = order.OUTS  # compiled code knows no modules of modules


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _start_of(part: int, n: int, slices: int) -> int:
    """The first output of a slice: of a stripe."""
    return n if part == slices else part * n // slices // _STRIPE * _STRIPE


def _in_slices(
    item: Any, size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int,
    stride: int, slices: int,
) -> None:  # fmt: skip
    x_item, x_size, x_at, x_scale, memory = _given(item, x, m, k)
    for part in prange(slices):
        first, last = _start_of(part, n, slices), _start_of(part + 1, n, slices)
        scale_at = scale + first * 4 if scale else 0
        bias_at = bias + first * 4 if bias else 0
        _by_order(
            x_item, item, (x_size, size), x_at, x_scale, w + first * k * size, scale_at, bias_at,
            out + first * 4, m, last - first, k, stride,
        )  # fmt: skip
    _hold(memory)


ITEMS = {
    torch.int8: types.int8,
    STRIPES: types.uint8,
    torch.bfloat16: types.int16,
    torch.float32: types.int32,
}
_ZEROS = {
    torch.int8: np.int8(0),
    STRIPES: np.uint8(0),
    torch.bfloat16: np.int16(0),
    torch.float32: np.int32(0),
}

_kernels: dict[tuple[torch.dtype, bool], Kernel] = {}
_compiling = threading.Lock()
_in_threads = threading.Lock()


@cache
def product_of(dtype: torch.dtype) -> Any:
    """The product with weights of this dtype for other compiled code, which calls it by its address.

    So blocks and adapters are compiled once for all dtypes, and without tiles, which take seconds.
    """
    item = _ZEROS[dtype]  # a part of the cache's key

    def multiply(
        size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
    ) -> int:
        _whole(item, size, x, w, scale, bias, out, m, n, k, stride, 1)
        return 1

    return callback(multiply, types.int64(*[types.int64] * 10))


@intrinsic  # type: ignore[untyped-decorator]
def call_at(context: Any, address: Any, arguments: Any) -> Any:
    """For compiled code: the answer of the `callback` at an address, for a tuple of int64 arguments."""
    count = len(arguments)

    def write(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        kind = ir.FunctionType(_I64, [_I64] * count)
        given = [builder.extract_value(values[1], index) for index in range(count)]
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), given)

    return types.int64(types.int64, types.UniTuple(types.int64, count)), write


def _called(
    address: int, item: int, size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int,
    k: int, stride: int, slices: int,
) -> None:  # fmt: skip
    if call_at(address, (size, x, w, scale, bias, out, m, n, k, stride)) == 0:
        raise MemoryError


def kernel_for(dtype: torch.dtype, *, parallel: bool = False) -> Kernel:
    """The kernel for weights of this dtype, compiled or read from the cache on the first call."""
    kernel = _kernels.get((dtype, parallel))
    if kernel is None:
        with _compiling:
            kernel = _kernels.get((dtype, parallel))
            if kernel is None:
                kernel = _kernels[dtype, parallel] = _made(dtype, parallel)
    return kernel


def _made(dtype: torch.dtype, parallel: bool) -> Kernel:
    if parallel:
        return compiled(_in_slices, types.void(ITEMS[dtype], *[types.int64] * 11), parallel=True)
    by_address = compiled(_called, types.void(*[types.int64] * 13))
    return partial(by_address, product_of(dtype).address)


class Rows:
    """A matrix that rows are multiplied with: x [..., k] -> x @ weight.T * scale + bias [..., outs].

    weight: int8, bfloat16 or float32 [outs, k], or int8 codes in STRIPES.  scale, bias: float32 [outs] or
    None.  All on the CPU, of any length and alignment.  A row's result has the same bits for any other rows
    and any number of threads (see above).  Raises ValueError for other shapes, dtypes and devices, because
    the kernels check nothing.
    """

    __slots__ = ("bias", "k", "outs", "scale", "weight")

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        self.outs, self.k = weight.shape
        sound = weight.dtype in ITEMS and weight.is_contiguous() and weight.is_cpu
        if weight.dtype == STRIPES:
            sound = (
                sound
                and ITEMS[STRIPES] in _orders
                and order.has_whole_stripes([weight])
                and scale is not None
            )
        for each in (scale, bias):
            sound = sound and (each is None or _are_numbers(each, self.outs))
        if not sound:
            found = ", ".join(_described(each) for each in (weight, scale, bias) if each is not None)
            raise ValueError(
                f"contiguous int8, bfloat16 or float32 rows with float32 scales are allowed, not {found}"
            )
        self.weight, self.scale, self.bias = weight, scale, bias
        kernel_for(weight.dtype)

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        """x: float32 [..., k].  threads: the most that are used; fewer for small products."""
        # This runs for every matrix of every token, so it does only the necessary work.
        shape = x.shape
        if x.dtype is not torch.float32 or shape[-1] != self.k or not x.is_cpu:
            raise ValueError(f"float32 [..., {self.k}] on the CPU is multiplied, not {_described(x)}")
        if not x.is_contiguous():
            x = x.contiguous()
        outs, k, weight, scale, bias = self.outs, self.k, self.weight, self.scale, self.bias
        out = torch.empty((*shape[:-1], outs))
        rows = x.numel() // k if k else 0
        arguments = (
            0,
            weight.element_size(),
            x.data_ptr(),
            weight.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            outs,
            k,
            outs,
        )
        slices = slices_for(rows * outs * k, outs, threads)
        with team(slices) as together:
            kernel_for(weight.dtype, parallel=together)(*arguments, slices)
        return out


def _are_numbers(tensor: Tensor, outs: int) -> bool:
    return (
        tensor.dtype is torch.float32 and tensor.shape == (outs,) and tensor.is_contiguous() and tensor.is_cpu
    )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


@contextmanager
def team(threads: int) -> Iterator[bool]:
    """Take this number of threads for compiled code; False while another caller has them: use one thread.

    numba's own threads end the process when two callers come at once.
    """
    if threads < 2 or not _in_threads.acquire(blocking=False):
        yield False
        return
    try:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        yield True
    finally:
        _in_threads.release()
