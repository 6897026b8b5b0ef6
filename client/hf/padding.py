"""Masks and positions of a transformers call, checked: the left padding of each row is all that remains.

The library describes padding by masks.  Blocks in a swarm know rows that begin at position 0, and rows of one
session are equally long.  So the rows of a batch go without their padding, those of one length of padding
together.  Pure functions of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padding_of(mask: Tensor | None, rows: int, seen: int, tokens: int) -> Tensor | None:
    """The padded positions in front of each row, int64 [rows]; None where there is no padding.

    mask: int or bool [rows, seen + tokens], or [rows, tokens] where seen is 0; None for all ones.
    seen: positions before this call, padding included.  Padding behind a row's tokens counts for nothing: a
    block never looks ahead.
    Raises ValueError for any other mask.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is {type(mask).__name__}, a tensor [rows, tokens] is allowed")
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions {list(mask.shape)}, [rows, tokens] of 0 and 1 is"
            " allowed: the blocks' masks are made at the servers"
        )
    if tuple(mask.shape) != (rows, seen + tokens):
        raise ValueError(f"attention_mask is {list(mask.shape)}, {[rows, seen + tokens]} is needed")
    on = mask != 0
    if bool(on.all()):
        return None
    before = (on.cumsum(-1) == 0).sum(-1)
    behind = (on.flip(-1).cumsum(-1) == 0).sum(-1)
    whole = on.sum(-1)
    if not bool((whole > 0).all()):
        raise ValueError(f"attention_mask leaves row {int((whole == 0).nonzero()[0])} without a token")
    if not bool((whole + before + behind == mask.shape[1]).all()):
        raise ValueError("attention_mask has holes: padding in front of a row, or behind it, is allowed")
    return before.cpu() if bool(before.any()) else None


def check_cached(mask: Tensor | None) -> None:
    """Raises ValueError for padding behind a row: the next token would follow the padding."""
    if mask is not None and not bool((mask[:, -1] != 0).all()):
        raise ValueError(
            "attention_mask pads a row on the right, and later tokens follow in the cache: pad on the left"
            " (tokenizer.padding_side = 'left')"
        )


def check_positions(
    position_ids: Tensor | None, pads: Tensor | None, rows: int, seen: int, tokens: int
) -> None:
    """Raises ValueError for positions that are not those of the mask.

    position_ids: [rows or 1, tokens], of tokens that follow `seen` positions.  Positions of padding may be
    any.
    """
    if position_ids is None:
        return
    shape = tuple(position_ids.shape)
    if position_ids.dim() != 2 or shape[0] not in (1, rows) or shape[1] != tokens:
        raise ValueError(f"position_ids is {list(shape)}, [{rows}, {tokens}] is needed")
    expected = positions(pads, rows, seen, tokens)
    real = expected >= 0
    given = position_ids.cpu().expand(rows, tokens)
    if not bool((given[real] == expected[real]).all()):
        raise ValueError(
            "position_ids differ from the mask's (0, 1, 2, ... from each row's first token on): packed"
            " sequences and gaps are not allowed"
        )


def positions(pads: Tensor | None, rows: int, seen: int, tokens: int) -> Tensor:
    """The position of each token in its row, int64 [rows, tokens]; negative in padding."""
    found = torch.arange(seen, seen + tokens).expand(rows, tokens)
    return found if pads is None else found - pads[:, None]


def to_front(hidden: Tensor, pads: Tensor, prefix: int) -> Tensor:
    """Rows without the padding behind their first `prefix` positions; the padding comes last.

    hidden: [rows, prefix + tokens, hidden].
    """
    return _turned(hidden, pads.to(hidden.device), prefix)


def to_back(hidden: Tensor, pads: Tensor, prefix: int) -> Tensor:
    """The inverse of `to_front`."""
    return _turned(hidden, -pads.to(hidden.device), prefix)


def _turned(hidden: Tensor, by: Tensor, prefix: int) -> Tensor:
    tokens = hidden.shape[1] - prefix
    order = (torch.arange(tokens, device=hidden.device) + by[:, None]) % tokens
    turned = hidden[:, prefix:].gather(1, order[..., None].expand(-1, -1, hidden.shape[2]))
    return torch.cat([hidden[:, :prefix], turned], dim=1) if prefix else turned
