"""All of relaying on one host: the relay, the end of circuits, reservations, punches."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol

from node.network.addresses import Address
from node.network.budgets.fair_rate import FairRate
from node.network.connection_table import ConnectionTable
from node.network.host import Host
from node.network.relaying.hop import Relay
from node.network.relaying.keeping import Keeper
from node.network.relaying.messages import DCUTR_PROTOCOL, HOP_PROTOCOL, STOP_PROTOCOL
from node.network.relaying.observed import ask_observed
from node.network.relaying.punching import Punching
from node.network.relaying.reservations import RelayTable
from node.network.relaying.stop import StopListener
from node.network.transport.connection import Connection
from node.runtime.nurseries import background_nursery
from routing.names import PeerId

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between two looks at circuits that are not in use
BESIDE_DIRECT_SECONDS = 10.0  # a circuit without a stream, next to a direct connection
UNUSED_SECONDS = 60.0  # any circuit without a stream


@dataclass(slots=True)
class Relaying:
    """What a host does about relays.  Made by `open_relaying`.

    keeper: this node's own reservations.  punching: direct ways next to circuits.
    relay: None where this node carries nothing for others.
    """

    keeper: Keeper
    punching: Punching
    relay: Relay | None = None

    @property
    def relayed_bytes(self) -> int:
        """Carried for others, both ways."""
        return 0 if self.relay is None else self.relay.table.carried_bytes


@asynccontextmanager
async def open_relaying(host: Host, *, reservations: int = 0) -> AsyncIterator[Relaying]:
    """Let a host use relays, and be one, until the end of the block.

    reservations: peers behind NAT that it relays to; 0: it carries nothing for others.
    """
    limits, dialler = host.dialler.circuits.limits, host.dialler
    upgrade, add = dialler.circuits.upgrade, dialler.circuits.add
    keeper = Keeper(limits, dialler.connect_to_relay, is_from_own_port=dialler.ports.are_left_by)
    seen_at = partial(_seen_at, host, keeper)

    def is_direct(peer: PeerId) -> bool:
        return host.connections.live(peer, direct=True) is not None

    punching = Punching(
        limits, upgrade, add, is_direct, seen_at, dialler.dial_from_own_port, dialler.connect_directly
    )
    punching.under_way = dialler.circuits.replacing
    punching.on_direct = dialler.circuits.replaced_by.add
    punching.on_end = lambda circuit: dialler.circuits.settles_at.pop(circuit, None)
    relaying = Relaying(keeper, punching)
    async with background_nursery() as nursery:
        stop = StopListener(
            limits,
            upgrade,
            add,
            host.charge,
            is_reserved_at=keeper.is_reserved_at,
            is_banned=lambda peer: host.faults.banned_seconds(peer) > 0,
            on_circuit=lambda circuit: nursery.start_soon(punching.improve, circuit),
        )
        host.handle_bytes(STOP_PROTOCOL, stop.serve)
        host.handle_bytes(DCUTR_PROTOCOL, punching.serve)
        if reservations:
            relay = relaying.relay = _make_relay(host, reservations)
            host.connections.reserved = relay.table
            host.handle_bytes(HOP_PROTOCOL, relay.serve)
            _name_in_identify(host, HOP_PROTOCOL)
        nursery.start_soon(keeper.run)
        nursery.start_soon(_close_unused, host.connections)
        try:
            yield relaying
        finally:
            stop.on_circuit = lambda _: None  # the host may still be asked while it closes


def _name_in_identify(host: Host, protocol: str) -> None:
    """Let other programs know of a protocol, which they look for in identify; `Host` serves its streams."""

    async def never(stream: INetStream) -> None:
        await stream.reset()

    host.raw.set_stream_handler(TProtocol(protocol), never)


def _make_relay(host: Host, most: int) -> Relay:
    limits, direct = host.dialler.circuits.limits, partial(host.connections.live, direct=True)
    table = RelayTable(limits, most, lambda peer: direct(PeerId(peer)) is not None)
    rate = FairRate(limits.relay_bytes_per_second, limits.relay_burst_bytes)
    return Relay(
        limits, table, rate, direct, lambda: [f"{each}/p2p/{host.peer_id}" for each in host.addresses]
    )


async def _seen_at(host: Host, keeper: Keeper, circuit: Connection) -> Sequence[Address]:
    """The addresses at which others see the port that this node dials from; none where no punch can work.

    Raises PeerFault.
    """
    if keeper.plan.is_symmetric or circuit.relayed_by is None:
        return ()
    if keeper.plan.seen_at:
        return keeper.plan.seen_at
    where = _dialled_at(host.connections, circuit.relayed_by)
    relay = await host.dialler.connect_to_relay(circuit.relayed_by, where)
    if not host.dialler.ports.are_left_by(relay):
        return ()
    address = await ask_observed(relay, host.dialler.circuits.limits.negotiation_seconds)
    return () if address is None else (address,)


async def _close_unused(connections: ConnectionTable) -> None:
    """Close the circuits that are not in use, until cancelled."""
    idle = CircuitsInUse()
    while True:
        await trio.sleep(LOOK_SECONDS)
        for circuit in idle.unused(list(connections), trio.current_time()):
            logger.debug("the circuit of %s is not in use", circuit.peer)
            await circuit.close()


@dataclass(slots=True)
class CircuitsInUse:
    """Notes since when each circuit has no stream."""

    _idle_since: dict[Connection, float] = field(default_factory=dict)

    def unused(self, connections: Sequence[Connection], now: float) -> list[Connection]:
        """The circuits to close: without a stream for a while, sooner next to a direct connection."""
        direct = {each.peer for each in connections if each.relayed_by is None and each.is_established}
        idle = [each for each in connections if each.relayed_by is not None and not each.core.streams]
        self._idle_since = {each: self._idle_since.get(each, now) for each in idle}
        return [
            each
            for each, since in self._idle_since.items()
            if now - since >= (BESIDE_DIRECT_SECONDS if each.peer in direct else UNUSED_SECONDS)
        ]


def _dialled_at(connections: ConnectionTable, peer: PeerId) -> list[str]:
    """The addresses at which we have reached a peer."""
    remotes = [each.channel.link.remote for each in connections.of(peer) if each.is_initiator]
    return [f"/{'ip6' if ':' in each[0] else 'ip4'}/{each[0]}/tcp/{each[1]}" for each in remotes if each]
