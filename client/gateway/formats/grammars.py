"""A grammar holds a generation to a form: after each token it says which tokens may follow.

llguidance (https://github.com/guidance-ai/llguidance) reads the grammar, a dialect of Lark's with JSON
schemas in it, and gives one bit for each token of the vocabulary.  A grammar is compiled once and kept; every
generation has a matcher of its own, a copy.  The bits become logits of -inf in the thread of the head.

Promises, checked by tests/model/test_grammars.py:
  * a text that ends is a text of the grammar, whatever the logits are, greedy or drawn;
  * a grammar that cannot be read, or is too large, raises FormatError in one line;
  * the work of one token and the memory of one grammar have bounds (`parser_limits`).
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.gateway.formats.errors import FormatError, one_line

KIB = 1024
log = logging.getLogger("raceme")

# Between the parts of JSON at most a space, or a new line and its indentation: a weak model would repeat
# blanks until its last token (llama.cpp's grammars have the bound, too).
WHITESPACE = r" |\n[ \t]{0,20}"


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a client's schemas may cost.  docs/gateway.md has the same table."""

    max_grammar_bytes: int = 256 * KIB  # of one request: 128 tools with 2 KiB each
    max_grammar_symbols: int = (
        20_000  # 1,500 optional properties, which take 0.4 s; llguidance's own 500,000 a minute
    )
    max_lexer_states: int = 20_000  # up to 2 KiB each, of one generation; a usual schema needs some hundreds
    max_grammars_kept: int = 32  # compiled, for the next request with the same schema


