"""Pauses after failed dials, by peer and by address, so that nobody makes a node dial anybody often.

A peer or an address that could not be reached is dialled again after 1 s, 2 s, 4 s ... up to 60 s, less up to
half by chance; up to 4 s where it was reached before, since it may be back.  A new record of the peer is a
sign of life: then 1 s after the last failure is enough.  The failed dials to one IP address have a rate too,
whatever the ports and the peers.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tensor_codec.errors import PeerGone
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

MAX_KEPT = 4096


class DialPaused(PeerGone):
    """No dial was made: one has failed a moment ago."""


@dataclass(slots=True)
class _Pause:
    failures: int = 0
    failed_at: float = 0.0
    not_before: float = 0.0
    reached: bool = False


@dataclass(slots=True)
class Backoff:
    """Pauses by name: of a peer, or of an address.  Times are the caller's clock, in seconds."""

    limits: Limits
    rng: random.Random
    _pauses: OrderedDict[str, _Pause] = field(default_factory=OrderedDict)
    _hosts: OrderedDict[str, TokenBucket] = field(default_factory=OrderedDict)

    def seconds_left(self, name: str, now: float) -> float:
        """Seconds until the pause of this name is over; 0 without one."""
        pause = self._pauses.get(name)
        return 0.0 if pause is None else max(0.0, pause.not_before - now)

    def is_new(self, name: str) -> bool:
        """Whether no dial has worked or failed."""
        return name not in self._pauses

    def was_reached(self, name: str) -> bool:
        """Whether a dial has worked."""
        return name in self._pauses and self._pauses[name].reached

    def failed(self, name: str, now: float) -> None:
        """A dial has failed: wait longer than last time."""
        pause = self._pauses.setdefault(name, _Pause())
        limits = self.limits
        most = limits.reached_dial_pause_seconds if pause.reached else limits.dial_pause_seconds
        seconds = min(most, limits.first_dial_pause_seconds * 2 ** min(pause.failures, 10))
        pause.failures, pause.failed_at = pause.failures + 1, now
        pause.not_before = now + seconds * self.rng.uniform(0.5, 1.0)
        self._keep(self._pauses, name)

    def worked(self, name: str) -> None:
        """A dial has worked."""
        self._pauses[name] = _Pause(reached=True)
        self._keep(self._pauses, name)

    def sign_of_life(self, names: Iterable[str]) -> None:
        """These may be back: dial soon, but not at once after a failure."""
        for name in names:
            if (pause := self._pauses.get(name)) is not None:
                soon = pause.failed_at + self.limits.first_dial_pause_seconds
                pause.not_before = min(pause.not_before, soon)

    def may_dial_host(self, host: str, now: float) -> bool:
        """Whether the rate of failed dials to this IP address allows one more."""
        return host not in self._hosts or self._hosts[host].level_at(now) >= 1

    def host_failed(self, host: str, now: float) -> None:
        """A dial to this IP address has failed."""
        if host not in self._hosts:
            rate, burst = (
                self.limits.failed_dials_per_host_per_second,
                self.limits.failed_dials_per_host_burst,
            )
            self._hosts[host] = TokenBucket.full(rate, burst, now)
        self._hosts[host].take(1, now)
        self._keep(self._hosts, host)

    def _keep(self, kept: OrderedDict[str, _Pause] | OrderedDict[str, TokenBucket], name: str) -> None:
        kept.move_to_end(name)
        while len(kept) > MAX_KEPT:
            kept.popitem(last=False)
