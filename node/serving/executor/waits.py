"""How long steps wait before they are computed: what a record's `queue` says, and chains are chosen by.

Not how many wait at the moment.  That number changes with every step, and whoever reads it reads it
seconds later; and ten steps that are computed as one batch are no longer a wait than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# After so many seconds what was seen counts 1/e.  Shorter, and a record tells of chance; longer, and of a
# time that has passed: in `benchmarks swarm --clients` 3 to 10 s gave the shortest steps, 30 s longer ones.
REMEMBERED_SECONDS = 10.0


@dataclass(slots=True)
class Waits:
    """Sums over decode steps that fade with time.  All times in seconds, on the caller's clock.

    A step of the usual length that did not wait is reckoned in always: where nothing has been computed
    for long there is no wait.
    """

    _waited: float = 0.0
    _computed: float = 0.0
    _steps: float = 0.0
    _usual: float = 0.0  # of computing
    _at: float = -math.inf

    def observe(self, waited: float, computed: float, steps: int, now: float) -> None:
        """So many steps have together waited so long, and then taken so long."""
        fade = self._fade(now)
        self._waited = self._waited * fade + max(0.0, waited)
        self._computed = self._computed * fade + computed
        self._steps = self._steps * fade + steps
        self._usual, self._at = self._computed / self._steps, now

    def queue(self, now: float) -> float:
        """What a step waits, in times of its own computing; 0 where nothing is known."""
        if not self._usual:
            return 0.0
        fade = self._fade(now)
        return self._waited * fade / (self._computed * fade + self._usual)

    def _fade(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._at) / REMEMBERED_SECONDS)
