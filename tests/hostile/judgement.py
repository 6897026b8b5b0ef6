"""From what was seen beside an attack to a verdict: pure functions of times and of what a node holds.

Times are seconds of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LET_IN_SECONDS = 1.0
RECOVERED_SHARE = 0.6  # of the speed before the attack; less than any burner leaves
SEEN_SECONDS = 5.0  # for a new record to be seen by all
HELD = ("connections", "streams", "sessions", "tasks", "threads", "descriptors")


@dataclass(frozen=True, slots=True)
class Window:
    """The time of one phase."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin

    def holds(self, moment: float) -> bool:
        """Whether a moment lies in it."""
        return self.begin <= moment < self.end


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A peer that nobody knew.  seconds: until it was let in; None: it never was.  error: why not."""

    began: float
    seconds: float | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a node held at one moment; `lags_ms` are those of the second before it."""

    at: float
    rss: int
    held: Mapping[str, int]
    lags_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that was seen, over all phases.

    tokens: when the honest client got each of its tokens.  rss: moments and bytes, sampled often.
    """

    tokens: Sequence[float]
    newcomers: Sequence[Newcomer]
    vitals: Sequence[Vitals]
    rss: Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Phases:
    """The windows of one attack.  left: some seconds after its end, when nothing may be left of it."""

    before: Window
    during: Window
    left: Window
    burner: Window


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What an attack must leave to others.  Newcomers: the share that is let in within LET_IN_SECONDS."""

    honest_share: float = 0.8
    p95_ratio: float = 2.0
    newcomers_in: float = 1.0


@dataclass(slots=True)
class Row:
    """The verdict on one attack: the values, and the thresholds that it failed."""

    values: dict[str, Any] = field(default_factory=dict)  # Any: JSON
    failed: list[str] = field(default_factory=list)


def rate(moments: Sequence[float], window: Window) -> float:
    """Moments in the window, per second."""
    return sum(map(window.holds, moments)) / window.seconds


