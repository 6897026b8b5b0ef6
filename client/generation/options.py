"""What a caller may say of a generation, checked on the call: numbers, token ids, stop strings, prompts.

Numbers of numpy and torch are numbers here too.  What is of another kind, or outside its range, is
a ValueError that says what was found and what is allowed; nothing is rounded, and True is no number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex, TypedDict

from node.runtime.values import is_bool, shown

MAX_TOKENS = 2**31 - 1


class Sampling(TypedDict, total=False):
    """The keyword arguments of `generate` that choose tokens.  See `client.swarm.Swarm.generate`.

    A name that transformers has too means what it means there; None is as if it were not given.
    """

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


class Range(NamedTuple):
    """Numbers that are allowed.  above: `low` itself is not.  whole: no fractions."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:g} and at most {self.high:g} is allowed"
        if not self.whole:
            return f"{self.low:g} to {self.high:g} is allowed"
        if self.high > MAX_TOKENS:
            return "a whole number of 64 bits is allowed"
        return f"a whole number{'' if self.low < 0 else f', at least {self.low}'} is needed"


COUNT = Range(0, MAX_TOKENS, whole=True)
POSITIVE = Range(1, MAX_TOKENS, whole=True)
RANGES = {
    "temperature": Range(0, 100),
    "top_k": COUNT,
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "top_h": Range(0, 1, above=True),
    "typical_p": Range(0, 1, above=True),
    "epsilon_cutoff": Range(0, 1),
    "eta_cutoff": Range(0, 1),
    "repetition_penalty": Range(0.01, 100),  # beyond, a float32 logit overflows sooner or later
    "presence_penalty": Range(-2, 2),  # as OpenAI and vLLM have it, frequency_penalty too
    "frequency_penalty": Range(-2, 2),
    "no_repeat_ngram_size": COUNT,
    "min_new_tokens": COUNT,
    "min_length": COUNT,
    "max_new_tokens": POSITIVE,
    "max_length": POSITIVE,
    "forced_bos_token_id": COUNT,
    "top_logprobs": COUNT,
    "seed": Range(-(2**63), 2**64 - 1, whole=True),  # what torch takes
}
BIAS = Range(-100, 100)  # as OpenAI and vLLM have it


def number(name: str, value: Any, allowed: Range) -> float:
    """A float, or an int where `allowed` says whole.  Raises ValueError."""
    found: float | None = None
    if not (isinstance(value, str | bytes | complex) or is_bool(value) or _has_axes(value)):
        try:
            found = operator.index(value) if allowed.whole else float(value)
        except (
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
        ):  # RuntimeError: torch's, for many numbers
            found = None
    if found is None or not allowed.low <= found <= allowed.high or (allowed.above and found == allowed.low):
        raise ValueError(f"{name} is {shown(value)}, {allowed}")
    return found


def whole(name: str, value: Any, allowed: Range) -> int:
    """A whole number within `allowed`.  Raises ValueError."""
    return int(number(name, value, allowed))


