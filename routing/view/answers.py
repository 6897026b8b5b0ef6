"""Which peers answer this one, and at which distance: the results of its pings.

A record describes a peer; only an answer shows that the peer can be reached from here.  A peer is

    unknown    never asked, or not within FRESH_SECONDS;
    late       asked for the first time GRACE_SECONDS ago, without an answer yet: other peers are preferred;
    known      it has answered within FRESH_SECONDS;
    silent     it does not answer: not its first question in time, or not FAILURES later ones in a row.

Times are the caller's clock, in seconds.  Nothing here sleeps; the caller decides which peers to ask.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from routing.names import PeerId
from routing.view.records import MAX_RTT_SECONDS

FRESH_SECONDS = 60.0  # for which an answer, or a missing one, counts
GRACE_SECONDS = 0.03  # that a choice waits for the answers of peers that it can do without
FAILURES = 2  # in a row, until a peer that has answered before counts as silent
_SAMPLES = 32  # round trips kept of one peer
_MAX_PEERS = 4096


@dataclass(frozen=True, slots=True)
class Liveness:
    """Whether a peer answers this one.

    silent_seconds: since its last answer; of a peer that has never answered, since its first question.  None
    for a peer that is not silent.
    rtt: seconds to the peer and back, None where unknown.
    """

    answers: Literal["yes", "silent", "unknown"]
    silent_seconds: float | None = None
    rtt: float | None = None


UNKNOWN = Liveness("unknown")


@dataclass(slots=True)
class _Peer:
    asked: float | None = None  # when the question under way went out
    tried: float = -math.inf  # when the last question went out
    began: float = math.inf  # when the first question went out
    answered: float = -math.inf  # when the last answer came
    failures: int = 0
    silent: bool = False
    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SAMPLES))


@dataclass(slots=True)
class Answers:
    """Questions and answers.  Memory is bounded: of very many peers the ones asked last are kept."""

    _peers: dict[PeerId, _Peer] = field(default_factory=dict)

    # --- events ---

    def ask(self, peer: PeerId, now: float) -> None:
        """A question goes out."""
        if peer not in self._peers and len(self._peers) >= _MAX_PEERS:
            idle = [known for known in self._peers if self._peers[known].asked is None]
            for known in sorted(idle, key=lambda each: self._peers[each].tried)[: _MAX_PEERS // 4]:
                del self._peers[known]
        known_peer = self._peers.setdefault(peer, _Peer())
        known_peer.asked = known_peer.tried = now
        known_peer.began = min(known_peer.began, now)

    def answered(self, peer: PeerId, rtt: float, now: float) -> None:
        """An answer came after `rtt` seconds."""
        known = self._peers.setdefault(peer, _Peer())
        known.answered, known.failures, known.silent = now, 0, False
        known.samples.append((now, rtt))

    def overdue(self, peer: PeerId, now: float) -> None:
        """The question under way has waited too long: a peer that has never answered is silent now."""
        if not self.has_answered(peer, now):
            self._peers[peer].silent = True

    def failed(self, peer: PeerId, now: float) -> None:
        """No answer came."""
        known = self._peers.setdefault(peer, _Peer())
        known.failures += 1
        known.silent = known.silent or known.failures >= FAILURES or not self.has_answered(peer, now)

    def done(self, peer: PeerId) -> None:
        """No question to the peer is under way any more."""
        if peer in self._peers:
            self._peers[peer].asked = None

    def withdrawn(self, peer: PeerId) -> None:
        """The question could not go out, for a reason of this node's."""
        if peer in self._peers:
            self._peers[peer].asked, self._peers[peer].tried = None, -math.inf

    def forget(self, present: Collection[PeerId], now: float) -> None:
        """Forget all other peers, and silent ones whose last question is older than FRESH_SECONDS."""
        for peer in [peer for peer, known in self._peers.items() if known.asked is None]:
            known = self._peers[peer]
            if peer not in present or (known.silent and known.tried <= now - FRESH_SECONDS):
                del self._peers[peer]

    # --- knowledge ---

    def under_way(self, peer: PeerId) -> float | None:
        """When the question under way to this peer went out; None without one."""
        known = self._peers.get(peer)
        return None if known is None else known.asked

    def is_due(self, peer: PeerId, now: float) -> bool:
        """Whether the peer should be asked: nothing is known of it, and no question is under way."""
        known = self._peers.get(peer)
        return known is None or (known.asked is None and known.tried <= now - FRESH_SECONDS)

    def has_answered(self, peer: PeerId, now: float) -> bool:
        """Whether the peer is known: it has answered within FRESH_SECONDS, and is not silent since."""
        known = self._peers.get(peer)
        return known is not None and not known.silent and known.answered > now - FRESH_SECONDS

    def rtts(self, now: float, seconds: float = FRESH_SECONDS) -> dict[PeerId, float]:
        """Round trips, in seconds, of the peers that answered within `seconds` and are not silent since.

        Each is the shortest within FRESH_SECONDS: the rest of a longer one is time in queues.
        """
        found = {}
        for peer, known in self._peers.items():
            if known.silent or known.answered <= now - seconds:
                continue
            fresh = [rtt for when, rtt in known.samples if when > now - FRESH_SECONDS]
            rtt = min(fresh, default=known.samples[-1][1])
            if rtt < MAX_RTT_SECONDS:
                found[peer] = rtt
        return found

    def liveness(self, peers: Iterable[PeerId], now: float) -> dict[PeerId, Liveness]:
        """Whether each of these peers answers."""
        rtts, found = self.rtts(now), {}
        for peer in peers:
            known = self._peers.get(peer)
            if known is not None and known.silent:
                since = known.answered if known.answered > -math.inf else min(known.began, now)
                found[peer] = Liveness("silent", now - since)
            elif self.has_answered(peer, now):
                found[peer] = Liveness("yes", None, rtts.get(peer))
            else:
                found[peer] = UNKNOWN
        return found

    def silent(self) -> frozenset[PeerId]:
        """The peers that do not answer."""
        return frozenset(peer for peer, known in self._peers.items() if known.silent)

    def late(self, now: float) -> frozenset[PeerId]:
        """The peers whose first question is older than GRACE_SECONDS and still without an answer."""
        return frozenset(
            peer
            for peer, known in self._peers.items()
            if known.asked is not None
            and known.asked <= now - GRACE_SECONDS
            and not known.silent
            and not self.has_answered(peer, now)
        )

    def unknown(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """The peers among these that are neither known nor silent."""
        silent = self.silent()
        return [peer for peer in peers if peer not in silent and not self.has_answered(peer, now)]

    def wait_for(self, peers: Iterable[PeerId], now: float, patience: float) -> float:
        """Seconds to wait for these peers' answers: each has `patience` seconds from its question on."""
        waiting = [since for peer in self.unknown(peers, now) if (since := self.under_way(peer)) is not None]
        return max((since + patience - now for since in waiting), default=0.0)
