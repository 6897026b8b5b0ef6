"""A swarm in simulated time: servers that join, move, crash and lie.  A part of `benchmarks swarm`.

Event by event, from one seed, with the constants and the decisions of the nodes:
`routing.placement.rebalance`, `routing.placement.cover_gaps`, `node.serving.balancer`.  Records are
flooded: every server knows those of the others as they were at most VIEW_SECONDS ago, at its own moments.
A server that moves by our rule announces the new span, serves the old one for SETTLE_SECONDS more, looks
again, pings those who stay, and only then gives up what it does not keep; while it loads it serves what
both spans have.  A crashed server is seen until its record ends, but by those who watch it
(`routing.placement.cover_gaps.watched`): each asks at its own moments, every WATCH_SECONDS, and after two
silences, each waited for to the end, it leaves the server out.

By Petals' rule a server stops at once, looks for a place a few seconds later, and loads; it sees everything
at once, and nobody is watched.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from benchmarks.swarm.models import LIE, PARTED_SECONDS, VIEW_SECONDS, Hardware, Plan, script
from benchmarks.swarm.rules import Rule, Window
from benchmarks.swarm.views import News, Snapshot
from node.serving.balancer import (
    AGAIN_SECONDS,
    ANSWER_SECONDS,
    LOSS_SECONDS,
    RANK_SECONDS,
    SETTLE_SECONDS,
    WATCH_SECONDS,
)
from routing.blocks import Blocks
from routing.names import PeerId
from routing.placement.cover_gaps import (
    PlannedMove,
    objection,
    opens_gap,
    plan_moves,
    taken_for_lost,
    watched,
)
from routing.placement.rebalance import Move
from routing.placement.throughput import Holder, capacity
from routing.view.records import Record, State

RESTORED_SECONDS = 60.0  # in which, and the time to load, a block that lost its last server should have one
NOISE_SECONDS = 60.0  # between two announcements of another rate
PAUSE_SECONDS = 10.0  # at most, of a server that has left its place, until it looks for another


@dataclass(slots=True)
class Server:
    """One server.  serving: what it computes now, None where nothing; target: what it announces."""

    peer: PeerId
    count: int
    rate: float
    claim: float
    heard_at: float  # when it heard of the others, as at any multiple of VIEW_SECONDS from then
    serving: Window | None = None
    target: Window | None = None
    state: State = "offline"
    alive: bool = True
    version: int = 0  # of what it is doing: an event of an older version is void
    hole_since: float | None = None
    knew: Snapshot | None = None  # when it last looked
    lost: frozenset[PeerId] = frozenset()  # who did not answer
    watching: bool = False
    seen: list[Holder] = field(default_factory=list)  # when it announced its move


@dataclass(slots=True)
class Gap:
    """A block without a server.  Seconds of the simulated time: from when, and from when records tell it.

    stuck: seconds in which nobody could help: all memory together is too little, or no plan closes it.
    """

    since: float
    known: float | None = None
    stuck: float = 0.0
    stuck_since: float | None = None


@dataclass(slots=True)
class Repair:
    """A block that has a server again, or not even at the end.

    Seconds: in all, since records told of it, of the last loading, and in which nobody could help.
    """

    total: float
    known: float
    load: float
    stuck: float

    @property
    def late(self) -> bool:
        """Whether it took too long, counted from the crash."""
        return self.total > RESTORED_SECONDS + self.load

    @property
    def impossible(self) -> bool:
        """Whether it would not be late but for the time in which nobody could help."""
        return self.total - self.stuck <= RESTORED_SECONDS + self.load


@dataclass(slots=True)
class Outcome:
    """What was measured.  shares: of the bound, while observed; seconds of the simulated time.

    rank_ms, turns_ms: of what all servers with one view work out alike; own_ms: of the rest of a decision.
    """

    shares: list[float] = field(default_factory=list)
    at_rest: float = 0.0
    held_once: int = 0  # blocks, at rest
    uncovered_s: float = 0.0
    repairs: list[Repair] = field(default_factory=list)
    unrepaired: list[Repair] = field(default_factory=list)  # at the end; load: 0
    observed_s: float = 0.0
    moves: int = 0
    gaps_opened: int = 0
    loaded: int = 0
    rank_ms: list[float] = field(default_factory=list)
    turns_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)


class Simulation:
    """`run` it once."""

    def __init__(self, plan: Plan, rule: Rule) -> None:
        self.plan, self.rule = plan, rule
        self.outcome = Outcome()
        self._chance = random.Random(f"chance {plan.seed}")
        self._servers: dict[PeerId, Server] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now = 0.0
        self._news = News()
        self._observing = False
        self._changed = False  # who serves what, since it was last looked at
        self._gaps: dict[int, Gap] = {}
        self._gap_since = 0.0
        self._last_load = 0.0  # seconds, of who came online last
        self._last_plan: tuple[tuple[Holder, ...], bool] = ((), False)
        self._silent: set[PeerId] = set()  # crashed, and still announced
        self._parted_until = 0.0

    def run(self) -> Outcome:
        """Everyone joins; ten minutes of rest, or as long as the plan's churn takes; then the figures."""
        plan, fate = self.plan, script(self.plan)
        for at, hardware in fate.joins:
            self._at(at, lambda hardware=hardware: self._join(hardware))  # type: ignore[misc]
        for crash in fate.crashes:
            for name, seen_for in crash.gone:
                self._at(crash.at, lambda name=name, seen_for=seen_for: self._crash(name, seen_for))  # type: ignore[misc]
        half_way = plan.began + plan.seconds / 2
        if fate.cut_off:
            self._at(half_way, lambda: self._part(fate.cut_off))
        self._advance(plan.began)
        self.outcome.at_rest = self._share()
        self.outcome.held_once = self._count().count(1)
        self._observing = self._changed = True
        if plan.churn > 0 or plan.lost > 0 or plan.partition > 0 or plan.noise > 0:
            self._observe()
        else:
            self.outcome.shares.append(self.outcome.at_rest)
        self._advance(plan.began + plan.seconds)
        self.outcome.observed_s = plan.seconds
        return self.outcome

    def _at(self, when: float, do: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, do))

    def _later(self, server: Server, seconds: float, do: Callable[[Server], None]) -> None:
        version = server.version

        def unless_void() -> None:
            if server.alive and server.version == version:
                do(server)

        self._at(self._now + seconds, unless_void)

    def _advance(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self._now, _, do = heapq.heappop(self._events)
            do()
            if self._observing and (self._changed or self._gaps):
                self._watch_gap()
        self._now = until
        if self._observing and self._gaps:
            self.outcome.uncovered_s += until - self._gap_since
        self.outcome.unrepaired = [self._repaired(gap, 0.0) for gap in self._gaps.values()]

    def _watch_gap(self) -> None:
        """Keep account of the time when a block has no server, block by block."""
        self._changed = False
        open_blocks = self._open_blocks()
        if bool(open_blocks) != bool(self._gaps):
            self.outcome.uncovered_s += self._now - self._gap_since if self._gaps else 0.0
            self._gap_since = self._now
        told = self._not_announced(open_blocks)
        for block in open_blocks:
            gap = self._gaps.setdefault(block, Gap(self._now))
            gap.known = self._now if gap.known is None and block in told else gap.known
        for block in [block for block in self._gaps if block not in open_blocks]:
            self.outcome.repairs.append(self._repaired(self._gaps.pop(block), self._last_load))
        self._watch_hopeless()

    def _repaired(self, gap: Gap, load: float) -> Repair:
        known = 0.0 if gap.known is None else self._now - gap.known
        stuck = gap.stuck + (0.0 if gap.stuck_since is None else self._now - gap.stuck_since)
        return Repair(self._now - gap.since, known, load, stuck)

    def _watch_hopeless(self) -> None:
        """Keep account of the time in which an open block cannot be served, whatever anybody knew."""
        blocks, up = self.plan.model.blocks, self._servers.values()
        placed = [s for s in up if s.target]
        held = [Holder(s.peer, *s.target, s.claim, s.state == "online") for s in placed if s.target]
        hopeless = bool(self._gaps) and (
            sum(server.count for server in up) < blocks or not self._planned(tuple(held))
        )
        for block, gap in self._gaps.items():
            stuck = hopeless and not any(h.start <= block < h.stop for h in held)
            if stuck and gap.stuck_since is None:
                gap.stuck_since = self._now
            elif not stuck and gap.stuck_since is not None:
                gap.stuck, gap.stuck_since = gap.stuck + self._now - gap.stuck_since, None

    def _planned(self, held: tuple[Holder, ...]) -> bool:
        """Whether anybody could do anything."""
        if self._last_plan[0] != held:
            self._last_plan = held, bool(plan_moves(held, self.plan.model.blocks))
        return self._last_plan[1]

    def _count(self) -> list[int]:
        """How many servers serve each block, in truth."""
        change = [0] * (self.plan.model.blocks + 1)
        for server in self._servers.values():
            if server.serving:
                change[server.serving[0]] += 1
                change[server.serving[1]] -= 1
        return list(accumulate(change[:-1]))

    def _open_blocks(self) -> list[int]:
        return [block for block, count in enumerate(self._count()) if not count]

    def _not_announced(self, open_blocks: list[int]) -> set[int]:
        """Those of them that no online server announces."""
        held = [holder for holder in self._news.fresh().held if holder.online] if open_blocks else []
        return {b for b in open_blocks if not any(h.start <= b < h.stop for h in held)}

    # What is announced, and what is seen of it

    def _announce(self, server: Server) -> None:
        record = None
        if server.target is not None and server.alive:
            start, stop = server.target
            record = Record(
                peer=server.peer, role="serve", blocks=self.plan.model.blocks, start=start, stop=stop,
                state=server.state, seconds_per_block=1 / server.claim,
            )  # fmt: skip
        self._news.announce(self._now, server.peer, record)

    def _wobble(self, server: Server) -> None:
        """Announce another rate, as a server does that measures anew."""
        if not server.alive:
            return
        server.claim = server.rate * (1 + self._chance.uniform(-self.plan.noise, self.plan.noise))
        self._announce(server)
        self._at(self._now + NOISE_SECONDS, lambda: self._wobble(server))

    def _view(self, server: Server) -> Snapshot:
        age = 0.0 if self.rule.fresh else (self._now - server.heard_at) % VIEW_SECONDS
        return self._news.seen(self._now, age, server.peer).without(server.lost)

    def _ranked(self, snapshot: Snapshot) -> list[Move]:
        """The moves on which everyone with this view agrees."""

        def rank() -> list[Move]:
            began = time.perf_counter()
            found = self.rule.rank(snapshot.held, self.plan.model.blocks)
            self.outcome.rank_ms.append((time.perf_counter() - began) * 1000)
            return found

        return snapshot.once("ranked", rank)

    def _turns(self, snapshot: Snapshot) -> dict[PeerId, PlannedMove]:
        """The plan on which everyone with this view agrees."""

        def plan() -> dict[PeerId, PlannedMove]:
            began = time.perf_counter()
            found = self.rule.turns(snapshot.held, self.plan.model.blocks)
            self.outcome.turns_ms.append((time.perf_counter() - began) * 1000)
            return found

        return snapshot.once("turns", plan)

    def _timed(self, began: float) -> None:
        self.outcome.own_ms.append((time.perf_counter() - began) * 1000)

    # What servers do

    def _join(self, hardware: Hardware) -> None:
        name, count, rate, lies = hardware
        claim = rate * LIE if lies else rate
        server = Server(PeerId(name), count, rate, claim, self._now)
        self._servers[server.peer] = server
        if self.plan.noise and not lies:
            self._at(self._now + self._chance.uniform(0, NOISE_SECONDS), lambda: self._wobble(server))
        if self.rule.covers:
            server.heard_at -= self._chance.uniform(0, VIEW_SECONDS)
            self._at(server.heard_at + VIEW_SECONDS, lambda: self._hear(server))
            self._at(self._now, lambda: self._start_watching(server))
        self._take_place(server)

    def _take_place(self, server: Server) -> None:
        """Choose blocks as one that serves nothing, and load them."""
        seen = [holder for holder in self._view(server).held if holder.peer != server.peer]
        began = time.perf_counter()
        server.target = self.rule.join(seen, self.plan.model.blocks, server.count, server.claim, self._chance)
        self._timed(began)
        server.state = "joining"
        self._announce(server)
        self._load(server)

    def _load(self, server: Server) -> None:
        """Load what is missing of the target; `serving` is what is there of it already."""
        assert server.target is not None
        there = server.serving[1] - server.serving[0] if server.serving else 0
        missing = server.target[1] - server.target[0] - there
        if self._observing:
            self.outcome.loaded += missing
        seconds = missing * self.plan.model.block_gb / self.plan.load_gb_per_s
        self._later(server, seconds, lambda server: self._come_online(server, seconds))

    def _come_online(self, server: Server, seconds: float) -> None:
        server.serving, server.state, self._changed = server.target, "online", True
        self._last_load = seconds
        self._announce(server)
        self._decide_later(server)
        self._look_for_gaps(server)

    def _decide_later(self, server: Server) -> None:
        self._later(server, self._chance.uniform(*self.rule.decide_seconds), self._decide)

    def _sees_itself(self, server: Server, held: list[Holder]) -> bool:
        """Else it has not even seen its own last move; a node would know, but see the others as old."""
        mine = next((holder for holder in held if holder.peer == server.peer), None)
        return mine is not None and mine.online and (mine.start, mine.stop) == server.target

    def _decide(self, server: Server) -> None:
        """A look for a better place."""
        snapshot, blocks = self._view(server), self.plan.model.blocks
        window, seen = None, snapshot.held
        if self._sees_itself(server, seen):
            ranked, planned = self._ranked(snapshot), self._turns(snapshot)
            began = time.perf_counter()
            if server.peer not in planned:
                window = self.rule.move(seen, blocks, server.peer, ranked, self._chance)
            self._timed(began)
        if window is None or window == server.target:
            self._decide_later(server)
        elif self.rule.drops_first:
            self._leave(server)
        else:
            self._announce_move(server, window, seen)

    def _hear(self, server: Server) -> None:
        """News of the others: so often it can see something new."""
        if server.alive:
            self._at(self._now + VIEW_SECONDS, lambda: self._hear(server))
            self._notice(server)

    def _notice(self, server: Server) -> None:
        """See what is new: who is gone, and blocks that nobody holds."""
        view, knew = self._view(server), server.knew
        if view is knew:
            return
        server.knew = view
        if knew is not None and server.state == "online" and knew.online - view.peers:
            server.version += 1
            self._later(server, self._chance.uniform(0, LOSS_SECONDS), self._decide)
        self._look_for_gaps(server)

    def _look_for_gaps(self, server: Server) -> None:
        """A look for blocks that nobody holds, as a node does each second."""
        snapshot = self._view(server)
        held = snapshot.held
        turn = None
        if server.state == "online" and self._sees_itself(server, held):
            turn = self._turns(snapshot).get(server.peer)
        elif server.state == "online" and server.serving:
            mine = Holder(server.peer, *server.serving, server.claim)
            held = [mine, *(holder for holder in held if holder.peer != server.peer)]
            turn = self.rule.turns(held, self.plan.model.blocks).get(server.peer)
        if turn is None:
            server.hole_since = None
            return
        server.hole_since = self._now if server.hole_since is None else server.hole_since
        wait = server.hole_since + RANK_SECONDS * turn.rank - self._now
        if turn.ready and wait <= 0:
            self._announce_move(server, turn.blocks, held)
        elif turn.ready:
            self._later(server, wait, self._look_for_gaps)

    # Watching

    def _start_watching(self, server: Server) -> None:
        """Nobody asks in vain, and so nothing is simulated, until there is somebody silent."""
        if not server.watching and self._somebody_is_silent():
            server.watching = True
            self._at(self._now + self._chance.uniform(0, WATCH_SECONDS), lambda: self._ask_around(server))

    def _somebody_is_silent(self) -> bool:
        return bool(self._silent) or self._now < self._parted_until

    def _ask_around(self, server: Server) -> None:
        """As a node does; an answer comes at once, a silence takes ANSWER_SECONDS."""
        server.watching = server.alive and (self._somebody_is_silent() or bool(server.lost))
        if not server.watching or server.target is None:
            server.watching = False
            return
        asked = watched(self._view(server).held, self.plan.model.blocks, server.peer)
        silent = [peer for peer in asked if not self._answers(server, peer)]
        lost = taken_for_lost(asked, silent) | {p for p in server.lost if not self._answers(server, p)}
        seconds = ANSWER_SECONDS + AGAIN_SECONDS + ANSWER_SECONDS if silent else 0.0
        self._at(self._now + seconds, lambda: self._believe_lost(server, lost))
        pause = WATCH_SECONDS * self._chance.uniform(0.5, 1.0)
        self._at(self._now + seconds + pause, lambda: self._ask_around(server))

    def _believe_lost(self, server: Server, lost: frozenset[PeerId]) -> None:
        if server.alive and lost != server.lost:
            server.lost = lost
            self._notice(server)

    def _answers(self, server: Server, peer: PeerId) -> bool:
        return peer in self._servers and not self._news.parted(self._now, server.peer, peer)

    def _part(self, peers: frozenset[str]) -> None:
        """For ten minutes these do not hear the others, nor the others them."""
        self._news.cut(self._now, peers)
        self._parted_until = self._now + PARTED_SECONDS
        self._all_watch()

    def _all_watch(self) -> None:
        if self.rule.covers:
            for server in self._servers.values():
                self._start_watching(server)

    def _leave(self, server: Server) -> None:
        self._count_move(server, None)
        server.version += 1
        server.serving, server.target, server.state = None, None, "offline"
        self._announce(server)
        self._later(server, self._chance.uniform(0, PAUSE_SECONDS), self._take_place)

    def _announce_move(self, server: Server, window: Window, seen: list[Holder]) -> None:
        server.version += 1
        server.target, server.state, server.seen, server.hole_since = window, "joining", seen, None
        self._announce(server)
        self._later(server, SETTLE_SECONDS, self._make_move)

    def _make_move(self, server: Server) -> None:
        """Everyone may know by now: go, unless something speaks against it."""
        own, window = server.serving, server.target
        assert own is not None
        assert window is not None
        held = self._view(server).held
        why_not = objection(server.seen, held, server.peer, Blocks(*own), Blocks(*window))
        answering = [holder for holder in held if self._answers(server, holder.peer)]
        if why_not or opens_gap(answering, server.peer, Blocks(*own), Blocks(*window)):
            server.target, server.state = own, "online"
            self._announce(server)
            self._decide_later(server)
            self._look_for_gaps(server)
            return
        start, stop = max(own[0], window[0]), min(own[1], window[1])
        kept = (start, stop) if start < stop else None
        self._count_move(server, kept)
        server.serving = kept
        self._load(server)

    def _count_move(self, server: Server, kept: Window | None) -> None:
        self._changed = True
        if not self._observing:
            return
        self.outcome.moves += 1
        before, now = self._open_blocks(), server.serving
        server.serving = kept
        self.outcome.gaps_opened += len(self._open_blocks()) > len(before)
        server.serving = now

    def _crash(self, name: str, seen_for: float) -> None:
        server = self._servers.pop(PeerId(name))
        server.alive, server.serving, self._changed = False, None, True
        if server.target is not None:
            self._silent.add(server.peer)
            self._at(self._now + seen_for, lambda: self._end(server))
            self._all_watch()

    def _end(self, server: Server) -> None:
        """The record of one that crashed ends."""
        self._silent.discard(server.peer)
        self._announce(server)

    # What is measured

    def serving(self) -> list[tuple[Holder, float]]:
        """Who serves what now, in truth, and which rate each of them claims."""
        serving = ((s, s.serving) for s in self._servers.values())
        return [(Holder(s.peer, *window, s.rate), s.claim) for s, window in serving if window]

    def _share(self) -> float:
        """The capacity of what is served now, by true rates, as a share of the bound of all that are up."""
        blocks = self.plan.model.blocks
        serving = [Holder(s.peer, *s.serving, s.rate) for s in self._servers.values() if s.serving]
        return capacity(serving, blocks) / (math.fsum(s.rate for s in self._servers.values()) / blocks)

    def _observe(self) -> None:
        self.outcome.shares.append(self._share())
        self._at(self._now + 15, self._observe)


def summary(plan: Plan, outcomes: list[Outcome]) -> dict[str, object]:
    """The figures of all seeds of one rule.

    coverage_restored_s: from when a block lost its last server until it has one again.
    coverage_late: blocks for which that took more than RESTORED_SECONDS and the loading of who closed the
        gap; coverage_late_impossible: of these, but for the time in which nobody could help.
    coverage_reaction_s: from when no record tells of a server, and without the loading of who closed the gap.
    """
    setup = sorted(statistics.fmean(outcome.shares) for outcome in outcomes)
    hours = sum(outcome.observed_s for outcome in outcomes) / 3600
    ranks = [ms for outcome in outcomes for ms in outcome.rank_ms] or [0.0]
    plans = [ms for outcome in outcomes for ms in outcome.turns_ms] or [0.0]
    shared = statistics.fmean(ranks) + statistics.fmean(plans)
    own = sorted(ms for outcome in outcomes for ms in outcome.own_ms)
    repairs = [repair for outcome in outcomes for repair in outcome.repairs]
    restored = sorted(repair.total for repair in repairs) or [0.0]
    still_open = [repair for outcome in outcomes for repair in outcome.unrepaired]
    late = [repair for repair in repairs + still_open if repair.late]
    reactions = sorted(max(0.0, repair.known - repair.load) for repair in repairs) or [0.0]
    return {
        "share_of_bound_mean": statistics.fmean(setup),
        "share_of_bound_p5": setup[int(0.05 * len(setup))],
        "share_of_bound_min": setup[0],
        "blocks_held_once": statistics.fmean(outcome.held_once for outcome in outcomes),
        "at_rest_mean": statistics.fmean(outcome.at_rest for outcome in outcomes),
        "share_at_end_mean": statistics.fmean(outcome.shares[-1] for outcome in outcomes),
        "uncovered_s": sum(outcome.uncovered_s for outcome in outcomes) / len(outcomes),
        "gaps_opened_by_moves": sum(outcome.gaps_opened for outcome in outcomes),
        "gaps": len(repairs) + len(still_open),
        "coverage_late": len(late),
        "coverage_late_impossible": sum(repair.impossible for repair in late),
        "coverage_late_s": sorted(
            (round(repair.total), round(repair.load), round(repair.stuck)) for repair in late
        ),
        "coverage_restored_s_p95": restored[int(0.95 * len(restored))],
        "coverage_restored_s_max": restored[-1],
        "coverage_load_s_max": max((repair.load for repair in repairs), default=0.0),
        "coverage_reaction_s_p95": reactions[int(0.95 * len(reactions))],
        "coverage_reaction_s_max": reactions[-1],
        "coverage_reactions_over_60_s": sum(seconds > 60 for seconds in reactions),
        "moves_per_server_hour": sum(outcome.moves for outcome in outcomes) / hours / plan.servers,
        "blocks_loaded_per_hour": sum(outcome.loaded for outcome in outcomes) / hours,
        "decision_ms": shared + statistics.fmean(own),
        "decision_ms_p99": shared + own[int(0.99 * len(own))],
        "decision_ms_max": max(ranks) + max(plans) + own[-1],
    }
