"""How long steps wait before they are computed: a record's `queue`, which clients choose chains by.

The number of waiting steps would not do.  It changes with every step and is read seconds later; and ten
steps of one batch wait no longer than a single one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# After this time an observation counts 1/e.  A shorter time shows chance, a longer one shows the past: in
# `benchmarks swarm --clients` 3 to 10 s gave the shortest steps, 30 s longer ones.
REMEMBERED_SECONDS = 10.0


@dataclass(slots=True)
class Waits:
    """Sums over decode steps that fade with time.  All times in seconds, on the caller's clock.

    One step of the usual length that did not wait is always added: a node that has been idle for long has no
    wait.
    """

    _waited: float = 0.0
    _computed: float = 0.0
    _steps: float = 0.0
    _usual: float = 0.0  # of computing
    _at: float = -math.inf

    def observe(self, waited: float, computed: float, steps: int, now: float) -> None:
        """Add `steps` steps: the seconds that they waited, and computed, in sum."""
        fade = self._fade(now)
        self._waited = self._waited * fade + max(0.0, waited)
        self._computed = self._computed * fade + computed
        self._steps = self._steps * fade + steps
        self._usual, self._at = self._computed / self._steps, now

    def queue(self, now: float) -> float:
        """The wait of a step as a multiple of its computing; 0 where nothing is known."""
        if not self._usual:
            return 0.0
        fade = self._fade(now)
        return self._waited * fade / (self._computed * fade + self._usual)

    def _fade(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._at) / REMEMBERED_SECONDS)
