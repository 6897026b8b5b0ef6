"""A response as it grows: from the pieces of an answer to items, and to events in OpenAI's order.

https://platform.openai.com/docs/api-reference/responses-streaming: each item is added, gets its parts, and is
done before the next one begins; each event has the next sequence number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.gateway.formats.deltas import CallArguments, CallBegun, Content, Delta, Reasoning

Json = dict[str, Any]  # Any: JSON
MESSAGE, CALL, THOUGHT = "message", "function_call", "reasoning"


@dataclass(slots=True)
class ResponseWriter:
    """Writes one response.

    Promises, checked by tests/unit/test_response_writer.py:
      * sequence numbers go up by one from 0, and every item and part that is added is done;
      * the deltas of a part add up to its text;
      * the last event holds the response that a request without a stream gets.

    fields: of the response that repeat the request.  new_id: of an item, by its kind.
    """

    id: str
    created: int
    fields: Mapping[str, Any]
    new_id: Callable[[str], str]
    reasoning_tokens: int = 0
    _output: list[Json] = field(default_factory=list)
    _open: Json | None = None  # the item that grows, one of the output
    _logprobs: list[Json] = field(default_factory=list)  # of tokens whose text has not come
    _sequence: int = 0

    def begin(self) -> list[Json]:
        """Before the first token."""
        response = self._response("in_progress", usage=None)
        return self._numbered(
            [
                {"type": "response.created", "response": response},
                {"type": "response.in_progress", "response": response},
            ]
        )

    def token(self, deltas: Sequence[Delta], logprobs: Json | None = None) -> list[Json]:
        """A token: the pieces that it has made certain.  logprobs: its entry, where it is wanted."""
        if logprobs is not None:
            self._logprobs.append(logprobs)
        events: list[Json] = []
        for delta in deltas:
            events += self._add(delta)
        if self._open is not None and self._open["type"] == THOUGHT:
            self.reasoning_tokens += 1
        return self._numbered(events)

    def end(self, *, is_whole: bool, usage: Json) -> list[Json]:
        """After the last token.  is_whole: it did not end by its length."""
        events = [] if self._output else self._begin_item(MESSAGE)
        events += self._close("completed" if is_whole else "incomplete")
        kind = "completed" if is_whole else "incomplete"
        response = self._response(kind, usage=usage)
        return self._numbered([*events, {"type": f"response.{kind}", "response": response}])

    def fail(self, message: str, code: str | None, param: str | None) -> list[Json]:
        """An error in place of the rest."""
        events = self._close("incomplete")
        error = {"code": code or "server_error", "message": message}
        response = {**self._response("failed", usage=None), "error": error}
        return self._numbered(
            [
                *events,
                {"type": "error", **error, "param": param},
                {"type": "response.failed", "response": response},
            ]
        )

    def response(self, *, is_whole: bool, usage: Json) -> Json:
        """The whole response, for a request without a stream."""
        last: Json = self.end(is_whole=is_whole, usage=usage)[-1]["response"]
        return last

    def _add(self, delta: Delta) -> list[Json]:
        match delta:
            case Content(text):
                return self._grow(MESSAGE, "output_text", text)
            case Reasoning(text):
                return self._grow(THOUGHT, "reasoning_text", text)
            case CallBegun(_, id, name):
                self._logprobs.clear()
                return [
                    *self._close("completed"),
                    *self._begin_item(CALL, {"call_id": id, "name": name, "arguments": ""}),
                ]
            case CallArguments(_, text):
                assert self._open is not None
                self._open["arguments"] += text
                return [self._of_item("response.function_call_arguments.delta", {"delta": text})]

    def _grow(self, kind: str, part_type: str, text: str) -> list[Json]:
        """More of a text; of another kind than the item that is open, in an item of its own."""
        events: list[Json] = []
        if self._open is None or self._open["type"] != kind:
            events = [*self._close("completed"), *self._begin_item(kind)]
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: Json = {"delta": text}
        if part_type == "output_text":
            fresh, self._logprobs = self._logprobs, []
            part["logprobs"] += fresh
            more["logprobs"] = fresh
        return [*events, self._of_part(f"response.{part_type}.delta", more)]

    def _begin_item(self, kind: str, more: Json | None = None) -> list[Json]:
        item: Json = {"id": self.new_id(kind), "type": kind, "status": "in_progress", **(more or {})}
        if kind == MESSAGE:
            item |= {"role": "assistant", "content": []}
        elif kind == THOUGHT:
            item |= {"summary": [], "content": []}
        self._output.append(item)
        self._open = item
        added = {
            "type": "response.output_item.added",
            "output_index": len(self._output) - 1,
            "item": _copied(item),
        }
        if kind == CALL:
            return [added]
        item["content"].append(_empty_part(kind))
        return [added, self._of_part("response.content_part.added", {"part": _empty_part(kind)})]

    def _close(self, status: str) -> list[Json]:
        """The item that is open is done."""
        item = self._open
        if item is None:
            return []
        item["status"] = status
        events: list[Json] = []
        if item["type"] == CALL:
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._of_item("response.function_call_arguments.done", done))
        else:
            part = item["content"][0]
            more: Json = {"text": part["text"]}
            if item["type"] == MESSAGE:
                part["logprobs"] += self._logprobs
                more["logprobs"] = list(part["logprobs"])
            events.append(self._of_part(f"response.{part['type']}.done", more))
            events.append(self._of_part("response.content_part.done", {"part": dict(part)}))
        self._logprobs = []
        self._open = None
        events.append(
            {
                "type": "response.output_item.done",
                "output_index": len(self._output) - 1,
                "item": _copied(item),
            }
        )
        return events

    def _of_item(self, kind: str, more: Json) -> Json:
        item = self._output[-1]
        return {"type": kind, "item_id": item["id"], "output_index": len(self._output) - 1, **more}

    def _of_part(self, kind: str, more: Json) -> Json:
        return self._of_item(kind, {"content_index": 0, **more})

    def _response(self, status: str, usage: Json | None) -> Json:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            **self.fields,
            "output": [_copied(item) for item in self._output],
            **({} if usage is None else {"usage": usage}),
        }

    def _numbered(self, events: list[Json]) -> list[Json]:
        numbered = []
        for event in events:
            # `type` first, as OpenAI has it.
            numbered.append({"type": event["type"], "sequence_number": self._sequence, **event})
            self._sequence += 1
        return numbered


def _empty_part(kind: str) -> Json:
    if kind == THOUGHT:
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copied(item: Json) -> Json:
    """An item as it is now."""
    if "content" not in item:
        return dict(item)
    return {**item, "content": [dict(part) for part in item["content"]]}
