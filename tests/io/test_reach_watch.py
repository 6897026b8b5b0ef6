"""A node in a world of routers: it learns whether others reach it, and its record follows what it learns."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from node.network.addresses import Address
from node.network.own_addresses import OwnAddresses
from node.network.reachability.candidates import Family
from node.network.reachability.link_watch import SILENCE_SECONDS
from node.network.reachability.listener import ReachListener
from node.network.reachability.own_reach import OwnReach
from node.network.reachability.seen import learn_seen
from node.network.reachability.state import CHECK_SECONDS
from node.network.reachability.watch import ReachWatch
from node.network.streams import FramedStream
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tensor_codec.errors import PeerGone, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import Outcome
from tests.fakes import memory_framed_pair

LIMITS = Limits()
ME, OUTSIDE, PORT = PeerId("me"), "203.0.113.7", 31330
DIRECT = f"/ip4/{OUTSIDE}/tcp/{PORT}"
SIX = "2606:4700:7::11"
DIRECT6 = f"/ip6/{SIX}/tcp/{PORT}"
LISTENING = (Address("ip4", "0.0.0.0", PORT),)  # no socket is opened


def at_home(last: int = 11) -> OwnAddresses:
    """A machine behind a router."""
    inside = f"/ip4/192.168.1.{last}/tcp/{PORT}"
    return OwnAddresses((inside,), (f"192.168.1.{last}",), True, False, (inside,), LISTENING)


def with_six() -> OwnAddresses:
    """The same machine with IPv6, of which it has a second address in the same network."""
    home, other = at_home(), f"/ip6/2606:4700:7::77/tcp/{PORT}"
    listening = (*LISTENING, Address("ip6", "::", PORT))
    return home._replace(announced=(other, *home.announced), found=(other, *home.found), listening=listening)


@dataclass
class World:
    """Peers that can be asked, and the addresses at which this node is reached from outside.

    Its face is that of a host.  old: peers that do not speak the protocol.  six: each peer has IPv6 too.
    inbound, outbound: live connections.  from_own_port: peers that were dialled from the listening port.
    """

    nursery: trio.Nursery
    own: OwnAddresses = field(default_factory=at_home)
    reached: set[str] = field(default_factory=set)
    old: set[PeerId] = field(default_factory=set)
    outside: str = OUTSIDE
    peers: int = 4
    six: bool = False
    house: str = ""  # of the peers, by their records
    inbound: tuple[int, ...] = ()
    outbound: tuple[int, ...] = ()
    from_own_port: set[PeerId] = field(default_factory=set)
    asked: list[PeerId] = field(default_factory=list)
    over: list[Family] = field(default_factory=list)
    peer_id: PeerId = ME

    def __post_init__(self) -> None:
        self.listeners = {record.peer: ReachListener(LIMITS, self._probe) for record in self.records()}

    def records(self) -> list[Record]:
        of_each = [
            (f"/ip4/1.{n}.1.1/tcp/1", *([f"/ip6/2606:4700:{n}::1/tcp/1"] * self.six))
            for n in range(self.peers)
        ]
        return [
            Record(peer=PeerId(f"p{n}"), role="bootstrap", addresses=each, seen=self.house)
            for n, each in enumerate(of_each)
        ]

    def view(self) -> SwarmView:
        entries = {record.peer: Entry(record, b"", 0.0) for record in self.records()}
        return SwarmView("public", entries=entries)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        record = self.view().get(peer)
        return record.addresses if record else ()

    def connected(self, kind: Family) -> set[PeerId]:
        return set()

    def links(self) -> tuple[Sequence[int], Sequence[int]]:
        return self.inbound, self.outbound

    def met_from_own_port(self, peer: PeerId) -> bool:
        return peer in self.from_own_port

    async def open_question(self, peer: PeerId, addresses: Sequence[str], kind: Family) -> FramedStream:
        assert addresses == self.addresses(peer)
        self.asked.append(peer)
        self.over.append(kind)
        await trio.sleep(0.05)
        if peer in self.old:
            raise RemoteProtocolError(f"{peer} does not speak this protocol")
        ours, theirs = memory_framed_pair(peers=(peer, ME))
        self.nursery.start_soon(self._serve, peer, theirs, self.outside if kind == "ip4" else SIX)
        return ours

    async def _serve(self, peer: PeerId, stream: FramedStream, outside: str) -> None:
        try:
            await self.listeners[peer].answer(stream, (outside, 40_000))
            await stream.aclose()
        except (PeerGone, SlowPeer):
            await stream.reset()

    async def _probe(self, peer: PeerId, address: Address) -> Outcome:
        if str(address) in self.reached:
            return "reached"
        await trio.sleep(LIMITS.reach_dial_seconds)
        return "timed out"


@asynccontextmanager
async def watched(world: World) -> AsyncIterator[tuple[ReachWatch, list[OwnReach]]]:
    """A watch that runs, and what it has told the record."""
    told: list[OwnReach] = []
    watch = ReachWatch(world, world.view, world.addresses, told.append, LIMITS, random.Random(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        yield watch, told
        nursery.cancel_scope.cancel()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()


async def test_a_node_behind_a_router_knows_within_five_seconds_that_nobody_reaches_it(
    autojump_clock: object, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raceme")
    async with watched(world) as (watch, told):
        await trio.sleep(5.0)
        assert (watch.own.reach, watch.own.addresses) == ("none", ())
        assert (watch.own.lan, watch.own.seen) == (world.own.found, OUTSIDE)
        assert told == [watch.own]
    (line,) = [each.getMessage() for each in caplog.records if "reachable" in each.getMessage()]
    assert line.startswith(f"not reachable at {OUTSIDE}:{PORT} (")
    assert f"forward TCP {PORT} to 192.168.1.11" in line


async def test_a_port_that_the_router_passes_on_is_found_and_announced(
    autojump_clock: object, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raceme")
    world.reached.add(DIRECT)
    async with watched(world) as (watch, _):
        with trio.fail_after(5.0):
            found = await watch.known(5.0)
        assert (found.reach, found.addresses) == ("public", (DIRECT,))
    assert f"reachable at {DIRECT} (2 of 2 peers)" in caplog.text


async def test_a_node_that_this_machine_alone_reaches_asks_nobody(
    autojump_clock: object, world: World
) -> None:
    text = f"/ip4/127.0.0.1/tcp/{PORT}"
    listening = (Address("ip4", "127.0.0.1", PORT),)
    world.own = OwnAddresses((text,), ("127.0.0.1",), True, False, (text,), listening)
    async with watched(world) as (watch, told):
        await trio.sleep(2 * CHECK_SECONDS)
        assert (world.asked, told, watch.own.addresses) == ([], [], (text,))


async def test_peers_of_older_versions_leave_everything_as_it_was(
    autojump_clock: object, world: World
) -> None:
    world.old = {record.peer for record in world.records()}
    async with watched(world) as (watch, told):
        await trio.sleep(60.0)
        assert len(world.asked) > len(world.old)  # it goes on asking
        assert (told, watch.own.reach, watch.own.addresses) == ([], "unknown", world.own.announced)


async def test_the_first_node_of_a_swarm_asks_as_soon_as_others_come(
    autojump_clock: object, world: World
) -> None:
    peers, world.peers = world.peers, 0
    async with watched(world) as (watch, _):
        await trio.sleep(500.0)
        assert watch.own.reach == "unknown"
        world.peers = peers
        await trio.sleep(5.0)
        assert watch.own.reach == "none"


async def test_another_address_is_asked_about_at_once_and_announced_when_it_is_verified(
    autojump_clock: object, world: World
) -> None:
    world.reached.add(DIRECT)
    async with watched(world) as (watch, told):
        await trio.sleep(30.0)
        world.own, world.outside = at_home(12), "198.51.100.9"
        moved = f"/ip4/198.51.100.9/tcp/{PORT}"
        world.reached = {moved}
        await trio.sleep(2.0)
        assert (watch.own.reach, watch.own.addresses) == ("public", (moved,))
        assert [each.reach for each in told] == ["public", "unknown", "public"]


async def test_a_router_that_forgets_its_port_is_noticed_within_a_quarter_of_an_hour(
    autojump_clock: object, world: World
) -> None:
    world.reached.add(DIRECT)
    async with watched(world) as (watch, _):
        await trio.sleep(30.0)
        world.reached.clear()
        await trio.sleep(CHECK_SECONDS - 60)
        assert watch.own.reach == "public"
        await trio.sleep(60.0)
        assert watch.own.reach == "none"


async def test_a_mapped_port_is_announced_once_others_have_reached_it(
    autojump_clock: object, world: World
) -> None:
    mapped = f"/ip4/{OUTSIDE}/tcp/50123"
    async with watched(world) as (watch, told):
        await trio.sleep(30.0)
        watch.offer("nat-pmp", [mapped])
        await trio.sleep(5.0)
        assert watch.own.reach == "none"  # promised, and not true
        world.reached.add(mapped)
        await trio.sleep(CHECK_SECONDS + 5.0)
        assert (watch.own.reach, watch.own.addresses) == ("public", (mapped,))
        assert all(mapped not in each.addresses for each in told[:-1])


async def test_a_relay_makes_a_node_behind_a_router_relayed_and_its_end_none(
    autojump_clock: object, world: World
) -> None:
    async with watched(world) as (watch, _):
        await trio.sleep(5.0)
        watch.set_relays([PeerId("r")])
        assert (watch.own.reach, watch.own.relays) == ("relayed", (PeerId("r"),))
        watch.set_relays([])
        assert watch.own.reach == "none"


class Room(World):
    """A swarm of one local network.  relay: besides a member that relays, and is on the Internet."""

    relay = False

    def records(self) -> list[Record]:
        room = [
            Record(
                peer=PeerId(f"p{n}"), role="serve", addresses=(f"/ip4/192.168.1.{20 + n}/tcp/1",), helps=True
            )
            for n in range(3)
        ]
        return room + [Record(peer=PeerId("r"), addresses=("/ip4/1.9.1.1/tcp/1",), helps=True)] * self.relay


async def test_a_node_that_its_neighbours_alone_reach_wants_relays_once_the_swarm_has_one_outside(
    autojump_clock: object,
) -> None:
    async with trio.open_nursery() as nursery:
        room = Room(nursery, outside="192.168.1.11", reached=set(at_home().announced))
        async with watched(room) as (watch, _):
            await trio.sleep(5.0)
            assert (watch.own.reach, watch.own.addresses) == ("public", at_home().announced)
            assert not watch.wants_relays
            room.relay = True
            assert watch.wants_relays
            watch.set_relays([PeerId("r")])
            assert (watch.own.reach, watch.own.relays) == ("public", (PeerId("r"),))
        nursery.cancel_scope.cancel()


async def test_ipv6_is_asked_about_over_ipv6_and_alone_makes_a_node_public(
    autojump_clock: object, world: World
) -> None:
    world.six, world.own, world.reached = True, with_six(), {DIRECT6}
    async with watched(world) as (watch, _):
        await trio.sleep(5.0)
        assert sorted(world.over) == ["ip4"] * 3 + ["ip6"] * 3
        assert (watch.own.reach, watch.own.addresses) == ("public", (DIRECT6,))
        assert watch.own.seen == OUTSIDE  # a house has one IPv4 address, and many of IPv6
        assert watch.wants_relays  # for peers without IPv6
        watch.set_relays([PeerId("r")])
        assert (watch.own.reach, watch.own.relays) == ("public", (PeerId("r"),))


@pytest.mark.parametrize("six", [False, True])
async def test_a_node_that_nobody_reaches_over_either_family_knows_it_within_five_seconds(
    autojump_clock: object, world: World, six: bool
) -> None:
    """six: peers have IPv6 too; without it nobody can say anything about this node's."""
    world.six, world.own = six, with_six()
    async with watched(world) as (watch, _):
        await trio.sleep(5.0)
        assert (watch.own.reach, watch.own.unreached, watch.own.seen) == ("none", "timed out", OUTSIDE)


