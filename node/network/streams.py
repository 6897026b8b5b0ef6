"""Frames over a byte stream, each with a deadline: the only way that our protocols talk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import trio

from node.network.budgets.large_frames import SMALL_FRAME, LargeFrames
from node.network.budgets.stream_place import StreamPlace
from node.network.budgets.turns import FRAMES_PER_TURN, Turns
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import PREFIX, PREFIX_BYTES, Buffer, FrameDecoder, encode_frame
from tensor_codec.limits import KIB, MAX_HEADER_BYTES, Limits

_READ_BYTES = 256 * KIB
_HEADER_BYTES = 2 + MAX_HEADER_BYTES  # with its length
Judge = Callable[[bytes, int], Refused | None]
Taker = Callable[[Buffer], bool]


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


class CountedReader(Protocol):
    """A byte stream that counts the bytes that its reader holds, as a muxed stream does."""

    turns: Turns
    place: StreamPlace
    on_bytes: Callable[[bytes], bool] | None

    async def receive_held(self, max_bytes: int) -> bytes | bytearray:
        """The next bytes, held from now on; b"" at the end."""

    def hold(self, size: int) -> None:
        """Say how many of the bytes received are still held."""

    def send_now(self, data: bytes) -> bool:
        """Send all of a short message if that needs no waiting at all; False if nothing was done."""


class PlainReader:
    """What muxed streams can do, for one of trio's own streams, where nothing is counted."""

    def __init__(self, stream: ByteStream) -> None:
        self.turns = Turns()
        self.on_bytes: Callable[[bytes], bool] | None = None
        self.place = StreamPlace(LargeFrames(1 << 40, 1 << 40), None, "", "", lambda: None)
        self._stream = stream

    async def receive_held(self, max_bytes: int) -> bytes | bytearray:
        """See CountedReader."""
        return await self._stream.receive_some(max_bytes)

    def hold(self, size: int) -> None:
        """See CountedReader."""

    def send_now(self, data: bytes) -> bool:
        """See CountedReader."""
        return False


@dataclass(slots=True)
class Traffic:
    """Bytes of frames, without their prefixes, over many streams."""

    sent: int = 0
    received: int = 0


