"""The rules that benchmarks.swarm compares: where a server goes when it joins, and when it moves.

Petals' rules are written from its papers (arXiv:2209.01188, arXiv:2312.08361): a server counts with
the same throughput for each of its blocks, its rate over the blocks that an average request uses of
it, (count + 1) / 2.  A joining server takes the window whose throughputs, sorted, come first in
lexicographic order.  Now and then each server simulates that it and then all others go where this rule
sends them, until nobody moves; where the least throughput of a block would be 1/0.75 better it moves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from routing.capacity import Floats, Holder
from routing.names import PeerId
from routing.placement import Move, best_window, in_turn, moves

Window = tuple[int, int]
Between = tuple[float, float]
PETALS_QUALITY = 0.75
PETALS_SWEEPS = 20


class Rule(Protocol):
    """A rule; `seen` is whatever the decider knows, `rank` may be kept for others who know the same."""

    drops_first: bool  # stops serving as soon as it moves, and loads every block anew
    decide_seconds: Between  # between two looks at its place, by chance

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """Where a joining server goes."""
        ...

    def rank(self, seen: Sequence[Holder], blocks: int) -> list[Move]:
        """What all servers with this view agree on."""
        ...

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """Where this server moves now, or None."""
        ...


class Ours:
    """routing.placement."""

    drops_first = False
    decide_seconds = (30.0, 90.0)

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The window of least shortfall."""
        return best_window(seen, blocks, count, rate, rng)

    def rank(self, seen: Sequence[Holder], blocks: int) -> list[Move]:
        """The moves that are worth it."""
        return moves(seen, blocks)

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """Its own move, in its turn."""
        return in_turn(ranked, me, rng)


class Random:
    """Any window, for ever."""

    drops_first = True
    decide_seconds = (0.0, 240.0)  # of Petals: 120 s in the mean

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """By chance alone."""
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


class Equal(Random):
    """A static split: each window begins where that of the server before ended, round and round."""

    def __init__(self) -> None:
        self._next = 0

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The next in the row, as somebody with a list would give them out."""
        start = min(self._next, blocks - count)
        self._next = 0 if start + count >= blocks else start + count
        return start, start + count


class Petals(Random):
    """The published rules."""

    def join(
        self, seen: Sequence[Holder], blocks: int, count: int, rate: float, rng: random.Random
    ) -> Window:
        """The window that is worst served."""
        start = _worst(_served(seen, blocks), count)
        return start, start + count

    def move(
        self, seen: Sequence[Holder], blocks: int, me: PeerId, ranked: list[Move], rng: random.Random
    ) -> Window | None:
        """The window that is worst served without it, where everyone's moves would gain enough."""
        served = _served(seen, blocks)
        least = served.min()
        mine = next((holder for holder in seen if holder.peer == me), None)
        if mine is None:
            return None
        goal = _relocated(served, mine)
        if goal == mine.start:
            return None
        window = goal, goal + mine.stop - mine.start
        there = [mine._replace(start=window[0], stop=window[1]), *(h for h in seen if h.peer != me)]
        _add(served, there[0], 1)
        for _ in range(PETALS_SWEEPS):
            rng.shuffle(there)
            still = True
            for at, holder in enumerate(there):
                start = _relocated(served, holder)
                still = still and start == holder.start
                there[at] = holder._replace(start=start, stop=start + holder.stop - holder.start)
                _add(served, there[at], 1)
            if still:
                break
            served = _served(there, blocks)  # rounding errors do not add up
        return window if served.min() > least and least / served.min() < PETALS_QUALITY else None


def _add(served: Floats, holder: Holder, sign: int) -> None:
    served[holder.start : holder.stop] += sign * holder.rate / ((holder.stop - holder.start + 1) / 2)


def _served(seen: Sequence[Holder], blocks: int) -> Floats:
    served = np.zeros(blocks)
    for holder in seen:
        _add(served, holder, 1)
    return served


def _relocated(served: Floats, holder: Holder) -> int:
    """Take the holder out of `served`; where the rule would send it now, where staying is no better."""
    _add(served, holder, -1)
    served[np.abs(served) < 1e-9] = 0.0
    count = holder.stop - holder.start
    start = _worst(served, count)
    before, after = (np.sort(served[s : s + count]) for s in (holder.start, start))
    return holder.start if np.allclose(before, after, rtol=1e-3) else start


def _worst(served: Floats, count: int) -> int:
    need = np.sort(np.lib.stride_tricks.sliding_window_view(served, count), axis=1).round(6)
    return int(np.lexsort(need.T[::-1])[0])


RULES: dict[str, type[Rule]] = {"ours": Ours, "petals": Petals, "random": Random, "equal": Equal}
