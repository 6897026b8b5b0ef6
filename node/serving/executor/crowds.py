"""Which network prefixes are crowds, and when their decode steps rest for the others: pure, without a clock.

An id and a session cost nothing, so one machine can be hundreds of them.  A batch costs about the same for
one row as for many where the hardware is wide; where it is not, a crowd's rows make every batch long, and a
peer alone behind its address would wait for two such batches at each of its tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from node.serving.executor.jobs import Batch, Job, Kind

CROWD_FACTOR = 8.0  # times the steps of another prefix that decodes: campuses alike do not rest


@dataclass(slots=True)
class Crowds:
    """Prefixes with many steps at once.  A peer without a prefix, as in a local network, is no crowd.

    recently_active_seconds: how long a prefix counts as decoding, and as one with so many steps.
    rest: times the seconds that a batch with a crowd's rows takes from others, in which a crowd's rows have
    no batch of their own, and make no batch of others longer.
    until: the end of this rest, for decode steps and for prefills: one must not starve the other.
    known: the crowds, when `look` was last called; peers: theirs with steps that waited then.
    """

    recently_active_seconds: float
    rest: float
    until: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(Kind, -math.inf))
    known: frozenset[str] = frozenset()
    peers: frozenset[str] = frozenset()
    _steps: dict[str, tuple[int, float]] = field(default_factory=dict)  # the most at once, and when

    def look(self, jobs: Sequence[Job], now: float) -> None:
        """Find the crowds.  jobs: all steps that wait, decode steps and prefills."""
        counts, prefixes = Counter[str](), {job.prefix for job in jobs}
        peers: dict[str, set[str]] = {}
        for job in jobs:
            party = job.prefix or job.peer
            counts[party] += 1
            peers.setdefault(party, set()).add(job.peer)
        since = now - self.recently_active_seconds
        self._steps = {
            party: (most, at)
            for party, (most, at) in self._steps.items()
            if at > since and most > counts[party]
        }
        self._steps |= {party: (count, now) for party, count in counts.items() if party not in self._steps}
        fewest = min((most for most, _ in self._steps.values()), default=0)
        self.known = frozenset(
            party
            for party, (most, _) in self._steps.items()
            if most > CROWD_FACTOR * fewest and party in prefixes
        )
        self.peers = frozenset().union(*(peers.get(party, ()) for party in self.known))

    def resting(self, kind: Kind, now: float) -> frozenset[str]:
        """The prefixes whose jobs of a kind rest."""
        return self.known if self.known and now < self._end(kind) else frozenset()

    def waited_for(self, job: Job, peers: set[str]) -> set[str]:
        """Those of the peers for which a long job waits or is cut: no job of others does so for a crowd."""
        return peers if job.prefix in self.known else peers - self.peers

    def ran(self, batch: Batch, seconds: float, one_row: float, now: float) -> None:
        """A batch of steps ran.  one_row: the seconds of a step of one row, which others would have taken.

        What it took from others: a step that comes in the middle of a short batch waits for half of it, and
        for nearly all of a chunk; one in it takes longer than alone.
        """
        parties = {piece.job.prefix or piece.job.peer for piece in batch}
        if self.known.isdisjoint(parties):
            return
        kind = batch[0].job.kind
        if self.known >= parties:
            taken = seconds if kind is Kind.PREFILL else seconds / 2
        else:
            taken = max(0.0, seconds - one_row)
        self.until[kind] = max(self.until[kind], now + self.rest * taken)

    def resume_at(self, now: float) -> float:
        """When the next rest ends: at its end, or when the prefixes that it is for have gone; or infinity."""
        return min((end for end in map(self._end, Kind) if end > now), default=math.inf)

    def _end(self, kind: Kind) -> float:
        others = (at for party, (_, at) in self._steps.items() if party not in self.known)
        return min(self.until[kind], max(others, default=-math.inf) + self.recently_active_seconds)
