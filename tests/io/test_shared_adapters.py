"""A shared adapter's way through a swarm in memory: from a seeder's entry to a client's bytes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from client.sharing.catalogue import Sharing
from client.sharing.fetch import fetch
from node.network.directory.kademlia.kademlia import Kademlia, Knowledge, open_kademlia
from node.network.sharing.announcing import MAX_ADAPTER_KEYS, keep_announced, keys_of
from node.network.sharing.seeder import Seeder
from node.network.sharing.seeds import Seeds
from routing.names import PeerId
from routing.view.view import SwarmView
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tests.adapter_fixtures import content
from tests.fakes_network import FakeHost, FakeNetwork
from tests.sharing_fixtures import LIMITS, seed, sizes_of

OWN = content(2)


class World:
    """Hosts with Kademlia tables; the first one is everybody's way in."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = FakeNetwork()
        self.nursery = nursery
        self.hosts: list[FakeHost] = []

    async def add(self, *, serves: bool) -> tuple[FakeHost, Kademlia]:
        host = FakeHost(self.network, len(self.hosts) + 1, self.nursery, LIMITS)
        table: Kademlia = await self.nursery.start(self._run, host, serves)
        self.hosts.append(host)
        return host, table

    async def _run(self, host: FakeHost, serves: bool, task_status: object) -> None:
        ways_in = {each.peer_id: each.addresses for each in self.hosts[:1]}
        knowledge = Knowledge("public", ways_in, self._addresses)
        async with open_kademlia(host, knowledge, LIMITS, random.Random(1), serves=serves) as table:
            task_status.started(table)  # type: ignore[attr-defined]  # trio's TaskStatus
            await trio.sleep_forever()

    def _addresses(self, peer: PeerId) -> tuple[str, ...]:
        """By records, which seeders that serve no blocks do not send."""
        known = [host for host in self.hosts[:3] if host.peer_id == peer]
        return known[0].addresses if known else ()

    async def seeder(self, *numbers: int) -> FakeHost:
        """A client that gives adapters."""
        host, table = await self.add(serves=False)
        seeds = Seeds([seed(content(2, seed=number), f"a{number}") for number in numbers])
        host.handle(ADAPTER_PROTOCOL, Seeder(seeds, LIMITS).serve)
        self.nursery.start_soon(keep_announced, table, keys_of(seeds, "public"), random.Random(2))
        return host

    async def client(self) -> Sharing:
        host, table = await self.add(serves=False)
        return Sharing(host, host.peer_id, "public", table, lambda: SwarmView("public"), LIMITS)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        one = World(nursery)
        for _ in range(3):
            await one.add(serves=True)
        yield one
        nursery.cancel_scope.cancel()


async def test_a_seeder_is_found_and_gives_its_adapter_until_it_is_gone(autojump_clock: object):
    async with world() as one:
        first, second = await one.seeder(0, 1), await one.seeder(0)
        await trio.sleep(30)
        sharing = await one.client()
        found = {each.card.name: each for each in await sharing.catalogue("r")}
        assert set(found) == {"a0", "a1"}
        assert found["a0"].seeders == tuple(sorted((first.peer_id, second.peer_id)))
        del one.network.hosts[first.peer_id]  # nobody reaches it, and it reaches nobody
        assert await fetch(sharing, found["a0"], sizes_of) == OWN
        await trio.sleep(LIMITS.provider_life_seconds + 70)
        later = await (await one.client()).catalogue("r")
        assert [(each.card.name, each.seeders) for each in later] == [("a0", (second.peer_id,))]


async def test_a_seeder_of_many_adapters_is_found_by_its_cards(autojump_clock: object):
    async with world() as one:
        host = await one.seeder(*range(9))
        await trio.sleep(60)
        sharing = await one.client()
        found = await sharing.catalogue("r")
        assert len(found) == 9
        assert {each.seeders for each in found} == {(host.peer_id,)}
        for each in found:
            content_of = await fetch(sharing, each, sizes_of)
            assert content_of.id == each.card.id


def test_a_seeder_has_as_many_keys_as_a_table_holds_for_a_peer():
    seeds = Seeds([seed(content(2, seed=number, revision=f"r{number % 2}")) for number in range(9)])
    keys = keys_of(seeds, "public")
    assert len(set(keys)) == len(keys) == 2 + MAX_ADAPTER_KEYS
    assert len(keys) + 2 <= LIMITS.max_provider_keys_per_peer  # a server's two revisions besides
    assert keys_of(seeds, "another") != keys
