"""How many blocks each device gets, and which: pure arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Sequence


def shares(free: Sequence[int], blocks: int) -> list[int]:
    """The number of blocks for each device, in proportion to its free bytes; the sum is `blocks`.

    Largest remainders (Hamilton's method); a tie goes to the first device.  Without a free byte anywhere
    the first device has all.
    """
    whole = sum(free)
    if not whole:
        return [blocks, *[0] * (len(free) - 1)]
    counts = [blocks * each // whole for each in free]
    order = sorted(range(len(free)), key=lambda place: -(blocks * free[place] % whole))
    for place in order[: blocks - sum(counts)]:
        counts[place] += 1
    return counts


def places_of(counts: Sequence[int]) -> list[int]:
    """The place of each block, where each device has the next `counts` of them: [2, 1] -> [0, 0, 1]."""
    return [place for place, count in enumerate(counts) for _ in range(count)]
