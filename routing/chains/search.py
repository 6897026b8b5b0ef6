"""The cheapest chain: which peers compute which blocks of one step, in which order.

Data goes client -> first hop -> ... -> last hop -> client, so a step costs

    rtt(client, first) / 2 + compute at each hop + rtt(hop, next hop) / 2 ... + rtt(last, client) / 2
    compute = blocks used * seconds per block * (1 + steps waiting there)

This is a shortest path over (peer, block boundary), as in Petals (arXiv:2312.08361, 3.2), and with the
delays between servers: Petals needs none, since each of its hops answers the client.  Where a relay carries
the data, the relay's rate adds to a delay: a prompt of 1,000 positions of 8 KiB takes 1.3 s at 50 Mbit/s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from routing.blocks import Blocks, gaps
from routing.chains.distances import CLIENT, DEFAULT_RTT_SECONDS, Distances
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import believed_rates

__all__ = ["DEFAULT_RTT_SECONDS", "Chain", "CostInputs", "Costs", "Hop", "NoChain", "cheapest_chain", "costs"]


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of each part of a chain, in seconds.

    block: one step through one block of a peer, the peer's queue included.
    distances: between peers, and from the client.
    carrying: of the step's hidden states to or from a relayed peer.
    """

    block: Mapping[PeerId, float]
    distances: Distances
    carrying: Mapping[PeerId, float] = field(default_factory=dict)

    def client(self, peer: PeerId) -> float:
        """One way between the client and a peer."""
        return self.distances.between(CLIENT, peer) / 2 + self.carrying.get(peer, 0.0)

    def between(self, one: PeerId, other: PeerId) -> float:
        """One way between two peers."""
        carrying = max(self.carrying.get(one, 0.0), self.carrying.get(other, 0.0))
        return self.distances.between(one, other) / 2 + carrying

    def chain(self, hops: Sequence[Hop]) -> float:
        """A whole step along these hops, from the client and back."""
        compute = sum((hop.stop - hop.start) * self.block[hop.peer] for hop in hops)
        between = sum(self.between(one.peer, two.peer) for one, two in pairwise(hops))
        return self.client(hops[0].peer) + compute + between + self.client(hops[-1].peer)


@dataclass(frozen=True, slots=True)
class CostInputs:
    """A client's knowledge of a step's costs besides the peers' records.

    client_rtt: seconds from the client to a peer and back; ignored where `distances` are given.
    measured: seconds per block of a peer's steps as the client has seen them, queueing included.
    waiting: the client's own steps on their way to a peer, not counted in its record yet: with many at a
        time they spread over peers that hold the same blocks.
    positions: in a step, of all rows; 1 is a decode step, more go at the rate of a prefill.
    carrying: seconds that the step's hidden states take through the relays of a peer, beyond the round trip;
        none of a peer that is reached directly.
    distances: up to date with at least these peers; None: worked out from the records and `client_rtt`.
    default_rtt: between peers without a known distance; ignored where `distances` are given.
    """

    client_rtt: Mapping[PeerId, float] = field(default_factory=dict)
    measured: Mapping[PeerId, float] = field(default_factory=dict)
    waiting: Mapping[PeerId, int] = field(default_factory=dict)
    positions: int = 1
    carrying: Mapping[PeerId, float] = field(default_factory=dict)
    distances: Distances | None = None
    default_rtt: float = DEFAULT_RTT_SECONDS

    def all_distances(self, spans: Sequence[Record]) -> Distances:
        """The distances given, else those that follow from these records and `client_rtt`."""
        if self.distances is not None:
            return self.distances
        distances = Distances(self.default_rtt)
        distances.update(spans, self.client_rtt)
        return distances


RECORDS_ALONE = CostInputs()


def costs(spans: Sequence[Record], known: CostInputs = RECORDS_ALONE) -> Costs:
    """The costs that follow from these peers' records and the client's own measurements.

    A measurement replaces the record's rate and queue.
    """
    measured, waiting = known.measured, known.waiting
    rates = believed_rates(spans, measured, known.positions)
    queued = {s.peer: (0 if s.peer in measured else s.queue) + waiting.get(s.peer, 0) for s in spans}
    block = {s.peer: rates[s.peer] * (1 + queued[s.peer]) for s in spans}
    return Costs(block, known.all_distances(spans), known.carrying)


def cheapest_chain(
    spans: Sequence[Record],
    blocks: int,
    *,
    part: Blocks | None = None,
    known: CostInputs = RECORDS_ALONE,
    excluded: Collection[PeerId] = (),
    most_hops: int | None = None,
    cost_factors: Mapping[PeerId, float] | None = None,
) -> Chain:
    """The chain over a model of `blocks` blocks with the least expected seconds per step.

    spans: records of one model revision that take new sessions, as `SwarmView.spans` gives them.
    part: the blocks that the chain is to cover; None: all.
    excluded: peers not to be used, for instance because they have just failed.
    most_hops: longer chains are not chosen; the search takes that many times as long.
    cost_factors: on a block's cost at a peer, for the choice only: see `routing.chains.load_sharing`.

    Ties break on the peer's id, in any order of `spans`.  A peer appears once: where the
    cheapest walk would leave a peer and come back, the chain stays with it instead.
    O(blocks * peers of one block ** 2), and the time of `Distances.update`.
    Raises NoChain; ValueError for a part that is no part of the model.
    """
    wanted = Blocks(0, blocks) if part is None else part
    if not Blocks(0, blocks).contains(wanted):
        raise ValueError(f"blocks {wanted} are no part of a model of {blocks}")
    usable = sorted((s for s in spans if s.peer not in excluded), key=lambda s: s.peer)
    parts = [Hop(s.peer, max(s.start, wanted.start), min(s.stop, wanted.stop)) for s in usable]
    parts = [part for part in parts if part.start < part.stop]
    if missing := gaps(parts, wanted):
        left_out = sum(s.peer in excluded for s in spans)
        raise NoChain(missing, blocks, alone=not parts, excluded=left_out)
    true_costs = costs(usable, replace(known, distances=known.all_distances(spans)))
    weighted = true_costs
    if cost_factors:
        weighted = replace(true_costs, block=_times(true_costs.block, cost_factors))
    walk = _Walks(parts, wanted, weighted, most_hops).cheapest()
    if not walk:
        raise NoChain([wanted], blocks, alone=False, most_hops=most_hops)
    hops = _each_peer_once(walk)
    return Chain(hops, true_costs.chain(hops))


