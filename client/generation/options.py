"""The one list of the options of `generate`, each with its check.

A new option is a line in `GenerateArguments`, with the type that a caller may give, and a field of
`SamplingOptions` or `GenerateOptions`, with the check that makes plain values of Python of it.  Every
`generate` and `settings` (trio, asyncio, blocking) takes this list, and a test compares the two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypedDict

from client.generation import checks
from client.generation.checks import COUNT, Words
from node.runtime.values import MAX_INT32, Range, number, shown, switch

if TYPE_CHECKING:
    from torch import Tensor

MIN_TEMPERATURE = 1e-5  # logits divided by less could overflow; the likeliest token is certain long before
POSITIVE = Range(1, MAX_INT32, whole=True)


class GenerateArguments(TypedDict, total=False):
    """The options of `generate` as keywords, in every type that is taken.  See `GenerateOptions`."""

    max_new_tokens: SupportsIndex | None
    stop: str | Iterable[str] | None
    generation_config: Any  # transformers' GenerationConfig is untyped
    do_sample: bool | None
    temperature: SupportsFloat | None
    top_k: SupportsIndex | None
    top_p: SupportsFloat | None
    min_p: SupportsFloat | None
    top_h: SupportsFloat | None
    typical_p: SupportsFloat | None
    epsilon_cutoff: SupportsFloat | None
    eta_cutoff: SupportsFloat | None
    repetition_penalty: SupportsFloat | None
    presence_penalty: SupportsFloat | None
    frequency_penalty: SupportsFloat | None
    no_repeat_ngram_size: SupportsIndex | None
    min_new_tokens: SupportsIndex | None
    min_length: SupportsIndex | None
    logit_bias: Mapping[Any, SupportsFloat] | None  # Any: token ids, or their digits as in JSON
    sequence_bias: Any  # as in transformers: {(id, ...): bias} or [[[id, ...], bias], ...]
    bad_words: str | Iterable[str | Iterable[SupportsIndex]] | None
    bad_words_ids: Iterable[Iterable[SupportsIndex]] | None
    suppress_tokens: Iterable[SupportsIndex] | None
    begin_suppress_tokens: Iterable[SupportsIndex] | None
    forced_bos_token_id: SupportsIndex | None
    forced_eos_token_id: SupportsIndex | Iterable[SupportsIndex] | None
    exponential_decay_length_penalty: Sequence[SupportsFloat] | None
    remove_invalid_values: bool | None
    renormalize_logits: bool | None
    stop_token_ids: SupportsIndex | Iterable[SupportsIndex] | None
    skip_special_tokens: bool | None
    logprobs: bool | None
    top_logprobs: SupportsIndex | None
    logits_processor: Callable[[Any, Any], Any] | Iterable[Callable[[Any, Any], Any]] | None  # Any: tensors
    seed: SupportsIndex | None
    speculate: Any  # a word, a model of transformers, which is untyped, or its folder or name


def _by(check: Callable[[str, Any], Any]) -> dict[str, Any]:  # Any: the option's value
    """The metadata of an option: its check takes name and value, and raises ValueError."""
    return {"check": check}


def _in(allowed: Range) -> dict[str, Any]:  # Any: as above
    """The metadata of a number."""
    check: Callable[..., object] = checks.whole if allowed.whole else number
    return {"check": partial(_within, check, allowed), "range": allowed}


def _within(check: Callable[..., object], allowed: Range, name: str, value: Any) -> object:
    return check(name, value, allowed)


def _as_it_is(name: str, value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """The choice of the next token, in plain values of Python.  None leaves an option out.

    `GenerateOptions` explains them; a field for each is what users know from transformers.
    temperature: None or 0 is greedy.  seed: for a generator of this generation's own; None draws one.
    Raises ValueError for a value outside its range.
    """

    temperature: float | None = field(default=None, metadata=_in(Range(0, 100)))
    top_k: int | None = field(default=None, metadata=_in(COUNT))
    top_p: float | None = field(default=None, metadata=_in(Range(0, 1, above=True)))
    # Beyond 100 a float32 logit overflows sooner or later.
    repetition_penalty: float | None = field(default=None, metadata=_in(Range(0.01, 100)))
    # What torch takes.
    seed: int | None = field(default=None, metadata=_in(Range(-(2**63), 2**64 - 1, whole=True)))
    min_p: float | None = field(default=None, metadata=_in(Range(0, 1)))
    top_h: float | None = field(default=None, metadata=_in(Range(0, 1, above=True)))
    typical_p: float | None = field(default=None, metadata=_in(Range(0, 1, above=True)))
    epsilon_cutoff: float | None = field(default=None, metadata=_in(Range(0, 1)))
    eta_cutoff: float | None = field(default=None, metadata=_in(Range(0, 1)))
    # As OpenAI and vLLM have them.
    presence_penalty: float | None = field(default=None, metadata=_in(Range(-2, 2)))
    frequency_penalty: float | None = field(default=None, metadata=_in(Range(-2, 2)))
    no_repeat_ngram_size: int | None = field(default=None, metadata=_in(COUNT))
    min_new_tokens: int | None = field(default=None, metadata=_in(COUNT))
    min_length: int | None = field(default=None, metadata=_in(COUNT))
    logit_bias: tuple[tuple[int, float], ...] | None = field(default=None, metadata=_by(checks.logit_bias))
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = field(
        default=None, metadata=_by(checks.sequence_bias)
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = field(default=None, metadata=_by(checks.token_lists))
    suppress_tokens: tuple[int, ...] | None = field(default=None, metadata=_by(checks.token_ids))
    begin_suppress_tokens: tuple[int, ...] | None = field(default=None, metadata=_by(checks.token_ids))
    forced_bos_token_id: int | None = field(default=None, metadata=_in(COUNT))
    forced_eos_token_id: tuple[int, ...] | None = field(default=None, metadata=_by(checks.one_or_more))
    exponential_decay_length_penalty: tuple[int, float] | None = field(
        default=None, metadata=_by(checks.decay)
    )
    remove_invalid_values: bool | None = field(default=None, metadata=_by(switch))
    renormalize_logits: bool | None = field(default=None, metadata=_by(switch))
    stop_token_ids: tuple[int, ...] | None = field(default=None, metadata=_by(checks.one_or_more))
    skip_special_tokens: bool | None = field(default=None, metadata=_by(switch))
    logprobs: bool | None = field(default=None, metadata=_by(switch))
    top_logprobs: int | None = field(default=None, metadata=_in(COUNT))
    logits_processor: tuple[Callable[[Tensor, Tensor], Tensor], ...] | None = field(
        default=None, metadata=_by(checks.processors)
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            if (value := getattr(self, one.name)) is not None:
                object.__setattr__(self, one.name, one.metadata["check"](one.name, value))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature is None or self.temperature < MIN_TEMPERATURE

    @property
    def best_only(self) -> bool:
        """Whether only the place of the largest logit matters."""
        return self.greedy and not self.wants_logprobs and not self._changes_logits

    @property
    def wants_logprobs(self) -> bool:
        """Whether log probabilities are wanted."""
        return bool(self.logprobs or self.top_logprobs)

    @property
    def tokens(self) -> frozenset[int]:
        """All token ids in the options, for a check against the model's vocabulary."""
        lists = (
            self.suppress_tokens,
            self.begin_suppress_tokens,
            self.forced_eos_token_id,
            self.stop_token_ids,
            [token for token, _ in self.logit_bias or ()],
            [token for sequence, _ in self.sequence_bias or () for token in sequence],
            [token for sequence in self.bad_words_ids or () for token in sequence],
            None if self.forced_bos_token_id is None else [self.forced_bos_token_id],
        )
        return frozenset(token for each in lists for token in each or ())

    @property
    def _changes_logits(self) -> bool:
        return (
            any(getattr(self, name) for name in _CHANGING_LOGITS)
            or self.repetition_penalty not in (None, 1.0)
            or self.forced_bos_token_id is not None
            or self.forced_eos_token_id is not None
        )


