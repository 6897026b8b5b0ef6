"""Small working stand-ins for sockets and hosts, over memory, for tests on a clock that jumps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing

from node.network.budgets.large_frames import LargeFrames
from node.network.streams import FramedStream
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import Identity, identity_of
from node.network.transport.upgrade import Upgrade
from node.network.transport.yamux_limits import YamuxLimits
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.limits import Limits

ALICE: Identity = identity_of(bytes(31) + b"a")
BOB: Identity = identity_of(bytes(31) + b"b")


def memory_framed_pair(
    limits: Limits | None = None,
    *,
    protocol: str = "/raceme/test/1",
    peers: tuple[PeerId, PeerId] = (ALICE.peer_id, BOB.peer_id),
    lockstep: bool = False,
) -> tuple[FramedStream, FramedStream]:
    """Two ends of one framed stream.  Each end's `peer` is the other one: the first end is of `peers[0]`.

    lockstep: a send waits until the other end reads, as over a network that has no room left.
    """
    pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
    first, second = pair()
    return (
        FramedStream(first, peers[1], protocol, limits),
        FramedStream(second, peers[0], protocol, limits),
    )


class MemoryLink:
    """A link over one end of a memory stream pair; every write waits."""

    remote: tuple[str, int] | None = None
    relayed_by: PeerId | None = None

    def __init__(self, stream: trio.StapledStream) -> None:
        self._stream = stream

    async def receive_into(self, buffer: memoryview) -> int:
        try:
            data = await self._stream.receive_some(len(buffer))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerGone("the connection broke") from error
        buffer[: len(data)] = data
        return len(data)

    def send_now(self, data: memoryview) -> int:
        return 0

    async def send(self, data: memoryview) -> None:
        try:
            await self._stream.send_all(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerGone("the connection broke") from error

    def close(self) -> None:
        self._stream.send_stream.close()
        self._stream.receive_stream.close()


def memory_link_pair(lockstep: bool = False) -> tuple[MemoryLink, MemoryLink]:
    """Two ends of one connection."""
    pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
    first, second = pair()
    return MemoryLink(first), MemoryLink(second)


@asynccontextmanager
async def connection_pair(
    *,
    limits: YamuxLimits | None = None,
    links: tuple[MemoryLink, MemoryLink] | None = None,
    on_stream: Callable[[MuxedStream], None] | None = None,
    on_fault: Callable[[PeerFault], None] | None = None,
    large_frames: LargeFrames | None = None,
) -> AsyncIterator[tuple[Connection, Connection]]:
    """Alice's connection to Bob, dialled by Alice, and Bob's to her, both running.

    limits, on_stream, on_fault, large_frames: of Bob.
    """
    to_bob, to_alice = links or memory_link_pair()
    connections: list[Connection] = []

    async def dial() -> None:
        channel = await Upgrade(ALICE, None, Limits()).outbound(to_bob, BOB.peer_id, "here")
        connections.insert(0, Connection(channel))

    async def accept() -> None:
        channel = await Upgrade(BOB, None, Limits()).inbound(to_alice)
        connections.append(
            Connection(channel, limits, on_stream=on_stream, on_fault=on_fault, large_frames=large_frames)
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        nursery.start_soon(accept)
    alice, bob = connections
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.run)
            await connection.started.wait()
        yield alice, bob
        for connection in connections:
            connection.close_now("the test is over")
        nursery.cancel_scope.cancel()
