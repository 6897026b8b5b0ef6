"""Histograms out of plain numbers: an observation is one search in a tuple and two additions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# No two neighbours are more than a factor of 2.5 apart, and the bounds of alerts (0.1 s, 1 s) are among them.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Histogram:
    """Counts of observations up to each bound, as Prometheus has them.

    bounds: ascending; an observation equal to a bound counts in its bucket.  total: of all observations.
    One thread observes and any thread reads: a reading may lack the total of an observation that is under
    way, and its buckets always add up to its count.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Add one observation."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def cumulative(self) -> list[int]:
        """Observations up to each bound, and all of them at the end."""
        found, so_far = [], 0
        for count in list(self._counts):
            so_far += count
            found.append(so_far)
        return found
