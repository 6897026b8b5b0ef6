"""From the messages of a request to a prompt: the model's own chat template, in transformers' sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from client.gateway.formats.call_grammars import THINK, THOUGHT_ENDS, Thinking
from client.gateway.formats.errors import FormatError, one_line
from client.gateway.formats.requests import Tool

Messages = Sequence[Mapping[str, Any]]  # Any: JSON of a client, checked by its model
ROLES = {"developer": "system"}  # a name of OpenAI's that no template knows


class ChatTemplate:
    """The chat template of a tokenizer; a folder may have one more for tools."""

    def __init__(self, tokenizer: Any) -> None:  # Any: of transformers, untyped
        self._tokenizer = tokenizer

    def text(self, *, with_tools: bool) -> str:
        """The template's own text.  Raises FormatError where the model has none."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise FormatError("this model has no chat template: use /v1/completions", "messages")
        try:
            return str(self._tokenizer.get_chat_template(None, [{}] if with_tools else None))
        except ValueError as error:
            raise FormatError(f"this model's chat template cannot be used: {one_line(error)}") from None

    def knows_tools(self) -> bool:
        """Whether the template writes the tools of a request into the prompt."""
        return re.search(r"\btools\b", self.text(with_tools=True)) is not None

    def render(self, messages: Messages, tools: Sequence[Tool], arguments: Mapping[str, Any]) -> str:
        """The prompt's text, with the opening of an answer.  arguments: more of the template's variables.

        Raises FormatError for messages that the template refuses.
        """
        text = self.text(with_tools=bool(tools))
        given = [_message(place, message, text) for place, message in enumerate(messages)]
        try:
            made = self._tokenizer.apply_chat_template(
                given,
                tools=[_shown(tool) for tool in tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **arguments,
            )
        except Exception as error:  # a template may end with anything  # noqa: BLE001
            raise FormatError(
                f"the model's chat template refuses these messages: {one_line(error)}", "messages"
            ) from None
        return str(made)

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered prompt; the template has written the special ones already."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def thinking(self, prompt: str, *, with_tools: bool) -> Thinking:
        """Whether the answer to a rendered prompt begins with a thought, or may."""
        if THINK not in self.text(with_tools=with_tools):
            return "none"
        begun, ended = prompt.rfind(THINK), prompt.rfind(THOUGHT_ENDS)
        after = prompt[max(begun, ended) :]
        if begun >= 0 and not after.replace(THINK, "").strip():
            return "open"
        if ended > begun >= 0 and not after.replace(THOUGHT_ENDS, "").strip():
            return "none"  # an empty thought: the request wants none
        return "optional"


def _message(place: int, message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message as templates take it: text where OpenAI allows null, arguments as objects."""
    made = {key: value for key, value in message.items() if value is not None}
    made["role"] = ROLES.get(made["role"], made["role"])
    made.setdefault("content", "")
    calls = made.get("tool_calls")
    if calls is None:
        return made
    if not calls:
        del made["tool_calls"]  # a list without calls means none
        return made
    made["tool_calls"] = [
        {**call, "function": {**call["function"], "arguments": _arguments(place, number, call["function"])}}
        for number, call in enumerate(calls)
    ]
    if "tool_calls" not in template:
        # The template would leave the calls out; the model sees them as text.
        said = [json.dumps(call["function"], ensure_ascii=False) for call in made.pop("tool_calls")]
        made["content"] = "\n".join([*([made["content"]] if made["content"] else []), *said])
    return made


def _shown(tool: Tool) -> dict[str, Any]:
    """A tool as templates know it: `strict` is for the grammar alone."""
    return tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})


def _arguments(place: int, number: int, function: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, of which OpenAI makes text.  Raises FormatError."""
    text = function.get("arguments") or "{}"
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FormatError(
            "the arguments of a call are no JSON object",
            f"messages.{place}.tool_calls.{number}.function.arguments",
        )
    return found
