"""Prefixes: keys and values of virtual tokens in front of the text, in every block's cache.

As in prefix tuning (Li and Liang, arXiv:2101.00190) in the form of peft: they lie in the cache as they are,
without rotary angles, every position of the text sees them, and the text begins at the position after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.sites import site_shapes
from node.model.blocks.kv_pages import BlockShape
from node.model.blocks.rope import length_rope
from tensor_codec.adapters import PREFIX
from tensor_codec.errors import LocalProtocolError

PLAIN = "full_attention"  # the library's type of a block whose positions see all before them


@dataclass(frozen=True, slots=True, eq=False)
class KeyValues:
    """A block's part of a prefix: keys and values, [virtual tokens, kv_heads * head_dim] each."""

    keys: Tensor
    values: Tensor

    def leaves(self, device: torch.device) -> KeyValues:
        """The same as leaves of autograd: float32 copies that require gradients."""
        keys, values = (
            each.to(device, torch.float32, copy=True).requires_grad_() for each in (self.keys, self.values)
        )
        return KeyValues(keys, values)


@dataclass(frozen=True, eq=False)
class SpanPrefix:
    """A prefix for a run of blocks.

    id: of the whole adapter.  blocks: of each block of the run, by its number in the model.
    """

    id: str
    blocks: Mapping[int, KeyValues]

    @property
    def virtual_tokens(self) -> int:
        """Positions in front of the text."""
        return len(next(iter(self.blocks.values())).keys)

    @property
    def kept_bytes(self) -> int:
        """Bytes that a backward keeps of a position besides: none, its places count as positions."""
        return 0

    def values(self, start: int, stop: int) -> int:
        """Numbers in the keys and values of blocks [start, stop).  Raises LocalProtocolError."""
        self.check(start, stop)
        return sum(2 * self.blocks[block].keys.numel() for block in range(start, stop))

    def check(self, start: int, stop: int) -> None:
        """Raise LocalProtocolError unless the prefix is here for all blocks of a run."""
        for block in range(start, stop):
            if block not in self.blocks:
                raise LocalProtocolError(f"prefix {self.id:.16} is not here for block {block}")

    def pairs(self, block: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What is trained in a block: the keys and the values, by the name PREFIX."""
        own = self.blocks[block]
        return {PREFIX: (own.keys, own.values)}

    def leaves(self, device: torch.device) -> SpanPrefix:
        """The same as leaves of autograd: float32 copies."""
        return SpanPrefix(self.id, {block: own.leaves(device) for block, own in self.blocks.items()})


AnySpanAdapter = SpanAdapter | SpanPrefix  # what a request without a session may have


def why_no_prefix(config: Any) -> str | None:  # Any: the library's config, which is not typed
    """Why the blocks of a model can have no prefix; None where they can."""
    types = getattr(config, "layer_types", None)
    others = {str(kind).replace("_", " ") for kind in types or () if kind != PLAIN}
    if types is None and getattr(config, "sliding_window", None):
        others = {"sliding attention"}
    if others:
        return f"it has blocks of {' and '.join(sorted(others))}"
    if getattr(config, "kv_lora_rank", None):
        return "its keys and values have different shapes (MLA)"
    if length_rope(config) is not None:
        return "its rotary angles depend on the length of the text"
    return None


def guest_shapes(span: Any) -> dict[int, dict[str, tuple[int, int]]]:  # Any: a Span
    """The shapes of all that guests can bring for each block of a span, see `blob_bytes`.

    (in, out) of linears by their names; under PREFIX twice the values of a key, where the block can have a
    prefix.
    """
    found = {block: dict(shapes) for block, shapes in site_shapes(span).items()}
    if why_no_prefix(span.config) is None:
        for block, shape in enumerate(span.shapes, span.start):
            if (values := _values(shape)) is not None:
                found[block][PREFIX] = values, values
    return found


def _values(shape: BlockShape | None) -> int | None:
    """Values of a key, which has the shape of a value; None for other caches."""
    if shape is None or (shape.key_heads, shape.key_dim) != (shape.value_heads, shape.value_dim):
        return None
    return shape.key_heads * shape.key_dim
