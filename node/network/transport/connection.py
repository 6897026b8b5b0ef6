"""A muxed connection: the trio shell around the yamux core, over a secured channel.

It decides nothing.  One task reads; whoever has bytes to send sends them at once if the kernel takes
them, and otherwise leaves them to the one task that writes and waits for it.  Streams are trio's
kind (`receive_some`, `send_all`, ...), and also py-libp2p's (`read`, `write`, ...), which its
Kademlia and identify use.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset
from multiaddr import Multiaddr

from node.network.transport.multistream import proposal
from node.network.transport.noise import SecureChannel
from node.network.transport.yamux import (
    CHUNK,
    PROTOCOL_ERROR,
    Event,
    Happening,
    Stream,
    StreamReset,
    Yamux,
    YamuxLimits,
)
from routing.names import PeerId
from tensor_codec.errors import LocalProtocolError, PeerFault, PeerGone, RemoteProtocolError
from tensor_codec.limits import KIB

_READ_BYTES = 256 * KIB


class MuxedStream(IMuxedStream):  # type: ignore[misc]  # py-libp2p has no types
    """One stream.  One task may read and one may write at a time; reset it from anywhere."""

    def __init__(self, connection: Connection, state: Stream) -> None:
        self.muxed_conn: Connection = connection
        self.state = state
        self.protocol: str | None = None  # as agreed with the peer
        self.let_in = False  # opened by the peer, and counted
        self._answer_due = b""  # the rest of what says that the peer agrees
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def propose(self, protocol: str) -> None:
        """Ask for a protocol: goes out with our first bytes, and the answer is read before theirs."""
        self.protocol = protocol
        self._answer_due = proposal(protocol)  # agreeing means saying the same
        self.muxed_conn.queue(self, self._answer_due)

    # --- as trio has it ---

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, b"" at the end of what the peer sends.

        Raises PeerGone when the stream or the connection is gone, RemoteProtocolError where the peer
        does not speak the protocol that was proposed.
        """
        while self._answer_due:
            await self._read_answer()
        return await self._receive(max_bytes or _READ_BYTES)

    async def _receive(self, max_bytes: int) -> bytes:
        connection, state = self.muxed_conn, self.state
        while not state.unread:
            if state.is_reset:
                raise StreamReset(connection.failure or f"the peer reset stream {state.id}")
            if state.receive_ended or state.abandoned_at is not None:
                return b""
            connection.raise_if_closed()
            connection.flush_now()
            await self._readers.park()
        await trio.lowlevel.checkpoint_if_cancelled()
        data = connection.core.take(state, max_bytes)
        if connection.core.has_data_to_send:
            connection.flush_now()
        return data

    def send_now(self, data: bytes) -> bool:
        """Send all of a short message if that needs no waiting at all; False if nothing was done."""
        connection = self.muxed_conn
        if len(data) > CHUNK or len(data) > self.state.send_credit or not connection.can_send_now:
            return False
        connection.queue(self, data)
        connection.flush_now()
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting for the peer's credit and the kernel.  Raises PeerGone.

        Long data goes in pieces, between which other streams have their turn.
        """
        connection = self.muxed_conn
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
        self._end(self.muxed_conn.core.end)

    async def aclose(self) -> None:
        """End our side, and throw away what the peer may still send."""
        self._end(self.muxed_conn.core.abandon)
        self.wake()

    def reset_now(self) -> None:
        """End both sides at once.  Twice does no harm."""
        self._end(self.muxed_conn.core.reset)
        self.wake()

    def _end(self, how: Callable[[Stream], None]) -> None:
        how(self.state)
        if not self.muxed_conn.is_closed:
            self.muxed_conn.flush_now()

    async def _read_answer(self) -> None:
        data = await self._receive(len(self._answer_due))
        if not data or not self._answer_due.startswith(data):
            self.reset_now()
            raise RemoteProtocolError(f"{self.muxed_conn.peer} does not speak {self.protocol}")
        self._answer_due = self._answer_due[len(data) :]

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._readers.unpark_all()
        self._writers.unpark_all()

    def wake_readers(self) -> None:
        """Let whoever waits for bytes look again."""
        self._readers.unpark_all()

    def wake_writers(self) -> None:
        """Let whoever waits for credit look again."""
        self._writers.unpark_all()

    # --- as py-libp2p has it ---

    async def read(self, n: int | None = None) -> bytes:
        """As `receive_some`, with py-libp2p's errors."""
        try:
            data = await self.receive_some(n)
        except PeerFault as error:
            raise MuxedStreamReset(str(error)) from error
        if not data and n != 0:
            raise MuxedStreamEOF("the peer ended the stream")
        return data

    async def write(self, data: bytes) -> None:
        """As `send_all`, with py-libp2p's errors."""
        try:
            await self.send_all(data)
        except (PeerFault, LocalProtocolError) as error:
            raise MuxedStreamReset(str(error)) from error

    async def close(self) -> None:
        """As `aclose`."""
        await self.aclose()

    async def close_write(self) -> None:
        """As `send_eof`."""
        await self.send_eof()

    async def reset(self) -> None:
        """As `reset_now`."""
        self.reset_now()

    def is_closed(self) -> bool:
        """True once nothing more can come of it."""
        return self.state.is_reset or (self.state.send_ended and self.state.receive_ended)

    def set_deadline(self, ttl: int) -> None:
        """Not for us: whoever waits has a deadline of its own."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> MuxedStream:
        """Itself; the end of the block closes it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()


