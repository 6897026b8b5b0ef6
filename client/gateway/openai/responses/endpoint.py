"""POST /v1/responses: one answer, from items to items."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from client.gateway.formats.chat import Prepared
from client.gateway.formats.errors import FormatError
from client.gateway.formats.reader import MessageReader
from client.gateway.gateway import Gateway
from client.gateway.jobs import Job, Piece, Prompt, Running
from client.gateway.openai.endpoints import caller_of, id_of, stack_of
from client.gateway.openai.errors import RequestError
from client.gateway.openai.fields import parse
from client.gateway.openai.logprobs import TokenTexts, chat_entry
from client.gateway.openai.responses.fields import chat_choice, chat_format, chat_tools, own_error, repeated
from client.gateway.openai.responses.items import messages_of
from client.gateway.openai.responses.request import UNSUPPORTED, ResponseRequest, refusal
from client.gateway.openai.responses.writer import CALL, MESSAGE, ResponseWriter
from client.gateway.openai.sampling import new_tokens, sampling_arguments, servers_of
from client.gateway.openai.streaming import event, stream
from client.gateway.requests import Usage

PATH = "/v1/responses"


async def responses(gateway: Gateway, request: Request, body: dict[str, Any]) -> Response:  # Any: JSON
    """Answer a request for a response."""
    fields = parse(ResponseRequest, body, unsupported=UNSUPPORTED)
    if (refused := refusal(fields)) is not None:
        raise refused
    model = gateway.served.find(fields.model)
    longest = gateway.served.max_length(model)
    language = gateway.language
    prepared = await _prepared(gateway, fields, longest)
    tokens = new_tokens(len(prepared.prompt_ids), fields.max_output_tokens, longest, "input")
    job = Job(
        "response",
        PATH,
        caller_of(request),
        id_of(request),
        model,
        [_prompt(gateway, fields, prepared, tokens)],
        len(prepared.prompt_ids),
        servers_of(fields.raceme),
        fields.wants_trace,
    )
    running = await stack_of(request).enter_async_context(gateway.running(job))
    repeats = _repeated(fields, model.name, gateway.settings.default_temperature)
    writer = ResponseWriter(f"resp_{job.request_id}", int(time.time()), repeats, _new_id)
    answer = Answer(fields, prepared.reader(), writer, language.texts)
    if fields.stream:
        return await stream(request, running, ResponseStream(answer), gateway.settings.http)
    async for piece in running.pieces():
        answer.read(piece)
    made = writer.response(is_whole=answer.is_whole, usage=answer.usage(running.usage))
    return JSONResponse(made, headers=dict(running.headers))


async def _prepared(gateway: Gateway, fields: ResponseRequest, longest: int) -> Prepared:
    """The prompt and the form of the answer.  Raises RequestError, FormatError."""
    messages = messages_of(fields.input, fields.instructions)
    language = gateway.language
    language.check_length(sum(len(each["content"] or "") for each in messages), longest, "input")
    prepare = partial(
        language.formats.prepare,
        messages,
        tools=chat_tools(fields.tools),
        tool_choice=chat_choice(fields.tool_choice),
        parallel_tool_calls=fields.parallel_tool_calls if fields.tools else None,
        response_format=chat_format(fields.text),
    )
    try:
        return await language.run(prepare, slow=bool(fields.tools) or fields.text is not None)
    except FormatError as error:
        raise own_error(error) from None


def _prompt(gateway: Gateway, fields: ResponseRequest, prepared: Prepared, tokens: int) -> Prompt:
    arguments = sampling_arguments(
        fields,
        default_temperature=gateway.settings.default_temperature,
        vocabulary=gateway.swarm.info.vocab_size,
    )
    arguments.update(prepared.arguments())
    if fields.wants_logprobs:
        arguments.update({"logprobs": True, "top_logprobs": fields.top_logprobs or 0})
    return Prompt(prepared.prompt_ids, arguments, tokens)


def _new_id(kind: str) -> str:
    prefix = {MESSAGE: "msg", CALL: "fc"}.get(kind, "rs")
    return f"{prefix}_{secrets.token_hex(16)}"


def _repeated(fields: ResponseRequest, model: str, default_temperature: float) -> dict[str, Any]:
    """The fields of a response that repeat the request, with the defaults that held."""
    return {
        "model": model,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": None,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "background": False,
        "temperature": default_temperature if fields.temperature is None else fields.temperature,
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "top_logprobs": fields.top_logprobs or 0,
        "truncation": "disabled",
        **fields.model_dump(include={"prompt_cache_key", "safety_identifier", "user"}, exclude_none=True),
        **repeated(fields.tools, fields.tool_choice, fields.text),
    }


@dataclass(slots=True)
class Answer:
    """The answer, as it comes.  is_whole: it did not end by its length."""

    fields: ResponseRequest
    reader: MessageReader
    writer: ResponseWriter
    texts: TokenTexts
    is_whole: bool = True

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """The events of a token."""
        token = piece.token
        deltas = self.reader.feed(token.text)
        if token.finish_reason is not None:
            deltas += self.reader.finish()
            self.is_whole = token.finish_reason != "length"
        entry = None
        if self.fields.wants_logprobs and token.finish_reason != "end":
            entry = chat_entry(self.texts, token)
        events = self.writer.token(deltas, entry)
        if self.fields.wants_trace and events:
            events[0]["raceme"] = piece.facts
        return events

    def usage(self, usage: Usage) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.writer.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


class ResponseStream:
    """The typed events of a response.  OpenAI's stream ends with the last of them, without [DONE]."""

    done = b""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def begin(self) -> Iterable[bytes]:
        """The response without an output."""
        return _named(self._answer.writer.begin())

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """The events of a token."""
        return _named(self._answer.read(piece))

    def end(self, running: Running) -> Iterable[bytes]:
        """The whole response."""
        answer = self._answer
        return _named(answer.writer.end(is_whole=answer.is_whole, usage=answer.usage(running.usage)))

    def failed(self, error: RequestError) -> Iterable[bytes]:
        """An error in place of the rest."""
        return _named(self._answer.writer.fail(error.message, error.code, error.param))


def _named(events: list[dict[str, Any]]) -> list[bytes]:
    return [event(each, each["type"]) for each in events]
