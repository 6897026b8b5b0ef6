"""The way of a product by its number of rows: the fastest one of those that were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

# Of a CPU: "compiled", "int8pack", "dequantise".  Of a device: see `node.model.cuda.ops.int8_linear`.
Way = Literal["compiled", "int8pack", "dequantise", "triton", "auto"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The way of a product, by its number of rows.

    steps: (least number of rows, way) in ascending order, the first from 1.
    """

    steps: tuple[tuple[int, Way], ...]

    def way(self, rows: int) -> Way:
        """The way for this number of rows."""
        chosen = self.steps[0][1]
        for least, way in self.steps:
            if rows < least:
                break
            chosen = way
        return chosen


def choose_plan(seconds: Mapping[Way, Mapping[int, float]], preference: float = 1.0) -> Plan:
    """The fastest way for every number of rows.

    seconds: of each way at some numbers of rows, equal for all ways.  Between two numbers, time is assumed
    to grow linearly; beyond the last number, its fastest way is kept.  A tie goes to the first way.
    preference: the others' seconds are multiplied by it, so that the first way is left for a gain alone.
    """
    measured = sorted(next(iter(seconds.values())))
    first_way = next(iter(seconds))

    def fastest(rows: int) -> Way:
        return min(
            seconds,
            key=lambda way: (
                _between(seconds[way], measured, rows) * (1.0 if way == first_way else preference)
            ),
        )

    steps: list[tuple[int, Way]] = [(1, fastest(measured[0]))]
    for low, high in pairwise(measured):
        while steps[-1][1] != fastest(high):
            before = steps[-1][1]
            first = next(rows for rows in range(low, high + 1) if fastest(rows) != before)
            steps.append((first, fastest(first)))
            low = first
    return Plan(tuple(steps))


def _between(seconds: Mapping[int, float], measured: Sequence[int], rows: int) -> float:
    """Seconds for `rows`, on the straight line between the measurements next to it."""
    high = next(each for each in measured if each >= rows)
    low = max((each for each in measured if each <= rows), default=high)
    if low == high:
        return seconds[high]
    share = (rows - low) / (high - low)
    return seconds[low] + share * (seconds[high] - seconds[low])
