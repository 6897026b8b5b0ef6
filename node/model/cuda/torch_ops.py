"""A block's operations in torch's own: where Triton cannot be used, and to compare its kernels with.

No operation waits for the device or reads a value from it, and every shape follows from shapes, so a CUDA
graph can record all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GATHERED_BYTES = 64 << 20  # of keys and values that `paged_attention` copies at a time


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [out, in] * float32 [out] -> [out, in] in `dtype`: one kernel on CUDA, and no float32 copy."""
    answer = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight, scale[:, None], out=answer)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `node.model.cuda.ops.int8_linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    return functional.linear(x, dequantised(weight, scale, x.dtype), bias)


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of the last axis, in float32 and rounded to hidden's dtype before the weight is applied.

    As the library computes it in llama's family (arXiv:1910.07467).
    """
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def add_norm(hidden: Tensor, addend: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `node.model.cuda.ops.add_norm`."""
    total = hidden + addend
    return total, norm(total, weight, eps)


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
    """See `node.model.cuda.ops.rope_and_write`."""
    rows = len(qkv)
    q, k, v = torch.split(qkv.view(rows, heads + 2 * key_heads, -1), [heads, key_heads, key_heads], 1)
    if query_norm is not None:
        q = norm(q, query_norm, eps)
    if key_norm is not None:
        k = norm(k, key_norm, eps)
    if rotary:
        angles = cos[places][:, None], sin[places][:, None]  # [rows, 1, dim]
        q, k = _rotated(q, *angles), _rotated(k, *angles)
    written = slots.long()
    keys.index_copy_(0, written, k.to(keys.dtype))
    values.index_copy_(0, written, v.to(values.dtype))
    return q.clone() if q.data_ptr() == qkv.data_ptr() else q.contiguous()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) in the arrangement of llama: halves, not neighbours."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


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
    """See `node.model.cuda.ops.paged_attention`.  Gathers the pages of some rows at a time."""
    rows, heads, dim = q.shape
    key_heads = keys.shape[1]
    longest = pages.shape[1] * page_tokens
    within = torch.arange(page_tokens, device=q.device)
    seen = torch.arange(longest, device=q.device)
    each = max(1, GATHERED_BYTES // (2 * longest * key_heads * dim * keys.element_size()))
    parts = []
    for first in range(0, rows, each):
        part = slice(first, first + each)
        last = lengths[part, None].long() - 1
        visible = seen <= last
        if window:
            visible = visible & (seen > last - window)
        slots = (pages[part].long()[:, :, None] * page_tokens + within).flatten(1)  # [some, longest]
        # What lies behind a row's end is of others and may be no number; 0 times that is none either.
        own = slots.gather(1, last.clamp(min=0))
        slots = torch.where(visible, slots, own).flatten()
        k, v = (
            store.index_select(0, slots).view(-1, longest, key_heads, dim).transpose(1, 2)
            for store in (keys, values)
        )
        # The queries of one key head take the axis of positions, so no key is repeated.
        grouped = q[part].reshape(-1, key_heads, heads // key_heads, dim)
        attended = functional.scaled_dot_product_attention(
            grouped, k, v, attn_mask=visible[:, None, None], scale=scale
        )
        parts.append(attended.reshape(-1, heads * dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `node.model.cuda.ops.silu_mul`."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up
