"""Pings peers for their presence and distance, in tasks of their own, a few at once.

A caller waits no longer than its own deadline.  The ping goes on without the caller, and
`routing.view.answers` keeps its result, silence too.  A client and `status` ping their important servers
periodically, so that a lost peer is known before its record ends.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import trio

from routing.chains.load_sharing import rendezvous
from routing.names import PeerId
from routing.view.answers import FAILURES, FRESH_SECONDS, GRACE_SECONDS, Answers, Liveness
from routing.view.description import worth_asking
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault

PING_SECONDS = 2.0  # for the answer to a ping, a connection included
OVERDUE_SECONDS = 1.0  # after which a peer without any answer counts as silent
RELAYED_SECONDS = (
    1.0  # more of both where only a relay leads to the peer: two connections, at twice the distance
)
ASKED_AT_ONCE = 16
DIALLED_AT_ONCE = 8  # of these; `Host` holds the same bound, and a place there is never waited for
WATCH_SECONDS = 3.0  # between two pings to one server: silent ones are known within 8 s
# The same while somebody monitors, and the least time for an answer of a peer with a connection and a known
# distance: a server that stands still is silent on a page within 5 s, 1.2 * 1.4 + FAILURES * 1.5.
MONITOR_SECONDS = 1.4
LINKED_SECONDS = 1.5
LINKED_TRIPS = 4  # round trips, where these take longer
USED_SECONDS = 600.0  # for which the hops of sessions are pinged afterwards: somebody reads the answer
LOOK_SECONDS = 1.0  # between looks for new servers
LOOK_SHARE = 0.01  # of the event loop, for the choice of the servers to monitor: 0.1 s of 10,000 peers
QUIET_SECONDS = 0.02
STEP_SECONDS = 0.1
MAX_WANTED = 64
WATCHED = 16  # servers that a client pings periodically, besides the servers that it wants to use
MAX_ON_ROUTES = 64  # peers of live sessions that a monitor pings, besides the 64 with the rarest blocks

log = logging.getLogger(__name__)


class PingHost(Protocol):
    """The part of `node.network.host.Host` that pings need."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, seconds: float) -> None:
        """Make sure that there is a connection.  Raises PeerFault."""

    async def ping(self, peer: PeerId, addresses: Sequence[str]) -> float:
        """A round trip to a peer, in seconds.  Raises PeerFault."""


