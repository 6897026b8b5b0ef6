"""Options of a generation: numbers in whatever form, and what is no option is named on the call."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from client.generation.checks import ids_of_words, prompt_ids, stop_strings, token_ids, whole, words
from client.generation.options import (
    OPTION_NAMES,
    RANGES,
    GenerateArguments,
    GenerateOptions,
    SamplingOptions,
    options_of,
)
from node.runtime.values import number, shown, switch

REAL = [name for name, allowed in RANGES.items() if not allowed.whole]
WHOLE = [name for name, allowed in RANGES.items() if allowed.whole]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "of",
    [
        float,
        np.float32,
        np.float64,
        np.float16,
        np.array,
        torch.tensor,
        Decimal,
        lambda n: torch.tensor(n).half(),
    ],
)
def test_a_number_may_come_in_whatever_holds_one(name, of):
    found = number(name, of(0.5), RANGES[name])
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("name", REAL)
def test_a_whole_number_is_a_number(name):
    for one in (1, np.int64(1), torch.tensor(1)):
        assert number(name, one, RANGES[name]) == 1.0


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("of", [int, np.int64, np.uint8, np.array, torch.tensor])
def test_a_count_may_come_in_whatever_holds_one(name, of):
    found = whole(name, of(7), RANGES[name])
    assert type(found) is int
    assert found == 7


NONE = [True, False, np.True_, torch.tensor(True), "1", b"1", [1], (1,), {}, object, 1j, math.nan, math.inf]
NONE += [-math.inf, np.nan, torch.tensor(math.nan), torch.tensor([1.0]), np.array([1]), torch.tensor([1, 2])]


@pytest.mark.parametrize("value", NONE, ids=shown)
@pytest.mark.parametrize("name", RANGES)
def test_what_is_no_number_is_refused_with_what_was_found_and_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*(is allowed|is needed)$"):
        whole(name, value, RANGES[name]) if name in WHOLE else number(name, value, RANGES[name])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.5, 1.0, np.float32(2), torch.tensor(2.0), Decimal(2)], ids=shown)
def test_a_count_is_not_rounded(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        whole(name, value, RANGES[name])


@pytest.mark.parametrize(
    "seed", [0, 1, -1, -(2**63), 2**63, 2**64 - 1, np.uint64(2**64 - 1), torch.tensor(3)]
)
def test_a_seed_is_what_torch_takes(seed):
    torch.Generator().manual_seed(SamplingOptions(1.0, seed=seed).seed)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, True, "1"])
def test_another_seed_is_refused_by_name(seed):
    with pytest.raises(ValueError, match=r"^seed is .*, a whole number of 64 bits is allowed$"):
        SamplingOptions(1.0, seed=seed)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logit_bias": [1]}, "logit_bias is .1. .list., a dict"),
        ({"logit_bias": {"a": 1}}, "a token in logit_bias is 'a', a whole number of at least 0"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101, -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan"),
        ({"logit_bias": {True: 1}}, "a token in logit_bias is True"),
        ({"bad_words_ids": [1]}, "bad_words_ids is 1, a list of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids holds an empty list"),
        ({"bad_words_ids": [[1.5]]}, "a token in bad_words_ids is 1.5"),
        ({"suppress_tokens": 1}, "suppress_tokens is 1, a list of token ids"),
        ({"stop_token_ids": "1"}, "stop_token_ids is '1', a list of token ids"),
        ({"stop_token_ids": [-1]}, "a token in stop_token_ids is -1"),
        ({"sequence_bias": [[1, 2.0]]}, "sequence_bias is 1, a list of token ids"),
        ({"sequence_bias": {}}, "sequence_bias is {} .dict."),
        ({"exponential_decay_length_penalty": 1}, "exponential_decay_length_penalty is 1, .tokens, factor."),
        ({"logits_processor": "x"}, "logits_processor is 'x', a LogitsProcessorList or a list of functions"),
        ({"logits_processor": [1]}, "logits_processor is .1. .list., "),
        ({"logprobs": 5}, "logprobs is 5, True or False is allowed"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens is 'no', True or False is allowed"),
        ({"top_logprobs": -1}, "top_logprobs is -1, a whole number of at least 0 is needed"),
        ({"top_k": -1}, "top_k is -1, a whole number of at least 0 is needed"),
        ({"top_k": True}, "top_k is True, a whole number"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, -2 to 2 is allowed"),
        ({"min_p": 1.1}, "min_p is 1.1, 0 to 1 is allowed"),
        ({"top_p": 0}, "top_p is 0, above 0 and at most 1 is allowed"),
    ],
    ids=str,
)
def test_an_option_of_another_kind_is_refused_by_name(options, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        SamplingOptions(**options)


def test_token_ids_may_come_in_whatever_holds_them():
    for some in (
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        torch.tensor([1, 2]),
        (np.int32(1), torch.tensor(2)),
        range(1, 3),
    ):
        assert token_ids("tokens", some) == (1, 2)
    token: Any = torch.tensor(3)
    bias: Any = {"3": 1, np.int64(4): np.float32(-0.5)}
    assert SamplingOptions(stop_token_ids=token).stop_token_ids == (3,)
    assert SamplingOptions(logit_bias=bias).logit_bias == (
        (3, 1.0),
        (4, -0.5),
    )
    assert switch("logprobs", np.True_) is switch("logprobs", torch.tensor(True)) is True


def test_stop_strings_may_come_alone_or_in_whatever_holds_them():
    assert (
        stop_strings("stop", "ab")
        == stop_strings("stop", np.array(["ab"]))
        == stop_strings("stop", {"ab"})
        == ("ab",)
    )
    assert stop_strings("stop", None) == stop_strings("stop", ()) == ()
    for wrong in (1, b"ab", [b"ab"], ["a", 1], {"a": "b"}):
        with pytest.raises(ValueError, match=r"^stop is .*, a string or a list of strings is allowed$"):
            stop_strings("stop", wrong)
    with pytest.raises(ValueError, match="a stop string is empty"):
        stop_strings("stop", ["a", ""])


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(char) for char in text]}


def test_a_prompt_is_text_or_token_ids_in_one_row():
    ids = [1, 2, 3]
    for prompt in (
        ids,
        tuple(ids),
        [ids],
        np.array(ids),
        np.array([ids]),
        torch.tensor(ids),
        torch.tensor([ids]),
    ):
        assert prompt_ids(prompt, tokenizer, 10) == ids
    assert prompt_ids("ab", tokenizer, 200) == [97, 98]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "the prompt has no tokens"),
        ([], "the prompt has no tokens"),
        (torch.zeros(1, 0, dtype=torch.long), "the prompt has no tokens"),
        ([1, 10], "token 10 is not one of the model's 10"),
        ([-1], "token -1 is not one of the model's 10"),
        ([2**80], "a token in the prompt is 120892"),
        ([1.0], "a token in the prompt is 1.0, a whole number is needed"),
        (torch.tensor([0.5]), "a token in the prompt is 0.5"),
        ([True], "a token in the prompt is True"),
        (["a"], "a token in the prompt is 'a'"),
        (torch.zeros(2, 2, dtype=torch.long), "a token in the prompt is .0, 0."),
        (b"ab", "the prompt is b'ab' .bytes., text or a list of token ids is allowed"),
        (None, "the prompt is None, text or a list of token ids"),
        (3, "the prompt is 3, text"),
        ({1, 2}, "the prompt is {1, 2} .set., text"),
        ({"input_ids": [1]}, "the prompt is {'input_ids': .1.} .dict., text"),
        ("a\udc80", r"the prompt holds '\\udc80' at position 1: it is no text"),
    ],
    ids=shown,
)
def test_another_prompt_is_refused_with_what_was_found(prompt, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        prompt_ids(prompt, tokenizer, 10)


def test_a_bad_word_is_taken_at_the_beginning_and_behind_a_space():
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(char) for char in text]

    def bad_words(value):
        return ids_of_words(words("bad_words", value), Letters())

    assert bad_words(["ab", (1, 2), torch.tensor([3])]) == ((97, 98), (32, 97, 98), (1, 2), (3,))
    assert bad_words("a") == ((97,), (32, 97))
    with pytest.raises(ValueError, match="a word in bad_words is empty"):
        bad_words([" "])
    with pytest.raises(ValueError, match=r"^bad_words is 3, a list of words is allowed"):
        bad_words(3)


# The list of all options.


def generate_options(**given: Any) -> GenerateOptions:
    """Of the values that callers give: each option has one type, and takes others besides."""
    return GenerateOptions(**given)


def test_the_keywords_of_generate_and_the_fields_of_its_options_are_one_list():
    assert set(GenerateArguments.__annotations__) == OPTION_NAMES


def test_every_option_has_a_check_and_none_of_them_is_given_by_default():
    for name in OPTION_NAMES - {"generation_config", "logits_processor"}:
        with pytest.raises(ValueError, match=name if name != "stop" else "stop"):
            generate_options(**{name: object()})
        assert getattr(GenerateOptions(), name) is None


def test_options_are_a_value_or_keywords_or_a_value_in_which_keywords_replace_fields():
    value = generate_options(temperature=np.float32(0.5), stop="a", bad_words=["b", [1]])
    assert (
        options_of(None, {"temperature": 0.5, "stop": ["a"], "bad_words": ("b", (1,)), "top_k": None})
        == value
    )
    assert options_of(value, {}) is value
    changed = options_of(value, {"top_k": 3, "stop": None})
    assert (changed.temperature, changed.stop, changed.top_k) == (0.5, ("a",), 3)
    with pytest.raises(ValueError, match="top_k is -1"):
        options_of(value, {"top_k": -1})


def test_a_name_that_is_no_option_and_a_value_that_is_no_options_are_type_errors():
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'temprature'"):
        options_of(None, {"temprature": 1})
    with pytest.raises(TypeError, match=r"options is .* \(dict\), client.GenerateOptions\(...\) is needed"):
        options_of({"top_k": 3}, {})  # type: ignore[arg-type]  # a caller's mistake


def test_options_that_were_checked_pass_every_check_again():
    given = {
        "logit_bias": {1: 2.0},
        "sequence_bias": {(1, 2): 3.0},
        "bad_words": ["a", [1]],
        "bad_words_ids": [[1]],
        "exponential_decay_length_penalty": (2, 1.5),
        "logits_processor": print,
        "stop": {"x"},
    }
    once = generate_options(**given)
    assert options_of(once, {"seed": 1}) == options_of(None, {**given, "seed": 1})
