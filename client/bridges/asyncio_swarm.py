"""A swarm for an asyncio program: trio runs in a thread of its own, and each call crosses once.

    asyncio thread                               trio thread
    await swarm.route()     -- run_sync_soon -->  a task in the nursery of the calls
                        <-- call_soon_threadsafe --  its result or its exception
    swarm.generate(...)     -- run_sync_soon -->  a task that iterates `Swarm.generate`
                        <-- call_soon_threadsafe --  each token, through a queue of TOKENS_AHEAD

Whatever ends a call on the asyncio side (a cancellation, a closed generator, the end of the `async
with`) cancels its task on the trio side and waits until that has ended, so nothing is left behind.

The way across is made of the two calls that the loops have for it and of nothing else.  There and
back takes 120-180 us on two busy cores, under asyncio as under uvloop; through anyio's blocking
portal it was 2.5 times as long, and the queue would still have been ours to write.  A token on its
way back costs 25-40 us.

asyncio is named here alone; any loop will do, uvloop too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import trio

from node.runtime.nurseries import background_nursery

if TYPE_CHECKING:
    from torch import Tensor

    from client.config import ClientConfig
    from client.generation.conversation import Conversation
    from client.generation.generate import Token
    from client.generation.generation_config import Settings
    from client.generation.options import GenerateArguments, GenerateOptions
    from client.session.session import Session
    from client.session.steps import StepTimes
    from client.session.trace import Trace
    from client.swarm import Swarm
    from node.model.checkpoint.info import ModelInfo
    from node.model.embed_and_head import EmbedAndHead
    from routing.chains.hops import Chain
    from routing.view.view import SwarmView
    from tensor_codec.messages.contract import Reply
from client.bridges.trio_thread import TrioThread


@asynccontextmanager
async def open_bridge(
    config: ClientConfig,
    open_swarm: Callable[[ClientConfig], AbstractAsyncContextManager[Swarm]] | None = None,
) -> AsyncIterator[BridgedSwarm]:
    """The asyncio side of `connect`.  Raises what `open_swarm` raises: ConfigError.

    open_swarm: runs in the trio thread; by default `client.swarm.open_swarm`.
    Leaving takes LEAVE_SECONDS and END_SECONDS at the most.
    """
    if open_swarm is None:
        from client.swarm import open_swarm as open_real_swarm

        open_swarm = open_real_swarm
    thread: TrioThread[BridgedSwarm] = TrioThread()
    swarm = await thread.enter(partial(_open_bridged, open_swarm(config), thread))
    try:
        yield swarm
    finally:
        await thread.leave()


@asynccontextmanager
async def _open_bridged(
    opened: AbstractAsyncContextManager[Swarm], thread: TrioThread[BridgedSwarm]
) -> AsyncIterator[BridgedSwarm]:
    async with opened as swarm, background_nursery() as nursery:
        bridged = BridgedSwarm(swarm, thread)
        nursery.start_soon(bridged._follow_view)
        yield bridged


class BridgedSwarm:
    """A swarm that runs in a trio thread.  Made by `open_bridge`.

    Each method does what that of `client.swarm.Swarm` does, and raises the same.  A call that
    the end of the `async with` overtakes, or that comes after it, raises RuntimeError.
    """

    def __init__(self, swarm: Swarm, thread: TrioThread[BridgedSwarm]) -> None:
        self._swarm = swarm
        self._thread = thread
        self._view = swarm.view()

    @property
    def config(self) -> ClientConfig:
        """How the swarm was joined."""
        return self._swarm.config

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._swarm.info

    @property
    def local_model(self) -> EmbedAndHead:
        """The model's embeddings, head and tokenizer: plain functions, to be called from here."""
        return self._swarm.local_model

    @property
    def ends(self) -> EmbedAndHead:
        """Another name of `local_model`."""
        return self._swarm.local_model

    def view(self) -> SwarmView:
        """See `Swarm.view`."""
        return self._view

    async def changed(self, since: SwarmView) -> None:
        """See `Swarm.changed`."""

        async def changed() -> None:
            await self._swarm.changed(since)
            self._view = self._swarm.view()

        await self._thread.call(changed)

    async def route(self) -> Chain:
        """See `Swarm.route`."""
        return await self._thread.call(self._swarm.route)

    async def chains(self, most: int) -> list[Chain]:
        """See `Swarm.chains`."""
        return await self._thread.call(partial(self._swarm.chains, most))

    def generate(
        self,
        prompt: Any,  # Any: text, or token ids in whatever holds them
        options: GenerateOptions | None = None,
        *,
        conversation: BridgedConversation | None = None,
        trace: Trace | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> AsyncGenerator[Token, None]:
        """See `Swarm.generate`.  At most TOKENS_AHEAD tokens wait for a consumer that is slow."""
        # The call itself only checks and tokenizes; what needs trio begins with the first token.
        inner = conversation._conversation if conversation is not None else None
        return self._thread.iterate(
            self._swarm.generate(prompt, options, conversation=inner, trace=trace, **arguments)
        )

    def settings(
        self,
        prompt: Any,  # Any: text, or token ids in whatever holds them
        options: GenerateOptions | None = None,
        *,
        conversation: BridgedConversation | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> Settings:
        """See `Swarm.settings`."""
        inner = conversation._conversation if conversation is not None else None
        return self._swarm.settings(prompt, options, conversation=inner, **arguments)

    def usual_length(self, batch: int = 1) -> int:
        """See `Swarm.usual_length`."""
        return self._swarm.usual_length(batch)

    def conversation(
        self, max_length: int | None = None, *, trace: Trace | None = None
    ) -> BridgedConversation:
        """See `Swarm.conversation`."""
        return BridgedConversation(self._swarm.conversation(max_length, trace=trace), self._thread)

    async def forward(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Swarm.forward`."""
        return await self._thread.call(partial(self._swarm.forward, hidden, start=start, stop=stop))

    async def backward(
        self, hidden: Tensor, grad: Tensor, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """See `Swarm.backward`."""
        return await self._thread.call(partial(self._swarm.backward, hidden, grad, start=start, stop=stop))

    @asynccontextmanager
    async def session(
        self, *, batch: int = 1, max_length: int | None = None
    ) -> AsyncIterator[BridgedSession]:
        """See `Swarm.session`."""

        async def held() -> AsyncGenerator[Session, None]:
            async with self._swarm.session(batch=batch, max_length=max_length) as session:
                yield session
                await trio.sleep_forever()

        async with aclosing(self._thread.iterate(held())) as sessions:
            yield BridgedSession(await anext(sessions), self._thread)

    async def _follow_view(self) -> None:
        """Runs in trio: keep the view where `view` can take it without crossing."""
        while True:
            self._view = self._swarm.view()
            await self._swarm.changed(self._view)


class BridgedConversation:
    """For `generate(conversation=...)`.  Made by `BridgedSwarm.conversation`."""

    def __init__(self, conversation: Conversation, thread: TrioThread[BridgedSwarm]) -> None:
        self._conversation = conversation
        self._thread = thread

    @property
    def trace(self) -> Trace:
        """What happened to its session."""
        return self._conversation.trace

    def close(self) -> None:
        """End the session; returns at once."""
        self._thread.soon(self._conversation.close)


class BridgedSession:
    """A session for hidden states.  Made by `BridgedSwarm.session`."""

    def __init__(self, session: Session, thread: TrioThread[BridgedSwarm]) -> None:
        self._session = session
        self._thread = thread

    @property
    def chain(self) -> Chain:
        """The hops that it runs along."""
        return self._session.chain

    @property
    def length(self) -> int:
        """Positions in the hops' caches."""
        return self._session.length

    @property
    def times(self) -> StepTimes | None:
        """Where the time of the last step went."""
        return self._session.times

    @property
    def trace(self) -> Trace:
        """What happened to it."""
        return self._session.trace

    async def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """See `Session.step`."""
        step = partial(self._session.step, hidden, position, reply, seconds=seconds, rope_length=rope_length)
        return await self._thread.call(step)
