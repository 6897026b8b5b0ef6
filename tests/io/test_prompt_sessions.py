"""Sessions with deep prompts: each hop has those of its blocks, and so has a hop that replaces it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from client.session.terms import SessionPrompts
from node.serving.sessions.prompt_budget import HeldPrompts, PromptBudget
from routing.blocks import Blocks
from routing.names import PeerId
from tensor_codec.codecs import encode_hidden
from tensor_codec.errors import CacheFull, PeerGone, Refused
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import Failed
from tests.fakes_serving import (
    HIDDEN,
    FakeCache,
    FakeSpan,
    RawClient,
    World,
    some_hidden,
    swarm,
)

BLOCKS, POSITIONS = 9, 4
PROMPTS = torch.randint(
    0, 50, (BLOCKS, POSITIONS, HIDDEN), generator=torch.Generator().manual_seed(5)
).float()


def limits_of(**changes: Any) -> Limits:
    return replace(Limits(), **changes)


def prompts_of(prompts: Tensor = PROMPTS, start: int = 0) -> SessionPrompts:
    run = Blocks(start, start + len(prompts))
    return SessionPrompts(prompts.shape[1], run, "fp32", encode_hidden(prompts, "fp32"))


def expected(hidden: Tensor, prompts: Tensor = PROMPTS, start: int = 0) -> Tensor:
    """What the whole run makes of the hidden states with prompts, all at once."""
    stop = start + len(prompts)
    cache = FakeCache(hidden.shape[0], hidden.shape[1])
    return FakeSpan(start, stop).forward(hidden, cache, 0, start, stop, prompts=prompts)


def three_hops(world: World, names: str = "abc", **served: Any) -> World:
    for name, start in zip(names, (0, 3, 6), strict=True):
        world.add(name, start, start + 3, **served)
    return world


@pytest.mark.parametrize("steps", [(9,), (1, 1, 1, 1, 1, 4), (2, 3, 4), (4, 1, 4), (3, 1, 5)])
async def test_prompts_are_added_at_their_positions_in_whatever_steps_these_come(steps, autojump_clock):
    hidden = some_hidden(9, batch=2)
    async with swarm() as world:
        three_hops(world)
        session = await world.open(batch=2, prompts=prompts_of())
        found, begin = [], 0
        for tokens in steps:
            found.append(await session.step(hidden[:, begin : begin + tokens]))
            begin += tokens
        assert torch.equal(torch.cat(found, 1), expected(hidden))
        assert not torch.equal(expected(hidden), expected(hidden, torch.zeros_like(PROMPTS)))
        session.close()


async def test_positions_that_come_again_after_a_cut_have_the_prompts_again(autojump_clock):
    hidden, other = some_hidden(6), some_hidden(6, seed=1)
    async with swarm() as world:
        three_hops(world)
        session = await world.open(prompts=prompts_of())
        await session.step(hidden)
        found = await session.step(other[:, 2:], position=2)
        assert torch.equal(found, expected(torch.cat([hidden[:, :2], other[:, 2:]], 1))[:, 2:])
        session.close()


@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("after", [2, 6])
async def test_a_hop_that_replaces_another_one_has_the_prompts_of_its_blocks(victim, after, autojump_clock):
    hidden = some_hidden(9)
    async with swarm() as world:
        three_hops(world)
        three_hops(world, "ABC", seconds=0.5)
        session = await world.open(prompts=prompts_of())
        first = await session.step(hidden[:, :after])
        await world.kill(victim)
        rest = await session.step(hidden[:, after:])
        assert torch.equal(torch.cat([first, rest], 1), expected(hidden))
        session.close()


async def test_a_session_over_some_blocks_has_the_prompts_of_these(autojump_clock):
    hidden = some_hidden(6)
    async with swarm() as world:
        three_hops(world)
        session = await world.open(run=Blocks(2, 7), prompts=prompts_of(PROMPTS[2:7], 2))
        assert torch.equal(await session.step(hidden), expected(hidden, PROMPTS[2:7], 2))
        session.close()


async def test_the_bytes_of_prompts_are_counted_for_each_peer_and_for_all_and_given_back(autojump_clock):
    size = 3 * POSITIONS * HIDDEN * 4
    async with swarm(limits_of(max_prompt_bytes=5 * size, max_prompt_bytes_per_peer=2 * size)) as world:
        node = three_hops(world).nodes[PeerId("a")]
        body = encode_hidden(PROMPTS[:3], "fp32")
        clients = []
        for number, name in enumerate(["one", "one", "two", "two", "three"]):
            client, opened = await RawClient.open(
                world, "a", name, session=bytes([number]) * 16, prompts=POSITIONS, body=body
            )
            assert not isinstance(opened, Failed)
            clients.append(client)
        assert node.listener._bytes.prompts.used == 5 * size
        for name, words in (
            ("one", f"prompts of {size} bytes, 0 of {2 * size} are free"),
            ("four", f"prompts of {size} bytes, 0 of {5 * size} are free"),
        ):
            client, refused = await RawClient.open(
                world, "a", name, session=name.encode().ljust(16), prompts=POSITIONS, body=body
            )
            assert isinstance(refused, Failed)
            assert (refused.code, refused.message) == ("cache_full", words)
            clients.append(client)
        client, opened = await RawClient.open(world, "a", "one", session=b"x" * 16)
        clients.append(client)
        assert not isinstance(opened, Failed), "a session without prompts"
        for client in clients:
            await client.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert node.listener._bytes.prompts.used == 0


@pytest.mark.parametrize(
    ("prompts", "body"),
    [
        (POSITIONS, bytes(2 * POSITIONS * HIDDEN * 4)),  # of two blocks
        (POSITIONS, bytes(3 * POSITIONS * HIDDEN * 8)),  # of another model
        (POSITIONS, b""),
        (65, bytes(3 * 65 * HIDDEN * 4)),  # more than the session has positions
    ],
)
async def test_prompts_that_do_not_fit_are_no_session(prompts, body, autojump_clock):
    async with swarm() as world:
        node = three_hops(world).nodes[PeerId("a")]
        with pytest.raises(PeerGone):
            await RawClient.open(world, "a", prompts=prompts, body=body)
        await world.client_streams[-1].reset()
        assert node.listener.session_count == 0


async def test_prompts_of_a_hop_that_fit_no_frame_are_refused_with_the_numbers(autojump_clock):
    long = torch.zeros(BLOCKS, 60, HIDDEN)
    async with swarm(limits_of(max_frame_bytes=8192 + 4 * 60 * HIDDEN * 4)) as world:
        world.add("whole", 0, 9)
        with pytest.raises(Refused, match=r"prompts of 8640 bytes for blocks 0:9, a frame has room for 3840"):
            await world.open(prompts=prompts_of(long), give_up_seconds=3)
        three_hops(world)
        session = await world.open(prompts=prompts_of(long))
        assert [hop.peer for hop in session.chain.hops] == ["a", "b", "c"]
        session.close()


async def test_prompts_make_way_for_those_of_a_network_that_has_less(autojump_clock):
    size = 3 * POSITIONS * HIDDEN * 4
    async with swarm(limits_of(max_prompt_bytes=3 * size)) as world:
        node = three_hops(world).nodes[PeerId("a")]
        body = encode_hidden(PROMPTS[:3], "fp32")
        flooding = [PeerId(f"flood{number}") for number in range(4)]
        world.prefixes |= dict.fromkeys(flooding, "203.0.113.1/32") | {PeerId("far"): "198.51.100.1/32"}

        async def opened_by(peer: str) -> tuple[RawClient, object]:
            return await RawClient.open(world, "a", peer, prompts=POSITIONS, body=body)

        clients = [await opened_by(peer) for peer in flooding[:3]]
        assert not any(isinstance(opened, Failed) for _, opened in clients)
        fourth, refused = await opened_by(flooding[3])
        assert isinstance(refused, Failed), "of one address nobody makes way for another"
        far, opened = await opened_by("far")
        assert not isinstance(opened, Failed)
        ended = await clients[2][0].receive(world)
        assert isinstance(ended, Failed)
        assert (ended.code, ended.retry_after_seconds) == ("cache_full", 5.0)
        await trio.testing.wait_all_tasks_blocked()
        assert node.listener._bytes.prompts.used == 3 * size
        assert node.listener.session_count == 3
        for client in (*(client for client, _ in clients), fourth, far):
            await client.stream.aclose()


def held(peer: str, size: int, prefix: str = "", gone: list[str] | None = None) -> HeldPrompts:
    return HeldPrompts(peer, prefix, size, lambda _: None if gone is None else gone.append(peer))


def test_a_refusal_for_prompts_says_when_to_ask_again() -> None:
    budget = PromptBudget(limits_of(max_prompt_bytes=100, max_prompt_bytes_per_peer=60))
    with budget.hold(held("a", 60)), budget.hold(held("b", 40)):
        for peer in ("a", "c"):
            with pytest.raises(CacheFull) as full, budget.hold(held(peer, 1)):
                raise AssertionError("it was held")
            assert full.value.retry_after_seconds == 5.0
    assert budget.used == 0


def test_the_youngest_prompts_of_the_prefix_with_most_make_way_until_the_new_ones_fit() -> None:
    budget, gone = PromptBudget(limits_of(max_prompt_bytes=100)), list[str]()
    with ExitStack() as stack:
        for peer, size, prefix in (("a1", 30, "A"), ("b", 20, "B"), ("a2", 30, "A"), ("a3", 20, "A")):
            stack.enter_context(budget.hold(held(peer, size, prefix, gone)))
        with pytest.raises(CacheFull, match="prompts of 81 bytes, 0 of 100 are free"):
            budget.check(held("c", 81, "C"))
        with pytest.raises(CacheFull):
            budget.check(held("nowhere", 1))
        with pytest.raises(CacheFull):
            budget.check(held("a4", 1, "A"))
        assert gone == []
        with budget.hold(held("c", 40, "C", gone)):
            assert gone == ["a3", "a2"]
            assert budget.used == 90
    assert budget.used == 0
