"""Pauses before a session is opened again at one peer, so that no call spins.  Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from routing.names import PeerId

PAUSE_SECONDS = 0.05  # before the second opening at a peer; doubles with each further one
MAX_PAUSE_SECONDS = 0.8  # so that a peer that comes back is found soon
ENDINGS_BORNE = 2  # by one peer without an answer between: a session may be too old, or a node restarts


@dataclass(slots=True)
class Pauses:
    """Openings at each peer since the last answer.  Times are the caller's clock, in seconds.

    openings: their number, and the time of the last one.  endings: of sessions, without a fault.
    """

    openings: dict[PeerId, tuple[int, float]] = field(default_factory=dict)
    endings: Counter[PeerId] = field(default_factory=Counter)

    def next_opening(self, peer: PeerId, now: float) -> float:
        """Note one more opening at a peer; the time for it."""
        count, last = self.openings.get(peer, (0, now))
        pause = min(PAUSE_SECONDS * 2 ** min(count - 1, 20), MAX_PAUSE_SECONDS) if count else 0.0
        at = max(now, last + pause)
        self.openings[peer] = count + 1, at
        return at

    def ended(self, peer: PeerId) -> bool:
        """A peer ends the session without a fault; whether it has done so too often."""
        self.endings[peer] += 1
        return self.endings[peer] > ENDINGS_BORNE

    def answered(self) -> None:
        """A step has its answer: all begins anew."""
        self.openings.clear()
        self.endings.clear()
