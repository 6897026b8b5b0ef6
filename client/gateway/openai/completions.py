"""POST /v1/completions: a text goes on, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from client.gateway.gateway import Gateway
from client.gateway.jobs import Job, Piece, Prompt, Running
from client.gateway.language import Language
from client.gateway.openai.endpoints import caller_of, id_of, stack_of
from client.gateway.openai.errors import RequestError, invalid
from client.gateway.openai.fields import parse
from client.gateway.openai.logprobs import CompletionLogprobs, prompt_logprobs
from client.gateway.openai.requests import UNSUPPORTED_IN_COMPLETIONS, CompletionRequest
from client.gateway.openai.sampling import new_tokens, sampling_arguments, servers_of
from client.gateway.openai.streaming import DONE, Chunks, event, stream
from client.gateway.served import ServedModel
from client.generation.checks import check_vocabulary

PATH = "/v1/completions"


async def completions(gateway: Gateway, request: Request, body: dict[str, Any]) -> Response:  # Any: JSON
    """Continue each prompt."""
    fields = parse(CompletionRequest, body, unsupported=UNSUPPORTED_IN_COMPLETIONS)
    model = gateway.served.find(fields.model)
    longest = gateway.served.max_length(model)
    for prompt in fields.prompts:
        if isinstance(prompt, str):
            gateway.language.check_length(len(prompt), longest, "prompt")
    prepared = await gateway.language.run(
        partial(_prepared, gateway.language, fields), slow=fields.response_format is not None
    )
    prompts, choices = [], []
    for ids, text in prepared:
        tokens = new_tokens(len(ids), fields.max_tokens, longest, "prompt")
        for choice in range(fields.choices):
            if tokens:
                prompts.append(_prompt(gateway, fields, ids, tokens, choice))
            choices.append(_choice(gateway.language, fields, text))
    job = Job(
        "completion",
        PATH,
        caller_of(request),
        id_of(request),
        model,
        prompts,
        sum(len(ids) for ids, _ in prepared),
        servers_of(fields.raceme),
        fields.wants_trace,
    )
    running = await stack_of(request).enter_async_context(gateway.running(job))
    if fields.echo and fields.logprobs is not None:
        await _add_prompts(gateway, fields, model, [ids for ids, _ in prepared], choices)
    if fields.max_tokens == 0:
        for each in choices:
            each.end()
    answer = CompletionAnswer(
        fields, model.name, f"cmpl-{job.request_id}", gateway.served.fingerprint, choices
    )
    if fields.stream:
        return await stream(request, running, CompletionStream(answer), gateway.settings.http)
    async for piece in running.pieces():
        answer.add(piece)
    return JSONResponse(answer.body(running), headers=dict(running.headers))


def _prepared(language: Language, fields: CompletionRequest) -> list[tuple[list[int], str]]:
    """The tokens and, for echo, the text of each prompt.  Raises RequestError, FormatError."""
    found = []
    for number, prompt in enumerate(fields.prompts):
        param = "prompt" if len(fields.prompts) == 1 else f"prompt.{number}"
        if isinstance(prompt, str):
            ids, text = language.tokens_of(prompt), prompt
        else:
            ids, text = list(prompt), ""
            try:
                check_vocabulary(ids, language.vocabulary)
            except ValueError as error:
                raise invalid(f"{param}: {error}", param) from None
            if fields.echo:
                text = language.text_of(ids)
        if not ids:
            raise invalid(f"{param} has no tokens", param)
        found.append((ids, text))
    if fields.response_format is not None:
        language.formats.prepare_text([], fields.response_format)  # a bad schema is found before the queue
    return found


def _prompt(gateway: Gateway, fields: CompletionRequest, ids: list[int], tokens: int, choice: int) -> Prompt:
    arguments = sampling_arguments(
        fields,
        default_temperature=gateway.settings.default_temperature,
        vocabulary=gateway.swarm.info.vocab_size,
        choice=choice,
    )
    if fields.response_format is not None:
        arguments.update(gateway.language.formats.prepare_text(ids, fields.response_format).arguments())
    if fields.logprobs is not None:
        arguments.update({"logprobs": True, "top_logprobs": fields.logprobs})
    return Prompt(ids, arguments, tokens)


async def _add_prompts(
    gateway: Gateway,
    fields: CompletionRequest,
    model: ServedModel,
    prompts: list[list[int]],
    choices: list[TextChoice],
) -> None:
    """Put the log probabilities of the prompts' own tokens in front of their answers'."""
    for number, ids in enumerate(prompts):
        found = await prompt_logprobs(gateway.swarm, model.adapter, ids, fields.logprobs or 0)
        for choice in choices[number * fields.choices : (number + 1) * fields.choices]:
            assert choice.logprobs is not None
            choice.logprobs.add(ids[0], None, None)  # nothing comes before it
            for token, (logprob, top) in zip(ids[1:], found, strict=True):
                choice.logprobs.add(token, logprob, top)


@dataclass(slots=True)
class TextChoice:
    """One continuation, as it comes.  echoed: the prompt, until it has been sent."""

    echoed: str = ""
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None

    def read(self, piece: Piece) -> str:
        """The text that a token makes certain, the prompt in front of the first where it is wanted."""
        token = piece.token
        text, self.echoed = self.echoed + token.text, ""
        if self.logprobs is not None and token.finish_reason != "end":
            self.logprobs.add(token.id, token.logprob, token.top_logprobs)
        if token.finish_reason is not None:
            self.finish_reason = "length" if token.finish_reason == "length" else "stop"
        return text

    def end(self) -> None:
        """Nothing follows the echo."""
        self.text, self.echoed, self.finish_reason = self.echoed, "", "length"

    def append(self, text: str) -> None:
        """Text of an answer in one piece."""
        self.text += text

    def body(self, index: int) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            "index": index,
            "text": self.text,
            "logprobs": None if self.logprobs is None else self.logprobs.take(),
            "finish_reason": self.finish_reason,
        }


def _choice(language: Language, fields: CompletionRequest, text: str) -> TextChoice:
    logprobs = None if fields.logprobs is None else CompletionLogprobs(language.texts)
    return TextChoice(text if fields.echo else "", logprobs=logprobs)


@dataclass(slots=True)
class CompletionAnswer:
    """All continuations of a request's prompts."""

    fields: CompletionRequest
    model: str
    id: str
    fingerprint: str
    choices: list[TextChoice]
    created: int = field(default_factory=lambda: int(time.time()))
    facts: list[dict[str, Any]] = field(default_factory=list)

    def head(self) -> dict[str, Any]:
        """The fields that all chunks have."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def add(self, piece: Piece) -> None:
        """A token, for an answer in one piece."""
        choice = self.choices[piece.choice]
        choice.append(choice.read(piece))
        if self.fields.wants_trace:
            self.facts.append({"choice": piece.choice, **piece.facts})

    def body(self, running: Running) -> dict[str, Any]:
        """The text_completion."""
        choices = [each.body(index) for index, each in enumerate(self.choices)]
        made = {**self.head(), "choices": choices, "usage": running.usage.body()}
        return made | ({"raceme": {"tokens": self.facts}} if self.fields.wants_trace else {})


class CompletionStream:
    """The chunks of a text."""

    done = DONE

    def __init__(self, answer: CompletionAnswer) -> None:
        self._answer = answer
        self._chunks = Chunks(answer.head(), wants_usage=answer.fields.wants_usage)

    def begin(self) -> Iterable[bytes]:
        """Nothing: the first token is the first chunk."""
        return []

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """The text that a token makes certain."""
        answer, choice = self._answer, self._answer.choices[piece.choice]
        text = choice.read(piece)
        if not (text or choice.finish_reason or choice.logprobs or answer.fields.wants_trace):
            return
        made = {
            "index": piece.choice,
            "text": text,
            "logprobs": None if choice.logprobs is None else choice.logprobs.take(),
            "finish_reason": choice.finish_reason,
        }
        yield self._chunks.chunk(made, piece.facts if answer.fields.wants_trace else None)

    def end(self, running: Running) -> Iterable[bytes]:
        """The echo where that is all, and the usage where it is wanted."""
        answer = self._answer
        if answer.fields.max_tokens == 0:
            for index, choice in enumerate(answer.choices):
                yield event({**answer.head(), "choices": [choice.body(index)]})
        if answer.fields.wants_usage:
            yield self._chunks.usage(running.usage)

    def failed(self, error: RequestError) -> Iterable[bytes]:
        """An error in place of the rest."""
        return [event(error.body())]