class Asker:
    """The peers that this node has asked, and their answers.

    addresses: of a peer; empty where unknown.  changed: called when a peer has become silent or answers
    again.
    """

    def __init__(
        self,
        host: PingHost,
        nursery: trio.Nursery,
        *,
        addresses: Callable[[PeerId], tuple[str, ...]],
        changed: Callable[[], None],
        dial_seconds: float,
    ) -> None:
        self.answers = Answers()
        self._host = host
        self._nursery = nursery
        self._addresses = addresses
        self._changed = changed
        self._dial_seconds = dial_seconds
        self._turns = trio.CapacityLimiter(ASKED_AT_ONCE)
        self._dials = trio.CapacityLimiter(DIALLED_AT_ONCE)
        self._news = trio.Event()  # set by an answer, or by its failure
        self._connecting = 0
        self._quiet = trio.Event()
        self._wanted: dict[PeerId, float] = {}  # peers whose distance was asked for, and the time
        self._used: dict[PeerId, float] = {}  # hops of sessions, and the time of the last opening
        self._routes: Callable[[], Iterable[PeerId]] = tuple  # of a monitor
        self._monitored_until = -math.inf

    async def measure(
        self,
        peers: Collection[PeerId],
        seconds: float = PING_SECONDS,
        enough: Callable[[Mapping[PeerId, float]], bool] | None = None,
    ) -> dict[PeerId, float]:
        """The round trips to the answering peers among these, as far as known within `seconds`.

        Peers that were asked within the last minute are not asked again, whether they answered or not.
        enough: whether these round trips suffice; then the wait for the others is GRACE_SECONDS only.
        """
        now = trio.current_time()
        peers = [peer for peer in dict.fromkeys(peers) if peer != self._host.peer_id]
        self._want(peers, now)
        for peer in peers:
            if self.answers.is_due(peer, now):
                self.ask(peer)
        await trio.lowlevel.checkpoint()
        while True:
            now = trio.current_time()
            known = self.answers.rtts(now)
            found = {peer: known[peer] for peer in peers if peer in known}
            patience = GRACE_SECONDS if enough is not None and enough(found) else seconds
            left = self.answers.wait_for(peers, now, patience)
            if left <= 0:
                return found
            with trio.move_on_after(left):
                await self._news.wait()

    def ask(self, peer: PeerId) -> None:
        """Ask now, unless a ping is under way."""
        if self.answers.under_way(peer) is None:
            self.answers.ask(peer, trio.current_time())
            self._nursery.start_soon(self._ask, peer)

    def use(self, peer: PeerId) -> None:
        """This peer is a hop of a session: `watch` keeps its connection open for USED_SECONDS from now."""
        now = trio.current_time()
        self._used = _latest({**self._used, peer: now}, now - USED_SECONDS)

    def monitor(self, seconds: float, routes: Callable[[], Iterable[PeerId]]) -> None:
        """For so many seconds from now, `watch` also pings what its `monitored` says.

        routes: the peers of live sessions, at the time of each look.  A monitored peer whose connection ends
        is asked at the next look.
        """
        self._routes = routes
        self._monitored_until = max(self._monitored_until, trio.current_time() + seconds)

    @property
    def _monitors(self) -> bool:
        return trio.current_time() < self._monitored_until

    def liveness(self, peers: Iterable[PeerId]) -> dict[PeerId, Liveness]:
        """Whether each of these peers answers, by the pings so far."""
        return self.answers.liveness(peers, trio.current_time())

    async def watch(
        self,
        servers: Callable[[Collection[PeerId]], Collection[PeerId]],
        rng: random.Random,
        monitored: Callable[[Iterable[PeerId]], Collection[PeerId]] = tuple,
    ) -> None:
        """Ping these servers periodically until cancelled; new servers at once.

        servers: the important ones, given the peers that were asked for within the last minute.
        monitored: further ones, for as long as somebody monitors the swarm, given the peers of live sessions.
        """
        again = look_again = -math.inf
        more, linked = dict[PeerId, None](), set[PeerId]()
        while True:
            now = trio.current_time()
            self._want((), now)
            if not self._monitors:
                more = {}
            elif (now >= again and now >= look_again) or not more:
                more = dict.fromkeys(monitored(self._routes()))
                look_again = now + (trio.current_time() - now) / LOOK_SHARE
            self._used = _latest(self._used, now - USED_SECONDS)
            matter = {**more, **dict.fromkeys(servers(self._wanted.keys() | self._used.keys()))}
            self.answers.forget({*matter, *self._wanted}, now)
            lost = linked - self._host.connected()
            for peer in matter:
                if now >= again or peer in lost or self.answers.is_due(peer, now):
                    self.ask(peer)
            linked = self._host.connected() & more.keys()
            if now >= again:
                again = now + (MONITOR_SECONDS if self._monitors else WATCH_SECONDS) * rng.uniform(0.8, 1.2)
            await trio.sleep(min(LOOK_SECONDS, again - now))

    def _want(self, peers: Iterable[PeerId], now: float) -> None:
        self._wanted = _latest({**self._wanted, **dict.fromkeys(peers, now)}, now - FRESH_SECONDS)

    async def _ask(self, peer: PeerId) -> None:
        before = peer in self.answers.silent()
        try:
            linked = peer in self._host.connected()
            async with self._turns if linked else self._dials:
                now, seconds = trio.current_time(), PING_SECONDS
                known = self.answers.has_answered(peer, now)
                if known and linked and self._monitors:
                    trips = LINKED_TRIPS * self.answers.rtts(now).get(peer, PING_SECONDS)
                    seconds = min(PING_SECONDS, max(LINKED_SECONDS, trips))
                patience = 0.0 if linked or self._addresses(peer) else RELAYED_SECONDS
                for _ in range(FAILURES if known else 1):
                    if await self._try(peer, seconds, patience):
                        break
        finally:
            self.answers.done(peer)
            self._tell(before != (peer in self.answers.silent()))

    async def _try(self, peer: PeerId, seconds: float, patience: float) -> bool:
        """Ask once, for so long; whether a retry is unnecessary.  patience: further seconds."""
        from node.network.connection_table import NoPlaceLeft

        done = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._be_patient, peer, seconds, patience, nursery.cancel_scope)
            try:
                self.answers.answered(peer, await self._round_trip(peer), trio.current_time())
                done = True
            except NoPlaceLeft:
                self.answers.withdrawn(peer)
                done = True
            except PeerFault as fault:
                log.debug("no answer from %s: %s", peer, fault)
            nursery.cancel_scope.cancel()
        if not done:
            self.answers.failed(peer, trio.current_time())
        return done

    async def _be_patient(
        self, peer: PeerId, seconds: float, patience: float, question: trio.CancelScope
    ) -> None:
        """End a ping at its deadline.  Time in which this process is suspended does not count."""
        steps = round((seconds + patience) / STEP_SECONDS)
        for step in range(steps):
            if step == round((OVERDUE_SECONDS + patience) / STEP_SECONDS):
                self.answers.overdue(peer, trio.current_time())
                self._tell(True)
            await trio.sleep(STEP_SECONDS)
        question.cancel()

    async def _round_trip(self, peer: PeerId) -> float:
        addresses = self._addresses(peer)
        self._connecting += 1
        try:
            await self._host.connect(peer, addresses, seconds=self._dial_seconds)
        finally:
            self._connecting -= 1
            if not self._connecting:
                self._quiet.set()
                self._quiet = trio.Event()
        with trio.move_on_after(QUIET_SECONDS):  # a ping during a handshake measures the handshake
            while self._connecting:
                await self._quiet.wait()
        return await self._host.ping(peer, addresses)

    def _tell(self, changed: bool) -> None:
        self._news.set()
        self._news = trio.Event()
        if changed:
            self._changed()


