"""Guessed tokens change no token, whatever is guessed and whatever happens to the hops on the way."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import trio
from torch import Tensor

from client.generation.conversation import Conversation
from client.generation.generate import Generation, Token
from client.generation.generation_config import Settings
from client.generation.options import SamplingOptions
from client.session.core import FEW_TOKENS
from client.speculation.speculation import Crowd, Drafter, Speculation
from client.speculation.width import WidthPolicy
from node.model.blocks.rope import LengthRope
from routing.names import PeerId
from tests.fakes_serving import FakeEmbedAndHead, World, conversation_of, generated, hops_of, swarm

BLOCKS = 6
PROMPT = [3, 1, 4, 1, 5]
NEW = 24
WHOLE = generated(PROMPT, NEW, BLOCKS)


class Oracle:
    """Guesses the true tokens, and every now and then a wrong one."""

    seconds = 0.0

    def __init__(self, tokens: Sequence[int], wrong: float = 0.0, seed: int = 0) -> None:
        self._tokens = tokens
        self._wrong = wrong
        self._rng = random.Random(seed)
        self.asked = 0

    async def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """As many as were asked for, beyond the end of the text too."""
        await trio.lowlevel.checkpoint()
        self.asked += most
        true = (list(self._tokens) + [0] * most)[len(tokens) : len(tokens) + most]
        return [25 - token if self._rng.random() < self._wrong else token for token in true]


class Wide(WidthPolicy):
    """Proposes as many as it may from the first step on."""

    def width(self, matched: int, most: int, *, sharing: int = 1, drafting: float = 0.0) -> int:
        """All."""
        return max(0, min(most, self.most))


def speculation(drafter: Drafter | None = None, *, most: int = 4, is_asked: bool = True) -> Speculation:
    return Speculation(Wide(most=most), Crowd(), drafter, is_asked=is_asked)


def replicas(world: World, seconds: float = 0.0) -> World:
    """Two nodes for each half of the model; a and b come first by their names."""
    for name, start, stop in [("a", 0, 3), ("x", 0, 3), ("b", 3, 6), ("y", 3, 6)]:
        world.add(name, start, stop, seconds=seconds)
    return world


def steps_at(world: World, name: str) -> list[tuple[int, int]]:
    """The steps that a node has computed: first position, positions."""
    return [step[:2] for step in world.nodes[PeerId(name)].span.steps]


async def tokens_of(
    conversation: Conversation,
    guesses: Speculation | None,
    prompt: Sequence[int] = PROMPT,
    *,
    close: bool = True,
    **settings: Any,
) -> list[Token]:
    settled = replace(Settings(SamplingOptions(), NEW, (), ()), **settings)
    local_model = cast(FakeEmbedAndHead, conversation.local_model)
    generation = Generation(local_model, conversation, settled, speculation=guesses)
    async with aclosing(generation.run(list(prompt), close=close)) as tokens:
        return [token async for token in tokens]


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def timeless(tokens: Sequence[Token]) -> list[Token]:
    return [replace(token, seconds=0) for token in tokens]


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("most", [1, 4, 15])
async def test_tokens_are_those_of_the_whole_model_whatever_is_guessed(wrong, most, autojump_clock):
    async with swarm() as world:
        replicas(world)
        oracle = Oracle(PROMPT + WHOLE, wrong)
        tokens = await tokens_of(conversation_of(world), speculation(oracle, most=most))
        assert ids(tokens) == WHOLE
        assert [token.finish_reason for token in tokens] == [None] * (NEW - 1) + ["length"]
        assert "".join(token.text for token in tokens) == FakeEmbedAndHead().decode(WHOLE)
        steps = steps_at(world, "b")
        assert max(size for _, size in steps[1:]) == min(most, FEW_TOKENS - 1) + 1
        if not wrong:
            assert len(steps) == 1 + -(-(NEW - 1) // (most + 1))


async def test_tokens_that_are_looked_up_change_none(autojump_clock):
    async with swarm() as world:
        prompt = [*PROMPT, *WHOLE, 7, *PROMPT]  # the answer may be in the prompt, or not
        tokens = await tokens_of(conversation_of(replicas(world), max_length=128), speculation(), prompt)
        assert ids(tokens) == generated(prompt, NEW, BLOCKS)


async def test_the_usual_policy_needs_fewer_steps_where_guesses_are_right(autojump_clock):
    async with swarm() as world:
        replicas(world, seconds=0.1)
        guesses = Speculation(WidthPolicy(), Crowd(), Oracle(PROMPT + WHOLE))
        assert ids(await tokens_of(conversation_of(world), guesses)) == WHOLE
        assert len(steps_at(world, "b")) < NEW / 2


@pytest.mark.parametrize("new", [1, 2, 3, 5, 6, 7])
async def test_no_token_is_computed_beyond_those_that_were_asked_for(new, autojump_clock):
    async with swarm() as world:
        replicas(world)
        conversation = conversation_of(world, max_length=len(PROMPT) + new)
        tokens = await tokens_of(conversation, speculation(Oracle(PROMPT + WHOLE)), max_new_tokens=new)
        assert ids(tokens) == WHOLE[:new]
        assert max(at + size for at, size in steps_at(world, "b")) == len(PROMPT) + new - 1


@pytest.mark.parametrize("wrong", [0.0, 0.3])
async def test_an_end_token_within_right_guesses_ends_the_text(wrong, autojump_clock):
    end = next(at for at in range(6, NEW) if WHOLE[at] not in WHOLE[:at])
    async with swarm() as world:
        conversation = conversation_of(replicas(world), local_model=FakeEmbedAndHead({WHOLE[end]}))
        tokens = await tokens_of(conversation, speculation(Oracle(PROMPT + WHOLE, wrong), most=15))
        assert ids(tokens) == WHOLE[: end + 1]
        assert tokens[-1].finish_reason == "end"
        # The end comes out of the position before it, and nothing beyond it is computed.
        assert max(at + size for at, size in steps_at(world, "b")) == len(PROMPT) + end


async def test_a_stop_string_within_right_guesses_ends_the_text(autojump_clock):
    text = FakeEmbedAndHead().decode(WHOLE)
    async with swarm() as world:
        guesses = speculation(Oracle(PROMPT + WHOLE), most=15)
        tokens = await tokens_of(conversation_of(replicas(world)), guesses, stop=(text[8:10],))
        assert "".join(token.text for token in tokens) == text[: text.index(text[8:10])]
        assert tokens[-1].finish_reason == "stop"


class SmoothEnds(FakeEmbedAndHead):
    """Every token has a chance."""

    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        """[1, tokens, hidden] -> logits [1, tokens, vocabulary]."""
        best = hidden.sum(-1, keepdim=True).long() % self.vocabulary
        return -((torch.arange(self.vocabulary) - best) % self.vocabulary).float() / 8


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "seed": 6, "top_k": 5, "repetition_penalty": 1.3, "top_logprobs": 3},
        {"repetition_penalty": 1.5, "logprobs": True, "no_repeat_ngram_size": 2},
        {"temperature": 1.0, "seed": 7, "presence_penalty": 1.0, "min_new_tokens": 9},
    ],
)
@pytest.mark.parametrize("wrong", [0.0, 0.4])
async def test_draws_penalties_and_log_probabilities_are_the_same_as_without_guesses(
    options, wrong, autojump_clock
):
    async with swarm() as world:
        replicas(world)
        settings: dict[str, Any] = {"options": SamplingOptions(**options)}
        plain = await tokens_of(conversation_of(world, local_model=SmoothEnds()), None, **settings)
        oracle = Oracle(PROMPT + ids(plain), wrong)
        guessed = await tokens_of(
            conversation_of(world, local_model=SmoothEnds()), speculation(oracle), **settings
        )
        assert [replace(token, seconds=0) for token in guessed] == [
            replace(token, seconds=0) for token in plain
        ]
        assert oracle.asked > 8


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
async def test_a_later_turn_knows_the_true_tokens_in_the_caches(wrong, autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world), max_length=100)
        guesses = speculation(Oracle(PROMPT + WHOLE, wrong))
        first = ids(await tokens_of(conversation, guesses, close=False, max_new_tokens=7))
        assert conversation.tokens == [*PROMPT, *first][: len(conversation.tokens)]
        second = [*PROMPT, *first, 9, 9]
        wanted = generated(second, 8, BLOCKS)
        before = len(steps_at(world, "b"))
        guesses = speculation(Oracle([*second, *wanted], wrong))
        assert ids(await tokens_of(conversation, guesses, second, close=True, max_new_tokens=8)) == wanted
        at, size = steps_at(world, "b")[before]
        assert (at + size, size) == (len(second), 3)  # the last token and the two new ones alone


async def test_a_generation_that_is_left_early_leaves_a_conversation_that_can_be_used(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world), max_length=100)
        settings = Settings(SamplingOptions(), NEW, (), ())
        for leave in (1, 3, 6):
            guesses = speculation(Oracle(PROMPT + WHOLE, 0.3))
            generation = Generation(FakeEmbedAndHead(), conversation, settings, speculation=guesses)
            async with aclosing(generation.run(list(PROMPT), close=False)) as tokens:
                for _ in range(leave):
                    await anext(tokens)
            assert guesses.crowd.count == 0
        assert ids(await tokens_of(conversation, None)) == WHOLE


@pytest.mark.parametrize("peer", ["a", "b"])
@pytest.mark.parametrize("dies_after", [1, 4, 9])
async def test_a_hop_that_dies_in_the_middle_of_guesses_is_replaced_and_the_tokens_stay(
    peer, dies_after, autojump_clock
):
    async with swarm() as world:
        conversation = conversation_of(replicas(world, seconds=1))
        guesses = speculation(Oracle(PROMPT + WHOLE, 0.2))
        settings = Settings(SamplingOptions(), NEW, (), ())
        generation = Generation(FakeEmbedAndHead(), conversation, settings, speculation=guesses)
        found = []
        async with aclosing(generation.run(list(PROMPT), close=False)) as tokens:
            async for token in tokens:
                found.append(token.id)
                if len(found) == dies_after:
                    await trio.sleep(0.5)  # a step with guesses is on its way
                    await world.kill(peer)
        assert found == WHOLE
        assert peer not in hops_of(conversation).split()
        conversation.close()


async def test_a_hop_that_answers_nan_in_a_step_with_guesses_is_replaced(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world))
        guesses = speculation(Oracle(PROMPT + WHOLE))
        settings = Settings(SamplingOptions(), NEW, (), ())
        generation = Generation(FakeEmbedAndHead(), conversation, settings, speculation=guesses)
        found = []
        async with aclosing(generation.run(list(PROMPT), close=False)) as tokens:
            async for token in tokens:
                found.append(token.id)
                if len(found) == 6:
                    world.nodes[PeerId("b")].span.poison = lambda hidden: hidden * float("nan")
        assert found == WHOLE
        assert hops_of(conversation) == "a y"
        conversation.close()


# Where no guess can be sent.


class LongRopeEnds(FakeEmbedAndHead):
    """A model whose angles depend on the length."""

    rope = LengthRope((("longrope", 8),))


@pytest.mark.parametrize("is_asked", [True, False])
async def test_a_model_whose_angles_depend_on_the_length_gets_no_guesses(is_asked, autojump_clock, caplog):
    async with swarm() as world:
        conversation = conversation_of(replicas(world), local_model=LongRopeEnds())
        oracle = Oracle(PROMPT + WHOLE)
        with caplog.at_level(logging.WARNING, "raceme"):
            tokens = await tokens_of(conversation, speculation(oracle, is_asked=is_asked))
        assert ids(tokens) == WHOLE
        assert oracle.asked == 0
        assert [record.getMessage() for record in caplog.records if "speculation" in record.getMessage()] == [
            "speculation is off: the model's rotary angles depend on the length of the text"
        ] * is_asked


async def test_a_chain_whose_caches_cannot_go_back_gets_no_guesses(autojump_clock, caplog):
    async with swarm() as world:
        replicas(world)
        for node in world.nodes.values():
            node.span.can_cut = False
        oracle = Oracle(PROMPT + WHOLE)
        with caplog.at_level(logging.WARNING, "raceme"):
            assert ids(await tokens_of(conversation_of(world), speculation(oracle))) == WHOLE
        assert oracle.asked == 0
        assert (
            "speculation is off: a server keeps states of convolutions, which cannot go back" in caplog.text
        )


async def test_ends_that_keep_state_get_guesses_without_a_step_ahead(autojump_clock):
    class Stateful(FakeEmbedAndHead):
        stateless = False

    async with swarm() as world:
        conversation = conversation_of(replicas(world), local_model=Stateful())
        assert ids(await tokens_of(conversation, speculation(Oracle(PROMPT + WHOLE, 0.2)))) == WHOLE
        assert max(size for _, size in steps_at(world, "b")[1:]) == 5
