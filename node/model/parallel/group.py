"""The ranks that compute one span together: sums over all of them, inside a block and in its derivative.

One process at each device, joined by torch.distributed: NCCL on CUDA, gloo on a CPU.  Every rank calls the
same operations in the same order.  On a CPU an operation ends with an error where a rank is gone, and after
COLLECTIVE_SECONDS where a rank is silent.  On CUDA, where operations are kernels, also within graphs that
NCCL does not watch, rank 0 ends them (`node.model.parallel.team`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import FileStore

from node.model.parallel.shard import Shard

COLLECTIVE_SECONDS = 60.0  # ranks compute equal parts, so one waits for another for milliseconds
# NCCL's own watchdog ends the whole process: rank 0 is to have acted long before.
NCCL_SECONDS = 1800.0


class Ranks:
    """This process's place among the ranks.  Made by `join`."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.ranks = ranks
        self.device = device
        self._alone = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block sums are of this rank only: for runs that the other ranks do not make."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def shard_of(self, config: Any) -> Shard:  # Any: the library's config
        """This rank's part of every block of a model.  Raises ConfigError."""
        return Shard.of(config, self.ranks, self.rank)

    def divide(self, block: Any) -> None:
        """Have a shard's block sum its two products over all ranks.  Any: the library's block."""
        block.self_attn.o_proj = Summed(block.self_attn.o_proj, self)
        block.mlp.down_proj = Summed(block.mlp.down_proj, self)

        def given(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if args:
                return (self.shared(args[0]), *args[1:]), named
            return args, named | {"hidden_states": self.shared(named["hidden_states"])}

        for module in (block.self_attn, block.mlp):
            module.register_forward_pre_hook(given, with_kwargs=True)

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all ranks of a tensor, equal shape and dtype everywhere; in place without autograd."""
        if self._alone:
            return part
        if part.requires_grad and torch.is_grad_enabled():
            return cast(Tensor, _Sum.apply(part, self))  # type: ignore[no-untyped-call]
        distributed.all_reduce(part)
        return part

    def shared(self, whole: Tensor) -> Tensor:
        """A tensor that is equal at all ranks; its gradient is the sum of the ranks' gradients."""
        if whole.requires_grad and torch.is_grad_enabled() and not self._alone:
            return cast(Tensor, _Shared.apply(whole, self))  # type: ignore[no-untyped-call]
        return whole

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor at all ranks.  tensor: contiguous, on this rank's device; overwritten elsewhere."""
        distributed.broadcast(tensor, 0)
        return tensor


class _Sum(torch.autograd.Function):
    """A sum over ranks.  Every rank has the gradient of the sum: it is each part's gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Ranks) -> Tensor:
        """A new tensor: autograd may need the part."""
        whole = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """As it came."""
        return gradients[0], None


class _Shared(torch.autograd.Function):
    """The derivative of `_Sum`: forward nothing, backward a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Ranks) -> Tensor:
        """As it came."""
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The sum."""
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient, None


class Summed(nn.Module):
    """A linear layer of a shard whose answer is part of a sum: answers the sum over all ranks."""

    def __init__(self, linear: nn.Module, group: Ranks) -> None:
        super().__init__()
        self.linear = linear
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., this rank's columns] -> [..., out], equal at all ranks."""
        return self.group.sum(self.linear(x))


def join(rank: int, ranks: int, device: torch.device, meeting: Path) -> Ranks:
    """Meet the other ranks.  meeting: a file that all of them use, for this once.

    Raises RuntimeError where one of them does not come within COLLECTIVE_SECONDS.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=FileStore(str(meeting), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=NCCL_SECONDS if device.type == "cuda" else COLLECTIVE_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(rank, ranks, device)


def leave() -> None:
    """Part from the other ranks; where they are gone already, that is no fault."""
    if distributed.is_initialized():
        with suppress(Exception):  # of a group that broke in the middle of an operation
            distributed.destroy_process_group()
