"""Clients of a simulated swarm: each chooses its own chains, step by step.

A part of `benchmarks swarm`.

The servers keep their blocks of the placement.  Sessions begin at random times, and their number asks for a
given share of the capacity.  A session makes one token after the other along its chain.  A server computes
one step at a time in the order of arrival, and every hop costs half a round trip.  Real servers compute
waiting steps in one batch.  Simulated servers do not, so their waits are longer.  Prompts are not
simulated, replays are.

Three kinds of clients, with equal sessions:

* ours: records up to 30 s old, each client's own measurements, and the hops' queues at
  the opening of a session (the parts of `client.chains.chain_choice`; in-session moves look for whole
  chains only).
* petals: the shortest chain by announced speeds, 18 ms for each hop, and 10 s for a cache with too little
  space; queues are not known (arXiv:2312.08361 and the routing of its client).
* all-seeing: everybody's queue at this moment, true speeds and distances.  `latency_ratio_p95` compares
  with it.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

from benchmarks.swarm.events import Events
from benchmarks.swarm.models import CLIENT_LINE_MS, SERVER_LINE_MS, Place, somewhere
from client.chains.queue_reports import SURPRISE
from client.session.repair.lost_time import REPLAYED_SHARE, LostTime
from client.session.repair.relocation import (
    BETTER,
    COOLDOWN_SECONDS,
    MIN_GAIN_SECONDS,
    SEEN_STEPS,
    STEPS_AHEAD,
)
from client.session.route import CHOICES
from node.serving.executor.waits import Waits
from routing.chains.distances import Distances
from routing.chains.load_sharing import client_bias, queue_markup, queue_price
from routing.chains.measured import Measured
from routing.chains.search import Chain, CostInputs, cheapest_chain
from routing.names import PeerId
from routing.placement.throughput import Holder, capacity
from routing.view.records import MAX_RTTS, Record

RECORD_CHECK_SECONDS = 5.0  # between a server's checks of its own record
LOOK_SECONDS = 0.5  # the shortest time between two searches of a client: their own time is not simulated
SIGMA = 0.7  # of the logarithms of the sessions' lengths
MIN_TOKENS = 4
PETALS_HOP_SECONDS = 0.018
PETALS_CACHE_TOKENS = 16_384
PETALS_SHORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A server: its blocks, its block-tokens per second, and the rate that it claims."""

    peer: PeerId
    start: int
    stop: int
    rate: float
    claim: float


@dataclass(frozen=True, slots=True)
class Demand:
    """The load of the clients.

    tokens_per_s: by all sessions that begin.  tokens: of a session, mean of a log-normal distribution.
    warm_up, seconds: not measured, and measured.  view_seconds: the largest age of a view.
    """

    tokens_per_s: float
    seed: int
    clients: int = 1000
    tokens: float = 200.0
    warm_up: float = 600.0
    seconds: float = 600.0
    view_seconds: float = 30.0


@dataclass(slots=True)
class Served:
    """The results.  latencies: seconds a token, of each session that began and ended in the measured time.

    expected: seconds of a step along a chain at its choice, by the true waits, over those of this client's
    quickest chain at that time.
    """

    asked: int = 0
    made: int = 0
    latencies: list[float] = field(default_factory=list)
    hops: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    moves: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """A client's session: its chain as numbers of servers, seconds of computing at each, and the ways.

    waited: seconds at each hop in the step under way.  seen: seconds a block of a hop's last steps.
    """

    client: int
    tokens: int
    left: int
    began: float
    stepped: float = 0.0
    chain: Chain = field(default_factory=lambda: Chain((), 0.0))
    at: list[int] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    ways: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    lost: LostTime = field(default_factory=LostTime)
    seen: dict[PeerId, deque[float]] = field(default_factory=dict)
    look_at: float = 0.0  # the earliest time of another search


class Chooser(Protocol):
    """The choices of one kind of clients."""

    def open(self, client: int, tokens: int, now: float) -> Chain:
        """The chain of a new session of `tokens` tokens."""

    def learn(self, session: Session, now: float) -> None:
        """A token has come."""

    def instead(self, session: Session, now: float) -> Chain | None:
        """Another chain for the rest of a session, or None."""


