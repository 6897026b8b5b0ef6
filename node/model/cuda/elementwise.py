"""What stands between the products of a block, in Triton: norms, rotary positions, the cache, SiLU.

Each is one launch in place of four to ten.  Values are rounded to the tensors' dtype where the library rounds
them, so that a block's answer stays the library's.
"""

# Triton reads the annotations of a kernel's parameters, so they are no strings here.

import torch
import triton
import triton.language as tl
from torch import Tensor

from node.model.cuda.launches import check_stores

SILU_VALUES = 1024  # for each program
WIDE = 4096  # values of a row from which a norm takes eight warps


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(
    hidden: tl.tensor,
    addend: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    at = tl.arange(0, SIZE)
    inside = at < width
    row = tl.program_id(0).to(tl.int64) * width
    x = tl.load(hidden + row + at, mask=inside, other=0.0)
    if ADDS:
        other = tl.load(addend + row + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        tl.store(total + row + at, x, mask=inside)
    wide = x.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    rounded = (wide * root).to(x.dtype).to(tl.float32)
    by = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + at, (rounded * by).to(normed.dtype.element_ty), mask=inside)


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `node.model.cuda.torch_ops.norm`."""
    return _normed(hidden, None, weight, eps)[1]


def add_norm(hidden: Tensor, addend: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `node.model.cuda.ops.add_norm`."""
    return _normed(hidden, addend, weight, eps)


def _normed(hidden: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    width = hidden.shape[-1]
    rows = hidden.numel() // width
    total = hidden if addend is None else torch.empty_like(hidden)
    normed = torch.empty_like(hidden)
    if rows:
        _add_norm[(rows,)](
            hidden, hidden if addend is None else addend.contiguous(), weight, total, normed, width, eps,
            SIZE=triton.next_power_of_2(width), ADDS=addend is not None,
            num_warps=8 if width >= WIDE else 4,
        )  # fmt: skip
    return total, normed


@triton.jit  # type: ignore[untyped-decorator]
def _rope_and_write(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    places: tl.tensor,
    slots: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    queries: tl.tensor,
    heads: tl.tensor,
    key_heads: tl.tensor,
    eps: tl.tensor,
    slot_stride: tl.tensor,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    ROTARY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, SIZE)
    inside = at < DIM
    # The other half's number for each of them, which a rotation needs too.
    pair = tl.where(at < DIM // 2, at + DIM // 2, at - DIM // 2)
    begin = qkv + (row * (heads + 2 * key_heads) + head) * DIM
    x = tl.load(begin + at, mask=inside, other=0.0)
    slot = tl.load(slots + row).to(tl.int64)
    if head >= heads + key_heads:
        place = slot * slot_stride + (head - heads - key_heads) * DIM
        tl.store(values + place + at, x.to(values.dtype.element_ty), mask=inside)
    else:
        y = tl.load(begin + pair, mask=inside, other=0.0)
        if QUERY_NORM or KEY_NORM:
            wide = x.to(tl.float32)
            root = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
            one = (wide * root).to(x.dtype).to(tl.float32)
            two = (y.to(tl.float32) * root).to(x.dtype).to(tl.float32)
            if head < heads:
                if QUERY_NORM:
                    x = (one * tl.load(query_norm + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
                    y = (two * tl.load(query_norm + pair, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
            else:
                if KEY_NORM:
                    x = (one * tl.load(key_norm + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
                    y = (two * tl.load(key_norm + pair, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        if ROTARY:
            angle = tl.load(places + row).to(tl.int64) * DIM
            c = tl.load(cos + angle + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + angle + at, mask=inside, other=0.0).to(tl.float32)
            turned = tl.where(at < DIM // 2, -y.to(tl.float32), y.to(tl.float32))
            straight = (x.to(tl.float32) * c).to(x.dtype).to(tl.float32)
            x = (straight + (turned * s).to(x.dtype).to(tl.float32)).to(x.dtype)
        if head < heads:
            tl.store(queries + (row * heads + head) * DIM + at, x, mask=inside)
        else:
            place = slot * slot_stride + (head - heads) * DIM
            tl.store(keys + place + at, x.to(keys.dtype.element_ty), mask=inside)


def rope_and_write(
    qkv: Tensor,
    heads: int,
    key_heads: int,
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    rotary: bool,
) -> Tensor:
    """See `node.model.cuda.ops.rope_and_write`.  A program for each head of each row."""
    check_stores(keys, values)
    qkv, cos, sin, places, slots = (each.contiguous() for each in (qkv, cos, sin, places, slots))
    rows, dim = len(qkv), keys.shape[-1]
    queries = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if rows:
        _rope_and_write[(rows, heads + 2 * key_heads)](
            qkv, cos, sin, places, slots, keys, values, qkv if query_norm is None else query_norm,
            qkv if key_norm is None else key_norm, queries, heads, key_heads, eps, keys.stride(0), DIM=dim,
            SIZE=triton.next_power_of_2(dim), QUERY_NORM=query_norm is not None,
            KEY_NORM=key_norm is not None, ROTARY=rotary, num_warps=1,
        )  # fmt: skip
    return queries


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, inner: tl.tensor, SIZE: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * inner + at, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `node.model.cuda.ops.silu_mul`."""
    gate_up = gate_up.contiguous()
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul[(rows, triton.cdiv(inner, SILU_VALUES))](gate_up, out, inner, SIZE=SILU_VALUES)
    return out