_CHANGING_LOGITS = (
    "logit_bias",
    "sequence_bias",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "min_length",
    "presence_penalty",
    "frequency_penalty",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "logits_processor",
)


@dataclass(frozen=True, slots=True)
class GenerateOptions(SamplingOptions):
    """The checked options of `generate`: a value for many calls, or made of the keywords of one call.

    Numbers of numpy and torch are taken.  None: the value of the model's generation_config.json, as in
    transformers; without a file greedy, 64 tokens.

    The end: max_new_tokens; stop, strings that end the text; stop_token_ids, tokens that end it too.
    generation_config: a dict or transformers' GenerationConfig in place of the file's; False for
    nothing of the file but its end tokens.

    As in transformers:
      do_sample: draw tokens.  Without it temperature decides: 0 is greedy.
      temperature, top_k (without it 50 where tokens are drawn, 0 for all), top_p, min_p, top_h,
      typical_p, epsilon_cutoff, eta_cutoff: only where tokens are drawn.
      repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens,
      begin_suppress_tokens, sequence_bias, min_length, forced_bos_token_id, forced_eos_token_id,
      exponential_decay_length_penalty, remove_invalid_values, renormalize_logits: for greedy too.
      min_new_tokens: no end token and none of stop_token_ids before; stop strings still end.
      logits_processor: a LogitsProcessorList, a function or a list of functions of (input_ids
      [1, tokens], scores float32 [1, vocabulary]), called in a thread after the others and before
      temperature; one whose type is there already takes its place.
    As OpenAI and vLLM define them:
      presence_penalty, frequency_penalty: -2 to 2, over generated tokens.
      logit_bias: {token id: -100 to 100}.
      bad_words: words as text (at the beginning of a text and after a space), or as token ids.
      skip_special_tokens: False shows their text.
      logprobs, top_logprobs (how many): fill `Token.logprob` and `Token.top_logprobs`: of the
      model's own distribution, before any of the above (vLLM's "raw_logprobs").
      seed: the same seed gives the same tokens.
    Speed alone, for the tokens are the same:
      speculate: guess tokens, and have the servers check several in one step.  "auto" looks them up in
      the text so far, where that pays; "lookup" does so always, and says in the log where it cannot; "off"
      guesses none; a causal language model of transformers with the swarm's tokenizer, or its folder or
      name, guesses them at this client.  Default: "off".

    Raises ValueError, in one line, for a value of another kind or outside its range.
    """

    max_new_tokens: int | None = field(default=None, metadata=_in(POSITIVE))
    stop: tuple[str, ...] | None = field(default=None, metadata=_by(checks.stop_strings))
    do_sample: bool | None = field(default=None, metadata=_by(switch))
    bad_words: Words | None = field(default=None, metadata=_by(checks.words))
    generation_config: Any = field(default=None, metadata=_by(_as_it_is))  # it needs the model's vocabulary
    speculate: Any = field(default=None, metadata=_by(checks.speculate))


OPTION_NAMES = frozenset(one.name for one in fields(GenerateOptions))
RANGES = {one.name: one.metadata["range"] for one in fields(GenerateOptions) if "range" in one.metadata}


def options_of(options: GenerateOptions | None, arguments: Mapping[str, Any]) -> GenerateOptions:
    """The options of one call: a value, keywords, or a value in which keywords replace fields.

    Raises ValueError for a value that is not allowed, TypeError for a name that is no option.
    """
    given: object = options  # a caller's value
    if given is not None and not isinstance(given, GenerateOptions):
        raise TypeError(f"options is {shown(given)}, client.GenerateOptions(...) is needed")
    if unknown := sorted(set(arguments) - OPTION_NAMES):
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    changes = {name: value for name, value in arguments.items() if value is not None}
    if options is None:
        return GenerateOptions(**changes)
    return replace(options, **changes) if changes else options
