"""The tokens of a generation, whatever happens to the hops on the way."""

from __future__ import annotations

import math
from contextlib import aclosing
from typing import Any, cast

import pytest
import torch
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from client.generation.conversation import Conversation
from client.generation.generate import Generation
from client.generation.generation_config import Settings
from client.generation.options import SamplingOptions
from client.session.actions import Lost, Moving
from client.session.inputs import PREFILL_TOKENS, chunk_tokens
from node.model.blocks.rope import LengthRope
from routing.chains.search import NoChain
from routing.names import PeerId
from tensor_codec.errors import BadResult, CacheFull, Draining, PeerGone, Refused, SlowPeer
from tests.fakes_serving import (
    FakeEmbedAndHead,
    World,
    best,
    continued,
    conversation_of,
    generated,
    hops_of,
    swarm,
    whole_model,
)

BLOCKS = 6
PROMPT = [3, 1, 4, 1, 5]


def two_replicas(world: World, seconds: float = 0.0) -> World:
    """Two nodes for each half of the model; a and b come first by their names."""
    for name, start, stop in [("a", 0, 3), ("x", 0, 3), ("b", 3, 6), ("y", 3, 6)]:
        world.add(name, start, stop, seconds=seconds)
    return world


async def test_tokens_are_those_of_the_whole_model_and_only_new_ones_are_sent(autojump_clock):
    async with swarm() as world:
        worked = []
        conversation = conversation_of(two_replicas(world), worked=worked.append)
        assert await continued(conversation, PROMPT, 8) == generated(PROMPT, 8, BLOCKS)
        assert cast(Any, conversation.local_model).embedded == [5, 1, 1, 1, 1, 1, 1, 1]
        assert conversation.recoveries == 0
        assert worked == [conversation.session] * 8
        conversation.close()


async def test_a_hop_that_answers_nan_is_replaced(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        found = await continued(conversation, PROMPT, 2)
        world.nodes[PeerId("b")].span.poison = lambda hidden: hidden * float("nan")
        found += await continued(conversation, PROMPT + found, 2)
        assert found == generated(PROMPT, 4, BLOCKS)
        assert hops_of(conversation) == "a y"
        conversation.close()


async def test_after_a_result_that_cannot_be_nothing_in_the_caches_is_trusted(autojump_clock):
    bad = [BadResult("NaN or infinity")]
    bad[0].peer = PeerId("b")

    def once_spoilt(logits):
        if bad:
            raise bad.pop()
        return best(logits)

    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        tokens = PROMPT + await continued(conversation, PROMPT, 2)
        tokens.append(await conversation.logits_after(tokens, once_spoilt))
        assert tokens == PROMPT + generated(PROMPT, 3, BLOCKS)
        assert hops_of(conversation) == "a y"
        # All seven tokens again: the positions that were spoilt are not known.
        assert cast(Any, conversation.local_model).embedded == [5, 1, 1, 7]
        conversation.close()


@pytest.mark.parametrize("other", [[3, 1, 9], [9, 9, 9, 9], [3, 1, 4, 1, 9, 9]])
async def test_a_call_that_fails_after_it_cut_the_caches_leaves_no_token_that_is_not_in_them(
    other, autojump_clock
):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world, seconds=1))
        first = await continued(conversation, PROMPT, 1)
        with trio.move_on_after(1.5) as scope:  # sent, computed by the first hop, not answered
            await conversation.logits_after(other, best)
        assert scope.cancelled_caught
        longer = PROMPT + first
        assert await conversation.logits_after(longer, best) == generated(longer, 1, BLOCKS)[0]
        common = next(at for at in range(6) if other[at : at + 1] != longer[at : at + 1])
        assert cast(Any, conversation.local_model).embedded == [5, len(other) - common, len(longer) - common]
        conversation.close()


async def _after(seconds, function):
    await trio.sleep(seconds)
    await function()


