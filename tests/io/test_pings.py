"""Questions to peers: how many at a time, how often, and what is done where we ourselves stand still."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio

from node.network.connection_table import NoPlaceLeft
from node.network.directory.pings import (
    ASKED_AT_ONCE,
    DIALLED_AT_ONCE,
    LINKED_SECONDS,
    LOOK_SECONDS,
    MAX_ON_ROUTES,
    MAX_WANTED,
    MONITOR_SECONDS,
    OVERDUE_SECONDS,
    PING_SECONDS,
    RELAYED_SECONDS,
    USED_SECONDS,
    WATCH_SECONDS,
    Asker,
    worth_monitoring,
)
from routing.names import PeerId
from routing.view.answers import FAILURES
from routing.view.description import MAX_ASKED
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tensor_codec.errors import PeerGone

PEERS = [PeerId(f"peer {number}") for number in range(40)]
ME = PeerId("me")


class Host:
    """Reaches those of these peers that answer, and hears nothing of the others."""

    peer_id = ME

    def __init__(self, answering=()):
        self.answering = set(answering)
        self.pings = []
        self.under_way = self.most = 0
        self.fault = None
        self.linked = set()

    def connected(self):
        return self.linked

    async def connect(self, peer, addresses, *, seconds):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await trio.sleep(0.01)
            if self.fault is not None:
                raise self.fault
            if peer not in self.answering:
                await trio.sleep_forever()
        finally:
            self.under_way -= 1

    async def ping(self, peer, addresses):
        self.pings.append(peer)
        await trio.sleep(0.01)
        return 0.01


@pytest.fixture
async def asking(autojump_clock):
    """An asker on a host that answers nothing, and how often it has told of a change."""
    async with trio.open_nursery() as nursery:
        changes = []
        asker: Any = Asker(
            Host(), nursery, addresses=lambda peer: ("/ip4/10.0.0.1/tcp/1",),
            changed=lambda: changes.append(asker.answers.silent()), dial_seconds=5.0,
        )  # fmt: skip
        asker.changes = changes
        yield asker
        nursery.cancel_scope.cancel()


async def test_many_silent_peers_are_asked_a_few_at_a_time_and_all_come_to_their_turn(autojump_clock, asking):
    asking._host.answering = set(PEERS[-3:])
    assert (await asking.measure(PEERS, 20.0)).keys() == set(PEERS[-3:])
    assert asking._host.most == DIALLED_AT_ONCE
    assert asking.answers.silent() == set(PEERS[:-3])
    await trio.sleep(PING_SECONDS)
    assert asking._host.under_way == 0


async def test_more_are_asked_at_a_time_where_nobody_has_to_be_dialled(autojump_clock, asking):
    asking._host.linked = set(PEERS)
    await asking.measure(PEERS, 1.0)
    assert asking._host.most == ASKED_AT_ONCE


async def test_a_peer_behind_a_relay_has_longer_to_answer(autojump_clock, asking):
    """Two connections are made on the way to it, the second one over the first."""
    asking._addresses = lambda peer: () if peer == PEERS[0] else ("/ip4/10.0.0.1/tcp/1",)
    for peer in PEERS[:2]:
        asking.ask(peer)
    await trio.sleep(OVERDUE_SECONDS + RELAYED_SECONDS / 2)
    assert asking.answers.silent() == {PEERS[1]}
    await trio.sleep(PING_SECONDS + RELAYED_SECONDS)
    assert asking.answers.silent() == set(PEERS[:2])


async def test_a_watched_peer_is_asked_every_few_seconds(autojump_clock, asking):
    asking._host.answering = set(PEERS[:2])
    with trio.move_on_after(60.0):
        await asking.watch(lambda wanted: PEERS[:2], random.Random(1))
    for peer in PEERS[:2]:
        assert (
            60 / (1.2 * WATCH_SECONDS) - 1 <= asking._host.pings.count(peer) <= 60 / (0.8 * WATCH_SECONDS) + 1
        )


async def test_what_somebody_wanted_to_know_is_watched_for_a_minute(autojump_clock, asking):
    asking._host.answering = set(PEERS)
    seen = []

    def note(wanted):
        seen.append((trio.current_time(), set(wanted)))
        return list(wanted)

    await asking.measure(PEERS[:1])
    with trio.move_on_after(70.0):
        await asking.watch(note, random.Random(1))
    assert {frozenset(wanted) for at, wanted in seen if at < 59} == {frozenset(PEERS[:1])}
    assert {frozenset(wanted) for at, wanted in seen if at > 61} == {frozenset()}


async def test_the_hop_of_a_session_is_watched_while_somebody_reads_the_answer(autojump_clock, asking):
    asking._host.answering = set(PEERS)
    asking.use(PEERS[0])
    with trio.move_on_after(USED_SECONDS + 60.0):
        await asking.watch(list, random.Random(1))
    count = asking._host.pings.count(PEERS[0])
    assert USED_SECONDS / (1.2 * WATCH_SECONDS) - 1 <= count <= USED_SECONDS / (0.8 * WATCH_SECONDS) + 1


async def test_as_many_hops_are_watched_as_peers_can_be_wanted(autojump_clock, asking):
    for number in range(3 * MAX_WANTED):
        asking.use(PeerId(f"hop {number}"))
        await trio.sleep(0.001)
    assert len(asking._used) == MAX_WANTED
    assert PeerId(f"hop {3 * MAX_WANTED - 1}") in asking._used


async def test_a_place_that_we_do_not_have_ourselves_says_nothing_of_the_peer(autojump_clock, asking):
    asking._host.fault = NoPlaceLeft("all are in use")
    assert await asking.measure(PEERS[:1]) == {}
    assert asking.answers.silent() == set()
    asking._host.fault = PeerGone("Connection refused")
    assert await asking.measure(PEERS[:1]) == {}
    assert asking.answers.silent() == set(PEERS[:1])
    assert asking.changes[-1] == set(PEERS[:1])


async def test_a_peer_without_an_address_cannot_be_reached(autojump_clock, asking):
    asking._addresses = lambda peer: ()
    asking._host.fault = PeerGone("none of its addresses is known")
    assert await asking.measure(PEERS[:1]) == {}
    assert asking.answers.silent() == set(PEERS[:1])


async def test_nobody_asks_himself(autojump_clock, asking):
    assert await asking.measure([ME]) == {}
    assert asking._host.most == 0


async def test_time_in_which_this_process_stood_still_is_not_held_against_the_peer(autojump_clock, asking):
    asking.ask(PEERS[0])
    await trio.sleep(0.05)
    autojump_clock.jump(100 * PING_SECONDS)
    await trio.sleep(0.05)
    assert asking.answers.silent() == set()
    assert asking.answers.under_way(PEERS[0]) is not None


async def test_only_while_somebody_monitors_more_peers_are_asked(autojump_clock, asking):
    asking._host.answering = set(PEERS)
    routes, given = PEERS[5:7], []

    def monitored(on_routes):
        given.append(list(on_routes))
        return [*on_routes, *PEERS[:4]]

    with trio.move_on_after(30.0):
        await asking.watch(lambda wanted: PEERS[:1], random.Random(1), monitored)
    assert set(asking._host.pings) == set(PEERS[:1])
    assert given == []
    asking._host.pings.clear()
    asking.monitor(30.0, lambda: routes)
    with trio.move_on_after(100.0):
        await asking.watch(lambda wanted: PEERS[:1], random.Random(1), monitored)
    assert set(asking._host.pings) == {*routes, *PEERS[:4]}
    assert given[0] == routes
    for peer in routes:
        most, least = (30 / (part * MONITOR_SECONDS) for part in (0.8, 1.2))
        assert least - 1 <= asking._host.pings.count(peer) <= most + 2
    assert asking._host.pings.count(PEERS[0]) > 2 * asking._host.pings.count(PEERS[1])


async def test_a_monitored_peer_whose_connection_ends_is_asked_at_the_next_look(autojump_clock, asking):
    host = asking._host
    host.answering = host.linked = set(PEERS[:2])
    asking.monitor(1000.0, tuple)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.watch, lambda wanted: (), random.Random(1), lambda routes: PEERS[:2])
        for _ in range(20):
            await trio.sleep(5.0)
            assert asking.answers.silent() == set()
            host.answering, host.linked = set(PEERS[1:2]), set(PEERS[1:2])
            host.fault = None
            await trio.sleep(LOOK_SECONDS + FAILURES * PING_SECONDS + 0.1)
            assert asking.liveness(PEERS[:2])[PEERS[0]].answers == "silent"
            host.answering = host.linked = set(PEERS[:2])
            await trio.sleep(2 * WATCH_SECONDS)
        nursery.cancel_scope.cancel()


async def test_a_monitored_peer_that_stands_still_is_silent_within_5_s(autojump_clock, asking):
    host = asking._host
    host.linked = {PEERS[0]}
    asking.monitor(10_000.0, tuple)
    rng = random.Random(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.watch, lambda wanted: (), random.Random(2), lambda routes: PEERS[:1])
        for _ in range(50):
            host.answering = {PEERS[0]}
            await trio.sleep(10.0 + rng.uniform(0.0, 3.0))
            assert asking.answers.silent() == set()
            host.answering = set()  # its connection stays open
            await trio.sleep(1.2 * MONITOR_SECONDS + FAILURES * LINKED_SECONDS + 0.05)
            assert asking.answers.silent() == {PEERS[0]}
        nursery.cancel_scope.cancel()


async def test_a_far_peer_has_more_time_for_its_answer(autojump_clock, asking):
    host = asking._host
    host.linked = host.answering = {PEERS[0]}
    asking.monitor(10_000.0, tuple)

    async def slow(peer, addresses):
        await trio.sleep(1.8)
        return 1.8

    host.ping = slow
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.watch, lambda wanted: (), random.Random(2), lambda routes: PEERS[:1])
        for _ in range(20):
            await trio.sleep(3.0)
            assert asking.answers.silent() == set()
        nursery.cancel_scope.cancel()


def test_a_monitor_asks_the_peers_of_sessions_and_those_with_the_rarest_blocks():
    def span(peer, start, stop):
        return Record(
            peer=peer, role="serve", model="m", revision="r", blocks=6, start=start, stop=stop,
            addresses=("/ip4/10.0.0.1/tcp/1",), seconds_per_block=0.01,
        )  # fmt: skip

    many = [PeerId(f"many {number:03}") for number in range(200)]
    records = [*(span(peer, 0, 3) for peer in many), span(PeerId("rare"), 3, 6)]
    view = SwarmView("public", entries={each.peer: Entry(each, b"", 0.0) for each in records})
    found = worth_monitoring(ME, lambda: view, [many[150], PeerId("gone"), *many[100:190]])
    assert found[:2] == [many[150], many[100]]
    assert len(found) <= MAX_ON_ROUTES + MAX_ASKED
    assert PeerId("rare") in found
    assert PeerId("gone") not in found
    assert found.index(PeerId("rare")) == MAX_ON_ROUTES
