"""Peers of one local network find each other: over a network of memory, and over zeroconf on loopback."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from node.config import NetworkConfig
from node.network import joining, own_addresses
from node.network.addresses import Interface, InterfaceAddress
from node.network.directory.visits import Meeting
from node.network.lan import announcement, discovery, start
from node.network.lan.announcement import write_announcement
from node.network.lan.discovery import WAITING_ANNOUNCEMENTS, LanDiscovery, open_lan
from node.network.lan.multicast import LanError, ZeroconfMulticast
from node.network.mapping.mapper import open_mapper
from routing.names import PeerId
from routing.view.records import Record
from tensor_codec.limits import Limits
from tests.fakes import ALICE, BOB
from tests.io.test_directory import Swarm

HOME = ["/ip4/192.168.1.11/tcp/31330"]
NEXT_DOOR = ["/ip4/192.168.1.12/tcp/31330"]
PRIVATE_SWARM = "0123456789abcdef0123456789abcdef"


@dataclass
class Room:
    """A local network: what is announced in it, and its listeners."""

    texts: dict[int, bytes] = field(default_factory=dict)
    listeners: dict[int, Callable[[bytes], None]] = field(default_factory=dict)
    opened: list[Sequence[str]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    fault: str | None = None

    def multicast(self) -> FakeMulticast:
        return FakeMulticast(self)

    def say(self, text: bytes) -> None:
        for heard in list(self.listeners.values()):
            heard(text)


class FakeMulticast:
    """`Multicast` without a network, that calls its listeners in the announcer's thread."""

    def __init__(self, room: Room) -> None:
        self.room = room

    def open(self, hosts: Sequence[str], heard: Callable[[bytes], None]) -> None:
        self.room.threads.add(threading.get_ident())
        if self.room.fault is not None:
            raise LanError(self.room.fault)
        self.room.opened.append(hosts)
        self.room.listeners[id(self)] = heard
        for text in list(self.room.texts.values()):
            heard(text)

    def announce(self, hosts: Sequence[str], port: int, text: bytes) -> None:
        self.room.threads.add(threading.get_ident())
        self.room.texts[id(self)] = text
        self.room.say(text)

    def close(self) -> None:
        self.room.threads.add(threading.get_ident())
        self.room.texts.pop(id(self), None)
        self.room.listeners.pop(id(self), None)


@dataclass
class Meetings:
    """Stands for a directory: notes who was to be met."""

    met: list[tuple[PeerId, tuple[str, ...]]] = field(default_factory=list)
    outcome: Meeting = "known"
    gate: trio.Event | None = None  # to be waited for, before an answer
    news: trio.Event = field(default_factory=trio.Event)

    async def meet(self, peer: PeerId, addresses: Sequence[str]) -> Meeting:
        await trio.lowlevel.checkpoint()
        self.met.append((peer, tuple(addresses)))
        self.news.set()
        self.news = trio.Event()
        if self.gate is not None:
            await self.gate.wait()
        return self.outcome

    def is_known(self, peer: PeerId) -> bool:
        return self.outcome == "known" and peer in [each for each, _ in self.met]

    async def wait(self, count: int = 1) -> None:
        with trio.fail_after(30):
            while len(self.met) < count:
                await self.news.wait()


@asynccontextmanager
async def open_node(
    room: Room, identity=ALICE, listening: Sequence[str] = HOME, swarm: str = "public"
) -> AsyncIterator[tuple[LanDiscovery, Meetings]]:
    meetings = Meetings()
    where = listening
    async with (
        open_lan(identity.peer_id, swarm, lambda: where, Limits(), room.multicast) as lan,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lan.introduce, meetings.meet, meetings.is_known)
        yield lan, meetings
        nursery.cancel_scope.cancel()


