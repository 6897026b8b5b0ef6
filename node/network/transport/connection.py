"""A muxed connection: the trio shell around the yamux core, over a secured channel.

The shell decides nothing.  One task reads.  A sender writes its bytes at once as far as the kernel
takes them; one writing task waits for the kernel and sends the others.  Streams have trio's
interface (`receive_some`, `send_all`, ...); `node.network.libp2p_adapter` gives them py-libp2p's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from node.network.budgets.large_frames import LargeFrames
from node.network.budgets.stream_place import StreamPlace
from node.network.budgets.turns import FRAMES_PER_TURN, Turns
from node.network.prefixes import address_prefix
from node.network.transport.multistream import proposal
from node.network.transport.noise import SecureChannel
from node.network.transport.yamux import CHUNK, PROTOCOL_ERROR, Event, Happening, Stream, StreamReset, Yamux
from node.network.transport.yamux_limits import YamuxLimits
from routing.names import PeerId
from tensor_codec.errors import LocalProtocolError, PeerFault, PeerGone, RemoteProtocolError
from tensor_codec.limits import KIB, Limits

_READ_BYTES = 256 * KIB


class MuxedStream:
    """One stream.  One task may read and one may write at a time; any task may reset it."""

    def __init__(self, connection: Connection, state: Stream) -> None:
        self.connection = connection
        self.state = state
        self.protocol: str | None = None  # as agreed with the peer
        self.served = False  # opened by the peer, and counted against the caps
        self.turns = connection.turns
        self._answer_due = b""  # unread bytes of the peer's agreement to the protocol
        self.place = StreamPlace(  # of a large frame that arrives or is in hand
            connection.large_frames, connection, connection.peer, connection.prefix, self.reset_now
        )
        # Called with all unread bytes while the reader waits for some; whether they are used.
        self.on_bytes: Callable[[bytes], bool] | None = None
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def propose(self, protocol: str) -> None:
        """Ask for a protocol: the name goes out with our first bytes, the answer comes before the peer's."""
        self.protocol = protocol
        self._answer_due = proposal(protocol)  # a peer agrees by repeating the proposal
        self.connection.queue(self, self._answer_due)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, b"" at the end of the peer's bytes.

        Raises PeerGone when the stream or the connection is gone, RemoteProtocolError where the peer
        does not speak the protocol that was proposed.
        """
        held = self.state.held
        data = await self.receive_held(max_bytes or _READ_BYTES)
        self.hold(held)
        return data

    async def receive_held(self, max_bytes: int) -> bytes:
        """As `receive_some`, but the bytes count as unread until `hold` says that they are done with."""
        while self._answer_due:
            await self._read_answer()
        return await self._receive(max_bytes)

    def hold(self, size: int) -> None:
        """Say how many bytes of `receive_held` are still held; the peer gets credit for the others."""
        connection = self.connection
        connection.core.hold(self.state, size)
        if connection.core.has_data_to_send:
            connection.flush_now()

    async def _receive(self, max_bytes: int) -> bytes:
        connection, state = self.connection, self.state
        connection.turns.frames += bool(state.unread)  # no pause
        while not state.unread:
            if state.is_reset:
                raise StreamReset(connection.failure or f"the peer reset stream {state.id}")
            if state.receive_ended or state.abandoned_at is not None:
                return b""
            connection.raise_if_closed()
            connection.flush_now()
            await self._readers.park()
        if connection.turns.frames > FRAMES_PER_TURN:
            await connection.turns.next()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        return connection.core.take_held(state, max_bytes)

    def send_now(self, data: bytes) -> bool:
        """Send all of a short message if that needs no waiting at all; False if nothing was done."""
        connection = self.connection
        if len(data) > CHUNK or len(data) > self.state.send_credit or not connection.can_send_now:
            return False
        connection.queue(self, data)
        connection.flush_now()
        return True

    def send_some_now(self, data: memoryview) -> int:
        """Send as much of the data as needs no waiting; the number of those bytes.  Raises PeerGone."""
        connection, sent = self.connection, 0
        connection.raise_if_closed()
        while sent < len(data) and connection.can_send_now:
            if not (size := connection.core.send(self.state, data[sent:])):
                break
            sent += size
            connection.flush_now()
        return sent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting for the peer's credit and the kernel.  Raises PeerGone.

        Long data goes in pieces; other streams send between the pieces.
        """
        connection = self.connection
        view = memoryview(data)
        while view:
            connection.raise_if_closed()
            if size := connection.core.send(self.state, view):
                view = view[size:]
                await connection.flush()
            else:
                connection.flush_now()
                await self._writers.park()

    async def send_eof(self) -> None:
        """End our side; the peer may still send."""
        self._end(self.connection.core.end)

    async def aclose(self) -> None:
        """End our side, and discard the peer's further bytes."""
        self.close_now()

    def close_now(self) -> None:
        """As `aclose`.  Twice does no harm."""
        self.place.end()
        self._end(self.connection.core.abandon)
        self.wake()

    def reset_now(self) -> None:
        """End both sides at once.  Twice does no harm."""
        self.place.end()
        self._end(self.connection.core.reset)
        self.wake()

    def _end(self, how: Callable[[Stream], None]) -> None:
        how(self.state)
        if not self.connection.closed.is_set():
            self.connection.flush_now()

    async def _read_answer(self) -> None:
        data = await self._receive(len(self._answer_due))
        self.hold(self.state.held - len(data))
        if not data or not self._answer_due.startswith(data):
            self.reset_now()
            raise RemoteProtocolError(f"{self.connection.peer} does not speak {self.protocol}")
        self._answer_due = self._answer_due[len(data) :]

    def wake(self) -> None:
        """Wake the reader and the writer, so that each checks again."""
        self._readers.unpark_all()
        self._writers.unpark_all()

    def readable(self) -> None:
        """Bytes or the end have come: give the bytes to `on_bytes`, or wake the reader."""
        state, turns = self.state, self.turns
        if (
            self.on_bytes is not None
            and state.unread
            and self._readers
            and not self._answer_due
            and turns.frames < FRAMES_PER_TURN
        ):
            data = bytes(state.unread)
            if self.on_bytes(data):
                turns.frames += 1
                self.connection.core.used(state, len(data))
                return
        self._readers.unpark_all()

    def wake_writers(self) -> None:
        """Wake a writer that waits for credit."""
        self._writers.unpark_all()

    @property
    def is_waiting(self) -> bool:
        """Whether its reader waits for the peer's bytes."""
        return bool(self._readers) and not self.state.unread

    def is_closed(self) -> bool:
        """True once both sides have ended, or after a reset."""
        return self.state.is_reset or (self.state.send_ended and self.state.receive_ended)


