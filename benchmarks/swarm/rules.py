"""The rules that `benchmarks swarm` compares: the place of a joining server, and its moves.

Petals' rules are written from its papers (arXiv:2209.01188, arXiv:2312.08361) and from its servers' code
(src/petals/server/block_selection.py): a server counts with one throughput for each of its blocks,
its rate over the blocks that an average request uses of it, (count + 1) / 2.  A joining server takes the
window whose throughputs, sorted, come first in lexicographic order.  Periodically each server simulates its
own move and then all others' moves by this rule, until nobody moves.  If the least throughput of a block
gains a factor of 1/0.75, the server leaves its place, waits for a few seconds, and joins anew.  It stays if
blocks would lose their last server.  It reads the directory at that moment: its view is never old.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from routing.names import PeerId
from routing.placement.cover_gaps import PlannedMove, plan_moves
from routing.placement.rebalance import Move, best_window, in_turn, moves
from routing.placement.throughput import Floats, Holder

Window = tuple[int, int]
Between = tuple[float, float]
PETALS_QUALITY = 0.75
PETALS_SWEEPS = 20  # the simulation's bound; Petals has none
EPSILON = 1e-3


class Rule(Protocol):
    """A rule; `seen` is the view of the deciding server, and servers with an equal view share `rank`."""

    drops_first: bool  # stops serving as soon as it moves, joins again, and loads every block anew
    fresh: bool  # its view is never old
    covers: bool  # looks every second for blocks that nobody holds
    decide_seconds: Between  # between two looks at its place, random

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The blocks of a joining server."""
        ...

    def rank(self, seen: Sequence[Holder], blocks: int) -> list[Move]:
        """The moves on which all servers with this view agree."""
        ...

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """The move of this server now, or None."""
        ...

    def turns(self, seen: Sequence[Holder], blocks: int) -> dict[PeerId, PlannedMove]:
        """The moves to blocks without a holder."""
        ...


class Ours:
    """routing.placement.rebalance and routing.placement.cover_gaps."""

    drops_first = False
    fresh = False
    covers = True
    decide_seconds = (30.0, 90.0)

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The window of least shortfall."""
        return best_window(seen, blocks, count, rate, rng)

    def rank(self, seen: Sequence[Holder], blocks: int) -> list[Move]:
        """The moves that gain enough."""
        return moves(seen, blocks)

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """Its own move, in its place of the order."""
        return in_turn(ranked, me, rng)

    def turns(self, seen: Sequence[Holder], blocks: int) -> dict[PeerId, PlannedMove]:
        """The plan that closes them."""
        return plan_moves(seen, blocks)


class Random:
    """A random window, without moves."""

    drops_first = True
    fresh = True
    covers = False
    decide_seconds = (0.0, 240.0)  # of Petals: 120 s in the mean

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """A random window."""
        start = rng.randrange(blocks - count + 1)
        return start, start + count

    def rank(self, seen: Sequence[Holder], blocks: int) -> list[Move]:
        """Nothing."""
        return []

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """Never."""
        return None

    def turns(self, seen: Sequence[Holder], blocks: int) -> dict[PeerId, PlannedMove]:
        """None."""
        return {}


class Equal(Random):
    """A static split: each window begins at the end of the last server's window, cyclically."""

    def __init__(self) -> None:
        self._next = 0

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The next window in the row, as from a list."""
        start = min(self._next, blocks - count)
        self._next = 0 if start + count >= blocks else start + count
        return start, start + count


class PetalsJoin(Random):
    """Petals' rule for a joining server alone."""

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The window with the least throughput."""
        start = _worst(_served(seen, blocks), count)
        return start, start + count


class Petals(PetalsJoin):
    """The published rules."""

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """The window with the least throughput without this server, if everyone's moves gain enough."""
        served = _served(seen, blocks)
        least, mean = served.min(), served.mean()
        mine = next((holder for holder in seen if holder.peer == me), None)
        if mine is None or least > (PETALS_QUALITY - EPSILON) * mean:
            return None  # no placement has a least above the mean, so the simulation may stop there
        _add(served, mine, -1 - EPSILON)
        if least > EPSILON and served.min() <= 0:
            return None
        goal = _worst(served, mine.stop - mine.start)
        if goal == mine.start:
            return None
        window = goal, goal + mine.stop - mine.start
        _add(served, mine, EPSILON)
        there = [*(h for h in seen if h.peer != me), mine._replace(start=window[0], stop=window[1])]
        _add(served, there[-1], 1)
        for _ in range(PETALS_SWEEPS):
            if not _sweep(served, there, rng):
                break
        gains = served.min() >= max(least, EPSILON)
        return window if gains and least / served.min() < PETALS_QUALITY - EPSILON else None


def _sweep(served: Floats, there: list[Holder], rng: random.Random) -> bool:
    """Move each server in order to the window with the least throughput; whether any moved."""
    rng.shuffle(there)
    moved = False
    for at, holder in enumerate(there):
        _add(served, holder, -1 - EPSILON)  # a little more, so that it stays on a tie
        start, count = _worst(served, holder.stop - holder.start), holder.stop - holder.start
        _add(served, holder, EPSILON)
        moved = moved or start != holder.start
        there[at] = holder._replace(start=start, stop=start + count)
        _add(served, there[at], 1)
    return moved


def _add(served: Floats, holder: Holder, sign: float) -> None:
    served[holder.start : holder.stop] += sign * holder.rate / ((holder.stop - holder.start + 1) / 2)


def _served(seen: Sequence[Holder], blocks: int) -> Floats:
    served = np.zeros(blocks)
    for holder in seen:
        _add(served, holder, 1)
    return served


def _worst(served: Floats, count: int) -> int:
    """The first of the windows whose sorted throughputs come first."""
    windows = np.lib.stride_tricks.sliding_window_view(served, count)
    least = windows.min(axis=1)
    candidates = np.flatnonzero(least == least.min())
    need = np.sort(windows[candidates], axis=1)
    return int(candidates[np.lexsort(need.T[::-1])[0]])


RULES: dict[str, type[Rule]] = {
    "ours": Ours,
    "petals": Petals,
    "petals-join": PetalsJoin,
    "random": Random,
    "equal": Equal,
}
