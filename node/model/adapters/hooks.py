"""Low-rank matrices at the library's own linears, whatever keeps their weights: forward hooks.

For blocks that the library computes, with and without gradients.  A linear answers as before, and its rows
with an adapter get their addition; other rows keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from node.model.adapters.low_rank import Groups, LowRank, parts_of
from node.model.adapters.sites import sites_of
from tensor_codec.errors import LocalProtocolError

Parts = Sequence[tuple[LowRank, int, int]]  # matrices and their rows [first, last)


@contextmanager
def adapted(blocks: Mapping[int, nn.Module], groups: Groups, rows: int) -> Iterator[None]:
    """The linears of these blocks have the groups' adapters within the context.

    blocks: the library's modules, by their numbers in the model.  rows: of the batch, the first dimension of
    the hidden states.  Raises LocalProtocolError for a site that a block lacks.
    """
    handles = []
    try:
        for number, block in blocks.items() if groups else ():
            linears = sites_of(block)
            for name in dict.fromkeys(name for each in groups for name in each.adapter.blocks[number]):
                if name not in linears:
                    raise LocalProtocolError(f"an adapter's site {name!r}, block {number} has none")
                hook = _hook(parts_of(groups, number, name), rows)
                handles.append(linears[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(parts: Parts, rows: int) -> Any:  # Any: the types of torch's hooks
    def add(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return with_low_rank(output, args[0], parts, rows)

    return add


def with_low_rank(output: Tensor, x: Tensor, parts: Parts, rows: int) -> Tensor:
    """The output [..., out] of a linear for x [..., in], with what low-rank matrices add to their rows.

    rows: of the batch; a row's positions lie next to each other in the leading dimensions.
    """
    if len(parts) == 1 and parts[0][1:] == (0, rows):
        return output + parts[0][0].added(x, output.dtype)
    flat, whole = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1]).clone()
    each = len(flat) // rows  # positions of a row
    for low, first, last in parts:
        here = slice(first * each, last * each)
        whole[here] += low.added(flat[here], output.dtype)
    return whole.view(output.shape)


def leaves_of(low: LowRank, device: torch.device) -> LowRank:
    """The matrices as leaves of autograd: float32 copies that require gradients."""
    a, b = (
        each.to(device, torch.float32, copy=True, memory_format=torch.contiguous_format).requires_grad_()
        for each in (low.a, low.b)
    )
    return LowRank(a, b, low.scale)
