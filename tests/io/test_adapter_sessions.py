"""Sessions with an adapter: every hop gets it first, one that replaces another too, and no hop is blamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from client.adapters.upload import AdapterUploads, AdapterUse, Needs, kept_name
from client.chains.chain_choice import chooser_for
from client.session.session import Session
from node.serving.adapters.store import manifest_bytes
from routing.chains.hops import NoChain
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.adapters import AdapterContent
from tensor_codec.blocks import Blocks
from tensor_codec.errors import TooManyStreams
from tensor_codec.limits import MIB, Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.fields import Failed
from tests.adapter_fixtures import a_desk, content
from tests.fakes_serving import (
    CLIENT,
    FakeCache,
    FakeSpan,
    RawClient,
    World,
    some_hidden,
    swarm,
    until,
)

BLOCKS, RANK = 9, 2
OWN = content(RANK, blocks=BLOCKS)
OWN_RUN = Blocks(0, 3)


def three_hops(world: World, names: str = "abc", capacity: int = MIB, **served: Any) -> World:
    for name, start in zip(names, (0, 3, 6), strict=True):
        desk = a_desk(world.limits, blocks=BLOCKS, capacity=capacity)
        world.add(name, start, start + 3, desk=desk, **served)
    return world


def uploads(world: World) -> AdapterUploads:
    info: Any = SimpleNamespace(revision="r", blocks=BLOCKS)
    return AdapterUploads(world.limits, info, lambda peer: world.dial(CLIENT, peer, ADAPTER_PROTOCOL))


async def opened(world: World, own: AdapterContent | str = OWN, at: AdapterUploads | None = None) -> Session:
    use = (at or uploads(world)).use_of(own, world.view())
    assert use is not None
    return await world.open(adapter=use, routes=chooser_for(world.routes(), Needs(adapter=use)))


def expected(hidden: Tensor, rank: int = RANK) -> Tensor:
    """What the whole model makes of the hidden states, each block adding the adapter's rank."""
    cache = FakeCache(hidden.shape[0], hidden.shape[1])
    adapter: Any = SimpleNamespace(rank=rank)
    return FakeSpan(0, BLOCKS).forward(hidden, cache, 0, 0, BLOCKS, adapter=adapter)


async def answers(session: Session, hidden: Tensor, steps: Sequence[int]) -> Tensor:
    found, begin = [], 0
    for tokens in steps:
        found.append(await session.step(hidden[:, begin : begin + tokens]))
        begin += tokens
    return torch.cat([each for each in found if each is not None], 1)


def adapter_streams(world: World) -> int:
    """Streams for adapters that the client has opened so far."""
    return sum(stream.protocol == ADAPTER_PROTOCOL for stream in world.client_streams)


async def test_all_hops_compute_with_the_adapter_in_prefill_and_decode(autojump_clock: object) -> None:
    hidden = some_hidden(6)
    async with swarm() as world:
        three_hops(world)
        session = await opened(world)
        assert torch.equal(await answers(session, hidden, (3, 1, 1, 1)), expected(hidden))
        assert not torch.equal(expected(hidden), expected(hidden, 0))
        assert [node.faults for node in world.nodes.values()] == [{}, {}, {}]
        await session.aclose()


async def test_the_adapter_goes_to_all_hops_at_once_and_to_each_its_own_blocks(
    autojump_clock: object,
) -> None:
    async with swarm() as world:
        three_hops(world, seconds=1.0)  # of the torch thread: for each blob, and for each step
        began = trio.current_time()
        session = await opened(world)
        assert trio.current_time() - began == pytest.approx(3.0)  # three blobs at each hop, not nine
        for node in world.nodes.values():
            assert node.adapters is not None
            size = sum(len(OWN.blobs[block]) for block in range(*node.blocks))
            assert node.adapters.desk.store.claims.used == size + manifest_bytes(OWN.manifest)
        await session.aclose()


async def test_a_second_session_brings_nothing_and_asks_nothing(autojump_clock: object) -> None:
    hidden = some_hidden(2)
    async with swarm() as world:
        three_hops(world)
        at = uploads(world)
        first = await opened(world, at=at)
        asked = len(world.dialled)
        second = await opened(world, at=at)
        assert sorted(to for me, to in world.dialled[asked:] if me == CLIENT) == ["a", "b", "c"]
        assert adapter_streams(world) == 3
        assert torch.equal(await answers(second, hidden, (2,)), expected(hidden))
        await first.aclose()
        await second.aclose()


