"""A model's generation_config.json does here what it does in transformers' own `generate`."""

from __future__ import annotations

import json
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from client.config import ClientConfig
from client.generation.conversation import Conversation
from client.generation.generation_config import FILE, GenerationDefaults, defaults_of, read_defaults, settle
from client.generation.options import GenerateOptions
from client.generation.sampling import Sampler
from client.lengths import SessionLengths
from client.swarm import Swarm
from node.config import ConfigError
from routing.chains.alternatives import Constraints
from tensor_codec.limits import Limits

VOCABULARY = 40
PROMPT = [3, 1, 4, 1, 5]
NEW = 14
EMPTY: Any = SimpleNamespace(spans=lambda revision, blocks: [])


@lru_cache
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
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
    )
    return LlamaForCausalLM(config).eval()


def written(folder, **config) -> GenerationDefaults:
    (folder / FILE).write_text(json.dumps(config))
    return read_defaults(folder, VOCABULARY)


def settled(defaults: GenerationDefaults, *, room: int = 50, **given):
    return settle(
        GenerateOptions(**given),
        defaults,
        tokenizer=None,
        vocabulary=VOCABULARY,
        prompt_tokens=len(PROMPT),
        room=room,
    )


FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "penalty": {"repetition_penalty": 1.4},
    "bans": {"bad_words_ids": [[9], [1, 2]], "suppress_tokens": [11, 12], "begin_suppress_tokens": [20]},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bias": {"sequence_bias": [[[7], 3.0], [[7, 8], 4.0]]},
    "least": {"min_new_tokens": 9, "eos_token_id": [2, 7, 8, 9, 10, 11, 12, 13]},
    "least length": {"min_length": 12, "eos_token_id": [2, 7, 8, 9, 10, 11, 12, 13]},
    "ends": {"eos_token_id": [2, 7, 8, 9, 10, 11, 12, 13]},
    "forced": {"forced_eos_token_id": 7},
    "decay": {"exponential_decay_length_penalty": [2, 1.5], "eos_token_id": 2},
    "length": {"max_new_tokens": 6},
    "whole length": {"max_length": 9},
    "sampling": {"do_sample": True},
    "sampling, no top_k": {"do_sample": True, "top_k": 0, "temperature": 0.6},
    "a chat model's": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]},
    "another chat model's": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "eos_token_id": [2],
        "pad_token_id": 0,
    },
    "everything": {
        "do_sample": True,
        "temperature": 1.5,
        "min_p": 0.01,
        "typical_p": 0.97,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 1e-3,
        "top_k": 30,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
    "top_p without sampling": {"do_sample": False, "temperature": 0.1, "top_p": 0.0},
}


def theirs(folder, **given):
    """What transformers' `generate` makes of the same file: tokens, and the scores that chose them."""
    model = tiny_model()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    out = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        output_scores=True,
        return_dict_in_generate=True,
        **given,
    )
    return out.sequences[0].tolist()[len(PROMPT) :], [scores[0] for scores in out.scores]


def ours(defaults: GenerationDefaults, follow: list[int] | None = None, **given):
    """The same here.  follow: go on with these tokens, whatever is chosen."""
    settings = settled(defaults, **given)
    ends = defaults.eos_ids or frozenset()
    length = len(PROMPT) + settings.max_new_tokens
    sampler = Sampler(settings.options, end_ids=ends, prompt_tokens=len(PROMPT), max_length=length)
    tokens, scores = list(PROMPT), []
    for step in range(settings.max_new_tokens):
        with torch.inference_mode():
            logits = tiny_model()(torch.tensor([tokens])).logits[0, -1].float()
        scores.append(sampler._filtered(logits, tokens) if sampler._filters else logits)
        tokens.append(sampler.pick(logits, tokens) if follow is None else follow[step])
        if tokens[-1] in ends:
            break
    return tokens[len(PROMPT) :], scores


