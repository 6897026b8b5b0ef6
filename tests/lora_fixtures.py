"""Random adapters, and the library's whole models with their weights changed by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from node.model.adapters.low_rank import LowRank, SpanAdapter
from node.model.adapters.sites import sites_of
from tests.model_fixtures import BLOCKS

Shapes = Mapping[int, Mapping[str, tuple[int, int]]]


def random_adapter(
    shapes: Shapes,
    seed: int,
    *,
    rank: int = 3,
    dtype: torch.dtype = torch.float32,
    at: Callable[[str], bool] = lambda name: True,
    size: float = 0.3,
) -> SpanAdapter:
    """An adapter at all sites that `at` names, with ranks from `rank` on; b's values are about `size`."""
    generator = torch.Generator().manual_seed(seed)

    def matrices(number: int, ins: int, outs: int) -> LowRank:
        own = rank + number % 2
        a = torch.randn(own, ins, generator=generator) / math.sqrt(ins)
        b = torch.randn(outs, own, generator=generator) * size
        return LowRank(a.to(dtype), b.to(dtype), 0.7 + 0.1 * number)

    return SpanAdapter(
        f"{seed:064x}",
        {
            block: {
                name: matrices(number, *shape)
                for number, (name, shape) in enumerate(sites.items())
                if at(name)
            }
            for block, sites in shapes.items()
        },
    )


def blocks_of(whole: Any) -> list[nn.Module]:
    """The blocks of a library's model: the one list that has as many."""
    return list(next(m for m in whole.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS))


class _Merged(nn.Module):
    """A weight with scale * B A added."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> None:
        super().__init__()
        self.given = a, b
        self.scale, self.transposed = scale, transposed

    def forward(self, weight: Tensor) -> Tensor:
        a, b = self.given
        added = (b @ a) * self.scale
        return weight + (added.T if self.transposed else added)


@contextmanager
def merged(
    whole: Any,
    adapter: SpanAdapter | None,
    leaves: dict[tuple[int, str], tuple[Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """The whole model computes with the adapter within the context, added to its weights.

    leaves: gets A and B of each block and site, as leaves of autograd.
    """
    changed = []
    for block, matrices in {} if adapter is None else adapter.blocks.items():
        linears = sites_of(blocks_of(whole)[block])
        for name, low in matrices.items():
            a, b = low.a.float().clone().requires_grad_(), low.b.float().clone().requires_grad_()
            if leaves is not None:
                leaves[block, name] = a, b
            transposed = type(linears[name]).__name__ == "Conv1D"
            parametrize.register_parametrization(
                linears[name], "weight", _Merged(a, b, low.scale, transposed=transposed)
            )
            changed.append(linears[name])
    try:
        yield
    finally:
        for linear in changed:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
