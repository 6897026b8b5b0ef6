"""Choosing tokens as transformers does."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as library

from client.generation.options import SamplingOptions
from client.generation.sampling import Sampler

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
@example([1.0, 1.0000001192092896] + [0.0] * (VOCABULARY - 2), 1)
@settings(max_examples=40)
def test_top_k_takes_none_but_the_k_likeliest(numbers, k):
    temperature = 50.0
    logits = (
        torch.tensor(numbers) / temperature
    )  # before top_k, as in transformers: neighbours may become equal
    threshold = logits.sort(descending=True).values[min(k, VOCABULARY) - 1]
    for token in picks(SamplingOptions(temperature, top_k=k, seed=0), torch.tensor(numbers), 20):
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

    drawn = SamplingOptions(
        options.temperature, options.top_k, options.top_p, options.repetition_penalty, seed=11
    )
    sampler, tokens = Sampler(drawn), list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
            tokens.append(sampler.pick(logits, tokens))
    assert tokens == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": math.nan},
        {"temperature": math.inf},
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


# Every filter beside the library's own, and all together beside its `generate`.

WORDS = 64  # of the vocabulary here
ENDS = (2, 7)
MANY = 1000  # logits for each filter


def random_case(generator: torch.Generator) -> tuple[torch.Tensor, list[int]]:
    """Logits, some of them equal, and the tokens before: 4 of a prompt and some more."""
    logits = torch.randn(WORDS, generator=generator) * 4
    logits = logits.round() if torch.rand((), generator=generator) < 0.3 else logits
    count = int(torch.randint(4, 14, (), generator=generator))
    return logits, torch.randint(0, WORDS, (count,), generator=generator).tolist()


def sampler_of(options: SamplingOptions) -> Sampler:
    return Sampler(options, end_ids=ENDS, prompt_tokens=4, max_length=14)


def end_tensor() -> torch.Tensor:
    return torch.tensor(ENDS)


FILTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": ({"temperature": 0.7}, lambda: library.TemperatureLogitsWarper(0.7)),
    "top_k": ({"temperature": 1, "top_k": 5}, lambda: library.TopKLogitsWarper(5)),
    "top_p": ({"temperature": 1, "top_p": 0.7}, lambda: library.TopPLogitsWarper(0.7)),
    "min_p": ({"temperature": 1, "min_p": 0.1}, lambda: library.MinPLogitsWarper(0.1)),
    "top_h": ({"temperature": 1, "top_h": 0.5}, lambda: library.TopHLogitsWarper(0.5)),
    "typical_p": ({"temperature": 1, "typical_p": 0.6}, lambda: library.TypicalLogitsWarper(0.6)),
    "epsilon_cutoff": ({"temperature": 1, "epsilon_cutoff": 0.02}, lambda: library.EpsilonLogitsWarper(0.02)),
    "eta_cutoff": (
        {"temperature": 1, "eta_cutoff": 0.02},
        lambda: library.EtaLogitsWarper(0.02, device="cpu"),
    ),
    "repetition_penalty": ({"repetition_penalty": 2}, lambda: library.RepetitionPenaltyLogitsProcessor(2.0)),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, lambda: library.NoRepeatNGramLogitsProcessor(1)),
    "logit_bias": (
        {"logit_bias": {3: 2.5, 9: -100}},
        lambda: library.SequenceBiasLogitsProcessor({(3,): 2.5, (9,): -100.0}),
    ),
    "sequence_bias": (
        {"sequence_bias": [[[3], 2.5], [[1, 9], -4.0]]},
        lambda: library.SequenceBiasLogitsProcessor([[[3], 2.5], [[1, 9], -4.0]]),
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[3], [1, 9], [7]]},
        lambda: library.NoBadWordsLogitsProcessor([[3], [1, 9], [7]], end_tensor()),
    ),
    "min_new_tokens": (
        {"min_new_tokens": 4},
        lambda: library.MinNewTokensLengthLogitsProcessor(4, 4, end_tensor()),
    ),
    "min_length": ({"min_length": 8}, lambda: library.MinLengthLogitsProcessor(8, end_tensor())),
    "forced_eos_token_id": (
        {"forced_eos_token_id": 7},
        lambda: library.ForcedEOSTokenLogitsProcessor(14, 7),
    ),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (2, 1.3)},
        lambda: library.ExponentialDecayLengthPenalty((2, 1.3), end_tensor(), 4),
    ),
    "suppress_tokens": (
        {"suppress_tokens": [1, 40]},
        lambda: library.SuppressTokensLogitsProcessor([1, 40]),
    ),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": [1, 40]},
        lambda: library.SuppressTokensAtBeginLogitsProcessor([1, 40], 4),
    ),
    "remove_invalid_values": ({"remove_invalid_values": True}, library.InfNanRemoveLogitsProcessor),
    "renormalize_logits": ({"temperature": 1, "renormalize_logits": True}, library.LogitNormalization),
}


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_gives_the_scores_of_the_librarys_own(name):
    given, make = FILTERS[name]
    generator = torch.Generator().manual_seed(5)
    sampler, own = sampler_of(SamplingOptions(**given)), make()
    changed = 0
    for _ in range(MANY):
        logits, tokens = random_case(generator)
        before = logits.clone()
        scores = sampler._filtered(logits, tokens)
        expected = own(torch.tensor([tokens]), logits[None].clone())[0]
        assert torch.equal(scores, expected)
        assert torch.equal(logits, before)
        changed += not torch.equal(scores, before)
    assert changed or name == "remove_invalid_values"


def test_presence_and_frequency_are_penalties_over_generated_tokens():
    generator = torch.Generator().manual_seed(6)
    for _ in range(100):
        logits, tokens = random_case(generator)
        presence, frequency = (float(torch.rand((), generator=generator) * 4 - 2) for _ in range(2))
        options = SamplingOptions(presence_penalty=presence, frequency_penalty=frequency)
        scores = sampler_of(options)._filtered(logits, tokens)
        for token, score in enumerate(scores.tolist()):
            count = tokens[4:].count(token)  # OpenAI: mu - c * frequency - (c > 0) * presence
            expected = float(logits[token]) - count * frequency - (count > 0) * presence
            assert score == pytest.approx(expected, abs=1e-5)


def test_every_filter_works_in_the_place_where_the_library_has_it():
    """All at once, beside the scores that `generate` itself samples from."""
    model, prompt = tiny_model(), [3, 1, 4, 1, 5]
    seen: list[torch.Tensor] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        scores[0, 6] += 1.0  # in place, as some do
        return scores

    given: dict[str, Any] = {
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.95,
        "min_p": 0.001,
        "typical_p": 0.98,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[9], [1, 2]],
        "min_new_tokens": 5,
        "sequence_bias": [[[4], 1.5], [[3, 1], -2.0]],
        "suppress_tokens": [0],
        "begin_suppress_tokens": [10],
        "exponential_decay_length_penalty": (3, 1.2),
        "renormalize_logits": True,
    }
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12,
        do_sample=True,
        eos_token_id=[2, 7],
        pad_token_id=0,
        logits_processor=library.LogitsProcessorList([note]),
        output_scores=True,
        return_dict_in_generate=True,
        **given,
    )
    options = SamplingOptions(**given | {"logits_processor": [note]})
    sampler = Sampler(options, end_ids=[2, 7], prompt_tokens=len(prompt), max_length=len(prompt) + 12)
    tokens, expected = theirs.sequences[0].tolist(), list(seen)
    seen.clear()
    for step, scores in enumerate(theirs.scores):
        before = tokens[: len(prompt) + step]
        with torch.inference_mode():
            logits = model(torch.tensor([before])).logits[0, -1].float()
        torch.testing.assert_close(sampler._filtered(logits, before), scores[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen[step], expected[step], atol=1e-4, rtol=1e-4)


def test_a_callers_processor_takes_the_place_of_one_of_its_type():
    mine = library.RepetitionPenaltyLogitsProcessor(5.0)
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    some: Any
    for some in ([mine], mine, library.LogitsProcessorList([mine])):
        options = SamplingOptions(repetition_penalty=1.1, logits_processor=some)
        assert sampler_of(options)._filtered(logits, [0]).tolist() == pytest.approx([0.4, 1.5, -1.0, -1.5])


@pytest.mark.parametrize(
    "wrong", [lambda i, s: None, lambda i, s: s[0], lambda i, s: s.long(), lambda i, s: [1.0]], ids=range(4)
)
def test_a_processor_that_gives_no_scores_is_told_so(wrong):
    with pytest.raises(ValueError, match=r"in logits_processor returned .* scores \[1, 4\] are needed"):
        picks(SamplingOptions(logits_processor=wrong), torch.zeros(4), 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_options_that_forbid_every_token_say_so(temperature):
    tokens: Any = range(4)
    options = SamplingOptions(temperature, suppress_tokens=tokens)
    with pytest.raises(ValueError, match="the options forbid every token"):
        picks(options, torch.zeros(4), 1)


def test_log_probabilities_are_of_the_models_own_distribution_whatever_is_done_to_it():
    logits = torch.randn(WORDS, generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(-1)
    for options in (
        {"top_logprobs": 3},
        {"logprobs": True},
        {"top_logprobs": 3, "temperature": 5.0, "top_k": 9, "repetition_penalty": 1.5, "seed": 1},
        {"top_logprobs": 3, "suppress_tokens": [int(logits.argmax())]},
        {"top_logprobs": 3, "logits_processor": lambda ids, scores: scores.zero_()},
    ):
        asked = SamplingOptions(**options)
        assert not asked.best_only  # all logits are needed
        choice = Sampler(asked).choose(logits, [1, 2])
        assert choice.logprob == float(expected[choice.token])
        best = expected.topk(asked.top_logprobs or 0)
        assert list((choice.top_logprobs or {}).items()) == list(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        assert choice.token == Sampler(asked).pick(logits, [1, 2])
    assert Sampler(SamplingOptions()).choose(logits, [1]) == (int(logits.argmax()), None, None)


def test_greedy_asks_for_no_more_than_the_likeliest_token_where_nothing_changes_that():
    for options in (
        {},
        {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3},
        {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "min_new_tokens": 0},
        {"bad_words_ids": [], "suppress_tokens": [], "logit_bias": {}, "logits_processor": []},
        {"logprobs": False, "top_logprobs": 0, "stop_token_ids": [3], "skip_special_tokens": False},
    ):
        assert SamplingOptions(**options).best_only
        assert Sampler(SamplingOptions(**options), end_ids=[2])._filters == []
