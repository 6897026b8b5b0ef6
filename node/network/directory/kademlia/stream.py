"""Messages of a Kademlia stream: a varint length, then the message."""

from __future__ import annotations

from typing import Protocol

import trio

from node.network.directory.kademlia.messages import Message, decode, encode, encode_varint, read_varint
from routing.names import PeerId
from tensor_codec.errors import FrameError, PeerGone, SlowPeer


class ByteStream(Protocol):
    """The part of `node.network.transport.connection.MuxedStream` that messages need."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """The next bytes; b"" at the end."""

    async def send_all(self, data: bytes) -> None:
        """Send, waiting as long as it takes."""

    async def aclose(self) -> None:
        """End our side, and discard the peer's further bytes."""

    def reset_now(self) -> None:
        """End both sides at once."""


class MessageStream:
    """Whole messages to and from one peer, each within a deadline.

    most: bytes of a message.  At most these, and the rest of one read of as many, are held.
    """

    def __init__(self, stream: ByteStream, peer: PeerId, most: int) -> None:
        self._stream = stream
        self._peer = peer
        self._most = most
        self._buffer = bytearray()

    async def send(self, message: Message, seconds: float) -> None:
        """Send one message.  Raises SlowPeer, PeerGone."""
        data = encode(message)
        with trio.move_on_after(seconds):
            try:
                await self._stream.send_all(encode_varint(len(data)) + data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise PeerGone(str(error)) from error
            return
        raise SlowPeer(f"{self._peer} did not take {len(data)} bytes within {seconds:g} s")

    async def receive(self, seconds: float) -> Message | None:
        """The next message, None at a clean end.  Raises SlowPeer, PeerGone, FrameError, MessageError."""
        with trio.move_on_after(seconds):
            while (data := self._take()) is None:
                try:
                    more = await self._stream.receive_some(self._most)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise PeerGone(str(error)) from error
                if not more:
                    if self._buffer:
                        raise FrameError("the stream ended in the middle of a message")
                    return None
                self._buffer += more
            return decode(data)
        raise SlowPeer(f"no whole message from {self._peer} within {seconds:g} s")

    def _take(self) -> bytes | None:
        found = read_varint(self._buffer, 0)
        if found is None:
            return None
        size, at = found
        if size > self._most:
            raise FrameError(f"a message of {size} bytes was announced, {self._most} are allowed")
        if len(self._buffer) < at + size:
            return None
        data = bytes(self._buffer[at : at + size])
        del self._buffer[: at + size]
        return data