def switch(name: str, value: Any) -> bool:
    """True or False, of numpy and torch too.  Raises ValueError."""
    if not is_bool(value) or _has_axes(value):
        raise ValueError(f"{name} is {shown(value)}, True or False is allowed")
    return bool(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: a list, tuple, set, array or tensor of them.  Raises ValueError."""
    items = _items(value)
    if items is None:
        raise ValueError(f"{name} is {shown(value)}, a list of token ids is allowed")
    return tuple(whole(f"a token in {name}", item, COUNT) for item in items)


def one_or_more(name: str, value: Any) -> tuple[int, ...]:
    """A token id, or some.  Raises ValueError."""
    return token_ids(name, [value] if _items(value) is None and not isinstance(value, str) else value)


def token_lists(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Lists of token ids, none empty.  Raises ValueError."""
    items = _items(value)
    if items is None:
        raise ValueError(f"{name} is {shown(value)}, a list of lists of token ids is allowed")
    lists = tuple(token_ids(name, item) for item in items)
    if () in lists:
        raise ValueError(f"{name} holds an empty list, at least one token is needed")
    return lists


def logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids and what is added to their logits.  Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias is {shown(value)}, a dict from token id to bias is allowed")
    biases = {}
    for token, bias in value.items():
        key = int(token) if isinstance(token, str) and token.isdecimal() else token
        place = whole("a token in logit_bias", key, COUNT)
        biases[place] = number(f"logit_bias of token {place}", bias, BIAS)
    return tuple(biases.items())


def sequence_bias(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Token sequences and what is added to the logit of their last token.  Raises ValueError."""
    pairs = list(value.items()) if isinstance(value, Mapping) else _items(value)
    biases = {}
    for pair in pairs or ():
        parts = _items(pair)
        if parts is None or len(parts) != 2 or not (sequence := token_ids("sequence_bias", parts[0])):
            raise ValueError(f"sequence_bias holds {shown(pair)}, [[token id, ...], bias] is allowed")
        biases[sequence] = number(f"sequence_bias of {list(sequence)}", parts[1], Range(-math.inf, 1e4))
    if not biases:
        raise ValueError(f"sequence_bias is {shown(value)}, [[[token id, ...], bias], ...] is allowed")
    return tuple(biases.items())


def decay(value: Any) -> tuple[int, float]:
    """exponential_decay_length_penalty: where it begins, and its factor.  Raises ValueError."""
    name, parts = "exponential_decay_length_penalty", _items(value)
    if parts is None or len(parts) != 2:
        raise ValueError(f"{name} is {shown(value)}, (tokens, factor) is allowed")
    return whole(f"{name}[0]", parts[0], COUNT), number(f"{name}[1]", parts[1], Range(0, 100, above=True))


def processors(value: Any) -> tuple[Callable[[Any, Any], Any], ...]:  # Any: tensors in, a tensor out
    """One logits processor or several, in their order.  Raises ValueError."""
    found = list(value) if isinstance(value, Iterable) else [value]
    if isinstance(value, str | Mapping) or not all(callable(one) for one in found):
        raise ValueError(
            f"logits_processor is {shown(value)}, a LogitsProcessorList or a list of functions of"
            " (input_ids, scores) is allowed"
        )
    return tuple(found)


def stop_strings(value: Any) -> tuple[str, ...]:
    """None, a string, or some of them.  Raises ValueError."""
    items = [value] if isinstance(value, str) else [] if value is None else _items(value)
    if items is None or not all(isinstance(item, str) for item in items):
        raise ValueError(f"stop is {shown(value)}, a string or a list of strings is allowed")
    if "" in items:
        raise ValueError("a stop string is empty: it would end every text before its first token")
    return tuple(str(item) for item in items)


def prompt_ids(prompt: Any, tokenizer: Any, vocabulary: int) -> list[int]:
    """The tokens of a prompt: text, or ids as a list, an array or a tensor [n] or [1, n].

    Raises ValueError for what is neither, for no tokens, and for ids beyond the model's vocabulary.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt holds {prompt[error.start]!r} at position {error.start}: it is no text,"
                " perhaps bytes that are not UTF-8"
            ) from None
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        items = None if isinstance(prompt, Set) else _items(prompt)
        if items is not None and len(items) == 1 and (row := _items(items[0])) is not None:
            items = row  # [1, n]
        if items is None:
            raise ValueError(f"the prompt is {shown(prompt)}, text or a list of token ids is allowed")
        any_number = Range(-(2**63), MAX_TOKENS, whole=True)  # of the vocabulary is said below
        ids = [whole("a token in the prompt", item, any_number) for item in items]
    if not ids:
        raise ValueError("the prompt has no tokens")
    check_vocabulary(ids, vocabulary)
    return ids


def check_vocabulary(ids: Iterable[int], vocabulary: int, of: str = "") -> None:
    """Raises ValueError for a token that the model does not have.  of: where it stands, for the message."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"token {token}{of} is not one of the model's {vocabulary}")


def bad_words(value: Any, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Words as text or as token ids, as lists of token ids.

    Text is taken as it is at the beginning of a text and as it is behind a space, as vLLM does.
    Raises ValueError.
    """
    items = [value] if isinstance(value, str) else _items(value)
    if items is None:
        raise ValueError(f"bad_words is {shown(value)}, a list of words is allowed")
    lists: dict[tuple[int, ...], None] = {}
    for item in items:
        if not isinstance(item, str):
            lists.update(dict.fromkeys(token_lists("bad_words", [item])))
            continue
        if not item.strip():
            raise ValueError("a word in bad_words is empty: it would forbid every text")
        for text in (item.lstrip(), " " + item.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            lists.update({ids: None} if ids else {})
    return tuple(lists)


def _has_axes(value: Any) -> bool:
    """Whether it is an array or a tensor of more than a number."""
    return bool(getattr(value, "ndim", None))


def _items(value: Any) -> list[Any] | None:
    """The items of a list, tuple, set, array or tensor; None for anything else."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of numpy or torch; its items are Python's
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        return None
    return list(value)
