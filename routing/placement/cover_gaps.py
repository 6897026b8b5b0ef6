"""Which servers should leave their blocks for others, so that no block is without a server?

A block without a server is an emergency: no chain exists until a server holds it again.  All servers that
see it work out the same plans (`plan_moves`).  A plan is a few moves that close the gaps together, first the
moves with the fewest blocks to load per block closed.  A server that cannot leave its blocks may be replaced
first by another server, and so on, up to MAX_IN_A_ROW moves.  The servers of the first plan move; later plans
are for the case that servers of earlier plans are dead.  A server that announces a move counts at its new
blocks, not at its present ones; a server with very many blocks to load does not keep others away.

Promises, checked by tests/unit/test_cover_gaps.py:
  * all moves that are ready may be made at once, and no block loses its last online server;
  * a plan never leaves more blocks open than before; planning ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from routing.blocks import Blocks, coverage, gaps
from routing.names import PeerId
from routing.placement.throughput import Holder

MAX_IN_A_ROW = 3  # moves in a chain of replacements
MAX_TRIED = 8  # moves, the cheapest, that are tried with a replacement
MAX_MOVERS = 48  # servers compared for each move of a plan
MAX_PLANS = 3  # each without the servers of the plans before it
SPARE = 1  # a peer whose blocks all have more other servers than this need not be watched
MAX_WATCHED = 64  # in swarms of up to 64 servers everyone watches everyone
MIN_CUT_OFF = 2  # with fewer silent peers this node cannot tell whether they are lost or it is cut off
MOVE_EFFORT = 5.0  # of a move without loading, in blocks that could be loaded in that time
WAITING = 1.5  # cost factor of a move that must wait for another server to come online
SLOW = 2.0  # a joining server this many times slower than a move does not keep the move from being made

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]


class PlannedMove(NamedTuple):
    """The blocks that a server should move to, to close a gap.

    rank: number of plans that should be given time before this move's plan.  ready: whether the move may be
    made now; else the server waits until others have replaced it.
    """

    blocks: Blocks
    rank: int
    ready: bool


class _Move(NamedTuple):
    """opened: blocks that would have no server after the move, and need another one first."""

    server: Holder
    start: int
    stop: int
    closes: int
    opened: tuple[int, int] | None

    @property
    def loads(self) -> int:
        return min(self.stop - self.start, abs(self.start - self.server.start))


def move_to_cover(servers: Sequence[Holder], blocks: int, me: PeerId) -> PlannedMove | None:
    """The move of `me` towards blocks without a present or coming server; None: it stays."""
    return plan_moves(servers, blocks).get(me)


def plan_moves(servers: Sequence[Holder], blocks: int) -> dict[PeerId, PlannedMove]:
    """The moves that cover blocks without a present or coming server, by the server that moves.

    servers: of one model revision, online and joining.  Only online servers move, and each keeps the number
    of its blocks.  O(servers * count * blocks) for each move, `count` the blocks that one server holds.
    """
    found: dict[PeerId, PlannedMove] = {}
    online = coverage((server for server in servers if server.online), blocks)
    if 0 not in online:
        return found
    for rank in range(MAX_PLANS):
        steps = _Crew(servers, blocks, set(found)).plan()
        if not steps:
            break
        now = np.array(online)
        for move in steps:
            left = _left(move, blocks)
            ready = bool((now[left] > 1).all())
            now[left] -= ready
            found[move.server.peer] = PlannedMove(Blocks(move.start, move.stop), rank, ready)
    return found


class _Crew:
    """The servers that may move, as arrays, and how many servers each block is about to have."""

    def __init__(self, servers: Sequence[Holder], blocks: int, without: set[PeerId]) -> None:
        servers = sorted(servers, key=lambda server: server.peer)
        self.blocks = blocks
        self.free = [s for s in servers if s.online and s.peer not in without and s.start < blocks]
        self.starts = np.array([s.start for s in self.free], dtype=np.int64)
        self.stops = np.array([min(s.stop, blocks) for s in self.free], dtype=np.int64)
        self.soon = np.array(coverage(servers, blocks))
        self.now = np.array(coverage((s for s in servers if s.online), blocks))
        self.wait = np.where(self.soon == 0, np.inf, 0.0)  # blocks to load until a server has this one
        late = (self.now == 0) & (self.soon > 0)
        if late.any():
            self.wait[late] = np.inf
            for server in servers:
                own = slice(server.start, min(server.stop, blocks))
                fewer = np.minimum(self.wait[own], server.stop - server.start)
                self.wait[own] = np.where(late[own], fewer, self.wait[own])

    def plan(self) -> list[_Move]:
        """Chains of moves, the best first, until every block is held or no move helps.

        Blocks that a slow server is loading come after blocks that no server is loading.
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
        """The moves, in order, that load the fewest blocks per open block closed."""
        found = [m for row in self._likely(self.wait > 0, used) for m in self._closing(row)]
        best = min((m for m in found if m.opened is None), key=self._order, default=None)
        chain, cost = ([best], _cost([best])) if best else ([], np.inf)
        helped = sorted((m for m in found if m.opened), key=lambda m: (_cost([m]), m.server.peer, m.start))
        for move in helped[:MAX_TRIED]:
            if _cost([move]) >= cost:
                break
            helpers = self._replacements(move, used | {move.server.peer}, MAX_IN_A_ROW - 1)
            longer = [*helpers, move]
            if helpers and _cost(longer) < cost and self._in_order(longer):
                chain, cost = longer, _cost(longer)
        return chain

    def _order(self, move: _Move) -> tuple[float, int, int, int, bytes]:
        """Sort key: cost; among equals most blocks closed, most replicas left behind, then a hash."""
        left = _left(move, self.blocks)
        spare = int(self.soon[left].min()) if len(left) else self.blocks
        open_blocks = np.flatnonzero(self.wait > 0).tolist()
        lot = hashlib.sha256(f"{move.server.peer} {open_blocks}".encode()).digest()
        ready = (self.now[left] > 1).all()
        cost = _cost([move]) * (1.0 if ready else WAITING)
        return round(cost, 6), -move.closes, -spare, move.start, lot

    def _likely(self, wanted: Flags, used: set[PeerId]) -> list[int]:
        """Rows of the servers with the fewest blocks to load, those that need no replacement first."""
        where = np.flatnonzero(wanted)
        first, last = int(where[0]), int(where[-1])
        away = np.maximum(np.maximum(first - self.stops + 1, self.starts - last), 1)
        loads = np.minimum(away, self.stops - self.starts)
        singles = np.concatenate([[0], np.cumsum(self.soon == 1)])
        missed = singles[self.stops] > singles[self.starts]
        order = np.lexsort((loads, missed))
        return [int(row) for row in order if self.free[row].peer not in used][:MAX_MOVERS]

    def _closing(self, row: int) -> list[_Move]:
        """The moves of one server that close at least one open block."""
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

    def _replacements(self, move: _Move, used: set[PeerId], depth: int) -> list[_Move]:
        """The moves, in order, after which this one leaves no block without a server; [] for none."""
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
                helpers = self._replacements(helper, used | {helper.server.peer}, depth - 1)
                loads = sum(m.loads for m in (*helpers, helper))
                if helpers and loads < most:
                    best, most = [*helpers, helper], loads
        return best

    def _in_order(self, chain: Sequence[_Move]) -> bool:
        """Whether each block that is left keeps a server when these moves are made one by one."""
        soon = self.soon.copy()
        for move in chain:
            if (soon[_left(move, self.blocks)] < 2).any():
                return False
            soon[move.server.start : min(move.server.stop, self.blocks)] -= 1
            soon[move.start : move.stop] += 1
        return True


