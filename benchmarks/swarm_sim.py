"""A swarm in simulated time: servers that join, move, crash and lie.  A part of benchmarks.swarm.

Event by event, from one seed.  Every server hears of the others each 30 s, at its own moment; a crashed
one is seen until its record runs out.  A server that moves by our rule announces the new span, goes on
serving the old one for as long as others may not have heard, looks again, asks those who stay, and only
then gives up what it does not keep; while it loads it serves what both spans have.  By Petals' rule it
stops at once, looks for a place a few seconds later, and loads.  What is decided is decided by the code
of the nodes, `routing.placement` and `routing.moves`.
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

from benchmarks.swarm_models import DELAY_SECONDS, LIE, Hardware, Plan, script
from benchmarks.swarm_rules import Rule, Window
from benchmarks.swarm_views import News, Snapshot
from node.balancer import LOSS_SECONDS
from routing.capacity import Holder, capacity
from routing.moves import Turn, objection, opens_gap
from routing.names import PeerId
from routing.placement import Move
from routing.records import Record, State

TURN_SECONDS = 2 * DELAY_SECONDS  # that a server waits for each plan that comes before its own
NOISE_SECONDS = 60.0  # between two announcements of another rate
PAUSE_SECONDS = 10.0  # at most, of a server that has left its place, until it looks for another


@dataclass(slots=True)
class Server:
    """One server.  serving: what it computes now, None where nothing; target: what it announces."""

    peer: PeerId
    count: int
    rate: float
    claim: float
    heard_at: float  # seconds after each half minute
    serving: Window | None = None
    target: Window | None = None
    state: State = "offline"
    alive: bool = True
    version: int = 0  # of what it is doing: an event of an older version is void
    hole_since: float | None = None
    online: frozenset[PeerId] = frozenset()  # whom it saw
    seen: list[Holder] = field(default_factory=list)  # when it announced its move


@dataclass(slots=True)
class Gap:
    """A block without a server.  Seconds of the simulated time: from when, and from when records tell it."""

    since: float
    known: float | None = None


@dataclass(slots=True)
class Repair:
    """A block that has a server again.  Seconds: in all, since records told of it, of the last loading."""

    total: float
    known: float
    load: float


@dataclass(slots=True)
class Outcome:
    """What was measured.  shares: of the bound, while observed; seconds of the simulated time.

    rank_ms: of what all servers with one view work out alike; own_ms: of the rest of a decision.
    """

    shares: list[float] = field(default_factory=list)
    at_rest: float = 0.0
    held_once: int = 0  # blocks, at rest
    uncovered_s: float = 0.0
    repairs: list[Repair] = field(default_factory=list)
    observed_s: float = 0.0
    moves: int = 0
    gaps_opened: int = 0
    loaded: int = 0
    rank_ms: list[float] = field(default_factory=list)
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
            self._at(half_way, lambda: self._news.cut(half_way, fate.cut_off))
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
            gap = self._gaps.pop(block)
            known = 0.0 if gap.known is None else self._now - gap.known
            self.outcome.repairs.append(Repair(self._now - gap.since, known, self._last_load))

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
        age = (self._now - server.heard_at) % DELAY_SECONDS
        if self.rule.fresh:
            return self._news.seen(self._now, 0.0, server.peer)
        return self._news.seen(self._now, age, server.peer)

    def _ranked(self, snapshot: Snapshot) -> tuple[list[Move], dict[PeerId, Turn]]:
        """What everyone with this view works out alike."""

        def rank() -> tuple[list[Move], dict[PeerId, Turn]]:
            began, blocks = time.perf_counter(), self.plan.model.blocks
            found = self.rule.rank(snapshot.held, blocks), self.rule.turns(snapshot.held, blocks)
            self.outcome.rank_ms.append((time.perf_counter() - began) * 1000)
            return found

        return snapshot.once("ranked", rank)

    def _timed(self, began: float) -> None:
        self.outcome.own_ms.append((time.perf_counter() - began) * 1000)

    # What servers do

    def _join(self, hardware: Hardware) -> None:
        name, count, rate, lies = hardware
        claim = rate * LIE if lies else rate
        server = Server(PeerId(name), count, rate, claim, self._chance.uniform(0, DELAY_SECONDS))
        self._servers[server.peer] = server
        if self.plan.noise and not lies:
            self._at(self._now + self._chance.uniform(0, NOISE_SECONDS), lambda: self._wobble(server))
        if self.rule.covers:
            self._at(self._now + server.heard_at, lambda: self._hear(server))
            server.heard_at = (self._now + server.heard_at) % DELAY_SECONDS
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
            ranked, turns = self._ranked(snapshot)
            began = time.perf_counter()
            if server.peer not in turns:
                window = self.rule.move(seen, blocks, server.peer, ranked, self._chance)
            self._timed(began)
        if window is None or window == server.target:
            self._decide_later(server)
        elif self.rule.drops_first:
            self._leave(server)
        else:
            self._announce_move(server, window, seen)

    def _hear(self, server: Server) -> None:
        """News of the others: each 30 s; so often, and when it comes online, it can see something new."""
        if not server.alive:
            return
        self._at(self._now + DELAY_SECONDS, lambda: self._hear(server))
        held = self._view(server).held
        lost = server.online.difference(holder.peer for holder in held)
        server.online = frozenset(holder.peer for holder in held if holder.online)
        if lost and server.state == "online":
            server.version += 1
            self._later(server, self._chance.uniform(0, LOSS_SECONDS), self._decide)
        self._look_for_gaps(server)

    def _look_for_gaps(self, server: Server) -> None:
        """A look for blocks that nobody holds, as a node does each second."""
        snapshot = self._view(server)
        held = snapshot.held
        turn = None
        if server.state == "online" and self._sees_itself(server, held):
            turn = self._ranked(snapshot)[1].get(server.peer)
        elif server.state == "online" and server.serving:
            mine = Holder(server.peer, *server.serving, server.claim)
            held = [mine, *(holder for holder in held if holder.peer != server.peer)]
            turn = self.rule.turns(held, self.plan.model.blocks).get(server.peer)
        if turn is None:
            server.hole_since = None
            return
        server.hole_since = self._now if server.hole_since is None else server.hole_since
        if turn.ready and self._now >= server.hole_since + TURN_SECONDS * turn.rank:
            self._announce_move(server, (turn.start, turn.stop), held)

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
        self._later(server, DELAY_SECONDS, self._make_move)

    def _make_move(self, server: Server) -> None:
        """Everyone may know by now: go, unless something speaks against it."""
        own, window = server.serving, server.target
        assert own is not None
        assert window is not None
        held = self._view(server).held
        why_not = objection(server.seen, held, server.peer, own, window)
        answering = [holder for holder in held if self._answers(holder)]
        if why_not or opens_gap(answering, server.peer, own, window):
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

    def _answers(self, holder: Holder) -> bool:
        """Whether a server that is asked says that it serves what it announces."""
        asked = self._servers.get(holder.peer)
        return asked is not None and asked.state == "online" and asked.target == (holder.start, holder.stop)

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
        self._at(self._now + seen_for, lambda: self._announce(server))

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
    coverage_reaction_s: from when no record tells of a server, and without the loading of who closed the gap.
    """
    means = sorted(statistics.fmean(outcome.shares) for outcome in outcomes)
    hours = sum(outcome.observed_s for outcome in outcomes) / 3600
    ranks = [ms for outcome in outcomes for ms in outcome.rank_ms] or [0.0]
    decisions = sorted(statistics.fmean(ranks) + ms for outcome in outcomes for ms in outcome.own_ms)
    repairs = [repair for outcome in outcomes for repair in outcome.repairs]
    restored = sorted(repair.total for repair in repairs) or [0.0]
    reactions = sorted(max(0.0, repair.known - repair.load) for repair in repairs) or [0.0]
    return {
        "share_of_bound_mean": statistics.fmean(means),
        "share_of_bound_p5": means[int(0.05 * len(means))],
        "share_of_bound_min": means[0],
        "blocks_held_once": statistics.fmean(outcome.held_once for outcome in outcomes),
        "at_rest_mean": statistics.fmean(outcome.at_rest for outcome in outcomes),
        "share_at_end_mean": statistics.fmean(outcome.shares[-1] for outcome in outcomes),
        "uncovered_s": sum(outcome.uncovered_s for outcome in outcomes) / len(outcomes),
        "gaps_opened_by_moves": sum(outcome.gaps_opened for outcome in outcomes),
        "gaps": len(repairs),
        "coverage_restored_s_p95": restored[int(0.95 * len(restored))],
        "coverage_restored_s_max": restored[-1],
        "coverage_load_s_max": max((repair.load for repair in repairs), default=0.0),
        "coverage_reaction_s_p95": reactions[int(0.95 * len(reactions))],
        "coverage_reaction_s_max": reactions[-1],
        "coverage_reactions_over_60_s": sum(seconds > 60 for seconds in reactions),
        "moves_per_server_hour": sum(outcome.moves for outcome in outcomes) / hours / plan.servers,
        "blocks_loaded_per_hour": sum(outcome.loaded for outcome in outcomes) / hours,
        "decision_ms": statistics.fmean(decisions),
        "decision_ms_p99": decisions[int(0.99 * len(decisions))],
        "decision_ms_max": max(ranks) + decisions[-1] - statistics.fmean(ranks),
    }