async def test_two_nodes_of_one_room_find_each_other_whoever_comes_first():
    room = Room()
    async with open_node(room) as (alice, hers), open_node(room, BOB, NEXT_DOOR) as (bob, his):
        assert await alice.start.first_peer()
        assert await bob.start.first_peer()
        assert hers.met == [(BOB.peer_id, tuple(NEXT_DOOR))]
        assert his.met == [(ALICE.peer_id, tuple(HOME))]
    assert room.texts == room.listeners == {}


async def test_a_private_swarm_is_found_by_its_id_and_no_other_swarm_is():
    room = Room()
    async with (
        open_node(room, swarm=PRIVATE_SWARM) as (_, hers),
        open_node(room, BOB, NEXT_DOOR) as (_, his),
    ):
        carol = write_announcement(BOB.peer_id, PRIVATE_SWARM, NEXT_DOOR)
        while len(room.listeners) < 2:  # noqa: ASYNC110  of threads
            await trio.sleep(0.01)
        room.say(carol)
        await hers.wait()
        assert his.met == []


async def test_no_call_of_the_library_runs_in_trio_s_thread():
    room = Room()
    async with open_node(room), open_node(room, BOB, NEXT_DOOR) as (bob, _):
        assert await bob.start.first_peer()
    assert threading.get_ident() not in room.threads
    assert room.threads


async def test_what_answers_no_dial_is_no_first_peer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "LOOK_SECONDS", 0.2)
    room = Room()
    async with open_node(room, BOB, NEXT_DOOR), open_node(room) as (alice, hers):
        hers.outcome = "silent"
        await hers.wait()
        assert not await alice.start.first_peer()


async def test_a_dial_under_way_is_waited_for_before_a_node_thinks_itself_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(start, "QUIET_SECONDS", 0.05)
    room = Room()
    async with open_node(room, BOB, NEXT_DOOR), open_node(room) as (alice, hers):
        hers.gate = trio.Event()
        await hers.wait()
        async with trio.open_nursery() as nursery:

            async def answer_later() -> None:
                await trio.sleep(0.2)
                hers.gate.set()

            nursery.start_soon(answer_later)
            assert await alice.start.first_peer()


async def test_of_nodes_that_start_at_one_moment_the_least_chooses_its_blocks_first(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(start, "SETTLE_SECONDS", 30.0)
    room, (low, high) = Room(), sorted([ALICE, BOB], key=lambda each: each.peer_id)
    async with open_node(room, low) as (first, its), open_node(room, high, NEXT_DOOR) as (second, others):
        its.outcome = others.outcome = "starting"
        await its.wait()
        await others.wait()
        assert await second.start.first_peer(), "a peer that starts is there"
        with trio.fail_after(5):
            await first.start.settled()
        others.outcome = "known"  # the record of the first one
        before = len(others.met)
        await second.start.settled()
        assert len(others.met) > before or others.is_known(low.peer_id)
    assert not second.start._starting


async def test_a_peer_without_a_record_is_starting_and_known_with_its_record(autojump_clock: MockClock):
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery)
        one, other = await swarm.add(None, bootstrap=[]), await swarm.add(None, bootstrap=[])
        at = swarm.hosts[1].addresses
        assert await one.meet(other.peer_id, at) == "starting"
        await other.announce(Record(role="bootstrap"))
        assert await one.meet(other.peer_id, at) == "known"
        nursery.cancel_scope.cancel()


async def test_without_multicast_nobody_waits_and_one_line_says_why(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "node")
    room = Room(fault="no multicast at 192.168.1.11: Operation not permitted")
    async with open_node(room) as (alice, _):
        with trio.fail_after(2.0):  # LOOK_SECONDS are not waited for
            assert not await alice.start.first_peer()
    assert [text for text in caplog.messages if "local network" in text] == [
        f"nobody finds this node in the local network: {room.fault}"
    ]


async def test_after_a_failure_other_addresses_of_the_machine_are_tried_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(discovery, "ADDRESSES_SECONDS", 0.01)
    room, listening = Room(fault="no multicast at 192.168.1.11"), list(HOME)
    async with open_node(room, ALICE, listening) as (alice, _):
        assert not await alice.start.first_peer()
        room.fault = None
        listening[:] = NEXT_DOOR
        with trio.fail_after(30):
            while not room.texts:  # noqa: ASYNC110  of threads
                await trio.sleep(0.01)


