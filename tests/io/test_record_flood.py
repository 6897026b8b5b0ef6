"""Thousands of made-up servers in gossip: what honest nodes hold, pass on, and still hear of each other."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio

from node.network.directory.directory import Directory
from node.network.directory.neighbour import Budgets
from node.network.directory.neighbours import PROTOCOL
from node.network.streams import FramedStream
from node.network.transport.identity import identity_of
from routing.view.exchange import encode_records
from routing.view.records import Record, sign_record, verify_record
from routing.view.view import Arrival
from tensor_codec.errors import PeerFault
from tests.fakes_network import FakeHost
from tests.io.test_directory import BOOTSTRAP, LIMITS, SERVER, Swarm, full_swarm

FORGED = 10_000


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery)
        nursery.cancel_scope.cancel()


def forge(count: int, seed: int = 1) -> list[Arrival]:
    """Valid records of peers that nobody has ever seen."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        identity = identity_of(rng.randbytes(32))
        address = f"/ip4/9.{rng.randrange(256)}.{rng.randrange(256)}.1/tcp/4001"
        length = rng.randint(1, 12)
        start = rng.randint(0, 30 - length)
        record = replace(
            SERVER, peer=identity.peer_id, addresses=(address,), start=start, stop=start + length, seq=1
        )
        made.append(Arrival(record, sign_record(record, identity.private_key)))
    return made


@pytest.fixture(scope="module")
def forged() -> list[Arrival]:
    return forge(FORGED)


class Flooder:
    """A peer that sends these records to a node as fast as the node reads them."""

    def __init__(self, swarm: Swarm, number: int) -> None:
        self.host = FakeHost(swarm.network, number, swarm.nursery, LIMITS)

    async def flood(self, victim: FakeHost, records: list[Arrival]) -> None:
        stream = await self.host.open_stream(victim.peer_id, victim.addresses, PROTOCOL, seconds=5)
        frames = list(encode_records(records))
        with trio.move_on_after(60.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drain, stream)
                for frame in frames:
                    await stream.send(frame, 60.0)

    async def _drain(self, stream: FramedStream) -> None:
        try:
            while await stream.receive() is not None:
                pass
        except PeerFault:
            return


def known_of(node: Directory, made: list[Arrival]) -> int:
    entries = node.view().entries
    return sum(arrival.record.peer in entries for arrival in made)


async def test_a_newcomer_is_seen_by_all_within_five_seconds_beside_ten_thousand_made_up_servers(
    autojump_clock: trio.testing.MockClock, swarm: Swarm, forged: list[Arrival]
):
    await full_swarm(swarm, 7)
    honest = {node.peer_id for node in swarm.nodes}
    for number, victim in enumerate(swarm.hosts[:4]):
        part = forged[number * 2500 :] + forged[: number * 2500]
        swarm.nursery.start_soon(Flooder(swarm, 500 + number).flood, victim, part)
    await trio.sleep(10.0)
    newcomer = await swarm.add(replace(SERVER, name="newcomer"))
    began = trio.current_time()
    with trio.fail_after(5.0):
        while not all(node.view().get(newcomer.peer_id) for node in swarm.nodes):  # noqa: ASYNC110
            await trio.sleep(0.1)
    assert trio.current_time() - began < 5.0
    for node in swarm.nodes:
        assert honest <= node.view().entries.keys()
        assert known_of(node, forged) < FORGED / 2


async def test_a_node_that_is_not_flooded_hears_of_few_made_up_servers(
    autojump_clock: trio.testing.MockClock, swarm: Swarm, forged: list[Arrival]
):
    await full_swarm(swarm, 3)
    swarm.nursery.start_soon(Flooder(swarm, 500).flood, swarm.hosts[0], forged)
    await trio.sleep(10.0)
    flooded, *others = (known_of(node, forged) for node in swarm.nodes)
    assert flooded > LIMITS.records_per_peer_burst
    per_lane = LIMITS.new_peers_per_neighbour_burst + 10 * LIMITS.new_peers_per_neighbour_per_second
    assert max(others) <= per_lane + 2
    late = await swarm.add(None)  # gets a whole view, without those that wait
    assert known_of(late, forged) <= per_lane + 2


async def test_a_newcomer_finds_its_place_in_a_view_that_a_flood_has_filled(
    autojump_clock: trio.testing.MockClock, forged: list[Arrival]
):
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery, limits=replace(LIMITS, max_records=500))
        await full_swarm(swarm, 3)
        nursery.start_soon(Flooder(swarm, 500).flood, swarm.hosts[0], forged)
        await trio.sleep(10.0)
        node = swarm.nodes[0]
        assert len(node.view().entries) == 500
        newcomer = await swarm.add(replace(SERVER, name="newcomer"))
        await trio.sleep(1.0)
        assert all(each.view().get(newcomer.peer_id) for each in swarm.nodes)
        assert all(node.view().get(each.peer_id) for each in swarm.nodes)
        nursery.cancel_scope.cancel()


async def test_other_tasks_have_their_turn_between_two_signatures(
    autojump_clock: trio.testing.MockClock, swarm: Swarm, monkeypatch: pytest.MonkeyPatch
):
    """A frame holds some thirty records; each takes a good part of a millisecond to verify."""
    await swarm.add(BOOTSTRAP)
    turns, longest, in_a_row = [0], [0], [0]
    real = verify_record

    def counting(wire: bytes, **options: object) -> Record:
        in_a_row[0] += 1
        longest[0] = max(longest[0], in_a_row[0])
        return real(wire, **options)  # type: ignore[arg-type]  # the same options

    async def ticker() -> None:
        while True:
            in_a_row[0] = 0
            turns[0] += 1
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr("node.network.directory.intake.verify_record", counting)
    autojump_clock.autojump_threshold = float("inf")  # the ticker never rests
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticker)
            flooder = Flooder(swarm, 500)
            nursery.start_soon(flooder.flood, swarm.hosts[0], forge(60, seed=2))
            while turns[0] < 5000:
                autojump_clock.jump(0.01)
                await trio.lowlevel.checkpoint()
            scope.cancel()
    assert known_of(swarm.nodes[0], forge(60, seed=2)) == 60
    assert longest[0] <= 2


async def test_neighbours_of_one_public_network_share_its_budget_and_those_at_home_have_none(
    autojump_clock: object,
) -> None:
    budgets = Budgets(replace(LIMITS, records_per_network_per_second=10.0, records_per_network_burst=20))

    def due(number: int, prefix: str, records: int, *, whole_view: bool = False) -> float:
        peer = identity_of(bytes([number]) * 32).peer_id
        return budgets.of(peer, prefix, whole_view=whole_view).records_due(records, trio.current_time())

    assert due(1, "8.8.8.1/32", 20) == 0.0
    assert due(2, "8.8.8.2/32", 10) == pytest.approx(1.0)
    assert due(3, "8.8.9.1/32", 20) == 0.0
    assert due(4, "127.0.0.1/32", 500) == 0.0
    assert due(5, "8.8.8.3/32", 500, whole_view=True) == 0.0
    await trio.sleep(3.0)
    assert due(6, "8.8.8.4/32", 20) == 0.0
