"""From the items of a response's `input` to the messages of a chat.

https://platform.openai.com/docs/api-reference/responses/create: an item is a message, a call of a function,
its output, or a thought.  A chat's message holds its text, its calls and its thought together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from client.gateway.formats.requests import Part


class TextPart(Part):
    """A text.  annotations, logprobs: of an output that comes back; they say nothing to a model."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(Part):
    """A refusal that comes back."""

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Content = str | list[ContentPart]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Part):
    """A message.  id, status, phase: of an output that comes back."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Status | None = None


class CallItem(Part):
    """A call of a function that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutputItem(Part):
    """The output of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Status | None = None


class Thought(Part):
    """A part of a thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Part):
    """A thought that comes back."""

    type: Literal["reasoning"]
    summary: Annotated[list[Thought], Field(default_factory=list)]
    content: list[Thought] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: None = None  # there is none of ours


def _kind(item: Any) -> str | None:
    """An item's type; without one it is a message."""
    if not isinstance(item, Mapping):
        return getattr(item, "type", None)
    kind = item.get("type", "message")
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="kind_of_item",
        custom_error_message="message, function_call, function_call_output and reasoning are allowed as type",
    ),
]


def messages_of(given: str | Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a chat; a thought and calls belong to the assistant's message before or after them."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    thought: str | None = None
    for item in given:
        match item:
            case ReasoningItem():
                thought = "".join(part.text for part in item.content or item.summary)
                continue
            case CallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            case CallItem():
                call = {"name": item.name, "arguments": item.arguments}
                _assistant(messages, thought).setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": call}
                )
            case MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
                if thought is not None and item.role == "assistant":
                    messages[-1]["reasoning_content"] = thought
        thought = None
    return messages


def _assistant(messages: list[dict[str, Any]], thought: str | None) -> dict[str, Any]:
    """The assistant's message that a call belongs to: the last one, or a new one."""
    if thought is None and messages and messages[-1]["role"] == "assistant":
        return messages[-1]
    messages.append({"role": "assistant", "content": None})
    if thought is not None:
        messages[-1]["reasoning_content"] = thought
    return messages[-1]


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