def _latest(peers: Mapping[PeerId, float], after: float) -> dict[PeerId, float]:
    """The MAX_WANTED latest of these with a time after this one."""
    latest = sorted(peers.items(), key=lambda each: each[1])[-MAX_WANTED:]
    return {peer: when for peer, when in latest if when > after}


def worth_watching(
    peer_id: PeerId, view: Callable[[], SwarmView], wanted: Collection[PeerId]
) -> list[PeerId]:
    """The wanted servers and a few more: in a large swarm each client watches others (rendezvous hashing)."""
    now = view()
    servers = [record.peer for record in now.records() if record.role == "serve" and now.is_dialled(record)]
    more = WATCHED - sum(peer in wanted for peer in servers)
    others = [peer for peer in servers if peer not in wanted and peer != peer_id]
    return [peer for peer in servers if peer in wanted] + rendezvous(peer_id, others, max(0, more))


def worth_monitoring(
    peer_id: PeerId, view: Callable[[], SwarmView], routes: Iterable[PeerId]
) -> list[PeerId]:
    """The peers of live sessions, and the 64 peers with the rarest blocks: a page shows these as they are."""
    now = view()
    on_routes = [peer for peer in dict.fromkeys(routes) if now.get(peer) is not None and peer != peer_id]
    return list(dict.fromkeys([*on_routes[:MAX_ON_ROUTES], *worth_asking(now, peer_id)]))
