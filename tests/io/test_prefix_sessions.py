"""Sessions after a prefix: every hop has it in its cache first, counts its places, and takes it out again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from client.adapters.upload import AdapterUploads, Needs
from client.batch_parts import BatchCutter
from client.chains.chain_choice import chooser_for
from client.session.session import Session
from node.serving.adapters.desk import OwnAdapter, open_desk
from node.serving.forward_backward import ForwardBackwardListener
from node.serving.span_admission import SpanAdmission
from routing.names import PeerId
from routing.view.view import SwarmView
from tensor_codec.adapters import AdapterContent
from tensor_codec.blocks import Blocks
from tensor_codec.errors import MessageError, Refused
from tensor_codec.limits import MIB, Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import Opened
from tensor_codec.span_spec import SpanSpec
from tests.adapter_fixtures import a_desk, prefix, shapes
from tests.fakes_serving import (
    CLIENT,
    HIDDEN,
    FakeCache,
    FakeCompute,
    FakeSpan,
    RawClient,
    World,
    some_hidden,
    swarm,
    until,
)

BLOCKS, COUNT = 9, 20  # virtual tokens: more than a page
OWN = prefix(COUNT, blocks=BLOCKS)
PAGES = 32  # positions of two pages


def three_hops(world: World) -> None:
    for name, start in zip("abc", (0, 3, 6), strict=True):
        world.add(name, start, start + 3, desk=a_desk(world.limits, blocks=BLOCKS), tokens=4096)


def uploads(world: World) -> AdapterUploads:
    info: Any = SimpleNamespace(revision="r", blocks=BLOCKS)
    return AdapterUploads(world.limits, info, lambda peer: world.dial(CLIENT, peer, ADAPTER_PROTOCOL))


async def opened(world: World, own: AdapterContent = OWN) -> Session:
    use = uploads(world).use_of(own, world.view())
    assert use is not None
    return await world.open(adapter=use, routes=chooser_for(world.routes(), Needs(adapter=use)))


def expected(hidden: Tensor, own: AdapterContent = OWN) -> Tensor:
    """What the whole model makes of the hidden states after a prefix."""
    cache = FakeCache(hidden.shape[0], hidden.shape[1])
    for block, blob in enumerate(own.blobs):
        cache.prefix[block] = int(torch.frombuffer(bytearray(blob), dtype=torch.float32).sum())
    return FakeSpan(0, BLOCKS).forward(hidden, cache, 0, 0, BLOCKS)


async def answers(session: Session, hidden: Tensor, *steps: int) -> Tensor:
    found, begin = [], 0
    for tokens in steps:
        found.append(await session.step(hidden[:, begin : begin + tokens]))
        begin += tokens
    return torch.cat([each for each in found if each is not None], 1)


async def test_all_hops_compute_after_the_prefix_in_prefill_and_decode(autojump_clock: object) -> None:
    hidden = some_hidden(6)
    async with swarm() as world:
        three_hops(world)
        session = await opened(world)
        assert torch.equal(await answers(session, hidden, 3, 1, 1, 1), expected(hidden))
        assert not torch.equal(expected(hidden), expected(hidden, prefix(COUNT, blocks=BLOCKS, seed=1)))
        assert [node.faults for node in world.nodes.values()] == [{}, {}, {}]
        await session.aclose()


async def test_a_hop_that_dies_is_replaced_by_one_that_has_the_prefix_before_the_replay(
    autojump_clock: object,
) -> None:
    hidden = some_hidden(7)
    async with swarm() as world:
        three_hops(world)
        session = await opened(world)
        first = await answers(session, hidden, 3, 1)
        dead = session.chain.hops[1].peer
        world.add("spare", 3, 6, desk=a_desk(blocks=BLOCKS))
        await world.kill(dead)
        rest = await answers(session, hidden[:, 4:], 1, 1, 1)
        assert torch.equal(torch.cat([first, rest], 1), expected(hidden))
        assert session.chain.hops[1].peer == "spare"
        await session.aclose()


async def test_the_places_of_a_prefix_are_counted_and_given_back(autojump_clock: object) -> None:
    async with swarm() as world:
        three_hops(world)
        budgets = [node.listener.budget for node in world.nodes.values()]
        session = await opened(world)
        assert [each.free_tokens for each in budgets] == [4096 - PAGES] * 3  # before any step
        await session.step(some_hidden(PAGES - COUNT))
        assert [each.free_tokens for each in budgets] == [4096 - PAGES] * 3
        await session.step(some_hidden(1))
        assert [each.free_tokens for each in budgets] == [4096 - PAGES - 16] * 3
        await session.aclose()
        await until(lambda: world.quiet)
        assert [each.free_tokens for each in budgets] == [4096] * 3


async def bring(world: World, peer: str, own: AdapterContent) -> None:
    use = uploads(world).use_of(own, world.view())
    assert use is not None
    blocks = world.nodes[PeerId(peer)].listener.admission.spec.blocks
    await use.bring(PeerId(peer), SpanSpec("m", "r", blocks, "float32"))


async def test_a_session_has_as_many_positions_as_the_model_after_its_prefix(autojump_clock: object) -> None:
    async with swarm() as world:
        world.add("a", 0, BLOCKS, desk=a_desk(blocks=BLOCKS), max_position=100)
        await bring(world, "a", OWN)
        for length, answer in ((100 - COUNT, Opened), (101 - COUNT, Failed)):
            client, reply = await RawClient.open(world, "a", adapter=OWN.id, max_length=length)
            assert isinstance(reply, answer)
            if isinstance(reply, Failed):
                assert reply.code == "refused"
                assert f"81 positions after a prefix of {COUNT}, the model has 100" in reply.message
            await client.stream.aclose()
            await until(lambda: world.quiet)


async def test_a_prefix_for_which_the_cache_has_no_room_is_refused(autojump_clock: object) -> None:
    async with swarm() as world:
        world.add("a", 0, BLOCKS, desk=a_desk(blocks=BLOCKS), tokens=32)
        await bring(world, "a", OWN)
        client, reply = await RawClient.open(world, "a", adapter=OWN.id, max_length=13)
        assert isinstance(reply, Failed)
        assert reply.code == "cache_full"
        await client.stream.aclose()
        fitting, reply = await RawClient.open(world, "a", adapter=OWN.id, max_length=12)
        assert isinstance(reply, Opened)
        await fitting.stream.aclose()


async def test_a_cut_leaves_the_prefix_where_it_is(autojump_clock: object) -> None:
    hidden = some_hidden(40)
    async with swarm() as world:
        three_hops(world)
        budget = world.nodes[PeerId("a")].listener.budget
        session = await opened(world)
        first = await answers(session, hidden, 40)
        assert budget.free_tokens == 4096 - 64
        again = await session.step(hidden[:, 3:5], 3)
        assert again is not None
        assert torch.equal(again, first[:, 3:5])
        assert budget.free_tokens == 4096 - PAGES
        await session.aclose()


def test_more_virtual_tokens_than_servers_take_are_refused_before_anything_is_sent() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery, Limits(max_adapter_virtual_tokens=COUNT - 1))
            with pytest.raises(ValueError, match=f"a prefix of {COUNT} virtual tokens, {COUNT - 1} are"):
                uploads(world).use_of(OWN, SwarmView("", entries={}))

    trio.run(main)


async def test_servers_that_take_no_adapters_are_not_asked_for_a_prefix(autojump_clock: object) -> None:
    async with swarm() as world:
        three_hops(world)
        world.add("old", 0, BLOCKS)
        session = await opened(world)
        assert "old" not in [hop.peer for hop in session.chain.hops]
        await session.aclose()


async def test_a_prefix_is_no_adapter_that_an_operator_keeps_for_all() -> None:
    own = OwnAdapter("poems", OWN.id, OWN.manifest, OWN.blobs)
    desk = open_desk(Limits(), BLOCKS, "cpu", MIB, MIB, (own,))
    with pytest.raises(MessageError, match="poems is a prefix: clients bring theirs, only lora is kept"):
        await desk.load_own(range(*Blocks(0, 2)), shapes(0, 2), FakeCompute())


def test_rows_are_cut_so_that_they_fit_with_the_places_of_their_prefix() -> None:
    info: Any = SimpleNamespace(blocks=BLOCKS, hidden_size=HIDDEN, max_position=64)
    cutter = BatchCutter(info, Limits(max_step_tokens=100), "fp32")
    hidden = torch.zeros(7, 5, HIDDEN)
    assert [len(part.hidden) for part in cutter.cut(hidden, 0, BLOCKS)] == [7]
    assert [len(part.hidden) for part in cutter.cut(hidden, 0, BLOCKS, first=COUNT)] == [4, 3]
    with pytest.raises(ValueError, match=r"rows of 45 positions after a prefix of 20, the model has 64"):
        cutter.cut(torch.zeros(1, 45, HIDDEN), 0, BLOCKS, first=COUNT)


@pytest.mark.parametrize(
    ("batch", "tokens", "words"),
    [
        (1, 81, "81 positions after a prefix of 20 were sent, the model has 100"),
        (5, 21, "5 rows of 21 positions after a prefix of 20 were sent, 200 positions are allowed"),
    ],
)
def test_a_server_refuses_rows_for_which_it_has_no_room_after_a_prefix(
    batch: int, tokens: int, words: str
) -> None:
    spec = SpanSpec("m", "r", Blocks(0, BLOCKS), "float32", hidden=HIDDEN, max_position=100)
    engine: Any = None
    listener = ForwardBackwardListener(SpanAdmission(spec), engine, Limits(max_step_tokens=200))
    contract = Contract(b"", 0, BLOCKS, batch, tokens, HIDDEN, "fp32", 200)
    adapter: Any = SimpleNamespace(virtual_tokens=COUNT)
    with pytest.raises(Refused, match=words):
        listener._tokens(contract, adapter)
    assert listener._tokens(Contract(b"", 0, BLOCKS, 2, 80, HIDDEN, "fp32", 200), adapter) == 100
    assert listener._tokens(contract, None) == tokens


def test_the_fixture_has_a_key_of_hidden_values() -> None:
    assert {len(blob) for blob in OWN.blobs} == {2 * COUNT * HIDDEN * 4}