async def test_a_hop_that_refuses_is_passed_over_for_as_long_as_it_says_and_not_blamed(autojump_clock):
    async with swarm() as world:
        two_replicas(world)
        world.nodes[PeerId("a")].listener.budget.tokens = 64
        world.nodes[PeerId("a")].listener.budget.admit(b"other", "other", 1, 60)
        routes = world.routes()
        conversation = conversation_of(world, routes)
        assert await continued(conversation, PROMPT, 2) == generated(PROMPT, 2, BLOCKS)
        assert hops_of(conversation) == "x b"
        assert routes.blame._faults == {}
        assert routes.blame.avoided(3.9) == {"a"}  # asked at 0, refused after a wait of 2 s, for 2 s
        assert routes.blame.avoided(4.1) == frozenset()
        conversation.close()
        world.nodes[PeerId("a")].listener.budget.release(b"other")


async def test_a_long_prompt_over_k_hops_costs_little_more_than_one_of_them(autojump_clock):
    async with swarm() as world:
        for index in range(3):
            world.add(f"h{index}", 2 * index, 2 * index + 2, seconds=1)
        prompt = [index % 26 for index in range(4 * PREFILL_TOKENS + 7)]
        conversation = conversation_of(world, max_length=3000)
        assert await continued(conversation, prompt, 1) == generated(prompt, 1, BLOCKS)
        chunk = chunk_tokens(len(prompt), hops=3)
        steps = [one[:2] for one in world.nodes[PeerId("h2")].span.steps]
        assert steps == [(at, min(chunk, len(prompt) - at)) for at in range(0, len(prompt), chunk)]
        assert trio.current_time() < len(steps) * 3 / 2  # one after another takes twice as long
        conversation.close()


