"""Streams to the next hops.

Single tokens of all sessions that push to a peer share one stream.  A long prompt or replay (`Step.bulk`) has
a stream of its session alone while it lasts, so that no token waits after another session's prompt.  The
muxer then divides the connection among streams, and a slow receiver holds back that session alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.serving.sessions.together.outbox import Outbox
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

# Bulk streams: always well below the streams that a peer allows us to open (`Limits`).
BULK_OPENS_PER_SECOND = 8.0
BULK_OPENS_BURST = 24
MAX_BULK_STREAMS = 24
MAX_ASIDE_STREAMS = 12  # of them for standbys
CLIENTS_KEPT = 1024  # whose dials are counted
DRAIN_SECONDS = 2.0  # in which a next hop reads the single tokens that are under way


class Sender(Protocol):
    """The part of a framed stream that a link needs."""

    async def send(self, frame: Buffer | Sequence[Buffer], seconds: float | None = None) -> None:
        """Send one frame, to be taken within `seconds`; raises SlowPeer or PeerGone."""

    def send_now(self, frame: Buffer | Sequence[Buffer]) -> bool:
        """Send one frame where that needs no waiting; False where nothing was done."""

    async def aclose(self) -> None:
        """Close it."""

    @property
    def batches(self) -> bool:
        """Whether the peer takes frames of many sessions, as its record says."""

    @property
    def relayed(self) -> bool:
        """Whether it runs through a relay."""

    @property
    def has_better_way(self) -> bool:
        """Whether it runs through a relay, and a direct connection to the peer is there."""

    async def send_eof(self) -> None:
        """End this side; the peer closes its own once it has read everything.  Raises PeerGone."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """None at the end of the peer's side.  Raises PeerFault."""


@dataclass(slots=True)
class PushLink:
    """The streams to one next hop.  The shared stream, once found dead, is opened again once."""

    peer: PeerId
    _open: Callable[[PeerId], Awaitable[Sender]]
    users: int = 0
    _stream: Sender | None = None
    _lock: trio.Lock = field(default_factory=trio.Lock)
    _bulk_streams: int = 0
    _may_open: float = BULK_OPENS_BURST  # a token bucket
    _filled_at: float = 0.0

    async def connect(self) -> None:
        """Open the shared stream if it is not open.  Raises PeerGone, SlowPeer."""
        async with self._lock:
            if self._stream is None:
                self._stream = await self._open(self.peer)

    async def send(self, parts: list[Buffer]) -> None:
        """Send one frame on the shared stream.  Raises PeerGone, SlowPeer.

        A dying stream may have delivered the frame that goes out again on the new one: the step number
        makes that harmless.
        """
        stream = self._stream
        if stream is not None and stream.relayed and stream.has_better_way:
            stream = await self._move_over()
        if stream is not None:
            try:
                await stream.send(parts)
                return
            except PeerFault:
                await self._forget(stream)
        await self.connect()
        stream = self._stream
        if stream is None:
            raise PeerGone(f"the stream to {self.peer} was closed")
        try:
            await stream.send(parts)
        except PeerFault:
            await self._forget(stream)
            raise

    @property
    def batches(self) -> bool:
        """Whether the peer takes frames of many sessions."""
        return self._stream is not None and self._stream.batches

    def send_now(self, parts: list[Buffer]) -> bool:
        """Send one frame on the shared stream where that needs no waiting; False where nothing was done."""
        stream = self._stream
        if stream is None or (stream.relayed and stream.has_better_way):
            return False
        return stream.send_now(parts)

    async def _move_over(self) -> Sender:
        """Change to a stream over the direct connection, where no frame overtakes earlier ones.

        The peer closes its side of the old stream once it has read everything there.  Raises PeerFault.
        """
        async with self._lock:
            stream = self._stream
            if stream is not None and stream.has_better_way:
                self._stream = None
                with suppress(PeerFault):
                    await stream.send_eof()
                    await stream.receive(DRAIN_SECONDS)
                await _close(stream)
            if self._stream is None:
                self._stream = await self._open(self.peer)
            return self._stream

    async def open_bulk(self, most: int = MAX_BULK_STREAMS) -> Sender | None:
        """A stream for one session alone, to be closed by `close_bulk`; None where `most` are open.

        Raises PeerGone, SlowPeer.
        """
        now = trio.current_time()
        refilled = self._may_open + (now - self._filled_at) * BULK_OPENS_PER_SECOND
        self._may_open, self._filled_at = min(BULK_OPENS_BURST, refilled), now
        if self._bulk_streams >= most or self._may_open < 1:
            return None
        self._may_open -= 1
        self._bulk_streams += 1
        try:
            return await self._open(self.peer)
        except BaseException:
            self._bulk_streams -= 1
            raise

    async def close_bulk(self, stream: Sender) -> None:
        """Close a stream of `open_bulk`.  Bounded."""
        self._bulk_streams -= 1
        await _close(stream)

    async def aclose(self) -> None:
        """Close the shared stream.  Bounded."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await _close(stream)

    async def _forget(self, stream: Sender) -> None:
        if self._stream is stream:
            self._stream = None
            await _close(stream)


async def _close(stream: Sender) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        await stream.aclose()


@dataclass(slots=True)
class PushLinks:
    """All links of a node.

    open_stream: dials a peer of our own view, with a deadline.
    outbox: of the outputs of a batch.
    dials_per_second, dials_burst: of links that one client asks for and that are not there.
    """

    open_stream: Callable[[PeerId], Awaitable[Sender]]
    dials_per_second: float = Limits().successor_dials_per_client_per_second
    dials_burst: int = Limits().successor_dials_per_client_burst
    outbox: Outbox = field(default_factory=Outbox)
    _links: dict[PeerId, PushLink] = field(default_factory=dict)
    _asked: OrderedDict[str, TokenBucket] = field(default_factory=OrderedDict)

    async def acquire(self, peer: PeerId, client: str) -> PushLink:
        """The connected link to `peer`, until `release`.  client: asks for it.  Raises PeerGone, SlowPeer."""
        if peer not in self._links:
            self._take_a_dial(client)
        link = self._links.setdefault(peer, PushLink(peer, self.open_stream))
        link.users += 1
        try:
            await link.connect()
        except BaseException:
            await self.release(link)
            raise
        return link

    def _take_a_dial(self, client: str) -> None:
        """Count a dial against the client's budget.  Raises PeerGone where none is left."""
        now = trio.current_time()
        if client not in self._asked:
            self._asked[client] = TokenBucket.full(self.dials_per_second, self.dials_burst, now)
        self._asked.move_to_end(client)
        while len(self._asked) > CLIENTS_KEPT:
            self._asked.popitem(last=False)
        if not self._asked[client].try_take(1, now):
            raise PeerGone(f"a client asks for more than {self.dials_per_second:g} new hops per second")

    async def release(self, link: PushLink) -> None:
        """End one session's use of the link; the last one closes it.  Bounded."""
        link.users -= 1
        if not link.users:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            await link.aclose()


