"""The values of one option of a generation: token ids, biases, words, stop strings, a prompt.

A check takes the option's name for its message and returns plain values of Python.  A value that was
checked already comes out as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from node.runtime.values import MAX_INT32, Range, items_of, number, shown

COUNT = Range(0, MAX_INT32, whole=True)
BIAS = Range(-100, 100)  # as OpenAI and vLLM have it
Words = tuple[str | tuple[int, ...], ...]  # as text, or as the token ids of one


def whole(name: str, value: Any, allowed: Range = COUNT) -> int:  # Any, here and below: to be checked
    """A whole number within `allowed`.  Raises ValueError."""
    return int(number(name, value, allowed))


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: a list, tuple, set, array or tensor of them.  Raises ValueError."""
    items = items_of(value)
    if items is None:
        raise ValueError(f"{name} is {shown(value)}, a list of token ids is allowed")
    return tuple(whole(f"a token in {name}", item) for item in items)


def one_or_more(name: str, value: Any) -> tuple[int, ...]:
    """A token id, or a list of them.  Raises ValueError."""
    return token_ids(name, [value] if items_of(value) is None and not isinstance(value, str) else value)


def token_lists(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Lists of token ids, none empty.  Raises ValueError."""
    items = items_of(value)
    if items is None:
        raise ValueError(f"{name} is {shown(value)}, a list of lists of token ids is allowed")
    lists = tuple(token_ids(name, item) for item in items)
    if () in lists:
        raise ValueError(f"{name} holds an empty list, at least one token is needed")
    return lists


def logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids and the biases of their logits.  Raises ValueError."""
    if isinstance(value, tuple):  # checked already
        value = dict(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shown(value)}, a dict from token id to bias is allowed")
    biases = {}
    for token, bias in value.items():
        key = int(token) if isinstance(token, str) and token.isdecimal() else token
        place = whole(f"a token in {name}", key)
        biases[place] = number(f"{name} of token {place}", bias, BIAS)
    return tuple(biases.items())


def sequence_bias(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Token sequences and the bias of their last token's logit.  Raises ValueError."""
    pairs = list(value.items()) if isinstance(value, Mapping) else items_of(value)
    biases = {}
    for pair in pairs or ():
        parts = items_of(pair)
        if parts is None or len(parts) != 2 or not (sequence := token_ids(name, parts[0])):
            raise ValueError(f"{name} holds {shown(pair)}, [[token id, ...], bias] is allowed")
        biases[sequence] = number(f"{name} of {list(sequence)}", parts[1], Range(-math.inf, 1e4))
    if not biases:
        raise ValueError(f"{name} is {shown(value)}, [[[token id, ...], bias], ...] is allowed")
    return tuple(biases.items())


def decay(name: str, value: Any) -> tuple[int, float]:
    """The start of an exponential penalty, in tokens, and its factor.  Raises ValueError."""
    parts = items_of(value)
    if parts is None or len(parts) != 2:
        raise ValueError(f"{name} is {shown(value)}, (tokens, factor) is allowed")
    return whole(f"{name}[0]", parts[0]), number(f"{name}[1]", parts[1], Range(0, 100, above=True))


def processors(name: str, value: Any) -> tuple[Callable[[Any, Any], Any], ...]:  # Any: tensors in and out
    """One logits processor or several, in their order.  Raises ValueError."""
    found = list(value) if isinstance(value, Iterable) else [value]
    if isinstance(value, str | Mapping) or not all(callable(one) for one in found):
        raise ValueError(
            f"{name} is {shown(value)}, a LogitsProcessorList or a list of functions of"
            " (input_ids, scores) is allowed"
        )
    return tuple(found)


def speculate(name: str, value: Any) -> Any:
    """A word, a name, or a model of transformers.  Raises ValueError."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str) or not (callable(value) and hasattr(value, "config")):
        raise ValueError(
            f"{name} is {shown(value)}: auto, lookup, off, a causal language model of transformers, or its"
            " folder or name is allowed"
        )
    return value


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """None, a string, or a list of them.  Raises ValueError."""
    items = [value] if isinstance(value, str) else [] if value is None else items_of(value)
    if items is None or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name} is {shown(value)}, a string or a list of strings is allowed")
    if "" in items:
        raise ValueError("a stop string is empty: it would end every text before its first token")
    return tuple(str(item) for item in items)


def words(name: str, value: Any) -> Words:
    """A word or a list of words, each as text or as token ids.  Raises ValueError."""
    items = [value] if isinstance(value, str) else items_of(value)
    if items is None:
        raise ValueError(f"{name} is {shown(value)}, a list of words is allowed")
    if any(isinstance(item, str) and not item.strip() for item in items):
        raise ValueError(f"a word in {name} is empty: it would forbid every text")
    return tuple(item if isinstance(item, str) else token_lists(name, [item])[0] for item in items)


def ids_of_words(words: Words, tokenizer: Any) -> tuple[tuple[int, ...], ...]:  # Any: of transformers
    """The token ids of words: text as it is at the beginning of a text and after a space, as in vLLM."""
    lists: dict[tuple[int, ...], None] = {}
    for word in words:
        if not isinstance(word, str):
            lists[word] = None
            continue
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            lists.update({ids: None} if ids else {})
    return tuple(lists)


def prompt_ids(prompt: Any, tokenizer: Any, vocabulary: int) -> list[int]:
    """The tokens of a prompt: text, or ids as a list, an array or a tensor [n] or [1, n].

    Raises ValueError for anything else, for no tokens, and for ids beyond the model's vocabulary.
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
        items = None if isinstance(prompt, Set) else items_of(prompt)
        if items is not None and len(items) == 1 and (row := items_of(items[0])) is not None:
            items = row  # [1, n]
        if items is None:
            raise ValueError(f"the prompt is {shown(prompt)}, text or a list of token ids is allowed")
        any_number = Range(-(2**63), MAX_INT32, whole=True)  # the vocabulary's check has a message of its own
        ids = [whole("a token in the prompt", item, any_number) for item in items]
    if not ids:
        raise ValueError("the prompt has no tokens")
    check_vocabulary(ids, vocabulary)
    return ids


def check_vocabulary(ids: Iterable[int], vocabulary: int) -> None:
    """Raises ValueError for a token that the model does not have."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"token {token} is not one of the model's {vocabulary}")
