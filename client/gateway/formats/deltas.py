"""What an answer is made of, piece by piece; a stream sends the pieces, and a whole answer adds them up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought aloud before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool.  index: of the call in the answer.  id: for the message with the tool's result."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, which are JSON."""

    index: int
    text: str


Delta = Content | Reasoning | CallBegun | CallArguments


def chat_delta(delta: Delta) -> dict[str, Any]:
    """The `delta` of a chat.completion.chunk: a call's id and name come once, with its first chunk."""
    match delta:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallBegun(index, id, name):
            call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            return {"tool_calls": [call]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


@dataclass(slots=True)
class Call:
    """A whole call of a tool.  arguments: JSON."""

    id: str
    name: str
    arguments: str = ""

    def append(self, text: str) -> None:
        """The next piece of the arguments."""
        self.arguments += text


@dataclass(slots=True)
class Message:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Append a piece."""
        match delta:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallBegun(_, id, name):
                self.calls.append(Call(id, name))
            case CallArguments(index, text):
                self.calls[index].append(text)

    def as_chat(self) -> dict[str, Any]:
        """The `message` of a chat.completion; `content` is null where there are calls and no text."""
        content = self.content or (None if self.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        return message
