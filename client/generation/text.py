"""From tokens to text, piece by piece: the pieces joined are the tokenizer's text of all tokens."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

# Beyond these the oldest tokens are dropped, where the text of the rest does not depend on them.
WINDOW_TOKENS = 64
MIN_KEPT_TOKENS = 16
MIN_KEPT_CHARACTERS = 16  # of their text: farther than any effect between neighbours reaches
PROMPT_TOKENS = 512  # of a long prompt, its last ones are decoded: several windows
MAX_INCOMPLETE = 3  # bytes of UTF-8 that are no character yet
CLEAN_UP_REACH = 7  # characters: every piece that `clean_up_tokenization_spaces` joins is shorter
_BYTE = re.compile(r"<0x(?:[0-9a-fA-F]{2}|\+[0-9a-fA-F])>")


class TextStream:
    """Makes text of tokens as they come, and stops at stop strings.

    Text that may still change, and text that may be the beginning of a stop string, are held back.
    Promises, checked by tests/unit/test_text.py for tokenizers of every kind:
      * the texts of `push` and `finish`, joined, are `decode(prompt + tokens)` after
        `decode(prompt)`, up to the first stop string;
      * at every moment they are a beginning of that text;
      * a token costs no more after a million others than after a hundred.
    Of several stop strings the first to be whole counts.
    """

    def __init__(
        self,
        tokenizer: Any,  # a transformers tokenizer; untyped
        stop: tuple[str, ...] = (),
        *,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """prompt: the tokens before, of which no text is returned and no stop string is found."""
        self.stopped = False  # no more text comes
        self.found = False  # because a stop string came
        self._stop = stop
        self._held = ""
        self._pieces = Detokenizer(tokenizer, prompt, skip_special_tokens)

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        return "" if self.stopped else self._release(self._pieces.push(token))

    def finish(self) -> str:
        """The text that was held back and became no stop string."""
        if self.stopped:
            return ""
        text = self._release(self._pieces.finish(), last=True)
        self.stopped = True
        return text

    def _release(self, text: str, *, last: bool = False) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = self.found = True
            self._held = ""
            return text[: min(found)[1]]
        hold = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


class Detokenizer:
    """The text of tokens that no later token can change.

    Text that the library may still change is held back: bytes that are no whole character yet, and,
    where it cleans up spaces, the last few characters.  Byte-fallback tokens ("<0xE2>") in a row are
    held back as long as they are valid UTF-8: one wrong byte, or an incomplete character at the end,
    makes each of them U+FFFD.

    Text comes from `decode` of the last tokens alone.  They are cut only where their text is the end
    of the text of all: not inside a character, nor where a space in front would be lost.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if getattr(tokenizer, "is_fast", False) else None
        self._special = self._special_ids()
        self._falls_back = _falls_back(self._backend)
        self._cleans_up = _cleans_up(tokenizer, self._backend)
        self._window = WINDOW_TOKENS
        self._unread = 0  # tokens since the last decode
        self._run: _ByteRun | None = None  # of the byte-fallback tokens at the end
        self._prompt_rest = ""  # of the prompt's text: the part that may still change

        tokens = self._end_of(prompt)
        end = len(tokens)
        while end > 0 and self._byte_of(tokens[end - 1]) is not None:
            end -= 1
        self._tokens = tokens[:end]
        text = self._decode(self._tokens)
        self._shown = len(text) - self._uncertain(text)  # characters of the tokens' text that are out
        self._shorten(text)
        for token in tokens[end:]:
            self.push(token)
        self._prompt_rest = self._decode(self._tokens)[self._shown :]

    def push(self, token: int) -> str:
        """The text that has become certain with `token`."""
        if self._is_silent(token):
            return ""
        self._tokens.append(token)
        self._unread += 1
        byte = self._byte_of(token)
        if byte is None:
            self._run = None
            # Where no token can be dropped, reading less often keeps the cost of a token.
            patience = len(self._tokens) // WINDOW_TOKENS if len(self._tokens) > 2 * WINDOW_TOKENS else 0
            return self._read() if self._unread > patience else ""
        if self._run is None:
            self._run = _ByteRun(len(self._tokens) - 1)
        if self._run.push(byte):
            return ""  # undecided: no need to look
        return self._read_wrong_bytes(self._run)

    def finish(self) -> str:
        """The rest of the text: no token follows."""
        text = self._decode(self._tokens)
        fresh, self._shown = text[self._shown :], len(text)
        return self._beyond_prompt(fresh)

    def _read(self) -> str:
        text, self._unread = self._decode(self._tokens), 0
        end = max(self._shown, len(text) - self._uncertain(text))
        fresh, self._shown = text[self._shown : end], end
        if len(self._tokens) > self._window:
            self._shorten(text)
        return self._beyond_prompt(fresh)

    def _read_wrong_bytes(self, run: _ByteRun) -> str:
        """Text up to here; the last bytes of a wrong run stay: each of them is wrong alone."""
        text, self._unread = self._decode(self._tokens), 0
        fresh, self._shown = text[self._shown :], len(text)
        if run.is_shown:
            self._tokens.pop()
            self._shown -= 1
        else:
            run.mark_shown()
            del self._tokens[run.start : -1 - MAX_INCOMPLETE]
            self._shown = len(self._decode(self._tokens))
        return self._beyond_prompt(fresh)

    def _beyond_prompt(self, fresh: str) -> str:
        """Without the text that the prompt had already."""
        while fresh and self._prompt_rest:
            if fresh[0] != self._prompt_rest[0]:
                self._prompt_rest = ""
            else:
                fresh, self._prompt_rest = fresh[1:], self._prompt_rest[1:]
        return fresh

    def _uncertain(self, text: str) -> int:
        """Characters at the end that another token could change."""
        end = "" if self._falls_back else text[-MAX_INCOMPLETE:]
        incomplete = len(end) - len(end.rstrip("\ufffd"))
        return min(len(text), incomplete + CLEAN_UP_REACH) if self._cleans_up else incomplete

    def _shorten(self, text: str) -> None:
        """Drop tokens in front, if there is a place to cut.  text: of all tokens."""
        tokens = self._tokens
        for kept in range(MIN_KEPT_TOKENS, min(len(tokens), WINDOW_TOKENS)):
            tail = self._decode(tokens[-kept:])
            gone = len(text) - len(tail)
            if len(tail) >= MIN_KEPT_CHARACTERS and gone <= self._shown and text.endswith(tail):
                self._tokens, self._window = tokens[-kept:], WINDOW_TOKENS
                self._shown -= gone
                return
        self._window = max(WINDOW_TOKENS, 2 * len(tokens))

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, all that the end of its text can depend on."""
        tokens: list[int] = []
        for token in reversed(prompt):
            if self._is_silent(token):
                continue
            tokens.append(token)
            if len(tokens) >= PROMPT_TOKENS and self._byte_of(token) is None:
                break
        return tokens[::-1]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip)) if tokens else ""

    def _is_silent(self, token: int) -> bool:
        """Whether the library leaves the token out before it makes text of the others."""
        if token in self._special:
            return True
        return self._backend is not None and self._backend.id_to_token(token) is None

    def _special_ids(self) -> frozenset[int]:
        if self._backend is None or not self._skip:
            return frozenset()
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    def _byte_of(self, token: int) -> int | None:
        """The byte of a byte-fallback token; None for others, and where bytes are lost one by one."""
        if not self._falls_back or self._backend is None:
            return None
        piece = self._backend.id_to_token(token)
        return int(piece[3:5], 16) if piece is not None and _BYTE.fullmatch(piece) else None


class _ByteRun:
    """Byte-fallback tokens in a row.  start: the place of the first.  is_shown: wrong bytes' text is out."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.is_shown = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._wrong = False

    def mark_shown(self) -> None:
        """The text of the wrong bytes is out."""
        self.is_shown = True

    def push(self, byte: int) -> bool:
        """Add a byte; whether all of them can still become UTF-8."""
        if not self._wrong:
            try:
                self._utf8.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._wrong = True
        return not self._wrong


def _falls_back(backend: Any) -> bool:
    """Whether one wrong byte-fallback token makes U+FFFD of all in its row."""
    if backend is None or backend.decoder is None:
        return False
    return bool(backend.decoder.decode(["a", "<0x41>", "<0xFF>"]).endswith("\ufffd\ufffd"))


def _cleans_up(tokenizer: Any, backend: Any) -> bool:
    """Whether the library takes spaces out of the decoded text; it does not, of late, for BPE."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    spared = backend is not None and type(backend.model).__name__ == "BPE"
    return not spared or bool(
        getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
