"""The places of connections: who gets one, who gives one up, and what never happens."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.network.admission.places import Newcomer, Place, Places
from node.network.connection_table import PROVEN_SECONDS, ConnectionTable, NoPlaceLeft
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.yamux_limits import YamuxError
from node.runtime.faults import Faults
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tensor_codec.limits import Limits

LOOPBACK, PUBLIC, OTHER = "127.0.0.1/32", "8.8.8.8/32", "9.9.9.9/32"


@dataclass
class FakeCore:
    streams: int = 0


@dataclass(eq=False)
class FakeStream:
    connection: FakeConnection
    number: int
    is_waiting: bool = True

    @property
    def state(self) -> Any:
        return self

    @property
    def id(self) -> int:
        return self.number


@dataclass(eq=False)
class FakeConnection:
    """A connection as the table sees one."""

    peer: PeerId
    prefix: str
    is_initiator: bool = False
    is_established: bool = True
    relayed_by: PeerId | None = None
    core: FakeCore = field(default_factory=FakeCore)
    served: list[FakeStream] = field(default_factory=list)

    def served_streams(self) -> list[FakeStream]:
        return self.served

    def open(self, count: int = 1) -> None:
        for _ in range(count):
            self.served.append(FakeStream(self, 1 + 2 * len(self.served)))
        self.core.streams = len(self.served)


class Node:
    """A table, with its faults and a clock that a test sets."""

    def __init__(self, limits: Limits | None = None, *, members_only: bool = False) -> None:
        self.limits = limits or Limits()
        self.now = 0.0
        self.faults = Faults(
            self.limits,
            clock=lambda: self.now,
            prefix_of=lambda peer: self.table.prefix_of(peer),
            on_ban=self._close,
        )
        self.table = ConnectionTable(self.limits, self.faults, members_only=members_only)
        self.closed: list[FakeConnection] = []
        self.count = 0

    def _close(self, peer: str) -> None:
        for each in self.table.of(PeerId(peer)):
            self.close(each)

    def close(self, connection: Connection) -> None:
        self.table.remove(connection)
        self.closed.append(cast(FakeConnection, connection))

    def come(self, prefix: str, *, peer: str | None = None, streams: int = 0) -> FakeConnection:
        """A peer's connection, admitted; the one that makes way is closed.  Raises PeerGone."""
        self.count += 1
        connection = FakeConnection(PeerId(peer or f"peer {self.count}"), prefix)
        self.table.check(connection.peer)
        loser = self.table.make_room(connection.peer, prefix, self.now)
        if loser is not None:
            self.close(loser)
        self.table.add(cast(Connection, connection), self.now)
        connection.open(streams)
        return connection

    def dial(self, prefix: str) -> FakeConnection:
        self.count += 1
        connection = FakeConnection(PeerId(f"peer {self.count}"), prefix, is_initiator=True)
        self.table.add(cast(Connection, connection), self.now)
        return connection


# --- idle connections ---


def test_idle_connections_of_one_address_leave_the_last_quarter_free():
    node = Node()
    for _ in range(63):
        with suppress(NoPlaceLeft):
            node.come("127.0.0.66/32")
    assert len(node.table) == 48
    assert node.closed == [], "none of them is a second old"


def test_an_idle_connection_of_an_address_with_more_makes_way_at_once_the_longest_idle_first():
    node = Node()
    for number in range(48):
        node.now = number / 100
        node.come("127.0.0.66/32")
    honest = [node.come(LOOPBACK, streams=1) for _ in range(10)]
    assert [each.peer for each in node.closed] == [f"peer {number}" for number in range(1, 11)]
    assert not set(honest) & set(node.closed)


def test_on_one_address_a_connection_makes_way_after_a_second_without_a_stream():
    node = Node()
    busy = [node.come(LOOPBACK, streams=1) for _ in range(24)]
    idle = [node.come(LOOPBACK) for _ in range(24)]
    with pytest.raises(NoPlaceLeft):
        node.come(LOOPBACK)
    node.now = 1.0
    for _ in range(24):
        node.come(LOOPBACK, streams=1)
    assert set(node.closed) == set(idle)
    with pytest.raises(NoPlaceLeft):
        node.come(LOOPBACK)
    assert not set(busy) & set(node.closed)


