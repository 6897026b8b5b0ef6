"""The common state of a simulation: the servers, their announcements, the clock, the random source."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from benchmarks.swarm.events import Events
from benchmarks.swarm.models import VIEW_SECONDS, Plan
from benchmarks.swarm.rules import Rule, Window
from benchmarks.swarm.views import News, Snapshot
from routing.names import PeerId
from routing.placement.throughput import Holder
from routing.view.records import Record, State


@dataclass(slots=True)
class Server:
    """One server.  serving: the blocks that it computes now, or None; target: its announced blocks."""

    peer: PeerId
    count: int
    rate: float
    claim: float
    heard_at: float  # of its last new records; more come every VIEW_SECONDS from then
    serving: Window | None = None
    target: Window | None = None
    state: State = "offline"
    alive: bool = True
    version: int = 0  # of its action: an event of an older version is void
    hole_since: float | None = None
    knew: Snapshot | None = None  # time of its last look
    lost: frozenset[PeerId] = frozenset()  # peers that did not answer
    watching: bool = False
    seen: list[Holder] = field(default_factory=list)  # time of its announced move


class World:
    """The running servers, by peer, and their announcements.

    silent: crashed, and still announced.  observing: figures are taken.  changed: a server began or ended to
    serve blocks since the last look.  last_load: seconds, of the server that came online last.
    """

    def __init__(self, plan: Plan, rule: Rule) -> None:
        self.plan, self.rule = plan, rule
        self.chance = random.Random(f"chance {plan.seed}")
        self.events: Events[Callable[[], None]] = Events()
        self.news = News()
        self.servers: dict[PeerId, Server] = {}
        self.silent: set[PeerId] = set()
        self.observing = False
        self.changed = False
        self.last_load = 0.0

    @property
    def now(self) -> float:
        """Seconds of simulated time."""
        return self.events.now

    def later(self, server: Server, seconds: float, do: Callable[[Server], None]) -> None:
        """Plan an action of a server, unless it crashes or begins another action before."""
        version = server.version

        def unless_void() -> None:
            if server.alive and server.version == version:
                do(server)

        self.events.add(self.now + seconds, unless_void)

    def announce(self, server: Server) -> None:
        """Announce the blocks of a server, or the end of its record."""
        record = None
        if server.target is not None and server.alive:
            start, stop = server.target
            record = Record(
                peer=server.peer, role="serve", blocks=self.plan.model.blocks, start=start, stop=stop,
                state=server.state, seconds_per_block=1 / server.claim,
            )  # fmt: skip
        self.news.announce(self.now, server.peer, record)

    def view(self, server: Server) -> Snapshot:
        """A server's view of the swarm now."""
        age = 0.0 if self.rule.fresh else (self.now - server.heard_at) % VIEW_SECONDS
        return self.news.seen(self.now, age, server.peer).without(server.lost)

    def serving(self) -> list[tuple[Holder, float]]:
        """The true holders of blocks now, and their claimed rates."""
        serving = ((s, s.serving) for s in self.servers.values())
        return [(Holder(s.peer, *window, s.rate), s.claim) for s, window in serving if window]

    def count(self) -> list[int]:
        """The true number of servers of each block."""
        change = [0] * (self.plan.model.blocks + 1)
        for server in self.servers.values():
            if server.serving:
                change[server.serving[0]] += 1
                change[server.serving[1]] -= 1
        return list(accumulate(change[:-1]))

    def open_blocks(self) -> list[int]:
        """The blocks that truly have no server."""
        return [block for block, count in enumerate(self.count()) if not count]

    def unannounced(self, blocks: list[int]) -> set[int]:
        """The blocks among these that no online server announces."""
        held = [holder for holder in self.news.fresh().held if holder.online] if blocks else []
        return {b for b in blocks if not any(h.start <= b < h.stop for h in held)}
