"""Products of many rows, such as a prefill's, over panels of the matrix that are converted once, in float32.

With a few rows memory bounds a product; with many rows the CPU's arithmetic does.  So x and a panel of the
matrix are put into the order in which a tile reads them (packed, as in GotoBLAS, Goto and van de Geijn, ACM
TOMS 34(3), 2008): for each vector of k the numbers of the tile's rows, one after the other.  The weights of
a panel are converted to float32 once for all rows.  A block of k of the rows' numbers stays in the L1 cache,
and the panel in the L2 cache.  Weights of 8 bits have another way (integer_panels.py), and weights of
bfloat16 on CPUs that multiply it (bfloat16_panels.py).

A tile's sums have the order of node/model/weights/kernels.py's tiles, so a row has the same bits in a step of
any number of rows, with either code; `is_exact` tells of the exception.  Between two blocks of k the partial
sums of a tile's lanes lie in memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from node.model.weights import kernels
from node.model.weights.compiling import callback
from node.model.weights.kernels import _I8, _I16, _I32, _I64, _VECTOR, LANES, _Tile
from node.model.weights.panels import bfloat16_panels, integer_panels
from node.model.weights.panels.integer_panels import ALIGNED, _aligned
from node.model.weights.panels.order import STRIPES

log = logging.getLogger("raceme")

ROWS, OUTS = 6, 4 if LANES == 16 else 2  # of a tile: its sums fill the registers
VECTOR_BYTES = 4 * LANES
BLOCK_VECTORS = 128  # of k: 24 KiB of a tile's rows in AVX2, 48 KiB in AVX-512; L1 caches have 32 or 48 KiB
PANEL_BYTES = 128 * 1024  # of converted weights: a part of the L2 cache, 512 KiB on older CPUs
LEAST_TILES = 8  # of outputs in a panel, of long rows too: for each a block of x is read from the L1 cache
SUMS_BYTES = ROWS * OUTS * VECTOR_BYTES
LEAST_ROWS = max(ROWS, integer_panels.ROWS, bfloat16_panels.ROWS)
MEASURED_ROWS = (128, 256)  # with weights out of memory, as a span reads them, fewer rows gain nothing
MEASURED_ROUNDED_ROWS = (32, 64, 128, 256)
ROUNDED_ERROR = 1 / 128  # of rows rounded to bfloat16, of the largest answer; other answers are wrong ones
MEASURED_SHAPE = (515, 1031)  # of a matrix: outputs and k, with a rest in each tile
NEVER = 1 << 62


class _Packed(_Tile):
    """A tile over packed rows and packed weights of float32."""

    def write_block(self, given: Sequence[Any]) -> None:
        """The code of one block of k.

        given: addresses and lengths as i64: x, x_scale, w, scale, bias, out, stride, k as in `write`, where x
        and w are packed; then sums, the tile's partial sums between two blocks; start and stop of the block.
        """
        x, x_scale, w, scale, bias, out, stride, k, sums_at, start, stop = given
        build = self.build
        self.x, self.w, self.k = x, w, k
        whole = build.sub(k, build.srem(k, _I64(self.numbers)))
        sums = self._vectors(self._kept(sums_at, start), start, stop)
        ends, goes_on, after = (build.append_basic_block(name) for name in ("ends", "goes_on", "done"))
        build.cbranch(build.icmp_signed("==", stop, whole), ends, goes_on)
        build.position_at_end(goes_on)
        for index, each in enumerate(sums):
            build.store(each, self._at(sums_at, _I64(index * VECTOR_BYTES), _VECTOR), align=4)
        build.branch(after)
        build.position_at_end(ends)
        self._finish(self._singles(self._added(sums), whole), x_scale, scale, bias, out, stride)
        build.branch(after)
        build.position_at_end(after)

    def _kept(self, sums_at: Any, start: Any) -> list[Any]:
        """The partial sums so far: zeros before the first block."""
        build = self.build
        before = build.block
        there, after = build.append_basic_block("there"), build.append_basic_block("after")
        build.cbranch(build.icmp_signed("==", start, _I64(0)), after, there)
        build.position_at_end(there)
        count = self.rows * self.outs
        kept = [
            build.load(self._at(sums_at, _I64(index * VECTOR_BYTES), _VECTOR), align=4)
            for index in range(count)
        ]
        build.branch(after)
        build.position_at_end(after)
        phis = []
        for each in kept:
            phi = build.phi(_VECTOR)
            phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
            phi.add_incoming(each, there)
            phis.append(phi)
        return phis

    def _at(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.build.inttoptr(self.build.add(base, offset), kind.as_pointer())

    def _load(self, base: Any, size: int, row: int, k: Any, kind: Any) -> Any:
        count = self.rows if base is self.x else self.outs
        width = kind.count if isinstance(kind, ir.VectorType) else 1
        offset = self.build.add(self.build.mul(k, _I64(count * size)), _I64(row * width * size))
        return self.build.load(self._at(base, offset, kind), align=size * width)

    def _ask_ahead(self, k: Any, step: int) -> None:
        """Nothing: a panel lies in a cache."""


@intrinsic  # type: ignore[untyped-decorator]
def _tile(context: Any, given: Any) -> Any:
    """Compute one block of k of a tile.  given: see `write_block`."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        values = [builder.extract_value(arguments[0], index) for index in range(len(given))]
        _Packed(builder, ROWS, OUTS, _I32).write_block(values)
        return context.get_dummy_value()

    return types.void(given), write