async def test_a_machine_without_a_network_waits_for_nobody(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "node")
    room = Room()
    async with open_node(room, listening=["/ip4/127.0.0.1/tcp/31330"]) as (alice, _):
        with trio.fail_after(2.0):
            assert not await alice.start.first_peer()
    assert room.opened == []
    assert caplog.messages == ["nobody finds this node in the local network: this machine has no network"]


async def test_another_address_of_the_machine_is_announced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "ADDRESSES_SECONDS", 0.01)
    room, listening = Room(), list(HOME)
    async with open_node(room, BOB, NEXT_DOOR) as (_, his), open_node(room, ALICE, listening):
        await his.wait()
        listening[:] = ["/ip4/10.0.0.5/tcp/31330"]
        with trio.fail_after(30):
            while ("10.0.0.5",) not in room.opened:  # noqa: ASYNC110  of threads
                await trio.sleep(0.01)
    assert room.texts == {}


async def test_a_flood_of_announcements_is_held_in_a_bounded_queue():
    room, meetings = Room(), Meetings()
    async with open_lan(ALICE.peer_id, "public", lambda: HOME, Limits(), room.multicast) as lan:
        while not room.listeners:  # noqa: ASYNC110  of threads
            await trio.sleep(0.01)
        last = write_announcement(BOB.peer_id, "public", NEXT_DOOR)
        for number in range(100 * WAITING_ANNOUNCEMENTS):
            room.say(number.to_bytes(4, "big"))
        room.say(b"x" * 100_000)
        room.say(last)
        assert len(lan._texts) == WAITING_ANNOUNCEMENTS
        assert max(map(len, lan._texts)) < 1000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lan.introduce, meetings.meet, meetings.is_known)
            await meetings.wait()
            nursery.cancel_scope.cancel()
    assert meetings.met == [(BOB.peer_id, tuple(NEXT_DOOR))]


async def test_two_swarms_of_one_room_become_one_when_two_of_their_nodes_meet(autojump_clock: MockClock):
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery)
        one, other = await swarm.add(bootstrap=[]), await swarm.add(bootstrap=[])
        third = await swarm.add(bootstrap=[swarm.hosts[1].multiaddr])
        assert one.peer_id not in third.view().entries
        assert await one.meet(other.peer_id, swarm.hosts[1].addresses) == "known"
        await trio.sleep(5)
        assert one.peer_id in other.view().entries
        assert one.peer_id in third.view().entries
        swarm.hosts[0].network.kill(other.peer_id)
        assert await one.meet(other.peer_id, NEXT_DOOR) == "known", "whose record is here is not dialled"
        nursery.cancel_scope.cancel()


async def test_whoever_announces_an_address_where_nobody_answers_costs_a_dial_and_no_more(
    autojump_clock: MockClock,
):
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery)
        node = await swarm.add()
        assert await node.meet(BOB.peer_id, NEXT_DOOR) == "silent"
        assert node.view().get(BOB.peer_id) is None
        nursery.cancel_scope.cancel()


# Nodes as `python -m node` makes them


ALL = "/ip4/0.0.0.0/tcp/0"