async def test_a_node_to_which_nobody_comes_any_more_asks_again_at_once(
    autojump_clock: object, world: World
) -> None:
    world.reached.add(DIRECT)
    world.inbound, world.outbound = (1, 2), (3, 4)
    async with watched(world) as (watch, _):
        await trio.sleep(60.0)
        asked = len(world.asked)
        world.reached.clear()
        world.inbound = ()
        await trio.sleep(SILENCE_SECONDS + 5.0)
        assert watch.own.reach == "none"
        asked_again = len(world.asked)
        assert asked_again > asked
        await trio.sleep(300.0)
        assert len(world.asked) == asked_again  # once for each silence


async def test_a_public_node_whose_router_has_another_address_says_so_as_soon_as_it_is_connected_again(
    autojump_clock: object, world: World
) -> None:
    world.reached.add(DIRECT)
    world.outbound = (3, 4)
    async with watched(world) as (watch, told):
        await trio.sleep(60.0)
        world.outside, moved = "198.51.100.9", f"/ip4/198.51.100.9/tcp/{PORT}"
        world.reached = {moved}
        world.outbound = ()
        await trio.sleep(15.0)
        assert watch.own.addresses == (DIRECT,)  # it cannot know yet
        world.outbound = (5,)
        await trio.sleep(5.0)
        assert (watch.own.reach, watch.own.addresses) == ("public", (moved,))
        assert {each.reach for each in told} == {"public"}


