"""Which way a session takes: what is known of the swarm, what this client has seen of it, and a choice."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import trio

from client.session.avoided_peers import AvoidedPeers
from node.network.streams import FramedStream
from routing.blocks import Blocks, gaps
from routing.chains.alternatives import Constraints, best_chains, suitable
from routing.chains.distances import CLIENT, Distances
from routing.chains.load_sharing import client_bias, queue_markup, queue_price, sample
from routing.chains.measured import Measured, admitted
from routing.chains.search import Chain, CostInputs, Hop, NoChain, cheapest_chain, costs
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault, PeerGone

SURPRISE = 1.25  # times as dear as was known: then it is worth choosing again
TOLD_SECONDS = 30.0  # for which what a hop said of its queue counts, where its record is older
FIND_AGAIN_SECONDS = 10.0  # between looks beyond what the neighbours know


@dataclass(slots=True)
class ChainChooser:
    """What sessions ask of the swarm around them (`client.session.route.Surroundings`).

    model, revision, blocks: of the model.  view: what is known now.  rtts: seconds from here to a peer
    and back.  changed_since: returns when the view is another one.  dial: a stream to a peer at these
    addresses.  find_peers: looks further than the neighbours know, bounded; may be None.
    measured: how fast peers have been for this client.
    late: peers that were asked a moment ago how far they are, and have not answered at once.
    constraints: what chains may be made of, at every choice.
    spread: what tells this client from others, so that of nearly equal chains each takes another one
    (`routing.chains.load_sharing`); None: always the cheapest.
    """

    model: str
    revision: str
    blocks: int
    view: Callable[[], SwarmView]
    rtts: Callable[[], Mapping[PeerId, float]]
    changed_since: Callable[[SwarmView], Awaitable[None]]
    dial: Callable[[PeerId, Sequence[str], str], Awaitable[FramedStream]]
    find_peers: Callable[[], Awaitable[object]] | None = None
    blame: AvoidedPeers = field(default_factory=AvoidedPeers)
    measured: Measured = field(default_factory=Measured)
    late: Callable[[], Collection[PeerId]] = tuple
    constraints: Constraints = field(default_factory=Constraints)
    spread: str | None = None
    _seen: SwarmView | None = None
    _told: dict[PeerId, tuple[float, float]] = field(default_factory=dict)  # queues, and when
    _found_at: float = -math.inf
    _distances: Distances = field(default_factory=Distances)

    def choose(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        without: frozenset[PeerId] = frozenset(),
        desperate: bool = False,
        like: frozenset[str] = frozenset(),
        tokens: int = 0,
        beside: int = 0,
        seen: Mapping[PeerId, float] | None = None,
    ) -> Chain:
        """See `client.session.route.Surroundings.choose`."""
        spans = tuple(span for span in self._spans(silent=desperate) if not 0 < span.session_tokens < tokens)
        measured = self._measured(spans, seen)
        lean = self._leaning(spans)
        alike = [span for span in spans if not like or _kind(span) in like]
        roomy = [span for span in alike if span.cache_tokens >= tokens]
        for some in (roomy, alike):  # better one of another kind, or one that may refuse, than none
            if len(some) < len(spans):
                with suppress(NoChain):
                    return self._cheapest(
                        some, start, stop, without, measured, desperate=desperate, lean=lean, beside=beside
                    )
        try:
            return self._cheapest(
                spans, start, stop, without, measured, desperate=desperate, lean=lean, beside=beside
            )
        except NoChain as none:
            raise self._too_long(none, tokens) from None

    def chains(self, most: int) -> list[Chain]:
        """Up to so many chains over the whole model, the best first: see `best_chains`.  Raises NoChain."""
        spans = self._spans()
        measured = self._measured(spans)

        def search(*, cost_factors: Mapping[PeerId, float]) -> Chain:
            none = frozenset[PeerId]()
            return self._cheapest(
                spans, 0, None, none, measured, desperate=False, lean=cost_factors, beside=0
            )

        return best_chains(search, most, self._leaning(spans))

    def choose_for_throughput(
        self,
        start: int,
        stop: int,
        *,
        positions: int,
        waiting: Mapping[PeerId, int],
        beside: int = 0,
        desperate: bool = False,
    ) -> Chain:
        """The chain for many positions at once, as `cheapest_chain` says.  Raises NoChain.

        beside, desperate: see `client.session.route.Surroundings.choose`.
        """
        spans = self._spans(silent=desperate)
        return self._cheapest(
            spans, start, stop, frozenset(), self._measured(spans, positions=positions),
            desperate=desperate, lean=self._leaning(spans), positions=positions, waiting=waiting or {},
            beside=beside,
        )  # fmt: skip

    def usable(self, *, silent: bool = False) -> list[Record]:
        """The peers that the constraints admit, in the order of their ids; the silent ones only if told."""
        return suitable(self.view().spans(self.revision, self.blocks, silent=silent), self.constraints)

    def is_covered_by(self, peers: Collection[PeerId]) -> bool:
        """Whether these peers hold all that is held by anybody who can be used."""
        spans = self.usable()
        those = [span for span in spans if span.peer in peers]
        whole = Blocks(0, self.blocks)
        return gaps(those, whole) == gaps(spans, whole)

    def cost(self, hops: Sequence[Hop], seen: Mapping[PeerId, float]) -> float:
        """See `client.session.route.Surroundings.cost`; infinite where a peer is not in the view."""
        records = [record for hop in hops if (record := self.view().get(hop.peer)) is not None]
        if len(records) < len(hops) or not hops:
            return math.inf
        self._measure_out(records)
        records = [self._as_told(record) for record in records]
        return costs(
            records, CostInputs(measured=self._measured(records, seen), distances=self._distances)
        ).chain(hops)

    def kind_of(self, peer: PeerId) -> str | None:
        """See `client.session.route.Surroundings.kind_of`."""
        record = self.view().get(peer)
        return None if record is None else _kind(record)

    def dtype_of(self, peer: PeerId) -> str | None:
        """See `client.session.route.Surroundings.dtype_of`."""
        record = self.view().get(peer)
        return None if record is None else record.dtype

    async def changed(self, seconds: float) -> bool:
        """See `client.session.route.Surroundings.changed`: since the last choice."""
        now = trio.current_time()
        with trio.move_on_after(seconds):
            if self.find_peers is not None and now - self._found_at > FIND_AGAIN_SECONDS:
                self._found_at = now
                await self.find_peers()
            else:
                await self.changed_since(self._seen or self.view())
            return True
        return False

    async def open_stream(self, peer: PeerId, protocol: str) -> FramedStream:
        """See `client.session.route.Surroundings.open_stream`."""
        record = self.view().get(peer)
        return await self.dial(peer, record.addresses if record is not None else (), protocol)

    def fault(self, peer: PeerId, error: PeerFault) -> None:
        """See `client.session.route.Surroundings.fault`."""
        self.blame.fault(peer, trio.current_time(), gone=isinstance(error, PeerGone))

    def refused(self, peer: PeerId, retry_after_seconds: float | None) -> None:
        """See `client.session.route.Surroundings.refused`."""
        self.blame.refused(peer, retry_after_seconds, trio.current_time())

    def told(self, peer: PeerId, queue: float) -> bool:
        """See `client.session.route.Surroundings.told`."""
        now, record = trio.current_time(), self.view().get(peer)
        known = 0.0 if record is None else self._as_told(record).queue
        self._told = {p: told for p, told in self._told.items() if now - told[1] < TOLD_SECONDS}
        self._told[peer] = queue, now
        return queue_price(queue) > SURPRISE * queue_price(known)

    def _as_told(self, record: Record) -> Record:
        """With the queue that the peer itself told us of since it sent its record."""
        queue, at = self._told.get(record.peer, (0.0, -math.inf))
        sent = self.view().entries[record.peer].sent
        if at < max(sent, trio.current_time() - TOLD_SECONDS):
            return record
        return replace(record, queue=queue)

    def worked(self, hops: Sequence[Hop]) -> None:
        """These hops have answered: what they did earlier is forgotten."""
        for hop in hops:
            self.blame.worked(hop.peer)

    def learn(self, hops: Sequence[Hop], held: Sequence[float], total: float) -> None:
        """See `client.session.route.Surroundings.learn`."""
        view, now, between = self.view(), trio.current_time(), self._distances.between
        peers = [CLIENT, *(hop.peer for hop in hops), CLIENT]
        network = sum(between(one, two) for one, two in pairwise(peers)) / 2
        blocks = [hop.stop - hop.start for hop in hops]
        for hop, seconds in zip(hops, admitted(held, blocks, total, network), strict=False):
            self.measured.learn(hop.peer, seconds / (hop.stop - hop.start), view.get(hop.peer), now)

    def learn_of_many(self, peer: PeerId, seconds: float) -> None:
        """A peer has computed many positions at once, in so many seconds for each and a block."""
        self.measured.learn(peer, seconds, self.view().get(peer), trio.current_time(), prefill=True)

    def _measured(
        self, spans: Sequence[Record], seen: Mapping[PeerId, float] | None = None, positions: int = 1
    ) -> Mapping[PeerId, float]:
        return {**self.measured.rates(spans, trio.current_time(), positions), **(seen or {})}

    def _avoided(self) -> list[PeerId]:
        """The peers that have failed lately, but for those that have been started again since."""
        entries = self.view().entries
        for peer in self.blame.soonest_first(trio.current_time()):
            if (entry := entries.get(peer)) is not None and entry.record.state == "online":
                self.blame.heard_of(peer, entry.sent)
        return self.blame.soonest_first(trio.current_time())

    def _spans(self, *, silent: bool = False) -> tuple[Record, ...]:
        self._seen = self.view()
        return self._measure_out(silent=silent)

    def _measure_out(self, others: Sequence[Record] = (), *, silent: bool = False) -> tuple[Record, ...]:
        """The peers that this client looks at, with the distances brought up to date.

        others: peers that take no new sessions, and whose distances are asked for too.
        """
        spans = self.usable(silent=silent)
        looked_at = sample(spans, self.spread or "", always=self.measured.decode)
        self._distances.update((*looked_at, *others), self.rtts())
        return tuple(self._as_told(span) for span in looked_at) if self._told else tuple(looked_at)

    def _leaning(self, spans: Sequence[Record]) -> Mapping[PeerId, float]:
        shy = queue_markup(spans)
        if self.spread is None:
            return shy
        own = client_bias(self.spread, shy)
        return {peer: shy[peer] * own[peer] for peer in shy}

    def _cheapest(
        self,
        spans: Sequence[Record],
        start: int,
        stop: int | None,
        without: frozenset[PeerId],
        measured: Mapping[PeerId, float],
        *,
        desperate: bool,
        lean: Mapping[PeerId, float],
        beside: int,
        positions: int = 1,
        waiting: Mapping[PeerId, int] | None = None,
    ) -> Chain:
        most = self.constraints.most_hops
        known = CostInputs(
            client_rtt=self.rtts(),
            measured=measured,
            positions=positions,
            waiting=waiting or {},
            distances=self._distances,
        )
        cheapest = partial(
            cheapest_chain,
            spans,
            self.blocks,
            part=Blocks(start, self.blocks if stop is None else stop),
            known=known,
            most_hops=None if most is None else most - beside,
            cost_factors=lean,
        )
        avoided = self._avoided()
        if desperate:  # those last that have failed most, and those that do not even answer after them
            silent = self.view().silent
            avoided = [*(p for p in avoided if p not in silent), *sorted(silent)]
            for forgiven in range(len(avoided)):
                with suppress(NoChain):
                    return cheapest(excluded=without.union(avoided[forgiven:]))
            avoided = []
        elif late := self.late():
            with suppress(NoChain):  # who has not answered yet may never do so
                return cheapest(excluded=without.union(avoided, late))
        try:
            return cheapest(excluded=without.union(avoided))
        except NoChain as none:
            raise self._explained(none) from None

    def _too_long(self, none: NoChain, tokens: int) -> NoChain:
        """The same, with what servers of the missing blocks take where that is less than was asked for."""
        said = [
            span.session_tokens
            for span in self.usable()
            if any(a < span.stop and span.start < b for a, b in none.missing)
        ]
        if any(0 < most < tokens for most in said):
            none.asked_tokens, none.session_tokens = tokens, max(said)
        return none

    def _explained(self, none: NoChain) -> NoChain:
        """The same, with what else is to be said about it: what constraints did, or what is served."""
        view, served = self.view(), self.view().models()
        if served and self.revision not in {key.revision for key in served}:
            ours = f"not {self.model} (revision {self.revision})"
            instead = [f"{key.model} (revision {key.revision})" for key in served]
            return NoChain(none.missing, none.blocks, alone=True, instead=[*instead, ours])
        of_use = [
            span
            for span in view.spans(self.revision, self.blocks, silent=True)
            if any(a < span.stop and span.start < b for a, b in none.missing)
        ]
        none.silent = sum(span.peer in view.silent for span in of_use)
        none.constrained = sum(
            span.peer not in view.silent and not self.constraints.admits(span) for span in of_use
        )
        return none


def _kind(record: Record) -> str:
    """What decides which tokens come out, beside the weights."""
    return f"{record.dtype} {record.quantize}"
