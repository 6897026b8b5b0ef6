"""The product of a few rows with int8 weights on CUDA, in Triton: W8A16.

A decode step reads every weight once, so memory bounds its time: int8 takes half of bfloat16's.  A tile of
weights is cast in registers (int8 is exact in bfloat16, float16 and float32), multiplied by tensor cores and
added in float32.  The scale of a row of weights and the bias are applied to the sum.  Nothing is rounded
but x and the answer.

Weights are the left operand and rows of x the columns of the right one: weights then go from registers into
tensor cores, and a few rows waste less of them.  A matrix has fewer tiles of outputs than a card needs
programs, so each tile's sum over `in` is split (split-K).  Each program leaves its part in memory and
counts; the last one adds the parts in their order.  So a row has the same bits in each run.
"""

# Triton reads the annotations of a kernel's parameters, so they are no strings here.

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from node.model.cuda.launches import INTERPRETED, processors

LEAST_SPLIT = 512  # values of `in` for each part: fewer are not worth the addition of parts
MOST_SPLITS = 16
PROGRAMS_PER_PROCESSOR = 4  # that hide each other's waits for memory
ALIGNED = 16  # bytes that a load takes at once
MOST_TILES = 1 << 16  # of outputs times tiles of rows in one call


class Tiles(NamedTuple):
    """Sizes of one program's work.  outs, rows, width: of its tile of weights and of x."""

    outs: int
    rows: int
    width: int
    warps: int
    stages: int


# (most rows, tiles), for 16-bit x.  Four stages of 64 x 128 bytes are in flight for each program.
_TABLE = (
    (16, Tiles(64, 16, 128, 4, 4)),
    (32, Tiles(64, 32, 128, 4, 4)),
    (64, Tiles(64, 64, 128, 4, 3)),
)
_MANY = Tiles(128, 64, 64, 4, 4)
_FLOAT32 = Tiles(32, 16, 64, 4, 2)  # without tensor cores, so that sums are float32's
_ODD = Tiles(32, 16, 64, 4, 2)  # rows of weights that begin anywhere are read byte by byte, into registers


def tiles_for(rows: int, width: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a product of this number of rows and of `in` numbers each."""
    if dtype is torch.float32:
        return _FLOAT32
    if width % ALIGNED:
        return _ODD
    return next((tiles for most, tiles in _TABLE if rows <= most), _MANY)


def splits_for(tiles: int, width: int, processors: int) -> int:
    """The parts of each sum, so that all processors have work.  tiles: programs without a split."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(tiles, 1))
    return max(1, min(wanted, width // LEAST_SPLIT, MOST_SPLITS))


# A number that is 1 becomes a constant of the compiled code, and as a constant it has no type to widen.
@triton.jit(do_not_specialize=["rows", "splits"])  # type: ignore[untyped-decorator]
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    outs: tl.tensor,
    width: tl.tensor,
    part_width: tl.tensor,  # a multiple of WIDTH
    splits: tl.tensor,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,  # more than one part
    EVEN: tl.constexpr,  # every tile of `in` is whole
    BIASED: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    out_at = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row_at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    out_inside, row_inside = out_at < outs, row_at < rows
    # A row outside is read from row 0 and not written: loads without a mask are wider.
    weight_rows = tl.where(out_inside, out_at, 0).to(tl.int64)
    x_rows = tl.where(row_inside, row_at, 0).to(tl.int64)
    within = tl.arange(0, WIDTH)
    first = split * part_width
    last = tl.minimum(first + part_width, width)
    weights = weight + weight_rows[:, None] * width + within[None, :]  # [OUTS, WIDTH]
    columns = x + x_rows[None, :] * width + within[:, None]  # [WIDTH, ROWS]
    total = tl.zeros((OUTS, ROWS), dtype=tl.float32)
    for start in range(first, last, WIDTH):
        if EVEN:
            codes = tl.load(weights + start, eviction_policy="evict_first")
            numbers = tl.load(columns + start)
        else:
            inside = start + within < last
            codes = tl.load(weights + start, mask=inside[None, :], other=0)
            numbers = tl.load(columns + start, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # it has neither a cast of integers to bfloat16 nor products of bfloat16
            total = tl.dot(codes.to(tl.float32), numbers.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(codes.to(numbers.dtype), numbers, total, input_precision="ieee")
    stored = out_inside[:, None] & row_inside[None, :]
    at = row_at.to(tl.int64)[None, :] * outs + out_at[:, None]
    finished = True
    if SPLIT:
        size = rows.to(tl.int64) * outs
        tl.store(parts + split * size + at, total, mask=stored, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's part is written before the count says so
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        finished = tl.atomic_add(counts + tile, 1, sem="acq_rel") == splits - 1
        if finished:
            total = tl.zeros((OUTS, ROWS), dtype=tl.float32)
            for each in range(splits):
                total += tl.load(parts + each * size + at, mask=stored, other=0.0, cache_modifier=".cg")
            tl.store(counts + tile, 0)  # as the next call finds it
    if finished:
        total *= tl.load(scale + out_at, mask=out_inside, other=0.0)[:, None]
        if BIASED:
            total += tl.load(bias + out_at, mask=out_inside, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `node.model.cuda.ops.int8_linear`."""
    rows, width = x.shape
    outs = len(weight)
    out = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    bias = scale if bias is None else bias.contiguous()
    tiles = tiles_for(rows, width, x.dtype)
    grid = triton.cdiv(outs, tiles.outs), triton.cdiv(rows, tiles.rows)
    splits = splits_for(grid[0] * grid[1], width, processors(x.device))
    part_width = triton.cdiv(triton.cdiv(width, splits), tiles.width) * tiles.width
    splits = triton.cdiv(width, part_width)
    if grid[0] * grid[1] > MOST_TILES:
        splits, part_width = 1, triton.cdiv(width, tiles.width) * tiles.width
    parts = torch.empty(splits, rows, outs, device=x.device) if splits > 1 else out
    _product[(*grid, splits)](
        x, weight, scale, bias, out, parts, counts_of(x.device), rows, outs,
        width, part_width, splits, OUTS=tiles.outs, ROWS=tiles.rows, WIDTH=tiles.width, SPLIT=splits > 1,
        EVEN=width % tiles.width == 0, BIASED=bias is not scale,
        INTERPRETED=INTERPRETED, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


@cache
def counts_of(device: torch.device) -> Tensor:
    """Zeros that count the parts of each tile; each call leaves zeros.  Calls of a device are in one order.

    Made before a graph is recorded: a recording runs its operations once without recording.
    """
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
