"""The project's own transport without its manners: raw sockets, whole connections, frames of any kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from node.network.streams import FramedStream
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import Identity
from node.network.transport.link import SocketLink
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from node.network.transport.yamux import HEADER
from node.network.transport.yamux_limits import YamuxLimits
from tensor_codec.errors import PeerGone
from tensor_codec.limits import MIB, Limits
from tests.hostile.stage import Stage, Target, new_identity

HANDSHAKE_SECONDS = 10.0
PATIENT = Limits(reply_taken_seconds=3600.0)
# An attacker forgives its victim everything.
LENIENT = YamuxLimits(
    max_inbound_streams=10_000, max_unread_bytes=256 * MIB, opens_per_second=1e9, max_control_bytes=256 * MIB
)


async def socket_to(stage: Stage, target: Target | None = None) -> trio.SocketStream:
    """A TCP connection and nothing more.  Raises OSError."""
    target = target or stage.target
    return await trio.open_tcp_stream(target.host, target.port, local_address=stage.source() or None)


async def channel_to(
    stage: Stage, identity: Identity | None = None, target: Target | None = None
) -> SecureChannel:
    """A secured channel on which yamux was agreed, of a throw-away id.  Raises PeerGone, OSError."""
    target = target or stage.target
    link = SocketLink(await socket_to(stage, target), 10.0)
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            upgrade = Upgrade(identity or new_identity(), None, Limits())
            return await upgrade.outbound(link, target.peer, target.address)
    except trio.TooSlowError:
        link.close()
        raise PeerGone("no handshake in time") from None
    except BaseException:
        link.close()
        raise


@asynccontextmanager
async def connection_to(
    stage: Stage, identity: Identity | None = None, target: Target | None = None
) -> AsyncIterator[Connection]:
    """A running connection, closed without a word at the end.  Raises PeerGone, OSError."""
    connection = Connection(await channel_to(stage, identity, target), LENIENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        try:
            await connection.started.wait()
            yield connection
        finally:
            connection.close_now("the attack is over")
            nursery.cancel_scope.cancel()


def stream_of(connection: Connection, protocol: str) -> MuxedStream:
    """A stream on which a protocol is proposed.  Raises PeerGone."""
    stream = connection.open()
    stream.propose(protocol)
    connection.flush_now()
    return stream


def framed(connection: Connection, protocol: str) -> FramedStream:
    """The same, for whole frames."""
    return FramedStream(stream_of(connection, protocol), connection.peer, protocol, PATIENT)


class RawMux:
    """Frames of yamux in any order, without an account of anything."""

    def __init__(self, channel: SecureChannel) -> None:
        self.channel = channel
        self._next_id = 1

    async def frames(self, *frames: tuple[int, int, int, int, bytes]) -> None:
        """Send frames: kind, flags, stream, length as announced, and a body.  Raises PeerGone."""
        await self.channel.send(
            b"".join(
                HEADER.pack(0, kind, flags, stream, size) + body for kind, flags, stream, size, body in frames
            )
        )

    def new_id(self) -> int:
        """The id of a stream that we open."""
        self._next_id += 2
        return self._next_id - 2

    async def drain(self) -> None:
        """Read and forget what comes, until the end.  Raises PeerGone."""
        while await self.channel.receive():
            pass
        raise PeerGone("the connection was closed by the other side")


@asynccontextmanager
async def raw_mux(stage: Stage) -> AsyncIterator[RawMux]:
    """A connection whose answers are thrown away.  Raises PeerGone, OSError, and these in groups."""
    channel = await channel_to(stage)
    async with trio.open_nursery() as nursery:
        mux = RawMux(channel)
        nursery.start_soon(mux.drain)
        try:
            yield mux
        finally:
            channel.link.close()
            nursery.cancel_scope.cancel()
