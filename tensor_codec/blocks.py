"""A run of blocks: one value wherever a span, a hop or a move names its blocks."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_BLOCKS = 4096  # of a model
_FORM = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


class Blocks(NamedTuple):
    """The blocks from `start` up to `stop`, `stop` left out; false where that is none.

    It is the pair (start, stop) in every other respect: it unpacks, sorts and compares as the pair does.
    """

    start: int
    stop: int

    @staticmethod
    def parse(text: str) -> Blocks:
        """Read "A:B".  Raises ValueError unless A and B are whole numbers and A is below B."""
        found = _FORM.fullmatch(text)
        blocks = Blocks(int(found[1]), int(found[2])) if found else Blocks(0, 0)
        if not blocks:
            raise ValueError(f"{text!r} is not A:B with 0 <= A < B")
        return blocks

    @property
    def size(self) -> int:
        """How many blocks these are."""
        return max(0, self.stop - self.start)

    def __bool__(self) -> bool:
        return self.start < self.stop

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def contains(self, other: tuple[int, int]) -> bool:
        """Whether all blocks of the other run, and there are some, are among these."""
        return self.start <= other[0] < other[1] <= self.stop

    def overlap(self, other: tuple[int, int]) -> Blocks:
        """The blocks of both runs; an empty run where there are none."""
        start = max(self.start, other[0])
        return Blocks(start, max(start, min(self.stop, other[1])))

    def minus(self, other: tuple[int, int]) -> tuple[Blocks, ...]:
        """The runs, in order and at most two, of the blocks that the other run lacks."""
        if not self.overlap(other):
            return (self,) if self else ()
        runs = Blocks(self.start, other[0]), Blocks(other[1], self.stop)
        return tuple(run for run in runs if run)