class FramedStream:
    """Whole frames to and from one peer.

    Any number of tasks may send, one may receive.  The bytes received and not taken are bounded: while a
    frame waits here nothing is read from the stream, and the peer's credit runs out.  Bytes of frames up to
    SMALL_FRAME count as unread, and a larger frame is read once it has a place (`LargeFrames`), which it
    keeps until the next call of `receive`.  After some frames without a pause `receive` lets other tasks run.

    peer: authenticated.  protocol: agreed.  traffic: a count to add to, shared with other streams.
    prefix: of the peer's address, as `node.network.prefixes.address_prefix` has it; "" where it has none.
    batches: whether the peer takes frames of many sessions, as its record says.
    better: of a stream that runs through a relay, or instead of one, whether there is a better way now.
    judge: called with the beginning of a frame above SMALL_FRAME, at least its header, and with its size,
    before the frame has a place.  It may raise a PeerFault.  A Refused that it returns is raised by `receive`
    once the frame has passed by, of which nothing is kept then.
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
        self.judge: Judge | None = None
        self.batches = False
        self.better: Callable[[], bool] | None = None
        self._decoder = FrameDecoder(self._limits.max_frame_bytes)
        self._has_place = False  # the frame that has begun is a large one
        self._refusal: Refused | None = None  # to be raised after the frame that has begun
        self._receiving = False
        self._sending = trio.Lock()
        self._reader: CountedReader = (
            cast(CountedReader, stream) if hasattr(stream, "receive_held") else PlainReader(stream)
        )

    @property
    def relayed(self) -> bool:
        """Whether it runs through a relay, or over a direct connection that came of one."""
        return self.better is not None

    @property
    def has_better_way(self) -> bool:
        """Whether it runs through a relay, and a direct connection to the peer is there."""
        return self.better is not None and self.better()

    @property
    def is_free(self) -> bool:
        """Whether a short frame goes out without a wait."""
        connection = getattr(self._stream, "connection", None)  # of muxed streams
        return not self._sending.locked() and (connection is None or bool(connection.can_send_now))

    @property
    def limit(self) -> int:
        """Most bytes of a frame that `receive` has not returned yet; never more than `max_frame_bytes`."""
        return self._decoder.max_frame

    @limit.setter
    def limit(self, size: int) -> None:
        self._decoder.max_frame = min(size, self._limits.max_frame_bytes)

    @property
    def speed(self) -> int:
        """Bytes per second of the way here, as the connection found it last; 0: unknown."""
        connection = getattr(self._stream, "connection", None)  # of muxed streams
        return 0 if connection is None else int(connection.channel.speed)

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
        del frame  # a slow peer has us hold the joined bytes alone
        self._traffic.sent += len(data) - PREFIX_BYTES
        if not self._sending.locked() and self._reader.send_now(data):
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

    def send_now(self, frame: Buffer | Sequence[Buffer]) -> bool:
        """Send one frame where that needs no waiting; False where nothing was done."""
        if self._sending.locked():
            return False
        data = encode_frame(frame, self._limits.max_frame_bytes)
        try:
            if not self._reader.send_now(data):
                return False
        except PeerGone:  # `send` raises it
            return False
        self._traffic.sent += len(data) - PREFIX_BYTES
        return True

    async def receive(self, seconds: float | None = None, taker: Taker | None = None) -> bytearray | None:
        """The next frame, or None at a clean end.

        seconds: for the whole frame.  None waits for its first byte without end, but a frame that has begun
        must be whole within `frame_start_seconds` and the time of its size at the slowest rate allowed.
        taker: called with a small frame that comes whole, by the task that reads the connection: the frame
        saves the turns of the event loop until this task runs.  True: the taker is done with it, and the
        next frame is waited for.  Where it answers False or raises a PeerFault it must have done nothing; the
        frame is returned then.  Frames that came while nobody waited are returned, and so all are in order.
        Raises SlowPeer, PeerGone, FrameError, and the errors of `judge`.
        """
        if not self._has_place:
            self._reader.place.end()  # of the frame before, which was in hand
        turns = self._reader.turns
        if turns.frames >= FRAMES_PER_TURN:
            await turns.next()
        frame = None
        if self._decoder.in_frame:
            await trio.lowlevel.checkpoint_if_cancelled()
            frame = self._take()
        if frame is None:
            if self._receiving:
                raise trio.BusyResourceError("another task receives from this stream")
            self._receiving = True
            try:
                frame = await self._receive(seconds, taker)
            finally:
                self._receiving = False
            if frame is None:
                return None
        turns.frames += 1
        self._traffic.received += len(frame)
        return frame

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
        reset_now: Callable[[], None] | None = getattr(self._stream, "reset_now", None)
        if reset_now is not None:
            reset_now()
        else:
            await trio.aclose_forcefully(self._stream)  # type: ignore[arg-type]  # needs aclose alone

    async def _receive(self, seconds: float | None, taker: Taker | None) -> bytearray | None:
        decoder = self._decoder
        if seconds is None and not decoder.in_frame:
            self._reader.on_bytes = None if taker is None else partial(self._give, taker)
            try:
                if not await self._read():
                    return None
            finally:
                self._reader.on_bytes = None
            if (frame := self._take()) is not None:
                return frame
        begun, allowed = trio.current_time(), seconds or 0.0
        with trio.CancelScope() as scope:
            if seconds is not None:
                scope.deadline = begun + seconds
            while (frame := self._take()) is None:
                if self._refusal is not None and not decoder.in_frame:
                    self._raise_refusal()
                if self._lacks_place():
                    if seconds is None:
                        scope.deadline = float("inf")  # the wait has an end of its own, and is not the peer's
                    await self._get_place()
                    begun = trio.current_time()
                if seconds is None:
                    allowed = max(allowed, _seconds_for(self._limits, decoder.missing_bytes))
                    scope.deadline = begun + allowed
                if not await self._read():
                    return None
            return frame
        if seconds is not None:
            raise SlowPeer(f"no whole frame from {self.peer} within {seconds:g} s")
        raise SlowPeer(f"a frame from {self.peer} had begun and was not whole within {allowed:.3g} s")

    def _give(self, taker: Taker, data: bytes) -> bool:
        """Give the bytes to the taker, where they are one whole frame."""
        size = len(data) - PREFIX_BYTES
        if size < 0 or len(data) > SMALL_FRAME or size > self._decoder.max_frame:
            return False
        if PREFIX.unpack_from(data)[0] != size:
            return False
        try:
            taken = taker(memoryview(data)[PREFIX_BYTES:])
        except PeerFault:  # the reader finds it again, and knows what to do
            return False
        if taken:
            self._traffic.received += size
        return taken

    def _take(self) -> bytearray | None:
        """The next frame if it is whole; its bytes are the caller's from now on."""
        frame = self._decoder.take()
        if not self._has_place:
            self._reader.hold(self._decoder.held)
        elif frame is not None:
            self._has_place = False
            self._reader.place.arrived()
        return frame

    def _lacks_place(self) -> bool:
        """Whether a large frame has begun, is known by its header, and has no place yet."""
        size = self._decoder.size
        if size is None or size + PREFIX_BYTES <= SMALL_FRAME or self._has_place:
            return False
        return self._decoder.held - PREFIX_BYTES >= min(size, _HEADER_BYTES)

    async def _get_place(self) -> None:
        """Have the frame judged, and wait for a place.  Raises PeerFault."""
        size = self._decoder.size or 0
        if self.judge is not None:
            self._refusal = self.judge(self._decoder.beginning(_HEADER_BYTES), size)
        if self._refusal is None:
            await self._reader.place.begin(size, _seconds_for(self._limits, size))
        else:
            self._decoder.discard()
        self._has_place = True
        self._reader.hold(0)

    def _raise_refusal(self) -> None:
        refusal, self._refusal = self._refusal, None
        self._has_place = False
        assert refusal is not None
        raise refusal

    async def _read(self) -> bool:
        """Read once; False at a clean end.  Nothing is lost if it is cancelled."""
        if self._decoder.ended:
            return False
        # of a large frame no byte more than belongs to it: the following ones have no place
        size = min(_READ_BYTES, self._decoder.missing_bytes) if self._has_place else _READ_BYTES
        try:
            data = await self._reader.receive_held(size)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerGone(str(error)) from error
        if data:
            self._decoder.add(data)
            if self._has_place:
                self._reader.hold(0)
            return True
        self._decoder.close()
        return False


def _seconds_for(limits: Limits, size: int) -> float:
    """Within which a frame, with so many bytes missing, must be whole."""
    return limits.frame_start_seconds + size / limits.frame_floor_bytes_per_second
