"""A swarm for the tests of bridges: the methods of `client.swarm.Swarm`, in trio, over nothing."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.lowlevel

from client.config import ClientConfig
from routing.chains.hops import NoChain
from tensor_codec.blocks import Blocks
from tensor_codec.errors import CacheFull, PeerGone

CONFIG = ClientConfig(peers=("/ip4/127.0.0.1/tcp/1/p2p/nobody",))
SOON = 10.0  # seconds that nothing here should come near


def hidden(number: int) -> Any:  # Any: a session takes tensors, this one numbers
    """A stand-in for hidden states."""
    return number


def event_that_is_set() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@dataclass
class FakeSession:
    length: int = 0
    chain: str = "chain"
    times: None = None
    closed: threading.Event = field(default_factory=threading.Event)

    async def step(
        self,
        hidden: int,
        position: int | None = None,
        reply: str = "all",
        *,
        seconds: float | None = None,
        rows: Sequence[int] | None = None,
        rope_length: int | None = None,
    ) -> int:
        assert trio.lowlevel.in_trio_run()
        await trio.lowlevel.checkpoint()
        if hidden < 0:
            raise PeerGone("a hop has gone")
        self.length = (self.length if position is None else position) + hidden
        return hidden * 2

    async def prefill(
        self,
        hidden: int,
        position: int | None = None,
        reply: str = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> int:
        return await self.step(hidden, position, reply, seconds=seconds, rope_length=rope_length)

    def close(self) -> None:
        assert trio.lowlevel.in_trio_run()
        self.closed.set()


@dataclass
class FakeConversation:
    max_length: int
    tokens: list[int] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        assert trio.lowlevel.in_trio_run()
        self.closed.set()


@dataclass
class FakeSwarm:
    """Swarm's methods, in trio; counts generations, tokens and sessions."""

    config: ClientConfig = CONFIG
    info: str = "info"
    local_model: str = "local model"
    generating: int = 0
    made: int = 0  # tokens
    sessions: int = 0
    opened: list[FakeSession] = field(default_factory=list)
    opening: trio.Event = field(default_factory=event_that_is_set)
    stubborn: bool = False  # a session comes up although its caller has gone
    seen: object = field(default_factory=object)
    news: trio.Event = field(default_factory=trio.Event)
    nursery: trio.Nursery | None = None
    open: bool = True

    @property
    def last_view(self):
        return self.seen

    async def changed(self, since):
        while self.seen is since:
            await self.news.wait()

    def change(self) -> None:
        self.seen, self.news, news = object(), trio.Event(), self.news
        news.set()

    async def route(self):
        await trio.lowlevel.checkpoint()
        raise NoChain([Blocks(3, 4)], 30, alone=False)

    def generate(self, prompt, options=None, *, max_new_tokens=None, conversation=None, trace=None):
        max_new_tokens = 64 if max_new_tokens is None else max_new_tokens
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens is 0, at least 1 is needed")
        return self._tokens(prompt, max_new_tokens, conversation)

    async def _tokens(self, prompt, count, conversation):
        self.generating += 1
        try:
            for index in range(count):
                await trio.lowlevel.checkpoint()
                if prompt == "hang" and index == 2:
                    await trio.sleep_forever()
                if prompt == "refuse" and index == 2:
                    raise CacheFull("no room", 3.0)
                self.made += 1
                if conversation is not None:
                    conversation.tokens.append(index)
                yield f"{prompt}{index}"
        finally:
            self.generating -= 1

    def conversation(self, max_length=2048, *, trace=None):
        return FakeConversation(max_length)

    async def forward(self, hidden, *, start=0, stop=None):
        assert trio.lowlevel.in_trio_run()
        await trio.lowlevel.checkpoint()
        if hidden < 0:
            raise PeerGone("a server has gone")
        return ("forward", hidden, start, stop)

    async def forward_kept(self, hidden, *, start=0, stop=None, prompts=None):
        assert trio.lowlevel.in_trio_run()
        await trio.lowlevel.checkpoint()
        return ("forward", hidden, start, stop), ("kept", hidden, prompts)

    async def backward(self, hidden, grad, *, start=0, stop=None):
        assert trio.lowlevel.in_trio_run()
        await trio.lowlevel.checkpoint()
        return ("backward", hidden, grad, start, stop)

    async def open_session(self, *, batch=1, max_length=None, start=0, stop=None):
        assert trio.lowlevel.in_trio_run()
        with trio.CancelScope(shield=self.stubborn):
            await self.opening.wait()
        if max_length is not None and max_length > 2048:
            raise ValueError("too long")
        self.opened.append(FakeSession(chain=f"{start}:{stop}"))
        return self.opened[-1]

    async def peer_info(self, peer):
        assert trio.lowlevel.in_trio_run()
        await trio.lowlevel.checkpoint()
        return ("info", peer)

    @asynccontextmanager
    async def session(self, *, batch=1, max_length=None, start=0, stop=None):
        if max_length is not None and max_length > 2048:
            raise ValueError("too long")
        self.sessions += 1
        try:
            yield FakeSession()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
                self.sessions -= 1


def opener(swarm: FakeSwarm) -> Callable:
    @asynccontextmanager
    async def open_fake(config: ClientConfig) -> AsyncIterator[FakeSwarm]:
        async with trio.open_nursery() as nursery:
            swarm.nursery = nursery
            try:
                yield swarm
            finally:
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.checkpoint()
                    swarm.open = False
                nursery.cancel_scope.cancel()

    return open_fake
