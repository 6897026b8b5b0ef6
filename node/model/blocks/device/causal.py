"""Attention of the last positions of a sequence over all of it, by the fastest way of torch on a device.

A mask of numbers is the slow way: flash attention (arXiv:2205.14135) takes none, and what is left computes
all scores in float32 and repeats the keys of grouped heads for it.  So a causal step without a window names
its triangle (`causal_lower_right`) and brings no mask; with a window, keys before the first position's window
are left out, and a mask says the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """Attention of q [batch, tokens, heads, dim] over k and v [batch, length, key_heads, dim].

    The last query is at the last key.  window: positions that a query sees, 0 for all before it.
    Answers [batch, tokens, heads * dim] in q's dtype.
    """
    tokens, length = q.shape[1], k.shape[1]
    if 0 < window < length:
        first = max(0, length - tokens - window + 1)
        k, v, length = k[:, first:], v[:, first:], length - first
    else:
        window = 0
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    grouped, flash = q.shape[1] != k.shape[1], not window and _by_flash(q, k, v)
    if grouped and not flash:
        # Other ways than flash have no grouped heads, but one that keeps all scores in float32.
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        grouped = False
    mask: Tensor | None = None
    if not window and (tokens == length or tokens == 1):
        pass
    elif not window and (flash or q.device.type == "cuda"):
        # With it come torch's compilers: a second and a half, for which a node on a CPU has no use.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(tokens, length)
    else:
        mask = _band(tokens, length, window or length, q.device)
    answer = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=tokens == length > 1 and mask is None, scale=scale,
        enable_gqa=grouped,
    )  # fmt: skip
    return answer.transpose(1, 2).flatten(2)


def _by_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention takes these, [batch, heads, positions, dim], with grouped heads and causal.

    torch refuses it for `is_causal` and fewer queries than keys; `causal_lower_right` does not say it either.
    """
    if q.device.type != "cuda":
        return False
    square = q.shape[2] == k.shape[2]
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, square, True)
    return bool(torch.backends.cuda.can_use_flash_attention(parameters))


def _band(tokens: int, length: int, window: int, device: torch.device) -> Tensor:
    """Which of `length` keys the last `tokens` positions see: bool [tokens, length]."""
    keys = torch.arange(length, device=device)
    queries = keys[length - tokens :, None]
    return (keys <= queries) & (keys > queries - window)