class World:
    """The servers, the clients' places, and the clock of all."""

    def __init__(self, machines: Sequence[Machine], blocks: int, demand: Demand) -> None:
        self.machines = sorted(machines, key=lambda machine: machine.peer)
        self.blocks, self.demand = blocks, demand
        self.number = {machine.peer: index for index, machine in enumerate(self.machines)}
        rng = random.Random(f"places {demand.seed}")
        self.places = [somewhere(rng, SERVER_LINE_MS) for _ in self.machines]
        self.clients = [somewhere(rng, CLIENT_LINE_MS) for _ in range(demand.clients)]
        self.free_at = [0.0] * len(self.machines)
        self.waits = [Waits() for _ in self.machines]
        self.cache_left = [PETALS_CACHE_TOKENS] * len(self.machines)
        self.records = [self._record(index, rng) for index in range(len(self.machines))]
        self.said: list[tuple[Record, ...]] = [
            tuple(self.records)
        ]  # every RECORD_CHECK_SECONDS, the newest last
        self.caches: list[tuple[int, ...]] = [tuple(self.cache_left)]
        self._distances: dict[tuple[int, float], Distances] = {}

    def _record(self, index: int, rng: random.Random) -> Record:
        """A server's announcement, with its distances to some servers that may be next to it."""
        me = self.machines[index]
        near = [
            other
            for other, machine in enumerate(self.machines)
            if other != index
            and (machine.start <= me.stop < machine.stop or machine.start < me.start <= machine.stop)
        ]
        known = rng.sample(near, min(MAX_RTTS, len(near)))
        rtt = {self.machines[other].peer: self.places[index].rtt(self.places[other]) for other in known}
        return Record(
            peer=me.peer, role="serve", blocks=self.blocks, start=me.start, stop=me.stop,
            seconds_per_block=1 / me.claim, rtt=rtt,
        )  # fmt: skip

    def announce(self, now: float) -> None:
        """All servers look at their records."""
        self.records = [
            replace(record, queue=queue) if (queue := self.queue(index, now)) != record.queue else record
            for index, record in enumerate(self.records)
        ]
        self.said = [*self.said[-9:], tuple(self.records)]
        self.caches = [*self.caches[-9:], tuple(self.cache_left)]

    def queue(self, index: int, now: float) -> float:
        """The queue that a server would report now."""
        return round(self.waits[index].queue(now), 2)

    def seen(self, rng: random.Random) -> int:
        """The index of the announcements that a client sees: -1 is the newest."""
        age = int(rng.uniform(0, self.demand.view_seconds) / RECORD_CHECK_SECONDS)
        return -min(len(self.said), 1 + age)

    def distances(self, client: int, hop_seconds: float = 0.0) -> Distances:
        """The servers' announced distances; from the client to all servers, as after a ping of each.

        One for all clients of a region: their own lines add equally to every chain.  hop_seconds: added for
        each way between two servers.
        """
        region = self.clients[client].region
        if (region, hop_seconds) not in self._distances:
            here = Place(region, self.clients[client].line)
            extra = 2 * hop_seconds
            far = {m.peer: here.rtt(place) for m, place in zip(self.machines, self.places, strict=True)}
            told = [
                replace(record, rtt={peer: rtt + extra for peer, rtt in record.rtt.items()})
                for record in self.records
            ]
            self._distances[region, hop_seconds] = Distances()
            self._distances[region, hop_seconds].update(told, far)
        return self._distances[region, hop_seconds]

    def take(self, session: Session, chain: Chain) -> None:
        """Give the session this chain."""
        session.chain = chain
        session.at = [self.number[hop.peer] for hop in chain.hops]
        session.work = [
            (hop.stop - hop.start) / self.machines[at].rate
            for hop, at in zip(chain.hops, session.at, strict=True)
        ]
        session.ways = self.ways(session.client, session.at)
        session.waited = [0.0] * len(session.at)

    def ways(self, client: int, at: Sequence[int]) -> list[float]:
        """Seconds to each hop from the one before it, and back to the client."""
        stops = [self.clients[client], *(self.places[index] for index in at), self.clients[client]]
        return [one.rtt(other) / 2 for one, other in pairwise(stops)]

    def true_seconds(self, client: int, chain: Chain, now: float) -> float:
        """The seconds of a step along this chain, by these waits."""
        at = [self.number[hop.peer] for hop in chain.hops]
        computing = sum(
            (hop.stop - hop.start) / self.machines[index].rate * (1 + self.queue(index, now))
            for hop, index in zip(chain.hops, at, strict=True)
        )
        return computing + sum(self.ways(client, at))