class _Rows(_Tile):
    """Copies rows of float32, or of a matrix, into the order of a tile, as float32."""

    def write_rows(self, source: Any, target: Any, k: Any) -> None:
        """source: rows of k numbers of `item`, one after the other.  target: aligned.  All are i64."""
        build = self.build
        self.w, self.k = source, k
        whole = build.sub(k, build.srem(k, _I64(LANES)))

        def body(width: int) -> Any:
            def write(none: list[Any], at: Any) -> list[Any]:
                for row in range(self.rows):
                    offset = build.add(build.mul(at, _I64(self.rows * 4)), _I64(row * width * 4))
                    values = self._weights(row, at, width)
                    pointer = build.inttoptr(build.add(target, offset), values.type.as_pointer())
                    build.store(values, pointer, align=4 * width)
                return none

            return write

        self._loop([], _I64(0), whole, LANES, body(LANES))
        self._loop([], whole, k, 1, body(1))


def _packer(rows: int) -> Any:
    """A function for compiled code: puts `rows` rows of k numbers into the order of a tile.

    item: a number of the rows' type.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def pack(context: Any, item: Any, source: Any, target: Any, k: Any) -> Any:
        def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            kind = {types.int8: _I8, types.int16: _I16, types.int32: _I32}[item]
            _Rows(builder, rows, 1, kind).write_rows(*arguments[1:])
            return context.get_dummy_value()

        return types.void(item, *[types.int64] * 3), write

    return pack


_pack_rows, _pack_outs = _packer(ROWS), _packer(OUTS)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _product(
    item: Any, size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
) -> None:
    """out [m, n] (rows `stride` numbers apart) = x [m, k] @ w [n, k].T * scale [n] + bias [n], in float32.

    At least ROWS rows and OUTS outputs.  size: bytes of a weight.  The others: addresses and lengths.
    """
    whole = k // LANES * LANES
    row_tiles, row_bytes = (m + ROWS - 1) // ROWS, -(-ROWS * k * 4 // ALIGNED) * ALIGNED
    out_bytes = -(-OUTS * k * 4 // ALIGNED) * ALIGNED
    tiles = max(PANEL_BYTES // max(out_bytes, 1), LEAST_TILES)  # of outputs in a panel
    of_rows, rows_at = _aligned(row_tiles * row_bytes)
    of_panel, panel_at = _aligned(tiles * out_bytes)
    of_sums, sums_at = _aligned(tiles * SUMS_BYTES)
    for tile in range(row_tiles):
        row = min(tile * ROWS, m - ROWS)  # the last tile is moved back over computed rows: equal bits
        _pack_rows(np.int32(0), x + row * k * 4, rows_at + tile * row_bytes, k)
    for first in range(0, n, tiles * OUTS):
        count = min(tiles, (n - first + OUTS - 1) // OUTS)
        for tile in range(count):
            column = min(first + tile * OUTS, n - OUTS)
            _pack_outs(item, w + column * k * size, panel_at + tile * out_bytes, k)
        for row_tile in range(row_tiles):
            row, start = min(row_tile * ROWS, m - ROWS), 0
            while True:
                stop = min(start + BLOCK_VECTORS * LANES, whole)
                for tile in range(count):
                    column = min(first + tile * OUTS, n - OUTS)
                    scale_at = scale + column * 4 if scale else 0
                    bias_at = bias + column * 4 if bias else 0
                    _tile(
                        (
                            rows_at + row_tile * row_bytes, 0, panel_at + tile * out_bytes, scale_at, bias_at,
                            out + (row * stride + column) * 4, stride, k, sums_at + tile * SUMS_BYTES, start,
                            stop,
                        )
                    )  # fmt: skip
                start = stop
                if stop == whole:
                    break
    kernels._hold((of_rows, of_panel, of_sums))


@cache
def product_of(dtype: torch.dtype) -> Any:
    """As `kernels.product_of`, for shapes that `takes` allows: others answer 0."""
    if dtype == torch.int8 and kernels.INTEGERS:
        return integer_panels.product()
    if not is_exact(dtype):
        return bfloat16_panels.product()
    item = kernels._ZEROS[dtype]  # a part of the cache's key

    def multiply_many(
        size: int, x: int, w: int, scale: int, bias: int, out: int, m: int, n: int, k: int, stride: int
    ) -> int:
        if m < ROWS or n < OUTS:
            return 0
        _product(item, size, x, w, scale, bias, out, m, n, k, stride)
        return 1

    return callback(multiply_many, types.int64(*[types.int64] * 10))


def is_exact(dtype: torch.dtype) -> bool:
    """Whether panels give the bits of the tiles.

    Weights of bfloat16 do not where the CPU multiplies them with rows rounded to bfloat16.
    """
    return dtype != torch.bfloat16 or not bfloat16_panels.IS_USABLE


def takes(weight: Tensor) -> bool:
    """Whether panels of this matrix [outs, k] can be multiplied with LEAST_ROWS rows and more."""
    outs, width = weight.shape
    return outs >= integer_panels.OUTS and 0 < width <= kernels.EXACT_WIDTH


@cache
def least_rows(dtype: torch.dtype) -> int:
    """From how many rows on products over panels are faster here; NEVER where they are not.

    Measured once, in about 0.05 s, after the compilation.  The two ways give equal bits, or nearly equal
    numbers where rows are rounded: on a CPU where the measured products differ, panels are not used, and the
    log says so.  Stripes are for all numbers of rows.
    """
    if dtype == STRIPES:
        return NEVER
    measured = MEASURED_ROWS if is_exact(dtype) else MEASURED_ROUNDED_ROWS
    outs, width = MEASURED_SHAPE
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outs, width, generator=generator) * 40).clamp_(-127, 127).to(dtype)
    x, scale = torch.randn(measured[-1], width, generator=generator), torch.ones(outs)
    answers = [torch.empty(len(x), outs) for _ in range(2)]
    addresses = kernels.product_of(dtype).address, product_of(dtype).address
    call = cast("partial[None]", kernels.kernel_for(dtype)).func
    found = NEVER
    for rows in reversed(measured):
        seconds = [float("inf")] * 2
        for way in (0, 1) * 3:
            began = time.perf_counter()
            call(
                addresses[way], 0, weight.element_size(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(),
                0, answers[way].data_ptr(), rows, outs, width, outs, 1,
            )  # fmt: skip
            seconds[way] = min(seconds[way], time.perf_counter() - began)
        if not _agree(answers[0][:rows], answers[1][:rows], exact=is_exact(dtype)):
            log.warning("products of many rows of %s weights differ on this CPU and are not used", dtype)
            return NEVER
        if seconds[1] >= seconds[0]:
            break
        found = rows
    return found


def _agree(one: Tensor, other: Tensor, *, exact: bool) -> bool:
    if exact:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= ROUNDED_ERROR * one.abs().max())
