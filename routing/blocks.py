"""Runs of blocks: which of them many peers hold, how often, and which blocks no peer holds.

One run is a `Blocks`.  It stands in `tensor_codec.blocks`, because messages name runs too.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Protocol

from tensor_codec.blocks import MAX_BLOCKS, Blocks

__all__ = ["MAX_BLOCKS", "Blocks", "Run", "coverage", "gaps", "merged"]


class Run(Protocol):
    """A holder of the blocks [start, stop): `Blocks`, a record, a hop."""

    @property
    def start(self) -> int:
        """The first block."""

    @property
    def stop(self) -> int:
        """The block after the last one."""


def coverage(runs: Iterable[Run], blocks: int) -> tuple[int, ...]:
    """How many of these runs hold each block of a model of `blocks`.  O(runs + blocks)."""
    change = [0] * (blocks + 1)
    for run in runs:
        if run.start < min(run.stop, blocks):
            change[run.start] += 1
            change[min(run.stop, blocks)] -= 1
    return tuple(accumulate(change[:blocks]))


def gaps(runs: Iterable[Run], whole: Blocks) -> tuple[Blocks, ...]:
    """The runs within `whole`, in order, that none of these runs holds.  O(runs * log(runs))."""
    found: list[Blocks] = []
    reached = whole.start
    for start, stop in sorted((run.start, run.stop) for run in runs):
        if reached < min(start, whole.stop):
            found.append(Blocks(reached, min(start, whole.stop)))
        reached = max(reached, stop)
    if reached < whole.stop:
        found.append(Blocks(reached, whole.stop))
    return tuple(found)


def merged(runs: Iterable[Run]) -> list[Blocks]:
    """The same blocks in runs that do not touch, in order.  O(runs * log(runs))."""
    found: list[Blocks] = []
    for start, stop in sorted((run.start, run.stop) for run in runs):
        if found and start <= found[-1].stop:
            found[-1] = Blocks(found[-1].start, max(stop, found[-1].stop))
        elif start < stop:
            found.append(Blocks(start, stop))
    return found
