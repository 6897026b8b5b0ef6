"""OpenAI's Python client: its types check our answers, its errors are raised for ours."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from tests.conformance.conftest import KEY, MODEL, PERSON, WEATHER, Served

openai = pytest.importorskip("openai")
ASKED: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(served: Served) -> Any:
    with openai.OpenAI(max_retries=0, timeout=120.0) as client:
        yield client


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).owned_by == "raceme"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, max_completion_tokens=8, seed=1)
    choice = answer.choices[0]
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_chat(client: Any) -> None:
    fields = {"model": MODEL, "messages": ASKED, "max_completion_tokens": 24, "seed": 5}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    (reason,) = [
        chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason
    ]
    assert reason == whole.choices[0].finish_reason


def test_a_completion(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=6, logprobs=2, seed=1)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) <= 6
    assert "".join(logprobs.tokens) == answer.choices[0].text


def test_a_stream_may_be_left(client: Any) -> None:
    with client.chat.completions.create(model=MODEL, messages=ASKED, stream=True, max_tokens=500) as stream:
        for _, _chunk in zip(range(3), stream, strict=False):
            pass


def test_a_form_is_parsed_by_the_client(client: Any) -> None:
    class Answer(BaseModel):
        is_right: bool
        digit: Annotated[int, Field(ge=0, le=9)]

    answer = client.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=Answer, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds(client: Any, stream: bool) -> None:
    fields = {
        "model": MODEL,
        "messages": ASKED,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
        "max_tokens": 300,
        "seed": 2,
    }
    if stream:
        chunks = client.chat.completions.create(**fields, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**fields).choices[0].message.content
    assert json.loads(text).keys() == {"name", "age"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_of_a_tool_and_its_result(client: Any, choice: Any) -> None:
    fields = {"model": MODEL, "tools": [WEATHER], "max_tokens": 400, "seed": 3, "parallel_tool_calls": False}
    answer = client.chat.completions.create(messages=ASKED, tool_choice=choice, **fields)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["unit"] in "CF"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = client.chat.completions.create(
        messages=[*ASKED, message.model_dump(exclude_none=True), result], tool_choice="none", **fields
    )
    assert again.choices[0].message.tool_calls is None


def test_a_streamed_call_has_its_name_and_id_once(client: Any) -> None:
    fields = {"model": MODEL, "tools": [WEATHER], "max_tokens": 400, "seed": 3, "tool_choice": "required"}
    whole = client.chat.completions.create(messages=ASKED, parallel_tool_calls=False, **fields)
    stream = client.chat.completions.create(messages=ASKED, parallel_tool_calls=False, stream=True, **fields)
    parts = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert [part.id is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.function.name for part in parts] == ["weather"] + [None] * (len(parts) - 1)
    arguments = "".join(part.function.arguments or "" for part in parts)
    assert arguments == whole.choices[0].message.tool_calls[0].function.arguments


def test_a_response_and_its_stream(client: Any) -> None:
    fields = {"model": MODEL, "input": "Hello", "instructions": "Be brief.", "max_output_tokens": 16}
    whole = client.responses.create(**fields, temperature=0)
    assert whole.store is False
    assert whole.object == "response"
    events = list(client.responses.create(**fields, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert whole.usage.input_tokens_details.cached_tokens >= 0


def test_a_response_with_a_schema_and_with_a_tool(client: Any) -> None:
    answer = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        text={"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}},
        max_output_tokens=300,
        store=False,
    )
    assert json.loads(answer.output_text).keys() == {"name", "age"}
    tool = {"type": "function", **WEATHER["function"]}
    called = client.responses.create(
        model=MODEL,
        input="Hello",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=400,
    )
    (item,) = called.output
    assert item.type == "function_call"
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    again = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Hello"}, item.model_dump(exclude_none=True), output],
        tools=[tool],
        tool_choice="none",
        max_output_tokens=4,
    )
    assert again.output[0].type == "message"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
    ],
)
def test_a_response_is_not_stored(client: Any, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hello", **fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


def test_errors_are_the_client_s_own(client: Any, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=ASKED, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1_000_000)
    assert long.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(api_key=KEY + "x", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        other.models.list()
    assert refused.value.code == "invalid_api_key"


async def _asynchronous() -> None:
    async with openai.AsyncOpenAI(max_retries=0) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=ASKED, stream=True, max_tokens=4)
        assert [chunk async for chunk in stream]


def test_the_asynchronous_client() -> None:
    import asyncio

    asyncio.run(_asynchronous())
