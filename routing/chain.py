"""The cheapest chain: which peers, in which order, compute which blocks of one step.

Data goes client -> first hop -> ... -> last hop -> client, so a step costs

    rtt(client, first) / 2 + compute at each hop + rtt(hop, next hop) / 2 ... + rtt(last, client) / 2
    compute = blocks used * seconds per block * (1 + steps waiting there)

This is a shortest path over (peer, block boundary), in the way of Petals (arXiv:2312.08361, 3.2),
with the delays between servers that Petals, whose hops all answer the client, does not need.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from routing.names import PeerId
from routing.records import Record
from routing.swarm import believed_rates, holes

DEFAULT_RTT_SECONDS = 0.1  # between peers that nobody measured: a pair on one continent


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks [start, stop) that a chain uses of one peer's span."""

    peer: PeerId
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops that cover a run of blocks, in order, each peer at most once.

    expected_seconds: of one decode step, from the client and back to it.
    """

    hops: tuple[Hop, ...]
    expected_seconds: float


class NoChain(Exception):
    """The swarm, as it is known now, cannot compute these blocks.

    missing: the runs of blocks, [start, stop), that nobody serves.
    alone: nobody serves any block of this model at all.
    instead: what the swarm serves, where it is something else; for people.
    after: the last thing that went wrong while a chain was looked for, where something did; for people.
    """

    after: Exception | None = None

    def __init__(
        self,
        missing: Sequence[tuple[int, int]],
        blocks: int,
        *,
        alone: bool,
        excluded: int = 0,
        instead: Sequence[str] = (),
    ) -> None:
        runs = ", ".join(f"{start}:{stop}" for start, stop in missing)
        found = f"no peer serves any of blocks {runs} of {blocks}"
        if not alone:
            found = f"blocks {runs} of {blocks} are served by nobody"
        aside = f" ({excluded} left out after a failure)" if excluded else ""
        other = f"; the swarm serves {', '.join(instead)}" if instead else ""
        super().__init__(found + aside + other)
        self.missing = tuple(missing)
        self.blocks = blocks
        self.alone = alone

    def __str__(self) -> str:
        last = f"; the last that went wrong: {self.after}" if self.after is not None else ""
        return super().__str__() + last


@dataclass(frozen=True, slots=True)
class Costs:
    """What each part of a chain costs, in seconds: one definition for whoever asks.

    block: one step through one block of a peer, its queue included.
    client_rtt: to a peer and back, from the client.
    near: round trips between peers where one of the two announced it; the same both ways.
    """

    block: Mapping[PeerId, float]
    client_rtt: Mapping[PeerId, float]
    near: Mapping[PeerId, Mapping[PeerId, float]]
    default_rtt: float

    def client(self, peer: PeerId) -> float:
        """One way between the client and a peer."""
        return self.client_rtt.get(peer, self.default_rtt) / 2

    def between(self, one: PeerId, other: PeerId) -> float:
        """One way between two peers."""
        return self.near.get(one, {}).get(other, self.default_rtt) / 2

    def chain(self, hops: Sequence[Hop]) -> float:
        """A whole step along these hops, from the client and back."""
        compute = sum((hop.stop - hop.start) * self.block[hop.peer] for hop in hops)
        between = sum(self.between(one.peer, two.peer) for one, two in pairwise(hops))
        return self.client(hops[0].peer) + compute + between + self.client(hops[-1].peer)


def costs(
    spans: Sequence[Record],
    *,
    client_rtt: Mapping[PeerId, float],
    measured: Mapping[PeerId, float],
    default_rtt: float,
    positions: int = 1,
    waiting: Mapping[PeerId, int] | None = None,
) -> Costs:
    """The costs that these peers' records and our own measurements give; our own come first.

    positions, waiting: see `cheapest_chain`.
    Where two peers announce their distance differently the longer one counts: no peer can make
    itself near alone.
    """
    rates = believed_rates(spans, measured, positions)
    ours = waiting or {}
    queued = {s.peer: (0 if s.peer in measured else s.queue) + ours.get(s.peer, 0) for s in spans}
    near: dict[PeerId, dict[PeerId, float]] = {s.peer: {} for s in spans}
    for span in spans:
        for other, seconds in span.rtt.items():
            if other in near and other != span.peer:
                longer = max(seconds, near[other].get(span.peer, 0.0))
                near[span.peer][other] = near[other][span.peer] = longer
    return Costs(
        block={s.peer: rates[s.peer] * (1 + queued[s.peer]) for s in spans},
        client_rtt=client_rtt,
        near=near,
        default_rtt=default_rtt,
    )


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
) -> Chain:
    """The chain over blocks [start, stop) (by default all) with the least expected seconds per step.

    spans: records of one model revision that take new sessions, as `SwarmView.spans` gives them.
    client_rtt: seconds from here to a peer and back.
    measured: seconds per block of a peer's steps as seen from here, waits included.
    excluded: peers not to be used, for instance because they have just failed.
    positions: in a step of all rows; 1 is a decode step, more go at the rate of a prefill.
    waiting: steps of our own that are on their way to a peer and not in its record yet: with many
        at a time they spread over peers that hold the same blocks.

    Ties break on the peer's id, whatever the order of `spans`.  A peer appears once: where the
    cheapest walk would leave a peer and come back, the chain stays with it instead.
    O(blocks * peers * known distances per peer).  Raises NoChain.
    """
    stop = blocks if stop is None else stop
    if not 0 <= start < stop <= blocks:
        raise ValueError(f"blocks {start}:{stop} are no part of a model of {blocks}")
    usable = sorted((s for s in spans if s.peer not in excluded), key=lambda s: s.peer)
    parts = [Hop(s.peer, max(s.start, start), min(s.stop, stop)) for s in usable]
    parts = [part for part in parts if part.start < part.stop]
    if missing := holes(((part.start, part.stop) for part in parts), start, stop):
        left_out = sum(s.peer in excluded for s in spans)
        raise NoChain(missing, blocks, alone=not parts, excluded=left_out)
    price = costs(
        usable,
        client_rtt=client_rtt or {},
        measured=measured or {},
        default_rtt=default_rtt,
        positions=positions,
        waiting=waiting,
    )
    hops = _each_peer_once(_cheapest_walk(parts, start, stop, price))
    return Chain(hops, price.chain(hops))


@dataclass(frozen=True, slots=True)
class _Walk:
    """The cheapest way to have everything up to `stop` computed, `peer` having been the last."""

    cost: float
    peer: PeerId
    start: int  # where this peer took over from the one before
    stop: int
    before: _Walk | None


def _cheapest_walk(parts: Sequence[Hop], start: int, stop: int, price: Costs) -> list[Hop]:
    """Dynamic programming from block to block; `parts` cover [start, stop) and lie within it."""
    reached: dict[PeerId, _Walk] = {}
    for block in range(start, stop):
        ranked = sorted(reached.values(), key=lambda walk: (walk.cost, walk.peer))
        onward: dict[PeerId, _Walk] = {}
        for peer in (part.peer for part in parts if part.start <= block < part.stop):
            compute = price.block[peer]
            if block == start:
                onward[peer] = _Walk(price.client(peer) + compute, peer, block, block + 1, None)
                continue
            stay, switch = reached.get(peer), _best_switch(peer, reached, ranked, price)
            if stay and (switch is None or stay.cost <= switch[0]):
                onward[peer] = _Walk(stay.cost + compute, peer, stay.start, block + 1, stay.before)
            elif switch:
                onward[peer] = _Walk(switch[0] + compute, peer, block, block + 1, switch[1])
        reached = onward
    last: _Walk | None = min(
        reached.values(), key=lambda walk: (walk.cost + price.client(walk.peer), walk.peer)
    )
    hops = []
    while last is not None:
        hops.append(Hop(last.peer, last.start, last.stop))
        last = last.before
    return hops[::-1]


def _best_switch(
    peer: PeerId, reached: Mapping[PeerId, _Walk], ranked: Sequence[_Walk], price: Costs
) -> tuple[float, _Walk] | None:
    """The cheapest walk that another peer ends, with the way over to `peer` in its cost.

    ranked: `reached` by cost.  All peers at no known distance are equally far, so of these only the
    cheapest walk is looked at.
    """
    near = price.near.get(peer, {})
    options = [reached[other] for other in near if other in reached]
    options += next(([walk] for walk in ranked if walk.peer not in near and walk.peer != peer), [])
    costs = [(walk.cost + price.between(walk.peer, peer), walk.peer) for walk in options]
    if not costs:
        return None
    cost, best = min(costs)
    return cost, reached[best]


def _each_peer_once(hops: Sequence[Hop]) -> tuple[Hop, ...]:
    """Where a peer comes again later, let it do everything between: its span covers that."""
    kept: list[Hop] = []
    for hop in hops:
        if kept and hop.start < kept[-1].stop:
            continue  # inside a hop that was made longer
        stop = max(later.stop for later in hops if later.peer == hop.peer)
        kept.append(Hop(hop.peer, hop.start, stop))
    return tuple(kept)
