"""The tokens of a generation, whatever happens to the hops on the way."""

from __future__ import annotations

import pytest
import torch
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from client.generate import Generation
from client.heads import Heads
from client.retry import PREFILL_TOKENS, Blame, Context, chunk_tokens
from client.sampling import SamplingOptions
from routing.chain import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.errors import CacheFull, Draining, PeerGone, Refused, SlowPeer
from tests.fakes_serving import FakeCompute, FakeEnds, World, generated, swarm

BLOCKS = 6
PROMPT = [3, 1, 4, 1, 5]


class Chooser:
    """Opens a session along the first of its chains without a peer to be avoided."""

    def __init__(self, world: World, *chains: str) -> None:
        self.world = world
        self.blame = Blame()
        self.opened: list[str] = []
        self.chains = {}
        for names in chains:
            nodes = [world.nodes[PeerId(name)] for name in names.split()]
            self.chains[names] = Chain(tuple(Hop(node.peer, *node.blocks) for node in nodes), 0.0)

    async def __call__(self, *, max_length: int):
        avoided = self.blame.avoided(trio.current_time())
        for names, chain in self.chains.items():
            if not avoided & {hop.peer for hop in chain.hops}:
                session = await self.world.open(chain, max_length=max_length)
                self.opened.append(names)
                return session
        raise NoChain([(0, BLOCKS)], BLOCKS, alone=True)


def context_of(open_chain, *, max_length: int = 64, give_up_seconds: float = 60.0, **changes) -> Context:
    values = {
        "ends": FakeEnds(),
        "compute": FakeCompute(),
        "open_chain": open_chain,
        "blame": getattr(open_chain, "blame", Blame()),
        "worked": lambda session: None,
        "max_length": max_length,
        "give_up_seconds": give_up_seconds,
    }
    values |= changes
    return Context(heads=Heads(values["ends"], values["compute"]), **values)


def best(logits: torch.Tensor) -> int:
    return int(logits.argmax())


