"""The compiled functions of adapters, made ready before the first step that needs them."""

from __future__ import annotations

from typing import Protocol

import torch

from node.model.weights.quantize import kernels


class Computes(Protocol):
    """The part of `node.model.blocks.span.Span` that says by what its blocks are computed."""

    dtype: torch.dtype
    device: torch.device

    @property
    def fused(self) -> bool:
        """See `Span.fused`."""


def prepare(span: Computes) -> bool:
    """Compile what the blocks of a span need for adapters, or read it from the cache; whether they need any.

    The first time on a machine takes seconds, in which no other Python code runs: at a node's start.
    """
    compiled = span.fused and span.dtype == torch.float32 and span.device.type == "cpu"
    if not compiled or kernels() is None:
        return False
    from node.model.weights import low_rank_kernel

    head = low_rank_kernel.head(0)
    return all(head[place] for place in low_rank_kernel.CODE)
