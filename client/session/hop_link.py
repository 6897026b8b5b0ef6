"""The client's stream to one hop of a session: steps and orders go out, answers come in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from client.adapters.upload import AdapterUse
from client.chains.chooser import PeerStream
from client.chains.shared_streams import Membership
from client.session.hop_state import HopState
from client.session.repair.ways import Ways
from tensor_codec.errors import NoAdapter, PeerFault, PeerGone, Refused, RemoteProtocolError, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.attach import Attach, decode_attach_reply, encode_attach
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import (
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

ATTACH_SECONDS = 2.0  # for a hop's answer on another stream, without the dial


@dataclass(slots=True, eq=False)
class HopLink:
    """The streams to one hop, as long as the session uses it.

    state: of the hop.  scope: of the task that reads the stream.
    moves: another stream may take the place of this one.
    shared: with other sessions, to the same peer.
    """

    state: HopState
    stream: PeerStream
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    moves: bool = False
    _reading: trio.CancelScope = field(default_factory=trio.CancelScope)
    _attached: trio.Event = field(default_factory=trio.Event)
    _relinked: Relinked | None = None
    _answered: trio.Event = field(default_factory=trio.Event)
    _bulk: PeerStream | None = None
    shared: Membership | None = None

    async def open(self, opened: Open, limits: Limits) -> None:
        """Open the session at the hop.  Raises PeerFault, Refused."""
        await self.stream.send(encode_open(opened))
        # The hop waits for free cache, and dials its successor, before it answers.
        frame = await self.stream.receive(limits.cache_wait_seconds + limits.successor_seconds + 1.0)
        if frame is None:
            raise RemoteProtocolError(f"{self.state.hop.peer} closed the stream instead of answering")
        reply = decode_open_reply(frame)
        if isinstance(reply, Failed):
            raise reply.error()
        self.state.opened(reply)
        self.moves = reply.moves

    async def receive(
        self, is_saved: Callable[[PeerFault], bool], taker: Callable[[Buffer], bool] | None = None
    ) -> Buffer:
        """The next frame, of whichever stream is in use.  Raises PeerFault.

        taker: see `FramedStream.receive`.
        is_saved: called with the fault of the present stream; whether another one will take its place.
        """
        while True:
            stream = self.stream
            fault: PeerFault = PeerGone(f"{self.state.hop.peer} ended the session")
            with trio.CancelScope() as self._reading:
                try:
                    frame = await stream.receive(taker=taker)
                    if frame is not None and stream is self.stream:
                        return frame
                except PeerFault as error:
                    fault = error
            if stream is self.stream:
                attached = self._attached
                if not is_saved(fault):
                    raise fault
                await attached.wait()

    async def attach(self, stream: PeerStream, session: bytes) -> None:
        """Have the hop go on with the session over this stream.

        Raises PeerFault, Refused; then the stream before stays in use, and this one is closed.
        """
        try:
            await stream.send(encode_attach(Attach(session)))
            if (frame := await stream.receive(ATTACH_SECONDS)) is None:
                raise PeerGone(f"{self.state.hop.peer} closed the stream instead of answering")
            if (failed := decode_attach_reply(frame)) is not None:
                raise failed.error()
        except BaseException:
            await stream.reset()
            raise
        before, self.stream = self.stream, stream
        attached, self._attached = self._attached, trio.Event()
        attached.set()
        self._reading.cancel()
        await before.reset()

    async def relink(self, order: Relink, seconds: float) -> None:
        """Give the hop its new neighbours, and wait for its position.  Raises PeerFault."""
        peer = self.state.hop.peer
        if self.shared is not None:
            self.shared.end_use()
        await self.stream.send(encode_relink(order))
        with trio.move_on_after(seconds):
            while self._relinked is None or self._relinked.epoch != order.epoch:
                self._answered = trio.Event()
                await self._answered.wait()
            if self._relinked.codec != order.codec:
                raise RemoteProtocolError(f"{peer} cannot go on in codec {order.codec}")
            self.state.relinked(self._relinked, order.codec or self.state.codec)
            return
        raise SlowPeer(f"{peer} did not take its new route within {seconds:g} s")

    def take_relinked(self, message: Relinked) -> None:
        """The hop has answered a Relink."""
        self._relinked = message
        self._answered.set()

    async def ask(self) -> None:
        """Ask the hop for its progress, unless a question is open.  Raises PeerFault."""
        if self.state.asked_at is None:
            self.state.ask(trio.current_time())
            await self.stream.send(encode_where())

    async def send(self, parts: list[Buffer]) -> None:
        """Send one frame.  Raises PeerFault."""
        await self.stream.send(parts)

    def share(self, member: Membership) -> None:
        """Steps may go over a stream that sessions share."""
        self.shared = member

    async def send_step(self, step: Step, seconds: float, *, alone: bool = False) -> None:
        """Send a step, over the bulk stream if there is one, within `seconds`.

        alone: no other step of the session is on its way.  Raises PeerFault.
        """
        if self._bulk is None and self.shared is not None and self.shared.takes(step, alone=alone):
            self.shared.put(step)
        elif self._bulk is None:
            await self.stream.send(encode_step(step))
        else:
            await self._bulk.send(encode_step(step), seconds)

    async def begin_bulk(self, open_push: Callable[[], Awaitable[PeerStream]]) -> None:
        """From here on steps go over a stream of their own; the hop reads it at the speed of its computing.

        Raises PeerFault.
        """
        await self.end_bulk()
        self._bulk = await open_push()

    async def end_bulk(self) -> None:
        """Steps go over the session's stream again.  Bounded by a second."""
        stream, self._bulk = self._bulk, None
        if stream is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await stream.aclose()

    async def say_goodbye(self) -> None:
        """Tell the hop that the session is over and close the streams.  Bounded by a second."""
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await self.end_bulk()
            try:
                await self.stream.send(encode_close())
                await self.stream.aclose()
            except PeerFault:
                await self.stream.reset()


async def move(
    link: HopLink, ways: Ways, open_stream: Callable[[], Awaitable[PeerStream]], session: bytes
) -> None:
    """Give a hop another stream, where it wants one.  Raises PeerFault, Refused where it has none then."""
    try:
        stream = await open_stream()
        await link.attach(stream, session)
    except (PeerFault, Refused):
        if not ways.stays(link.state):
            raise
    else:
        ways.moved(link.state)


async def open_link(
    state: HopState,
    open_stream: Callable[[], Awaitable[PeerStream]],
    opened: Open,
    adapter: AdapterUse | None,
    limits: Limits,
) -> HopLink:
    """Open the session at a hop, which gets the session's adapter first.  Raises PeerFault, Refused."""
    again = adapter is not None
    while True:
        if adapter is not None:
            await adapter.bring(state.hop.peer, opened.spec)
        link = HopLink(state, await open_stream())
        try:
            await link.open(opened, limits)
            return link
        except NoAdapter:  # it had the adapter, as far as was known here
            await link.say_goodbye()
            if not (again and adapter is not None and adapter.forget(state.hop.peer)):
                raise
            again = False
        except BaseException:
            await link.say_goodbye()
            raise
