"""Reads the calls of Qwen 3.5 and Qwen3-Coder: tags, whose values get the types of the tool's schema.

The tags are read by transformers' own parser, with its table's row of these models, when a call is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from client.gateway.formats.deltas import CallArguments, CallBegun, Content, Delta
from client.gateway.formats.families import Family
from client.gateway.formats.requests import Function

TEMPLATE = {  # as in transformers.cli.serving.utils
    "start_anchor": "<tool_call>",
    "fields": {
        "call": {
            "open_pattern": r"<function=(?P<name>[^>\n]+)>",
            "close": "</function>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
            },
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


class XmlCallReader:
    """The call of one region of a text.  As `CallReader`, but a call comes when it is whole."""

    def __init__(
        self, family: Family, functions: Sequence[Function], first_index: int, new_id: Callable[[], str]
    ) -> None:
        """functions: with the schemas for the arguments' types.  first_index: of the call."""
        self._family = family
        self._functions = {each.name: each for each in functions}
        self._index = first_index
        self._new_id = new_id
        self._raw = ""

    @property
    def next_index(self) -> int:
        """Of a call after this one."""
        return self._index

    def feed(self, text: str) -> list[Delta]:
        """Nothing is certain before the end."""
        self._raw += text
        return []

    def finish(self, *, is_whole: bool) -> list[Delta]:
        """The call, or its text where that is no call of a known function."""
        call = self._call() if is_whole else None
        if call is None or call["name"] not in self._functions:
            closing = self._family.closes if is_whole else None
            return [Content(self._family.trigger + self._raw + (closing or ""))]
        begun = CallBegun(self._index, self._new_id(), call["name"])
        self._index += 1
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        return [begun, CallArguments(begun.index, arguments)]

    def _call(self) -> dict[str, Any] | None:
        """The call's name and arguments."""
        from transformers.utils.chat_parsing import parse_response

        tools = [
            {"type": "function", "function": {"name": each.name, "parameters": each.parameters}}
            for each in self._functions.values()
        ]
        try:
            found = parse_response(self._raw, TEMPLATE, prefix="", tools=tools)
        except (ValueError, KeyError, TypeError):  # of what a model has written
            return None
        call = found.get("call", {}).get("function")
        return dict(call) if call else None
