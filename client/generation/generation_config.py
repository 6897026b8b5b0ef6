"""A model's generation_config.json, used as transformers uses it; arguments override it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from client.generation import checks
from client.generation.options import POSITIVE, GenerateOptions, SamplingOptions
from node.config import ConfigError
from node.model.checkpoint.folder import read_json
from node.runtime.values import shown, switch

FILE = "generation_config.json"
DEFAULT_TOP_K = 50  # of transformers, where it samples without a top_k
DEFAULT_NEW_TOKENS = 64  # transformers' own 20 are few
DEFAULT_SPECULATE = "off"

# Only where tokens are drawn.
_WARPERS = frozenset(
    ["temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"]
)
# Arguments that are no field of transformers' file.
_ARGUMENTS_ONLY = frozenset(
    [
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "stop_token_ids",
        "skip_special_tokens",
        "logprobs",
        "top_logprobs",
        "logits_processor",
    ]
)
_OPTIONS = frozenset(one.name for one in fields(SamplingOptions)) - _ARGUMENTS_ONLY
_OTHERS = frozenset(["do_sample", "max_new_tokens", "max_length", "stop_strings", "eos_token_id"])
# Fields that change no token of a decoder's text: the way of computing or returning the text.
_SILENT = frozenset(
    [
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_legacy_cache",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "use_mtp",
        "is_assistant",
        "num_assistant_tokens",
        "speculation_type",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "continuous_batching_config",
        "low_memory",
        "early_stopping",
        "length_penalty",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "trust_remote_code",
    ]
)
_HARMLESS = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1}
_HARMLESS |= {"diversity_penalty": 0, "penalty_alpha": 0, "token_healing": False}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The settings of a generation_config.json, checked.

    options: fields of `SamplingOptions`.  eos_ids: None where it names none.
    unsupported: fields that are not implemented here.
    """

    options: Mapping[str, Any] = field(default_factory=dict)  # Any: each as its field has it
    do_sample: bool = False
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] | None = None
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one generation: arguments, else the file, else transformers' defaults.

    from_file: the names of the options that the file decided.
    eos_ids: tokens that end the text; None: the model's own.
    speculate: see `GenerateOptions`.
    """

    options: SamplingOptions
    max_new_tokens: int
    stop: tuple[str, ...]
    from_file: tuple[str, ...]
    eos_ids: frozenset[int] | None = None
    speculate: Any = None  # Any: a model of transformers is untyped

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """For people and programs: the options in force, without options that are off."""
        options = self.options
        found: dict[str, Any] = {"do_sample": not options.greedy}
        for one in fields(options):
            value = getattr(options, one.name)
            unnamed = one.name in ("logits_processor", "logprobs", "top_logprobs", "skip_special_tokens")
            if value is None or unnamed or (options.greedy and one.name == "temperature"):
                continue
            found[one.name] = value
        return found | {"max_new_tokens": self.max_new_tokens} | ({"stop": self.stop} if self.stop else {})


def read_defaults(folder: Path, vocabulary: int) -> GenerationDefaults:
    """The settings of the folder's file, none where there is no file.

    Raises ConfigError, in one line, where the file is damaged or a value in it is out of range.
    """
    path = folder / FILE
    if not path.is_file():
        return GenerationDefaults()
    try:
        return defaults_of(read_json(path), vocabulary)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def defaults_of(config: Any, vocabulary: int) -> GenerationDefaults:
    """The settings of a dict, or of transformers' GenerationConfig.  Raises ValueError."""
    if hasattr(config, "to_diff_dict"):
        config = config.to_diff_dict()
    if not isinstance(config, Mapping):
        found = shown(config)
        raise ValueError(f"generation_config is {found}, a GenerationConfig, a dict or False is allowed")
    values = {name: value for name, value in config.items() if value is not None}
    options = {name: value for name, value in values.items() if name in _OPTIONS}
    if options.get("top_p") == 0:
        options["top_p"] = 1e-9  # as transformers takes it: one token stays
    for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"):
        if name in options and not options[name]:
            del options[name]
    for name in (
        "suppress_tokens",
        "begin_suppress_tokens",
    ):  # the library takes other ids too
        if name in options:
            options[name] = [token for token in checks.token_ids(name, options[name]) if token < vocabulary]
    checked = SamplingOptions(**options)
    checks.check_vocabulary(checked.tokens, vocabulary)
    lengths = {
        name: checks.whole(name, values[name], POSITIVE)
        for name in ("max_new_tokens", "max_length")
        if name in values
    }
    eos = values.get("eos_token_id")
    return GenerationDefaults(
        options={name: getattr(checked, name) for name in options},
        do_sample=switch("do_sample", values.get("do_sample", False)),
        stop=checks.stop_strings("stop_strings", values.get("stop_strings")),
        eos_ids=None if eos is None else frozenset(checks.one_or_more("eos_token_id", eos)),
        unsupported=tuple(sorted(name for name, value in values.items() if _is_unsupported(name, value))),
        **lengths,
    )


