"""Rows of several lengths in one step of the library's attention: masked behind the end of each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows times the longest of them, of keys that are gathered at a time on a device: the memory of a batch must
# not follow its longest row.  In 16 bits with 8 key heads of 128: 128 MiB of keys and values.
RAGGED_POSITIONS = 1 << 15


def ragged_parts(lengths: NDArray[np.int64], most: int = RAGGED_POSITIONS) -> list[tuple[int, int]]:
    """The rows [first, last) that are computed together, in order: one row, or `most` positions at most.

    lengths: of each row, without its new position.
    """
    parts, first, longest = [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length + 1)
        if row > first and (row + 1 - first) * longest > most:
            parts.append((first, row))
            first, longest = row, length + 1
    return [*parts, (first, len(lengths))]


def ragged_mask(merge: str, config: Any, dtype: torch.dtype, lengths: Tensor, longest: int) -> object:
    """The mask of one new position of each row, in the form that an architecture takes.

    merge: of the architecture.  config: the library's.  dtype: of hidden states.  lengths: positions before
    each row's new one, int64 [rows], on the device of the mask.  longest: positions of the longest row.
    """
    keys = torch.arange(longest, device=lengths.device)
    seen = keys <= lengths[:, None]  # [rows, longest]
    if merge == "padding":
        return seen.long()
    window = getattr(config, "sliding_window", None)
    near = seen & (keys > lengths[:, None] - window) if window else seen
    eager = config._attn_implementation == "eager"
    if merge == "mask":
        return _four_dimensions(near, dtype, eager=eager)
    return {
        "full_attention": _four_dimensions(seen, dtype, eager=eager),
        "sliding_attention": _four_dimensions(near, dtype, eager=eager),
    }


def _four_dimensions(visible: Tensor, dtype: torch.dtype, *, eager: bool) -> Tensor:
    visible = visible[:, None, None]  # [rows, 1, 1, longest]
    if not eager:
        return visible
    least = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, least)
