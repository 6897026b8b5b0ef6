"""Choosing tokens as transformers does."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from client.sampling import Sampler, SamplingOptions

VOCABULARY = 20
logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=VOCABULARY, max_size=VOCABULARY)


def picks(options: SamplingOptions, logits: torch.Tensor, count: int, tokens=(1, 2)) -> list[int]:
    sampler = Sampler(options)
    return [sampler.pick(logits, list(tokens)) for _ in range(count)]


@given(logits_lists)
def test_without_a_temperature_the_likeliest_token_is_taken(numbers):
    logits = torch.tensor(numbers)
    for options in (SamplingOptions(), SamplingOptions(temperature=0.0), SamplingOptions(0.0, 5, 0.5)):
        assert options.greedy
        assert picks(options, logits, 3) == [int(logits.argmax())] * 3


def test_a_temperature_near_zero_is_greedy_and_breaks_nothing():
    logits = torch.linspace(-20, 20, VOCABULARY)
    for temperature in (1e-4, 1e-6, 1e-30, 5e-324):
        assert picks(SamplingOptions(temperature), logits, 5) == [VOCABULARY - 1] * 5


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(seed):
    options = SamplingOptions(temperature=1.0, seed=seed)
    logits = torch.zeros(VOCABULARY)
    assert picks(options, logits, 30) == picks(options, logits, 30)
    assert picks(options, logits, 30) != picks(SamplingOptions(1.0, seed=seed - 1 if seed else 9), logits, 30)


def test_without_a_seed_two_generations_differ():
    options = SamplingOptions(temperature=1.0)
    assert picks(options, torch.zeros(VOCABULARY), 40) != picks(options, torch.zeros(VOCABULARY), 40)


def test_a_generation_with_a_seed_neither_uses_nor_moves_the_generator_of_the_process():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = picks(SamplingOptions(1.0, seed=3), torch.zeros(VOCABULARY), 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert picks(SamplingOptions(1.0, seed=3), torch.zeros(VOCABULARY), 5) == first


@given(logits_lists, st.integers(1, 30))
@settings(max_examples=40)
def test_top_k_takes_none_but_the_k_likeliest(numbers, k):
    logits = torch.tensor(numbers)
    threshold = logits.sort(descending=True).values[min(k, VOCABULARY) - 1]
    for token in picks(SamplingOptions(50.0, top_k=k, seed=0), logits, 20):
        assert logits[token] >= threshold


@given(logits_lists, st.floats(0.01, 1.0))
@settings(max_examples=40)
def test_top_p_takes_none_but_the_fewest_tokens_with_so_much_probability(numbers, p):
    logits = torch.tensor(numbers)
    probabilities = logits.double().softmax(-1)
    for token in picks(SamplingOptions(1.0, top_p=p, seed=0), logits, 20):
        likelier = probabilities[probabilities > probabilities[token]].sum()
        assert likelier <= p + 1e-5


def test_top_k_and_top_p_reach_every_token_that_they_leave():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]))
    assert set(picks(SamplingOptions(1.0, top_k=3, seed=0), logits, 200)) == {0, 1, 2}
    assert set(picks(SamplingOptions(1.0, top_p=0.65, seed=0), logits, 200)) == {0, 1}
    assert set(picks(SamplingOptions(1.0, top_p=0.75, seed=0), logits, 200)) == {0, 1, 2}
    assert set(picks(SamplingOptions(1.0, top_p=0.01, seed=0), logits, 50)) == {0}
    assert set(picks(SamplingOptions(1.0, top_p=1.0, seed=0), logits, 400)) == {0, 1, 2, 3, 4}


def test_tokens_come_as_often_as_their_probability_says():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    found = picks(SamplingOptions(1.0, seed=5), logits, 3000)
    for token, probability in enumerate([0.5, 0.3, 0.2]):  # five standard deviations
        assert abs(found.count(token) / 3000 - probability) < 5 * math.sqrt(0.25 / 3000)


def test_the_repetition_penalty_divides_what_is_above_zero_and_multiplies_what_is_below():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    greedy = SamplingOptions(repetition_penalty=2.0)
    assert picks(greedy, logits, 1, tokens=[0]) == [1]  # 2.0 / 2 < 1.5
    assert picks(greedy, logits, 1, tokens=[0, 0, 0]) == [1]  # once for all
    assert picks(greedy, logits[2:], 1, tokens=[0]) == [1]  # -1.0 * 2 < -1.5
    assert picks(greedy, logits, 1, tokens=[3]) == [0]


@lru_cache
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=1.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(repetition_penalty=1.7),
        SamplingOptions(repetition_penalty=0.6),
        SamplingOptions(1.0),
        SamplingOptions(0.7),
        SamplingOptions(1.5, top_k=4),
        SamplingOptions(1.5, top_p=0.8),
        SamplingOptions(2.0, top_k=10, top_p=0.7),
        SamplingOptions(2.0, top_k=10, top_p=0.9, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_transformers_own_generate(options):
    model, prompt, new = tiny_model(), [3, 1, 4, 1, 5], 20
    torch.manual_seed(11)
    asked = {
        "do_sample": not options.greedy,
        "temperature": options.temperature,
        "top_k": options.top_k or (0 if not options.greedy else None),
        "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty,
    }
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        **{name: value for name, value in asked.items() if value is not None},
    )[0].tolist()

    sampler, tokens = Sampler(SamplingOptions(*_without_seed(options), seed=11)), list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
            tokens.append(sampler.pick(logits, tokens))
    assert tokens == expected


def _without_seed(options: SamplingOptions) -> tuple:
    return options.temperature, options.top_k, options.top_p, options.repetition_penalty


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.nan},
    ],
    ids=str,
)
def test_an_option_outside_its_range_is_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        SamplingOptions(**options)