def settle(
    asked: GenerateOptions,
    own: GenerationDefaults,
    *,
    tokenizer: Any,  # a transformers tokenizer; untyped
    vocabulary: int,
    prompt_tokens: int,
    room: int,
) -> Settings:
    """The settings from a caller's options and the model's own defaults.

    room: the largest number of new tokens, for a call without a length.
    Raises ValueError for a value that is not allowed.
    """
    defaults = _defaults(asked.generation_config, own, vocabulary)
    given = _given(asked, tokenizer)
    do_sample = _samples(asked, defaults)
    merged = {**defaults.options, **given}
    if do_sample:
        merged = {"temperature": 1.0, "top_k": DEFAULT_TOP_K, **merged}
    else:
        merged = {name: value for name, value in merged.items() if name not in _WARPERS}
    options = SamplingOptions(**merged)
    checks.check_vocabulary(options.tokens, vocabulary)
    new_tokens, length_from_file = _new_tokens(asked.max_new_tokens, defaults, prompt_tokens, room)
    if (options.min_new_tokens or 0) > new_tokens:
        if asked.min_new_tokens is not None:
            raise ValueError(
                f"min_new_tokens is {options.min_new_tokens},"
                f" at most max_new_tokens ({new_tokens}) is allowed"
            )
        options = replace(options, min_new_tokens=new_tokens)  # the file's gives way to a caller's length
    from_file = [name for name in defaults.options if name not in given and name in merged]
    if do_sample and asked.do_sample is None and asked.temperature is None:
        from_file.insert(0, "do_sample")
    from_file += ["max_new_tokens"] * length_from_file + ["stop"] * bool(defaults.stop and not asked.stop)
    return Settings(
        options,
        new_tokens,
        asked.stop or defaults.stop,
        tuple(from_file),
        None if asked.generation_config in (None, False) else defaults.eos_ids,
        DEFAULT_SPECULATE if asked.speculate is None else asked.speculate,
    )


def _defaults(given: Any, own: GenerationDefaults, vocabulary: int) -> GenerationDefaults:  # Any: unchecked
    """The values of options that a caller leaves out.  given: see `GenerateOptions`."""
    if given is None:
        return own
    return GenerationDefaults() if given is False else defaults_of(given, vocabulary)


def _given(asked: GenerateOptions, tokenizer: Any) -> dict[str, Any]:  # Any: each as its field has it
    """The fields of `SamplingOptions` that a caller gave, words as token ids among them."""
    values = {one.name: getattr(asked, one.name) for one in fields(SamplingOptions)}
    if asked.bad_words is not None:
        ids = checks.ids_of_words(asked.bad_words, tokenizer)
        values["bad_words_ids"] = ids + (asked.bad_words_ids or ())
    return {name: value for name, value in values.items() if value is not None}


def _samples(asked: GenerateOptions, defaults: GenerationDefaults) -> bool:
    """Whether tokens are drawn: by do_sample, else by the temperature that was given, else by the file."""
    if asked.do_sample is None:
        return defaults.do_sample if asked.temperature is None else not asked.greedy
    if asked.do_sample and asked.temperature is not None and asked.greedy:
        raise ValueError(
            f"do_sample is True and temperature {asked.temperature}: above 0 is needed to sample"
        )
    return asked.do_sample


def _new_tokens(asked: int | None, defaults: GenerationDefaults, prompt: int, room: int) -> tuple[int, bool]:
    """max_new_tokens, and whether the file decided.  prompt: its tokens."""
    if asked is not None:
        return asked, False
    if defaults.max_new_tokens is not None:
        return max(1, min(defaults.max_new_tokens, room)), True
    if defaults.max_length is None:
        return max(1, min(DEFAULT_NEW_TOKENS, room)), False
    if prompt >= defaults.max_length:
        raise ValueError(
            f"the prompt has {prompt} tokens, and {FILE} ends a text at max_length {defaults.max_length}:"
            " give max_new_tokens"
        )
    return max(1, min(defaults.max_length - prompt, room)), True


def _is_unsupported(name: str, value: Any) -> bool:
    if name.startswith("_") or name in _OPTIONS | _OTHERS | _SILENT:
        return False
    return not (name in _HARMLESS and value == _HARMLESS[name]) and value not in ([], {})