class AllSeeing:
    """True speeds and distances, and the queues of this moment.

    dear: counts a queue with more than its own wait, as our clients do (`routing.chains.load_sharing`): so
    all wait less.
    """

    def __init__(self, world: World, *, dear: bool = True) -> None:
        self._world, self._queues_cost = world, dear
        self._true = {machine.peer: 1 / machine.rate for machine in world.machines}
        self._near: dict[int, Distances] = {}

    def open(self, client: int, tokens: int, now: float) -> Chain:
        """The best chain for all clients, or for this one."""
        world = self._world
        records = [replace(r, queue=world.queue(i, now)) for i, r in enumerate(world.records)]
        measured = {r.peer: self._true[r.peer] * (1 + r.queue) for r in records}
        known = CostInputs(distances=self._distances(client), measured=measured)
        markup = queue_markup(records) if self._queues_cost else None
        return cheapest_chain(records, world.blocks, known=known, cost_factors=markup)

    def _distances(self, client: int) -> Distances:
        """The distances between all pairs."""
        world, region = self._world, self._world.clients[client].region
        if region not in self._near:
            peers = list(zip(world.machines, world.places, strict=True))
            told = [
                Record(peer=one.peer, rtt={other.peer: here.rtt(there) for other, there in peers})
                for one, here in peers
            ]
            self._near[region] = Distances()
            self._near[region].update(told, {m.peer: world.clients[client].rtt(p) for m, p in peers})
        return self._near[region]

    def learn(self, session: Session, now: float) -> None:
        """Nothing: this client knows all."""

    def instead(self, session: Session, now: float) -> Chain | None:
        """None: a session keeps its first chain."""
        return None


class Ours:
    """The choices of `client.chains.chain_choice.ChainChooser` and `client.session.repair.relocation`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(f"ours {world.demand.seed}")
        self._measured = [Measured() for _ in world.clients]

    def open(self, client: int, tokens: int, now: float) -> Chain:
        """Choose by an old view, and again if the hops are busier."""
        world = self._world
        records = list(world.said[world.seen(self._rng)])
        chain = self._choose(client, records, now)
        for _ in range(CHOICES - 1):
            surprise = False
            for hop in chain.hops:
                index = world.number[hop.peer]
                queue = world.queue(index, now)
                surprise |= queue_price(queue) > SURPRISE * queue_price(records[index].queue)
                records[index] = replace(records[index], queue=queue)
            other = self._choose(client, records, now) if surprise else chain
            if other.hops == chain.hops:
                break
            chain = other
        return chain

    def _choose(
        self, client: int, records: Sequence[Record], now: float, seen: Mapping[PeerId, float] | None = None
    ) -> Chain:
        measured = {**self._measured[client].rates(records, now), **(seen or {})}
        shy = queue_markup(records)
        own = client_bias(str(client), shy)
        return cheapest_chain(
            records,
            self._world.blocks,
            known=CostInputs(distances=self._world.distances(client), measured=measured),
            cost_factors={peer: shy[peer] * own[peer] for peer in shy},
        )

    def learn(self, session: Session, now: float) -> None:
        """As `ChainChooser.observe_step`."""
        measured, records = self._measured[session.client], self._world.records
        for hop, index, work, waited in zip(
            session.chain.hops, session.at, session.work, session.waited, strict=True
        ):
            seconds = (work + waited) / (hop.stop - hop.start)
            measured.learn(hop.peer, seconds, records[index], now)
            session.seen.setdefault(hop.peer, deque(maxlen=SEEN_STEPS)).append(seconds)
        session.lost.took(now - session.stepped, session.chain.expected_seconds)

    def instead(self, session: Session, now: float) -> Chain | None:
        """As `Relocation.hops_to_leave`, for whole chains."""
        length = session.tokens - session.left
        if now < session.look_at or not session.lost.too_much(length, len(session.at)):
            return None
        session.look_at = now + LOOK_SECONDS
        world = self._world
        seen = {peer: statistics.median(seconds) for peer, seconds in session.seen.items()}
        chain = self._choose(session.client, world.said[world.seen(self._rng)], now, seen)
        present = sum(session.ways) + sum((h.stop - h.start) * seen[h.peer] for h in session.chain.hops)
        gain = present - chain.expected_seconds
        fresh = sum(hop.stop - hop.start for hop in chain.hops if hop not in session.chain.hops)
        replay = length * REPLAYED_SHARE * chain.expected_seconds * fresh / world.blocks
        if gain < max(MIN_GAIN_SECONDS, (1 - BETTER) * present) or gain * STEPS_AHEAD <= replay:
            return None
        session.lost.forget()
        session.look_at = now + COOLDOWN_SECONDS
        return chain


class Petals:
    """The published client: announced speeds, a price for each hop, and a view of the caches."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(f"petals {world.demand.seed}")

    def open(self, client: int, tokens: int, now: float) -> Chain:
        """The shortest chain of all, independent of other clients."""
        world = self._world
        caches = world.caches[world.seen(self._rng)]
        cost = {
            machine.peer: 1 / machine.claim
            + (PETALS_SHORT_SECONDS / (machine.stop - machine.start) if left < tokens else 0.0)
            for machine, left in zip(world.machines, caches, strict=True)
        }
        records = [replace(record, queue=0.0) for record in world.records]
        distances = world.distances(client, PETALS_HOP_SECONDS)
        return cheapest_chain(records, world.blocks, known=CostInputs(distances=distances, measured=cost))

    def learn(self, session: Session, now: float) -> None:
        """Nothing: this client does not measure."""

    def instead(self, session: Session, now: float) -> Chain | None:
        """None: only a failure makes it choose again."""
        return None


