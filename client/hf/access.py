"""A swarm as torch code uses it: plain calls from any thread, whatever handle the program has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from client.adapters.adapter import Adapter
from client.bridges.proxy import target_of
from client.bridges.sync import BlockingCalls

if TYPE_CHECKING:
    from client.api import SwarmLike, SyncSwarm
    from client.session.session import Session
    from client.swarm import Swarm
    from tensor_codec.adapters import AdapterContent

T = TypeVar("T")


class SwarmAccess:
    """Blocking calls to a swarm of any handle: `connect_sync`, or `connect` under trio or asyncio.

    adapter: in use for every call: one of this program, or the name of one that servers keep; None: none.
    With a handle of a running event loop, the calls come from other threads (`trio.to_thread.run_sync`,
    `asyncio.to_thread`): a call in trio's own thread raises RuntimeError.
    """

    def __init__(self, handle: SyncSwarm | SwarmLike) -> None:
        self.adapter: Adapter | str | None = None
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
        given = _given(prompts=prompts, adapter=self.renewed())
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

    @property
    def virtual_tokens(self) -> int:
        """Places that the adapter's prefix takes in a session, besides its positions."""
        return self.adapter.virtual_tokens if isinstance(self.adapter, Adapter) else 0

    def use(self, adapter: Adapter | str | None) -> None:
        """Compute with this adapter from now on, or with none."""
        self.adapter = adapter

    @property
    def content(self) -> AdapterContent | str | None:
        """The present values for servers, or the name of an adapter of theirs; None where there are none."""
        adapter = self.adapter
        if adapter is None or isinstance(adapter, str):
            return adapter
        return adapter.content() if adapter.is_in_blocks else None

    def renewed(self) -> AdapterContent | str | None:
        """`content` after a look at every value: an optimizer may write past torch's count of changes."""
        if isinstance(self.adapter, Adapter) and self.adapter.is_in_blocks:
            return self.adapter.renew()
        return self.content

    @property
    def is_at_ends(self) -> bool:
        """Whether the adapter has a part here: a prompt, or values at embedding, norm or head."""
        return isinstance(self.adapter, Adapter) and self.adapter.tensors.is_at_ends

    def run(self, hidden: Tensor, start: int, stop: int, prompts: Tensor | None = None) -> Tensor:
        """Blocks [start, stop) on hidden states [batch, tokens, hidden], with a gradient if one is wanted."""
        adapter = self.adapter
        if isinstance(adapter, Adapter) and not adapter.is_in_blocks:
            adapter = None
        trained = adapter.parameters_of(start, stop) if isinstance(adapter, Adapter) else []
        if torch.is_grad_enabled() and any(
            one is not None and one.requires_grad for one in (hidden, prompts, *trained)
        ):
            call = Asked(self, start, stop, adapter)
            return cast(Tensor, cast(Any, Through).apply(hidden, prompts, call, *trained))
        given = _given(prompts=prompts, adapter=self.renewed())
        found = self.call(partial(self.swarm.forward, hidden, start=start, stop=stop, **given))
        return found.to(hidden.device, hidden.dtype)

    def __deepcopy__(self, memo: object) -> SwarmAccess:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a model of a swarm cannot be pickled: save_pretrained saves what was trained")


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The blocks of a pass, and the adapter that they have."""

    swarm: SwarmAccess
    start: int
    stop: int
    adapter: Adapter | str | None


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
        asked: Asked,
        *trained: Tensor,
    ) -> Tensor:
        """hidden [batch, tokens, hidden] -> the same shape, dtype and device.

        trained: the adapter's parameters in these blocks.
        """
        swarm = asked.swarm
        own = asked.adapter.renew() if isinstance(asked.adapter, Adapter) else asked.adapter
        given = _given(prompts=prompts, adapter=own)
        output, kept = swarm.call(
            partial(swarm.swarm.forward_kept, hidden, start=asked.start, stop=asked.stop, **given)
        )
        like = [None if each is None else (each.device, each.dtype) for each in (hidden, prompts)]
        vars(ctx).update(asked=asked, kept=kept, like=like)
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of `hidden`, `prompts` and the adapter's parameters."""
        asked: Asked = ctx.asked
        found = asked.swarm.call(partial(asked.swarm.swarm.gradients, ctx.kept, grad))
        like, prompts_like = ctx.like
        of_prompts = None if found.prompts is None else found.prompts.to(*prompts_like)
        of_adapter: list[Tensor | None] = []
        if isinstance(asked.adapter, Adapter):
            of_adapter = asked.adapter.gradients_of(found.adapter or {}, asked.start, asked.stop)
        return found.hidden.to(*like), of_prompts, None, *of_adapter


def _given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}