def _times(seconds: Mapping[PeerId, float], factors: Mapping[PeerId, float]) -> dict[PeerId, float]:
    return {peer: cost * factors.get(peer, 1.0) for peer, cost in seconds.items()}


class _Walks:
    """Dynamic programming from block to block; `parts` cover the blocks `wanted` and lie within them.

    A walk is the cheapest way to compute all blocks before a given one, with a given last peer and, where
    hops are counted, a given number of hops.  Kept are only the walks' costs, and whether a walk stayed with
    its last peer: the few changes of peer in the cheapest walk are found again from its end.
    """

    def __init__(self, parts: Sequence[Hop], wanted: Blocks, price: Costs, most_hops: int | None) -> None:
        self._peers = [part.peer for part in parts]
        self._start, self._blocks = wanted.start, wanted.size
        self._counted = most_hops is not None
        self._seconds = price.distances.seconds
        self._rows = price.distances.rows(self._peers)
        self._to_client = self._seconds[self._rows, price.distances.rows([CLIENT])] / 2
        self._carrying = np.array([price.carrying.get(peer, 0.0) for peer in self._peers])
        self._to_client += self._carrying
        self._block = np.array([price.block[peer] for peer in self._peers])
        begin, end = np.array([part.start for part in parts]), np.array([part.stop for part in parts])
        self._holders = [np.flatnonzero((begin <= block) & (block < end)) for block in range(*wanted)]
        counts = 1 if most_hops is None else max(0, min(most_hops, self._blocks))
        self._costs = np.full((self._blocks, counts, len(parts)), np.inf)
        self._stayed = np.zeros(self._costs.shape, dtype=np.bool_)
        self._walk()

    def _walk(self) -> None:
        first = self._holders[0]
        self._costs[0, :1, first] = (self._to_client[first] + self._block[first])[:, None]
        for block in range(1, self._blocks):
            before, holders = self._holders[block - 1], self._holders[block]
            stay = self._costs[block - 1][:, holders]
            over = (self._one_hop_less(block - 1)[:, before, None] + self._way(before, holders)).min(axis=1)
            self._costs[block][:, holders] = np.minimum(stay, over) + self._block[holders]
            self._stayed[block][:, holders] = stay <= over

    def _one_hop_less(self, block: int) -> NDArray[np.float64]:
        """The costs of walks that one more hop can be added to, by hops."""
        costs: NDArray[np.float64] = self._costs[block]
        return np.vstack((np.full_like(costs[:1], np.inf), costs[:-1])) if self._counted else costs

    def _way(self, one: NDArray[np.intp], other: NDArray[np.intp]) -> NDArray[np.float64]:
        """Seconds from each of some peers to each of others, one way."""
        way: NDArray[np.float64] = self._seconds[self._rows[one][:, None], self._rows[other]] / 2
        if self._carrying.any():  # between two relayed peers one relay carries it
            way += np.maximum(self._carrying[one][:, None], self._carrying[other])
        return way

    def cheapest(self) -> list[Hop]:
        """The hops of the cheapest walk; none where all walks have too many.

        Among equals the walk with the fewest hops, where hops are counted, then the lowest peer ids from the
        end on.
        """
        last = self._holders[-1]
        whole = self._costs[-1][:, last] + self._to_client[last]
        if not np.isfinite(whole).any():
            return []
        count, place = (int(each) for each in np.unravel_index(np.argmin(whole), whole.shape))
        peer, hops, stop = last[place], list[Hop](), self._blocks
        for block in range(self._blocks - 1, -1, -1):
            if block and self._stayed[block, count, peer]:
                continue
            hops.append(Hop(self._peers[peer], self._start + block, self._start + stop))
            stop = block
            if block:
                before = self._holders[block - 1]
                way = self._way(before, np.array([peer]))[:, 0]
                peer = before[np.argmin(self._one_hop_less(block - 1)[count, before] + way)]
                count -= self._counted
        return hops[::-1]


def _each_peer_once(hops: Sequence[Hop]) -> tuple[Hop, ...]:
    """Let a peer that comes twice compute all blocks between as well: its span covers them."""
    kept: list[Hop] = []
    for hop in hops:
        if kept and hop.start < kept[-1].stop:
            continue  # within a hop that was extended
        stop = max(later.stop for later in hops if later.peer == hop.peer)
        kept.append(Hop(hop.peer, hop.start, stop))
    return tuple(kept)