async def continued(context: Context, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(await context.logits_after(tokens, best))
    return tokens[len(prompt) :]


def two_replicas(world: World, seconds: float = 0.0) -> Chooser:
    """Two nodes for each half of the model."""
    for name, start, stop in [("a", 0, 3), ("A", 0, 3), ("b", 3, 6), ("B", 3, 6)]:
        world.add(name, start, stop, seconds=seconds)
    return Chooser(world, "a b", "A b", "a B", "A B")


async def test_tokens_are_those_of_the_whole_model_and_only_new_ones_are_sent(autojump_clock):
    async with swarm() as world:
        worked = []
        context = context_of(two_replicas(world), worked=worked.append)
        assert await continued(context, PROMPT, 8) == generated(PROMPT, 8, BLOCKS)
        assert context.ends.embedded == [5, 1, 1, 1, 1, 1, 1, 1]
        assert context.replays == 0
        assert worked == [context.session] * 8
        context.close()


@pytest.mark.parametrize("victim", ["a", "b"])
@pytest.mark.parametrize("at", range(8))
async def test_a_hop_that_dies_at_any_step_costs_a_replay_and_no_token(victim, at, autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world, seconds=1)
        context, tokens = context_of(chooser), list(PROMPT)
        async with trio.open_nursery() as nursery:
            for index in range(8):
                if index == at:

                    async def later():
                        await trio.sleep(0.5 if victim == "a" else 1.5)
                        await world.kill(victim)

                    nursery.start_soon(later)
                tokens.append(await context.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 8, BLOCKS)
        assert chooser.opened == ["a b", {"a": "A b", "b": "a B"}[victim]]
        assert context.replays == (1 if at else 0)  # there was nothing to replay at the first one
        assert chooser.blame.avoided(trio.current_time()) <= {PeerId(victim)}
        context.close()


async def test_two_hops_that_die_one_after_the_other_are_both_replaced(autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world)
        context = context_of(chooser)
        found = await continued(context, PROMPT, 2)
        await world.kill("a")
        found += await continued(context, PROMPT + found, 2)
        await world.kill("b")
        found += await continued(context, PROMPT + found, 2)
        assert found == generated(PROMPT, 6, BLOCKS)
        assert chooser.opened[-1] == "A B"
        assert chooser.blame.avoided(trio.current_time()) == {"a", "b"}
        context.close()


async def test_a_hop_that_answers_nan_is_replaced(autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world)
        context = context_of(chooser)
        found = await continued(context, PROMPT, 2)
        world.nodes[PeerId("b")].span.poison = lambda hidden: hidden * float("nan")
        found += await continued(context, PROMPT + found, 2)
        assert found == generated(PROMPT, 4, BLOCKS)
        assert chooser.opened == ["a b", "a B"]
        context.close()


async def test_a_hop_that_drains_hands_over_and_no_token_is_lost(autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world, seconds=1)
        context, tokens = context_of(chooser), list(PROMPT)
        async with trio.open_nursery() as nursery:
            for index in range(4):
                if index == 1:
                    nursery.start_soon(_after, 1.5, world.nodes[PeerId("b")].listener.drain)
                tokens.append(await context.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 4, BLOCKS)
        assert chooser.opened == ["a b", "a B"]
        context.close()


async def _after(seconds, function):
    await trio.sleep(seconds)
    await function()


async def test_a_hop_that_refuses_is_passed_over_for_as_long_as_it_says_and_not_blamed(autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world)
        world.nodes[PeerId("a")].listener.budget.tokens = 64
        world.nodes[PeerId("a")].listener.budget.admit(b"other", "other", 1, 60)
        context = context_of(chooser)
        assert await continued(context, PROMPT, 2) == generated(PROMPT, 2, BLOCKS)
        assert chooser.opened == ["A b"]
        assert chooser.blame._faults == {}
        assert chooser.blame.avoided(3.9) == {"a"}  # asked at 0, refused after a wait of 2 s, for 2 s
        assert chooser.blame.avoided(4.1) == frozenset()
        assert context.replays == 0
        context.close()
        world.nodes[PeerId("a")].listener.budget.release(b"other")


async def test_a_prompt_longer_than_a_chunk_is_worked_on_by_several_hops_at_once(autojump_clock):
    async with swarm() as world:
        for index in range(3):
            world.add(f"h{index}", 2 * index, 2 * index + 2, seconds=1)
        prompt = [index % 26 for index in range(4 * PREFILL_TOKENS + 7)]
        context = context_of(Chooser(world, "h0 h1 h2"), max_length=3000)
        assert await continued(context, prompt, 1) == generated(prompt, 1, BLOCKS)
        chunk = chunk_tokens(len(prompt), hops=3)
        steps = [one[:2] for one in world.nodes[PeerId("h2")].span.steps]
        assert steps == [(at, min(chunk, len(prompt) - at)) for at in range(0, len(prompt), chunk)]
        assert trio.current_time() < len(steps) * 3 / 2  # one after another takes twice as long
        context.close()


@pytest.mark.parametrize(("tokens", "hops", "steps"), [(512, 1, 2), (512, 2, 5), (512, 3, 7), (24, 2, 1)])
def test_the_more_hops_the_shorter_the_steps_of_a_prompt(tokens, hops, steps):
    chunk = chunk_tokens(tokens, hops)
    assert -(-tokens // chunk) == steps


@given(st.integers(1, 8192), st.integers(1, 64))
def test_no_step_of_a_prompt_is_empty_or_longer_than_allowed(tokens, hops):
    assert 1 <= chunk_tokens(tokens, hops) <= min(tokens, PREFILL_TOKENS)


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_prompts_around_the_size_of_a_chunk_are_whole(extra, autojump_clock):
    async with swarm() as world:
        prompt = [index % 26 for index in range(PREFILL_TOKENS + extra)]
        context = context_of(two_replicas(world), max_length=1000)
        assert await continued(context, prompt, 2) == generated(prompt, 2, BLOCKS)
        context.close()


async def test_a_hop_that_dies_inside_a_long_prompt_costs_a_replay_and_no_token(autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world, seconds=1)
        prompt = [index % 26 for index in range(3 * PREFILL_TOKENS)]
        context = context_of(chooser, max_length=2000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_after, 2.5, lambda: world.kill("b"))
            assert await continued(context, prompt, 1) == generated(prompt, 1, BLOCKS)
        assert chooser.opened == ["a b", "a B"]
        context.close()


async def test_other_tokens_keep_the_common_beginning_in_the_caches(autojump_clock):
    async with swarm() as world:
        context = context_of(two_replicas(world))
        for tokens in ([1, 2, 3, 4, 5], [1, 2, 3, 9, 9, 9], [1, 2], [1, 2], [7, 7, 7], [7, 7, 7, 8]):
            assert await context.logits_after(tokens, best) == generated(tokens, 1, BLOCKS)[0]
        assert context.ends.embedded == [5, 3, 1, 1, 3, 1]  # at least one is sent, to have an answer
        steps = world.nodes[PeerId("b")].span.steps
        assert [one[:2] for one in steps] == [(0, 5), (3, 3), (1, 1), (1, 1), (0, 3), (3, 1)]
        context.close()


async def test_a_context_that_was_closed_opens_a_new_session_when_it_is_used_again(autojump_clock):
    async with swarm() as world:
        chooser = two_replicas(world)
        context = context_of(chooser)
        first = await continued(context, PROMPT, 1)
        context.close()
        await trio.sleep(1)
        world.assert_idle()
        assert await continued(context, PROMPT, 1) == first
        assert chooser.opened == ["a b", "a b"]
        assert context.replays == 0
        context.close()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5, 3.5])
