"""Which values of a generation's options change logits, and which numbers are the last that are allowed."""

from __future__ import annotations

from typing import Any

import pytest

from client.generation import checks
from client.generation.options import MIN_TEMPERATURE, RANGES, GenerateOptions, SamplingOptions

# Each option that changes which token is the likeliest, with a value of it.
CHANGING: dict[str, Any] = {
    "logit_bias": {3: 1.0},
    "sequence_bias": [[[1, 2], 1.0]],
    "bad_words_ids": [[1]],
    "suppress_tokens": [1],
    "begin_suppress_tokens": [1],
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 1,
    "min_length": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "exponential_decay_length_penalty": (1, 1.5),
    "remove_invalid_values": True,
    "logits_processor": [lambda ids, scores: scores],
    "repetition_penalty": 1.5,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
}


@pytest.mark.parametrize("name", CHANGING)
def test_an_option_that_changes_logits_needs_all_of_them(name):
    assert SamplingOptions().best_only
    assert not SamplingOptions(**{name: CHANGING[name]}).best_only


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.0}, {"no_repeat_ngram_size": 0}, {"top_k": 5}, {"temperature": 0}]
)
def test_an_option_that_changes_nothing_needs_the_largest_logit_alone(options):
    assert SamplingOptions(**options).best_only


@pytest.mark.parametrize("options", [{"logprobs": True}, {"top_logprobs": 1}])
def test_log_probabilities_need_all_logits(options):
    assert SamplingOptions(**options).wants_logprobs
    assert not SamplingOptions(**options).best_only
    assert not SamplingOptions(logprobs=False, top_logprobs=0).wants_logprobs


def test_the_smallest_temperature_that_draws_is_the_least_that_cannot_overflow():
    assert SamplingOptions(temperature=MIN_TEMPERATURE * 0.99).greedy
    assert not SamplingOptions(temperature=MIN_TEMPERATURE).greedy
    assert not SamplingOptions(temperature=MIN_TEMPERATURE).best_only


@pytest.mark.parametrize("name", RANGES)
def test_a_number_is_allowed_up_to_its_bounds(name):
    allowed = RANGES[name]
    step = 1 if allowed.whole else 0.001
    assert getattr(GenerateOptions(**{name: allowed.high}), name) == allowed.high
    if not allowed.above:
        assert getattr(GenerateOptions(**{name: allowed.low}), name) == allowed.low
    for value in (allowed.low - step, allowed.high + step, *([allowed.low] if allowed.above else [])):
        with pytest.raises(ValueError, match=f"^{name} is "):
            GenerateOptions(**{name: value})


def test_all_named_tokens_are_compared_with_the_vocabulary():
    given: dict[str, Any] = {
        "suppress_tokens": [1],
        "begin_suppress_tokens": [2],
        "forced_eos_token_id": [3, 4],
        "stop_token_ids": 5,
        "logit_bias": {6: 1.0},
        "sequence_bias": [[[7, 8], 1.0]],
        "bad_words_ids": [[9], [10, 11]],
        "forced_bos_token_id": 0,
    }
    options = SamplingOptions(**given)
    assert options.tokens == frozenset(range(12))
    assert SamplingOptions().tokens == frozenset()


@pytest.mark.parametrize(
    ("check", "value", "found"),
    [
        (checks.token_ids, (), ()),
        (checks.token_ids, [0, 2**31 - 1], (0, 2**31 - 1)),
        (checks.one_or_more, 7, (7,)),
        (checks.one_or_more, [7, 8], (7, 8)),
        (checks.token_lists, [[1], [2, 3]], ((1,), (2, 3))),
        (checks.logit_bias, {"1": 100, 2: -100}, ((1, 100.0), (2, -100.0))),
        (checks.sequence_bias, {(1, 2): 1e4}, (((1, 2), 1e4),)),
        (checks.sequence_bias, [[[1, 2], -1e9]], (((1, 2), -1e9),)),
        (checks.decay, (5, 100), (5, 100.0)),
        (checks.stop_strings, "a", ("a",)),
        (checks.stop_strings, None, ()),
        (checks.words, ["a", [1, 2]], ("a", (1, 2))),
        (checks.words, "a", ("a",)),
    ],
)
def test_an_option_comes_out_in_plain_values_and_the_second_time_as_it_is(check, value, found):
    assert check("x", value) == found
    assert check("x", found) == found


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (checks.token_ids, 7, "x is 7, a list of token ids is allowed"),
        (checks.token_ids, [-1], "a token in x is -1"),
        (checks.token_ids, [2**31], "a token in x is 2147483648"),
        (checks.one_or_more, "7", "x is '7', a list of token ids is allowed"),
        (checks.token_lists, 7, "x is 7, a list of lists of token ids is allowed"),
        (checks.token_lists, [[]], "x holds an empty list"),
        (checks.logit_bias, [1], "x is .*, a dict from token id to bias is allowed"),
        (checks.logit_bias, {1: 100.1}, "x of token 1 is 100.1"),
        (checks.logit_bias, {"a": 1}, "a token in x is 'a'"),
        (checks.sequence_bias, {}, "x is {}"),
        (checks.sequence_bias, [[[], 1.0]], "x holds"),
        (checks.sequence_bias, [[[1], 1.0, 2]], "x holds"),
        (checks.sequence_bias, {(1,): 10001}, r"x of \[1\] is 10001"),
        (checks.decay, (1,), r"x is \(1,\) .*, \(tokens, factor\) is allowed"),
        (checks.decay, 5, r"x is 5, \(tokens, factor\) is allowed"),
        (checks.decay, (-1, 1), r"x\[0\] is -1"),
        (checks.decay, (1, 0), r"x\[1\] is 0"),
        (checks.processors, "a", "x is 'a', a LogitsProcessorList"),
        (checks.processors, [1], "x is .*, a LogitsProcessorList"),
        (checks.stop_strings, 5, "x is 5, a string or a list of strings is allowed"),
        (checks.stop_strings, ["a", 5], "x is .*, a string or a list of strings is allowed"),
        (checks.stop_strings, [""], "a stop string is empty"),
        (checks.words, 5, "x is 5, a list of words is allowed"),
        (checks.words, [" "], "a word in x is empty"),
    ],
)
def test_another_value_is_refused_with_what_was_found(check, value, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        check("x", value)


def test_a_token_is_one_of_the_vocabulary():
    checks.check_vocabulary([0, 9], 10)
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=f"^token {wrong} is not one of the model's 10"):
            checks.check_vocabulary([wrong], 10)
