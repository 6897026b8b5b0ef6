"""Visits among servers: a node whose neighbours are all attackers still hears of honest servers."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from node.network.directory.directory import Directory
from node.network.directory.neighbour import RECORDS_AT_ONCE, Neighbour
from node.network.directory.neighbours import NEIGHBOURS, PROTOCOL
from node.network.directory.visits import VISIT_SECONDS
from node.network.streams import FramedStream
from routing.names import PeerId, peer_id_of
from routing.view.exchange import Records, decode, encode_digest, encode_records
from routing.view.records import Record, sign_record, signer
from routing.view.view import Arrival
from tests.fakes_network import FakeHost, FakeNetwork
from tests.io.test_directory import LIMITS, SERVER, Swarm, full_swarm

HONEST_LATER, NEWCOMER = 50, 60


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery)
        nursery.cancel_scope.cancel()


class Liars:
    """Peers that tell of each other alone, or that say nothing at all."""

    def __init__(self, swarm: Swarm, count: int, *, silent: bool = False) -> None:
        self.silent = silent
        self.streams = 0
        self.hosts = [FakeHost(swarm.network, 100 + number, swarm.nursery, LIMITS) for number in range(count)]
        for host in self.hosts:
            host.handle(PROTOCOL, self.serve)

    @property
    def arrivals(self) -> list[Arrival]:
        made = []
        for host in self.hosts:
            record = replace(SERVER, peer=host.peer_id, addresses=host.addresses, seq=1)
            made.append(Arrival(record, sign_record(record, host.identity.private_key)))
        return made

    async def serve(self, stream: FramedStream) -> None:
        self.streams += 1
        if not self.silent:
            for frame in [*encode_records(self.arrivals), *encode_digest({}, ask=False)]:
                await stream.send(frame)
        while await stream.receive() is not None:
            pass


def multiaddr(number: int) -> str:
    return FakeHost(FakeNetwork(), number, None, LIMITS).multiaddr


async def until_known(node: Directory, swarm: Swarm, seconds: float) -> float:
    """Wait until a node knows every node of the swarm; the seconds that this took."""
    began, everybody = trio.current_time(), {each.peer_id for each in swarm.nodes if each is not node}
    with trio.fail_after(seconds):
        while not everybody <= node.view().entries.keys():  # noqa: ASYNC110  of a whole view
            await trio.sleep(0.1)
    return trio.current_time() - began


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("record", [None, SERVER])
async def test_a_bootstrap_peer_that_comes_back_is_found_by_a_node_whose_neighbours_are_all_attackers(
    autojump_clock: MockClock, swarm: Swarm, record: Record | None, silent: bool
):
    await full_swarm(swarm, 3)
    liars = Liars(swarm, 7, silent=silent)
    bootstrap = [*(host.multiaddr for host in liars.hosts), multiaddr(HONEST_LATER)]
    newcomer = await swarm.add(record, bootstrap, NEWCOMER, required=False)
    await trio.sleep(20.0)
    assert not {node.peer_id for node in swarm.nodes[:4]} & newcomer.view().entries.keys()
    await swarm.add(SERVER, number=HONEST_LATER, bootstrap=[swarm.hosts[0].multiaddr])
    assert await until_known(newcomer, swarm, 60.0) <= VISIT_SECONDS * 1.2 + 1.0


async def test_neighbours_that_say_nothing_give_their_places_to_others_within_seconds(
    autojump_clock: MockClock, swarm: Swarm
):
    await full_swarm(swarm, 1)
    liars = Liars(swarm, 12, silent=True)
    newcomer = await swarm.add(None, [host.multiaddr for host in liars.hosts[:3]], NEWCOMER, required=False)
    newcomer._live.merge(liars.arrivals)
    await trio.sleep(2.0)
    assert liars.streams == NEIGHBOURS
    await trio.sleep(2 * LIMITS.reply_taken_seconds + 5.0)
    assert liars.streams >= 2 * NEIGHBOURS


async def test_a_visited_server_hears_of_the_visitor_s_peers(autojump_clock: MockClock, swarm: Swarm):
    """Two swarms that have no neighbour in common become one by a visit of one node."""
    await full_swarm(swarm, 3)
    other = Swarm(swarm.nursery)
    other.network, other.numbers = swarm.network, itertools.count(30)
    await full_swarm(other, 3)
    theirs = {node.peer_id for node in other.nodes}
    await swarm.nodes[2]._neighbours.ask_once(other.hosts[1].peer_id, other.hosts[1].addresses)
    await trio.sleep(5.0)
    assert all(theirs <= node.view().entries.keys() for node in swarm.nodes)
    assert all({each.peer_id for each in swarm.nodes} <= node.view().entries.keys() for node in other.nodes)


async def test_our_own_record_goes_out_before_a_crowd_of_others(autojump_clock: MockClock, swarm: Swarm):
    """Also one that is owed while the crowd is on its way to a slow reader."""
    node = await swarm.add(SERVER)
    crowd = Liars(swarm, 120).arrivals
    node._live.merge(crowd)
    ours, theirs = trio.testing.memory_stream_pair()
    reader = FramedStream(theirs, PeerId("reader"), PROTOCOL, LIMITS)
    neighbour = Neighbour(FramedStream(ours, PeerId("node"), PROTOCOL, LIMITS), ours=True)
    neighbour.owe([*(arrival.record.peer for arrival in crowd), node.peer_id])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour.send_forever, node.view, node.peer_id)
        peers = []
        while len(peers) < 121:
            frame = await reader.receive()
            match decode(frame or b""):
                case Records(items):
                    peers += [peer_id_of(signer(wire)) for wire, _ in items]
        nursery.cancel_scope.cancel()
    assert peers[0] == node.peer_id
    assert len(set(peers)) == 121


def test_our_own_record_is_taken_before_the_rest_of_a_crowd():
    neighbour = Neighbour(cast("FramedStream", SimpleNamespace(peer=PeerId("other"))), ours=True)
    owed: dict[PeerId, None] = dict.fromkeys(PeerId(f"peer {number}") for number in range(100))
    assert len(neighbour._next_part(owed, PeerId("own"))) == RECORDS_AT_ONCE
    neighbour.owe([PeerId("own")])
    assert neighbour._next_part(owed, PeerId("own")) == [PeerId("own")]
    assert not neighbour._owed
    assert len(owed) == 100 - RECORDS_AT_ONCE
