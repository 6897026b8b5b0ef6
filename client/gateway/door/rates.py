"""Requests and tokens for each minute of a key: pure, two buckets that fill up again."""

from __future__ import annotations

from dataclasses import dataclass, field

from client.gateway.door.keys import Caller

MINUTE = 60.0


@dataclass(slots=True)
class Bucket:
    """Up to `size` units, which come back evenly within a minute.  Times in seconds of any one clock."""

    size: int
    left: float
    at: float

    def fill(self, now: float) -> None:
        """Bring it to this time."""
        self.left = min(float(self.size), self.left + self.size * max(0.0, now - self.at) / MINUTE)
        self.at = max(self.at, now)

    def take(self, units: float) -> None:
        """Take units that are there; a negative number gives units back."""
        self.left = min(float(self.size), self.left - units)

    def resize(self, size: int) -> None:
        """Another size from now on."""
        self.size, self.left = size, min(self.left, float(size))

    def seconds_until(self, units: float) -> float:
        """Until so many units are there; 0: now."""
        return max(0.0, (units - self.left) * MINUTE / self.size)


@dataclass(frozen=True, slots=True)
class RateState:
    """A caller's rates after a request, for the x-ratelimit headers.

    wait_seconds: until the request may be sent again; 0: it was taken.  tokens: that were taken.
    """

    limits: tuple[tuple[str, Bucket], ...] = ()
    wait_seconds: float = 0.0
    tokens: int = 0

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers."""
        found = {}
        for name, bucket in self.limits:
            found[f"x-ratelimit-limit-{name}"] = str(bucket.size)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.left)))
            found[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.size))
        return found


@dataclass(slots=True)
class Rates:
    """The rates of all keys.

    Promises, checked by tests/unit/test_gateway_rates.py:
      * within any minute a key begins at most twice its requests, and within an hour 61 times as many;
      * tokens are taken at the beginning, as many as the answer may have; those that it has not come back;
      * a request of more tokens than a minute has is taken where the bucket is full;
      * a request that is not taken costs nothing.
    """

    _buckets: dict[str, dict[str, Bucket]] = field(default_factory=dict)  # by caller, of callers with rates

    def take(self, caller: Caller, tokens: int, now: float) -> RateState:
        """Take a request and its tokens, or neither."""
        buckets = self._of(caller, now)
        needs = {"requests": 1.0, "tokens": float(tokens)}
        needs = {name: min(needs[name], float(bucket.size)) for name, bucket in buckets.items()}
        wait = max((bucket.seconds_until(needs[name]) for name, bucket in buckets.items()), default=0.0)
        if wait <= 0:
            for name, bucket in buckets.items():
                bucket.take(needs[name])
        return _state(buckets, wait, int(needs.get("tokens", 0)) if wait <= 0 else 0)

    def give_back(self, caller: Caller, tokens: int, now: float) -> None:
        """Tokens that an answer might have had and has not."""
        bucket = self._of(caller, now).get("tokens")
        if bucket is not None:
            bucket.take(-tokens)

    def state(self, caller: Caller, now: float) -> RateState:
        """The caller's rates now."""
        return _state(self._of(caller, now), 0.0)

    def _of(self, caller: Caller, now: float) -> dict[str, Bucket]:
        sizes = {"requests": caller.requests_per_minute, "tokens": caller.tokens_per_minute}
        wanted = {name: size for name, size in sizes.items() if size is not None}
        if not wanted:
            self._buckets.pop(caller.name, None)
            return {}
        buckets = self._buckets.setdefault(caller.name, {})
        for name in set(buckets) - set(wanted):
            del buckets[name]
        for name, size in wanted.items():
            bucket = buckets.setdefault(name, Bucket(size, float(size), now))
            if bucket.size != size:  # the file of keys was changed
                bucket.resize(size)
            bucket.fill(now)
        return buckets


def _state(buckets: dict[str, Bucket], wait: float, tokens: int = 0) -> RateState:
    copies = tuple((name, Bucket(each.size, each.left, each.at)) for name, each in buckets.items())
    return RateState(copies, wait, tokens)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 820ms, 1.25s, 6m0s."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{max(1, round(seconds * 1e3))}ms"
    if seconds < MINUTE:
        return f"{seconds:.3g}s"
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60}s"