CHOOSERS: dict[str, Callable[[World], Chooser]] = {"ours": Ours, "petals": Petals, "all-seeing": AllSeeing}


def serve(machines: Sequence[Machine], blocks: int, demand: Demand, kind: str) -> Served:
    """All sessions of one run."""
    world = World(machines, blocks, demand)
    return _Run(world, CHOOSERS[kind](world)).run()


class _Run:
    """The events: a session begins; a step reaches its next hop; a token reaches its client."""

    def __init__(self, world: World, chooser: Chooser) -> None:
        self._world, self._chooser = world, chooser
        self._best = AllSeeing(world, dear=False)
        self._rng = random.Random(f"sessions {world.demand.seed}")
        self._served = Served()
        self._events: Events[tuple[Session | None, int]] = Events()

    def run(self) -> Served:
        """Simulate from an empty swarm on."""
        demand, world = self._world.demand, self._world
        until, announce_at = demand.warm_up + demand.seconds, RECORD_CHECK_SECONDS
        self._next_session(0.0)
        while (event := self._events.take(until)) is not None:
            (session, hop), now = event, self._events.now
            while announce_at <= now:
                world.announce(announce_at)
                announce_at += RECORD_CHECK_SECONDS
            if session is None:
                self._come(now)
            elif hop < len(session.at):
                self._compute(session, hop, now)
            else:
                self._token(session, now)
        return self._served

    def _push(self, when: float, session: Session | None, hop: int) -> None:
        self._events.add(when, (session, hop))

    def _next_session(self, now: float) -> None:
        demand = self._world.demand
        self._push(now + self._rng.expovariate(demand.tokens_per_s / demand.tokens), None, 0)

    def _come(self, now: float) -> None:
        demand, world = self._world.demand, self._world
        tokens = self._rng.lognormvariate(math.log(demand.tokens) - SIGMA**2 / 2, SIGMA)
        client, length = self._rng.randrange(demand.clients), max(MIN_TOKENS, round(tokens))
        looked_at = self._rng.random() < 0.2
        self._next_session(now)
        session = Session(client, length, length, now, stepped=now)
        world.take(session, self._chooser.open(client, length, now))
        self._hold(session, length)
        if now >= demand.warm_up:
            self._served.asked += length
            self._served.hops.append(len(session.at))
            if looked_at:
                best = self._best.open(client, length, now)
                ours, quickest = (world.true_seconds(client, c, now) for c in (session.chain, best))
                self._served.expected.append(ours / quickest)
        self._push(now + session.ways[0], session, 0)

    def _hold(self, session: Session, tokens: int) -> None:
        for index in session.at:
            self._world.cache_left[index] -= tokens

    def _compute(self, session: Session, hop: int, now: float) -> None:
        world, index, work = self._world, session.at[hop], session.work[hop]
        waited = max(0.0, world.free_at[index] - now)
        done = world.free_at[index] = now + waited + work
        world.waits[index].observe(waited, work, 1, now)
        session.waited[hop] = waited
        self._push(done + session.ways[hop + 1], session, hop + 1)

    def _token(self, session: Session, now: float) -> None:
        served, world = self._served, self._world
        measured = now >= world.demand.warm_up
        served.made += measured
        session.left -= 1
        self._chooser.learn(session, now)
        session.stepped = now
        if not session.left:
            self._hold(session, -session.tokens)
            if session.began >= world.demand.warm_up:
                served.latencies.append((now - session.began) / session.tokens)
            return
        replay = 0.0
        if (chain := self._chooser.instead(session, now)) is not None:
            served.moves += measured
            replay = self._move(session, chain, now)
            session.stepped = now + replay
        self._push(now + replay + session.ways[0], session, 0)

    def _move(self, session: Session, chain: Chain, now: float) -> float:
        """Go on along another chain; the seconds until its new hops have computed the replay."""
        world, positions = self._world, session.tokens - session.left
        before = set(session.chain.hops)
        self._hold(session, -session.tokens)
        world.take(session, chain)
        self._hold(session, session.tokens)
        ready = now
        for hop, index, work in zip(chain.hops, session.at, session.work, strict=True):
            if hop not in before:
                world.free_at[index] = max(world.free_at[index], now) + positions * REPLAYED_SHARE * work
                ready = max(ready, world.free_at[index])
        return ready - now


