"""A swarm in simulated time: servers that join, move, crash and lie.  A part of benchmarks.swarm.

Event by event, from one seed.  Everyone decides on a view that is up to 30 s old; a crashed server is
seen until its record runs out.  A server that moves by our rule announces the new span, goes on serving
the old one for as long as others may not have heard, looks again, and only then gives up what it does
not keep; while it loads it serves what both spans have.  By the other rules it stops at once and loads.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.swarm_rules import Rule, Window
from routing.capacity import Holder, capacity
from routing.names import PeerId
from routing.placement import Move, holders, opens_gap
from routing.records import Record, State

DELAY_SECONDS = 30.0  # the oldest that a view may be, and how long a move is announced before it is made
TTL_SECONDS = 90.0
REST_SECONDS = 600.0
LIE = 100.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A GPU: how many blocks it holds, its block-tokens per second, how frequent it is."""

    name: str
    count: int
    rate: float
    share: float


@dataclass(frozen=True, slots=True)
class Model:
    """A case: blocks of so many gigabytes, and the GPUs that hold them."""

    blocks: int
    block_gb: float
    kinds: tuple[Kind, ...]


NAMES, SHARES = ("3060", "T4", "3090", "4090", "A100"), (0.3, 0.2, 0.3, 0.1, 0.1)


def _kinds(counts: tuple[int, ...], rates: tuple[float, ...]) -> tuple[Kind, ...]:
    return tuple(Kind(*row) for row in zip(NAMES, counts, rates, SHARES, strict=True))