def test_a_connection_in_use_makes_way_only_for_a_smaller_share():
    node = Node()
    for _ in range(46):
        node.come("127.0.0.66/32", streams=1)
    honest = [node.come(LOOPBACK, streams=1) for _ in range(2)]
    newcomers = [node.come(f"10.0.{number}.1/32", streams=1) for number in range(20)]
    assert {each.prefix for each in node.closed} == {"127.0.0.66/32"}
    assert not set(honest + newcomers) & set(node.closed)


def test_without_a_stream_for_some_time_a_connection_of_a_peer_s_is_closed():
    node, most = Node(), Limits().idle_connection_seconds
    idle, busy, good, dialled = (
        node.come(PUBLIC),
        node.come(PUBLIC, streams=1),
        node.come(PUBLIC),
        node.dial(PUBLIC),
    )
    node.faults.worked(good.peer)
    while node.now < most - 5.0:
        node.now += 5.0
        assert node.table.unused(node.now) == []
    node.now = most
    assert node.table.unused(node.now) == [idle]
    busy.served.clear()
    busy.core.streams = 0
    node.now = 2 * most - 1.0
    assert busy not in node.table.unused(node.now)
    node.now = 2 * most
    assert busy in node.table.unused(node.now)
    assert {good, dialled}.isdisjoint(cast(list[Any], node.table.unused(node.now)))


def test_a_peer_that_has_used_its_connection_for_two_minutes_is_known_good():
    node = Node()
    busy, idle = node.come(PUBLIC, streams=1), node.come(PUBLIC)
    while node.now < PROVEN_SECONDS:
        assert not node.faults.is_good(busy.peer)
        node.now += 5.0
        node.table.unused(node.now)
    assert node.faults.is_good(busy.peer)
    assert not node.faults.is_good(idle.peer)


# --- shares of addresses, and peers known good ---


def test_a_public_address_has_eight_places_where_they_are_scarce_and_loopback_its_share():
    node = Node()
    for _ in range(31):
        node.come(PUBLIC, streams=1)
    node.come(OTHER, streams=1)
    with pytest.raises(NoPlaceLeft):
        node.come(PUBLIC, streams=1)
    for _ in range(7):
        node.come(OTHER, streams=1)
    with pytest.raises(NoPlaceLeft):
        node.come(OTHER, streams=1)
    for _ in range(8):
        node.come(LOOPBACK, streams=1)
    assert len(node.table) == 31 + 8 + 8


def test_a_quarter_of_the_places_is_kept_for_peers_known_good():
    node = Node()
    for _ in range(48):
        node.come(LOOPBACK, streams=1)
    for number in range(16):
        node.faults.worked(f"good {number}")
        node.come(LOOPBACK, peer=f"good {number}", streams=1)
    assert len(node.table) == 64
    assert node.closed == []
    with pytest.raises(NoPlaceLeft):
        node.come(LOOPBACK, streams=1)


def test_peers_known_good_keep_their_quarter_and_what_is_theirs_beyond_it_is_shared():
    node = Node()
    for number in range(64):
        node.faults.worked(f"good {number}")
        node.come(PUBLIC if number else OTHER, peer=f"good {number}", streams=1)
    newcomers = [node.come(f"10.0.{number}.1/32", streams=1) for number in range(40)]
    assert {each.prefix for each in node.closed} == {PUBLIC}
    assert not set(newcomers) & set(node.closed)
    assert sum(str(each.peer).startswith("good") for each in node.table) == 24


def test_members_of_a_private_swarm_share_all_places():
    node = Node(members_only=True)
    for _ in range(64):
        node.come(PUBLIC, streams=1)
    with pytest.raises(NoPlaceLeft):
        node.come(PUBLIC, streams=1)
    node.come(OTHER, streams=1)
    assert len(node.table) == 64


