"""From a model's text to an answer: thoughts, content, calls of tools, as the text comes.

The regions of a text are found by transformers' `ResponseParser` (also in `transformers serve`), which holds
back a text that may become a delimiter.  `CallReader` reads what is in a call.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from client.gateway.formats.call_grammars import THINK, THOUGHT_ENDS, Thinking
from client.gateway.formats.call_reader import CallReader
from client.gateway.formats.deltas import CallArguments, CallBegun, Content, Delta, Reasoning
from client.gateway.formats.families import Family
from client.gateway.formats.requests import Function
from client.gateway.formats.xml_calls import XmlCallReader

CONTENT, REASONING, CALLS = "content", "reasoning_content", "tool_calls"
_ID_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Reading:
    """How the texts of a request are read; one value for all of its choices.

    family, functions: of calls; None: there are none.  many: an answer may have several calls.
    hidden: texts of special tokens that are no part of an answer.
    """

    thinking: Thinking = "none"
    family: Family | None = None
    functions: Sequence[Function] = ()
    many: bool = True
    hidden: Collection[str] = ()

    @property
    def is_plain(self) -> bool:
        """Whether all of the text is content."""
        return self.thinking == "none" and self.family is None

    @cached_property
    def template(self) -> Any:  # Any: transformers' compiled template
        """The regions of a text, for transformers' parser."""
        from transformers.utils.chat_parsing.response_templates import load_response_template

        fields: dict[str, Any] = {CONTENT: {"content": "text"}}
        if self.thinking != "none":
            thought = {"open_pattern": rf"{THINK}\s*", "close_pattern": rf"\s*{THOUGHT_ENDS}"}
            fields[REASONING] = {**thought, "content": "text"}
        if self.family is not None:
            call = fields[CALLS] = {"content": "text", "repeats": True}
            if self.family.opens is None:
                call["open"] = self.family.trigger
            else:
                call["open_pattern"] = self.family.opens
            if self.family.closes is not None:
                call["close"] = self.family.closes
        # The prefix is what this folder has found in the prompt; no anchor is looked for.
        return load_response_template({"start_anchor_pattern": r"(?!)", "fields": fields})

    @cached_property
    def hidden_pattern(self) -> re.Pattern[str] | None:
        """Finds texts of special tokens."""
        longest_first = sorted(self.hidden, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


class MessageReader:
    """One answer.  `feed` the text of each token, then `finish` once.

    Promises, checked by tests/unit/test_message_reader.py:
      * the pieces add up to the same answer however the text is cut;
      * no text is lost: what is no thought and no call is content;
      * a call's name and id come once, before its arguments.
    """

    def __init__(self, reading: Reading, new_id: Callable[[], str] | None = None) -> None:
        """new_id: of a call."""
        self._reading = reading
        self._new_id = new_id or id_maker(24 if reading.family is None else reading.family.id_characters)
        self._calls: CallReader | XmlCallReader | None = None  # of the region that is read
        self._next_index = 0
        self._blanks = (
            ""  # at the end of the content: a call may follow, and they are none of the content then
        )
        self._strips = False  # blanks after a thought or a call are no content either
        self._closed_by_text = True
        self.has_called = False
        self._parser: Any = None  # transformers'
        if not reading.is_plain:
            from transformers.utils.chat_parsing import ResponseParser

            self._parser = ResponseParser(
                reading.template, prefix=THINK if reading.thinking == "open" else ""
            )

    def feed(self, text: str) -> list[Delta]:
        """What has become certain with the next text."""
        if self._parser is None:
            return [Content(text)] if text else []
        return self._deltas(self._parser.feed(text))

    def finish(self) -> list[Delta]:
        """The rest: no text follows."""
        if self._parser is None:
            return []
        self._closed_by_text = False
        last = self._deltas(self._parser.finalize()[1])
        return [*last, Content(self._blanks)] if self._blanks else last

    def _deltas(self, events: list[dict[str, Any]]) -> list[Delta]:
        found: list[Delta] = []
        for event in events:
            found += self._delta(event["type"], event["field"], event.get("text", ""))
        merged: list[Delta] = []
        for each in found:
            if isinstance(each, CallBegun):
                self.has_called = True
            if isinstance(each, Content) and merged and isinstance(merged[-1], Content):
                merged[-1] = Content(merged[-1].text + each.text)
            else:
                merged.append(each)
        return merged

    def _delta(self, kind: str, field: str, text: str) -> list[Delta]:
        if field == CALLS:
            return self._call_delta(kind, text)
        if kind == "region_close" and field == REASONING:
            self._strips = True
        if kind != "region_chunk":
            return []
        if self._reading.hidden_pattern is not None:
            text = self._reading.hidden_pattern.sub("", text)
        if field == REASONING:
            return [Reasoning(text)] if text else []
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return self._content(text)

    def _content(self, text: str) -> list[Delta]:
        text = self._blanks + text
        kept = len(text.rstrip()) if self._reading.family is not None else len(text)
        text, self._blanks = text[:kept], text[kept:]
        return [Content(text)] if text else []

    def _call_delta(self, kind: str, text: str) -> list[Delta]:
        if kind == "region_open":
            self._calls = self._new_calls()
            return []
        assert self._calls is not None
        if kind == "region_chunk":
            return self._kept(self._calls.feed(text))
        last = self._kept(self._calls.finish(is_whole=self._closed_by_text))
        self._strips = self._calls.next_index > self._next_index
        self._next_index = self._calls.next_index
        self._calls = None
        return last

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        """Without the calls after the first, where one is allowed; text that became no call is content."""
        kept: list[Delta] = []
        for each in deltas:
            if isinstance(each, Content):
                kept += self._content(each.text)
            elif self._reading.many or (isinstance(each, CallBegun | CallArguments) and each.index == 0):
                self._blanks = ""
                kept.append(each)
        return kept

    def _new_calls(self) -> CallReader | XmlCallReader:
        family, functions = self._reading.family, self._reading.functions
        assert family is not None
        if family.body == "xml":
            return XmlCallReader(family, functions, self._next_index, self._new_id)
        names = {function.name for function in functions}
        return CallReader(family, names, self._next_index, self._new_id)


def id_maker(characters: int) -> Callable[[], str]:
    """Makes ids of calls: letters and digits by chance, after `call_` where templates allow it."""

    def make() -> str:
        made = "".join(secrets.choice(_ID_LETTERS) for _ in range(characters))
        return made if characters < 24 else f"call_{made}"

    return make