MODELS = {  # in 8 bits
    "llama-70b": Model(80, 0.9, _kinds((10, 14, 22, 24, 70), (400, 330, 1040, 1100, 2200))),
    "llama-405b": Model(126, 3.2, _kinds((3, 4, 7, 7, 24), (120, 100, 310, 330, 660))),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens.

    churn: share of the servers replaced per hour, from the last join on, over `seconds`.
    lost: share of the servers, a region, that crash together in the middle of that time.
    join_seconds: between two that join.  load_gb_per_s: of a server that loads blocks.
    """

    model: Model
    servers: int
    seed: int
    churn: float = 0.0
    lost: float = 0.0
    liars: float = 0.0
    seconds: float = 3600.0
    join_seconds: float = 10.0
    load_gb_per_s: float = 0.25


@dataclass(slots=True)
class Server:
    """One server.  serving: what it computes now, None where nothing; target: what it announces."""

    peer: PeerId
    count: int
    rate: float
    claim: float
    serving: Window | None = None
    target: Window | None = None
    state: State = "offline"
    alive: bool = True
    version: int = 0  # of what it is doing: an event of an older version is void


@dataclass(slots=True)
class Outcome:
    """What was measured.  shares: of the bound, while observed; seconds of the simulated time."""

    shares: list[float] = field(default_factory=list)
    at_rest: float = 0.0
    uncovered_s: float = 0.0
    gap_repairs_s: list[float] = field(default_factory=list)
    observed_s: float = 0.0
    moves: int = 0
    loaded: int = 0
    decisions_ms: list[float] = field(default_factory=list)


class Simulation:
    """`run` it once."""

    def __init__(self, plan: Plan, rule: Rule) -> None:
        self.plan, self.rule = plan, rule
        self.outcome = Outcome()
        self._draws = random.Random(f"servers {plan.seed}")  # the same servers whatever the rule
        self._chance = random.Random(f"chance {plan.seed}")
        self._servers: dict[PeerId, Server] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now = 0.0
        self._records: dict[PeerId, Record] = {}
        self._times, self._snapshots = [-math.inf], [tuple[Record, ...]()]
        self._seen: dict[int, list[Holder]] = {}
        self._ranks: dict[int, list[Move]] = {}
        self._observing = False

    def run(self) -> Outcome:
        """Everyone joins; ten minutes of rest, or as long as the plan's churn takes; then the figures."""
        plan = self.plan
        for number in range(plan.servers):
            self._at(number * plan.join_seconds, self._join)
        joined = plan.servers * plan.join_seconds
        stirred = plan.churn > 0 or plan.lost > 0
        self._advance(joined + REST_SECONDS)
        self.outcome.at_rest = self._share()
        self._observing = True
        began = self._now
        for at in self._times_of_churn(began):
            self._at(at, self._replace_one)
        if plan.lost:
            self._at(began + plan.seconds / 2, self._lose_region)
        if stirred:
            self._at(began, self._observe)
        else:
            self.outcome.shares.append(self.outcome.at_rest)
        self._advance(began + plan.seconds)
        self.outcome.observed_s = plan.seconds
        return self.outcome

    def _times_of_churn(self, began: float) -> list[float]:
        if not self.plan.churn:
            return []
        times, at = [], began
        while at < began + self.plan.seconds:
            times.append(at)
            at += self._chance.expovariate(self.plan.churn * self.plan.servers / 3600)
        return times[1:]

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
        uncovered: float | None = None
        while self._events and self._events[0][0] <= until:
            when, _, do = heapq.heappop(self._events)
            self._now = when
            do()
            if self._observing:  # gaps are known between events alone
                uncovered = self._watch_gap(uncovered)
        self._now = until
        if self._observing and uncovered is not None:
            self.outcome.uncovered_s += until - uncovered
            self.outcome.gap_repairs_s.append(until - uncovered)

    def _watch_gap(self, since: float | None) -> float | None:
        gap = self._has_gap()
        if gap and since is None:
            return self._now
        if not gap and since is not None:
            self.outcome.uncovered_s += self._now - since
            self.outcome.gap_repairs_s.append(self._now - since)
            return None
        return since

    def _has_gap(self) -> bool:
        reached = 0
        for start, stop in sorted(s.serving for s in self._servers.values() if s.serving):
            if start > reached:
                return True
            reached = max(reached, stop)
        return reached < self.plan.model.blocks

    # What is announced, and what is seen of it

    def _announce(self, server: Server) -> None:
        blocks = self.plan.model.blocks
        if server.target is None or not server.alive:
            self._records.pop(server.peer, None)
        else:
            start, stop = server.target
            self._records[server.peer] = Record(
                peer=server.peer, role="serve", blocks=blocks, start=start, stop=stop,
                state=server.state, seconds_per_block=1 / server.claim,
            )  # fmt: skip
        self._times.append(self._now)
        self._snapshots.append(tuple(self._records.values()))

    def _look(self, most: float = DELAY_SECONDS) -> int:
        """The number of the snapshot that somebody sees now."""
        return bisect_right(self._times, self._now - self._chance.uniform(0, most)) - 1

    def _view(self, snapshot: int) -> list[Holder]:
        if snapshot not in self._seen:
            self._seen[snapshot] = holders(self._snapshots[snapshot])
        return self._seen[snapshot]

    def _timed(self, began: float) -> None:
        self.outcome.decisions_ms.append((time.perf_counter() - began) * 1000)

    # What servers do

    def _join(self) -> None:
        kinds = self.plan.model.kinds
        kind = self._draws.choices(kinds, [kind.share for kind in kinds])[0]
        rate = kind.rate * self._draws.uniform(0.7, 1.1)
        lies = self._draws.random() < self.plan.liars
        peer = PeerId(f"{self._draws.getrandbits(64):016x}")
        server = Server(peer, kind.count, rate, rate * LIE if lies else rate)
        self._servers[peer] = server
        seen, began = self._view(self._look()), time.perf_counter()
        server.target = self.rule.join(seen, self.plan.model.blocks, kind.count, server.claim, self._chance)
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
        self._later(server, seconds, self._come_online)

    def _come_online(self, server: Server) -> None:
        server.serving, server.state = server.target, "online"
        self._announce(server)
        self._later(server, self._chance.uniform(*self.rule.decide_seconds), self._decide)

    def _decide(self, server: Server) -> None:
        snapshot, blocks = self._look(), self.plan.model.blocks
        seen, began = self._view(snapshot), time.perf_counter()
        if snapshot not in self._ranks:
            self._ranks[snapshot] = self.rule.rank(seen, blocks)
        mine = next(((h.start, h.stop) for h in seen if h.peer == server.peer), None)
        window = None
        if mine == server.target:  # else it has not even seen its own last move
            window = self.rule.move(seen, blocks, server.peer, self._ranks[snapshot], self._chance)
        self._timed(began)
        if window is None or window == server.target:
            self._later(server, self._chance.uniform(*self.rule.decide_seconds), self._decide)
            return
        server.version += 1
        server.target, server.state = window, "joining"
        self._announce(server)
        if self.rule.drops_first:
            self.outcome.moves += self._observing
            server.serving = None
            self._load(server)
        else:
            self._later(server, DELAY_SECONDS, self._make_move)

    def _make_move(self, server: Server) -> None:
        """Everyone may know by now: go, unless that would open a gap."""
        assert server.serving is not None
        assert server.target is not None
        others = [h for h in self._view(self._look()) if h.peer != server.peer]
        held = [*others, Holder(server.peer, *server.serving, server.rate)]
        if opens_gap(held, server.peer, *server.target):
            server.target, server.state = server.serving, "online"
            self._announce(server)
            self._later(server, self._chance.uniform(*self.rule.decide_seconds), self._decide)
            return
        self.outcome.moves += self._observing
        start, stop = max(server.serving[0], server.target[0]), min(server.serving[1], server.target[1])
        server.serving = (start, stop) if start < stop else None
        self._load(server)

    def _crash(self, server: Server) -> None:
        server.alive, server.serving = False, None
        del self._servers[server.peer]
        seen_for = TTL_SECONDS - self._chance.uniform(0, DELAY_SECONDS)
        self._at(self._now + seen_for, lambda: self._announce(server))

    def _replace_one(self) -> None:
        self._crash(self._chance.choice(list(self._servers.values())))
        self._join()

    def _lose_region(self) -> None:
        lost = self._chance.sample(list(self._servers.values()), round(self.plan.lost * len(self._servers)))
        for server in lost:
            self._crash(server)

    # What is measured

    def _share(self) -> float:
        """The capacity of what is served now, by true rates, as a share of the bound of all that are up."""
        blocks = self.plan.model.blocks
        serving = [Holder(s.peer, *s.serving, s.rate) for s in self._servers.values() if s.serving]
        return capacity(serving, blocks) / (math.fsum(s.rate for s in self._servers.values()) / blocks)

    def _observe(self) -> None:
        self.outcome.shares.append(self._share())
        self._at(self._now + 15, self._observe)


def summary(plan: Plan, outcomes: list[Outcome]) -> dict[str, float]:
    """The figures of all seeds of one rule."""
    means = sorted(statistics.fmean(outcome.shares) for outcome in outcomes)
    hours = sum(outcome.observed_s for outcome in outcomes) / 3600
    decisions = sorted(ms for outcome in outcomes for ms in outcome.decisions_ms)
    repairs = [seconds for outcome in outcomes for seconds in outcome.gap_repairs_s]
    return {
        "share_of_bound_mean": statistics.fmean(means),
        "share_of_bound_p5": means[int(0.05 * len(means))],
        "share_of_bound_min": means[0],
        "uncovered_s": sum(outcome.uncovered_s for outcome in outcomes) / len(outcomes),
        "gap_longest_s": max(repairs, default=0.0),
        "moves_per_server_hour": sum(outcome.moves for outcome in outcomes) / hours / plan.servers,
        "blocks_loaded_per_hour": sum(outcome.loaded for outcome in outcomes) / hours,
        "decision_ms": statistics.fmean(decisions),
        "decision_ms_p99": decisions[int(0.99 * len(decisions))],
        "decision_ms_max": decisions[-1],
    }
