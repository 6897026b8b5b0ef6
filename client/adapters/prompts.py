"""What prompt tuning trains: vectors in front of a text, and vectors at each block."""

from __future__ import annotations

import torch
from torch import nn


class Prompts(nn.Module):
    """What prompt tuning trains: `soft` [length, hidden] in front of the tokens, `deep` at each block.

    Lester et al., arXiv:2104.08691 (soft); Liu et al., arXiv:2110.07602 (deep), in the form of Petals:
    `deep` [blocks, length, hidden] is added to the first positions of every block's input.
    """

    def __init__(self, length: int, hidden: int, blocks: int | None, scale: float) -> None:
        """blocks: of the model, for deep prompts; None: soft ones alone.  scale: of the initial values."""
        super().__init__()
        self.length = length
        self.soft = nn.Parameter(torch.randn(length, hidden) * scale)
        self.deep = None if blocks is None else nn.Parameter(torch.zeros(blocks, length, hidden))

    @classmethod
    def of(cls, soft: nn.Parameter) -> Prompts:
        """A soft prompt with these values [length, hidden], the parameter itself."""
        made = cls(1, 1, None, 0.0)
        vars(made).update(length=len(soft))
        made.register_parameter("soft", soft)
        return made
