"""What a program holds of a swarm: the same under trio and under asyncio.

`client.swarm.Swarm` (trio) and `client.bridges.asyncio_swarm.BridgedSwarm` (asyncio) are the two
that there are; what each method does is written at the first.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol, Unpack

if TYPE_CHECKING:
    from torch import Tensor

    from client.config import ClientConfig
    from client.generation.generate import Token
    from client.generation.generation_config import Settings
    from client.generation.options import GenerateArguments, GenerateOptions
    from client.session.trace import Trace
    from node.model.checkpoint.info import ModelInfo
    from node.model.embed_and_head import EmbedAndHead
    from routing.chains.hops import Chain
    from routing.view.view import SwarmView
    from tensor_codec.messages.contract import Reply


class ConversationLike(Protocol):
    """Caches that outlive one `generate`.  See `client.generation.conversation.Conversation`."""

    @property
    def trace(self) -> Trace:
        """What happened to its session."""

    def close(self) -> None:
        """End the session."""


class SessionLike(Protocol):
    """A session for hidden states.  See `client.session.session.Session`."""

    @property
    def chain(self) -> Chain:
        """The hops that it runs along."""

    @property
    def length(self) -> int:
        """Positions in the hops' caches."""

    @property
    def trace(self) -> Trace:
        """What happened to it."""

    async def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
    ) -> Tensor | None:
        """Run hidden states through the chain.  See `Session.step`."""


class SwarmLike(Protocol):
    """A swarm that serves one model, seen from a client.  See `client.swarm.Swarm`."""

    @property
    def config(self) -> ClientConfig:
        """How it was joined."""

    @property
    def info(self) -> ModelInfo:
        """The model."""

    @property
    def local_model(self) -> EmbedAndHead:
        """The model's embeddings, head and tokenizer."""

    @property
    def ends(self) -> EmbedAndHead:
        """Another name of `local_model`."""

    def view(self) -> SwarmView:
        """See `Swarm.view`."""

    async def changed(self, since: SwarmView) -> None:
        """See `Swarm.changed`."""

    async def route(self) -> Chain:
        """See `Swarm.route`."""

    async def chains(self, most: int) -> list[Chain]:
        """See `Swarm.chains`."""

    def generate(
        self,
        prompt: Any,  # Any: text, or token ids in whatever holds them
        options: GenerateOptions | None = None,
        *,
        conversation: Any = None,  # Any: what `conversation` of the same swarm gave
        trace: Trace | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> AsyncGenerator[Token, None]:
        """See `Swarm.generate`."""

    def settings(
        self,
        prompt: Any,  # Any: text, or token ids in whatever holds them
        options: GenerateOptions | None = None,
        *,
        conversation: Any = None,
        **arguments: Unpack[GenerateArguments],
    ) -> Settings:
        """See `Swarm.settings`."""

    def usual_length(self, batch: int = 1) -> int:
        """See `Swarm.usual_length`."""

    def conversation(self, max_length: int | None = None, *, trace: Trace | None = None) -> ConversationLike:
        """See `Swarm.conversation`."""

    async def forward(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Swarm.forward`."""

    async def backward(
        self, hidden: Tensor, grad: Tensor, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """See `Swarm.backward`."""

    def session(
        self, *, batch: int = 1, max_length: int | None = None
    ) -> AbstractAsyncContextManager[SessionLike]:
        """See `Swarm.session`."""
