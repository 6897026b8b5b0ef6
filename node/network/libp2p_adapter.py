"""Our connections and streams under py-libp2p's interfaces, for its identify alone.

Each call is passed on; only the errors become py-libp2p's own.
"""

from __future__ import annotations

from types import TracebackType

from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset
from multiaddr import Multiaddr

from node.network.transport.connection import Connection, MuxedStream
from tensor_codec.errors import LocalProtocolError, PeerFault


class Libp2pStream(IMuxedStream):  # type: ignore[misc]  # py-libp2p has no types
    """One stream, for py-libp2p.  Reads end after `max_bytes`: its handlers collect what they read."""

    def __init__(self, muxed_conn: Libp2pConnection, stream: MuxedStream, max_bytes: int) -> None:
        self.muxed_conn = muxed_conn
        self._stream = stream
        self._bytes_left = max_bytes

    @property
    def protocol(self) -> str | None:
        """The protocol agreed with the peer; None before."""
        return self._stream.protocol

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` of the next bytes.  Raises MuxedStreamReset, and MuxedStreamEOF at the end."""
        most = self._bytes_left + 1
        try:
            data = await self._stream.receive_some(most if n is None else min(n, most))
        except PeerFault as error:
            raise MuxedStreamReset(str(error)) from error
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            self._stream.reset_now()
            raise MuxedStreamReset("the peer sent more than such a stream may carry")
        if not data and n != 0:
            raise MuxedStreamEOF("the peer ended the stream")
        return data

    async def write(self, data: bytes) -> None:
        """Send all bytes.  Raises MuxedStreamReset."""
        try:
            await self._stream.send_all(data)
        except (PeerFault, LocalProtocolError) as error:
            raise MuxedStreamReset(str(error)) from error

    async def close(self) -> None:
        """End our side, and discard the peer's further bytes."""
        await self._stream.aclose()

    async def close_write(self) -> None:
        """End our side; the peer may still send."""
        await self._stream.send_eof()

    async def reset(self) -> None:
        """End both sides at once."""
        self._stream.reset_now()

    def is_closed(self) -> bool:
        """True once both sides have ended, or after a reset."""
        return self._stream.is_closed()

    def set_deadline(self, ttl: int) -> None:
        """Ignored: each of our waits has a deadline of its own."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> Libp2pStream:
        """Itself; the end of the block closes it."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()


class Libp2pConnection(IMuxedConn):  # type: ignore[misc]  # py-libp2p has no types
    """One connection, for py-libp2p.  max_stream_bytes: that the peer may send on one stream."""

    def __init__(self, connection: Connection, max_stream_bytes: int) -> None:
        self._connection = connection
        self._max_stream_bytes = max_stream_bytes
        self.peer_id: ID = connection.channel.remote_id
        self.event_started = connection.started

    async def start(self) -> None:
        """Run the connection until it ends."""
        await self._connection.run()

    async def open_stream(self) -> Libp2pStream:
        """A new stream.  Raises MuxedConnUnavailable."""
        try:
            return Libp2pStream(self, self._connection.open(), self._max_stream_bytes)
        except PeerFault as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> Libp2pStream:
        """The next stream for one of py-libp2p's own protocols.  Raises MuxedConnUnavailable."""
        try:
            return Libp2pStream(self, await self._connection.accept(), self._max_stream_bytes)
        except PeerFault as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def close(self) -> None:
        """Send a goodbye, and end the connection."""
        await self._connection.close()

    @property
    def is_initiator(self) -> bool:
        """True if this node dialled."""
        return self._connection.is_initiator

    @property
    def is_established(self) -> bool:
        """True while streams can be opened."""
        return self._connection.is_established

    @property
    def is_closed(self) -> bool:
        """True once the connection has ended."""
        return self._connection.closed.is_set()

    @property
    def prefix(self) -> str:
        """The network prefix of the peer's address."""
        return self._connection.prefix

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the other end."""
        return self._connection.channel.link.remote

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The other end's address, in a list."""
        remote = self.get_remote_address()
        if remote is None:
            return []
        host, port = remote
        return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host.partition('%')[0]}/tcp/{port}")]

    def get_connection_type(self) -> ConnectionType:
        """Through a relay, or direct."""
        relayed = self._connection.relayed_by is not None
        return ConnectionType.RELAYED if relayed else ConnectionType.DIRECT