async def test_a_router_with_another_address_is_noticed_by_its_relays(
    autojump_clock: object, world: World
) -> None:
    async with watched(world) as (watch, _):
        watch.hooks.seen_by_relays = lambda: {OUTSIDE}
        watch.set_relays([PeerId("r")])
        await trio.sleep(30.0)
        assert (watch.own.reach, watch.own.seen) == ("relayed", OUTSIDE)
        world.outside = "198.51.100.9"
        watch.hooks.seen_by_relays = lambda: {"198.51.100.9"}
        await trio.sleep(5.0)
        assert (watch.own.reach, watch.own.seen) == ("relayed", "198.51.100.9")
        asked = len(world.asked)
        watch.hooks.seen_by_relays = lambda: {"198.51.100.10"}  # a router with many addresses: once for each
        await trio.sleep(60.0)
        assert len(world.asked) <= asked + 3


async def test_a_failed_dial_to_a_mapped_port_has_the_router_asked_again(
    autojump_clock: object, world: World
) -> None:
    looks: list[float] = []
    async with watched(world) as (watch, _):
        watch.hooks.on_failed_offer = lambda: looks.append(trio.current_time())
        world.reached.add(f"/ip4/{OUTSIDE}/tcp/50123")
        watch.offer("nat-pmp", [f"/ip4/{OUTSIDE}/tcp/50123"])
        await trio.sleep(30.0)
        assert (watch.own.reach, looks) == ("public", [])
        world.reached.clear()
        await trio.sleep(CHECK_SECONDS)
        assert (watch.own.reach, len(looks)) == ("none", 1)


