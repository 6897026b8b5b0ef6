"""A swarm in simulated time: servers that join, move, crash and lie.  A part of `benchmarks swarm`.

Event by event, from one seed, with the constants and the decisions of the nodes:
`routing.placement.rebalance`, `routing.placement.cover_gaps`, `node.serving.balancer`.  Records are
flooded: every server knows the others' records of at most VIEW_SECONDS ago, at its own moments.
A server that moves by our rule announces the new span and serves the old one for SETTLE_SECONDS more.
It looks again and pings the servers that stay.  Only then it gives up the blocks that it does not keep.
During the load it serves the blocks of both spans.  A crashed server is seen until its record ends, except
by its watchers (`routing.placement.cover_gaps.watched`): each asks at its own moments, every WATCH_SECONDS,
and leaves the server out after two silences.

By Petals' rule a server stops at once, looks for a place a few seconds later, and loads; its view is never
old, and nobody is watched.
"""

from __future__ import annotations

import math
from functools import partial

from benchmarks.swarm.models import Plan, script
from benchmarks.swarm.outcome import GapAccount, Outcome
from benchmarks.swarm.placing import Placing
from benchmarks.swarm.rules import Rule
from benchmarks.swarm.world import Server, World
from routing.names import PeerId
from routing.placement.cover_gaps import plan_moves
from routing.placement.throughput import Holder, capacity

SHARE_SECONDS = 15.0  # between two looks at the share of the bound


class Simulation:
    """One run."""

    def __init__(self, plan: Plan, rule: Rule) -> None:
        self.plan = plan
        self.outcome = Outcome()
        self.world = World(plan, rule)
        self._placing = Placing(self.world, self.outcome)
        self._gaps = GapAccount(self.outcome)
        self._last_plan: tuple[tuple[Holder, ...], bool] = ((), False)

    def run(self) -> Outcome:
        """All join; ten minutes without events, or the time of the plan's churn; then the figures."""
        plan, fate, world = self.plan, script(self.plan), self.world
        for at, hardware in fate.joins:
            world.events.add(at, partial(self._placing.join, hardware))
        for crash in fate.crashes:
            for name, seen_for in crash.gone:
                world.events.add(crash.at, partial(self._crash, name, seen_for))
        if fate.cut_off:
            world.events.add(plan.began + plan.seconds / 2, partial(self._placing.watch.part, fate.cut_off))
        self._advance(plan.began)
        self.outcome.at_rest = self._share()
        self.outcome.held_once = world.count().count(1)
        world.observing = world.changed = True
        if plan.churn > 0 or plan.lost > 0 or plan.partition > 0 or plan.noise > 0:
            self._observe()
        else:
            self.outcome.shares.append(self.outcome.at_rest)
        self._advance(plan.began + plan.seconds)
        self.outcome.observed_s = plan.seconds
        return self.outcome

    def _advance(self, until: float) -> None:
        world = self.world
        while (do := world.events.take(until)) is not None:
            do()
            if world.observing and (world.changed or self._gaps.open):
                self._look_for_open_blocks()
        if world.observing:
            self._gaps.pause(until)

    def _look_for_open_blocks(self) -> None:
        world = self.world
        world.changed = False
        blocks = world.open_blocks()
        self._gaps.look(world.now, blocks, world.unannounced(blocks), world.last_load)
        self._gaps.hopeless(world.now, self._hopeless())

    def _hopeless(self) -> set[int]:
        """Open blocks that cannot be served now with any knowledge: too little memory, or no plan."""
        blocks, up = self.plan.model.blocks, self.world.servers.values()
        held = [Holder(s.peer, *s.target, s.claim, s.state == "online") for s in up if s.target]
        too_little = sum(server.count for server in up) < blocks
        if not self._gaps.open or not (too_little or not self._planned(tuple(held))):
            return set()
        return {block for block in self._gaps.open if not any(h.start <= block < h.stop for h in held)}

    def _planned(self, held: tuple[Holder, ...]) -> bool:
        """Whether any server could close a gap."""
        if self._last_plan[0] != held:
            self._last_plan = held, bool(plan_moves(held, self.plan.model.blocks))
        return self._last_plan[1]

    def _crash(self, name: str, seen_for: float) -> None:
        world = self.world
        server = world.servers.pop(PeerId(name))
        server.alive, server.serving, world.changed = False, None, True
        if server.target is not None:
            world.silent.add(server.peer)
            world.events.add(world.now + seen_for, partial(self._end, server))
            self._placing.watch.start_all()

    def _end(self, server: Server) -> None:
        """The record of a crashed server ends."""
        self.world.silent.discard(server.peer)
        self.world.announce(server)

    def _share(self) -> float:
        """The capacity of the blocks served now, by true rates, as a share of the bound of all servers."""
        blocks = self.plan.model.blocks
        serving = [holder for holder, _ in self.world.serving()]
        return capacity(serving, blocks) / (math.fsum(s.rate for s in self.world.servers.values()) / blocks)

    def _observe(self) -> None:
        self.outcome.shares.append(self._share())
        self.world.events.add(self.world.now + SHARE_SECONDS, self._observe)