async def test_a_hop_that_has_forgotten_the_adapter_gets_it_again_and_is_not_left(
    autojump_clock: object,
) -> None:
    hidden = some_hidden(3)
    async with swarm() as world:
        three_hops(world)
        world.add("spare", 3, 6, desk=a_desk(blocks=BLOCKS), seconds=5.0)
        at = uploads(world)
        first = await opened(world, at=at)
        hops = [hop.peer for hop in first.chain.hops]
        await first.aclose()
        await until(lambda: world.quiet)
        middle = world.nodes[hops[1]]
        assert middle.adapters is not None
        middle.adapters.desk.store.drop(CLIENT, OWN.id)
        second = await opened(world, at=at)
        assert [hop.peer for hop in second.chain.hops] == hops
        assert torch.equal(await answers(second, hidden, (2, 1)), expected(hidden))
        assert adapter_streams(world) == 4
        assert second.trace.counts["fault"] == 0
        assert world.routes().blame.avoided(trio.current_time()) == frozenset()
        await second.aclose()


async def test_a_hop_that_dies_is_replaced_by_one_that_gets_the_adapter_first(autojump_clock: object) -> None:
    hidden = some_hidden(7)
    async with swarm() as world:
        three_hops(world)
        session = await opened(world)
        first = await answers(session, hidden, (3, 1))
        dead = session.chain.hops[1].peer
        world.add("spare", 3, 6, desk=a_desk(blocks=BLOCKS))
        await world.kill(dead)
        rest = await answers(session, hidden[:, 4:], (1, 1, 1))
        assert torch.equal(torch.cat([first, rest], 1), expected(hidden))
        assert session.chain.hops[1].peer == "spare"
        await session.aclose()


async def test_the_session_keeps_the_adapter_as_it_was(autojump_clock: object) -> None:
    hidden = some_hidden(4)
    limits = replace(Limits(), max_adapters_per_peer=1)
    async with swarm(limits) as world:
        three_hops(world)
        at = uploads(world)
        session = await opened(world, at=at)
        first = await answers(session, hidden, (2,))
        await session.aclose()
        await until(lambda: world.quiet)
        again = await opened(world, content(1, blocks=BLOCKS), at=at)  # the other one makes room
        assert torch.equal(await answers(again, hidden, (4,)), expected(hidden, 1))
        third = world.nodes[PeerId("a")].adapters
        assert third is not None
        assert not third.desk.store.missing(CLIENT, content(1, blocks=BLOCKS).id, range(3))
        assert third.desk.store.missing(CLIENT, OWN.id, range(3))
        assert torch.equal(first, expected(hidden)[:, :2])
        await again.aclose()


async def test_an_adapter_in_use_stays_and_another_one_is_told_to_come_back(autojump_clock: object) -> None:
    limits = replace(Limits(), max_adapters_per_peer=1)
    async with swarm(limits) as world:
        three_hops(world)
        at = uploads(world)
        session = await opened(world, at=at)
        use = at.use_of(content(1, blocks=BLOCKS), world.view())
        assert use is not None
        with pytest.raises(TooManyStreams, match="adapters of yours are in use"):
            await world.open(
                adapter=use,
                routes=chooser_for(world.routes(), Needs(adapter=use)),
                deadline=trio.current_time() + 3,
            )
        await session.aclose()


async def test_servers_without_adapters_are_not_asked(autojump_clock: object) -> None:
    async with swarm() as world:
        three_hops(world)
        world.add("old", 0, BLOCKS)
        session = await opened(world)
        assert "old" not in [hop.peer for hop in session.chain.hops]
        await session.aclose()
        del world.nodes[PeerId("b")]
        use = uploads(world).use_of(OWN, world.view())
        assert use is not None
        with pytest.raises(NoChain, match="3:6"):
            await world.open(
                adapter=use,
                routes=chooser_for(world.routes(), Needs(adapter=use)),
                deadline=trio.current_time() + 1,
            )


async def test_an_adapter_that_nobody_brought_is_refused_by_its_code_without_a_fault(
    autojump_clock: object,
) -> None:
    async with swarm() as world:
        node = world.add("a", 0, BLOCKS, desk=a_desk(blocks=BLOCKS))
        client, reply = await RawClient.open(world, "a", adapter=OWN.id)
        assert isinstance(reply, Failed)
        assert (reply.code, reply.retry_after_seconds) == ("no_adapter", None)
        assert node.faults == {}
        await client.stream.aclose()


