"""A swarm as torch code uses it: plain calls from any thread, whatever handle the program has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from client.bridges.proxy import target_of
from client.bridges.sync import BlockingCalls

if TYPE_CHECKING:
    from client.api import SwarmLike, SyncSwarm
    from client.session.session import Session
    from client.swarm import Swarm

T = TypeVar("T")


class SwarmAccess:
    """Blocking calls to a swarm of any handle: `connect_sync`, or `connect` under trio or asyncio.

    With a handle of a running event loop, the calls come from other threads (`trio.to_thread.run_sync`,
    `asyncio.to_thread`): a call in trio's own thread raises RuntimeError.
    """

    def __init__(self, handle: SyncSwarm | SwarmLike) -> None:
        self.handle = handle
        self.swarm: Swarm = target_of(handle)
        self.calls: BlockingCalls = self.swarm.blocking_calls()

    @property
    def blocks(self) -> int:
        """Blocks of the model."""
        return self.swarm.info.blocks

    @property
    def hidden_size(self) -> int:
        """Values of a hidden state."""
        return self.swarm.info.hidden_size

    @property
    def model(self) -> str:
        """The model's name."""
        return self.swarm.info.name

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """The result of `await function()` in the swarm's event loop."""
        return self.calls.call(function)

    def open_session(
        self, batch: int, max_length: int, start: int, stop: int, prompts: Tensor | None = None
    ) -> Session:
        """Open a session for `batch` rows over blocks [start, stop).  prompts: at each block, if any."""
        given = _given(prompts=prompts)
        return self.call(
            partial(
                self.swarm.open_session,
                batch=batch,
                max_length=max_length,
                start=start,
                stop=stop,
                **given,
            )
        )

    def close_soon(self, session: Session) -> None:
        """End a session, without waiting; for any thread, and for a garbage collection."""
        self.calls.soon(session.close)

    def run(self, hidden: Tensor, start: int, stop: int, prompts: Tensor | None = None) -> Tensor:
        """Blocks [start, stop) on hidden states [batch, tokens, hidden], with a gradient if one is wanted."""
        if torch.is_grad_enabled() and (
            hidden.requires_grad or (prompts is not None and prompts.requires_grad)
        ):
            return cast(Tensor, cast(Any, Through).apply(hidden, prompts, self, start, stop))
        found = self.call(
            partial(self.swarm.forward, hidden, start=start, stop=stop, **_given(prompts=prompts))
        )
        return found.to(hidden.device, hidden.dtype)

    def forward_kept(
        self, hidden: Tensor, start: int, stop: int, prompts: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The output of blocks [start, stop), and the inputs of all hops for `backward_kept`."""
        return self.call(
            partial(self.swarm.forward_kept, hidden, start=start, stop=stop, **_given(prompts=prompts))
        )

    def backward_kept(self, kept: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the input, and of the prompts where there are any."""
        found = self.call(partial(self.swarm.backward, kept, grad))
        return found if isinstance(found, tuple) else (found, None)

    def __deepcopy__(self, memo: object) -> SwarmAccess:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a model of a swarm cannot be pickled: save_pretrained saves what was trained")


class Through(torch.autograd.Function):
    """A run of blocks for autograd: forward at the servers, backward at the servers.

    The inputs of every hop stay here between the two (see `Swarm.forward_kept`), so that backward asks no
    server for its forward again, and the loss of a server in between loses nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,  # Any, here and below: torch's own, untyped
        hidden: Tensor,
        prompts: Tensor | None,
        swarm: SwarmAccess,
        start: int,
        stop: int,
    ) -> Tensor:
        """hidden [batch, tokens, hidden] -> the same shape, dtype and device."""
        output, kept = swarm.forward_kept(hidden, start, stop, prompts)
        like = [None if each is None else (each.device, each.dtype) for each in (hidden, prompts)]
        vars(ctx).update(swarm=swarm, kept=kept, like=like)
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of `hidden` and `prompts`."""
        found, of_prompts = ctx.swarm.backward_kept(ctx.kept, grad)
        like, prompts_like = ctx.like
        if of_prompts is not None:
            of_prompts = of_prompts.to(*prompts_like)
        return found.to(*like), of_prompts, None, None, None


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}
