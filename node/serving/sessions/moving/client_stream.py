"""The stream to a session's client, where another stream of the same client may take its place.

A session that began over a circuit moves over to a direct connection, and to another circuit where its way
dies.  Its cache and its place stay.  What a dead stream does not take is dropped: after each move the client
agrees with all hops on a new epoch, and asks for what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from node.serving.sessions.hop_session import FrameStream
from routing.names import PeerId
from tensor_codec.errors import PeerGone, Refused
from tensor_codec.frame import Buffer
from tensor_codec.messages.attach import encode_attached


class ClientStream:
    """A FrameStream over one stream after the other.

    wait_seconds: for another stream, after one that broke.
    """

    relayed = True  # the first one is

    def __init__(self, stream: FrameStream, wait_seconds: float) -> None:
        self.judge: Callable[[bytes, int], Refused | None] | None = None  # of first messages alone
        self._peer, self._prefix = stream.peer, stream.prefix
        self._read_from = self._write_to = stream
        self._wait_seconds = wait_seconds
        self._reading = trio.CancelScope()
        self._replaced = trio.Event()
        self._greeted = trio.Event()  # the present stream has our answer, and other frames may follow
        self._greeted.set()

    @property
    def peer(self) -> PeerId:
        """See FrameStream."""
        return self._peer

    @property
    def prefix(self) -> str:
        """Of the first stream: the session is counted there."""
        return self._prefix

    @property
    def limit(self) -> int:
        """See FrameStream."""
        return self._read_from.limit

    @limit.setter
    def limit(self, size: int) -> None:
        self._read_from.limit = size

    @property
    def speed(self) -> int:
        """See FrameStream."""
        return self._read_from.speed

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """Send one frame, if there is a stream that takes it.  Raises SlowPeer."""
        try:
            await self._greeted.wait()
            await self._write_to.send(frame)
        except PeerGone:
            await trio.lowlevel.checkpoint()

    def send_now(self, frame: Buffer | Sequence[Buffer]) -> bool:
        """See FrameStream."""
        return self._greeted.is_set() and self._write_to.send_now(frame)

    async def receive(
        self, seconds: float | None = None, taker: Callable[[Buffer], bool] | None = None
    ) -> Buffer | None:
        """The next frame; None where the client has ended its present stream.

        Raises PeerFault, PeerGone where no other stream comes in time.
        """
        while True:
            stream, replaced, gone = self._read_from, self._replaced, None
            with trio.CancelScope() as self._reading:
                try:
                    frame = await stream.receive(seconds, taker)
                    if stream is self._read_from:
                        return frame
                except PeerGone as fault:
                    gone = fault
            if gone is not None and stream is self._read_from:
                with trio.move_on_after(self._wait_seconds) as waiting:
                    await replaced.wait()
                if waiting.cancelled_caught:
                    raise gone

    async def follow(self, stream: FrameStream) -> None:
        """Go on over this stream, until another one takes its place or the session ends.  Raises PeerGone."""
        before, replaced = self._read_from, self._replaced
        stream.limit, ended = before.limit, trio.Event()
        self._read_from, self._replaced, self._greeted = stream, ended, trio.Event()
        greeted = self._greeted
        replaced.set()
        self._reading.cancel()
        try:
            await stream.send(encode_attached())
            if self._read_from is stream:
                self._write_to = stream
        except PeerGone:
            if self._read_from is stream:
                self._read_from = before
                self._reading.cancel()
            raise
        finally:
            greeted.set()
        if self._write_to is stream:
            await before.reset()
            await ended.wait()

    async def reset(self) -> None:
        """See FrameStream."""
        self.release()
        await self._write_to.reset()

    def release(self) -> None:
        """The session is over: the present stream's handler may return."""
        self._replaced.set()