def test_a_suspect_address_keeps_its_good_peers_and_has_two_places_for_others():
    node = Node()
    node.faults.worked("good")
    for number in range(3):
        node.come(PUBLIC, peer=f"evil {number}")
        node.faults.add(f"evil {number}", YamuxError("window"))
    assert len(node.closed) == 3
    assert len(node.table) == 0
    node.come(PUBLIC, streams=1)
    node.come(PUBLIC, streams=1)
    with pytest.raises(NoPlaceLeft):
        node.come(PUBLIC, streams=1)
    node.come(PUBLIC, peer="good", streams=1)
    node.come(OTHER, streams=1)
    node.now = 61.0
    node.come(PUBLIC, streams=1)


def test_a_banned_peer_is_told_for_how_long():
    node = Node()
    node.faults.add("evil", YamuxError("window"))
    with pytest.raises(PeerGone, match=r"evil broke the rules, and is let in again in 60 s"):
        node.come(PUBLIC, peer="evil")
    node.now = 60.0
    node.come(PUBLIC, peer="evil")


# --- streams ---


def room_for(node: Node, connection: FakeConnection) -> tuple[bool, FakeStream | None]:
    stream = FakeStream(connection, 9999)
    room = node.table.room_for(cast(MuxedStream, stream), node.now)
    return room.admitted, cast("FakeStream | None", room.instead_of)


def test_seven_ids_with_eighty_idle_streams_each_keep_no_newcomer_out():
    node = Node()
    evil = [node.come("127.0.0.66/32") for _ in range(7)]
    for each in evil:
        while len(each.served) < 80 and room_for(node, each) == (True, None):
            each.open()
    assert sum(len(each.served) for each in evil) == 512
    honest = node.come(LOOPBACK)
    admitted, instead = room_for(node, honest)
    assert admitted
    assert instead is not None
    assert instead.connection in evil
    assert len(instead.connection.served) == 80
    assert instead.number == 159, "the newest"
    assert room_for(node, evil[0]) == (False, None)


def test_a_stream_whose_reader_waits_makes_way_before_one_in_work():
    node = Node(Limits(max_streams=3, max_streams_per_peer=3))
    evil, honest = node.come(PUBLIC), node.come(LOOPBACK)
    evil.open(3)
    evil.served[2].is_waiting = False
    assert room_for(node, honest) == (True, evil.served[1])


def test_a_peer_with_all_its_streams_gets_no_further_one():
    node = Node(Limits(max_streams_per_peer=3))
    connection = node.come(LOOPBACK)
    connection.open(3)
    assert room_for(node, connection) == (False, None)


# --- all of it, at random ---


PREFIXES = st.sampled_from([LOOPBACK, PUBLIC, OTHER])
DEEDS = st.sampled_from(["go", "work", "fault", "open", "rest"])