def _cost(chain: Sequence[_Move]) -> float:
    """Blocks that could be loaded in the time of these moves, one after the other, per block closed."""
    return sum(MOVE_EFFORT + move.loads for move in chain) / sum(move.closes for move in chain)


def _hull(alone: Counts, start: int, stop: int) -> tuple[int, int] | None:
    """The run from the first to the last of these blocks outside of the window; None where all are inside."""
    outside = alone[(alone < start) | (alone >= stop)]
    return (int(outside[0]), int(outside[-1]) + 1) if len(outside) else None


def _left(move: _Move, blocks: int) -> list[int]:
    """The blocks that a move leaves."""
    own = Blocks(move.server.start, min(move.server.stop, blocks))
    return [block for run in own.minus((move.start, move.stop)) for block in range(*run)]


def opens_gap(servers: Iterable[Holder], me: PeerId, own: Blocks, window: Blocks) -> bool:
    """Whether a block has no online server left once `me` has left the blocks `own` for `window`."""
    others = [s for s in servers if s.online and s.peer != me]
    return any(gaps(others, left) for left in own.minus(window))


def witnesses(servers: Iterable[Holder], me: PeerId, own: Blocks, window: Blocks) -> list[PeerId]:
    """A few online servers that together hold all blocks that `me` leaves, as far as anybody holds them."""
    others = sorted((s for s in servers if s.online and s.peer != me), key=lambda s: s.peer)
    left = {block for run in own.minus(window) for block in range(*run)}
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
    """The peers whose crash `me` should notice before their records end: a block of theirs has few servers.

    Few means at most SPARE other servers: online ones for an online peer, all others for a joining peer,
    since no other server moves to the same blocks.  Fewest first, then by a hash of (me, peer): where there
    are more than `most`, each server watches others (rendezvous hashing).  O(blocks held by all servers).
    """
    now, soon = coverage((s for s in servers if s.online), blocks), coverage(servers, blocks)
    found = []
    for server in servers:
        own = (now if server.online else soon)[server.start : min(server.stop, blocks)]
        others = min(own) - 1 if own else blocks
        if server.peer != me and others <= SPARE:
            lot = hashlib.sha256(f"{me} {server.peer}".encode()).digest()
            found.append((others, lot, server.peer))
    return tuple(peer for _, _, peer in sorted(found)[:most])


