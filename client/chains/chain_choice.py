"""The choice of a session's chain, by the view of the swarm and this client's own measurements."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import trio

from client.adapters.upload import Needs
from client.chains.avoided_peers import AvoidedPeers
from client.chains.chain_wait import (
    Pings,
    ViewChanges,
    choose_among_the_living,
    measure_candidates,
    wait_for_chain,
)
from client.chains.chooser import HopTerms, PeerStream
from client.chains.considered import Considered
from client.chains.no_chain import explain, explain_length
from client.chains.of_sessions import OfSessions
from routing.blocks import Blocks, gaps
from routing.chains.alternatives import Constraints, best_chains, suitable
from routing.chains.distances import CLIENT
from routing.chains.load_sharing import client_bias, queue_markup, sample
from routing.chains.measured import Measured, admitted
from routing.chains.search import Chain, CostInputs, Hop, NoChain, cheapest_chain, costs
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault, PeerGone


@dataclass(frozen=True, slots=True)
class Wanted:
    """The demands on a chain: see `client.chains.chooser.Chooser.choose`.

    positions: in one step.  waiting: the number of these that wait at a peer already.
    """

    start: int = 0
    stop: int | None = None
    excluded: frozenset[PeerId] = frozenset()
    last_resort: bool = False
    other_hops: int = 0
    observed: Mapping[PeerId, float] = field(default_factory=dict)
    positions: int = 1
    waiting: Mapping[PeerId, int] = field(default_factory=dict)


@dataclass(slots=True)
class ChainChooser:
    """Chooses chains, and remembers the peers' behaviour (`client.chains.chooser.SwarmAccess`).

    model, revision, blocks: of the model.  view: the present view of the swarm.  rtts: seconds from here to
    a peer and back.  dial: a stream to a peer at these addresses.  changes: waits for another view.
    pings: measures round trips before a first choice; None: nothing is measured.
    measured: the speed of peers for this client.
    late: peers that were pinged a moment ago and have not answered at once.
    constraints: on chains, at every choice.
    spread: this client's own bias, so that clients choose different ones of nearly equal chains
    (`routing.chains.load_sharing`); None: always the cheapest.
    few: the peers that are compared.  of_sessions: what all sessions have in common.
    """

    model: str
    revision: str
    blocks: int
    view: Callable[[], SwarmView]
    rtts: Callable[[], Mapping[PeerId, float]]
    dial: Callable[[PeerId, Sequence[str], str], Awaitable[PeerStream]]
    changes: ViewChanges
    pings: Pings | None = None
    blame: AvoidedPeers = field(default_factory=AvoidedPeers)
    measured: Measured = field(default_factory=Measured)
    late: Callable[[], Collection[PeerId]] = tuple
    constraints: Constraints = field(default_factory=Constraints)
    spread: str | None = None
    few: Considered = field(default_factory=Considered)
    of_sessions: OfSessions = field(default_factory=OfSessions)

    def choose(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        excluded: frozenset[PeerId] = frozenset(),
        last_resort: bool = False,
        kinds: frozenset[str] = frozenset(),
        tokens: int = 0,
        other_hops: int = 0,
        observed: Mapping[PeerId, float] | None = None,
    ) -> Chain:
        """See `client.chains.chooser.Chooser.choose`."""
        wanted = Wanted(start, stop, excluded, last_resort, other_hops, observed or {})
        spans = [span for span in self._spans(silent=last_resort) if not 0 < span.session_tokens < tokens]
        factors = _cost_factors(self.spread, spans)
        alike = [span for span in spans if not kinds or _kind(span) in kinds]
        roomy = [span for span in alike if span.cache_tokens >= tokens]
        for some in (roomy, alike):  # a peer of another kind, or one that may refuse, is better than none
            if len(some) < len(spans):
                with suppress(NoChain):
                    return self._cheapest(some, wanted, factors)
        try:
            return self._cheapest(spans, wanted, factors)
        except NoChain as none:
            raise explain_length(none, _usable(self), tokens) from None

    def chains(self, most: int) -> list[Chain]:
        """Up to `most` chains over the whole model, the best first: see `best_chains`.  Raises NoChain."""
        spans = self._spans()

        def search(*, cost_factors: Mapping[PeerId, float]) -> Chain:
            return self._cheapest(spans, Wanted(), cost_factors)

        return best_chains(search, most, _cost_factors(self.spread, spans))

    def choose_for_throughput(
        self,
        start: int,
        stop: int,
        *,
        positions: int,
        waiting: Mapping[PeerId, int],
        other_hops: int = 0,
        last_resort: bool = False,
    ) -> Chain:
        """The chain for many positions at once, by `cheapest_chain`.  Raises NoChain.

        other_hops, last_resort: see `client.chains.chooser.Chooser.choose`.
        """
        spans = self._spans(silent=last_resort)
        wanted = Wanted(
            start, stop, last_resort=last_resort, other_hops=other_hops, positions=positions, waiting=waiting
        )
        return self._cheapest(spans, wanted, _cost_factors(self.spread, spans))

    async def wait_for_chain(
        self, choose: Callable[[bool], Chain], *, measured: Blocks | None, deadline: float = math.inf
    ) -> Chain:
        """See `client.chains.chooser.SwarmAccess`.  Raises NoChain when the deadline has passed."""

        async def attempt(last_resort: bool) -> Chain:
            if measured is None:
                return choose(last_resort)
            return await self.choose_measured(partial(choose, last_resort), measured)

        return await wait_for_chain(attempt, self.changes.wait, deadline)

    async def choose_measured(self, choose: Callable[[], Chain], run: Blocks | None = None) -> Chain:
        """A choice after the round trips have been measured that it needs.  Raises NoChain.

        run: the blocks that are chosen for; None: all.
        """
        if self.pings is None:
            return choose()
        run = run or Blocks(0, self.blocks)
        peers = [span.peer for span in self.considered() if run.overlap((span.start, span.stop))]
        is_enough = partial(self.is_covered_by, run=run)
        await measure_candidates(self.pings, peers, self.spread or "", is_enough)
        return await choose_among_the_living(self.pings, choose)

    def considered(self, *, silent: bool = False) -> Sequence[Record]:
        """The usable peers that this client compares: see `routing.chains.load_sharing.sample`."""

        def draw() -> Sequence[Record]:
            spans, always = _usable(self, silent=silent), self.measured.decode
            return sample(spans, self.spread or "", always=always, answering=self.rtts())

        return self.few.servers(self.view(), self.constraints, silent, draw)

    def is_covered_by(self, peers: Collection[PeerId], run: Blocks) -> bool:
        """Whether these peers hold all blocks of a run that any considered peer holds."""
        spans = self.considered()
        those = [span for span in spans if span.peer in peers]
        return gaps(those, run) == gaps(spans, run)

    def cost(self, hops: Sequence[Hop], observed: Mapping[PeerId, float]) -> float:
        """See `client.chains.chooser.Chooser.cost`."""
        records = [record for hop in hops if (record := self.view().get(hop.peer)) is not None]
        if len(records) < len(hops) or not hops:
            return math.inf
        self._spans(records)
        records = [_with_queue(self, record) for record in records]
        rates = {**self.measured.rates(records, trio.current_time(), 1), **observed}
        carrying = self.few.carrying(self.view(), records, 1)
        known = CostInputs(measured=rates, distances=self.few.distances, carrying=carrying)
        return costs(records, known).chain(hops)

    def seconds_per_position(self, hops: Sequence[Hop]) -> float:
        """See `client.chains.chooser.Chooser.seconds_per_position`."""
        records = [self.view().get(hop.peer) for hop in hops]
        rates = [(record.prefill_seconds_per_token if record else 0.0) or math.inf for record in records]
        return sum((hop.stop - hop.start) * rate for hop, rate in zip(hops, rates, strict=True))

    def kind_of(self, peer: PeerId) -> str | None:
        """See `client.chains.chooser.Chooser.kind_of`."""
        record = self.view().get(peer)
        return None if record is None else _kind(record)

    def terms_of(self, hops: Sequence[Hop]) -> list[HopTerms | None]:
        """See `client.chains.chooser.Chooser.terms_of`."""
        view, between, before = self.view(), self.few.distances.between, CLIENT
        found: list[HopTerms | None] = []
        for hop in hops:
            record = view.get(hop.peer)
            seconds = between(before, hop.peer)
            speed = self.measured.speeds.of(before, hop.peer) or _announced_speed(view, before, hop.peer)
            home = between(hop.peer, CLIENT)
            terms = (
                None
                if record is None
                else HopTerms(record.dtype, record.codecs, seconds, speed, home, record.batches)
            )
            found.append(terms)
            before = hop.peer
        return found

    async def open_stream(self, peer: PeerId, protocol: str) -> PeerStream:
        """See `client.chains.chooser.SwarmAccess.open_stream`."""
        view = self.view()
        record = view.get(peer)
        return await self.dial(peer, view.dialled_at(record) if record is not None else (), protocol)

    def fault(self, peer: PeerId, error: PeerFault, share: float = 1.0) -> None:
        """See `client.chains.chooser.SwarmAccess.fault`."""
        self.blame.fault(peer, trio.current_time(), gone=isinstance(error, PeerGone), share=share)

    def refused(self, peer: PeerId, retry_after_seconds: float | None) -> None:
        """See `client.chains.chooser.SwarmAccess.refused`."""
        self.blame.refused(peer, retry_after_seconds, trio.current_time())

    def worked(self, hops: Sequence[Hop]) -> None:
        """These hops have answered: their earlier faults are forgotten."""
        for hop in hops:
            self.blame.worked(hop.peer)

    def report_queue(self, peer: PeerId, queue: float) -> bool:
        """See `client.chains.chooser.SwarmAccess.report_queue`."""
        record = self.view().get(peer)
        known = 0.0 if record is None else _with_queue(self, record).queue
        return self.of_sessions.queues.report(peer, queue, known, trio.current_time())

    def observe_step(self, hops: Sequence[Hop], held: Sequence[float], total: float) -> None:
        """See `client.chains.chooser.SwarmAccess.observe_step`."""
        view, now, between = self.view(), trio.current_time(), self.few.distances.between
        peers = [CLIENT, *[hop.peer for hop in hops], CLIENT]
        network = sum([between(one, two) for one, two in pairwise(peers)]) / 2
        blocks = [hop.stop - hop.start for hop in hops]
        for hop, seconds in zip(hops, admitted(held, blocks, total, network), strict=False):
            self.measured.learn(hop.peer, seconds / (hop.stop - hop.start), view.get(hop.peer), now)

    def observe_prefill(self, peer: PeerId, seconds: float) -> None:
        """A peer has computed many positions at once.  seconds: for each position and block."""
        self.measured.learn(peer, seconds, self.view().get(peer), trio.current_time(), prefill=True)

    def _spans(self, others: Sequence[Record] = (), *, silent: bool = False) -> Sequence[Record]:
        """The peers that this client compares, with updated distances.

        others: peers that take no new sessions, and whose distances are asked for too.
        """
        self.changes.look(self.view())
        looked_at = self.considered(silent=silent)
        self.few.distances.update((*looked_at, *others), self.rtts())
        return [_with_queue(self, span) for span in looked_at]

    def _cheapest(self, spans: Sequence[Record], wanted: Wanted, factors: Mapping[PeerId, float]) -> Chain:
        most, now = self.constraints.most_hops, trio.current_time()
        known = CostInputs(
            client_rtt=self.rtts(),
            measured={**self.measured.rates(spans, now, wanted.positions), **wanted.observed},
            waiting=wanted.waiting,
            positions=wanted.positions,
            carrying=self.few.carrying(self.view(), spans, wanted.positions),
            distances=self.few.distances,
        )
        cheapest = partial(
            cheapest_chain,
            spans,
            self.blocks,
            part=Blocks(wanted.start, self.blocks if wanted.stop is None else wanted.stop),
            known=known,
            most_hops=None if most is None else most - wanted.other_hops,
            cost_factors=factors,
        )
        view = self.view()
        avoided = _avoided(self.blame, view, now)
        try:
            if wanted.last_resort:  # peers that failed most come last, and silent peers after them
                avoided = [*(p for p in avoided if p not in view.silent), *sorted(view.silent)]
                return _with_fewest_of(avoided, lambda rest: cheapest(excluded=wanted.excluded.union(rest)))
            if late := self.late():
                with suppress(NoChain):  # a peer without an answer may never answer
                    return cheapest(excluded=wanted.excluded.union(avoided, late))
            return cheapest(excluded=wanted.excluded.union(avoided))
        except NoChain as none:
            raise explain(none, view, self.model, self.revision, self.constraints) from None


def _announced_speed(view: SwarmView, one: PeerId, two: PeerId) -> float:
    """Bytes per second of a link that nobody has timed, where it leads through a relay; else 0.0."""
    ends = [record for peer in (one, two) if (record := view.get(peer)) is not None]
    speed = min((view.relayed_rate(record) for record in ends), default=math.inf)
    return speed if speed < math.inf else 0.0


def _usable(chooser: ChainChooser, *, silent: bool = False) -> list[Record]:
    """The peers that the constraints admit, by id.  silent: peers that do not answer too."""
    return suitable(
        chooser.view().spans(chooser.revision, chooser.blocks, silent=silent), chooser.constraints
    )


def chooser_for(chooser: ChainChooser, needs: Needs) -> ChainChooser:
    """A chooser with the same memory of peers, that chooses only those which take what a session brings."""
    return replace(chooser, constraints=needs.within(chooser.constraints))


async def find_run(
    chooser: ChainChooser,
    wait_seconds: float,
    start: int,
    stop: int,
    *,
    positions: int,
    waiting: Mapping[PeerId, int],
    other_hops: int,
    needs: Needs,
) -> Chain:
    """The chain over blocks [start, stop) with the most throughput; waits up to `wait_seconds` for one.

    needs: of peers which meet these alone.  The others: see `ChainChooser.choose_for_throughput`.
    Raises NoChain.
    """
    routes = chooser_for(chooser, needs)

    def choose(last_resort: bool) -> Chain:
        return routes.choose_for_throughput(
            start, stop, positions=positions, waiting=waiting, other_hops=other_hops, last_resort=last_resort
        )

    deadline = trio.current_time() + wait_seconds
    return await routes.wait_for_chain(choose, measured=Blocks(start, stop), deadline=deadline)


def _with_fewest_of(avoided: Sequence[PeerId], search: Callable[[Collection[PeerId]], Chain]) -> Chain:
    """A chain with as few of the avoided peers as it needs, the first ones before the others.

    search: without these peers.  Raises NoChain.
    """
    rest, asked = deque(avoided), list[PeerId]()
    while True:
        try:
            chain = search(rest)
            break
        except NoChain:
            if not rest:
                raise
            asked.append(rest.popleft())
    for peer in asked[:-1]:  # without the last one there is no chain
        with suppress(NoChain):
            chain = search([*rest, peer])
            rest.append(peer)
    return chain


def _cost_factors(spread: str | None, spans: Sequence[Record]) -> Mapping[PeerId, float]:
    """The extra cost of a block at each peer for this client: see `routing.chains.load_sharing`."""
    queues = queue_markup(spans)
    if spread is None:
        return queues
    own = client_bias(spread, queues)
    return {peer: queues[peer] * own[peer] for peer in queues}


def _avoided(blame: AvoidedPeers, view: SwarmView, now: float) -> list[PeerId]:
    """The peers that have failed lately and have not restarted since."""
    for peer in blame.soonest_first(now):
        if (entry := view.entries.get(peer)) is not None and entry.record.state == "online":
            blame.seen_online(peer, entry.sent)
    return blame.soonest_first(now)


def _kind(record: Record) -> str:
    """The properties of a server that affect the tokens, besides the weights."""
    return f"{record.dtype} {record.quantize}"


def _with_queue(chooser: ChainChooser, record: Record) -> Record:
    """The record with the queue that the peer reported after its record."""
    sent = chooser.view().entries[record.peer].sent
    return chooser.of_sessions.queues.current(record, sent, trio.current_time())
