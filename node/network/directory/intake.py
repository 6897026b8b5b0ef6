"""Records on their way in: how many a neighbour may send, which are verified, and which are passed on.

The neighbours of our own configuration may send a whole view at once, and what they pass on is passed on at
once.  Any other neighbour has a budget, and its new peers wait until they were met or until it is their turn
(`routing.view.newcomers`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import trio

from node.network.directory.live_view import LiveView
from node.network.directory.met import Met
from node.network.directory.neighbour import Budget, Budgets, Neighbour
from node.network.prefixes import sharer
from routing.names import PeerId, peer_id_of
from routing.view.newcomers import Newcomers
from routing.view.records import NOBODY, Record, RecordError, signer, verify_record
from routing.view.view import Arrival
from tensor_codec.errors import PeerFault
from tensor_codec.limits import Limits

FAULTS_BEFORE_DROP = 3
COPY_COST = 0.05  # of a record's: it is compared, not verified


class ChargingHost(Protocol):
    """The part of `node.network.host.Host` that an intake needs."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    def charge(self, who: str, fault: PeerFault, *, bans: bool = True) -> None:
        """Count a peer's fault.  bans: False where an honest peer may commit it."""

    def sign_of_life(self, names: Iterable[str]) -> None:
        """These peers and multiaddrs may be back."""


class Intake:
    """Verifies records and merges them into the view.

    trusted: neighbours of our own configuration.  met: peers that this node has been connected to.
    own_record: called with a peer's record of us that we did not announce, and that peer.
    """

    def __init__(
        self,
        host: ChargingHost,
        view: LiveView,
        limits: Limits,
        *,
        trusted: Collection[PeerId],
        met: Met,
        own_record: Callable[[Record, PeerId], None],
        rng: random.Random,
    ) -> None:
        self._host = host
        self._view = view
        self._limits = limits
        self._trusted = trusted
        self._met = met
        self._own_record = own_record
        self._budgets = Budgets(limits)
        self._newcomers = Newcomers(
            limits.new_peers_per_neighbour_per_second, limits.new_peers_per_neighbour_burst, rng
        )

    @property
    def withheld(self) -> Collection[PeerId]:
        """The peers whose records are not passed on yet."""
        return self._newcomers.waiting

    def budget_of(self, neighbour: Neighbour) -> Budget:
        """The neighbour's budget, which outlives its stream."""
        peer = neighbour.peer
        return self._budgets.of(peer, neighbour.prefix, whole_view=peer in self._trusted)

    async def take(self, neighbour: Neighbour, items: Sequence[tuple[bytes, float]]) -> Sequence[PeerId]:
        """Verify and take in the records of one frame; returns the peers to pass on.

        A neighbour that sends more than its budget is read more slowly: its own stream fills up.  A few bad
        records are only counted.  Raises RecordError after those.
        """
        new = [(wire, age) for wire, age in items if not self._is_known(wire)]
        cost = len(new) + COPY_COST * (len(items) - len(new))
        await trio.sleep(self.budget_of(neighbour).records_due(cost, trio.current_time()))
        arrivals = []
        for wire, age in new:
            arrival = self._verify(neighbour, wire, age)
            if arrival is not None:
                arrivals.append(arrival)
            await trio.lowlevel.checkpoint()  # a signature takes a good part of a millisecond
        return self._merge(neighbour, arrivals)

    def release(self) -> list[PeerId]:
        """The peers whose turn it is to be passed on."""
        return self._newcomers.release(
            self._met.__contains__, self._view.view().entries.keys(), trio.current_time()
        )

    def _is_known(self, wire: bytes) -> bool:
        """Several neighbours send the same record: the copies cost no signature check."""
        known = self._view.view().entries.get(_claimed_peer(wire))
        return known is not None and known.wire == wire

    def _verify(self, neighbour: Neighbour, wire: bytes, age: float) -> Arrival | None:
        try:
            record = verify_record(wire, swarm=self._view.swarm, limits=self._limits)
        except RecordError as error:
            neighbour.faults += 1
            if neighbour.faults >= FAULTS_BEFORE_DROP:
                raise
            self._host.charge(neighbour.peer, error)
            return None
        known = self._view.view().entries.get(record.peer)
        if record.peer == self._host.peer_id:
            self._own_record(record, neighbour.peer)
        elif known is not None and record.seq < known.record.seq:
            neighbour.owe([record.peer])  # they do not know the newer one
        else:
            return Arrival(record, wire, age, neighbour.peer)
        return None

    def _merge(self, neighbour: Neighbour, arrivals: Sequence[Arrival]) -> Sequence[PeerId]:
        before = self._view.view().entries
        changed = self._view.merge(arrivals, self._met)
        for peer in changed:
            self._host.sign_of_life([peer, *self._view.addresses(peer)])
        if neighbour.peer in self._trusted:
            return changed
        unmet = [peer for peer in changed if peer not in before and peer not in self._met]
        lane = sharer(neighbour.peer, neighbour.prefix)
        waiting = set(unmet).difference(self._newcomers.arrive(unmet, lane, trio.current_time()))
        return [peer for peer in changed if peer not in waiting and peer not in self._newcomers.waiting]


def _claimed_peer(wire: bytes) -> PeerId:
    key = signer(wire)
    return peer_id_of(key) if key else NOBODY
