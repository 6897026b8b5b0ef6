"""Peers that have failed lately, and for how long they are to be left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from routing.names import PeerId

AVOID_SECONDS = 15.0  # after a fault; doubles with every further one
MAX_AVOID_SECONDS = 3600.0
SAME_TIME_SECONDS = 1.0  # how wrong the age of a record may be


@dataclass(slots=True)
class AvoidedPeers:
    """Peers to be avoided, and until when.  Times are the caller's clock, in seconds."""

    _until: dict[PeerId, float] = field(default_factory=dict)
    _faults: dict[PeerId, int] = field(default_factory=dict)
    _gone: dict[PeerId, float] = field(default_factory=dict)  # since when; infinite for other faults

    def fault(self, peer: PeerId, now: float, *, gone: bool = False) -> None:
        """A peer was wrong, slow or gone: avoid it for 15 s, doubling up to an hour.

        gone: its connection broke, or could not be made; see `seen_online`.
        While it is avoided it may be tried where no other peer is left; that it fails again then says
        nothing new, and does not make it longer.
        """
        if self._until.get(peer, now) > now and peer in self._faults:
            return
        self._gone[peer] = now if gone else math.inf
        count = self._faults[peer] = self._faults.get(peer, 0) + 1
        self._until[peer] = now + min(AVOID_SECONDS * 2 ** min(count - 1, 20), MAX_AVOID_SECONDS)

    def refused(self, peer: PeerId, retry_after_seconds: float | None, now: float) -> None:
        """A peer said no: ask others for a while, without blaming it."""
        until = now + (AVOID_SECONDS if retry_after_seconds is None else retry_after_seconds)
        self._until[peer] = max(until, self._until.get(peer, until))

    def seen_online(self, peer: PeerId, sent: float) -> None:
        """A peer has said at `sent` that it serves.  One that was gone before has been started again."""
        if sent > self._gone.get(peer, math.inf) + SAME_TIME_SECONDS:
            self._until.pop(peer, None)

    def worked(self, peer: PeerId) -> None:
        """A peer answered: its earlier faults are forgotten."""
        self._gone.pop(peer, None)
        self._faults.pop(peer, None)
        self._until.pop(peer, None)

    def avoided(self, now: float) -> frozenset[PeerId]:
        """The peers to leave out now."""
        return frozenset(self.soonest_first(now))

    def soonest_first(self, now: float) -> list[PeerId]:
        """The same, those first that will be forgiven first."""
        return sorted((p for p, until in self._until.items() if until > now), key=self._until.__getitem__)
