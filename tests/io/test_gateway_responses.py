"""POST /v1/responses over a scripted swarm: items, events in their order, errors, fields that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tensor_codec.errors import PeerGone
from tests.asgi_client import ask
from tests.asyncio_clock import run
from tests.chat_fixtures import chat_tokenizer
from tests.fakes_gateway import FakeSwarm, gateway_of

PATH = "/v1/responses"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer("hermes")


def answered(swarm: FakeSwarm, **fields: Any) -> Any:
    async def main() -> Any:
        async with gateway_of(swarm) as (_, app):
            return await ask(app, "POST", PATH, {"input": "Hello", **fields})

    return run(main)


def events_of(found: Any) -> list[tuple[str, dict[str, Any]]]:
    """The events with their names, which are the types of their data."""
    blocks = [block.split("\n") for block in found.body.decode().split("\n\n") if block]
    named = [
        (block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks
    ]
    assert all(name == data["type"] for name, data in named)
    assert [data["sequence_number"] for _, data in named] == list(range(len(named)))
    return named


def test_a_response_has_openai_s_shape(tokenizer):
    swarm = FakeSwarm(tokenizer)
    found = answered(
        swarm,
        instructions="Be brief.",
        metadata={"a": "b"},
        user="somebody",
        temperature=0.5,
        max_output_tokens=20,
    )
    body = found.json()
    assert found.status == 200
    assert body["id"].startswith("resp_")
    assert isinstance(body.pop("created_at"), int)
    (item,) = body.pop("output")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}],
    }
    prompt = len(swarm.calls[0].prompt)
    assert body.pop("usage") == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 12,
    }
    del body["id"]
    assert body == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "tiny",
        "instructions": "Be brief.",
        "max_output_tokens": 20,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "background": False,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": "somebody",
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
    }
    said = tokenizer.decode(swarm.calls[0].prompt)
    assert said == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_has_typed_events_in_order_and_no_done(tokenizer):
    found = answered(FakeSwarm(tokenizer), stream=True)
    assert found.headers["content-type"].startswith("text/event-stream")
    events = events_of(found)
    names = [name.removeprefix("response.") for name, _ in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(data.get("delta", "") for _, data in events) == "hello world"
    assert "[DONE]" not in found.body.decode()
    last = events[-1][1]["response"]
    assert last["usage"]["output_tokens"] == 12
    assert last["output"][0]["content"][0]["text"] == "hello world"


def test_an_answer_that_is_cut_is_incomplete(tokenizer):
    body = answered(FakeSwarm(tokenizer), max_output_tokens=3).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["content"][0]["text"] == "hel"
    assert (
        events_of(answered(FakeSwarm(tokenizer), max_output_tokens=3, stream=True))[-1][0]
        == "response.incomplete"
    )


def test_a_call_is_an_item_with_and_without_a_stream(tokenizer):
    swarm = FakeSwarm(tokenizer, script=lambda _: CALL, max_position=2048)
    (item,) = answered(swarm, tools=[ADD]).json()["output"]
    assert item["id"].startswith("fc_")
    assert item["call_id"].startswith("call_")
    assert (item["type"], item["name"], json.loads(item["arguments"])) == (
        "function_call",
        "add",
        {"a": 1, "b": 2},
    )
    assert '"add"' in tokenizer.decode(swarm.calls[0].prompt)
    events = events_of(answered(swarm, tools=[ADD], stream=True))
    deltas = [data["delta"] for name, data in events if name == "response.function_call_arguments.delta"]
    assert "".join(deltas) == item["arguments"]
    assert len(deltas) > 3


def test_items_of_an_earlier_response_go_into_the_prompt(tokenizer):
    swarm = FakeSwarm(tokenizer, max_position=2048)
    given = [
        {"role": "user", "content": "add"},
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "add",
            "arguments": '{"a": 1}',
            "id": "fc_1",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "three"},
    ]
    assert answered(swarm, input=given, tools=[ADD]).status == 200
    said = tokenizer.decode(swarm.calls[0].prompt)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in said
    assert "<tool_response>\nthree\n</tool_response>" in said


def test_log_probabilities_come_where_they_are_included(tokenizer):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = answered(FakeSwarm(tokenizer), **fields).json()["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in part["logprobs"]) == "hello world"
    assert part["logprobs"][0].keys() == {"token", "logprob", "bytes", "top_logprobs"}
    assert len(part["logprobs"][0]["top_logprobs"]) == 2


def test_an_error_before_the_first_token_is_a_status_and_one_after_it_is_events(tokenizer):
    def gone(at: int) -> Any:
        def step(number: int) -> None:
            if number == at:
                raise PeerGone("the server went away")

        return step

    early = answered(FakeSwarm(tokenizer, step=gone(0)), stream=True)
    assert early.status == 502
    late = answered(FakeSwarm(tokenizer, step=gone(5)), stream=True)
    assert late.status == 200
    events = events_of(late)
    assert [name for name, _ in events[-2:]] == ["error", "response.failed"]
    assert events[-2][1]["code"] == "peer_fault"
    failed = events[-1][1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "peer_fault")
    assert failed["output"][0]["content"][0]["text"] == "hello"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"max_tool_calls": 3}, "max_tool_calls", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", None),
        ({"input": []}, "input", None),
        ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role", None),
        ({"input": [{"type": "computer_call"}]}, "input.0", None),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}]}, None, None),
        ({"tools": [{"type": "web_search"}]}, None, None),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice.name", None),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}},
            "text.format.schema",
            None,
        ),
        ({"max_output_tokens": 10_000}, "input", "context_length_exceeded"),
        ({"temperature": 2.5}, "temperature", None),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_what_is_not_done_is_refused_by_its_field(tokenizer, fields, param, code):
    found = answered(FakeSwarm(tokenizer), **fields)
    error = found.json()["error"]
    assert found.status == (404 if code == "model_not_found" else 400)
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    assert not found.body.startswith(b"<")


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "background": False, "truncation": "disabled", "previous_response_id": None},
        {"user": "u", "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k"},
        {"reasoning": {"effort": None}, "include": [], "parallel_tool_calls": True, "tool_choice": "auto"},
        {"text": {"format": {"type": "text"}, "verbosity": "low"}},
        {"tools": [ADD], "tool_choice": "none"},
        {"top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["x"], "logit_bias": {"5": 1}},
    ],
)
def test_what_has_no_effect_or_means_what_is_done_is_taken(tokenizer, fields):
    body = answered(FakeSwarm(tokenizer), **fields).json()
    assert body["status"] == "completed"
    assert body["store"] is False


def test_a_trace_tells_the_hops(tokenizer):
    events = events_of(answered(FakeSwarm(tokenizer), stream=True, raceme={"trace": True}))
    assert any("raceme" in data for _, data in events)
    assert not any("raceme" in data for _, data in events_of(answered(FakeSwarm(tokenizer), stream=True)))
