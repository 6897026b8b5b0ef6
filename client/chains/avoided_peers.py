"""Peers that have failed lately, and the time for which they are avoided."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from client.chains.accusations import Accusations
from routing.names import PeerId

AVOID_SECONDS = 15.0  # after a fault; doubles with every further one
MAX_AVOID_SECONDS = 3600.0
BUSY_FACTOR = 12.0  # times what a busy peer's step took: one that says so for ever costs a thirteenth
MAX_BUSY_SECONDS = 240.0
SAME_TIME_SECONDS = 1.0  # the largest error of a record's age


def busy_seconds(held: float) -> float:
    """For how long to ask others, after a peer has worked on one step for `held` seconds and was left."""
    return min(max(AVOID_SECONDS, BUSY_FACTOR * held), MAX_BUSY_SECONDS)


@dataclass(slots=True)
class AvoidedPeers:
    """The avoided peers, each with the end of its avoidance.  Times are the caller's clock, in seconds.

    accusations: what peers report of each other.
    """

    accusations: Accusations = field(default_factory=Accusations)
    _until: dict[PeerId, float] = field(default_factory=dict)  # after faults
    _refused_until: dict[PeerId, float] = field(default_factory=dict)
    _faults: dict[PeerId, float] = field(default_factory=dict)
    _gone: dict[PeerId, float] = field(default_factory=dict)  # time of the loss; infinite otherwise

    def fault(self, peer: PeerId, now: float, *, gone: bool = False, share: float = 1.0) -> None:
        """A peer was wrong, slow or gone: avoid it for 15 s, doubling up to an hour.

        gone: its connection broke, or could not be made; see `seen_online`.  share: of a fault, where another
        peer may be the one at fault: two halves count as one, and the first half for 11 s.
        An avoided peer may be tried if no other peer is left.  Another failure in this time does not
        prolong it.
        """
        if self._until.get(peer, now) > now and peer in self._faults:
            return
        self._gone[peer] = now if gone else math.inf
        count = self._faults[peer] = self._faults.get(peer, 0) + share
        self._until[peer] = now + min(AVOID_SECONDS * 2 ** min(count - 1, 20), MAX_AVOID_SECONDS)

    def refused(self, peer: PeerId, retry_after_seconds: float | None, now: float) -> None:
        """A peer said no: ask others for a while, without blaming it.

        An answer to another session of this client, which the peer serves, does not shorten the time.
        """
        until = now + (AVOID_SECONDS if retry_after_seconds is None else retry_after_seconds)
        self._refused_until = {each: end for each, end in self._refused_until.items() if end > now}
        self._refused_until[peer] = max(until, self._refused_until.get(peer, until))

    def seen_online(self, peer: PeerId, sent: float) -> None:
        """A peer has announced at `sent` that it serves: a peer that was gone before has restarted."""
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
        """The avoided peers, in the order of the end of their avoidance."""
        ends = dict(self._refused_until)
        for peer, until in self._until.items():
            ends[peer] = max(until, ends.get(peer, until))
        return sorted((peer for peer, until in ends.items() if until > now), key=ends.__getitem__)
