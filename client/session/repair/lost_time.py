"""The time that a session loses to a slow chain, and the moment to look for another chain.

One slow step is chance: another client's prompt was before it.  A move costs a replay, and the replay makes
the new hops slow for other clients, which then move too: in `benchmarks swarm --clients`, at 80 % of the
capacity, moves at a single slow step cost a fifth of it.  So the loss is added up, a CUSUM (Page, 1954): of
each step the seconds beyond SUSPICION times the usual, less for quicker steps, and never below 0.  The rule
is ski rental: move once the loss exceeds a replay's cost; the total is at most about twice the optimum.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

RECENT_STEPS = 64
MIN_STEPS = 4
SUSPICION = 2.0  # times the usual step: the seconds of a step beyond that are lost
MAX_LOST_STEPS = 4.0  # usual steps: after this loss a session looks for a chain, at any cost of a replay
REPLAYED_SHARE = 0.15  # of a decode step's time, for each position of a replay


@dataclass(slots=True)
class LostTime:
    """The recent steps of a session, in seconds, and the recent loss.  Decides nothing alone."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _lost: float = 0.0

    def usual(self) -> float | None:
        """The median of the recent steps; None before the first."""
        return statistics.median(self.recent) if self.recent else None

    def took(self, seconds: float, expected: float) -> None:
        """A decode step took `seconds`.

        expected: the chain's promise, the measure of a chain that is slow from its first step.
        """
        self.recent.append(seconds)
        median = statistics.median(self.recent)
        lost = max(0.0, self._lost + seconds - SUSPICION * min(median, SUSPICION * expected))
        # Bounded, so that quick steps make up for it; by real steps: a false promise may be next to nothing.
        self._lost = min(lost, 2 * MAX_LOST_STEPS * median)

    def too_much(self, length: int, hops: int) -> bool:
        """Whether to look for a better chain, for `length` positions at `hops` hops."""
        if not self._lost or len(self.recent) < MIN_STEPS:
            return False
        replay = length * REPLAYED_SHARE / hops  # of one hop's blocks, in usual steps
        return self._lost > statistics.median(self.recent) * min(MAX_LOST_STEPS, max(1.0, replay))

    def forget(self) -> None:
        """The session has moved: the loss begins at 0."""
        self._lost = 0.0
