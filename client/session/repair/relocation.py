"""The time at which a session leaves slow hops, and the choice of these hops.  Pure."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from client.chains.chooser import Chooser
from client.session.repair.lost_time import REPLAYED_SHARE, LostTime
from client.session.steps import StepTimes
from client.session.terms import Terms
from routing.chains.hops import Chain, Hop, NoChain
from routing.chains.measured import admitted
from routing.names import PeerId

BETTER = 0.6  # of the present chain's seconds: then another chain is worth a move
SEARCH_SHARE = 0.05  # of the time may go into the search for a better chain
MIN_GAIN_SECONDS = 0.01  # a step: less is noise
COOLDOWN_SECONDS = 5.0  # after a move, before another one
STEPS_AHEAD = 32  # steps that are assumed to come: their gain has to pay for the replay
SEEN_STEPS = 3  # of a hop: their median is its present speed


@dataclass(slots=True)
class Relocation:
    """Decides the time of a search for another chain, and whether a move to it pays.

    Promises, checked by tests/unit/test_relocation.py:
      * no search before more time was lost than a replay costs, nor within COOLDOWN_SECONDS of a move;
      * searches take at most SEARCH_SHARE of the time;
      * a chain is taken only if it needs at most BETTER of the present seconds, gains MIN_GAIN_SECONDS a
        step, and wins the replay back within STEPS_AHEAD steps;
      * hops that say that they had a step for less time than they did keep no session.

    terms: of the session.
    """

    terms: Terms
    lost_time: LostTime = field(default_factory=LostTime)
    _observed: dict[PeerId, deque[float]] = field(default_factory=dict)  # seconds per block
    _recent: deque[StepTimes] = field(default_factory=lambda: deque(maxlen=SEEN_STEPS))
    _search_at: float = 0.0  # the earliest next search

    def observe(self, hops: Sequence[Hop], times: StepTimes, expected: float) -> None:
        """A decode step has come back.  expected: seconds that the chain promised."""
        self.lost_time.took(times.total, expected)
        self._recent.append(times)
        for hop, (held, _) in zip(hops, times.hops, strict=False):
            seen = self._observed.get(hop.peer)
            if seen is None:
                seen = self._observed[hop.peer] = deque(maxlen=SEEN_STEPS)
            seen.append(held / (hop.stop - hop.start))

    def is_search_due(self, length: int, hops: int, now: float) -> bool:
        """Whether to search for a better chain, for caches of `length` positions at `hops` hops."""
        return now >= self._search_at and self.lost_time.too_much(length, hops)

    def searched(self, began: float, now: float, *, moves: bool) -> None:
        """A search has been made; `moves`: it has found a chain to move to."""
        self._search_at = now + (COOLDOWN_SECONDS if moves else (now - began) / SEARCH_SHARE)
        if moves:
            self.lost_time.forget()

    def hops_to_leave(
        self, chain: Chain, length: int, chooser: Chooser, kinds: frozenset[str]
    ) -> frozenset[Hop]:
        """The hops whose replacement makes the session fast enough to pay for a replay."""
        observed = {peer: statistics.median(held) for peer, held in self._observed.items()}
        observed |= self._admitted(chain.hops, chooser, observed)
        present = chooser.cost(chain.hops, observed)
        gains = [
            (self._gain(chain, length, hops, seconds, present), hops)
            for hops, seconds in self._alternatives(chain, chooser, kinds, observed)
        ]
        gain, best = max(gains, default=(0.0, chain.hops), key=lambda option: option[0])
        return frozenset(chain.hops).difference(best) if gain > 0 else frozenset()

    def _admitted(
        self, hops: Sequence[Hop], chooser: Chooser, observed: Mapping[PeerId, float]
    ) -> dict[PeerId, float]:
        """Seconds per block of these hops, with the time that they do not account for."""
        if not self._recent or not all(hop.peer in observed for hop in hops):
            return {}
        blocks = [hop.stop - hop.start for hop in hops]
        held = [observed[hop.peer] * count for hop, count in zip(hops, blocks, strict=True)]
        network = chooser.cost(hops, dict.fromkeys([hop.peer for hop in hops], 0.0))
        total = sum(held) + statistics.median([times.network for times in self._recent])
        found = admitted(held, blocks, total, network)
        return {hop.peer: seconds / count for hop, seconds, count in zip(hops, found, blocks, strict=True)}

    def _alternatives(
        self, chain: Chain, chooser: Chooser, kinds: frozenset[str], observed: dict[PeerId, float]
    ) -> Iterator[tuple[tuple[Hop, ...], float]]:
        """Chains that might be better, with their seconds a step: the best one, and for each hop the
        present chain with others in the hop's place, which has less to replay."""
        hops = chain.hops
        choose = partial(chooser.choose, kinds=kinds, tokens=self.terms.cache_tokens, observed=observed)
        with suppress(NoChain):
            best = choose(*self.terms.run)
            yield best.hops, best.expected_seconds
        ours = frozenset(hop.peer for hop in hops)
        for index, hop in enumerate(hops):
            with suppress(NoChain):
                instead = choose(hop.start, hop.stop, excluded=ours, other_hops=len(hops) - 1)
                other = (*hops[:index], *instead.hops, *hops[index + 1 :])
                yield other, chooser.cost(other, observed)

    def _gain(self, chain: Chain, length: int, hops: Sequence[Hop], seconds: float, present: float) -> float:
        """Seconds gained by a move to `hops`, which take `seconds` a step, less the replay; 0 for too few."""
        gain = present - seconds
        if gain < max(MIN_GAIN_SECONDS, (1 - BETTER) * present):
            return 0.0
        fresh = sum(hop.stop - hop.start for hop in hops if hop not in chain.hops)
        replay: float = length * REPLAYED_SHARE * seconds * fresh / self.terms.run.size
        return max(0.0, gain * STEPS_AHEAD - replay)