def latencies(moments: Sequence[float], window: Window) -> list[float]:
    """The waits for each moment in the window, and for the one that had not come at its end.

    A wait counts whole, also where it began before the window.
    """
    waits = []
    last = window.begin
    for moment in sorted(moments):
        if moment >= window.end:
            break
        if moment >= window.begin:
            waits.append(moment - last)
        last = moment
    open_wait = window.end - last
    if not waits or open_wait > max(waits):
        waits.append(open_wait)
    return waits


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all are not above (nearest rank)."""
    if not values:
        raise ValueError("a percentile of no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def let_in(newcomers: Sequence[Newcomer], window: Window) -> list[Newcomer]:
    """The newcomers that came in the window.  One that came in its last second may be let in after it."""
    return [each for each in newcomers if window.holds(each.began)]


def share_in_time(newcomers: Sequence[Newcomer]) -> float | None:
    """The share that was let in within LET_IN_SECONDS; None where nobody came."""
    if not newcomers:
        return None
    return sum(each.seconds is not None and each.seconds <= LET_IN_SECONDS for each in newcomers) / len(
        newcomers
    )


def left_over(before: Sequence[Vitals], after: Sequence[Vitals]) -> dict[str, tuple[int, int]]:
    """What is held more of, in every moment after, than in any moment before: by name, (before, after).

    The honest peers come and go in both.
    """
    if not before or not after:
        return {"moments": (len(before), len(after))}
    found = {}
    for name in HELD:
        most = max(each.held[name] for each in before)
        least = min(each.held[name] for each in after)
        if least > most:
            found[name] = (most, least)
    return found


def judged(
    seen: Seen,
    phases: Phases,
    bound: int,
    thresholds: Thresholds,
    got: Mapping[str, Any],
    failed: Sequence[str],
) -> Row:
    """The row of one attack.

    bound: of resident memory, as the node states it.  got: what the attacker counted.  failed: what the
    attack itself finds wrong with that.
    """
    vitals = {name: moments_in(seen.vitals, getattr(phases, name)) for name in ("before", "during", "left")}
    rss = {
        name: [size for at, size in seen.rss if getattr(phases, name).holds(at)]
        for name in ("before", "during", "left")
    }
    most = max((size for at, size in seen.rss if phases.before.begin <= at < phases.left.end), default=0)
    came = let_in(seen.newcomers, phases.during)
    speed = {
        name: rate(seen.tokens, getattr(phases, name)) for name in ("before", "during", "left", "burner")
    }
    p95 = {
        name: percentile(latencies(seen.tokens, getattr(phases, name)), 0.95)
        for name in ("before", "during", "burner")
    }
    # An honest client that has not recovered is no control: then the time before the attack is.
    recovered = speed["burner"] >= RECOVERED_SHARE * speed["before"]
    control = "burner" if recovered else "before"
    share = share_in_time(came)
    left = left_over(vitals["before"], vitals["left"])
    in_time = [each.seconds for each in came if each.seconds is not None]
    lags = [lag for each in vitals["during"] for lag in each.lags_ms]
    row = Row(
        {
            "honest_share": rounded(speed["during"] / speed[control] if speed[control] else None),
            "p95_ratio": rounded(p95["during"] / p95[control]),
            "newcomers_in": rounded(share),
            "rss_within_bound": most <= bound,
            "nothing_left": not left,
            **{f"tokens_per_s_{name}": rounded(value) for name, value in speed.items()},
            **{f"p95_ms_{name}": rounded(value * 1000) for name, value in p95.items()},
            "recovered": recovered,
            "newcomers": len(came),
            "newcomers_before": rounded(share_in_time(let_in(seen.newcomers, phases.before))),
            "newcomer_s_p50": rounded(statistics.median(in_time) if in_time else None),
            "newcomer_s_most": rounded(max(in_time, default=None)),
            "newcomer_errors": sorted({each.error for each in came if each.error})[:5],
            "rss_before_mib": mib(max(rss["before"], default=0)),
            "rss_most_mib": mib(most),
            "rss_after_mib": mib(min(rss["left"], default=0)),
            "bound_mib": mib(bound),
            "lag_p99_ms": rounded(percentile(lags, 0.99) if lags else None),
            "lag_most_ms": rounded(max(lags, default=None)),
            "left": {name: list(pair) for name, pair in left.items()},
            "got": dict(got),
        }
    )
    if not recovered:
        failed = [*failed, "the honest client had not recovered beside the burner"]
    row.failed = [*below(row.values, thresholds), *failed]
    row.values["failed"] = row.failed
    row.values["passed"] = not row.failed
    return row


def below(values: Mapping[str, Any], thresholds: Thresholds) -> list[str]:
    """The thresholds that these values miss, in words."""
    found = []
    honest = values["honest_share"]
    if honest is None or honest < thresholds.honest_share:
        found.append(f"the honest client kept {honest} of its speed")
    if values["p95_ratio"] > thresholds.p95_ratio:
        found.append(f"the honest client's p95 latency was {values['p95_ratio']} times as long")
    share = values["newcomers_in"]
    if share is None or share < thresholds.newcomers_in:
        found.append(f"of the newcomers {share} were let in within {LET_IN_SECONDS:g} s")
    if not values["rss_within_bound"]:
        found.append(f"{values['rss_most_mib']} MiB resident, the bound is {values['bound_mib']}")
    if not values["nothing_left"]:
        more = (f"{name} {before} -> {after}" for name, (before, after) in values["left"].items())
        found.append(f"more than before: {', '.join(more)}")
    return found


def moments_in(vitals: Sequence[Vitals], window: Window) -> list[Vitals]:
    """The moments of a window."""
    return [each for each in vitals if window.holds(each.at)]


def rounded(value: float | None) -> float | None:
    """Three digits after the point."""
    return None if value is None else round(value, 3)


def mib(size: int) -> float:
    """MiB of so many bytes."""
    return round(size / 2**20, 1)
