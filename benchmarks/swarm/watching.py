"""Servers that watch each other: a crashed server is left out before its record ends."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.swarm.models import PARTED_SECONDS
from benchmarks.swarm.world import Server, World
from node.serving.balancer import AGAIN_SECONDS, ANSWER_SECONDS, WATCH_SECONDS
from routing.names import PeerId
from routing.placement.cover_gaps import taken_for_lost, watched


class Watch:
    """Each server pings its watched servers every WATCH_SECONDS, at its own moments, if a server is silent.

    notice: called with a server whose view has changed.
    """

    def __init__(self, world: World, notice: Callable[[Server], None]) -> None:
        self._world, self._notice = world, notice
        self._parted_until = 0.0

    def start(self, server: Server) -> None:
        """Without a silent server every answer comes, so nothing is simulated until then."""
        if not server.watching and self._is_any_silent():
            server.watching = True
            self._world.events.add(
                self._world.now + self._world.chance.uniform(0, WATCH_SECONDS),
                lambda: self._ask_around(server),
            )

    def _is_any_silent(self) -> bool:
        return bool(self._world.silent) or self._world.now < self._parted_until

    def _ask_around(self, server: Server) -> None:
        """Ping as a node does; an answer comes at once, a silence takes ANSWER_SECONDS."""
        server.watching = server.alive and (self._is_any_silent() or bool(server.lost))
        if not server.watching or server.target is None:
            server.watching = False
            return
        asked = watched(self._world.view(server).held, self._world.plan.model.blocks, server.peer)
        silent = [peer for peer in asked if not self.answers(server, peer)]
        lost = taken_for_lost(asked, silent) | {p for p in server.lost if not self.answers(server, p)}
        seconds = ANSWER_SECONDS + AGAIN_SECONDS + ANSWER_SECONDS if silent else 0.0
        self._world.events.add(self._world.now + seconds, lambda: self._believe_lost(server, lost))
        pause = WATCH_SECONDS * self._world.chance.uniform(0.5, 1.0)
        self._world.events.add(self._world.now + seconds + pause, lambda: self._ask_around(server))

    def _believe_lost(self, server: Server, lost: frozenset[PeerId]) -> None:
        if server.alive and lost != server.lost:
            server.lost = lost
            self._notice(server)

    def answers(self, server: Server, peer: PeerId) -> bool:
        """Whether a server gets an answer of a peer."""
        return peer in self._world.servers and not self._world.news.parted(self._world.now, server.peer, peer)

    def part(self, peers: frozenset[str]) -> None:
        """Cut these peers off from the others for ten minutes."""
        self._world.news.cut(self._world.now, peers)
        self._parted_until = self._world.now + PARTED_SECONDS
        self.start_all()

    def start_all(self) -> None:
        """A server has fallen silent: all servers watch."""
        if self._world.rule.covers:
            for server in self._world.servers.values():
                self.start(server)
