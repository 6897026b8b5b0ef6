"""The peers that use the compute now or a moment ago, and how much of it each of them has had."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from node.serving.executor.jobs import Kind

MAX_PASSED_OVER = 3  # batches of a kind in which a peer's job of it may be passed over for cheaper ones


@dataclass(slots=True)
class ActivePeer:
    """A peer that has jobs, or had one a moment ago.

    last_active_at: when a job of it was last submitted or run; last_short_decode_at: the same of short
    decode steps; last_drafts_at: of decode steps of several tokens, as those that verify drafts.
    compute_seconds: seconds of compute that it has used; newcomers begin at the smallest figure of the
    others.  passed_over: batches of each kind since its last one.
    """

    last_active_at: float
    compute_seconds: float = 0.0
    last_short_decode_at: float = -math.inf
    last_drafts_at: float = -math.inf
    passed_over: Counter[Kind] = field(default_factory=Counter)


@dataclass(slots=True)
class ActivePeers:
    """Active peers by name, or the prefixes of their addresses.

    recently_active_seconds: how long a peer without jobs counts as active.
    """

    recently_active_seconds: float
    by_name: dict[str, ActivePeer] = field(default_factory=dict)
    look_at: float = math.inf  # no peer is to be forgotten before

    def touch(self, name: str, now: float, *, short_decode: bool) -> ActivePeer:
        """A job of this peer was submitted or run; short_decode: it was a short decode step."""
        peer = self.by_name.get(name)
        if peer is None:
            peer = self.by_name[name] = ActivePeer(now)
            self.look_at = min(self.look_at, now + self.recently_active_seconds)
        peer.last_active_at = now
        if short_decode:
            peer.last_short_decode_at = now
        return peer

    def choose(self, names: Iterable[str], kind: Kind) -> str:
        """Whose job of a kind runs next: of the one with the least compute; the first of equals.

        One that was passed over MAX_PASSED_OVER times comes before.
        """
        waiting = {name: self.by_name[name] for name in names}

        def rank(name: str) -> tuple[int, float]:
            passed = waiting[name].passed_over[kind]
            return (-passed if passed >= MAX_PASSED_OVER else 0, waiting[name].compute_seconds)

        chosen = min(waiting, key=rank)
        for peer in waiting.values():
            peer.passed_over[kind] += 1
        waiting[chosen].passed_over[kind] = 0
        return chosen

    def charge_as_newcomer(self, name: str) -> None:
        """Raise a peer's compute to the smallest figure of the others: time away earns none."""
        others = [other.compute_seconds for other_name, other in self.by_name.items() if other_name != name]
        peer = self.by_name[name]
        peer.compute_seconds = max(peer.compute_seconds, min(others, default=0.0))

    def short_decoders(self, now: float) -> set[str]:
        """Peers that run short decode steps, now or a moment ago."""
        since = now - self.recently_active_seconds
        return {name for name, peer in self.by_name.items() if peer.last_short_decode_at > since}

    def decoders(self, now: float) -> set[str]:
        """These peers, and those whose steps have drafts: no long prompt makes them wait either."""
        since = now - self.recently_active_seconds
        return {
            name
            for name, peer in self.by_name.items()
            if peer.last_short_decode_at > since or peer.last_drafts_at > since
        }

    def decoders_leave_at(self, now: float) -> float:
        """The next moment from which on `short_decoders` or `decoders` has no peer, unless one decodes again.

        Infinity where both have none now.
        """
        short = max((peer.last_short_decode_at for peer in self.by_name.values()), default=-math.inf)
        drafts = max((peer.last_drafts_at for peer in self.by_name.values()), default=-math.inf)
        later = self.recently_active_seconds + 1e-3  # more than rounding takes
        ends = (short + later, max(short, drafts) + later)
        return min((end for end in ends if end > now), default=math.inf)

    def forget(self, now: float, waiting_of: Callable[[str], int]) -> None:
        """Forget the peers that have gone.  waiting_of: jobs of a peer that wait or run."""
        gone = now - self.recently_active_seconds
        for name in [name for name, peer in self.by_name.items() if peer.last_active_at < gone]:
            if not waiting_of(name):
                del self.by_name[name]
        oldest = min((peer.last_active_at for peer in self.by_name.values()), default=math.inf)
        self.look_at = oldest + self.recently_active_seconds
