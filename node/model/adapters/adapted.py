"""A span with an adapter, for passes without a cache: forward, and backward with the adapter's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from node.model.adapters.hooks import adapted, leaves_of
from node.model.adapters.low_rank import AdapterGradients, Group, LowRank, SpanAdapter
from node.model.adapters.sites import numbered_blocks


class AdaptedSpan:
    """What `node.model.blocks.forward_backward` needs of a span, with low-rank matrices at its linears.

    span: a `node.model.blocks.span.Span`.  trains: whether a backward also gives the gradients of the
    adapter's matrices, in `gradients`; they are then float32 copies, leaves of autograd.
    """

    def __init__(self, span: Any, adapter: SpanAdapter, *, trains: bool = False) -> None:
        self.span = span
        self.dtype: torch.dtype = span.dtype
        self.device: torch.device = span.device
        self.adapter = adapter
        self.gradients: AdapterGradients = {}
        if trains:
            with torch.inference_mode(False):
                leaves = {
                    block: {name: leaves_of(low, self.device) for name, low in matrices.items()}
                    for block, matrices in adapter.blocks.items()
                }
            self.adapter = SpanAdapter(adapter.id, leaves)
        self._trains = trains

    def _view(self, start: int, stop: int) -> tuple[Callable[..., Any], Any]:
        """See `node.model.blocks.forward_backward.StatelessSpan`."""
        self.adapter.check(start, stop)
        model, entry = self.span._view(start, stop)
        blocks = numbered_blocks(self.span, start, stop)

        def run(*, inputs_embeds: Tensor, **named: Any) -> Any:
            rows = len(inputs_embeds)
            with adapted(blocks, (Group(self.adapter, 0, rows),), rows):
                return model(inputs_embeds=inputs_embeds, **named)

        return run, entry

    def leaves(self, start: int, stop: int) -> list[tuple[int, str, LowRank]]:
        """The matrices of a run whose gradients are wanted, with their blocks and names."""
        if not self._trains:
            return []
        return [
            (block, name, low)
            for block in range(start, stop)
            for name, low in self.adapter.blocks[block].items()
        ]

    def learn(self, start: int, stop: int, found: list[Tensor | None]) -> None:
        """Take a run's gradients of A and B, in the order of `leaves`; None for a linear that did not run."""
        learnt: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        for number, (block, name, low) in enumerate(self.leaves(start, stop)):
            pair = found[2 * number : 2 * number + 2]
            a, b = (
                torch.zeros_like(given) if grad is None else grad
                for given, grad in zip((low.a, low.b), pair, strict=True)
            )
            learnt.setdefault(block, {})[name] = (a.cpu(), b.cpu())
        self.gradients = {**self.gradients, **learnt}
