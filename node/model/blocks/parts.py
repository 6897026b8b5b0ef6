"""The parts of a long forward or backward: runs of a few blocks.

Without torch, so that the memory of a node can be planned before torch is loaded.
"""

from __future__ import annotations

# Positions of all rows times blocks of one part: a prefill step of 512 positions through eight blocks.
# A decode step waits for one part at most.
PART_POSITIONS = 4096

Run = tuple[int, int]


def forward_parts(positions: int, start: int, stop: int, most: int | None = None) -> list[Run]:
    """The runs of blocks, in order, of a forward through [start, stop).

    positions: of all rows together.  most: positions times blocks of a run; None: PART_POSITIONS.
    """
    blocks = max(1, (PART_POSITIONS if most is None else most) // positions)
    return [(begin, min(begin + blocks, stop)) for begin in range(start, stop, blocks)]


def backward_groups(
    positions: int, start: int, stop: int, held: int, most: int | None = None
) -> list[list[Run]]:
    """The runs of a backward in groups, in order: the activations of one group are held at the same time.

    held: positions times blocks whose activations there is memory for; a group has one run at least.  Every
    run but those of the last group goes forward twice, so the groups fill up from the last block on.
    most: see `forward_parts`.
    """
    groups: list[list[Run]] = []
    blocks = 0
    for run in reversed(forward_parts(positions, start, stop, most)):
        blocks += run[1] - run[0]
        if not groups or blocks * positions > held:
            groups.insert(0, [])
            blocks = run[1] - run[0]
        groups[0].insert(0, run)
    return groups


def backward_parts(
    positions: int, start: int, stop: int, held: int = 0, most: int | None = None
) -> list[Run]:
    """The runs of a backward in the order of computing: forward through all groups but the last; then group
    by group, the last one first, forward with activations and back.
    """
    groups = backward_groups(positions, start, stop, held, most)
    parts = [run for group in groups[:-1] for run in group]
    for group in reversed(groups):
        parts += group + group[::-1]
    return parts