@dataclass(slots=True)
class Outlet:
    """The way of one session's outputs to a next hop, where it has one.

    bulk_seconds: time in which the next hop must read a frame of a long prompt or replay; it reads no faster
    than it computes.
    client: the peer that names the next hops, or the network prefix that it shares with others.
    feeding: of a standby of the next hop.
    """

    links: PushLinks
    bulk_seconds: float
    client: str = ""
    link: PushLink | None = None
    feeding: trio.CancelScope | None = None
    _bulk: Sender | None = None

    @property
    def peer(self) -> PeerId | None:
        """The next hop, where there is a link to it."""
        return self.link.peer if self.link is not None else None

    async def connect(self, peer: PeerId | None) -> None:
        """Have a link to `peer` alone, or none.  Raises PeerGone, SlowPeer; there is no link then."""
        if self.peer == peer:
            return await self.end_bulk()
        await self.aclose()
        if peer is not None:
            self.link = await self.links.acquire(peer, self.client)

    async def send(self, parts: list[Buffer], *, bulk: bool) -> None:
        """Send one frame.  Raises PeerGone, SlowPeer.

        bulk: on a stream of the session's own.  A session changes between the two streams only after all of
        its frames were taken, so they stay in order; a client that breaks this rule breaks its own session.
        """
        assert self.link is not None
        if bulk and self._bulk is None:
            self._bulk = await self.link.open_bulk()
        elif not bulk and self._bulk is not None:
            await self.end_bulk()
        if self._bulk is not None:
            await self._bulk.send(parts, self.bulk_seconds)
        else:
            await self.link.send(parts)

    def follow(self, feeding: trio.CancelScope | None) -> None:
        """A standby of the next hop is fed within this scope, in place of another one; None: none is."""
        if self.feeding is not None:
            self.feeding.cancel()
        self.feeding = feeding

    async def begin_aside(self) -> bool:
        """Have a stream of the session's own for a standby; False where none is to be had now.

        Raises PeerGone, SlowPeer.
        """
        assert self.link is not None
        self._bulk = await self.link.open_bulk(MAX_ASIDE_STREAMS)
        return self._bulk is not None

    @property
    def shared(self) -> PushLink | None:
        """The link, where outputs go over the stream that all sessions share."""
        return self.link if self._bulk is None else None

    async def end_bulk(self) -> None:
        """Close the session's own stream, if there is one.  Bounded."""
        stream, self._bulk = self._bulk, None
        if stream is not None and self.link is not None:
            await self.link.close_bulk(stream)

    async def aclose(self) -> None:
        """Leave the link.  Bounded."""
        await self.end_bulk()
        link, self.link = self.link, None
        if link is not None:
            await self.links.release(link)
