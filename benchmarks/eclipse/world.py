"""One swarm in memory, on a clock that jumps: honest servers, attackers, and newcomers that look for servers.

The directory is the real one: neighbours, views, the Kademlia table and its lookups.  The network, the
machines and the clock are made up.  Every machine has a public address, so that shares by network count as on
the internet.  Places for connections are not limited here: `python -m tests.hostile` attacks those.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal
from unittest import mock

import trio
from trio.testing import MockClock

from benchmarks.eclipse.attackers import Attack, near_to
from benchmarks.eclipse.machines import SERVER, Case, Host, Scene, identity_named, numbered_address
from node.network.directory.directory import Directory, DirectoryConfig, open_directory
from node.network.directory.discovery import FIND_SECONDS, LOOKUP_SHARE, MOST_MET
from node.network.directory.intake import _claimed_peer
from node.network.directory.kademlia import messages
from node.network.directory.kademlia.contact import Contact
from node.network.directory.kademlia.kademlia import Knowledge, open_kademlia, provider_key
from routing.names import PeerId
from routing.view.records import Record, Role, verify_record

Kind = Literal["one", "most", "late"]
KINDS: Sequence[Kind] = ("one", "most", "late")

WAYS_IN = 3  # honest servers that the honest ones join through
BOOTSTRAP = 8  # addresses of a newcomer of the kinds `most` and `late`
SETTLE_SECONDS = 10.0
ATTACK_SECONDS = 20.0  # before newcomers come
LATE_SECONDS = 20.0  # for which the honest bootstrap peer of `late` cannot be reached
WATCHED_SECONDS = 120.0  # from the newcomers' coming: records live for 90 s, so a loss shows
LOOK_SECONDS = 0.5


@dataclass(slots=True)
class Newcomer:
    """What one newcomer found.

    found_s: seconds until its view had every honest server, from its start; infinity for never.
    lost: whether it then lost one again.  seen_s: until every honest server had its record; None for a
    client, and for a server that not all of them saw.
    """

    kind: Kind
    serves: bool
    found_s: float = math.inf
    lost: bool = False
    seen_s: float | None = None


@dataclass(slots=True)
class Lookup:
    """One walk of a newcomer through the table alone: whether an honest server is among those that it would
    ask, and the seconds that this took."""

    kind: Kind
    found: bool
    seconds: float


@dataclass(slots=True)
class Outcome:
    """One seed of a case.  losers: honest servers whose view lost an honest server meanwhile."""

    newcomers: list[Newcomer] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    losers: int = 0
    honest: int = 0


class World:
    """A swarm under one attack."""

    def __init__(self, case: Case, seed: int, nursery: trio.Nursery) -> None:
        self.scene = Scene(case, seed, nursery)
        self.nodes: list[Directory] = []  # the honest servers
        self.attackers: Sequence[Host] = ()
        self._hosts = 0

    async def run(self) -> Outcome:
        """The honest servers, the attack, the newcomers; what these found."""
        scene, begin = self.scene, trio.Event()
        for number in range(scene.case.honest):
            ways_in = [each.multiaddr for each in scene.honest[:WAYS_IN]]
            host = self._host(5, f"honest {number}")
            scene.honest.append(host)
            self.nodes.append(await self._join(host, ways_in, serves=True, after=begin))
        begin.set()
        await trio.sleep(SETTLE_SECONDS)
        assert not self._losers(), "honest servers do not know each other before the attack"
        newcomers = [self._host(6, f"newcomer {number}") for number in range(2 * len(KINDS))]
        if scene.case.means is not None:
            key = provider_key("public", scene.revision)
            attack = Attack(scene, near_to([each.identity for each in newcomers], key))
            attack.start()
            self.attackers = attack.hosts
            await trio.sleep(ATTACK_SECONDS)
        outcome = Outcome(honest=len(self.nodes))
        async with trio.open_nursery() as nursery:
            for number, host in enumerate(newcomers):
                newcomer = Newcomer(KINDS[number % len(KINDS)], serves=number >= len(KINDS))
                outcome.newcomers.append(newcomer)
                nursery.start_soon(self._newcomer, newcomer, host)
            for kind in KINDS[:2]:
                nursery.start_soon(self._look_up, kind, outcome)
            nursery.start_soon(self._watch, outcome)
        return outcome

    def _host(self, first: int, name: str) -> Host:
        """A machine in a network of its own."""
        self._hosts += 1
        address = numbered_address(first, self._hosts)
        return Host(self.scene, identity_named(f"{name} of {self.scene.seed}"), address)

    async def _join(
        self, host: Host, bootstrap: Sequence[str], *, serves: bool, after: trio.Event | None = None
    ) -> Directory:
        """A node that takes part until the end.

        after: when it announces itself.  Honest servers do so all at once: fewer frames carry their records.
        """
        nursery, ways_in = self.scene.nursery, tuple(bootstrap)
        started: Directory = await nursery.start(self._take_part, host, ways_in, serves, after)
        return started

    async def _take_part(
        self,
        host: Host,
        bootstrap: tuple[str, ...],
        serves: bool,
        after: trio.Event | None,
        task_status: trio.TaskStatus[Directory] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        role: Role = "serve" if serves else "client"
        config = DirectoryConfig("public", bootstrap, role, self.scene.limits, required=False, watch=False)
        rng = random.Random(self.scene.rng.random())
        async with open_directory(host, host.identity, config, rng=rng, wall_clock=lambda: 1e9) as directory:
            if serves and after is None:
                await directory.announce(replace(SERVER, revision=self.scene.revision))
            task_status.started(directory)
            if serves and after is not None:
                await after.wait()
                await directory.announce(replace(SERVER, revision=self.scene.revision))
            await trio.sleep_forever()

    def _losers(self) -> set[PeerId]:
        """The honest servers that do not know all the others now."""
        return {node.peer_id for node in self.nodes if not self._knows_all(node)}

    def _knows_all(self, node: Directory) -> bool:
        """Whether a node's view has every honest server."""
        view = node.view()
        return all(host.peer_id in view.entries for host in self.scene.honest)

    # --- what is measured ---

    def _bootstrap_of(self, kind: Kind) -> tuple[Host, list[Host]]:
        """An honest server, and all bootstrap peers of a newcomer in any order."""
        honest, rng = self.scene.rng.choice(self.scene.honest), self.scene.rng
        others = [] if kind == "one" else rng.sample(self.attackers, min(BOOTSTRAP - 1, len(self.attackers)))
        found = [honest, *others]
        return honest, rng.sample(found, len(found))

    async def _newcomer(self, newcomer: Newcomer, host: Host) -> None:
        honest, bootstrap = self._bootstrap_of(newcomer.kind)
        began = trio.current_time()
        if newcomer.kind == "late":
            self.scene.nursery.start_soon(self._cut_off, host.peer_id, honest.peer_id)
        node = await self._join(host, [each.multiaddr for each in bootstrap], serves=newcomer.serves)
        while (now := trio.current_time()) < began + WATCHED_SECONDS:
            if not self._knows_all(node):
                newcomer.lost = newcomer.found_s < math.inf
            elif newcomer.found_s == math.inf:
                newcomer.found_s = now - began
            if newcomer.lost:
                return
            if newcomer.serves and newcomer.seen_s is None and self._is_seen(node.peer_id):
                newcomer.seen_s = now - began
            await trio.sleep(LOOK_SECONDS)

    def _is_seen(self, peer: PeerId) -> bool:
        return all(peer in node.view().entries for node in self.nodes)

    async def _cut_off(self, one: PeerId, other: PeerId) -> None:
        pair = frozenset((one, other))
        self.scene.network.cut.add(pair)
        await trio.sleep(LATE_SECONDS)
        self.scene.network.cut.discard(pair)

    async def _look_up(self, kind: Kind, outcome: Outcome) -> None:
        _, bootstrap = self._bootstrap_of(kind)
        knowledge = Knowledge("public", {each.peer_id: each.addresses for each in bootstrap})
        began, true = trio.current_time(), {host.peer_id for host in self.scene.honest}
        rng, host = random.Random(self.scene.rng.random()), self._host(7, f"asker {kind}")
        async with open_kademlia(host, knowledge, self.scene.limits, rng, serves=False) as table:
            named = await table.find(self.scene.revision, FIND_SECONDS * LOOKUP_SHARE)
        found = not true.isdisjoint(list(named)[:MOST_MET])
        outcome.lookups.append(Lookup(kind, found, trio.current_time() - began))

    async def _watch(self, outcome: Outcome) -> None:
        losers, end = set[PeerId](), trio.current_time() + WATCHED_SECONDS
        while trio.current_time() < end:
            losers |= self._losers()
            await trio.sleep(LOOK_SECONDS)
        outcome.losers = len(losers)


