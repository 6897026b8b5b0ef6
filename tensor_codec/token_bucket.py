"""A rate with bursts: so many at once, so many per second in the long run.  The caller passes the time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """At most `burst` at once and `rate` per second in the long run."""

    rate: float
    burst: float
    level: float
    filled: float

    @classmethod
    def full(cls, rate: float, burst: float, now: float) -> TokenBucket:
        """A full bucket."""
        return cls(rate, burst, burst, now)

    def level_at(self, now: float) -> float:
        """What the bucket holds; less than 0 where more was taken than the rate has covered."""
        self._fill(now)
        return self.level

    def take(self, count: float, now: float) -> float:
        """Take `count`, and return the seconds until the rate has covered them."""
        self._fill(now)
        self.level -= count
        return max(0.0, -self.level / self.rate)

    def try_take(self, count: float, now: float) -> bool:
        """Take `count` if the bucket holds as many; otherwise take nothing."""
        self._fill(now)
        if self.level < count:
            return False
        self.level -= count
        return True

    def _fill(self, now: float) -> None:
        self.level = min(self.burst, self.level + (now - self.filled) * self.rate)
        self.filled = now
