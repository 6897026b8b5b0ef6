"""Frames over a byte stream, each with a deadline: the only way that our protocols talk."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from routing.names import PeerId
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.frame import PREFIX_BYTES, Buffer, FrameDecoder, encode_frame
from tensor_codec.limits import KIB, Limits

_READ_BYTES = 256 * KIB


class ByteStream(Protocol):
    """The byte stream of a FramedStream: a muxed stream, or any of trio's streams with `send_eof`."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """The next bytes; b"" at the end."""

    async def send_all(self, data: bytes) -> None:
        """Send, waiting as long as it takes."""

    async def send_eof(self) -> None:
        """End our side."""

    async def aclose(self) -> None:
        """End it."""


@dataclass(slots=True)
class Traffic:
    """Bytes of frames, without their prefixes, over many streams."""

    sent: int = 0
    received: int = 0


class FramedStream:
    """Whole frames to and from one peer.

    Any number of tasks may send, one may receive.  The bytes received and not taken are bounded: while a
    frame waits here nothing is read from the stream, and the peer's credit runs out.

    peer: authenticated.  protocol: agreed.  traffic: a count to add to, shared with other streams.
    prefix: of the peer's address, as `node.network.prefixes.address_prefix` has it; "" where it has none.
    """

    def __init__(
        self,
        stream: ByteStream,
        peer: PeerId,
        protocol: str,
        limits: Limits | None = None,
        traffic: Traffic | None = None,
        prefix: str = "",
    ) -> None:
        self.peer = peer
        self.protocol = protocol
        self.prefix = prefix
        self._limits = limits or Limits()
        self._stream = stream
        self._traffic = traffic or Traffic()
        self._decoder = FrameDecoder(self._limits.max_frame_bytes)
        self._ready: deque[bytearray] = deque()
        self._receiving = False
        self._sending = trio.Lock()
        self._ended = False
        # an ability of muxed streams, and not of trio's streams
        self._send_now: Callable[[bytes], bool] | None = getattr(stream, "send_now", None)
        self._reset_now: Callable[[], None] | None = getattr(stream, "reset_now", None)

    @property
    def in_frame(self) -> bool:
        """Whether a frame from the peer has begun and is not whole."""
        return self._decoder.in_frame

    async def send(self, frame: Buffer | Sequence[Buffer], seconds: float | None = None) -> None:
        """Send one frame, given whole or in parts; returns when the network has taken it.

        Raises SlowPeer after `seconds` (None: `reply_taken_seconds`, and the time of its size at the
        slowest rate allowed), PeerGone.  A frame that was cut short, by either or by a cancellation, takes
        the stream with it.
        """
        data = encode_frame(frame, self._limits.max_frame_bytes)
        self._traffic.sent += len(data) - PREFIX_BYTES
        if self._send_now is not None and not self._sending.locked() and self._send_now(data):
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        limits = self._limits
        if seconds is None:
            seconds = limits.reply_taken_seconds + len(data) / limits.frame_floor_bytes_per_second
        with trio.move_on_after(seconds) as scope:
            async with self._sending:
                try:
                    await self._stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise PeerGone(str(error)) from error
                except trio.Cancelled:
                    await self.reset()
                    raise
        if scope.cancelled_caught:
            raise SlowPeer(f"{self.peer} did not take {len(data)} bytes within {seconds:.3g} s")

    async def receive(self, seconds: float | None = None) -> bytearray | None:
        """The next frame, or None at a clean end.

        seconds: for the whole frame.  None waits for its first byte without end, but a frame that has begun
        must be whole within `frame_start_seconds` and the time of its size at the slowest rate allowed.
        Raises SlowPeer, PeerGone, FrameError.
        """
        if self._ready:
            await trio.lowlevel.checkpoint_if_cancelled()
            return self._take()
        if self._receiving:
            raise trio.BusyResourceError("another task receives from this stream")
        self._receiving = True
        try:
            if seconds is not None:
                return await self._receive_within(seconds)
            if not self._decoder.in_frame and not await self._read():
                return None
            if self._ready:
                return self._take()
            return await self._receive_rest()
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        """End our side cleanly, and discard further bytes.  Never raises."""
        with contextlib.suppress(trio.BrokenResourceError, PeerGone):
            await self._stream.aclose()

    async def send_eof(self) -> None:
        """End our side; frames may still be received.  Raises PeerGone."""
        async with self._sending:
            try:
                await self._stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise PeerGone(str(error)) from error

    async def reset(self) -> None:
        """End both sides at once; a frame in the middle is cut.  Never raises, needs no waiting."""
        if self._reset_now is not None:
            self._reset_now()
        else:
            await trio.aclose_forcefully(self._stream)  # type: ignore[arg-type]  # needs aclose alone

    async def _receive_within(self, seconds: float) -> bytearray | None:
        with trio.move_on_after(seconds):
            while not self._ready:
                if not await self._read():
                    return None
            return self._take()
        raise SlowPeer(f"no whole frame from {self.peer} within {seconds:g} s")

    async def _receive_rest(self) -> bytearray | None:
        """The rest of a frame that has begun; its size may not be known yet."""
        limits = self._limits
        begun = trio.current_time()
        seconds = limits.frame_start_seconds
        with trio.move_on_at(begun + seconds) as scope:
            while not self._ready:
                size = self._decoder.missing_bytes
                seconds = max(
                    seconds, limits.frame_start_seconds + size / limits.frame_floor_bytes_per_second
                )
                scope.deadline = begun + seconds
                if not await self._read():
                    return None
            return self._take()
        raise SlowPeer(f"a frame from {self.peer} had begun and was not whole within {seconds:.3g} s")

    async def _read(self) -> bool:
        """Read once; False at a clean end.  Nothing is lost if it is cancelled."""
        if self._ended:
            return False
        try:
            data = await self._stream.receive_some(_READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerGone(str(error)) from error
        if data:
            self._ready += self._decoder.feed(data)
            return True
        self._decoder.close()
        self._ended = True
        return False

    def _take(self) -> bytearray:
        frame = self._ready.popleft()
        self._traffic.received += len(frame)
        return frame
