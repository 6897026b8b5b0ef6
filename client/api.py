"""A program's handles on a swarm: one interface, awaited or blocking.

`client.swarm.Swarm` (trio) has the methods of `SwarmLike`; under asyncio and in blocking programs a proxy
(`client.bridges.proxy`) stands for it.  `Swarm` documents each method.  `SyncSwarm` is `SwarmLike` without
`await`; a test compares the two, name by name and argument by argument.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, Unpack

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

    from client.adapters.upload import AnyAdapter
    from client.batch_parts import KeptInputs
    from client.config import ClientConfig
    from client.forward_backward import Gradients
    from client.generation.generate import Token
    from client.generation.generation_config import Settings
    from client.generation.options import GenerateArguments, GenerateOptions
    from client.monitor.events import SwarmEvent
    from client.monitor.sessions import SessionStatus
    from client.session.steps import StepTimes
    from client.session.trace import Trace
    from node.model.checkpoint.info import ModelInfo
    from node.model.embed_and_head import EmbedAndHead
    from routing.chains.alternatives import Constraints
    from routing.chains.hops import Chain
    from routing.names import PeerId
    from routing.view.answers import Liveness
    from routing.view.view import SwarmView
    from tensor_codec.messages.contract import Reply
    from tensor_codec.messages.info import PeerInfo


T = TypeVar("T")


class ConversationLike(Protocol):
    """Caches that outlive one `generate`.  See `client.generation.conversation.Conversation`."""

    @property
    def trace(self) -> Trace:
        """The events of its session."""

    def close(self) -> None:
        """End the session."""


class SessionFacts(Protocol):
    """The state of a session for hidden states."""

    @property
    def chain(self) -> Chain:
        """The hops that it runs along."""

    @property
    def length(self) -> int:
        """Positions in the hops' caches."""

    @property
    def times(self) -> StepTimes | None:
        """The parts of the last step's time."""

    @property
    def trace(self) -> Trace:
        """The events of the session."""

    def close(self) -> None:
        """End the session; returns at once.

        Under asyncio and in blocking programs from any thread, also out of a `weakref.finalize`.
        """


