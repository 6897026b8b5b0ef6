"""All of relaying on one host: the relay, the end of circuits, reservations, punches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from node.network.budgets.fair_rate import FairRate
from node.network.relaying.circuits import Circuits
from node.network.relaying.hop import Relay
from node.network.relaying.keeping import Keeper
from node.network.relaying.punching import Punching
from node.network.relaying.reservations import RelayTable
from node.network.relaying.stop import StopListener
from node.network.transport.connection import Connection
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between two looks at circuits that are not in use
BESIDE_DIRECT_SECONDS = 10.0  # a circuit without a stream, next to a direct connection
UNUSED_SECONDS = 60.0  # any circuit without a stream


@dataclass(slots=True)
class Relaying:
    """What a host does about relays.

    relay: None where this node carries nothing for others.
    """

    circuits: Circuits
    stop: StopListener
    keeper: Keeper
    punching: Punching
    relay: Relay | None = None
    idle: CircuitsInUse = field(default_factory=lambda: CircuitsInUse())

    async def run(self, nursery: trio.Nursery, connections: Callable[[], Iterable[Connection]]) -> None:
        """Keep reservations, look for direct ways, and close unused circuits; until cancelled."""
        self.stop.on_circuit = partial(nursery.start_soon, self.punching.improve)
        nursery.start_soon(self.keeper.run)
        while True:
            await trio.sleep(LOOK_SECONDS)
            for circuit in self.idle.unused(list(connections()), trio.current_time()):
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


def make_relay(
    limits: Limits,
    most: int,
    direct: Callable[[str], Connection | None],
    addresses: Callable[[], Sequence[str]],
) -> Relay:
    """A relay for so many peers.  direct: a peer's direct connection.  addresses: with /p2p/ID."""
    table = RelayTable(limits, most, lambda peer: direct(peer) is not None)
    rate = FairRate(limits.relay_bytes_per_second, limits.relay_burst_bytes)
    return Relay(limits, table, rate, direct, addresses)


