"""A circuit as a link: the bytes of a connection, carried by a stream to a relay.

Noise, the proof of membership and yamux run inside it from end to end; the relay sees sealed bytes.
"""

from __future__ import annotations

from node.network.transport.connection import Connection, MuxedStream
from routing.names import PeerId
from tensor_codec.errors import LocalProtocolError, PeerGone


class CircuitLink:
    """A Link over a stream of a relay's connection, after the relay's answer; nobody else uses the stream.

    is_limited: the relay ends it too soon for a session.
    """

    remote: tuple[str, int] | None = None  # the relay's address is not the peer's

    def __init__(self, stream: MuxedStream, *, is_limited: bool = False) -> None:
        self.is_limited = is_limited
        self.relayed_by: PeerId | None = stream.connection.peer
        self._stream = stream
        self._closed = False

    async def receive_into(self, buffer: memoryview) -> int:
        """See Link."""
        self._raise_if_closed()
        data = await self._stream.receive_some(len(buffer))
        self._raise_if_closed()
        buffer[: len(data)] = data
        return len(data)

    def send_now(self, data: memoryview) -> int:
        """See Link."""
        self._raise_if_closed()
        return self._stream.send_some_now(data)

    async def send(self, data: memoryview) -> None:
        """See Link."""
        self._raise_if_closed()
        try:
            await self._stream.send_all(data)
        except LocalProtocolError:
            self._raise_if_closed()  # meanwhile, by another task
            raise

    def close(self) -> None:
        """See Link.  What was sent before still arrives."""
        if not self._closed:
            self._closed = True
            self._stream.close_now()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise PeerGone("the circuit was closed on this side")


def is_limited(connection: Connection) -> bool:
    """Whether a connection is a circuit that its relay ends too soon for a session."""
    link = connection.channel.link
    return isinstance(link, CircuitLink) and link.is_limited
