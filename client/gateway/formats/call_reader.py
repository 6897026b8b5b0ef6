"""Reads the JSON of one or several calls of tools, a piece at a time.

A call's name is known with its last letter, and its arguments go on as they come: a client sees a long
argument grow.  Text that is no call of a known function is given back as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator
from typing import Any

from client.gateway.formats.deltas import CallArguments, CallBegun, Content, Delta
from client.gateway.formats.families import Family

Chars = Generator[None, None, None]  # runs until it needs another character
BLANK = " \t\r\n"


class _NoCallError(Exception):
    """The text is no call."""


class CallReader:
    """The calls of one region of a text.

    Promises, checked by tests/unit/test_call_reader.py:
      * however the text is cut into pieces, the pieces that come out add up to the same calls;
      * a call begins only with a function's whole, known name, and its arguments are the model's own text;
      * text that became no call comes out unchanged.
    """

    def __init__(
        self, family: Family, names: Collection[str], first_index: int, new_id: Callable[[], str]
    ) -> None:
        """names: of the functions.  first_index: of the first call."""
        self._names = names
        self._arguments_key = family.arguments
        self._index = first_index - 1  # of the call that is read
        self._new_id = new_id
        self._raw = family.trigger  # of the call that has not begun
        self._closing = family.closes or ""
        self._out: list[Delta] = []
        self._char = ""
        self._has_begun = False
        self._pending = ""  # arguments that are not out
        self._saw_arguments = False
        self._is_text = False
        self._is_over = False
        self._parser = self._region()
        next(self._parser)

    @property
    def next_index(self) -> int:
        """Of a call after these."""
        return self._index + 1

    def feed(self, text: str) -> list[Delta]:
        """What has become certain with the next piece."""
        for at, char in enumerate(text):
            if self._is_text:
                self._out.append(Content(text[at:]))
                break
            if self._is_over:
                break  # blanks, or what a model adds to a finished call
            self._take(char)
        self._flush()
        out, self._out = self._out, []
        return out

    def finish(self, *, is_whole: bool) -> list[Delta]:
        """The region ended.  is_whole: with its closing text, which text that is no call gets back."""
        closing = self._closing if is_whole else ""
        if self._is_text:
            self._out.append(Content(closing))
        elif not self._has_begun and not self._is_over:
            self._out.append(Content(self._raw + closing))
        elif self._has_begun and not self._saw_arguments:
            self._out.append(CallArguments(self._index, "{}"))
        out, self._out = [each for each in self._out if each != Content("")], []
        return out

    def _take(self, char: str) -> None:
        if not self._has_begun:
            self._raw += char
        self._char = char
        try:
            self._parser.send(None)
        except StopIteration:
            self._is_over = True
        except _NoCallError:
            if self._has_begun:
                self._is_over = True  # the rest of a broken call
            else:
                self._is_text = True
                self._out.append(Content(self._raw))

    def _flush(self) -> None:
        if self._has_begun and self._pending:
            self._out.append(CallArguments(self._index, self._pending))
            self._pending = ""

    # Each of these is at a character that is not read yet, and stops at the one after its own.

    def _region(self) -> Chars:
        """An object, or a list of objects."""
        yield
        yield from self._blanks()
        if self._char != "[":
            yield from self._call()
            return
        while True:
            yield
            yield from self._blanks()
            yield from self._call()
            yield from self._blanks()
            if self._char != ",":
                return
            self._end_call()

    def _call(self) -> Chars:
        """One object."""
        self._expect("{")
        yield
        while True:
            yield from self._blanks()
            key = yield from self._string()
            yield from self._blanks()
            self._expect(":")
            yield
            yield from self._blanks()
            if key == "name":
                name = yield from self._string()
                self._begin(name)
            elif key == self._arguments_key:
                yield from self._arguments()
            else:
                yield from self._value(lambda _: None)
            yield from self._blanks()
            if self._char == "}":
                if not self._has_begun:
                    raise _NoCallError
                self._close_call()
                yield
                return
            self._expect(",")
            yield

    def _begin(self, name: str) -> None:
        if self._has_begun or name not in self._names:
            raise _NoCallError
        self._index += 1
        self._has_begun = True
        self._raw = ""
        self._out.append(CallBegun(self._index, self._new_id(), name))

    def _close_call(self) -> None:
        self._flush()
        if not self._saw_arguments:
            self._out.append(CallArguments(self._index, "{}"))
            self._saw_arguments = True

    def _end_call(self) -> None:
        """Another one follows."""
        self._has_begun = self._saw_arguments = False
        self._pending = ""

    def _arguments(self) -> Generator[None, None, None]:
        """Their text as it is; of a string its content, for some models write JSON within JSON."""
        if self._saw_arguments:
            raise _NoCallError
        if self._char == '"':
            self._pending += yield from self._string()
            self._saw_arguments = True
            return
        self._saw_arguments = True
        if self._char not in "{[":
            word: list[str] = []
            yield from self._value(word.append)
            self._pending += "{}" if word == list("null") else "".join(word)
            return
        yield from self._value(self._add_arguments)

    def _add_arguments(self, char: str) -> None:
        self._pending += char

    def _value(self, add: Callable[[str], None]) -> Generator[None, None, None]:
        """Any value: an object and a list by their brackets, a string, or a word up to a delimiter."""
        depth = 0
        while True:
            char = self._char
            if char == '"':
                add(char)
                yield
                while self._char != '"':
                    add(self._char)
                    if self._char == "\\":
                        yield
                        add(self._char)
                    yield
                add('"')
            elif char in "{[":
                depth += 1
                add(char)
            elif char in "}]" and depth:
                depth -= 1
                add(char)
            elif not depth and char in ",}]" + BLANK:
                raise _NoCallError  # no value at all
            else:
                add(char)
                if not depth:
                    yield
                    while self._char not in ",}]" + BLANK:
                        add(self._char)
                        yield
                    return
            yield
            if not depth:
                return

    def _string(self) -> Generator[None, None, str]:
        """A string's value."""
        self._expect('"')
        raw = '"'
        while True:
            yield
            raw += self._char
            if self._char == '"':
                break
            if self._char == "\\":
                yield
                raw += self._char
        yield
        try:
            value: Any = json.loads(raw, strict=False)
        except ValueError:
            raise _NoCallError from None
        return str(value)

    def _blanks(self) -> Chars:
        while self._char in BLANK:
            yield

    def _expect(self, char: str) -> None:
        if self._char != char:
            raise _NoCallError
