"""Which servers should leave their blocks for others, so that no block is without one?

Blocks that nobody holds are an emergency: nothing else works until they are held again.  Everybody who
sees them works out the same plan (`turns`): a few moves that together close them, those with the fewest
blocks to load for each one that they close first.  Where no server can leave its place, another one comes
to stand in for it first, and so on for up to MAX_IN_A_ROW.  Who is in the plan goes; who is not waits,
and goes where those in the plan do not: they may be dead.  A server that announces a move counts where it
is going, not where it still is; one that has very much to load does not keep others away.

Promises, checked by tests/unit/test_cover_gaps.py:
  * those who are ready may all go at once, and no block loses its last online server;
  * a plan never leaves more blocks open than before; it has an end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from routing.names import PeerId
from routing.placement.throughput import Holder

MAX_IN_A_ROW = 3  # moves that make way for each other
MAX_TRIED = 8  # of servers that others would have to stand in for, the cheapest
MAX_LOOKED_AT = 48  # servers for each move of a plan
MAX_TURNS = 3  # plans, each without the servers of those before it
SPARE = 1  # a peer whose blocks have more other servers than that need not be watched
MAX_WATCHED = 64  # all, in swarms whose servers do not see the same unless each is watched by each
CUT_OFF_LEAST = 2  # of fewer silent peers nobody can say whether it is them or us
MOVE_EFFORT = 5.0  # a move without loading, in blocks that are loaded in that time
WAITING = 1.5  # times the cost, where somebody must come online first
# A joining server that takes so many times as long as a mover does not keep that one away.
SLOW = 2.0

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Turn(NamedTuple):
    """A move [start, stop) that would help.

    rank: plans that should be given time before this one.  ready: whether it may be made now; else the
    server waits for those that come to stand in for it.
    """

    start: int
    stop: int
    rank: int
    ready: bool


class _Move(NamedTuple):
    """opened: blocks that would have nobody when it is made, and need somebody else first."""

    server: Holder
    start: int
    stop: int
    closes: int
    opened: tuple[int, int] | None

    @property
    def loads(self) -> int:
        return min(self.stop - self.start, abs(self.start - self.server.start))


def turn_to_cover(servers: Sequence[Holder], blocks: int, me: PeerId) -> Turn | None:
    """Where `me` should go to cover blocks that nobody holds or is about to hold; None for nowhere."""
    return turns(servers, blocks).get(me)


def turns(servers: Sequence[Holder], blocks: int) -> dict[PeerId, Turn]:
    """Who should go where to cover blocks that nobody holds or is about to hold.

    servers: of one model revision, online and joining.  Only online ones move, each as many blocks as it
    holds.  O(servers * count * blocks) for each move, `count` the blocks that one holds.
    """
    found: dict[PeerId, Turn] = {}
    for rank in range(MAX_TURNS):
        steps = _Crew(servers, blocks, set(found)).plan()
        if not steps:
            break
        now = _coverage((server for server in servers if server.online), blocks)
        for move in steps:
            left = _left(move, blocks)
            ready = bool((now[left] > 1).all())
            now[left] -= ready
            found[move.server.peer] = Turn(move.start, move.stop, rank, ready)
    return found


class _Crew:
    """The servers that may move, as arrays, and how many servers each block is about to have."""

    def __init__(self, servers: Sequence[Holder], blocks: int, without: set[PeerId]) -> None:
        servers = sorted(servers, key=lambda server: server.peer)
        self.blocks = blocks
        self.free = [s for s in servers if s.online and s.peer not in without and s.start < blocks]
        self.starts = np.array([s.start for s in self.free], dtype=np.int64)
        self.stops = np.array([min(s.stop, blocks) for s in self.free], dtype=np.int64)
        self.soon = _coverage(servers, blocks)
        self.now = _coverage((s for s in servers if s.online), blocks)
        self.wait = np.where(self.soon == 0, np.inf, 0.0)  # blocks that whoever comes has yet to load
        late = (self.now == 0) & (self.soon > 0)
        if late.any():
            self.wait[late] = np.inf
            for server in servers:
                own = slice(server.start, min(server.stop, blocks))
                fewer = np.minimum(self.wait[own], server.stop - server.start)
                self.wait[own] = np.where(late[own], fewer, self.wait[own])

    def plan(self) -> list[_Move]:
        """Chains of moves, the best first, until every block is held or nothing more can be done.

        Blocks that somebody is loading, but slowly, come after those to which nobody is on the way.
        """
        steps: list[_Move] = []
        while (self.wait > 0).any():
            chain = self._best_chain({move.server.peer for move in steps})
            for move in chain:
                self._make(move)
            steps += chain
            if not chain and not np.isinf(self.wait).any():
                break
            if not chain:
                self.wait[np.isinf(self.wait)] = 0.0
        return steps

    def _make(self, move: _Move) -> None:
        server = move.server
        self.soon[server.start : min(server.stop, self.blocks)] -= 1
        self.soon[move.start : move.stop] += 1
        self.wait[move.start : move.stop] = 0.0

    def _best_chain(self, used: set[PeerId]) -> list[_Move]:
        """The moves that load the fewest blocks for each open one that they close, in their order."""
        found = [m for row in self._likely(self.wait > 0, used) for m in self._closing(row)]
        best = min((m for m in found if m.opened is None), key=self._order, default=None)
        chain, cost = ([best], _cost([best])) if best else ([], np.inf)
        helped = sorted((m for m in found if m.opened), key=lambda m: (_cost([m]), m.server.peer, m.start))
        for move in helped[:MAX_TRIED]:
            if _cost([move]) >= cost:
                break
            helpers = self._stand_ins(move, used | {move.server.peer}, MAX_IN_A_ROW - 1)
            longer = [*helpers, move]
            if helpers and _cost(longer) < cost and self._in_order(longer):
                chain, cost = longer, _cost(longer)
        return chain

    def _order(self, move: _Move) -> tuple[float, int, int, int, bytes]:
        """The least cost; among equals who closes most, who is missed least, then by lot."""
        left = _left(move, self.blocks)
        spare = int(self.soon[left].min()) if len(left) else self.blocks
        open_blocks = np.flatnonzero(self.wait > 0).tolist()
        lot = hashlib.sha256(f"{move.server.peer} {open_blocks}".encode()).digest()
        ready = (self.now[left] > 1).all()
        cost = _cost([move]) * (1.0 if ready else WAITING)
        return round(cost, 6), -move.closes, -spare, move.start, lot

    def _likely(self, wanted: Flags, used: set[PeerId]) -> list[int]:
        """Those who have the least to load to get there, and whom nobody has to stand in for."""
        where = np.flatnonzero(wanted)
        first, last = int(where[0]), int(where[-1])
        away = np.maximum(np.maximum(first - self.stops + 1, self.starts - last), 1)
        loads = np.minimum(away, self.stops - self.starts)
        singles = np.concatenate([[0], np.cumsum(self.soon == 1)])
        missed = singles[self.stops] > singles[self.starts]
        order = np.lexsort((loads, missed))
        return [int(row) for row in order if self.free[row].peer not in used][:MAX_LOOKED_AT]

    def _closing(self, row: int) -> list[_Move]:
        """The moves of one server that close an open block or more."""
        server, start, stop = self.free[row], int(self.starts[row]), int(self.stops[row])
        count = stop - start
        begins = np.arange(self.blocks - count + 1)
        loads = np.minimum(np.abs(begins - start), count)
        waits = np.lib.stride_tricks.sliding_window_view(self.wait, count)
        if np.isinf(self.wait).any():
            closes = np.isinf(waits).sum(axis=1)
        else:
            closes = (waits >= SLOW * (MOVE_EFFORT + loads)[:, None]).sum(axis=1)
        closes[start] = 0
        alone = self._alone(start, stop, self.soon)
        return [
            _Move(server, int(b), int(b) + count, int(closes[b]), _hull(alone, int(b), int(b) + count))
            for b in np.flatnonzero(closes)
        ]

    def _alone(self, start: int, stop: int, soon: Counts) -> Counts:
        return np.flatnonzero(soon[start:stop] == 1) + start

    def _stand_ins(self, move: _Move, used: set[PeerId], depth: int) -> list[_Move]:
        """The moves, in their order, after which nobody is missed where this one leaves; [] for none."""
        assert move.opened is not None
        first, last = move.opened
        soon = self.soon.copy()
        soon[move.server.start : min(move.server.stop, self.blocks)] -= 1
        soon[move.start : move.stop] += 1
        wanted = np.zeros(self.blocks, dtype=np.bool_)
        wanted[first:last] = True
        found = []
        for row in self._likely(wanted, used):
            server, start, stop = self.free[row], int(self.starts[row]), int(self.stops[row])
            count = stop - start
            alone = self._alone(start, stop, soon)
            for begin in range(max(0, last - count), min(first, self.blocks - count) + 1):
                if begin != start:
                    opened = _hull(alone, begin, begin + count)
                    found.append(_Move(server, begin, begin + count, 0, opened))
        found.sort(key=lambda m: (m.loads, m.server.peer, m.start))
        at_once = next((m for m in found if m.opened is None), None)
        best = [at_once] if at_once else []
        most = at_once.loads if at_once else np.inf
        if depth > 1:
            for helper in [m for m in found if m.opened][: MAX_TRIED // 2]:
                if helper.loads >= most:
                    break
                helpers = self._stand_ins(helper, used | {helper.server.peer}, depth - 1)
                loads = sum(m.loads for m in (*helpers, helper))
                if helpers and loads < most:
                    best, most = [*helpers, helper], loads
        return best

    def _in_order(self, chain: Sequence[_Move]) -> bool:
        """Whether each block that is left still has somebody when these moves are made one by one."""
        soon = self.soon.copy()
        for move in chain:
            if (soon[_left(move, self.blocks)] < 2).any():
                return False
            soon[move.server.start : min(move.server.stop, self.blocks)] -= 1
            soon[move.start : move.stop] += 1
        return True


def _cost(chain: Sequence[_Move]) -> float:
    """What moves take, one after the other, for each block that they close; in blocks that are loaded."""
    return sum(MOVE_EFFORT + move.loads for move in chain) / sum(move.closes for move in chain)


def _hull(alone: Counts, start: int, stop: int) -> tuple[int, int] | None:
    """The run of blocks from the first to the last of these that is outside of the window."""
    outside = alone[(alone < start) | (alone >= stop)]
    return (int(outside[0]), int(outside[-1]) + 1) if len(outside) else None


def _left(move: _Move, blocks: int) -> list[int]:
    """The blocks that a move leaves."""
    own = range(move.server.start, min(move.server.stop, blocks))
    return [block for block in own if not move.start <= block < move.stop]


def _coverage(servers: Iterable[Holder], blocks: int) -> Counts:
    change = np.zeros(blocks + 1, dtype=np.int64)
    for server in servers:
        if server.start < blocks:
            change[server.start] += 1
            change[min(server.stop, blocks)] -= 1
    return np.cumsum(change)[:blocks]


def opens_gap(servers: Iterable[Holder], me: PeerId, own: tuple[int, int], window: tuple[int, int]) -> bool:
    """Whether a block that `me` leaves, serving `own`, for `window` then has no online server."""
    others = [s for s in servers if s.online and s.peer != me]
    left = [block for block in range(*own) if not window[0] <= block < window[1]]
    return not all(any(s.start <= block < s.stop for s in others) for block in left)


def witnesses(
    servers: Iterable[Holder], me: PeerId, own: tuple[int, int], window: tuple[int, int]
) -> list[PeerId]:
    """A few online servers that hold between them all that `me` leaves, as far as anybody holds it."""
    others = sorted((s for s in servers if s.online and s.peer != me), key=lambda s: s.peer)
    left = {block for block in range(*own) if not window[0] <= block < window[1]}
    found = []
    while left and others:
        best = max(others, key=lambda s: len(left.intersection(range(s.start, s.stop))))
        if left.isdisjoint(range(best.start, best.stop)):
            break
        left.difference_update(range(best.start, best.stop))
        found.append(best.peer)
    return found


def watched(
    servers: Sequence[Holder], blocks: int, me: PeerId, most: int = MAX_WATCHED
) -> tuple[PeerId, ...]:
    """The peers whose crash `me` should notice before their records end: one of their blocks has few others.

    Few are SPARE at most, other online servers for an online peer, other servers at all for a joining one:
    nobody else goes where it is going.  Fewest first, then by a hash of (me, peer), so that where there are
    more than `most` each server watches others (rendezvous hashing).  O(blocks held, by all together).
    """
    now, soon = _coverage((s for s in servers if s.online), blocks), _coverage(servers, blocks)
    found = []
    for server in servers:
        own = (now if server.online else soon)[server.start : min(server.stop, blocks)]
        others = int(own.min()) - 1 if len(own) else blocks
        if server.peer != me and others <= SPARE:
            lot = hashlib.sha256(f"{me} {server.peer}".encode()).digest()
            found.append((others, lot, server.peer))
    return tuple(peer for _, _, peer in sorted(found)[:most])


def taken_for_lost(asked: Collection[PeerId], silent: Collection[PeerId]) -> frozenset[PeerId]:
    """Which of the silent peers are lost; nobody where most are silent: then it is us who are cut off."""
    cut_off = len(silent) >= CUT_OFF_LEAST and 2 * len(silent) > len(asked)
    return frozenset() if cut_off else frozenset(silent)


def gives_way(
    before: Iterable[Holder], now: Iterable[Holder], me: PeerId, window: tuple[int, int]
) -> PeerId | None:
    """Who else has announced to go to some of these blocks since `before`, and comes first; or None.

    Of two that have chosen at the same moment the one with the lower id goes on, and the other one too
    where a block of its window would still be without a server.
    """
    known = {(server.peer, server.start, server.stop) for server in before}
    start, stop = window
    others = [s for s in now if s.peer != me]
    new = [s for s in others if not s.online and (s.peer, s.start, s.stop) not in known]
    first = sorted(s.peer for s in new if s.peer < me and s.start < stop and start < s.stop)
    if not first:
        return None
    later = {s.peer for s in new if s.peer > me}
    counted = [s for s in others if s.peer not in later]
    needed = any(not any(s.start <= block < s.stop for s in counted) for block in range(start, stop))
    return None if needed else first[0]


def objection(
    before: Sequence[Holder],
    now: Sequence[Holder],
    me: PeerId,
    own: tuple[int, int],
    window: tuple[int, int],
) -> str | None:
    """Why a move must not be made although it has been announced; None where nothing speaks against it.

    before: what was known when it was announced; now: when everybody has heard of it, we of theirs.
    """
    if (first := gives_way(before, now, me, window)) is not None:
        return f"{first} goes there"
    if opens_gap(now, me, own, window):
        return "another server of our blocks has left"
    return None
