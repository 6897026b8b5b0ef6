"""How many messages without work a peer may send: questions, changes of routes, steps for no session.

A message that makes a hop compute pays with the peer's share of the compute.  The messages counted here cost
a peer nothing and the node some microseconds each, so their number a second is bounded.  Two token buckets
count each message, one of the peer and one of the peer's network prefix.  A peer that has emptied its own
bucket is at fault.  A peer behind an address that others have used up is not: its next message is only read
later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import trio

from routing.names import PeerId
from tensor_codec.errors import RemoteProtocolError
from tensor_codec.limits import Limits

FrameKind = Literal["where", "relink", "idle step"]
MAX_BUCKETS = 4096  # peers and prefixes, by kind; a bucket that is full again needs no entry


class Sender(Protocol):
    """The part of a framed stream that names its sender."""

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    @property
    def prefix(self) -> str:
        """The network prefix of the peer's address; "" where it has none."""


@dataclass(slots=True)
class FrameRates:
    """Token buckets of peers and of prefixes.  Pure: times are the caller's clock, in seconds.

    Promises, checked by tests/unit/test_frame_rates.py:
      * a peer sends its rate for ever and a burst at once, and is at fault beyond;
      * sessions of a peer raise its rate; a hop that pushes steps of many clients has the rate of many;
      * peers of one prefix together are slowed down beyond their rate, and none of them is at fault;
      * memory is bounded, whatever peers come.
    """

    limits: Limits
    _buckets: dict[tuple[FrameKind, str], tuple[float, float]] = field(default_factory=dict)  # used, since

    def spend(
        self, kind: FrameKind, peer: str, prefix: str, now: float, sessions: int = 0, *, hop: bool = False
    ) -> float:
        """Count one message; the seconds until the next one may be read, 0 unless the prefix is used up.

        sessions: of the peer here.  hop: the peer passes on what many clients send, and has the rate of many.
        Raises RemoteProtocolError.
        """
        many = self.limits.frame_rate_peers_per_prefix
        rate = self._per_second(kind) * (1 + self.limits.frame_rate_session_share * sessions)
        own = rate * many if hop else rate
        burst = own * self.limits.frame_burst_seconds
        if self._use(kind, peer, own, now, most=burst + 1) > 0:
            raise RemoteProtocolError(
                f"{kind}: more than {own:g} such messages a second, {burst:g} at once, without work"
            )
        if not prefix:
            return 0.0
        return max(0.0, self._use(kind, prefix, rate * many, now))

    def _per_second(self, kind: FrameKind) -> float:
        limits = self.limits
        if kind == "where":
            return limits.where_per_second
        return limits.relinks_per_second if kind == "relink" else limits.idle_steps_per_second

    def _use(self, kind: FrameKind, name: str, rate: float, now: float, most: float = math.inf) -> float:
        """Take one token of a bucket; the seconds until it would be there, negative where it is.

        most: tokens that may be missing, so that a peer at fault is not at fault for ever.
        """
        used, since = self._buckets.pop((kind, name), (0.0, now))
        used = max(0.0, used - (now - since) * rate) + 1
        if len(self._buckets) >= MAX_BUCKETS:
            self._forget(now)
        burst = rate * self.limits.frame_burst_seconds
        self._buckets[kind, name] = min(used, most), now
        return (used - burst) / rate

    def _forget(self, now: float) -> None:
        """Forget the buckets that are full again by now, or else the older half."""
        old = now - self.limits.frame_burst_seconds
        kept = {key: bucket for key, bucket in self._buckets.items() if bucket[1] > old}
        if len(kept) >= MAX_BUCKETS:
            kept = dict(list(kept.items())[MAX_BUCKETS // 2 :])
        self._buckets = kept


@dataclass(slots=True)
class FrameBudget:
    """Counts messages on trio's clock.  sessions_of: the sessions of a peer here."""

    rates: FrameRates
    sessions_of: Callable[[str], int]

    async def spend(self, kind: FrameKind, sender: Sender, *, hop: bool = False) -> None:
        """Count one message; waits where the sender's prefix is used up.  Raises RemoteProtocolError.

        hop: see `FrameRates.spend`.
        """
        peer, now = sender.peer, trio.current_time()
        sessions = self.sessions_of(peer)
        if seconds := self.rates.spend(kind, peer, sender.prefix, now, sessions, hop=hop):
            await trio.sleep(seconds)
