"""Peers over memory links that relay to each other: the streams and handshakes are real, no socket is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from node.network.budgets.fair_rate import FairRate
from node.network.relaying.circuits import Circuits
from node.network.relaying.hop import Relay
from node.network.relaying.messages import HOP_PROTOCOL, STOP_PROTOCOL
from node.network.relaying.reservations import RelayTable
from node.network.relaying.stop import StopListener
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import Identity
from node.network.transport.link import Link
from node.network.transport.multistream import Dialogue, negotiate
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.limits import Limits
from tests.fakes import memory_link_pair

ECHO = "/raceme/test-echo/1"
ByteHandler = Callable[[MuxedStream, PeerId, str], Awaitable[None]]


@dataclass(eq=False)
class Peer:
    """A peer: it relays, and is relayed to.

    faults: with which it was charged.  circuits_in: connections that came to it through a relay.
    """

    identity: Identity
    nursery: trio.Nursery
    limits: Limits = field(default_factory=Limits)
    swarm_key: bytes | None = None
    prefix: str = "198.18.1.1/32"
    wanted: bool = True  # it has asked every relay to relay to it
    connections: list[Connection] = field(default_factory=list)
    circuits_in: list[Connection] = field(default_factory=list)
    faults: list[tuple[str, PeerFault]] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = self.limits
        self.upgrade = Upgrade(self.identity, self.swarm_key, limits)
        self.circuits = Circuits(limits, self.upgrade, self.add)
        self.table = RelayTable(
            limits, limits.max_reservations, lambda peer: self.direct(PeerId(peer)) is not None
        )
        rate = FairRate(limits.relay_bytes_per_second, limits.relay_burst_bytes)
        self.relay = Relay(
            limits, self.table, rate, self.direct, wall_clock=lambda: 1000.0 + trio.current_time()
        )
        self.stop = StopListener(
            limits,
            self.upgrade,
            self.add,
            self.charge,
            is_reserved_at=lambda _: self.wanted,
            on_circuit=self.circuits_in.append,
        )
        self.handlers: dict[str, ByteHandler] = {
            HOP_PROTOCOL: self.relay.serve,
            STOP_PROTOCOL: self.stop.serve,
            ECHO: echo,
        }

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    def charge(self, who: str, fault: PeerFault, *, bans: bool = True) -> None:
        self.faults.append((who, fault))

    def direct(self, peer: PeerId) -> Connection | None:
        alike = (each for each in self.connections if each.peer == peer and each.relayed_by is None)
        return next((each for each in alike if each.is_established), None)

    def to(self, peer: Peer) -> Connection:
        """The direct connection to a peer."""
        found = self.direct(peer.peer_id)
        assert found is not None
        return found

    async def add(self, channel: SecureChannel) -> Connection:
        made = Connection(
            channel,
            on_stream=lambda stream: self.nursery.start_soon(self._serve, stream),
            on_fault=lambda fault: self.charge(channel.remote, fault),
        )
        self.connections.append(made)
        self.nursery.start_soon(made.run)
        await made.started.wait()
        return made

    async def _serve(self, stream: MuxedStream) -> None:
        peer = stream.connection.peer
        try:
            dialogue = Dialogue(stream.receive_some, stream.send_all)
            protocol = await negotiate(dialogue, self.handlers.__contains__)
            await dialogue.flush()
            if protocol is not None:
                await self.handlers[protocol](stream, peer, self.prefix)
            await stream.aclose()
        except PeerFault as fault:
            stream.reset_now()
            self.charge(peer, fault)


async def echo(stream: MuxedStream, peer: PeerId, prefix: str) -> None:
    while data := await stream.receive_some(65_536):
        await stream.send_all(data)
    await stream.send_eof()


async def connect(one: Peer, other: Peer, links: tuple[Link, Link] | None = None) -> None:
    """A direct connection, dialled by the first."""
    near, far = links or memory_link_pair()

    async def accept() -> None:
        await other.add(await other.upgrade.inbound(far))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await one.add(await one.upgrade.outbound(near, other.peer_id, "here"))


async def ask(peer: Peer, relay: Peer, question: bytes, protocol: str = HOP_PROTOCOL) -> MuxedStream:
    """A stream with a question on it."""
    stream = peer.to(relay).open()
    stream.propose(protocol)
    await stream.send_all(question)
    return stream


async def receive_exactly(stream: MuxedStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            raise PeerGone(f"the end after {len(data)} of {size} bytes")
        data += more
    return data
