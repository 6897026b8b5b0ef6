"""POST /v1/chat/completions: a chat goes on, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from client.gateway.formats.chat import Prepared
from client.gateway.formats.deltas import Content, Delta, Message, chat_delta
from client.gateway.formats.reader import MessageReader
from client.gateway.gateway import Gateway
from client.gateway.jobs import Job, Piece, Prompt, Running
from client.gateway.openai.endpoints import caller_of, id_of, stack_of
from client.gateway.openai.errors import RequestError
from client.gateway.openai.fields import parse
from client.gateway.openai.logprobs import TokenTexts, chat_entry
from client.gateway.openai.requests import HARMLESS_IN_CHAT, UNSUPPORTED_IN_CHAT, ChatRequest
from client.gateway.openai.sampling import new_tokens, sampling_arguments, servers_of
from client.gateway.openai.streaming import DONE, Chunks, event, stream

PATH = "/v1/chat/completions"


async def chat(gateway: Gateway, request: Request, body: dict[str, Any]) -> Response:  # Any: JSON
    """Answer a chat."""
    fields = parse(ChatRequest, body, unsupported=UNSUPPORTED_IN_CHAT, harmless=HARMLESS_IN_CHAT)
    model = gateway.served.find(fields.model)
    longest = gateway.served.max_length(model)
    language = gateway.language
    language.check_length(sum(len(message.text) for message in fields.messages), longest, "messages")
    prepared = await language.run(
        partial(
            language.formats.prepare,
            [message.for_template() for message in fields.messages],
            tools=fields.tools,
            tool_choice=fields.tool_choice,
            parallel_tool_calls=fields.parallel_tool_calls,
            response_format=fields.response_format,
            template_arguments=fields.chat_template_kwargs,
        ),
        slow=fields.response_format is not None or bool(fields.tools),
    )
    tokens = new_tokens(len(prepared.prompt_ids), fields.new_tokens, longest, "messages")
    job = Job(
        "chat",
        PATH,
        caller_of(request),
        id_of(request),
        model,
        [_prompt(gateway, fields, prepared, tokens, choice) for choice in range(fields.choices)],
        len(prepared.prompt_ids),
        servers_of(fields.raceme),
        fields.wants_trace,
    )
    running = await stack_of(request).enter_async_context(gateway.running(job))
    answer = ChatAnswer(
        fields, model.name, f"chatcmpl-{job.request_id}", gateway.served.fingerprint, language.texts,
        [Choice(prepared.reader()) for _ in range(fields.choices)],
    )  # fmt: skip
    if fields.stream:
        return await stream(request, running, ChatStream(answer), gateway.settings.http)
    async for piece in running.pieces():
        answer.add(piece)
    return JSONResponse(answer.body(running), headers=dict(running.headers))


def _prompt(gateway: Gateway, fields: ChatRequest, prepared: Prepared, tokens: int, choice: int) -> Prompt:
    arguments = sampling_arguments(
        fields,
        default_temperature=gateway.settings.default_temperature,
        vocabulary=gateway.swarm.info.vocab_size,
        choice=choice,
    )
    arguments.update(prepared.arguments())
    if fields.logprobs:
        arguments.update({"logprobs": True, "top_logprobs": fields.top_logprobs or 0})
    return Prompt(prepared.prompt_ids, arguments, tokens)


@dataclass(slots=True)
class Choice:
    """One answer, as it comes."""

    reader: MessageReader
    message: Message = field(default_factory=Message)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def read(self, piece: Piece) -> list[Delta]:
        """The parts of the answer that a token makes certain."""
        deltas = self.reader.feed(piece.token.text)
        if (reason := piece.token.finish_reason) is not None:
            deltas += self.reader.finish()
            self.finish_reason = "length" if reason == "length" else "stop"
            if self.reader.has_called and reason != "length":
                self.finish_reason = "tool_calls"
        return deltas


@dataclass(slots=True)
class ChatAnswer:
    """All answers to one chat."""

    fields: ChatRequest
    model: str
    id: str
    fingerprint: str
    texts: TokenTexts
    choices: list[Choice]
    created: int = field(default_factory=lambda: int(time.time()))
    facts: list[dict[str, Any]] = field(default_factory=list)

    def entries(self, piece: Piece) -> list[dict[str, Any]]:
        """The log probabilities of a token, where they are wanted; the end token is no part of the text."""
        if not self.fields.logprobs or piece.token.finish_reason == "end":
            return []
        return [chat_entry(self.texts, piece.token)]

    def add(self, piece: Piece) -> None:
        """A token, for an answer in one piece."""
        choice = self.choices[piece.choice]
        for delta in choice.read(piece):
            choice.message.add(delta)
        choice.logprobs.extend(self.entries(piece))
        if self.fields.wants_trace:
            self.facts.append({"choice": piece.choice, **piece.facts})

    def body(self, running: Running) -> dict[str, Any]:
        """The chat.completion."""
        made: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [self._choice(index, each) for index, each in enumerate(self.choices)],
            "usage": running.usage.body(),
        }
        return made | ({"raceme": {"tokens": self.facts}} if self.fields.wants_trace else {})

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": choice.message.as_chat(),
            "logprobs": {"content": choice.logprobs, "refusal": None} if self.fields.logprobs else None,
            "finish_reason": choice.finish_reason,
        }


class ChatStream:
    """The chunks of a chat."""

    done = DONE

    def __init__(self, answer: ChatAnswer) -> None:
        self._answer = answer
        head = {
            "id": answer.id,
            "object": "chat.completion.chunk",
            "created": answer.created,
            "model": answer.model,
            "system_fingerprint": answer.fingerprint,
        }
        self._chunks = Chunks(head, wants_usage=answer.fields.wants_usage)

    def begin(self) -> Iterable[bytes]:
        """The role of each answer."""
        first = {"role": "assistant", "content": ""}
        return [self._chunk(index, first) for index in range(len(self._answer.choices))]

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """The parts that a token makes certain, and the end of an answer."""
        answer, choice = self._answer, self._answer.choices[piece.choice]
        deltas = choice.read(piece)
        entries = answer.entries(piece)
        facts = piece.facts if answer.fields.wants_trace else None
        if not deltas and (entries or facts is not None):
            deltas = [Content("")]
        for number, delta in enumerate(deltas):
            first = number == 0
            yield self._chunk(
                piece.choice,
                chat_delta(delta),
                logprobs=entries if first else [],
                facts=facts if first else None,
            )
        if choice.finish_reason is not None:
            yield self._chunk(piece.choice, {}, finish_reason=choice.finish_reason)

    def end(self, running: Running) -> Iterable[bytes]:
        """The usage, where it is wanted."""
        if not self._answer.fields.wants_usage:
            return []
        return [self._chunks.usage(running.usage)]

    def failed(self, error: RequestError) -> Iterable[bytes]:
        """An error in place of the rest."""
        return [event(error.body())]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": finish_reason,
        }
        return self._chunks.chunk(choice, facts)
