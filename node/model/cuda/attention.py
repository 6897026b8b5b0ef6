"""Attention of one new position of each row over pages, in Triton, with the positions split among programs.

A program takes the queries of one key head of one row and a part of the row's positions, so keys are read
once for all queries of their head.  Its softmax goes on as positions come (FlashAttention, arXiv:2205.14135).
With one row a card would have as many programs as key heads, so the positions are split (Flash-Decoding,
Dao et al. 2023), and a second kernel puts the parts together by their largest scores and their sums.

The number of parts follows from shapes alone, and a part's positions from the row's length, which is read on
the device.  So a graph that was recorded for one length serves all lengths, and short rows are split too.
"""

# Triton reads the annotations of a kernel's parameters, so they are no strings here.

import torch
import triton
import triton.language as tl
from torch import Tensor

from node.model.cuda.launches import INTERPRETED, check_stores, processors

LEAST_PART = 128  # positions of a part: fewer are not worth putting together
MOST_PARTS = 64
PROGRAMS_PER_PROCESSOR = 2
MOST_POSITIONS = 64  # that are read at a time
NUMBERS = 1 << 13  # of keys that are read at a time: 64 positions of 128 numbers, half of float32's
LEAST_QUERIES = 16  # a side of tl.dot's smallest operand
_LOWEST = -1e30  # below every score; minus infinity less itself would be no number


def parts_for(rows: int, key_heads: int, longest: int, processors: int) -> int:
    """The parts of each row's positions, so that all processors have work."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(rows * key_heads, 1))
    return max(1, min(wanted, -(-longest // LEAST_PART), MOST_PARTS))


def positions_for(size: int, dtype: torch.dtype) -> int:
    """The positions, of `size` numbers each, that a program reads at a time: it has registers for them."""
    numbers = NUMBERS // 2 if dtype is torch.float32 else NUMBERS
    return max(16, min(MOST_POSITIONS, numbers // size))


@triton.jit  # type: ignore[untyped-decorator]
def _number(x: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The interpreter has no products of bfloat16."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit  # type: ignore[untyped-decorator]
def _part(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    pages: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    most_pages: tl.tensor,
    slot_stride: tl.tensor,
    heads: tl.tensor,
    GROUP: tl.constexpr,  # queries of a key head
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LOWEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    count = tl.cdiv(tl.cdiv(length - begin, PARTS), POSITIONS) * POSITIONS
    first = begin + part * count
    last = tl.minimum(first + count, length)
    query = tl.arange(0, QUERIES)
    value = tl.arange(0, SIZE)
    is_query, is_value = query < GROUP, value < DIM
    head = row * heads + key_head * GROUP + query
    q_at, inside = head[:, None] * DIM + value[None, :], is_query[:, None] & is_value[None, :]
    queries = _number(tl.load(q + q_at, mask=inside, other=0.0), INTERPRETED)
    top = tl.full((QUERIES,), LOWEST, dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    answer = tl.zeros((QUERIES, SIZE), dtype=tl.float32)
    for start in range(first, last, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        seen = position < last
        page = tl.load(pages + row * most_pages + position // PAGE, mask=seen, other=0).to(tl.int64)
        at = (page * PAGE + position % PAGE) * slot_stride + key_head * DIM
        k = tl.load(keys + at[None, :] + value[:, None], mask=seen[None, :] & is_value[:, None], other=0.0)
        k = _number(k, INTERPRETED).to(queries.dtype)
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, LOWEST)
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        kept = tl.exp(top - higher)
        total = total * kept + tl.sum(shares, 1)
        v = tl.load(values + at[:, None] + value[None, :], mask=seen[:, None] & is_value[None, :], other=0.0)
        v = _number(v, INTERPRETED).to(queries.dtype)
        answer = answer * kept[:, None] + tl.dot(shares.to(queries.dtype), v, input_precision="ieee")
        top = higher
    if PARTS == 1:
        answer = answer / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + q_at, answer.to(out.dtype.element_ty), mask=inside)
    else:
        place = head * PARTS + part
        tl.store(sums + place, total, mask=is_query)
        tl.store(largest + place, top, mask=is_query)
        tl.store(out + place[:, None] * DIM + value[None, :], answer, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _together(
    parts: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    out: tl.tensor,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    LOWEST: tl.constexpr,
) -> None:
    """Puts the parts of one head of one row together."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MOST)
    value = tl.arange(0, SIZE)
    is_part, is_value = part < PARTS, value < DIM
    top = tl.load(largest + head * PARTS + part, mask=is_part, other=LOWEST)
    total = tl.load(sums + head * PARTS + part, mask=is_part, other=0.0)
    by = tl.exp(top - tl.max(top, 0))
    at = (head * PARTS + part)[:, None] * DIM + value[None, :]
    answers = tl.load(parts + at, mask=is_part[:, None] & is_value[None, :], other=0.0)
    answer = tl.sum(answers * by[:, None], 0) / tl.maximum(tl.sum(total * by, 0), 1e-30)
    tl.store(out + head * DIM + value, answer.to(out.dtype.element_ty), mask=is_value)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    page_tokens: int,
) -> Tensor:
    """See `node.model.cuda.ops.paged_attention`."""
    rows, heads, dim = q.shape
    key_heads = keys.shape[1]
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    if not rows:
        return out
    check_stores(keys, values)
    q, pages, lengths = q.contiguous(), pages.contiguous(), lengths.contiguous()
    longest = pages.shape[1] * page_tokens
    longest = min(longest, window) if window else longest
    parts = parts_for(rows, key_heads, longest, processors(q.device))
    answers, sums, largest = out, out, out
    if parts > 1:
        answers = torch.empty(rows, heads, parts, dim, device=q.device)
        sums, largest = torch.empty(2, rows, heads, parts, device=q.device)
    size = max(16, triton.next_power_of_2(dim))
    _part[(rows, key_heads, parts)](
        q, keys, values, pages, lengths, answers, sums, largest, scale, window, pages.shape[1],
        keys.stride(0), heads, GROUP=heads // key_heads,
        QUERIES=max(LEAST_QUERIES, triton.next_power_of_2(heads // key_heads)), DIM=dim,
        SIZE=size, POSITIONS=positions_for(size, q.dtype), PAGE=page_tokens,
        PARTS=parts, INTERPRETED=INTERPRETED, LOWEST=_LOWEST, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        _together[(rows * heads,)](
            answers, sums, largest, out, DIM=dim, SIZE=size, PARTS=parts,
            MOST=triton.next_power_of_2(parts), LOWEST=_LOWEST, num_warps=4,
        )  # fmt: skip
    return out
