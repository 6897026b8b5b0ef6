"""Servers that join, look for a better place, move, and close gaps, as the nodes do."""

from __future__ import annotations

import time

from benchmarks.swarm.models import LIE, VIEW_SECONDS, Hardware
from benchmarks.swarm.outcome import Outcome
from benchmarks.swarm.rules import Window
from benchmarks.swarm.views import Snapshot
from benchmarks.swarm.watching import Watch
from benchmarks.swarm.world import Server, World
from node.serving.balancer import LOSS_SECONDS, RANK_SECONDS, SETTLE_SECONDS
from routing.blocks import Blocks
from routing.names import PeerId
from routing.placement.cover_gaps import PlannedMove, objection, opens_gap
from routing.placement.rebalance import Move
from routing.placement.throughput import Holder

NOISE_SECONDS = 60.0  # between two announcements of a new rate
PAUSE_SECONDS = 10.0  # the longest wait of a server between leaving its place and looking for another


class Placing:
    """The servers' actions by the rule: the shell around the decisions of `routing.placement`."""

    def __init__(self, world: World, outcome: Outcome) -> None:
        self._world, self._outcome = world, outcome
        self.watch = Watch(world, self._notice)

    def _wobble(self, server: Server) -> None:
        """Announce a new rate, as after a new measurement."""
        if not server.alive:
            return
        server.claim = server.rate * (
            1 + self._world.chance.uniform(-self._world.plan.noise, self._world.plan.noise)
        )
        self._world.announce(server)
        self._world.events.add(self._world.now + NOISE_SECONDS, lambda: self._wobble(server))

    def _ranked(self, snapshot: Snapshot) -> list[Move]:
        """The moves on which everyone with this view agrees."""

        def rank() -> list[Move]:
            began = time.perf_counter()
            found = self._world.rule.rank(snapshot.held, self._world.plan.model.blocks)
            self._outcome.rank_ms.append((time.perf_counter() - began) * 1000)
            return found

        return snapshot.once("ranked", rank)

    def _turns(self, snapshot: Snapshot) -> dict[PeerId, PlannedMove]:
        """The plan on which everyone with this view agrees."""

        def plan() -> dict[PeerId, PlannedMove]:
            began = time.perf_counter()
            found = self._world.rule.turns(snapshot.held, self._world.plan.model.blocks)
            self._outcome.turns_ms.append((time.perf_counter() - began) * 1000)
            return found

        return snapshot.once("turns", plan)

    def _timed(self, began: float) -> None:
        self._outcome.own_ms.append((time.perf_counter() - began) * 1000)

    def join(self, hardware: Hardware) -> None:
        """A new server comes, chooses blocks and loads them."""
        name, count, rate, lies = hardware
        claim = rate * LIE if lies else rate
        server = Server(PeerId(name), count, rate, claim, self._world.now)
        self._world.servers[server.peer] = server
        if self._world.plan.noise and not lies:
            self._world.events.add(
                self._world.now + self._world.chance.uniform(0, NOISE_SECONDS), lambda: self._wobble(server)
            )
        if self._world.rule.covers:
            server.heard_at -= self._world.chance.uniform(0, VIEW_SECONDS)
            self._world.events.add(server.heard_at + VIEW_SECONDS, lambda: self._hear(server))
            self._world.events.add(self._world.now, lambda: self.watch.start(server))
        self._take_place(server)

    def _take_place(self, server: Server) -> None:
        """Choose blocks as a server without blocks, and load them."""
        seen = [holder for holder in self._world.view(server).held if holder.peer != server.peer]
        began = time.perf_counter()
        server.target = self._world.rule.join(
            seen, self._world.plan.model.blocks, server.count, server.claim, self._world.chance
        )
        self._timed(began)
        server.state = "joining"
        self._world.announce(server)
        self._load(server)

    def _load(self, server: Server) -> None:
        """Load the missing blocks of the target; `serving` is loaded already."""
        assert server.target is not None
        there = server.serving[1] - server.serving[0] if server.serving else 0
        missing = server.target[1] - server.target[0] - there
        if self._world.observing:
            self._outcome.loaded += missing
        seconds = missing * self._world.plan.model.block_gb / self._world.plan.load_gb_per_s
        self._world.later(server, seconds, lambda server: self._come_online(server, seconds))

    def _come_online(self, server: Server, seconds: float) -> None:
        server.serving, server.state, self._world.changed = server.target, "online", True
        self._world.last_load = seconds
        self._world.announce(server)
        self._decide_later(server)
        self._look_for_gaps(server)

    def _decide_later(self, server: Server) -> None:
        self._world.later(server, self._world.chance.uniform(*self._world.rule.decide_seconds), self._decide)

    def _sees_itself(self, server: Server, held: list[Holder]) -> bool:
        """Else the view lacks the server's own last move; a node knows it, but with an old view of others."""
        mine = next((holder for holder in held if holder.peer == server.peer), None)
        return mine is not None and mine.online and (mine.start, mine.stop) == server.target

    def _decide(self, server: Server) -> None:
        """Look for a better place."""
        snapshot, blocks = self._world.view(server), self._world.plan.model.blocks
        window, seen = None, snapshot.held
        if self._sees_itself(server, seen):
            ranked, planned = self._ranked(snapshot), self._turns(snapshot)
            began = time.perf_counter()
            if server.peer not in planned:
                window = self._world.rule.move(seen, blocks, server.peer, ranked, self._world.chance)
            self._timed(began)
        if window is None or window == server.target:
            self._decide_later(server)
        elif self._world.rule.drops_first:
            self._leave(server)
        else:
            self._announce_move(server, window, seen)

    def _hear(self, server: Server) -> None:
        """New records of the others: it looks at this interval."""
        if server.alive:
            self._world.events.add(self._world.now + VIEW_SECONDS, lambda: self._hear(server))
            self._notice(server)

    def _notice(self, server: Server) -> None:
        """Look at the news: lost servers, and blocks without a holder."""
        view, knew = self._world.view(server), server.knew
        if view is knew:
            return
        server.knew = view
        if knew is not None and server.state == "online" and knew.online - view.peers:
            server.version += 1
            self._world.later(server, self._world.chance.uniform(0, LOSS_SECONDS), self._decide)
        self._look_for_gaps(server)

    def _look_for_gaps(self, server: Server) -> None:
        """Look for blocks without a holder, as a node does each second."""
        snapshot = self._world.view(server)
        held = snapshot.held
        turn = None
        if server.state == "online" and self._sees_itself(server, held):
            turn = self._turns(snapshot).get(server.peer)
        elif server.state == "online" and server.serving:
            mine = Holder(server.peer, *server.serving, server.claim)
            held = [mine, *(holder for holder in held if holder.peer != server.peer)]
            turn = self._world.rule.turns(held, self._world.plan.model.blocks).get(server.peer)
        if turn is None:
            server.hole_since = None
            return
        server.hole_since = self._world.now if server.hole_since is None else server.hole_since
        wait = server.hole_since + RANK_SECONDS * turn.rank - self._world.now
        if turn.ready and wait <= 0:
            self._announce_move(server, turn.blocks, held)
        elif turn.ready:
            self._world.later(server, wait, self._look_for_gaps)

    def _leave(self, server: Server) -> None:
        self._count_move(server, None)
        server.version += 1
        server.serving, server.target, server.state = None, None, "offline"
        self._world.announce(server)
        self._world.later(server, self._world.chance.uniform(0, PAUSE_SECONDS), self._take_place)

    def _announce_move(self, server: Server, window: Window, seen: list[Holder]) -> None:
        server.version += 1
        server.target, server.state, server.seen, server.hole_since = window, "joining", seen, None
        self._world.announce(server)
        self._world.later(server, SETTLE_SECONDS, self._make_move)

    def _make_move(self, server: Server) -> None:
        """All servers may know of the move by now: go, unless a check forbids it."""
        own, window = server.serving, server.target
        assert own is not None
        assert window is not None
        held = self._world.view(server).held
        why_not = objection(server.seen, held, server.peer, Blocks(*own), Blocks(*window))
        answering = [holder for holder in held if self.watch.answers(server, holder.peer)]
        if why_not or opens_gap(answering, server.peer, Blocks(*own), Blocks(*window)):
            server.target, server.state = own, "online"
            self._world.announce(server)
            self._decide_later(server)
            self._look_for_gaps(server)
            return
        start, stop = max(own[0], window[0]), min(own[1], window[1])
        kept = (start, stop) if start < stop else None
        self._count_move(server, kept)
        server.serving = kept
        self._load(server)

    def _count_move(self, server: Server, kept: Window | None) -> None:
        self._world.changed = True
        if not self._world.observing:
            return
        self._outcome.moves += 1
        before, now = self._world.open_blocks(), server.serving
        server.serving = kept
        self._outcome.gaps_opened += len(self._world.open_blocks()) > len(before)
        server.serving = now
