"""The fields of requests for text, with OpenAI's names and ranges: pydantic models, pure.

https://platform.openai.com/docs/api-reference/chat/create and .../completions/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from client.gateway.door.limits import RequestLimits
from client.gateway.formats.requests import ResponseFormat, ToolChoice, Tools
from client.gateway.openai.fields import Fields, Real, Whole
from node.runtime.values import MAX_INT32

LIMITS = RequestLimits()

Stop = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS.max_stop_characters)]
Name = Annotated[str, StringConstraints(max_length=256)]

# Fields of OpenAI's that would change the answer if they were left out.
UNSUPPORTED_IN_CHAT = {
    "audio": "answers are text",
    "store": "nothing is stored",
    "modalities": "answers are text",
    "prediction": "there is no speculation from a given text",
    "web_search_options": "there is no search",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "reasoning_effort": "models here have no such setting; chat_template_kwargs may have one",
    "moderation": "nothing is moderated",
    "prompt_cache_retention": "prompts are kept for a minute at most",
    "prompt_cache_options": "prompts are kept for a minute at most",
    "best_of": "use n",
}
HARMLESS_IN_CHAT = {"store": False, "modalities": ["text"]}
UNSUPPORTED_IN_COMPLETIONS = {
    "suffix": "models here continue a text, they do not fill a gap",
    "best_of": "use n",
}


class StreamOptions(Fields):
    """What a stream has besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Raceme(Fields):
    """What only a swarm has.  trace: each chunk tells the hops of its token."""

    max_hops: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    block_peers: Annotated[list[Name], Field(max_length=256)] | None = None
    trace: bool | None = None


class SamplingFields(Fields):
    """How tokens are chosen: OpenAI's fields, and those that vLLM has besides."""

    temperature: Annotated[Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Real, Field(gt=0, ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[Real, Field(ge=-100, le=100)]], Field(max_length=LIMITS.max_biases)]
        | None
    ) = None
    stop: Stop | Annotated[list[Stop], Field(max_length=LIMITS.max_stops)] | None = None


class TextRequest(SamplingFields):
    """The fields of chat and of completions."""

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_INT32)] | None = None
    n: Annotated[Whole, Field(ge=1, le=LIMITS.max_choices)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    raceme: Raceme | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_trace(self) -> bool:
        """Whether chunks tell the hops of their tokens."""
        return bool(self.raceme and self.raceme.trace)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed where stream is true")
        return self


class TextPart(Fields):
    """Text.  No other kind of content is read."""

    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    """A function and the JSON of its arguments."""

    name: str
    arguments: str


class ToolCall(Fields):
    """A call that an earlier answer has made.  index: as streams have it."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: Whole | None = None


_OF_ASSISTANTS = ("tool_calls", "refusal", "reasoning_content", "annotations")


class ChatMessage(Fields):
    """A message.  An earlier answer comes back as it was given, with fields that are null or for people."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None  # Any: for people
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> Self:
        given = self.model_fields_set
        if self.role != "assistant":
            for name in _OF_ASSISTANTS:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is only allowed in a message of role assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id is only allowed in a message of role tool")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id is needed in a message of role tool")
        if "content" not in given and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is needed")
        return self

    @property
    def text(self) -> str:
        """The content; the parts of a list on lines of their own, as vLLM joins them."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:  # Any: JSON
        """The message as chat templates take it."""
        made: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            made["tool_calls"] = [
                call.model_dump(exclude={"index"}, exclude_none=True) for call in self.tool_calls
            ]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                made[name] = value
        return made


class ChatRequest(TextRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=LIMITS.max_top_logprobs)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # Any: the template's own, as in vLLM
    # Taken and without effect.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def _likeliest_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed where logprobs is true")
        return self

    @property
    def new_tokens(self) -> int | None:
        """The bound of an answer, where the request has one."""
        return self.max_completion_tokens or self.max_tokens


Ids = Annotated[list[Annotated[Whole, Field(ge=0, le=MAX_INT32)]], Field(min_length=1)]


class CompletionRequest(TextRequest):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=LIMITS.max_prompts)]
        | Annotated[list[Ids], Field(min_length=1, max_length=LIMITS.max_prompts)]
    )
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_INT32)] | None = None  # 0: the echo alone
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=LIMITS.max_completion_logprobs)] | None = None

    @model_validator(mode="after")
    def _no_tokens_without_an_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, at least 1 is needed without echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        given: Any = self.prompt  # Any: pydantic has told the kinds apart
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)
