"""The parts of a long forward or backward: runs of a few blocks.

Without torch, so that the memory of a node can be planned before torch is loaded.
"""

from __future__ import annotations

# Positions of all rows times blocks of one part: a prefill step of 512 positions through eight blocks.
# Backward holds about 16 times the hidden states of every block for it (measured on a llama), so
# 0.5 GiB in bfloat16 at hidden size 4096.
PART_POSITIONS = 4096

Run = tuple[int, int]


def forward_parts(positions: int, start: int, stop: int) -> list[Run]:
    """The runs of blocks, in order, of a forward through [start, stop).

    positions: of all rows together.
    """
    blocks = max(1, PART_POSITIONS // positions)
    return [(begin, min(begin + blocks, stop)) for begin in range(start, stop, blocks)]


def backward_parts(positions: int, start: int, stop: int) -> list[Run]:
    """The runs of a backward: forward through all runs but the last, then back through all of them."""
    forward = forward_parts(positions, start, stop)
    return forward[:-1] + forward[::-1]
