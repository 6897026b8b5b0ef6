"""The spread of records: each participant has a real `LiveView`, filled by real merges, late and incomplete.

Signing and the wire are left out.  A participant's record reaches each other one after a delay of its
own; where the way is silent it is tried again a few seconds later, and its age is then known.  Clients ping
the servers that they know every few seconds, as real ones do, and their views mark those that are silent.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import trio

from node.network.directory.live_view import LiveView
from node.network.directory.pings import PING_SECONDS, WATCH_SECONDS
from routing.names import PeerId
from routing.view.answers import GRACE_SECONDS, Answers
from routing.view.records import Record
from routing.view.view import Arrival, SwarmView
from tests.sim.network import Network

TICK_SECONDS = 0.25
AGAIN_SECONDS = 5.0  # between tries to get a record through
DELAYS = (0.02, 0.02, 0.3, 2.0)  # seconds, one drawn for each record and receiver


@dataclass(slots=True)
class Directory:
    """The view of one participant, with those methods of the real Directory that are used.

    overtaken: called with the highest seq of our own records at others, where theirs is higher.
    first_seen: when each participant's first record came.
    """

    me: PeerId
    network: Network
    overtaken: Callable[[int], None] | None = None
    watches: bool = False
    due: list[tuple[float, int, float, Record]] = field(default_factory=list)  # heap: due, n, said, record
    answers: Answers = field(default_factory=Answers)
    first_seen: dict[PeerId, float] = field(default_factory=dict)
    live: LiveView = field(init=False)
    _pings_at: float = 0.0

    def __post_init__(self) -> None:
        self.live = LiveView("public", 10_000, {}, self.answers.silent if self.watches else None)

    def view(self) -> SwarmView:
        """The swarm as known now."""
        return self.live.view()

    @property
    def last_view(self) -> SwarmView:
        """The view of the last look."""
        return self.live.last

    async def changed(self, since: SwarmView) -> None:
        """Return when the view is another one."""
        await self.live.changed(since)

    def take_in(self, arrivals: list[Arrival]) -> None:
        """Merge the records that came."""
        for peer in self.live.merge(arrivals):
            self.first_seen.setdefault(peer, trio.current_time())

    def watch(self, rng: random.Random) -> None:
        """Ping the servers in the view, if the time has come; two failures in a row make one silent."""
        if not self.watches or (now := self.network.now()) < self._pings_at:
            return
        self._pings_at = now + WATCH_SECONDS * rng.uniform(0.8, 1.2)
        for record in self.live.view().records():
            self.answers.ask(record.peer, now)
            if (rtt := self._rtt(record.peer)) < PING_SECONDS:
                self.answers.answered(record.peer, rtt, now)
            else:
                self.answers.failed(record.peer, now)
            self.answers.done(record.peer)
        self.live.mark_silent()

    def rtts(self) -> dict[PeerId, float]:
        """Round trips measured within the last minute."""
        return self.answers.rtts(trio.current_time())

    def late(self) -> frozenset[PeerId]:
        """The peers without an answer at once: none, as questions here end with the wait for them."""
        return self.answers.late(trio.current_time())

    def unknown(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """The peers that were not asked lately."""
        return self.answers.unknown(peers, trio.current_time())

    async def measure(
        self,
        peers: Collection[PeerId],
        seconds: float = PING_SECONDS,
        enough: Callable[[Mapping[PeerId, float]], bool] | None = None,
    ) -> dict[PeerId, float]:
        """Round trips to these peers; with a silent peer it takes `seconds`, or the grace."""
        now = trio.current_time()
        asked = {peer: self._rtt(peer) for peer in peers if self.answers.is_due(peer, now)}
        there = {peer: rtt for peer, rtt in asked.items() if rtt < min(seconds, PING_SECONDS)}
        longest = max(there.values(), default=0.0)
        if len(there) < len(asked):
            will_do = enough is not None and enough({**self.rtts(), **there})
            longest = max(longest, GRACE_SECONDS if will_do else seconds)
        await trio.sleep(longest)
        for peer in asked:
            self.answers.ask(peer, now)
            if peer in there:
                self.answers.answered(peer, there[peer], now)
            else:
                self.answers.failed(peer, now)
            self.answers.done(peer)
        self.live.mark_silent()
        known = self.rtts()
        return {peer: known[peer] for peer in peers if peer in known}

    async def find_peers(self, revision: str, seconds: float) -> tuple[Record, ...]:
        """There is no table to look into."""
        await trio.sleep(0.05)
        return self.view().spans(revision)

    def _rtt(self, peer: PeerId) -> float:
        network, now = self.network, trio.current_time()
        there = network.participants[peer]
        if not there.alive or max(network.mute_until(self.me, peer), network.frozen_until(peer)) > now:
            return PING_SECONDS
        return network.way(self.me, peer).delay + network.way(peer, self.me).delay


class Gossip:
    """Carries records between all directories."""

    def __init__(self, network: Network, rng: random.Random) -> None:
        self.directories: dict[PeerId, Directory] = {}
        self._servers: dict[PeerId, None] = {}  # participants that have announced themselves
        self._network = network
        self._rng = rng
        self._numbers = itertools.count()

    def say(self, record: Record) -> None:
        """A participant announces itself."""
        now = trio.current_time()
        self._servers[record.peer] = None
        for peer, directory in self.directories.items():
            delay = 0.0 if peer == record.peer else self._rng.choice(DELAYS) * self._rng.random()
            heapq.heappush(directory.due, (now + delay, next(self._numbers), now, record))
        self._deliver(self.directories[record.peer])

    def meet(self, peer: PeerId) -> None:
        """A participant comes, or comes back; one server that can be reached sends its view."""
        now = trio.current_time()
        me = self.directories[peer]
        others = [each for each in self._servers if each != peer and self._network.passes(each, peer)]
        if not others:
            return
        view = self.directories[self._rng.choice(others)].view()
        own = view.entries.get(peer) or view.ended.get(peer)
        me.take_in(view.held([each for each in view.entries if each != peer], now))
        if own is not None and me.overtaken is not None:
            me.overtaken(own.record.seq)

    async def run(self) -> None:
        """Deliver the records that are due."""
        while True:
            await trio.sleep(TICK_SECONDS)
            now = self._network.now()
            for peer, directory in self.directories.items():
                if self._network.participants[peer].alive:
                    if directory.due and directory.due[0][0] <= now:
                        self._deliver(directory)
                    if directory.last_view.next_expiry <= now:
                        directory.view()
                    directory.watch(self._rng)
                    if self._rng.random() < TICK_SECONDS / AGAIN_SECONDS:
                        self._heal(peer)

    def _heal(self, peer: PeerId) -> None:
        if self._network.frozen_until(peer) <= trio.current_time():
            self.meet(peer)

    def _deliver(self, directory: Directory) -> None:
        now, arrivals = trio.current_time(), []
        while directory.due and directory.due[0][0] <= now:
            _, number, said, record = heapq.heappop(directory.due)
            if record.peer == directory.me or self._network.passes(record.peer, directory.me):
                arrivals.append(Arrival(record, b"", now - said))
            else:
                heapq.heappush(directory.due, (now + AGAIN_SECONDS, number, said, record))
        if arrivals:
            directory.take_in(arrivals)


def numbered(record: Record, last_seq: int, wall: float) -> Record:
    """The record with the next seq by a node's own clock, as a Directory numbers them."""
    return replace(record, seq=max(last_seq + 1, int(wall * 1e6)))
