"""Which server should leave its blocks for others, so that no block is without one?

Blocks that nobody holds are an emergency: nothing else works until they are held again.  Everybody who
sees them works out the same order of those who could move there without leaving other blocks alone.
The first goes; the others wait longer the later they come, and look again before they go, so that one
moves and not a herd.  A server that announces a move counts where it is going, not where it still is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from routing.names import PeerId
from routing.records import Record
from routing.swarm import coverage, holes


@dataclass(frozen=True, slots=True)
class Turn:
    """A move [start, stop) that would help, and how many servers should go rather than this one."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True, slots=True)
class _Move:
    """open_blocks: that nobody holds after it.  spare: other servers of the worst block that is left."""

    peer: PeerId
    start: int
    stop: int
    open_blocks: int
    spare: int


def turn_to_cover(spans: Sequence[Record], blocks: int, me: PeerId) -> Turn | None:
    """Where `me` should go to cover blocks that nobody holds or is about to hold; None for nowhere.

    spans: of one model revision, online and joining.  Only online peers move, each as many blocks as it
    holds, and none leaves a block that no other online peer holds.  The order: who leaves the fewest
    blocks open, who is missed least, a hash of peer and hole.  Ties between a peer's windows go to the
    one whose blocks have the fewest servers, then to the lowest.
    O(spans * blocks).
    """
    missing = holes(((span.start, span.stop) for span in spans), 0, blocks)
    if not missing:
        return None
    soon = coverage(spans, blocks)
    online = [span for span in spans if span.state == "online"]
    now = coverage(online, blocks)
    moves = [move for span in online if (move := _best_move(span, soon, now)) is not None]
    useful = [move for move in moves if move.open_blocks < soon.count(0)]

    def order(move: _Move) -> tuple[int, int, bytes]:
        lot = hashlib.sha256(f"{move.peer} {missing}".encode()).digest()
        return move.open_blocks, -move.spare, lot

    for rank, move in enumerate(sorted(useful, key=order)):
        if move.peer == me:
            return Turn(move.start, move.stop, rank)
    return None


def _best_move(span: Record, soon: Sequence[int], now: Sequence[int]) -> _Move | None:
    """The window that leaves the fewest blocks open; None where a peer cannot leave its place."""
    blocks, own = len(soon), range(span.start, min(span.stop, len(soon)))
    rest = [held - (block in own) for block, held in enumerate(soon)]
    spare = [now[block] - 1 for block in own]
    held_alone = [block for block in own if now[block] == 1]
    count = len(own)
    opened = [0, *accumulate(int(held == 0) for held in rest)]
    served = [0, *accumulate(rest)]
    best: tuple[int, int, int] | None = None
    for start in range(blocks - count + 1):
        stop = start + count
        if held_alone and not (start <= held_alone[0] and held_alone[-1] < stop):
            continue
        left_open = opened[-1] - (opened[stop] - opened[start])
        cost = (left_open, served[stop] - served[start], start)
        best = cost if best is None else min(best, cost)
    if best is None:
        return None
    left = [extra for block, extra in zip(own, spare, strict=True) if not best[2] <= block < best[2] + count]
    return _Move(span.peer, best[2], best[2] + count, best[0], min(left, default=0))


def opens_gap(spans: Iterable[Record], mover: Record, start: int, stop: int) -> bool:
    """Whether a block that `mover` leaves for [start, stop) then has no online server."""
    online = [span for span in spans if span.state == "online" and span.peer != mover.peer]
    held = coverage(online, mover.blocks)
    left = set(range(mover.start, mover.stop)) - set(range(start, stop))
    return any(held[block] == 0 for block in left)


def gives_way(
    before: Iterable[Record], now: Iterable[Record], me: PeerId, start: int, stop: int
) -> PeerId | None:
    """Who else has announced to go to some of these blocks since `before`, and comes first; or None.

    Of two that have chosen at the same moment the one with the lower id goes on.
    """
    known = {(span.peer, span.start, span.stop) for span in before}
    return next(
        (
            span.peer
            for span in sorted(now, key=lambda record: record.peer)
            if span.state == "joining"
            and span.peer < me
            and (span.peer, span.start, span.stop) not in known
            and span.start < stop
            and start < span.stop
        ),
        None,
    )