async def test_a_call_that_was_cancelled_does_not_spoil_the_next_one(seconds, autojump_clock):
    async with swarm() as world:
        context = context_of(two_replicas(world, seconds=1), max_length=2000)
        long = [index % 26 for index in range(3 * PREFILL_TOKENS)]
        with trio.move_on_after(seconds) as scope:
            await context.logits_after(long, best)
        assert scope.cancelled_caught
        for tokens in (long[:700], PROMPT, long):
            assert await context.logits_after(tokens, best) == generated(tokens, 1, BLOCKS)[0]
        context.close()


@pytest.mark.parametrize("count", [0, 65])
async def test_no_tokens_or_too_many_are_the_callers_mistake(count, autojump_clock):
    async with swarm() as world:
        context = context_of(two_replicas(world))
        with pytest.raises(ValueError, match=f"{count} tokens, 1 to 64 are allowed"):
            await context.logits_after([1] * count, best)
        assert await context.logits_after([1] * 64, best) == generated([1] * 64, 1, BLOCKS)[0]
        context.close()


# Giving up.


async def test_without_any_chain_the_swarm_says_which_blocks_are_missing(autojump_clock):
    async with swarm() as world:
        context = context_of(Chooser(world))
        with pytest.raises(NoChain, match="blocks 0:6"):
            await context.logits_after(PROMPT, best)


async def test_when_nobody_is_left_the_failure_of_the_last_hop_is_raised(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 6)
        context = context_of(Chooser(world, "a"))
        await continued(context, PROMPT, 1)
        await world.kill("a")
        with pytest.raises(PeerGone) as gone:
            await continued(context, PROMPT, 1)
        assert gone.value.peer == "a"
        assert isinstance(gone.value.__cause__, NoChain)
        assert context.session is None


async def test_a_call_gives_up_at_its_deadline_with_the_last_failure(autojump_clock):
    async def never_works(*, max_length):
        await trio.sleep(7)
        failure = PeerGone(f"gone at {trio.current_time() - began:.0f}")
        failure.peer = "a"
        raise failure

    began = trio.current_time()
    context = context_of(never_works, give_up_seconds=30.0)
    with pytest.raises(PeerGone, match="gone at 28"):
        await context.logits_after(PROMPT, best)
    assert trio.current_time() - began == pytest.approx(30.0)