@dataclass(slots=True)
class _Writer:
    """The work of the writing task.  unsent: sealed bytes that the kernel has not taken completely."""

    unsent: memoryview | None = None
    wanted: trio.Event = field(default_factory=trio.Event)
    waiting: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    flushes: int = 0


class Connection:
    """A peer's connection: opens streams, and passes the peer's streams to `on_stream`.

    on_stream: called with each stream that the peer opens; None keeps the streams for `accept`.
    large_frames: the places of all connections; None: of this one alone.
    on_fault: called when the peer broke a rule of yamux or of the channel; the connection is closed then.
    on_closed: called once, after any end of the connection.
    relayed_by: the relay that carries it; None for a direct one.
    """

    def __init__(
        self,
        channel: SecureChannel,
        limits: YamuxLimits | None = None,
        *,
        large_frames: LargeFrames | None = None,
        on_stream: Callable[[MuxedStream], None] | None = None,
        on_fault: Callable[[PeerFault], None] | None = None,
        on_closed: Callable[[Connection], None] | None = None,
    ) -> None:
        self.channel = channel
        self.peer: PeerId = channel.remote
        self.relayed_by = channel.link.relayed_by
        self.core = Yamux(channel.initiator, limits, trio.current_time(), channel.round_trip_seconds)
        self.failure: str | None = None
        self.closed = trio.Event()
        self.started = trio.Event()
        self.turns = Turns()
        self.large_frames = large_frames or LargeFrames.of(Limits())
        self._on_stream = on_stream or self.offer
        self._on_fault = on_fault
        self._on_closed = on_closed
        self._streams: dict[int, MuxedStream] = {}
        self._writer = _Writer()
        self._offered = trio.open_memory_channel[MuxedStream](1024)

    # --- running ---

    async def run(self) -> None:
        """Read and write until the connection ends; every stream is reset then."""
        reason = "the connection ended"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_loop)
                self.started.set()
                self.core.ping()
                self.flush_now()
                await self._read_loop()
                nursery.cancel_scope.cancel()
        except* PeerFault as group:
            fault = _first(group)
            reason = str(fault)
            if not isinstance(fault, PeerGone):
                self.core.go_away(PROTOCOL_ERROR)
                self.flush_now()
                if self._on_fault is not None:
                    self._on_fault(fault)
        finally:
            self.close_now(reason)

    async def _read_loop(self) -> None:
        while data := await self.channel.receive():
            self.turns.frames = 0  # every other task has run
            rest = memoryview(data)
            while rest:
                events, used = self.core.receive_some(rest, trio.current_time())
                for event in events:
                    self._handle(event)
                if self.core.has_data_to_send:
                    self.flush_now()
                rest = rest[used:]
                if rest:
                    await trio.lowlevel.checkpoint()

    def _handle(self, event: Event) -> None:
        what, state = event
        if state is None:
            return  # the peer goes away: it will close
        if what is Happening.OPENED:
            self._on_stream(self._new_stream(state))
        elif (stream_or_none := self._streams.get(state.id)) is not None:
            if what is Happening.READABLE:
                stream_or_none.readable()
            elif what is Happening.WRITABLE:
                stream_or_none.wake_writers()
            else:
                stream_or_none.wake()

    # --- sending ---

    @property
    def can_send_now(self) -> bool:
        """True if no earlier bytes wait for the kernel."""
        return self._writer.unsent is None and not self.closed.is_set()

    def queue(self, stream: MuxedStream, data: bytes) -> None:
        """Send a short message with the next flush.  It must be within a chunk and the stream's credit."""
        self.raise_if_closed()
        if self.core.send(stream.state, memoryview(data)) != len(data):
            raise LocalProtocolError(f"{len(data)} bytes to queue on {stream.state}")

    def flush_now(self) -> None:
        """Send the queued bytes that the kernel takes now; the writing task sends the others."""
        if self._writer.unsent is not None or self.closed.is_set():
            return
        while self.core.has_data_to_send:
            sealed = memoryview(self.channel.seal(self.core.data_to_send()))
            try:
                taken = self.channel.link.send_now(sealed)
            except PeerGone as gone:
                self.close_now(str(gone))
                return
            if taken < len(sealed):
                self._writer.unsent = sealed[taken:]
                self._writer.wanted.set()
                return

    async def flush(self) -> None:
        """Send the bytes queued by now, and wait until the kernel has taken them.  Raises PeerGone."""
        self.flush_now()
        if self._writer.unsent is None:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            # one flush for the bytes being written, a second for the bytes queued after them
            goal = self._writer.flushes + (2 if self.core.has_data_to_send else 1)
            while self._writer.flushes < goal and not self.closed.is_set():
                await self._writer.waiting.park()
        self.raise_if_closed()

    async def _write_loop(self) -> None:
        while True:
            await self._writer.wanted.wait()
            self._writer.wanted = trio.Event()
            while self._writer.unsent is not None:
                await self.channel.link.send(self._writer.unsent)
                self._writer.unsent = None
                self._writer.flushes += 1
                self._writer.waiting.unpark_all()
                if self.core.has_data_to_send:
                    self._writer.unsent = memoryview(self.channel.seal(self.core.data_to_send()))

    # --- streams ---

    def open(self) -> MuxedStream:
        """A new stream.  Raises PeerGone."""
        self.raise_if_closed()
        return self._new_stream(self.core.open())

    def offer(self, stream: MuxedStream) -> None:
        """Keep a stream that the peer opened for a caller of `accept`."""
        try:
            self._offered[0].send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            stream.reset_now()

    async def accept(self) -> MuxedStream:
        """The next stream that was offered.  Raises PeerGone."""
        try:
            return await self._offered[1].receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise PeerGone(self.failure or "the connection ended") from None

    def served_streams(self) -> list[MuxedStream]:
        """The peer's open streams that are served."""
        return [stream for stream in self._streams.values() if stream.served and not stream.is_closed()]

    def _new_stream(self, state: Stream) -> MuxedStream:
        if len(self._streams) > 2 * self.core.streams + 16:  # from time to time: none stays for ever
            self._streams = {i: stream for i, stream in self._streams.items() if not stream.is_closed()}
        stream = self._streams[state.id] = MuxedStream(self, state)
        return stream

    # --- ending ---

    def raise_if_closed(self) -> None:
        """Raises PeerGone once the connection has ended."""
        if self.closed.is_set():
            raise PeerGone(self.failure or "the connection ended")

    def close_now(self, reason: str) -> None:
        """End the connection: every stream is reset, every waiter gets `reason`.  Twice does no harm."""
        if self.closed.is_set():
            return
        self.failure = reason
        self.closed.set()
        self.channel.link.close()
        for stream in self._streams.values():
            stream.state.is_reset = stream.state.is_reset or not stream.is_closed()
            stream.place.end()
            stream.wake()
        self._streams.clear()
        self._writer.waiting.unpark_all()
        self._offered[0].close()
        if self._on_closed is not None:
            self._on_closed(self)

    async def close(self) -> None:
        """Send a goodbye, and end the connection."""
        if not self.closed.is_set():
            self.core.go_away()
            self.flush_now()
            self.close_now("the connection was closed on this side")

    @property
    def prefix(self) -> str:
        """Of the peer's address, as `address_prefix` has it; "" where that is unknown."""
        remote = self.channel.link.remote
        return address_prefix(remote[0]) if remote else ""

    @property
    def is_initiator(self) -> bool:
        """True if this node dialled."""
        return self.channel.initiator

    @property
    def is_established(self) -> bool:
        """True while streams can be opened."""
        return self.started.is_set() and not self.closed.is_set()


def _first(group: BaseExceptionGroup[Any]) -> PeerFault:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, PeerFault):
        raise error
    return error
