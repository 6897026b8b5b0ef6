"""A span with an adapter, for passes without a cache: forward, and backward with the adapter's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from node.model.adapters.hooks import adapted, leaves_of
from node.model.adapters.low_rank import AdapterGradients, Group, SpanAdapter
from node.model.adapters.prefix import AnySpanAdapter, SpanPrefix
from node.model.adapters.sites import numbered_blocks


class AdaptedSpan:
    """What `node.model.blocks.forward_backward` needs of a span, with an adapter in its blocks.

    span: a `node.model.blocks.span.Span`.  adapter: low-rank matrices at its linears, or a prefix, after
    which the positions count.  trains: whether a backward also gives the gradients of the adapter's values,
    in `gradients`; they are then float32 copies, leaves of autograd.
    """

    def __init__(self, span: Any, adapter: AnySpanAdapter, *, trains: bool = False) -> None:
        self.span = span
        self.dtype: torch.dtype = span.dtype
        self.device: torch.device = span.device
        self.adapter = adapter
        self.gradients: AdapterGradients = {}
        if trains:
            with torch.inference_mode(False):
                self.adapter = _leaves(adapter, self.device, getattr(span, "block_devices", {}))
        self._trains = trains

    def _view(self, start: int, stop: int) -> tuple[Callable[..., Any], Any]:
        """See `node.model.blocks.forward_backward.StatelessSpan`."""
        adapter = self.adapter
        adapter.check(start, stop)
        model, entry = self.span._view(start, stop)
        if isinstance(adapter, SpanPrefix):
            return _after_prefix(model, adapter, start, stop), entry
        low_rank, blocks = adapter, numbered_blocks(self.span, start, stop)

        def run(*, inputs_embeds: Tensor, **named: Any) -> Any:
            rows = len(inputs_embeds)
            with adapted(blocks, (Group(low_rank, 0, rows),), rows):
                return model(inputs_embeds=inputs_embeds, **named)

        return run, entry

    def leaves(self, start: int, stop: int) -> list[tuple[int, str, tuple[Tensor, Tensor]]]:
        """The pairs of a run whose gradients are wanted, with their blocks and names: A and B of a linear.

        Of a prefix the keys and the values.
        """
        if not self._trains:
            return []
        return [
            (block, name, pair)
            for block in range(start, stop)
            for name, pair in self.adapter.pairs(block).items()
        ]

    def learn(self, start: int, stop: int, found: list[Tensor | None]) -> None:
        """Take a run's gradients, in the order of `leaves`; None for a linear that did not run."""
        learnt: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        for number, (block, name, own) in enumerate(self.leaves(start, stop)):
            pair = found[2 * number : 2 * number + 2]
            a, b = (
                torch.zeros_like(given) if grad is None else grad
                for given, grad in zip(own, pair, strict=True)
            )
            learnt.setdefault(block, {})[name] = (a.cpu(), b.cpu())
        self.gradients = {**self.gradients, **learnt}


def _leaves(
    adapter: AnySpanAdapter, device: torch.device, devices: Mapping[int, torch.device]
) -> AnySpanAdapter:
    """The adapter's values as leaves.  devices: of blocks that are not on `device`."""
    if isinstance(adapter, SpanPrefix):
        return adapter.leaves(device)
    leaves = {
        block: {name: leaves_of(low, devices.get(block, device)) for name, low in matrices.items()}
        for block, matrices in adapter.blocks.items()
    }
    return SpanAdapter(adapter.id, leaves)


def _after_prefix(model: Callable[..., Any], prefix: SpanPrefix, start: int, stop: int) -> Callable[..., Any]:
    """The library's model of blocks [start, stop) on whole rows whose positions come after a prefix."""
    from node.model.blocks.library_cache import AfterPrefix

    count = prefix.virtual_tokens
    pairs = {block: (prefix.blocks[block].keys, prefix.blocks[block].values) for block in range(start, stop)}

    def run(*, inputs_embeds: Tensor, position_ids: Tensor, use_cache: bool, **named: Any) -> Any:
        cache = AfterPrefix(pairs, count)
        return model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids + count,
            past_key_values=cache,
            use_cache=True,
            **named,
        )

    return run