@pytest.fixture
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no other interface finds others on its loopback."""
    loopback = Interface("lo", (InterfaceAddress("127.0.0.1"),))
    monkeypatch.setattr(own_addresses, "read_interfaces", lambda: [loopback])
    monkeypatch.setattr(announcement, "_can_be_dialled", lambda address: True)


async def test_a_node_without_peers_joins_the_swarm_of_the_local_network(
    on_loopback: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(start, "LOOK_SECONDS", 0.2)
    room = Room()
    monkeypatch.setattr(joining, "open_lan", partial(open_lan, make=room.multicast))
    config = NetworkConfig(listen=(ALL,), lan=None)
    async with joining.join(config, "bootstrap") as first:
        await first.directory.announce(Record(role="bootstrap"))
        monkeypatch.setattr(start, "LOOK_SECONDS", 30.0)  # a busy machine; an answer ends it
        async with joining.join(config, "serve") as second:
            assert first.host.peer_id in second.directory.view().entries
    assert room.texts == {}


@pytest.mark.parametrize(
    ("changes", "announced"),
    [
        ({}, True),
        ({"lan": True}, True),
        ({"lan": False}, False),
        ({"listen": ("/ip4/127.0.0.1/tcp/0",)}, False),
        ({"listen": ()}, False),
    ],
    ids=str,
)
async def test_a_node_is_announced_where_it_listens_beyond_loopback_unless_it_may_not(
    changes: dict, announced: bool, on_loopback: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(start, "LOOK_SECONDS", 0.2)
    room = Room()
    monkeypatch.setattr(joining, "open_lan", partial(open_lan, make=room.multicast))
    config = replace(NetworkConfig(listen=(ALL,), lan=None), **changes)
    async with joining.join(config, "bootstrap"):
        with trio.move_on_after(30 if announced else 0.2):
            while not room.texts:  # noqa: ASYNC110  of threads
                await trio.sleep(0.01)
    assert bool(room.opened) is announced


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, True),
        ({"port_mapping": False}, False),
        ({"announce": ("/ip4/203.0.113.7/tcp/31330",)}, False),
        ({"listen": ("/ip4/127.0.0.1/tcp/0",)}, False),
    ],
    ids=str,
)
async def test_the_router_is_asked_where_a_node_listens_beyond_loopback_unless_it_may_not(
    changes: dict, asked: bool, on_loopback: None, monkeypatch: pytest.MonkeyPatch
):
    opened = []

    @asynccontextmanager
    async def fake_mapper(listening, offer, peer):
        opened.append(tuple(listening()))
        async with open_mapper(lambda: (), offer, {}, peer=peer) as mapper:
            yield mapper

    monkeypatch.setattr(joining, "open_mapper", fake_mapper)
    usual = NetworkConfig(listen=(ALL,), lan=False, port_mapping=True)
    async with joining.join(replace(usual, **changes), "bootstrap") as node:
        assert opened == ([node.host.own.found] if asked else [])


# zeroconf itself, on loopback


@pytest.fixture
def loopback_room() -> Callable[[], ZeroconfMulticast]:
    """Skips where this machine has no multicast."""
    probe = ZeroconfMulticast()
    try:
        probe.open(["127.0.0.1"], lambda text: None)
    except LanError as error:
        pytest.skip(str(error))
    finally:
        probe.close()
    return ZeroconfMulticast


async def test_zeroconf_brings_an_announcement_from_one_node_to_the_other_and_ends(loopback_room):
    text = write_announcement(BOB.peer_id, "public", NEXT_DOOR)
    before = set(threading.enumerate())
    heard: list[bytes] = []
    arrived, token = trio.Event(), trio.lowlevel.current_trio_token()

    def hear(found: bytes) -> None:
        heard.append(found)
        if found == text:
            token.run_sync_soon(arrived.set)

    alice, bob = loopback_room(), loopback_room()
    try:
        await trio.to_thread.run_sync(alice.open, ["127.0.0.1"], hear)
        await trio.to_thread.run_sync(bob.open, ["127.0.0.1"], lambda text: None)
        await trio.to_thread.run_sync(bob.announce, ["127.0.0.1"], 31330, text)
        with trio.move_on_after(20):
            await arrived.wait()
    finally:
        await trio.to_thread.run_sync(alice.close)
        await trio.to_thread.run_sync(bob.close)
    assert text in heard
    left = [each.name for each in set(threading.enumerate()) - before]
    assert not [name for name in left if "zeroconf" in name.lower() or "_run_loop" in name]
