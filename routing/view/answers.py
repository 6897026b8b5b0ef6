"""Who answers us, how far away, and who does not: what one peer has found out by asking others.

Records say what peers are; whether they can be reached from here only an answer says.  A peer is

    unknown    never asked, or not for a while;
    late       asked for the first time GRACE_SECONDS ago, and not a word yet: better none than this one;
    known      it has answered within FRESH_SECONDS;
    silent     it does not answer: the first question for long enough, or FAILURES in a row later.

Times are the caller's clock, in seconds.  Nothing here sleeps, and who is asked when is decided elsewhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from routing.names import PeerId
from routing.view.records import MAX_RTT_SECONDS

FRESH_SECONDS = 60.0  # for which an answer, or none, counts
GRACE_SECONDS = 0.03  # what a choice waits for peers that were just asked, where it can do without them
FAILURES = 2  # in a row, of a peer that has answered before
_SAMPLES = 32  # round trips kept of one peer
_MAX_PEERS = 4096


@dataclass(slots=True)
class _Peer:
    asked: float | None = None  # the question that is under way
    tried: float = -math.inf  # the last one
    heard: float = -math.inf
    failures: int = 0
    silent: bool = False
    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SAMPLES))


@dataclass(slots=True)
class Answers:
    """What was asked and answered.  Memory is bounded: of very many peers those asked last are kept."""

    _peers: dict[PeerId, _Peer] = field(default_factory=dict)

    # --- what happened ---

    def ask(self, peer: PeerId, now: float) -> None:
        """A question goes out."""
        if peer not in self._peers and len(self._peers) >= _MAX_PEERS:
            idle = [known for known in self._peers if self._peers[known].asked is None]
            for known in sorted(idle, key=lambda each: self._peers[each].tried)[: _MAX_PEERS // 4]:
                del self._peers[known]
        known_peer = self._peers.setdefault(peer, _Peer())
        known_peer.asked = known_peer.tried = now

    def answered(self, peer: PeerId, rtt: float, now: float) -> None:
        """An answer came, after so many seconds there and back."""
        known = self._peers.setdefault(peer, _Peer())
        known.heard, known.failures, known.silent = now, 0, False
        known.samples.append((now, rtt))

    def overdue(self, peer: PeerId, now: float) -> None:
        """The question under way has waited for long: who has never answered is silent."""
        if not self.has_answered(peer, now):
            self._peers[peer].silent = True

    def failed(self, peer: PeerId, now: float) -> None:
        """No answer came."""
        known = self._peers.setdefault(peer, _Peer())
        known.failures += 1
        known.silent = known.silent or known.failures >= FAILURES or not self.has_answered(peer, now)

    def done(self, peer: PeerId) -> None:
        """Nothing is under way any more."""
        if peer in self._peers:
            self._peers[peer].asked = None

    def withdrawn(self, peer: PeerId) -> None:
        """The question could not go out, for a reason of our own."""
        if peer in self._peers:
            self._peers[peer].asked, self._peers[peer].tried = None, -math.inf

    def forget(self, present: Collection[PeerId], now: float) -> None:
        """Keep what is known of these peers, and of the silent among them what is not old."""
        for peer in [peer for peer, known in self._peers.items() if known.asked is None]:
            known = self._peers[peer]
            if peer not in present or (known.silent and known.tried <= now - FRESH_SECONDS):
                del self._peers[peer]

    # --- what is known ---

    def under_way(self, peer: PeerId) -> float | None:
        """Since when that peer has been asked, if it is being asked now."""
        known = self._peers.get(peer)
        return None if known is None else known.asked

    def is_due(self, peer: PeerId, now: float) -> bool:
        """Whether nothing is known of a peer, nor will be soon."""
        known = self._peers.get(peer)
        return known is None or (known.asked is None and known.tried <= now - FRESH_SECONDS)

    def has_answered(self, peer: PeerId, now: float) -> bool:
        """Whether it is known, or was until a moment ago."""
        known = self._peers.get(peer)
        return known is not None and not known.silent and known.heard > now - FRESH_SECONDS

    def rtts(self, now: float, seconds: float = FRESH_SECONDS) -> dict[PeerId, float]:
        """The round trips in seconds of those that answered within so many, and are not silent since.

        The shortest within FRESH_SECONDS: whatever else a measurement finds is time in queues.
        """
        found = {}
        for peer, known in self._peers.items():
            if known.silent or known.heard <= now - seconds:
                continue
            fresh = [rtt for when, rtt in known.samples if when > now - FRESH_SECONDS]
            rtt = min(fresh, default=known.samples[-1][1])
            if rtt < MAX_RTT_SECONDS:
                found[peer] = rtt
        return found

    def silent(self) -> frozenset[PeerId]:
        """Those that do not answer."""
        return frozenset(peer for peer, known in self._peers.items() if known.silent)

    def late(self, now: float) -> frozenset[PeerId]:
        """Those that were asked a moment ago, for the first time, and have not answered at once."""
        return frozenset(
            peer
            for peer, known in self._peers.items()
            if known.asked is not None
            and known.asked <= now - GRACE_SECONDS
            and not known.silent
            and not self.has_answered(peer, now)
        )

    def unknown(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """Those of these that are neither known nor silent."""
        silent = self.silent()
        return [peer for peer in peers if peer not in silent and not self.has_answered(peer, now)]

    def wait_for(self, peers: Iterable[PeerId], now: float, patience: float) -> float:
        """How long these may still be waited for: each for `patience` seconds from its first question on."""
        waiting = [since for peer in self.unknown(peers, now) if (since := self.under_way(peer)) is not None]
        return max((since + patience - now for since in waiting), default=0.0)
