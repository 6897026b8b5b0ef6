"""A swarm of two, a home and a public bootstrap node: how soon each knows what it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import trio

from node.network.addresses import Address
from node.network.own_addresses import OwnAddresses
from node.network.reachability.candidates import Family
from node.network.reachability.listener import ReachListener
from node.network.reachability.own_reach import OwnReach
from node.network.reachability.routes import relay_candidates
from node.network.reachability.watch import ReachWatch
from node.network.relaying.keeping import Keeper
from node.network.relaying.own_reservations import Candidate
from node.network.streams import FramedStream
from node.network.transport.connection import Connection
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import Outcome
from tests.fakes import memory_framed_pair

LIMITS = Limits()
PORT = 31330
HOME, BOOT = PeerId("home"), PeerId("boot")
OUTSIDE = {HOME: "203.0.113.7", BOOT: "198.51.100.1"}
INSIDE = {HOME: "192.168.1.11", BOOT: "198.51.100.1"}
RELAYED_SECONDS = 5.0  # after the home is online


@dataclass
class Two:
    """Both nodes.  rtt: seconds between them.  The home is announced at its start, as a bootstrap node is."""

    nursery: trio.Nursery
    rtt: float
    online: set[PeerId] = field(default_factory=set)
    records: dict[PeerId, Record] = field(default_factory=dict)
    listeners: dict[PeerId, ReachListener] = field(default_factory=dict)

    def view(self) -> SwarmView:
        return SwarmView("public", entries={p: Entry(each, b"", 0.0) for p, each in self.records.items()})

    async def probe(self, peer: PeerId, address: Address) -> Outcome:
        if peer == HOME:
            await trio.sleep(LIMITS.reach_dial_seconds)
            return "timed out"
        await trio.sleep(3 * self.rtt)
        return "reached"

    def start(self, me: PeerId) -> ReachWatch:
        node = Node(self, me)
        self.listeners[me] = ReachListener(LIMITS, self.probe)
        watch = ReachWatch(node, self.view, node.addresses, node.announce, LIMITS, random.Random(1))
        watch.hooks.askers = lambda: self.listeners[me].askers
        self.online.add(me)
        self.nursery.start_soon(watch.run)
        return watch


@dataclass
class Node:
    """One of them, with the face of a host."""

    two: Two
    peer_id: PeerId

    @property
    def own(self) -> OwnAddresses:
        text = f"/ip4/{INSIDE[self.peer_id]}/tcp/{PORT}"
        listening = (Address("ip4", "0.0.0.0", PORT),)  # no socket is opened
        return OwnAddresses((text,), (INSIDE[self.peer_id],), True, False, (text,), listening)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        return self.two.records[peer].addresses if peer in self.two.records else ()

    def announce(self, reach: OwnReach) -> None:
        self.two.nursery.start_soon(self._announce, reach)

    async def _announce(self, reach: OwnReach) -> None:
        await trio.sleep(self.two.rtt / 2)
        self.two.records[self.peer_id] = Record(
            peer=self.peer_id, role="bootstrap" if self.peer_id == BOOT else "serve",
            addresses=reach.addresses, reach=reach.reach, relays=reach.relays, helps=reach.helps,
        )  # fmt: skip

    def connected(self, kind: Family) -> set[PeerId]:
        return self.two.online - {self.peer_id} if kind == "ip4" else set()

    def links(self) -> tuple[Sequence[int], Sequence[int]]:
        return ((), (1,)) if self.peer_id == HOME else ((1,), ())

    def met_from_own_port(self, peer: PeerId) -> bool:
        return False

    async def open_question(self, peer: PeerId, addresses: Sequence[str], kind: Family) -> FramedStream:
        await trio.sleep(self.two.rtt)
        ours, theirs = memory_framed_pair(peers=(self.peer_id, peer))
        self.two.nursery.start_soon(self._serve, peer, theirs)
        return ours

    async def _serve(self, peer: PeerId, stream: FramedStream) -> None:
        try:
            await self.two.listeners[peer].answer(stream, (OUTSIDE[self.peer_id], 40_000))
            await stream.aclose()
        except (PeerGone, SlowPeer):
            await stream.reset()


class KeeperAt(Keeper):
    """A keeper whose questions take a connection's round trips, and are answered with yes."""

    rtt = 0.0

    async def _reserve(self, candidate: Candidate) -> None:
        await trio.sleep(5 * self.rtt)
        self.plan.granted(candidate, 1800.0, trio.current_time(), None)


async def _never(peer: PeerId, addresses: Sequence[str]) -> Connection:
    raise PeerGone("not dialled here")


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # a test with a clock of its own
        await trio.sleep(0.01)


@pytest.mark.parametrize("rtt", [0.0, 0.16])
@pytest.mark.parametrize("alone", [0.3, 600.0])
async def test_a_home_in_a_swarm_of_two_is_relayed_within_five_seconds(
    autojump_clock: object, rtt: float, alone: float
) -> None:
    """alone: seconds of the bootstrap node before the home comes, in which nobody can tell it anything."""
    async with trio.open_nursery() as nursery:
        two = Two(nursery, rtt)
        boot = two.start(BOOT)
        boot.set_helps(50)
        two.records[BOOT] = Record(peer=BOOT, role="bootstrap", addresses=Node(two, BOOT).own.announced)
        await trio.sleep(alone)
        home = two.start(HOME)
        began = trio.current_time()
        keeper = KeeperAt(LIMITS, _never)
        KeeperAt.rtt = rtt
        keeper.candidates = lambda: relay_candidates(two.view(), {}, HOME)
        keeper.wanted = lambda: home.wants_relays
        keeper.on_change = home.set_relays
        home.hooks.on_change = keeper.look_soon
        nursery.start_soon(keeper.run)
        with trio.fail_after(RELAYED_SECONDS):
            await until(lambda: HOME in two.records and two.records[HOME].reach == "relayed")
        assert two.records[HOME].relays == (BOOT,)
        assert trio.current_time() - began >= LIMITS.reach_dial_seconds
        assert (boot.own.reach, two.records[BOOT].helps) == ("public", True)
        nursery.cancel_scope.cancel()