def taken_for_lost(asked: Collection[PeerId], silent: Collection[PeerId]) -> frozenset[PeerId]:
    """The silent peers that are lost; none where most are silent: then this node is cut off."""
    cut_off = len(silent) >= MIN_CUT_OFF and 2 * len(silent) > len(asked)
    return frozenset() if cut_off else frozenset(silent)


def gives_way(before: Iterable[Holder], now: Iterable[Holder], me: PeerId, window: Blocks) -> PeerId | None:
    """The server that has announced a move to some of these blocks since `before` and goes first; or None.

    Of two servers that have chosen at one moment the server with the lower id moves, and the other one too
    where a block of its window would still be without a server.
    """
    known = {(server.peer, server.start, server.stop) for server in before}
    others = [s for s in now if s.peer != me]
    new = [s for s in others if not s.online and (s.peer, s.start, s.stop) not in known]
    first = sorted(s.peer for s in new if s.peer < me and window.overlap(s.blocks))
    if not first:
        return None
    later = {s.peer for s in new if s.peer > me}
    counted = [s for s in others if s.peer not in later]
    return None if gaps(counted, window) else first[0]


def objection(
    before: Sequence[Holder],
    now: Sequence[Holder],
    me: PeerId,
    own: Blocks,
    window: Blocks,
) -> str | None:
    """Why an announced move must not be made; None where nothing speaks against it.

    before: the servers when the move was announced.  now: the servers once all announcements have spread.
    """
    if (first := gives_way(before, now, me, window)) is not None:
        return f"{first} goes there"
    if opens_gap(now, me, own, window):
        return "another server of our blocks has left"
    return None
