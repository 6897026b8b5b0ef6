"""The cheapest chain: which peers, in which order, compute which blocks of one step.

Data goes client -> first hop -> ... -> last hop -> client, so a step costs

    rtt(client, first) / 2 + compute at each hop + rtt(hop, next hop) / 2 ... + rtt(last, client) / 2
    compute = blocks used * seconds per block * (1 + steps waiting there)

This is a shortest path over (peer, block boundary), in the way of Petals (arXiv:2312.08361, 3.2),
with the delays between servers that Petals, whose hops all answer the client, does not need.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from routing.blocks import Blocks, gaps
from routing.chains.distances import CLIENT, DEFAULT_RTT_SECONDS, Distances
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import believed_rates

__all__ = ["DEFAULT_RTT_SECONDS", "Chain", "Costs", "Hop", "NoChain", "cheapest_chain", "costs"]


@dataclass(frozen=True, slots=True)
class Costs:
    """What each part of a chain costs, in seconds: one definition for whoever asks.

    block: one step through one block of a peer, its queue included.
    distances: between peers, and from the client.
    """

    block: Mapping[PeerId, float]
    distances: Distances

    def client(self, peer: PeerId) -> float:
        """One way between the client and a peer."""
        return self.distances.between(CLIENT, peer) / 2

    def between(self, one: PeerId, other: PeerId) -> float:
        """One way between two peers."""
        return self.distances.between(one, other) / 2

    def chain(self, hops: Sequence[Hop]) -> float:
        """A whole step along these hops, from the client and back."""
        compute = sum((hop.stop - hop.start) * self.block[hop.peer] for hop in hops)
        between = sum(self.between(one.peer, two.peer) for one, two in pairwise(hops))
        return self.client(hops[0].peer) + compute + between + self.client(hops[-1].peer)


def costs(
    spans: Sequence[Record],
    distances: Distances,
    *,
    measured: Mapping[PeerId, float],
    positions: int = 1,
    waiting: Mapping[PeerId, int] | None = None,
) -> Costs:
    """The costs that these peers' records and our own measurements give; our own come first.

    distances: up to date with at least these peers.  positions, waiting: see `cheapest_chain`.
    """
    rates = believed_rates(spans, measured, positions)
    ours = waiting or {}
    queued = {s.peer: (0 if s.peer in measured else s.queue) + ours.get(s.peer, 0) for s in spans}
    return Costs({s.peer: rates[s.peer] * (1 + queued[s.peer]) for s in spans}, distances)


def cheapest_chain(
    spans: Sequence[Record],
    blocks: int,
    *,
    start: int = 0,
    stop: int | None = None,
    client_rtt: Mapping[PeerId, float] | None = None,
    measured: Mapping[PeerId, float] | None = None,
    excluded: Collection[PeerId] = (),
    default_rtt: float = DEFAULT_RTT_SECONDS,
    positions: int = 1,
    waiting: Mapping[PeerId, int] | None = None,
    distances: Distances | None = None,
    most_hops: int | None = None,
    lean: Mapping[PeerId, float] | None = None,
) -> Chain:
    """The chain over blocks [start, stop) (by default all) with the least expected seconds per step.

    spans: records of one model revision that take new sessions, as `SwarmView.spans` gives them.
    client_rtt: seconds from here to a peer and back; as in `distances`, where those are given.
    measured: seconds per block of a peer's steps as seen from here, waits included.
    excluded: peers not to be used, for instance because they have just failed.
    positions: in a step of all rows; 1 is a decode step, more go at the rate of a prefill.
    waiting: steps of our own that are on their way to a peer and not in its record yet: with many
        at a time they spread over peers that hold the same blocks.
    distances: up to date with at least these peers, their default their own; None works them out here.
    most_hops: longer chains are not chosen; the search then takes so many times as long.
    lean: factors on what a block costs at a peer, for the choice only: see `routing.chains.load_sharing`.

    Ties break on the peer's id, whatever the order of `spans`.  A peer appears once: where the
    cheapest walk would leave a peer and come back, the chain stays with it instead.
    O(blocks * peers of one block ** 2), and what `Distances.update` takes.  Raises NoChain.
    """
    stop = blocks if stop is None else stop
    wanted = Blocks(start, stop)
    if not Blocks(0, blocks).contains(wanted):
        raise ValueError(f"blocks {wanted} are no part of a model of {blocks}")
    usable = sorted((s for s in spans if s.peer not in excluded), key=lambda s: s.peer)
    parts = [Hop(s.peer, max(s.start, start), min(s.stop, stop)) for s in usable]
    parts = [part for part in parts if part.start < part.stop]
    if missing := gaps(parts, wanted):
        left_out = sum(s.peer in excluded for s in spans)
        raise NoChain(missing, blocks, alone=not parts, excluded=left_out)
    if distances is None:
        distances = Distances(default_rtt)
        distances.update(spans, client_rtt)
    price = costs(usable, distances, measured=measured or {}, positions=positions, waiting=waiting)
    leant = price if not lean else replace(price, block=_times(price.block, lean))
    walk = _Walks(parts, start, stop, leant, most_hops).cheapest()
    if not walk:
        raise NoChain([wanted], blocks, alone=False, most_hops=most_hops)
    hops = _each_peer_once(walk)
    return Chain(hops, price.chain(hops))


def _times(seconds: Mapping[PeerId, float], factors: Mapping[PeerId, float]) -> dict[PeerId, float]:
    return {peer: cost * factors.get(peer, 1.0) for peer, cost in seconds.items()}


class _Walks:
    """Dynamic programming from block to block; `parts` cover [start, stop) and lie within it.

    A walk is the cheapest way to have every block before one computed, a certain peer having been the
    last, and, where hops are counted, after so many hops.  Only what walks cost is kept, and whether the
    last peer had been there before: the few ways over that the cheapest one took are looked for again
    from its end.
    """

    def __init__(
        self, parts: Sequence[Hop], start: int, stop: int, price: Costs, most_hops: int | None
    ) -> None:
        self._peers = [part.peer for part in parts]
        self._start, self._blocks = start, stop - start
        self._counted = most_hops is not None
        self._seconds = price.distances.seconds
        self._rows = price.distances.rows(self._peers)
        self._to_client = self._seconds[self._rows, price.distances.rows([CLIENT])] / 2
        self._block = np.array([price.block[peer] for peer in self._peers])
        begin, end = np.array([part.start for part in parts]), np.array([part.stop for part in parts])
        self._holders = [np.flatnonzero((begin <= block) & (block < end)) for block in range(start, stop)]
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
        """What those walks cost, by hops, to which one more hop can be added."""
        costs: NDArray[np.float64] = self._costs[block]
        return np.vstack((np.full_like(costs[:1], np.inf), costs[:-1])) if self._counted else costs

    def _way(self, one: NDArray[np.intp], other: NDArray[np.intp]) -> NDArray[np.float64]:
        """From each of some to each of others, one way."""
        way: NDArray[np.float64] = self._seconds[self._rows[one][:, None], self._rows[other]] / 2
        return way

    def cheapest(self) -> list[Hop]:
        """The hops of the cheapest walk; none where all take too many.

        Among equals that with the fewest hops, where they are counted, then that of the lowest peer
        id, from the end on.
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
    """Where a peer comes again later, let it do everything between: its span covers that."""
    kept: list[Hop] = []
    for hop in hops:
        if kept and hop.start < kept[-1].stop:
            continue  # inside a hop that was made longer
        stop = max(later.stop for later in hops if later.peer == hop.peer)
        kept.append(Hop(hop.peer, hop.start, stop))
    return tuple(kept)
