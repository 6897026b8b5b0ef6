"""Bans that grow with each relapse and are forgiven by time.  Pure: the caller passes the time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MAX_NAMES = 4096  # with a fault that is not forgotten
FORGIVEN_SECONDS = (
    600.0  # after a ban without a fault; a ban that was longer is forgiven after its own length
)


@dataclass(frozen=True, slots=True)
class BanRule:
    """`faults` within `window_seconds` ban for `first_seconds`, each further ban for twice as long."""

    faults: int
    window_seconds: float
    first_seconds: float
    longest_seconds: float


@dataclass(slots=True)
class _Conduct:
    """What is remembered of one name."""

    faults: deque[float] = field(default_factory=deque)
    bans: int = 0
    until: float = float("-inf")
    seconds: float = 0.0  # of the last ban


class Bans:
    """Who is banned, and for how long.

    Promises, checked by tests/unit/test_bans.py:
      * fewer faults than the rule's within its window ban nobody;
      * a ban lasts `first_seconds`, the next twice as long, and none longer than `longest_seconds`;
      * after `FORGIVEN_SECONDS` without a ban and without a fault nothing is remembered;
      * memory is bounded, and made-up names end no ban that lasts longer than theirs.
    """

    def __init__(self, rule: BanRule) -> None:
        self._rule = rule
        self._conduct: dict[str, _Conduct] = {}

    def __len__(self) -> int:
        """The number of names of which something is remembered."""
        return len(self._conduct)

    def fault(self, name: str, now: float, *, at_least: float | None = None) -> float:
        """Count a fault; the seconds of the ban that begins with it, 0 without one.

        at_least: ban at once, for at least so many seconds.
        """
        rule, conduct = self._rule, self._remembered(name, now)
        if conduct.until > now:
            return 0.0  # of the time before the ban
        conduct.faults.append(now)
        while conduct.faults[0] < now - rule.window_seconds:
            conduct.faults.popleft()
        if len(conduct.faults) < rule.faults and at_least is None:
            return 0.0
        seconds = min(rule.first_seconds * 2**conduct.bans, rule.longest_seconds)
        conduct.seconds = max(seconds, at_least or 0.0)
        conduct.until = now + conduct.seconds
        conduct.bans = min(conduct.bans + 1, 64)
        conduct.faults.clear()
        return conduct.seconds

    def seconds_left(self, name: str, now: float) -> float:
        """Until the ban's end; 0 without a ban."""
        conduct = self._conduct.get(name)
        return max(0.0, conduct.until - now) if conduct is not None else 0.0

    def banned(self, now: float) -> dict[str, float]:
        """The banned names, each with the seconds until the end."""
        return {name: each.until - now for name, each in self._conduct.items() if each.until > now}

    def _remembered(self, name: str, now: float) -> _Conduct:
        conduct = self._conduct.get(name)
        if conduct is not None and self._is_forgiven(conduct, now):
            del self._conduct[name]
            conduct = None
        if conduct is None:
            if len(self._conduct) >= MAX_NAMES:
                self._forget(now)
            conduct = self._conduct[name] = _Conduct()
        return conduct

    def _is_forgiven(self, conduct: _Conduct, now: float) -> bool:
        last = max([conduct.until, *conduct.faults])
        patience = max(FORGIVEN_SECONDS, conduct.seconds) if conduct.bans else self._rule.window_seconds
        return now - last > patience

    def _forget(self, now: float) -> None:
        """Forget the forgiven names, and half of the others: those whose ban ended or ends first."""
        kept = {name: each for name, each in self._conduct.items() if not self._is_forgiven(each, now)}
        late = sorted(kept.items(), key=lambda item: (item[1].until, max(item[1].faults, default=now)))
        self._conduct = dict(late[-MAX_NAMES // 2 :])