@pytest.mark.parametrize(("tokens", "hops", "steps"), [(512, 1, 2), (512, 2, 5), (512, 3, 7), (24, 2, 1)])
def test_the_more_hops_the_shorter_the_steps_of_a_prompt(tokens, hops, steps):
    chunk = chunk_tokens(tokens, hops)
    assert -(-tokens // chunk) == steps


@pytest.mark.parametrize(
    ("tokens", "hops", "seconds", "chunk"),
    [
        (5000, 1, 1e-4, 1000), (1024, 1, 1e-4, 1024), (100, 1, 1e-4, 100), (5000, 1, 3e-4, 250),
        (5000, 2, 1e-6, 250), (5000, 1, math.inf, 250),
    ],
)  # fmt: skip
def test_a_chain_of_one_fast_hop_takes_longer_steps_of_a_prompt(tokens, hops, seconds, chunk):
    assert chunk_tokens(tokens, hops, seconds) == chunk


@pytest.mark.parametrize(
    ("delay", "line", "steps"),
    [
        (0.0, 0.0, 7),
        (0.2, 0.0, 6),  # the seventh would wait for the answer to the first
        (0.2, 0.0005, 6),
        (0.0, 0.01, 22),  # the line is the slowest, and each step costs nothing there
    ],
)
def test_over_long_ways_as_many_steps_of_a_prompt_as_may_be_under_way(delay, line, steps):
    chunk = chunk_tokens(512, 3, 3e-4, delay=delay, line=line)
    assert -(-512 // chunk) == steps
    assert chunk_tokens(512, 3, delay=delay, line=line) == chunk_tokens(512, 3)  # rates are not known


@given(st.integers(1, 8192), st.integers(1, 64))
def test_no_step_of_a_prompt_is_empty_or_longer_than_allowed(tokens, hops):
    assert 1 <= chunk_tokens(tokens, hops) <= min(tokens, PREFILL_TOKENS)


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_prompts_around_the_size_of_a_chunk_are_whole(extra, autojump_clock):
    async with swarm() as world:
        prompt = [index % 26 for index in range(PREFILL_TOKENS + extra)]
        conversation = conversation_of(two_replicas(world), max_length=1000)
        assert await continued(conversation, prompt, 2) == generated(prompt, 2, BLOCKS)
        conversation.close()


async def test_other_tokens_keep_the_common_beginning_in_the_caches(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        for tokens in ([1, 2, 3, 4, 5], [1, 2, 3, 9, 9, 9], [1, 2], [1, 2], [7, 7, 7], [7, 7, 7, 8]):
            assert await conversation.logits_after(tokens, best) == generated(tokens, 1, BLOCKS)[0]
        assert cast(Any, conversation.local_model).embedded == [
            5,
            3,
            1,
            1,
            3,
            1,
        ]  # at least one is sent, to have an answer
        steps = world.nodes[PeerId("b")].span.steps
        assert [one[:2] for one in steps] == [(0, 5), (3, 3), (1, 1), (1, 1), (0, 3), (3, 1)]
        conversation.close()


async def test_a_conversation_that_was_closed_opens_a_new_session_when_it_is_used_again(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        first = await continued(conversation, PROMPT, 1)
        conversation.close()
        await trio.sleep(1)
        world.assert_idle()
        assert await continued(conversation, PROMPT, 1) == first
        assert conversation.trace.counts["opened"] == 2
        assert conversation.recoveries == 0
        conversation.close()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5, 3.5])
async def test_a_call_that_was_cancelled_does_not_spoil_the_next_one(seconds, autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world, seconds=1), max_length=2000)
        long = [index % 26 for index in range(3 * PREFILL_TOKENS)]
        with trio.move_on_after(seconds) as scope:
            await conversation.logits_after(long, best)
        assert scope.cancelled_caught
        for tokens in (long[:700], PROMPT, long):
            assert await conversation.logits_after(tokens, best) == generated(tokens, 1, BLOCKS)[0]
        conversation.close()


@pytest.mark.parametrize("count", [0, 65])
async def test_no_tokens_or_too_many_are_the_callers_mistake(count, autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        with pytest.raises(ValueError, match=f"{count} tokens, 1 to 64 are allowed"):
            await conversation.logits_after([1] * count, best)
        assert await conversation.logits_after([1] * 64, best) == generated([1] * 64, 1, BLOCKS)[0]
        conversation.close()


# Giving up.


async def test_without_any_chain_the_swarm_says_which_blocks_are_missing(autojump_clock):
    async with swarm() as world:
        two_replicas(world)
        world.out_of_sight = {PeerId("b"), PeerId("y")}
        conversation = conversation_of(world, give_up_seconds=7.0)
        with pytest.raises(NoChain, match="blocks 3:6"):
            await conversation.logits_after(PROMPT, best)
        assert trio.current_time() == pytest.approx(7.0)


async def test_when_nobody_is_left_the_blocks_are_named_and_the_failure_of_the_last_hop(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 6)
        conversation = conversation_of(world, give_up_seconds=20.0)
        found = await continued(conversation, PROMPT, 1)
        await world.kill("a")
        began = trio.current_time()
        with pytest.raises(NoChain, match="a cannot be reached") as none:
            await continued(conversation, PROMPT + found, 1)
        assert none.value.missing == ((0, 6),)
        assert trio.current_time() - began == pytest.approx(20.0)
        world.revive("a")
        found += await continued(conversation, PROMPT + found, 2)
        assert found == generated(PROMPT, 3, BLOCKS)
        conversation.close()


@pytest.mark.parametrize(
    "failure", [CacheFull("full", 1.0), Draining("leaving"), Refused("no", 0.0), PeerGone("a")]
)
async def test_what_a_session_could_not_mend_by_the_deadline_comes_out(failure, autojump_clock):
    async def refuses(**_):
        await trio.sleep(10.0)
        failure.peer = "a"
        raise failure

    async with swarm() as world:
        conversation = conversation_of(world, open_chain=refuses, give_up_seconds=10.0)
        with pytest.raises(type(failure)):
            await conversation.logits_after(PROMPT, best)
        assert trio.current_time() == pytest.approx(10.0)


async def test_silence_until_the_end_is_a_slow_swarm(autojump_clock):
    async def never(**_):
        await trio.sleep_forever()

    async with swarm() as world:
        conversation = conversation_of(world, open_chain=never, give_up_seconds=30.0)
        with pytest.raises(SlowPeer, match=r"no answer within 30.0 s"):
            await conversation.logits_after(PROMPT, best)
        assert trio.current_time() == pytest.approx(30.0, abs=0.2)


async def test_our_own_bugs_are_not_taken_for_a_peers_fault(autojump_clock):
    def bug(logits):
        raise ZeroDivisionError

    async with swarm() as world:
        routes = two_replicas(world).routes()
        conversation = conversation_of(world, routes)
        with pytest.raises(ZeroDivisionError):
            await conversation.logits_after(PROMPT, bug)
        assert routes.blame.avoided(trio.current_time()) == frozenset()
        assert await continued(conversation, PROMPT, 1) == generated(PROMPT, 1, BLOCKS)
        conversation.close()


# The loop over it.


async def tokens_of(world: World, *, stop=(), new: int = 8, end_tokens=(), close: bool = True):
    local_model = FakeEmbedAndHead(end_tokens)
    conversation = conversation_of(two_replicas(world), local_model=local_model)
    generation = Generation(local_model, conversation, Settings(SamplingOptions(), new, stop, ()))
    found = [token async for token in generation.run(list(PROMPT), close=close)]
    if close:
        assert conversation.session is None
    conversation.close()
    return found


async def test_a_generation_ends_after_so_many_tokens(autojump_clock):
    async with swarm() as world:
        found = await tokens_of(world)
        assert [token.id for token in found] == generated(PROMPT, 8, BLOCKS)
        assert "".join(token.text for token in found) == FakeEmbedAndHead().decode(
            generated(PROMPT, 8, BLOCKS)
        )
        assert [token.finish_reason for token in found] == [None] * 7 + ["length"]


async def test_a_generation_ends_at_the_models_end_token_whose_text_is_left_out(autojump_clock):
    expected = generated(PROMPT, 8, BLOCKS)
    end = next(index for index in range(1, 8) if expected[index] not in expected[:index])
    async with swarm() as world:
        found = await tokens_of(world, end_tokens={expected[end]})
        assert [token.id for token in found] == expected[: end + 1]
        assert "".join(token.text for token in found) == FakeEmbedAndHead().decode(expected[:end])
        assert found[-1].finish_reason == "end"


async def test_a_generation_ends_at_a_stop_string_which_is_left_out(autojump_clock):
    text = FakeEmbedAndHead().decode(generated(PROMPT, 8, BLOCKS))
    async with swarm() as world:
        found = await tokens_of(world, stop=(text[3:5],))
        assert "".join(token.text for token in found) == text[: text.index(text[3:5])]
        assert found[-1].finish_reason == "stop"
        assert len(found) == text.index(text[3:5]) + 2


async def test_what_is_held_back_for_a_stop_string_comes_with_the_last_token(autojump_clock):
    text = FakeEmbedAndHead().decode(generated(PROMPT, 8, BLOCKS))
    async with swarm() as world:
        found = await tokens_of(world, stop=(text[-2:] + "!",))
        assert "".join(token.text for token in found) == text
        assert found[-1].text.endswith(text[-2:])
        assert found[-1].finish_reason == "length"


async def test_a_generation_that_is_left_early_ends_its_session(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        tokens = Generation(FakeEmbedAndHead(), conversation, Settings(SamplingOptions(), 8, (), ())).run(
            list(PROMPT), close=True
        )
        async for _ in tokens:
            break
        await tokens.aclose()
        assert conversation.session is None
        await trio.sleep(1)
        world.assert_idle()


# The next step goes out before its answer is asked for.


def steps_at(world: World, name: str) -> list[tuple[int, int]]:
    """The steps that a node has computed: first position, positions."""
    return [step[:2] for step in world.nodes[PeerId(name)].span.steps]


def generation_of(conversation: Conversation, *, stop: tuple[str, ...] = (), new: int = 8) -> Generation:
    local_model = cast(FakeEmbedAndHead, conversation.local_model)
    return Generation(local_model, conversation, Settings(SamplingOptions(), new, stop, ()))


async def test_the_next_step_is_computed_while_nobody_waits_for_the_next_token(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world, seconds=1))
        async with aclosing(generation_of(conversation).run(list(PROMPT), close=True)) as tokens:
            found = [(await anext(tokens)).id]
            await trio.sleep(10)
            assert steps_at(world, "b") == [(0, 5), (5, 1)]
            began = trio.current_time()
            found.append((await anext(tokens)).id)
            assert trio.current_time() == began
            found += [token.id async for token in tokens]
        assert found == generated(PROMPT, 8, BLOCKS)
        assert steps_at(world, "b") == [(0, 5), *((at, 1) for at in range(5, 12))]
        assert conversation.trace.counts["step"] == 8
        assert conversation.trace.counts["fault"] == 0


@pytest.mark.parametrize(
    ("ending", "count"), [({"new": 3}, 3), ({"stop": ("ku",)}, 3), ({"end_tokens": [20]}, 3)]
)
async def test_nothing_is_sent_after_the_last_token(ending, count, autojump_clock):
    async with swarm() as world:
        assert FakeEmbedAndHead().decode(generated(PROMPT, 3, BLOCKS))[1:] == "ku"
        assert len(await tokens_of(world, **ending)) == count
        await trio.sleep(1)
        assert steps_at(world, "b") == [(0, 5), (5, 1), (6, 1)]


@pytest.mark.parametrize("then", ["goes on", "has other tokens"])
async def test_a_generation_that_is_left_early_leaves_a_conversation_for_other_tokens(then, autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world, seconds=1))
        async with aclosing(generation_of(conversation).run(list(PROMPT), close=False)) as tokens:
            found = [(await anext(tokens)).id for _ in range(2)]
        longer = PROMPT + (found if then == "goes on" else [9, 9])
        assert await continued(conversation, longer, 3) == generated(longer, 3, BLOCKS)
        assert steps_at(world, "b")[:3] == [(0, 5), (5, 1), (6, 1)]  # the last one was sent ahead
        assert steps_at(world, "b")[3] == ((7, 1) if then == "goes on" else (5, 2))
        assert conversation.trace.counts["rerouted"] == 0
        conversation.close()


async def test_a_hop_that_dies_while_nobody_waits_is_replaced_when_somebody_does(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world, seconds=1))
        async with aclosing(generation_of(conversation).run(list(PROMPT), close=True)) as tokens:
            found = [(await anext(tokens)).id]
            await trio.sleep(0.5)
            await world.kill("b")
            await trio.sleep(5)
            found += [token.id async for token in tokens]
        assert found == generated(PROMPT, 8, BLOCKS)
        assert conversation.recoveries == 1