class SessionLike(SessionFacts, Protocol):
    """A session for hidden states.  See `client.session.session.Session`."""

    async def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Run hidden states through the chain.  See `Session.step`."""

    async def prefill(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """Run any number of positions through the chain, in chunks.  See `Session.prefill`."""


class SyncSession(SessionFacts, Protocol):
    """`SessionLike`, blocking."""

    def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Run hidden states through the chain.  See `Session.step`."""

    def prefill(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """Run any number of positions through the chain, in chunks.  See `Session.prefill`."""


class SwarmFacts(Protocol):
    """The members of a handle that never wait, awaited or blocking."""

    @property
    def config(self) -> ClientConfig:
        """The settings of the client."""

    @property
    def info(self) -> ModelInfo:
        """The model."""

    @property
    def local_model(self) -> EmbedAndHead:
        """The model's embeddings, norm, head and tokenizer, on this machine: plain functions."""

    @property
    def ends(self) -> EmbedAndHead:
        """Another name of `local_model`."""

    @property
    def peer_id(self) -> PeerId:
        """The id by which the swarm's peers know this client."""

    def view(self) -> SwarmView:
        """See `Swarm.view`."""

    def settings(
        self,
        prompt: Any,  # Any: text, or token ids in any container
        options: GenerateOptions | None = None,
        *,
        conversation: Any = None,  # Any: what `conversation` of this swarm gave
        **arguments: Unpack[GenerateArguments],
    ) -> Settings:
        """See `Swarm.settings`."""

    def usual_length(self, batch: int = 1) -> int:
        """See `Swarm.usual_length`."""

    def conversation(
        self,
        max_length: int | None = None,
        *,
        adapter: AnyAdapter | None = None,
        trace: Trace | None = None,
        constraints: Constraints | None = None,
    ) -> ConversationLike:
        """See `Swarm.conversation`."""


class SwarmLike(SwarmFacts, Protocol):
    """A swarm that serves one model, seen from a client.  See `client.swarm.Swarm`."""

    async def changed(self, since: SwarmView) -> None:
        """See `Swarm.changed`."""

    async def rtts(self) -> dict[PeerId, float]:
        """See `Swarm.rtts`."""

    async def answers(self, peer: str) -> bool:
        """See `Swarm.answers`."""

    async def liveness(self) -> dict[PeerId, Liveness]:
        """See `Swarm.liveness`."""

    async def sessions(self) -> list[SessionStatus]:
        """See `Swarm.sessions`."""

    def events(self) -> AsyncGenerator[SwarmEvent, None]:
        """See `Swarm.events`.  A few events may wait for a slow consumer besides."""

    async def route(self) -> Chain:
        """See `Swarm.route`."""

    async def chains(self, max_chains: int) -> list[Chain]:
        """See `Swarm.chains`."""

    def generate(
        self,
        prompt: Any,  # Any: text, or token ids in any container
        options: GenerateOptions | None = None,
        *,
        conversation: Any = None,  # Any: what `conversation` of this swarm gave
        adapter: AnyAdapter | None = None,
        trace: Trace | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> AsyncGenerator[Token, None]:
        """See `Swarm.generate`.  A few tokens may wait for a slow consumer."""

    async def forward(
        self,
        hidden: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Tensor:
        """See `Swarm.forward`."""

    async def forward_kept(
        self,
        hidden: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> tuple[Tensor, KeptInputs]:
        """See `Swarm.forward_kept`."""

    async def backward(
        self,
        hidden: Tensor | KeptInputs,
        grad: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Swarm.backward`."""

    async def gradients(
        self,
        hidden: Tensor | KeptInputs,
        grad: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Gradients:
        """See `Swarm.gradients`."""

    def session(
        self,
        *,
        batch: int = 1,
        max_length: int | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> AbstractAsyncContextManager[SessionLike]:
        """See `Swarm.session`."""

    async def open_session(
        self,
        *,
        batch: int = 1,
        max_length: int | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> SessionLike:
        """See `Swarm.open_session`."""

    async def peer_info(self, peer: str) -> PeerInfo:
        """See `Swarm.peer_info`."""


class SyncSwarm(SwarmFacts, Protocol):
    """`SwarmLike`, blocking: from any thread, and from a notebook's.  Ctrl-C ends a wait.

    `close`, or the end of the `with`, leaves the swarm.
    """

    def changed(self, since: SwarmView) -> None:
        """See `Swarm.changed`."""

    def rtts(self) -> dict[PeerId, float]:
        """See `Swarm.rtts`."""

    def answers(self, peer: str) -> bool:
        """See `Swarm.answers`."""

    def liveness(self) -> dict[PeerId, Liveness]:
        """See `Swarm.liveness`."""

    def sessions(self) -> list[SessionStatus]:
        """See `Swarm.sessions`."""

    def events(self) -> Generator[SwarmEvent, None, None]:
        """See `Swarm.events`.  A few events may wait for a slow consumer besides."""

    def route(self) -> Chain:
        """See `Swarm.route`."""

    def chains(self, max_chains: int) -> list[Chain]:
        """See `Swarm.chains`."""

    def generate(
        self,
        prompt: Any,  # Any: text, or token ids in any container
        options: GenerateOptions | None = None,
        *,
        conversation: Any = None,  # Any: what `conversation` of this swarm gave
        adapter: AnyAdapter | None = None,
        trace: Trace | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> Generator[Token, None, None]:
        """See `Swarm.generate`.  Any end of the loop ends the session."""

    def forward(
        self,
        hidden: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Tensor:
        """See `Swarm.forward`."""

    def forward_kept(
        self,
        hidden: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> tuple[Tensor, KeptInputs]:
        """See `Swarm.forward_kept`."""

    def backward(
        self,
        hidden: Tensor | KeptInputs,
        grad: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Swarm.backward`."""

    def gradients(
        self,
        hidden: Tensor | KeptInputs,
        grad: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Gradients:
        """See `Swarm.gradients`."""

    def session(
        self,
        *,
        batch: int = 1,
        max_length: int | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> AbstractContextManager[SyncSession]:
        """See `Swarm.session`."""

    def open_session(
        self,
        *,
        batch: int = 1,
        max_length: int | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> SyncSession:
        """See `Swarm.open_session`."""

    def peer_info(self, peer: str) -> PeerInfo:
        """See `Swarm.peer_info`."""

    def run(self, function: Callable[[Any], Awaitable[T]]) -> T:  # Any: `client.swarm.Swarm`
        """The result of `await function(swarm)` in the swarm's event loop, with its trio handle."""

    def close(self) -> None:
        """Leave the swarm."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
