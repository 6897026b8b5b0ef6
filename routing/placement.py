"""Which blocks should a joining node serve?  Those that are worst served now.

Petals' rule (arXiv:2312.08361, 3.3): the window of blocks whose throughputs, sorted, come first in
lexicographic order.  A block that nobody holds has throughput 0, so holes are filled first; nodes
that join one after the other with windows of one size cover a model with as few as can.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from routing.records import Record
from routing.swarm import believed_rates


def throughputs(spans: Sequence[Record], blocks: int) -> tuple[float, ...]:
    """Decode steps per second that the peers of each block can do together, by what they announce.

    A peer that has not measured its rate counts as the median of those that have; where none has,
    as one step per second: what matters is which blocks are held at all.
    """
    measured = [span for span in spans if span.seconds_per_block > 0]
    rates = believed_rates(measured)
    usual = sorted(rates.values())[len(rates) // 2] if rates else 1.0
    total = [0.0] * blocks
    for span in sorted(spans, key=lambda s: s.peer):  # one order of adding: one result
        for block in range(span.start, min(span.stop, blocks)):
            total[block] += 1.0 / rates.get(span.peer, usual)
    return tuple(total)


def choose_blocks(
    spans: Sequence[Record], blocks: int, count: int, rng: random.Random | None = None
) -> tuple[int, int]:
    """The window [start, stop) of `count` blocks that needs a new node most.

    spans: of the same model revision, joining peers too.  A count above `blocks` gives them all.
    Ties go to the lowest start, or to chance where `rng` is given: of nodes that start at the same
    moment and do not yet see each other, fewer then choose alike.
    O(blocks * count * log(count)).  Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} blocks, at least 1 is needed")
    count = min(count, blocks)
    served = throughputs(spans, blocks)
    need = [sorted(served[start : start + count]) for start in range(blocks - count + 1)]
    worst = min(need)
    tied = [start for start, values in enumerate(need) if values == worst]
    start = rng.choice(tied) if rng is not None else tied[0]
    return start, start + count