@pytest.mark.parametrize("failure", [CacheFull("full", 1.0), Draining("leaving"), Refused("no", 0.0)])
async def test_refused_until_the_end_it_says_refused(failure, autojump_clock):
    async def refuses(*, max_length):
        await trio.sleep(1.5)
        failure.peer = "a"
        raise failure

    context = context_of(refuses, give_up_seconds=10.0)
    with pytest.raises(type(failure)):
        await context.logits_after(PROMPT, best)
    assert trio.current_time() == pytest.approx(10.0)


async def test_silence_until_the_end_is_a_slow_swarm(autojump_clock):
    async def never(*, max_length):
        await trio.sleep_forever()

    context = context_of(never, give_up_seconds=30.0)
    with pytest.raises(SlowPeer, match=r"no answer within 30.0 s"):
        await context.logits_after(PROMPT, best)
    assert trio.current_time() == pytest.approx(30.0)


async def test_our_own_bugs_are_not_taken_for_a_peers_fault(autojump_clock):
    def bug(logits):
        raise ZeroDivisionError

    async with swarm() as world:
        context = context_of(two_replicas(world))
        with pytest.raises(ZeroDivisionError):
            await context.logits_after(PROMPT, bug)
        assert context.blame.avoided(trio.current_time()) == frozenset()
        assert await continued(context, PROMPT, 1) == generated(PROMPT, 1, BLOCKS)
        context.close()


# The loop over it.


async def tokens_of(world: World, *, stop=(), new: int = 8, end_tokens=(), close: bool = True):
    context = context_of(two_replicas(world), ends=FakeEnds(end_tokens))
    generation = Generation(context.ends, context, SamplingOptions(), stop, new)
    found = [token async for token in generation.run(list(PROMPT), close=close)]
    if close:
        assert context.session is None
    context.close()
    return found


async def test_a_generation_ends_after_so_many_tokens(autojump_clock):
    async with swarm() as world:
        found = await tokens_of(world)
        assert [token.id for token in found] == generated(PROMPT, 8, BLOCKS)
        assert "".join(token.text for token in found) == FakeEnds().decode(generated(PROMPT, 8, BLOCKS))
        assert [token.finish_reason for token in found] == [None] * 7 + ["length"]


async def test_a_generation_ends_at_the_models_end_token_whose_text_is_left_out(autojump_clock):
    expected = generated(PROMPT, 8, BLOCKS)
    end = next(index for index in range(1, 8) if expected[index] not in expected[:index])
    async with swarm() as world:
        found = await tokens_of(world, end_tokens={expected[end]})
        assert [token.id for token in found] == expected[: end + 1]
        assert "".join(token.text for token in found) == FakeEnds().decode(expected[:end])
        assert found[-1].finish_reason == "end"


async def test_a_generation_ends_at_a_stop_string_which_is_left_out(autojump_clock):
    text = FakeEnds().decode(generated(PROMPT, 8, BLOCKS))
    async with swarm() as world:
        found = await tokens_of(world, stop=(text[3:5],))
        assert "".join(token.text for token in found) == text[: text.index(text[3:5])]
        assert found[-1].finish_reason == "stop"
        assert len(found) == text.index(text[3:5]) + 2


async def test_what_is_held_back_for_a_stop_string_comes_with_the_last_token(autojump_clock):
    text = FakeEnds().decode(generated(PROMPT, 8, BLOCKS))
    async with swarm() as world:
        found = await tokens_of(world, stop=(text[-2:] + "!",))
        assert "".join(token.text for token in found) == text
        assert found[-1].text.endswith(text[-2:])
        assert found[-1].finish_reason == "length"


async def test_a_generation_that_is_left_early_ends_its_session(autojump_clock):
    async with swarm() as world:
        context = context_of(two_replicas(world))
        tokens = Generation(context.ends, context, SamplingOptions(), (), 8).run(list(PROMPT), close=True)
        async for _ in tokens:
            break
        await tokens.aclose()
        assert context.session is None
        await trio.sleep(1)
        world.assert_idle()
