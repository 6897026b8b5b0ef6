"""Which hops fill the gaps of a session's route, and which neighbours each hop knows.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from client.chains.chooser import Chooser
from client.session.hop_state import HopState, Neighbours
from client.session.terms import Terms
from routing.blocks import gaps
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.errors import CacheFull, Refused

MAX_REFUSED_SECONDS = 15.0  # for which a peer is avoided after successive refusals
REFUSALS_BORNE = 1  # of a present hop, until a last resort tries other peers first


@dataclass(slots=True)
class Replacement:
    """Decides the hops that a session keeps, and the new hops that it takes.

    Promises, checked by tests/unit/test_replacement.py:
      * hops that live and are not avoided stay where the gaps between them can be filled;
      * a peer that cannot serve the session at all is never chosen again;
      * a peer that refuses repeatedly is avoided for twice the time after each refusal, 15 s at most, and a
        last resort keeps it no more;
      * two hops that cannot reach each other do not learn of each other;
      * two hops of which one reported the other are not neighbours again where there are others.

    kinds: of the hops until now: other kinds would give other tokens.
    """

    terms: Terms
    chooser: Chooser
    kinds: frozenset[str] = frozenset()
    _apart: set[tuple[PeerId, PeerId]] = field(default_factory=set)  # cannot reach each other
    _distrusted: set[tuple[PeerId, PeerId]] = field(default_factory=set)  # of which one is at fault
    _relayed: set[tuple[PeerId, PeerId]] = field(default_factory=set)  # noted in the trace already
    _unable: frozenset[PeerId] = frozenset()  # peers that cannot serve this session at all
    _refusals: Counter[PeerId] = field(default_factory=Counter)

    def best_chain(
        self, hops: Sequence[HopState], *, last_resort: bool, standbys: Sequence[Hop] = ()
    ) -> Chain:
        """Keep usable present hops and fill the gaps; else take the best chain of all.

        standbys: take the places of hops with the same blocks.  Raises NoChain.
        """
        best = self._best_without(frozenset(), hops, last_resort, standbys)
        if self._distrusted and (pair := self._distrusted_in(best)) is not None:
            for peer in pair:
                with suppress(NoChain):
                    other = self._best_without(frozenset({peer}), hops, last_resort)
                    if self._distrusted_in(other) is None:
                        return other
        return best

    def _distrusted_in(self, chain: Chain) -> tuple[PeerId, PeerId] | None:
        """Two neighbours of a chain that must not be neighbours."""
        pairs = ((one.peer, two.peer) for one, two in pairwise(chain.hops))
        return next((pair for pair in pairs if pair in self._distrusted), None)

    def _best_without(
        self,
        without: frozenset[PeerId],
        hops: Sequence[HopState],
        last_resort: bool,
        standbys: Sequence[Hop] = (),
    ) -> Chain:
        hops = [hop for hop in hops if hop.hop.peer not in without]
        kept = [hop for hop in hops if hop.alive and (not hop.avoided or (last_resort and self._bears(hop)))]
        choose = partial(
            self.chooser.choose, last_resort=last_resort, kinds=self.kinds, tokens=self.terms.cache_tokens
        )
        gone = self._unable.union(without, (hop.hop.peer for hop in hops if hop.avoided and not last_resort))
        taken = frozenset(hop.hop.peer for hop in kept) | gone
        chosen: list[Hop] = [hop.hop for hop in kept]
        left = [hop.hop.blocks for hop in hops if hop not in kept]
        chosen += [hop for hop in standbys if hop.blocks in left and hop.peer not in taken]
        taken |= {hop.peer for hop in chosen}
        try:
            missing = gaps(chosen, self.terms.run)
            for done, gap in enumerate(missing, 1):  # each later gap takes a hop at least
                others = len(chosen) + len(missing) - done
                chosen += choose(gap.start, gap.stop, excluded=taken, other_hops=others).hops
        except NoChain:
            return choose(*self.terms.run, excluded=gone)
        chosen.sort(key=lambda hop: hop.start)
        if len({hop.peer for hop in chosen}) < len(chosen):  # a peer can serve a session only once
            return choose(*self.terms.run, excluded=gone)
        return Chain(tuple(chosen), 0.0)

    def _bears(self, hop: HopState) -> bool:
        """Whether a last resort keeps an avoided hop: one more question, not one after the other."""
        return self._refusals[hop.hop.peer] <= REFUSALS_BORNE

    def adopt(self, hops: Iterable[Hop]) -> None:
        """These hops serve the session from now on."""
        self.kinds = frozenset(kind for hop in hops if (kind := self.chooser.kind_of(hop.peer)))

    def refused(self, peer: PeerId, error: Refused) -> float | None:
        """A peer has refused; the seconds for which it is avoided, None: the usual time."""
        self._refusals[peer] += 1  # each further refusal doubles the time
        soon = error.retry_after_seconds
        if soon is None:
            if type(error) in (Refused, CacheFull):
                self._unable |= {peer}  # it will never have the capacity for this session
            return None
        times: int = 2 ** min(self._refusals[peer] - 1, 8)
        return min(soon * times, MAX_REFUSED_SECONDS)

    def separate(self, pairs: Collection[tuple[PeerId, PeerId]]) -> None:
        """In each pair the first hop cannot push to the second."""
        self._apart.update(pairs)

    def distrust(self, pair: tuple[PeerId, PeerId]) -> None:
        """One of the two is at fault.  As a last resort the client carries the outputs between them."""
        self._distrusted.add(pair)
        self._apart.add(pair)

    def newly_relayed(self, pairs: Sequence[tuple[PeerId, PeerId]]) -> list[tuple[PeerId, PeerId]]:
        """The pairs between which the client did not carry hidden states before."""
        fresh = [pair for pair in pairs if pair not in self._relayed]
        self._relayed.update(fresh)
        return fresh

    def neighbours(self, hops: Sequence[Hop], index: int) -> Neighbours:
        """The neighbours that the hop at `index` learns of."""
        last = index == len(hops) - 1
        before = None if index == 0 else hops[index - 1].peer
        peer, after = hops[index].peer, None if last else hops[index + 1].peer
        relay = after is not None and (peer, after) in self._apart
        in_reach = before is not None and (before, peer) not in self._apart
        return Neighbours(before if in_reach else None, None if relay else after, relay)
