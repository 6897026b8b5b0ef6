"""Sessions over some blocks, long inputs of hidden states, and steps without a position."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
import trio

from client.session.inputs import CHUNKS_UNDER_WAY, LONG_PREFILL_TOKENS, PREFILL_TOKENS
from client.session.session import Session
from routing.blocks import Blocks
from routing.chains.hops import Hop, NoChain
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tests.fakes_serving import HIDDEN, World, some_hidden, swarm, whole_model

SPANS = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}


def world_of(world: World, *names: str, seconds: float = 0.0) -> World:
    """The nodes of `SPANS`, or those with these names; "A" is a second one with the blocks of "a"."""
    for name in names or SPANS:
        world.add(name, *SPANS[name.lower()], seconds=seconds)
    return world


# A run of blocks


@pytest.mark.parametrize("run", [(0, 6), (3, 4), (3, 5), (2, 6), (0, 1)])
async def test_a_session_over_a_run_gives_what_its_blocks_give(run, autojump_clock):
    async with swarm() as world:
        world_of(world)
        session = await world.open(run=Blocks(*run))
        hidden = some_hidden(9)
        found = torch.cat([await session.step(hidden[:, :5]), await session.step(hidden[:, 5:])], dim=1)
        assert torch.equal(found, whole_model(hidden, *run))
        hops = session.chain.hops
        assert (hops[0].start, hops[-1].stop) == run
        for name, span in SPANS.items():
            used = Blocks(*run).overlap(span)
            steps = {one[2:] for one in world.nodes[PeerId(name)].span.steps}
            assert steps == ({tuple(used)} if used else set())
        await session.aclose()


@pytest.mark.parametrize("victim", ["b", "c"])
@pytest.mark.parametrize("when", ["between steps", "in a step"])
async def test_a_session_over_a_run_survives_the_death_of_a_hop(victim, when, autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b", "c", seconds=1)
        session = await world.open(run=Blocks(3, 5))
        world_of(world, "B", "C", seconds=1)
        hidden = some_hidden(6)
        found = [await session.step(hidden[:, :4])]
        async with trio.open_nursery() as nursery:
            if when == "between steps":
                await world.kill(victim)
            else:
                nursery.start_soon(kill_later, world, victim, 0.5)
            found.append(await session.step(hidden[:, 4:5]))
        found.append(await session.step(hidden[:, 5:]))
        assert torch.equal(torch.cat(found, dim=1), whole_model(hidden, 3, 5))
        other = victim.upper()
        expected = {"b": ("B", "c"), "c": ("b", "C")}[victim]
        assert tuple(hop.peer for hop in session.chain.hops) == expected
        assert Hop(PeerId(other), *Blocks(3, 5).overlap(SPANS[victim])) in session.chain.hops
        assert world.nodes[PeerId("a")].span.steps == []
        await session.aclose()


async def kill_later(world: World, name: str, seconds: float) -> None:
    await trio.sleep(seconds)
    await world.kill(name)


async def test_a_hole_is_named_within_the_run_alone_and_outside_of_it_is_none(autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "c")
        session = await world.open(run=Blocks(4, 6))
        assert torch.equal(await session.step(some_hidden(3)), whole_model(some_hidden(3), 4, 6))
        await session.aclose()
        with pytest.raises(NoChain) as none:
            await world.open(run=Blocks(1, 3), give_up_seconds=3.0)
        assert none.value.missing == (Blocks(2, 3),)
        with pytest.raises(NoChain, match="no peer serves any of blocks 2:4 of 6"):
            await world.open(run=Blocks(2, 4), give_up_seconds=3.0)


async def test_a_lower_position_cuts_the_cache_of_one_block_there(autojump_clock):
    async with swarm() as world:
        world_of(world)
        session = await world.open(run=Blocks(3, 4))
        hidden, other = some_hidden(5), some_hidden(2, seed=9)
        await session.step(hidden)
        found = await session.step(other, position=cast(int, np.int64(2)))
        assert torch.equal(found, whole_model(torch.cat([hidden[:, :2], other], dim=1), 3, 4)[:, 2:])
        assert session.length == 4
        with pytest.raises(ValueError, match="from position 6 on, the caches hold 4"):
            await session.step(other, position=6)
        assert torch.equal(await session.step(other[:, :0]), torch.empty(1, 0, HIDDEN))
        assert session.length == 4
        await session.aclose()


async def test_a_slow_hop_of_a_run_is_left_for_another_one_of_the_run(autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b", "c", seconds=0.01)
        session = await world.open(run=Blocks(3, 5))
        world_of(world, "B", "C", seconds=0.01)
        hidden = some_hidden(60)
        found = [await session.step(hidden[:, at : at + 1]) for at in range(20)]
        world.nodes[PeerId("b")].compute.seconds = 0.5
        found += [await session.step(hidden[:, at : at + 1]) for at in range(20, 60)]
        assert torch.equal(torch.cat(found, dim=1), whole_model(hidden, 3, 5))
        assert session.chain.hops[0] == Hop(PeerId("B"), 3, 4)
        assert {hop.start for hop in session.chain.hops} | {session.chain.hops[-1].stop} == {3, 4, 5}
        await session.aclose()


# Long inputs


@pytest.mark.parametrize("reply", ["all", "last", "none"])
async def test_a_prefill_of_3000_positions_over_two_hops_is_one_forward(reply, autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b", seconds=1)
        session = await world.open(max_length=3100)
        hidden = some_hidden(3001)
        expected = whole_model(hidden, 0, 4)
        began = trio.current_time()
        found = await session.prefill(hidden[:, :3000], reply=reply)
        steps = world.nodes[PeerId("b")].span.steps
        assert sum(tokens for _, tokens, *_ in steps) == 3000
        assert max(tokens for _, tokens, *_ in steps) <= PREFILL_TOKENS
        assert trio.current_time() - began < 1.5 * len(steps), "both hops work at once"
        if reply == "none":
            assert found is None
        else:
            assert torch.equal(found, expected[:, :3000] if reply == "all" else expected[:, 2999:3000])
        assert session.length == 3000
        assert torch.equal(await session.step(hidden[:, 3000:]), expected[:, 3000:])
        await session.aclose()


@pytest.mark.parametrize(
    ("seconds", "batch", "longest"),
    [(1e-5, 1, LONG_PREFILL_TOKENS), (1e-5, 3, LONG_PREFILL_TOKENS), (1e-3, 1, PREFILL_TOKENS)],
)
async def test_a_fast_server_of_the_whole_run_takes_longer_chunks(
    seconds, batch, longest, monkeypatch, autojump_clock
):
    record, submit, sent, under_way = World.record, Session.submit, list[int](), list[int]()

    async def noted(self, body, position, tokens, reply, **how):
        sent.append(tokens * batch)
        pending = await submit(self, body, position, tokens, reply, **how)
        under_way.append(len(self.core.steps.pending))
        return pending

    monkeypatch.setattr(
        World, "record", lambda self, node: replace(record(self, node), prefill_seconds_per_token=seconds)
    )
    monkeypatch.setattr(Session, "submit", noted)
    async with swarm() as world:
        world.add("whole", 0, 6, seconds=1)
        session = await world.open(max_length=3100, batch=batch)
        hidden = some_hidden(3000 // batch, batch)
        found = await session.prefill(hidden)
        assert torch.equal(found, whole_model(hidden, 0, 6))
        assert longest / 2 < max(sent) <= longest + batch
        assert max(under_way) * max(sent) <= 2 * LONG_PREFILL_TOKENS + 2 * batch, "as many positions as else"
        await session.aclose()


@pytest.mark.parametrize("batch", [1, 3])
async def test_a_prefill_may_go_back_and_its_rows_share_the_positions_of_a_chunk(batch, autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b")
        session = await world.open(max_length=1000, batch=batch)
        hidden, other = some_hidden(900, batch), some_hidden(700, batch, seed=1)
        await session.prefill(hidden)
        found = await session.prefill(other, position=100)
        mixed = torch.cat([hidden[:, :100], other], dim=1)
        assert torch.equal(found, whole_model(mixed, 0, 4)[:, 100:])
        steps = world.nodes[PeerId("a")].span.steps
        assert max(tokens for _, tokens, *_ in steps) * batch <= PREFILL_TOKENS + batch
        await session.aclose()


@pytest.mark.parametrize("victim", ["a", "b"])
async def test_a_prefill_goes_on_when_a_hop_dies(victim, autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b", seconds=1)
        session = await world.open(max_length=3000)
        world_of(world, "A", "B", seconds=1)
        hidden = some_hidden(2000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_later, world, victim, 3.5)
            found = await session.prefill(hidden)
        assert torch.equal(found, whole_model(hidden, 0, 4))
        await session.aclose()


async def test_a_prefill_that_is_cut_short_leaves_a_session_that_goes_on_from_its_length(autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b", seconds=1)
        session = await world.open(max_length=3000)
        hidden = some_hidden(2500)
        with trio.move_on_after(CHUNKS_UNDER_WAY + 1.5) as scope:
            await session.prefill(hidden)
        assert scope.cancelled_caught
        assert 0 < session.length < 2500
        rest = await session.prefill(hidden[:, session.length :])
        assert torch.equal(rest, whole_model(hidden, 0, 4)[:, -rest.shape[1] :])
        with pytest.raises(ValueError, match="600 positions from 2500 on, 3000 in all are allowed"):
            await session.prefill(some_hidden(600))
        assert session.length == 2500
        await session.aclose()


# Steps of no position


@pytest.mark.parametrize("call", ["step", "prefill"])
async def test_an_input_of_no_position_is_answered_here_first_in_the_middle_and_last(call, autojump_clock):
    async with swarm() as world:
        world_of(world, "a", "b")
        session = await world.open(batch=2, max_length=4, codec="bf16")
        hidden, nothing = some_hidden(4, 2) % 100, torch.empty(2, 0, HIDDEN)
        run = getattr(session, call)
        for at in range(5):
            for reply in ("all", "last"):
                found = await run(nothing, reply=reply)
                assert (found.shape, found.dtype) == ((2, 0, HIDDEN), torch.bfloat16)
            assert await run(nothing, position=0, reply="none") is None
            assert session.length == at
            assert len(world.nodes[PeerId("a")].span.steps) == at, "nothing was sent"
            if at < 4:
                await session.step(hidden[:, at : at + 1])
        with pytest.raises(ValueError, match=r"hidden is \[1, 0, 4\], \[2, tokens, 4\] is needed"):
            await run(nothing[:1])
        session.close()
        with pytest.raises(PeerGone, match="closed"):
            await run(nothing)
        await session.aclose()
