"""Where the servers and the clients of a simulated swarm are, and how far from each other.

Five regions with the round trips that one sees between big data centres of them, and for each peer its
own line to there.  A part of `benchmarks swarm`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

REGIONS = ("US east", "US west", "Europe", "East Asia", "South America")
PEOPLE = (0.3, 0.2, 0.3, 0.15, 0.05)  # of servers and clients alike
RTT_MS = (
    (12, 65, 80, 190, 120),
    (65, 12, 140, 130, 180),
    (80, 140, 12, 230, 190),
    (190, 130, 230, 20, 300),
    (120, 180, 190, 300, 20),
)
SERVER_LINE_MS = (1.0, 8.0)  # there and back
CLIENT_LINE_MS = (2.0, 15.0)


@dataclass(frozen=True, slots=True)
class Place:
    """A region, and the seconds from a peer to its region's middle and back."""

    region: int
    line: float

    def rtt(self, other: Place) -> float:
        """Seconds to another place and back."""
        return RTT_MS[self.region][other.region] / 1e3 + self.line + other.line


def somewhere(rng: random.Random, line_ms: tuple[float, float]) -> Place:
    """A place by chance."""
    return Place(rng.choices(range(len(REGIONS)), PEOPLE)[0], rng.uniform(*line_ms) / 1e3)