async def test_a_token_is_given_before_a_repair_that_the_next_one_needs(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 6)
        conversation = conversation_of(world, give_up_seconds=20.0)

        async def pick_and_kill(tokens: list[int]) -> int:
            def follow(token: int) -> int:
                assert conversation.session is not None
                conversation.session.give_up_steps()
                conversation.session.route.tell(Moving("a test"))
                conversation.session.route.tell(Lost(conversation.session.core.route.hops[0], PeerGone("a")))
                return token

            return await conversation.logits_after(tokens, best, follow=follow)

        began = trio.current_time()
        assert [await pick_and_kill(list(PROMPT))] == generated(PROMPT, 1, BLOCKS)
        assert trio.current_time() - began < 1
        conversation.close()


async def test_a_session_that_was_left_with_a_step_ahead_takes_other_steps(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world, seconds=1))
        token = await conversation.logits_after(list(PROMPT), best, follow=int)
        session = conversation.session
        assert session is not None
        assert session.ahead is not None
        hidden = FakeEmbedAndHead().embed(torch.tensor([[token, 7]]), 0)
        answer = await session.step(hidden)
        assert session.length == 7
        whole = FakeEmbedAndHead().embed(torch.tensor([[*PROMPT, token, 7]]), 0)
        assert torch.equal(answer, whole_model(whole, 0, BLOCKS)[:, -2:])
        conversation.close()


async def test_tokens_with_angles_of_the_length_are_not_sent_ahead(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(two_replicas(world))
        cast(Any, conversation.local_model).rope = LengthRope((("dynamic", 4),))
        await conversation.logits_after(list(PROMPT), best, follow=int)
        assert conversation.session is not None
        assert conversation.session.ahead is None
        conversation.close()
