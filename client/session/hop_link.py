"""The client's end of one hop of a session: a stream for steps, orders and answers, and what it says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from client.session.replay_plan import Standing
from node.network.streams import FramedStream
from routing.chains.hops import Hop
from tensor_codec.errors import PeerFault, Refused, RemoteProtocolError, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import (
    Here,
    Open,
    Relink,
    Relinked,
    Step,
    decode_open_reply,
    encode_close,
    encode_open,
    encode_relink,
    encode_step,
    encode_where,
)


@dataclass(slots=True, eq=False)
class HopLink:
    """One hop of a session, as long as its stream lives.

    standing: as last heard, when the route changed.  push: it reaches its successor.
    relay: the client carries its outputs on.  fed: the client sends its inputs.
    dtype: what it computes in.  codec: how hidden states travel to and from it.
    error: why it is of no use any more.  leaving: it goes on for a while.  refused: it could not take a
    step, and may be able to later.
    """

    hop: Hop
    stream: FramedStream
    dtype: str
    codec: str
    standing: Standing = field(default_factory=Standing)
    queue: float = 0.0  # how long steps waited there when the session was opened: see Opened
    push: bool = False
    relay: bool = False
    fed: bool = False
    leaving: bool = False
    refused: bool = False
    error: PeerFault | Refused | None = None
    blamed: bool = False
    here: Here | None = None
    asked_at: float | None = None  # when Where was sent and not answered yet; trio's clock
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _relinked: Relinked | None = None
    _said: trio.Event = field(default_factory=trio.Event)
    _bulk: FramedStream | None = None

    @property
    def alive(self) -> bool:
        """Whether its session goes on there, as far as is known."""
        return self.error is None and not self.scope.cancel_called

    @property
    def avoided(self) -> bool:
        """Whether another peer is to be preferred."""
        return self.leaving or self.refused or self.blamed

    @property
    def has_bulk(self) -> bool:
        """Whether steps go over the stream for bulk now."""
        return self._bulk is not None

    async def open(self, opened: Open, limits: Limits) -> None:
        """Open the session here.  Raises PeerFault, Refused."""
        await self.stream.send(encode_open(opened))
        # The hop waits for room, and dials its successor, before it answers.
        frame = await self.stream.receive(limits.cache_wait_seconds + limits.successor_seconds + 1.0)
        if frame is None:
            raise RemoteProtocolError(f"{self.hop.peer} closed the stream instead of answering")
        reply = decode_open_reply(frame)
        if isinstance(reply, Failed):
            raise reply.error()
        self.push, self.standing, self.queue = reply.push, Standing(cut=reply.cut), reply.queue

    async def relink(self, order: Relink, seconds: float) -> None:
        """Give the hop its new neighbours, and hear where it stands.  Raises PeerFault."""
        await self.send(encode_relink(order))
        with trio.move_on_after(seconds):
            said = await self._answer_to(order)
            if said.codec != order.codec:
                raise RemoteProtocolError(f"{self.hop.peer} cannot go on in codec {order.codec}")
            self.codec = order.codec or self.codec
            self.push = said.push
            self.standing = Standing(said.length, said.kept, said.step, said.cut)
            return
        raise SlowPeer(f"{self.hop.peer} did not take its new route within {seconds:g} s")

    async def _answer_to(self, order: Relink) -> Relinked:
        while self.error is None:
            if self._relinked is not None and self._relinked.epoch == order.epoch:
                return self._relinked
            self._said = trio.Event()
            await self._said.wait()
        raise self.error

    def heard(self, message: Relinked | Here) -> None:
        """Take in an answer."""
        if isinstance(message, Here):
            self.here, self.asked_at = message, None
        else:
            self._relinked = message
            self._said.set()

    async def ask(self) -> None:
        """Ask how far it is, unless it has been asked.  Raises PeerFault."""
        if self.asked_at is None:
            self.asked_at = trio.current_time()
            await self.send(encode_where())

    async def send(self, parts: list[Buffer]) -> None:
        """Send one frame.  Raises PeerFault."""
        await self.stream.send(parts)

    async def send_step(self, step: Step, seconds: float) -> None:
        """Send a step, over the bulk stream where there is one, which takes it within `seconds`.

        Raises PeerFault.
        """
        stream = self._bulk
        if stream is None:
            return await self.send(encode_step(step))
        await stream.send(encode_step(step), seconds)

    async def begin_bulk(self, open_push: Callable[[], Awaitable[FramedStream]]) -> None:
        """From here on steps go over a stream of their own, which the hop reads as it computes.

        Raises PeerFault.
        """
        await self.end_bulk()
        self._bulk = await open_push()

    async def end_bulk(self) -> None:
        """Steps go over the session's stream again.  Bounded."""
        stream, self._bulk = self._bulk, None
        if stream is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await stream.aclose()

    def fail(self, error: PeerFault | Refused, *, blame: bool = True) -> None:
        """It is of no use any more; the first reason stands.  blame: the peer is not to be tried at once."""
        if self.error is None:
            self.blamed = blame
            if error.peer is None:
                error.peer = self.hop.peer
            self.error = error
        self._said.set()

    async def say_goodbye(self) -> None:
        """Tell the hop that the session is over and close the streams.  Bounded by a second."""
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await self.end_bulk()
            try:
                await self.stream.send(encode_close())
                await self.stream.aclose()
            except PeerFault:
                await self.stream.reset()