class Grammars:
    """The grammars of a model's tokenizer.  For any thread: compiling takes a millisecond to a second."""

    def __init__(
        self,
        tokenizer: Any,  # of transformers, untyped; with a Rust backend
        *,
        vocabulary: int,
        end_ids: Iterable[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        """vocabulary: tokens that the head knows.  end_ids: tokens that end a text.

        Raises FormatError for a tokenizer that llguidance cannot read.
        """
        self._limits = limits or GrammarLimits()
        self._tokens = _llguidance_tokenizer(tokenizer, vocabulary, sorted(end_ids))
        self._added: dict[str, int] = dict(getattr(tokenizer, "added_tokens_encoder", None) or {})
        self._kept: OrderedDict[str, Any] = OrderedDict()  # matchers of llguidance, untyped
        self._lock = threading.Lock()

    def compile(self, grammar: str, *, param: str | None = None) -> Constraint:
        """The grammar, compiled now or before.  param: the field that an error names.  Raises FormatError."""
        if len(grammar) > self._limits.max_grammar_bytes:
            raise FormatError(
                f"the schema makes a grammar of {len(grammar)} bytes, {self._limits.max_grammar_bytes} are"
                " allowed",
                param,
            )
        with self._lock:
            if (kept := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return Constraint(kept)
        matcher = self._compiled(grammar, param)
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > self._limits.max_grammars_kept:
                self._kept.popitem(last=False)
        return Constraint(matcher)

    def _compiled(self, grammar: str, param: str | None) -> Any:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=parser_limits(self._limits))
        except ValueError as error:
            raise FormatError(f"the schema cannot be used: {one_line(error)}", param) from None
        tried = matcher if matcher.is_error() else matcher.deep_copy()
        if not tried.is_error():
            tried.compute_bitmask()  # some are too large for their first token
        if tried.is_error():
            raise FormatError(f"the schema cannot be used: {_reason(tried.get_error())}", param)
        return matcher

    def literal(self, text: str) -> str:
        """A text as a grammar's expression: tokens that were added to the tokenizer have their numbers."""
        added = [token for token in self._added if token and token in text]
        if not added:
            return _quoted(text)
        longest_first = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        parts = [part for part in re.split(f"({longest_first})", text) if part]
        return " ".join(
            f"<[{self._added[part]}]>" if part in self._added else _quoted(part) for part in parts
        )

    def added_tokens(self, *, without: Sequence[str]) -> list[int]:
        """The numbers of the tokens that were added to the tokenizer: no text of a grammar has them."""
        return sorted({number for token, number in self._added.items() if token not in without})

    def is_token(self, text: str) -> bool:
        """Whether a token for exactly this text was added to the tokenizer."""
        return text in self._added


class Constraint:
    """A compiled grammar, for any number of generations."""

    def __init__(self, matcher: Any) -> None:  # Any: llguidance's
        self._matcher = matcher

    def processor(self) -> GrammarMask:
        """A logits processor for one generation."""
        return GrammarMask(self._matcher.deep_copy())


class GrammarMask:
    """A logits processor (transformers' interface): tokens that the grammar forbids get -inf.

    Its first call is at the end of the prompt; each later one has the tokens since.  A call that comes again
    for the same tokens gives the same answer.
    """

    def __init__(self, matcher: Any) -> None:  # Any: llguidance's
        self._matcher = matcher
        self._seen: int | None = None  # tokens of prompt and text that the matcher knows

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids int64 [1, tokens], scores float32 [1, vocabulary] -> float32 [1, vocabulary].

        Raises ValueError where the grammar's bounds are reached.
        """
        row = ids[0]
        if self._seen is None:
            self._seen = len(row)
        for token in row[self._seen :].tolist():
            self._matcher.consume_token(token)
        self._seen = len(row)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the text's form cannot be held: {_reason(self._matcher.get_error())}")
        allowed = np.unpackbits(bits, count=scores.shape[-1], bitorder="little").astype(bool)
        return scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)


def json_value(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """A JSON schema as a grammar's expression.  lenient: a keyword that is not implemented is left out."""
    options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
    if lenient:
        options["lenient"] = True
    return "%json " + json.dumps({**schema, "x-guidance": options})


def parser_limits(limits: GrammarLimits) -> Any:
    """llguidance's bounds of memory and of work."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=limits.max_grammar_symbols,
        max_lexer_states=limits.max_lexer_states,
        verbose_errors=False,  # they would hold the text
    )


def _llguidance_tokenizer(tokenizer: Any, vocabulary: int, end_ids: list[int]) -> Any:
    import llguidance.hf

    if not end_ids:
        raise FormatError("this model has no end token: a form of its text cannot be asked for")
    width = max(vocabulary, len(tokenizer))
    try:
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=width, eos_token=end_ids)
    except Exception:  # its errors have no type of their own  # noqa: BLE001
        log.debug("llguidance does not know this kind of tokenizer: its tokens are read one by one")
    try:
        wrapped = llguidance.TokenizerWrapper(_PlainTokens(tokenizer, end_ids[0]))
        return llguidance.LLTokenizer(wrapped, n_vocab=width, eos_token=end_ids)
    except Exception as error:  # as above  # noqa: BLE001
        raise FormatError(
            f"this model's tokenizer allows no form of its text to be asked for: {one_line(error)}"
        ) from None


class _PlainTokens:
    """A tokenizer that is neither byte-level nor falls back to bytes, as llguidance wants it."""

    def __init__(self, tokenizer: Any, end_id: int) -> None:  # Any: of transformers
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.eos_token_id = end_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(special)
        self.tokens = [
            (tokenizer.convert_ids_to_tokens(each) if each in special else tokenizer.decode([each])).encode()
            for each in range(len(tokenizer))
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text.  Raises TypeError for bytes, by which llguidance asks what is taken."""
        if not isinstance(text, str):
            raise TypeError("a text is needed")
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _quoted(text: str) -> str:
    return json.dumps(text)


def _reason(error: str) -> str:
    """llguidance's text without the grammar and the places in it, which the client did not write."""
    said = re.split(r"\n\s*\d+ \| ", error.strip(), maxsplit=1)[0].replace("<non-verbose/>", "")
    said = re.sub(r"^(?:\d+\(\d+\):\s*)+|\(?\bat \d+\(\d+\)\)?:?\s*", "", said)
    return one_line(re.sub(r"\bNoExtension(?:Bias)?\b", "no text can satisfy it", said))
