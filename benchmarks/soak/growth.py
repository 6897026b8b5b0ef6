"""Whether something grows: slopes and medians of samples over time, in pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 2**20
# Beyond these a value has grown: an allocator's pages and a busier last quarter stay below.
NOISE: Mapping[str, float] = {"rss_mib": 32.0, "descriptors": 4.0, "tasks": 8.0, "threads": 2.0}


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process held, `at` seconds after its start."""

    at: float
    rss_mib: float
    descriptors: float
    tasks: float
    threads: float


def slope_per_minute(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of values over seconds, per minute; 0 for fewer than two moments."""
    if len({at for at, _ in points}) < 2:
        return 0.0
    return 60 * statistics.linear_regression(*zip(*points, strict=True)).slope


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and of the last quarter.  Raises ValueError without values."""
    if not values:
        raise ValueError("medians of no values")
    size = max(1, len(values) // 4)
    return statistics.median(values[:size]), statistics.median(values[-size:])


def growth(samples: Sequence[Sample], warm_up_seconds: float) -> dict[str, Any]:  # Any: JSON
    """For each value its first and last quarter and its slope, after the warm-up; `grown`: beyond noise."""
    warm = [sample for sample in samples if sample.at >= warm_up_seconds]
    found: dict[str, Any] = {"samples": len(warm)}
    grown = []
    for name, noise in NOISE.items():
        values = [getattr(sample, name) for sample in warm]
        first, last = quarters(values) if values else (0.0, 0.0)
        points = [(sample.at, getattr(sample, name)) for sample in warm]
        found |= {
            f"{name}_first": round(first, 1),
            f"{name}_last": round(last, 1),
            f"{name}_per_minute": round(slope_per_minute(points), 3),
        }
        if last - first > noise:
            grown.append(name)
    return {**found, "grown": grown}