@pytest.mark.filterwarnings("ignore")  # the library's, about what does nothing
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "given",
    [{}, {"do_sample": False}, {"do_sample": True, "temperature": 0.5}, {"repetition_penalty": 2.0}],
    ids=str,
)
def test_a_file_does_what_it_does_in_transformers_and_an_argument_overrides_it(tmp_path, name, given):
    file = FILES[name]
    given = given if {"max_length", "max_new_tokens"} & file.keys() else {**given, "max_new_tokens": NEW}
    defaults = written(tmp_path, **file)
    tokens, scores = theirs(tmp_path, **given)
    sampled = given.get("do_sample", file.get("do_sample", False))
    found, expected = ours(defaults, tokens if sampled else None, **given)
    assert found == tokens
    assert len(expected) == len(scores)
    for one, other in zip(expected, scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    if sampled:  # the seed decides, and `generate` draws as we do
        torch.manual_seed(11)
        tokens, _ = theirs(tmp_path, **given)
        assert ours(defaults, seed=11, **given)[0] == tokens


def test_temperature_zero_and_no_sampling_draw_nothing_and_leave_penalties(tmp_path):
    defaults = written(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=7, repetition_penalty=1.3)
    for given in ({"temperature": 0}, {"do_sample": False}, {"temperature": 0.0, "top_k": 3}):
        options = settled(defaults, **given).options
        assert options.greedy
        assert (options.top_k, options.top_p, options.repetition_penalty) == (None, None, 1.3)
    assert settled(defaults, temperature=0, repetition_penalty=1.0).options.best_only
    with pytest.raises(
        ValueError, match=r"do_sample is True and temperature 0.0: above 0 is needed to sample"
    ):
        settled(defaults, do_sample=True, temperature=0)


def test_without_a_file_it_is_greedy_and_a_temperature_samples_as_in_transformers(tmp_path):
    nothing = read_defaults(tmp_path, VOCABULARY)
    assert nothing == GenerationDefaults()
    settings = settled(nothing)
    assert settings.options.best_only
    assert (settings.max_new_tokens, settings.stop, settings.from_file) == (
        50,
        (),
        (),
    )  # 64, but for the room
    options = settled(nothing, temperature=0.7).options
    assert (options.temperature, options.top_k) == (0.7, 50)
    assert settled(nothing, do_sample=True).options.temperature == 1.0
    assert settled(nothing, temperature=0.7, top_k=0).options.top_k == 0


def test_what_is_in_force_is_told_with_what_the_file_decided(tmp_path):
    defaults = written(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1, max_new_tokens=30
    )
    settings = settled(defaults, top_p=0.5, seed=3)
    assert settings.as_dict() == {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 50,
        "top_p": 0.5,
        "repetition_penalty": 1.1,
        "seed": 3,
        "max_new_tokens": 30,
    }
    assert settings.from_file == ("do_sample", "temperature", "repetition_penalty", "max_new_tokens")
    greedy = settled(defaults, temperature=0, max_new_tokens=5)
    assert greedy.as_dict() == {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 5}
    assert greedy.from_file == ("repetition_penalty",)


def test_lists_of_the_file_can_be_taken_back(tmp_path):
    defaults = written(tmp_path, bad_words_ids=[[1]], suppress_tokens=[2], stop_strings=["x"])
    assert not settled(defaults).options.best_only
    assert settled(defaults, bad_words=[], suppress_tokens=[]).options.best_only
    assert settled(defaults).stop == ("x",)
    assert settled(defaults, stop="y").stop == ("y",)


def test_fields_that_ask_for_something_else_are_named_and_harmless_ones_are_not(tmp_path):
    defaults = written(
        tmp_path,
        num_beams=4,
        penalty_alpha=0.6,
        guidance_scale=1.5,
        max_time=3.0,
        user_token_id=195,
        num_return_sequences=1,
        use_cache=True,
        transformers_version="4.40.0",
        _from_model_config=True,
        bos_token_id=1,
        top_k=None,
        watermarking_config=None,
    )
    assert defaults.unsupported == (
        "guidance_scale",
        "max_time",
        "num_beams",
        "penalty_alpha",
        "user_token_id",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged: Expecting property name"),
        ("[]", "is damaged: a JSON object is expected, not list"),
        ('{"temperature": "hot"}', "temperature is 'hot', 0 to 100 is allowed"),
        ('{"temperature": NaN}', "temperature is nan, 0 to 100 is allowed"),
        ('{"top_k": 5.5}', "top_k is 5.5, a whole number of at least 0 is needed"),
        ('{"do_sample": "yes"}', "do_sample is 'yes', True or False is allowed"),
        ('{"eos_token_id": "end"}', "eos_token_id is 'end', a list of token ids is allowed"),
        ('{"bad_words_ids": [[99]]}', "token 99 is not one of the model's 40"),
        ('{"max_length": -1}', "max_length is -1, a whole number of at least 1 is needed"),
        ('{"stop_strings": [""]}', "a stop string is empty"),
        ('{"sequence_bias": 3}', "sequence_bias is 3, "),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, content, says):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_defaults(tmp_path, VOCABULARY)
    assert str(tmp_path / FILE) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_of_the_librarys_own_does_what_a_file_does():
    config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[2, 7])
    defaults = defaults_of(config, VOCABULARY)
    assert defaults == defaults_of(
        {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]}, VOCABULARY
    )
    assert (defaults.do_sample, dict(defaults.options)) == (True, {"temperature": 0.6})
    assert defaults.eos_ids == {2, 7}
    with pytest.raises(
        ValueError, match="generation_config is 3, a GenerationConfig, a dict or False is allowed"
    ):
        defaults_of(3, VOCABULARY)