def simulate(case: Case, seed: int) -> Outcome:
    """One seed of a case."""

    async def main() -> Outcome:
        async with trio.open_nursery() as nursery:
            outcome = await World(case, seed, nursery).run()
            nursery.cancel_scope.cancel()
        return outcome

    with cheaper():
        return trio.run(main, clock=MockClock(autojump_threshold=0))


@contextmanager
def cheaper() -> Iterator[None]:
    """Leave out what takes most of the time and decides nothing here.

    All nodes are in this process: what one of them has verified or read, the others take from a cache.
    Servers measure their distances once, and write themselves into the table once in two minutes.
    """
    verify: Callable[..., Record] = lru_cache(maxsize=65_536)(verify_record)
    read: Callable[[bytes], Contact | None] = lru_cache(maxsize=65_536)(messages._read_contact)
    with (
        mock.patch("node.network.directory.intake.verify_record", verify),
        mock.patch("node.network.directory.intake._claimed_peer", lru_cache(maxsize=65_536)(_claimed_peer)),
        mock.patch("node.network.directory.kademlia.messages._read_contact", read),
        mock.patch("node.network.directory.announcer.ADJACENT_PAUSE_SECONDS", 1e6),
        mock.patch("node.network.directory.discovery.DISCOVER_SECONDS", 120.0),
    ):
        yield
