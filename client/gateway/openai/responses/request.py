"""The body of POST /v1/responses.

https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from client.gateway.formats.requests import Part
from client.gateway.openai.errors import RequestError, unsupported
from client.gateway.openai.fields import Whole
from client.gateway.openai.requests import LIMITS, Raceme, SamplingFields, StreamOptions
from client.gateway.openai.responses.fields import Choice, FunctionTools, TextOptions
from client.gateway.openai.responses.items import Item
from node.runtime.values import MAX_INT32

LOGPROBS = "message.output_text.logprobs"
UNSUPPORTED = {
    "previous_response_id": "responses are not stored: send the items of the conversation in input",
    "conversation": "conversations are not stored: send the items in input",
    "prompt": "prompts are not stored: send instructions and input",
    "max_tool_calls": "tools are called by the program that asks",
    "prompt_cache_retention": "prompts are kept for a minute at most",
    "prompt_cache_options": "prompts are kept for a minute at most",
    "moderation": "nothing is moderated",
    "context_management": "nothing is compacted",
    "max_tokens": "use max_output_tokens",
    "messages": "use input",
    "response_format": "use text.format",
    "n": "a response is one answer",
    "logprobs": "use include and top_logprobs",
}


class ReasoningOptions(Part):
    """`reasoning`: models here have no such setting."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseRequest(SamplingFields):
    """A request for a response."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1, le=MAX_INT32)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: FunctionTools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=LIMITS.max_top_logprobs)] | None = None
    reasoning: ReasoningOptions | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    raceme: Raceme | None = None
    # Taken and without effect.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text has log probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def wants_trace(self) -> bool:
        """Whether events tell the hops of their token."""
        return bool(self.raceme and self.raceme.trace)


def refusal(fields: ResponseRequest) -> RequestError | None:
    """The error for a value that OpenAI knows and the gateway does not do; None: there is none."""
    if fields.store:
        return unsupported("store", "responses are not stored: false is possible")
    if fields.background:
        return unsupported("background", "responses are not stored: false is possible")
    if fields.truncation == "auto":
        return unsupported("truncation", "items are not left out: disabled is possible")
    if fields.reasoning is not None and fields.reasoning.model_dump(exclude_none=True):
        return unsupported("reasoning", "models here have no such setting")
    for number, each in enumerate(fields.include or ()):
        if each != LOGPROBS:
            return unsupported(f"include.{number}", f"{LOGPROBS} is possible")
    if fields.top_logprobs and not fields.wants_logprobs:
        return RequestError(
            400, f"top_logprobs is only allowed where include has {LOGPROBS}", param="top_logprobs"
        )
    if fields.stream_options is not None and (not fields.stream or fields.stream_options.include_usage):
        why = "only allowed where stream is true" if not fields.stream else "a response has its usage anyway"
        return RequestError(400, f"stream_options: {why}", param="stream_options")
    return None