class Tables(RuleBasedStateMachine):
    """A small table under peers that come, work, misbehave and go.

    Promises: no cap is exceeded; a banned peer has no connection; a peer known good, of an address with one
    place, is never turned away; nobody in use makes way for an address with a larger share.
    """

    LIMITS = Limits(
        max_inbound_connections=8,
        max_connections=12,
        max_connections_per_prefix=3,
        max_connections_per_peer=2,
    )

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(self.LIMITS)
        self.held: list[FakeConnection] = []

    def settle(self) -> None:
        self.held = [cast(FakeConnection, each) for each in self.node.table]

    @rule(
        prefix=st.sampled_from([LOOPBACK, PUBLIC, OTHER]), peer=st.integers(0, 9), streams=st.integers(0, 1)
    )
    def come(self, prefix: str, peer: int, streams: int) -> None:
        before = len(self.node.closed)
        name = f"{peer} at {prefix}"
        share = sum(each.prefix == prefix for each in self.held)
        try:
            self.node.come(prefix, peer=name, streams=streams)
        except NoPlaceLeft:
            assert share or not self.node.faults.is_good(name)
            assert len(self.node.table) >= 2
        except PeerGone:
            assert self.node.faults.banned_seconds(name) or len(self.node.table.of(PeerId(name))) == 2
        for loser in self.node.closed[before:]:
            if loser.core.streams:
                assert loser.prefix != prefix
                assert sum(each.prefix == loser.prefix for each in self.held) > share
        self.settle()

    @precondition(lambda self: self.held)
    @rule(
        choice=st.randoms(use_true_random=False),
        what=st.sampled_from(["go", "work", "fault", "open", "rest"]),
    )
    def live(self, choice: Any, what: str) -> None:
        one = choice.choice(self.held)
        if what == "go":
            self.node.close(cast(Connection, one))
        elif what == "work":
            self.node.faults.worked(one.peer)
        elif what == "fault":
            self.node.faults.add(one.peer, YamuxError("window"))
        elif what == "open":
            one.open()
        else:
            one.served.clear()
            one.core.streams = 0
        self.settle()

    @rule(seconds=st.floats(0, 70))
    def wait(self, seconds: float) -> None:
        self.node.now += seconds
        for each in self.node.table.unused(self.node.now):
            assert not each.core.streams
            self.node.close(each)
        self.settle()

    @invariant()
    def caps_hold(self) -> None:
        assert len(self.held) <= self.LIMITS.max_inbound_connections
        for each in self.held:
            assert len(self.node.table.of(each.peer)) <= 2
            assert not self.node.faults.banned_seconds(each.peer)


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_full_node_gives_a_place_only_at_the_expense_of_somebody():
    places = Places(4, 1)
    held = [
        Place(FakeConnection(PeerId(str(n)), LOOPBACK), str(n), LOOPBACK, 0.0, 0.0, 0.0) for n in range(2)
    ]
    newcomer = Newcomer("new", OTHER, good=False)
    assert places.room(newcomer, held, 0.0).instead_of is None
    room = places.room(newcomer, held, 0.0, full=True)
    assert room.instead_of is held[0]


# --- the rate of streams ---


def test_peers_of_one_address_open_streams_no_faster_with_many_connections_and_ids():
    node = Node(Limits(streams_per_prefix_burst=10, streams_per_peer_burst=3))
    flooding = [node.come(PUBLIC, peer=f"id {number // 2}") for number in range(8)]

    def opens(connection: FakeConnection) -> bool:
        stream: Any = FakeStream(connection, 1)
        return node.table.room_for(cast(MuxedStream, stream), node.now).admitted

    admitted = sum(opens(connection) for _ in range(50) for connection in flooding)
    assert admitted == 4 * 3 + 10, "three of each id, and ten together"
    assert opens(node.come(PUBLIC)), "a newcomer of the address has a few of its own"
    assert sum(opens(connection) for connection in [node.come(OTHER)] * 50) == 3 + 10


def test_a_peer_has_two_connections_through_relays_next_to_its_direct_ones():
    node = Node()
    peer = PeerId("p")

    def add(relay: str | None) -> FakeConnection:
        node.table.check(peer, relayed=relay is not None)
        made = FakeConnection(peer, "", relayed_by=None if relay is None else PeerId(relay))
        node.table.add(cast(Connection, made), 0.0)
        return made

    circuits = [add("r"), add("s")]
    assert node.table.live(peer) is circuits[0]
    assert node.table.live(peer, direct=True) is None
    with pytest.raises(PeerGone, match="p has 2 circuits already"):
        add("t")
    direct = [add(None), add(None), add(None)]
    assert node.table.live(peer) is direct[0], "later streams take the direct way"
    assert node.table.live(peer, direct=True) is direct[0]
    with pytest.raises(PeerGone, match="p has 3 connections already"):
        add(None)


def test_a_connection_of_a_peer_that_we_relay_to_stays_without_a_stream():
    node = Node()
    kept, other = (FakeConnection(PeerId(name), PUBLIC) for name in ("kept", "other"))
    for each in (kept, other):
        node.table.add(cast(Connection, each), 0.0)
    node.table.reserved = {"kept"}
    assert node.table.unused(120.0) == [other]