def test_tokens_that_no_model_has_may_be_suppressed(tmp_path):
    assert written(tmp_path, suppress_tokens=[1, 4000]).options["suppress_tokens"] == (1,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, a whole number of at least 1 is needed"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens is 6, at most max_new_tokens .5."),
        ({"stop": 3}, "stop is 3"),
        ({"stop_token_ids": [40]}, "token 40 is not one of the model's 40"),
        ({"logit_bias": {40: 1}}, "token 40 is not one of the model's 40"),
        ({"do_sample": 1}, "do_sample is 1, True or False is allowed"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": 2**64}, "seed is 18446744073709551616, a whole number of 64 bits"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_settled(given, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        settled(GenerationDefaults(), **given)


def test_the_least_length_of_a_file_gives_way_to_a_callers_length(tmp_path):
    defaults = written(tmp_path, min_new_tokens=9, max_new_tokens=20)
    assert settled(defaults).options.min_new_tokens == 9
    assert settled(defaults, max_new_tokens=5).options.min_new_tokens == 5


def test_a_prompt_beyond_the_files_length_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"the prompt has 5 tokens, .* max_length 5: give max_new_tokens"):
        settled(written(tmp_path, max_length=5))
    assert settled(written(tmp_path, max_length=5), max_new_tokens=3).max_new_tokens == 3
    assert settled(written(tmp_path, max_length=4096), room=7).max_new_tokens == 7


def swarm_of(defaults: GenerationDefaults) -> Swarm:
    """As much of a swarm as the checks of a call need."""
    swarm = object.__new__(Swarm)
    swarm.config = ClientConfig(peers=())
    info: Any = SimpleNamespace(vocab_size=VOCABULARY, name="M", max_position=60)
    local_model: Any = SimpleNamespace(
        tokenizer=lambda text: {"input_ids": [ord(char) % 40 for char in text]}
    )
    swarm.local_model = local_model
    swarm.generation_defaults = defaults
    info.revision, info.blocks = "r", 1
    swarm.info = info
    swarm._lengths = SessionLengths(info, Limits(), Constraints(), lambda: EMPTY)
    return swarm


def test_a_call_is_checked_when_it_is_made_and_its_settings_can_be_asked_for(tmp_path):
    swarm = swarm_of(written(tmp_path, do_sample=True, temperature=0.6, eos_token_id=2))
    assert swarm.settings("ab").options.temperature == 0.6
    assert swarm.settings("ab", generation_config=False).options.best_only
    assert swarm.settings("ab", generation_config={"top_k": 3, "do_sample": True}).options.top_k == 3
    conversation = cast(Conversation, SimpleNamespace(max_length=9))
    assert swarm.settings(torch.tensor([[1, 2]]), conversation=conversation).max_new_tokens == 7
    for wrong in (
        {"temperature": -1},
        {"seed": 1.5},
        {"stop": ""},
        {"generation_config": 3},
        {"logits_processor": 3},
    ):
        with pytest.raises(ValueError, match=" is "):
            swarm.generate("ab", **wrong)
    for too_long in ({"max_new_tokens": 10**6}, {"conversation": SimpleNamespace(max_length=1)}):
        with pytest.raises(ValueError, match="positions"):
            swarm.generate("ab", **too_long)
    for prompt in ("", [], [40], "\udc80", 3.5, None):
        with pytest.raises(ValueError, match=r"prompt|token 40"):
            swarm.generate(prompt)
