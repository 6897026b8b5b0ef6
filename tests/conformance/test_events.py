"""The data of each event of a stream, and whole answers, against OpenAI's own description of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import MODEL, PERSON, WEATHER
from tests.conformance.openai_schema import load

ASKED = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": 400, "seed": 1}
RESPONSE: dict[str, Any] = {"model": MODEL, "input": "Hello", "max_output_tokens": 400, "seed": 1}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return load()


def wrong(description: dict[str, Any], name: str, value: Any) -> list[str]:
    """What a schema of the description finds wrong with a value."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(value))
    kind = value.get("type", value.get("object"))
    if (
        kind == "chat.completion.chunk"
    ):  # OpenAI's own server sends null here, for which its file has no place
        errors = [error for error in errors if error.instance is not None]
    if name == "ResponseStreamEvent" and errors:  # of the one kind that it is meant to be
        schemas = description["components"]["schemas"]
        for option in schemas[name]["anyOf"]:
            own = option["$ref"].rpartition("/")[2]
            if schemas[own]["properties"]["type"].get("enum") == [kind]:
                return wrong(description, own, value)
    return [f"{kind}: {list(error.absolute_path)}: {error.message[:200]}" for error in errors]


def data_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 8},
        {"max_tokens": 8, "n": 2, "logprobs": True, "top_logprobs": 2},
        {"response_format": FORM},
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
    ],
    ids=["text", "logprobs", "form", "call"],
)
def test_chats(http: httpx.Client, description: dict[str, Any], fields: dict[str, Any]) -> None:
    whole = http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert wrong(description, "CreateChatCompletionResponse", whole.json()) == []
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for data in data_of(http.post("/v1/chat/completions", json={**CHAT, **fields, **options})):
        assert wrong(description, "CreateChatCompletionStreamResponse", data) == []


@pytest.mark.parametrize("fields", [{}, {"logprobs": 3}, {"echo": True}], ids=["text", "logprobs", "echo"])
def test_completions(http: httpx.Client, description: dict[str, Any], fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 6, **fields}
    assert (
        wrong(description, "CreateCompletionResponse", http.post("/v1/completions", json=body).json()) == []
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 8, "instructions": "Be brief.", "metadata": {"a": "b"}, "user": "u"},
        {"max_output_tokens": 8, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"text": {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}},
    ],
    ids=["text", "logprobs", "form", "call", "named"],
)
def test_responses(http: httpx.Client, description: dict[str, Any], fields: dict[str, Any]) -> None:
    whole = http.post("/v1/responses", json={**RESPONSE, **fields})
    assert wrong(description, "Response", whole.json()) == []
    events = data_of(http.post("/v1/responses", json={**RESPONSE, **fields, "stream": True}))
    assert len(events) > 5
    for data in events:
        assert wrong(description, "ResponseStreamEvent", data) == []


def test_models(http: httpx.Client, description: dict[str, Any]) -> None:
    assert wrong(description, "ListModelsResponse", http.get("/v1/models").json()) == []
    assert wrong(description, "Model", http.get(f"/v1/models/{MODEL}").json()) == []
