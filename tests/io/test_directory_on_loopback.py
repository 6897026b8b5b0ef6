"""The directory on real hosts over loopback: what the fake network is checked against."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio

from node.config import ConfigError
from node.network.directory.directory import DirectoryConfig, open_directory
from node.network.host import open_host
from node.network.transport.identity import load_or_create_identity
from routing.view.records import Record
from tensor_codec.limits import Limits

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LIMITS = Limits()
LATE_SECONDS = 15.0  # on a busy machine: less than from one announcement to the next
SERVER = Record(
    role="serve",
    model="m",
    revision="r",
    blocks=30,
    start=0,
    stop=10,
    dtype="float32",
    seconds_per_block=0.001,
    prefill_seconds_per_token=0.0001,
)


@asynccontextmanager
async def node(record, ways_in=(), **options):
    """A host and its directory.  record: None for a client, which does not listen."""
    identity = load_or_create_identity(None)
    listen = [LOOPBACK] if record else []
    async with (
        open_host(identity=identity, listen=listen, limits=options.get("limits", LIMITS)) as host,
        open_directory(
            host,
            identity,
            DirectoryConfig(
                swarm=host.swarm_id,
                bootstrap=tuple(ways_in),
                role=record.role if record else "client",
                **options,
            ),
        ) as directory,
    ):
        if record:
            await directory.announce(record)
        yield host, directory


def way_in(host) -> str:
    return f"{host.addresses[0]}/p2p/{host.peer_id}"


async def until(directory, condition) -> None:
    with trio.fail_after(LATE_SECONDS):
        while not condition(view := directory.view()):
            await directory.changed(view)


async def test_nodes_and_a_client_know_each_other_and_news_travels_at_once():
    async with AsyncExitStack() as stack:
        add = stack.enter_async_context
        host, first = await add(node(Record(role="bootstrap"), kademlia=False))
        servers = []
        for number in range(3):
            span = replace(SERVER, start=10 * number, stop=10 * number + 10)
            servers.append((await add(node(span, [way_in(host)], kademlia=False)))[1])
        _, client = await add(node(None, [way_in(host)], kademlia=False))
        assert len(client.view().spans("r", 30)) == 3  # nothing to wait for after connecting

        await servers[1].announce(replace(SERVER, start=10, stop=20, state="draining"))
        gone = servers[1].peer_id
        await until(client, lambda view: view.get(gone).state == "draining")

        await servers[1].leave()
        await until(client, lambda view: view.get(gone) is None)
        await until(first, lambda view: view.get(gone) is None)

        rtts = await client.measure([server.peer_id for server in servers])
        assert rtts.keys() >= {servers[0].peer_id, servers[2].peer_id}
        assert all(0 < rtt < LATE_SECONDS for rtt in rtts.values())


async def test_a_node_that_is_cut_off_leaves_the_view_within_its_ttl():
    limits = replace(LIMITS, record_ttl_seconds=1.5, announce_seconds=0.5)
    async with node(Record(role="bootstrap"), limits=limits, kademlia=False) as (host, first):
        async with node(SERVER, [way_in(host)], limits=limits, kademlia=False) as (_, server):
            await until(first, lambda view: view.get(server.peer_id))
            seen: set[int] = set()

            def is_renewed(view) -> bool:
                record, known = view.get(server.peer_id), len(seen)
                seen.update(() if record is None else (record.seq,))
                return len(seen) > known

            for _ in range(5):  # it is repeated, for longer than one record counts
                await until(first, is_renewed)
        # the block ended without `leave`
        await until(first, lambda view: view.get(server.peer_id) is None)


async def test_a_node_that_leaves_and_ends_at_once_is_gone_before_its_record_ends():
    async with node(Record(role="bootstrap"), kademlia=False) as (host, first):
        async with node(SERVER, [way_in(host)], kademlia=False) as (_, server):
            await until(first, lambda view: view.get(server.peer_id))
            await server.leave()
        await until(first, lambda view: view.get(server.peer_id) is None)


async def test_a_client_finds_the_servers_of_a_model_in_the_kademlia_table():
    """The servers' records are kept from the client: only the table can lead it to them."""
    async with AsyncExitStack() as stack:
        add = stack.enter_async_context
        host, _ = await add(node(Record(role="bootstrap")))
        servers = [(await add(node(SERVER, [way_in(host)])))[1] for _ in range(3)]
        _, client = await add(node(None, [way_in(host)]))
        assert client._discovery._finder is not None
        with trio.fail_after(20.0):
            while len(found := await client._discovery._finder.find("r", 2.0)) < 3:  # noqa: ASYNC110  by and by
                await trio.sleep(0.2)
        assert found.keys() == {server.peer_id for server in servers}
        assert all(
            address.startswith("/ip4/127.0.0.1/tcp/") for addresses in found.values() for address in addresses
        )
        assert await client._discovery._finder.find("another revision", 2.0) == {}
        assert len(await client.find_peers("r")) == 3


async def test_a_bootstrap_peer_that_is_not_there_is_an_error_within_its_deadline():
    async with open_host(identity=load_or_create_identity(None), listen=[LOOPBACK]) as host:
        address = way_in(host)
    with (
        trio.fail_after(LATE_SECONDS),
        pytest.raises(ConfigError, match="none of 1 peers could be reached"),
    ):
        async with node(None, [address], kademlia=False):
            pass


async def test_a_bootstrap_peer_of_a_private_swarm_is_an_error_that_says_so():
    identity = load_or_create_identity(None)
    async with (
        open_host(identity=identity, listen=[LOOPBACK], swarm_key=secrets.token_bytes(32)) as host,
        open_directory(
            host, identity, DirectoryConfig(swarm=host.swarm_id, role="bootstrap", kademlia=False)
        ),
    ):
        with trio.fail_after(LATE_SECONDS), pytest.raises(ConfigError, match=r"swarm key|member"):
            async with node(None, [way_in(host)], kademlia=False):
                pass


async def test_a_directory_with_its_kademlia_table_ends_quickly_and_leaves_no_task():
    async with trio.open_nursery() as nursery:
        async with node(Record(role="bootstrap")) as (host, _):
            async with node(SERVER, [way_in(host)]):
                await trio.sleep(0.5)
                began = trio.current_time()
            assert trio.current_time() - began < LATE_SECONDS
        assert not nursery.child_tasks


async def test_a_bootstrap_peer_that_has_only_just_started_is_dialled_again_and_not_banned():
    identity = load_or_create_identity(None)
    async with open_host(identity=identity, listen=[LOOPBACK], limits=LIMITS) as early:
        options = {"kademlia": False, "required": False, "patience_seconds": 1.5}
        async with node(None, [way_in(early)], **options) as (host, _):  # it asks several times meanwhile
            assert sum(host.faults.counts().values()) >= LIMITS.faults_before_ban
            assert host.faults.banned() == {}
            assert early.faults.banned() == {}
