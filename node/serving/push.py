"""Streams to the next hops, one a peer, shared by the sessions that push there.

A stream costs two round trips to open, so it is opened with the first session that needs it and
closed with the last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from routing.names import PeerId
from tensor_codec.errors import PeerFault
from tensor_codec.frame import Buffer


class Sender(Protocol):
    """What a link needs of a framed stream."""

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """Send one frame; raises SlowPeer or PeerGone."""

    async def aclose(self) -> None:
        """Close it."""


@dataclass(slots=True)
class PushLink:
    """A stream to one next hop, opened again once when it turns out to be dead."""

    peer: PeerId
    _open: Callable[[PeerId], Awaitable[Sender]]
    _stream: Sender | None = None
    _lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0

    async def connect(self) -> None:
        """Open the stream if it is not open.  Raises PeerGone, SlowPeer."""
        async with self._lock:
            if self._stream is None:
                self._stream = await self._open(self.peer)

    async def send(self, parts: list[Buffer]) -> None:
        """Send one frame.  Raises PeerGone, SlowPeer.

        A frame that a dying stream may have delivered goes out again on the new one: the step
        number makes that harmless.
        """
        stream = self._stream
        if stream is not None:
            try:
                await stream.send(parts)
                return
            except PeerFault:
                if self._stream is stream:
                    self._stream = None
                    with trio.move_on_after(1):
                        await stream.aclose()
        await self.connect()
        if self._stream is not None:
            await self._stream.send(parts)

    async def aclose(self) -> None:
        """Close the stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()


@dataclass(slots=True)
class PushLinks:
    """All links of a node.  open_stream: dials a peer of our own view, with a deadline."""

    open_stream: Callable[[PeerId], Awaitable[Sender]]
    _links: dict[PeerId, PushLink] = field(default_factory=dict)

    @asynccontextmanager
    async def use(self, peer: PeerId) -> AsyncIterator[PushLink]:
        """The connected link to `peer`, for the time of a session.  Raises PeerGone, SlowPeer."""
        link = self._links.setdefault(peer, PushLink(peer, self.open_stream))
        link.users += 1
        try:
            await link.connect()
            yield link
        finally:
            link.users -= 1
            if not link.users:
                del self._links[peer]
                with trio.CancelScope(shield=True), trio.move_on_after(1):
                    await link.aclose()
