"""Products of our own blocks with what adapters add to them, in torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from node.model.adapters.hooks import with_low_rank
from node.model.adapters.low_rank import Groups, parts_of

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Products:
    """The products of one block of a step.  groups: rows with an adapter.  rows: of the batch."""

    groups: Groups
    block: int
    rows: int

    def product(
        self, matrix: nn.Module, x: Tensor, sites: Sequence[str], widths: Sequence[int] | None = None
    ) -> Tensor:
        """x [rows, tokens, in], or [rows * tokens, in], times a matrix: the outputs of `sites` side by side.

        widths: the outputs of each site; None: all have as many.
        """
        answer: Tensor = matrix(x)
        last = 0
        for number, name in enumerate(sites if self.groups else ()):
            first, last = last, last + (widths[number] if widths else answer.shape[-1] // len(sites))
            if parts := parts_of(self.groups, self.block, name):
                own = answer[..., first:last]
                own.copy_(with_low_rank(own, x, parts, self.rows))
        return answer