def machines_of(serving: Sequence[tuple[Holder, float]]) -> list[Machine]:
    """The servers, from the holders of blocks and their claimed rates."""
    return [Machine(h.peer, h.start, h.stop, h.rate, claim) for h, claim in serving]


def capacity_of(machines: Sequence[Machine], blocks: int) -> float:
    """The capacity of these servers together, in tokens per second."""
    return capacity([Holder(m.peer, m.start, m.stop, m.rate) for m in machines], blocks)


def share_at(values: Sequence[float], share: float) -> float:
    """The quantile `share` of these values; NaN without values."""
    return sorted(values)[int(share * (len(values) - 1))] if values else math.nan


def figures(ours: Served, best: Served, demand: Demand, capacity_tokens_per_s: float) -> dict[str, float]:
    """The figures of one run, compared with all-seeing clients on equal sessions."""
    return {
        "capacity_tokens_per_s": capacity_tokens_per_s,
        "asked_tokens_per_s": ours.asked / demand.seconds,
        "aggregate_tokens_per_s": ours.made / demand.seconds,
        "aggregate_of_asked": ours.made / ours.asked,
        "latency_p50_s": share_at(ours.latencies, 0.5),
        "latency_p95_s": share_at(ours.latencies, 0.95),
        "latency_ratio_p50": share_at(ours.latencies, 0.5) / share_at(best.latencies, 0.5),
        "latency_ratio_p95": share_at(ours.latencies, 0.95) / share_at(best.latencies, 0.95),
        "expected_ratio_p50": share_at(ours.expected, 0.5),
        "expected_ratio_p95": share_at(ours.expected, 0.95),
        "hops_per_chain": statistics.fmean(ours.hops),
        "session_moves": float(ours.moves),
    }


def measure(
    machines: Sequence[Machine], blocks: int, demand: Demand, kind: str, honest: Sequence[Machine] = ()
) -> dict[str, float]:
    """The figures of one seed.

    honest: if there are liars, the placement of these servers without liars; `aggregate_of_honest` compares
    with its tokens.
    """
    ours = serve(machines, blocks, demand, kind)
    best = serve(machines, blocks, demand, "all-seeing")
    found = figures(ours, best, demand, capacity_of(machines, blocks))
    if honest:
        found["aggregate_of_honest"] = ours.made / serve(honest, blocks, demand, kind).made
    return found


def summary(seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means over the seeds, and the worst of the figures with a promise."""
    found = {key: statistics.fmean(one[key] for one in seeds) for key in seeds[0]}
    found["aggregate_of_asked_min"] = min(one["aggregate_of_asked"] for one in seeds)
    found["latency_ratio_p95_max"] = max(one["latency_ratio_p95"] for one in seeds)
    if "aggregate_of_honest" in found:
        found["aggregate_of_honest_min"] = min(one["aggregate_of_honest"] for one in seeds)
    return found