async def test_a_peer_that_the_router_may_let_in_as_a_friend_makes_no_node_public(
    autojump_clock: object, world: World
) -> None:
    """This node has dialled the peer from the port on which it listens: that port is open for this peer."""
    world.reached.add(DIRECT)
    world.from_own_port = {PeerId("p0"), PeerId("p1"), PeerId("p2")}
    async with watched(world) as (watch, _):
        await trio.sleep(5.0)
        assert PeerId("p3") in world.asked[:3]
        assert watch.own.reach == "unknown"


async def test_a_peer_that_has_asked_is_asked_back_before_it_has_a_record(
    autojump_clock: object, world: World
) -> None:
    world.peers = 0
    world.reached.add(DIRECT)
    async with watched(world) as (watch, _):
        await trio.sleep(100.0)
        home = PeerId("home")
        watch.hooks.askers = lambda: [home]
        world.listeners[home] = ReachListener(LIMITS, world._probe)
        await trio.sleep(2.0)
        assert world.asked == []  # not connected
        world.connected = lambda kind: {home} if kind == "ip4" else set()
        await trio.sleep(1.5)
        assert (world.asked, watch.own.reach) == ([home], "public")


async def test_a_moment_without_a_relay_is_no_loss_of_reach(autojump_clock: object, world: World) -> None:
    relays = [PeerId("r")]
    async with watched(world) as (watch, _), trio.open_nursery() as nursery:
        watch.set_relays(relays)
        await trio.sleep(5.0)
        lost = trio.Event()

        async def wait() -> None:
            await watch.lost(60.0)
            lost.set()

        nursery.start_soon(wait)
        for _ in range(3):
            watch.set_relays([])
            await trio.sleep(50.0)
            watch.set_relays(relays)
            await trio.sleep(50.0)
        assert not lost.is_set()
        watch.set_relays([])
        with trio.fail_after(61.0):
            await lost.wait()


async def test_a_node_whose_neighbours_are_known_outside_wants_relays_within_a_minute(
    autojump_clock: object, world: World
) -> None:
    """Two laptops found a swarm at home, and a friend elsewhere joins through the other one."""
    world.outside, inside = "192.168.1.11", f"/ip4/192.168.1.11/tcp/{PORT}"
    world.reached.add(inside)
    async with watched(world) as (watch, _):
        await trio.sleep(30.0)
        assert (watch.own.reach, watch.own.addresses, watch.own.seen) == ("public", (inside,), "")
        world.house = OUTSIDE
        await trio.sleep(60.0)
        assert (watch.own.reach, watch.own.lan, watch.own.seen) == ("none", (inside,), OUTSIDE)
        assert watch.wants_relays
        watch.set_relays([PeerId("p0")])
        assert (watch.own.reach, watch.own.lan) == ("relayed", (inside,))


async def test_a_client_learns_its_own_address_only_where_a_server_may_be_next_door(
    autojump_clock: object, world: World
) -> None:
    found: set[str] = set()
    view = world.view()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            learn_seen, world, lambda: view, world.addresses, found.update, LIMITS, random.Random(1)
        )
        await trio.sleep(60.0)
        assert (world.asked, found) == ([], set())
        home = Record(
            peer=PeerId("home"), role="serve", reach="none", lan=("/ip4/192.168.1.11/tcp/1",), seen=OUTSIDE
        )
        view = SwarmView("public", entries={**view.entries, home.peer: Entry(home, b"", 0.0)})
        await trio.sleep(10.0)
        assert (len(world.asked), found) == (1, {OUTSIDE})
        nursery.cancel_scope.cancel()
