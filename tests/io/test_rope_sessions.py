"""Angles that depend on the length, through sessions: the same in whatever steps, and after whatever died."""

from __future__ import annotations

import pytest
import torch
import trio

from node.model.blocks.rope import LengthRope
from routing.names import PeerId
from tests.fakes_serving import (
    FakeCache,
    FakeEmbedAndHead,
    FakeSpan,
    World,
    best,
    conversation_of,
    some_hidden,
    swarm,
)

BLOCKS = 6
LONG = LengthRope((("longrope", 16),))
RECOMPUTED = LengthRope((("longrope", 16),), recomputed=True)
DYNAMIC = LengthRope((("dynamic", 16),))
ROPES = {"longrope": LONG, "recomputed": RECOMPUTED, "dynamic": DYNAMIC}


def prompt_of(count: int) -> list[int]:
    return [(7 * index + 3) % 26 for index in range(count)]


def generated(rope: LengthRope, prompt: list[int], count: int) -> list[int]:
    """As the library does it: the prompt in one step, then one token after the other."""
    ends, tokens = FakeEmbedAndHead(), list(prompt)
    span = FakeSpan(0, BLOCKS)
    span.rope = rope
    cache, length = FakeCache(1, 100), 0
    for _ in range(count):
        if rope.recomputed and length and rope.factors(length) != rope.factors(len(tokens)):
            cache = FakeCache(1, 100)
        new = tokens[cache.length :]
        length = len(tokens)
        hidden = ends.embed(torch.tensor([new]), cache.length)
        hidden = span.forward(hidden, cache, cache.length, 0, BLOCKS, rope_length=length)
        tokens.append(int(ends.head(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


def world_of(world: World, rope: LengthRope) -> World:
    for names, start in (("Aa", 0), ("Bb", 2), ("Cc", 4)):
        for name in names:
            world.add(name, start, start + 2).span.rope = rope
    return world


def asker(world: World, rope: LengthRope):
    ends = FakeEmbedAndHead()
    ends.rope = rope
    routes = world.routes()

    async def open_chain(*, max_length, deadline, trace):
        return await world.open(
            max_length=max_length, deadline=deadline, trace=trace, routes=routes, rope=rope
        )

    return conversation_of(world, routes, local_model=ends, open_chain=open_chain, max_length=100)


async def continued(conversation, prompt: list[int], count: int, before=None) -> list[int]:
    tokens = list(prompt)
    for index in range(count):
        if before is not None:
            await before(index)
        tokens.append(await conversation.logits_after(tokens, best, prompt=len(prompt)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("length", [10, 16, 60])
async def test_a_generation_has_the_tokens_of_one_that_is_not_cut_into_steps(kind, length, autojump_clock):
    async with swarm() as world:
        conversation = asker(world_of(world, ROPES[kind]), ROPES[kind])
        assert await continued(conversation, prompt_of(length), 12) == generated(
            ROPES[kind], prompt_of(length), 12
        )
        steps = world.nodes[PeerId("A")].span.steps
        assert length < 60 or steps[0][1] < length, "the prompt went in several steps"
        conversation.close()


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("victims", ["A", "BC", "ABC"])
@pytest.mark.parametrize("length", [10, 60])
async def test_a_replay_gives_what_was_there_before(kind, victims, length, autojump_clock):
    # At 10 it crosses the trained length of 16 before the hops die, and what is replayed has both angles.
    async with swarm() as world:
        conversation = asker(world_of(world, ROPES[kind]), ROPES[kind])

        async def kill(index: int) -> None:
            if index == 9:
                for victim in victims:
                    await world.kill(victim)

        prompt = prompt_of(length)
        assert await continued(conversation, prompt, 12, kill) == generated(ROPES[kind], prompt, 12)
        assert conversation.recoveries
        conversation.close()


@pytest.mark.parametrize("kind", ROPES)
async def test_a_replay_that_the_client_carries_has_the_same_angles(kind, autojump_clock):
    async with swarm() as world:
        world_of(world, ROPES[kind])
        world.unreachable |= {(PeerId(a), PeerId(b)) for a in "Aa" for b in "Bb"}
        conversation = asker(world, ROPES[kind])

        async def kill(index: int) -> None:
            if index == 9:
                await world.kill("B")

        assert await continued(conversation, prompt_of(60), 12, kill) == generated(
            ROPES[kind], prompt_of(60), 12
        )
        conversation.close()


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("turns", [(5, 9), (5, 30), (30, 5), (20, 27)])
async def test_a_second_turn_has_the_tokens_of_a_fresh_one_whatever_is_cached(kind, turns, autojump_clock):
    async with swarm() as world:
        conversation = asker(world_of(world, ROPES[kind]), ROPES[kind])
        for length in turns:
            prompt = prompt_of(length)
            assert await continued(conversation, prompt, 6) == generated(ROPES[kind], prompt, 6)
        conversation.close()


@pytest.mark.parametrize("kind", ROPES)
async def test_rows_of_several_sessions_keep_their_own_lengths(kind, autojump_clock):
    async with swarm() as world:
        world_of(world, ROPES[kind])
        found: dict[int, list[int]] = {}

        async def ask(length: int) -> None:
            conversation = asker(world, ROPES[kind])
            found[length] = await continued(conversation, prompt_of(length), 8)
            conversation.close()

        async with trio.open_nursery() as nursery:
            for length in (4, 12, 40):
                nursery.start_soon(ask, length)
        assert found == {n: generated(ROPES[kind], prompt_of(n), 8) for n in (4, 12, 40)}


async def test_hidden_states_in_one_step_have_the_length_of_the_step_or_what_is_said(autojump_clock):
    async with swarm() as world:
        world_of(world, LONG)
        hidden = some_hidden(40)
        span = FakeSpan(0, BLOCKS)
        span.rope = LONG
        expected = span.forward(hidden, FakeCache(1, 40), 0, 0, BLOCKS, rope_length=40)
        for sizes in ((40,), (8,) * 5, (16, 1, 23)):
            session = await world.open(max_length=100, rope=LONG)
            parts, position = [], 0
            for size in sizes:
                given = hidden[:, position : position + size]
                whole = None if sizes == (40,) else 40
                parts.append(await session.step(given, rope_length=whole))
                position += size
            assert torch.equal(torch.cat(parts, 1), expected)
            with pytest.raises(ValueError, match="rope_length of 101, 0 to 100"):
                await session.step(hidden[:, :1], rope_length=101)
            session.close()