class Connection(IMuxedConn):  # type: ignore[misc]  # py-libp2p has no types
    """A peer's connection: opens streams, and hands those that the peer opens to `on_stream`.

    on_stream: called with each stream that the peer opens; None keeps them for `accept_stream`.
    on_fault: told when the peer broke the rules of yamux or of the channel; the connection is closed then.
    on_closed: told once, however it ended.
    """

    def __init__(
        self,
        channel: SecureChannel,
        limits: YamuxLimits | None = None,
        *,
        on_stream: Callable[[MuxedStream], None] | None = None,
        on_fault: Callable[[PeerFault], None] | None = None,
        on_closed: Callable[[Connection], None] | None = None,
    ) -> None:
        self.channel = channel
        self.peer: PeerId = channel.remote
        self.peer_id: ID = channel.remote_id
        self.core = Yamux(channel.initiator, limits, trio.current_time(), channel.round_trip_seconds)
        self.failure: str | None = None
        self.closed = trio.Event()
        self.event_started = trio.Event()
        self._on_stream = on_stream or self.offer
        self._on_fault = on_fault
        self._on_closed = on_closed
        self._streams: dict[int, MuxedStream] = {}
        self._unsent: memoryview | None = None  # sealed, and not all of it taken by the kernel yet
        self._writer_wanted = trio.Event()
        self._waiting_for_writer = trio.lowlevel.ParkingLot()
        self._flushes = 0
        self._give_stream, self._take_stream = trio.open_memory_channel[MuxedStream](1024)

    # --- running ---

    async def start(self) -> None:
        """Read and write until the connection ends; every stream is reset then."""
        reason = "the connection ended"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_loop)
                self.event_started.set()
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
            for event in self.core.receive(data, trio.current_time()):
                self._handle(event)
            if self.core.has_data_to_send:
                self.flush_now()

    def _handle(self, event: Event) -> None:
        what, state = event
        if state is None:
            return  # the peer goes away: it will close
        if what is Happening.OPENED:
            self._on_stream(self._new_stream(state))
        elif (stream_or_none := self._streams.get(state.id)) is not None:
            if what is Happening.READABLE:
                stream_or_none.wake_readers()
            elif what is Happening.WRITABLE:
                stream_or_none.wake_writers()
            else:
                stream_or_none.wake()

    # --- sending ---

    @property
    def can_send_now(self) -> bool:
        """True if nothing waits before us."""
        return self._unsent is None and not self.is_closed

    def queue(self, stream: MuxedStream, data: bytes) -> None:
        """Send a short message with the next flush.  It must be within a chunk and the stream's credit."""
        self.raise_if_closed()
        if self.core.send(stream.state, memoryview(data)) != len(data):
            raise LocalProtocolError(f"{len(data)} bytes to queue on {stream.state}")

    def flush_now(self) -> None:
        """Send what is queued, as far as the kernel takes it now; the rest is left to the writing task."""
        if self._unsent is not None or self.closed.is_set():
            return
        while self.core.has_data_to_send:
            sealed = memoryview(self.channel.seal(self.core.data_to_send()))
            try:
                taken = self.channel.link.send_now(sealed)
            except PeerGone as gone:
                self.close_now(str(gone))
                return
            if taken < len(sealed):
                self._unsent = sealed[taken:]
                self._writer_wanted.set()
                return

    async def flush(self) -> None:
        """Send what is queued now, waiting until the kernel has taken it.  Raises PeerGone."""
        self.flush_now()
        if self._unsent is None:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            # what is being written, and then what is queued behind it
            goal = self._flushes + (2 if self.core.has_data_to_send else 1)
            while self._flushes < goal and not self.closed.is_set():
                await self._waiting_for_writer.park()
        self.raise_if_closed()

    async def _write_loop(self) -> None:
        while True:
            await self._writer_wanted.wait()
            self._writer_wanted = trio.Event()
            while self._unsent is not None:
                await self.channel.link.send(self._unsent)
                self._unsent = None
                self._flushes += 1
                self._waiting_for_writer.unpark_all()
                if self.core.has_data_to_send:
                    self._unsent = memoryview(self.channel.seal(self.core.data_to_send()))

    # --- streams ---

    def open(self) -> MuxedStream:
        """A new stream.  Raises PeerGone."""
        self.raise_if_closed()
        return self._new_stream(self.core.open())

    def offer(self, stream: MuxedStream) -> None:
        """Leave a stream that the peer opened to whoever calls `accept_stream`."""
        try:
            self._give_stream.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            stream.reset_now()

    @property
    def inbound_streams(self) -> int:
        """How many streams of the peer's were let in and are open."""
        return sum(stream.let_in and not stream.is_closed() for stream in self._streams.values())

    def _new_stream(self, state: Stream) -> MuxedStream:
        if len(self._streams) > 2 * self.core.streams + 16:  # now and then, so that none is kept for ever
            self._streams = {i: stream for i, stream in self._streams.items() if not stream.is_closed()}
        stream = self._streams[state.id] = MuxedStream(self, state)
        return stream

    # --- ending ---

    def raise_if_closed(self) -> None:
        """Raises PeerGone once the connection has ended."""
        if self.closed.is_set():
            raise PeerGone(self.failure or "the connection ended")

    def close_now(self, reason: str) -> None:
        """End it: every stream is reset, and whoever waits is told why.  Twice does no harm."""
        if self.closed.is_set():
            return
        self.failure = reason
        self.closed.set()
        self.channel.link.close()
        for stream in self._streams.values():
            stream.state.is_reset = stream.state.is_reset or not stream.is_closed()
            stream.wake()
        self._streams.clear()
        self._waiting_for_writer.unpark_all()
        self._give_stream.close()
        if self._on_closed is not None:
            self._on_closed(self)

    async def close(self) -> None:
        """Say goodbye, and end it."""
        if not self.closed.is_set():
            self.core.go_away()
            self.flush_now()
            self.close_now("the connection was closed on this side")

    # --- what else py-libp2p wants of it ---

    async def open_stream(self) -> MuxedStream:
        """As `open`, with py-libp2p's error."""
        try:
            return self.open()
        except PeerFault as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> MuxedStream:
        """The next stream that was offered."""
        try:
            return await self._take_stream.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise MuxedConnUnavailable(self.failure or "the connection ended") from None

    @property
    def is_initiator(self) -> bool:
        """True if we dialled."""
        return self.channel.initiator

    @property
    def is_established(self) -> bool:
        """True while streams can be opened."""
        return self.event_started.is_set() and not self.closed.is_set()

    @property
    def is_closed(self) -> bool:
        """True once it has ended."""
        return self.closed.is_set()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the other end."""
        return self.channel.link.remote

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The other end's address, in a list."""
        remote = self.get_remote_address()
        if remote is None:
            return []
        host, port = remote
        return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host.partition('%')[0]}/tcp/{port}")]

    def get_connection_type(self) -> ConnectionType:
        """Never through a relay."""
        return ConnectionType.DIRECT


def _first(group: BaseExceptionGroup[Any]) -> PeerFault:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, PeerFault):
        raise error
    return error