async def test_rows_of_sessions_with_different_adapters_share_a_batch(autojump_clock: object) -> None:
    hidden = some_hidden(3)
    async with swarm() as world:
        node = world.add("a", 0, BLOCKS, desk=a_desk(blocks=BLOCKS), seconds=0.1)
        at, ranks = uploads(world), (1, 2, 0)
        sessions = [await opened(world, content(rank, blocks=BLOCKS), at=at) for rank in ranks[:2]]
        sessions.append(await world.open())
        found: dict[int, Tensor] = {}

        async def run(index: int) -> None:
            found[index] = await answers(sessions[index], hidden, (1, 1, 1))

        async with trio.open_nursery() as nursery:
            for index in range(3):
                nursery.start_soon(run, index)
        for index, rank in enumerate(ranks):
            assert torch.equal(found[index], expected(hidden, rank)), rank
        assert max(map(len, node.span.batches)) == 3
        for session in sessions:
            await session.aclose()


async def test_an_adapter_of_the_operators_is_used_by_its_name(autojump_clock: object) -> None:
    hidden = some_hidden(3)
    async with swarm() as world:
        three_hops(world)
        world.add("other", 0, BLOCKS, desk=a_desk(blocks=BLOCKS))
        for name in "abc":
            listener = world.nodes[PeerId(name)].adapters
            assert listener is not None
            listener.desk.store.keep("poems", OWN.id, OWN.manifest)
            for block in range(*world.nodes[PeerId(name)].blocks):
                kept = listener.desk.read(
                    OWN.manifest.blocks[block], listener.shapes()[block], "fp32", OWN.blobs[block]
                )
                listener.desk.store.put(OWN.id, block, kept)
        session = await opened(world, "poems")
        assert [hop.peer for hop in session.chain.hops] == ["a", "b", "c"]
        assert torch.equal(await answers(session, hidden, (2, 1)), expected(hidden))
        assert adapter_streams(world) == 0
        await session.aclose()
        by_content = await opened(world)  # who has the same adapter brings nothing to those servers
        assert torch.equal(await answers(by_content, hidden, (3,)), expected(hidden))
        await by_content.aclose()


def test_one_name_of_several_adapters_means_the_one_that_most_blocks_have() -> None:
    def record(start: int, stop: int, *adapters: str, revision: str = "r") -> Record:
        return Record(revision=revision, start=start, stop=stop, adapters=adapters)

    records = [
        record(0, 3, "poems#1111111111111111", "prose#3333333333333333"),
        record(3, 9, "poems#2222222222222222"),
        record(0, 9, "poems#4444444444444444", revision="x"),
    ]
    assert kept_name("poems", records, "r") == "poems#2222222222222222"
    assert kept_name("poems#1111111111111111", records, "r") == "poems#1111111111111111"
    assert kept_name("unknown", records, "r") == "unknown"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (content(blocks=BLOCKS, revision="x"), "9 blocks of revision x, the model has 9 of revision r"),
        (content(blocks=5), "5 blocks of revision r, the model has 9"),
    ],
)
async def test_an_adapter_of_another_model_is_refused_before_anything_is_sent(
    own: AdapterContent, words: str
) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        with pytest.raises(ValueError, match=words):
            uploads(world).use_of(own, SwarmView("", entries={}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.1e4])
async def test_values_that_no_server_takes_are_refused_before_anything_is_sent(value: float) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        with pytest.raises(
            ValueError, match=r"an adapter's values in block 0 reach (nan|inf|11000), 10000 is"
        ):
            uploads(world).use_of(content(blocks=BLOCKS, values=[value] * 8), SwarmView("", entries={}))


async def test_an_adapter_without_a_site_costs_nothing(autojump_clock: object) -> None:
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        nothing = content(blocks=BLOCKS, empty=range(BLOCKS))
        assert uploads(world).use_of(nothing, SwarmView("", entries={})) is None


def test_the_time_of_an_opening_grows_with_the_bytes_to_bring() -> None:
    async def main() -> float:
        async with trio.open_nursery() as nursery:
            use = uploads(World(nursery)).use_of(OWN, SwarmView("", entries={}))
            assert isinstance(use, AdapterUse)
            return use.seconds_for(PeerId("a"), OWN_RUN)

    limits = Limits()
    size = sum(map(len, OWN.blobs[:3]))
    expected_seconds = limits.frame_start_seconds + size / limits.frame_floor_bytes_per_second
    assert trio.run(main) == pytest.approx(expected_seconds)
