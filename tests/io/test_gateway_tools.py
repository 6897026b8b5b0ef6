"""Tools in POST /v1/chat/completions over a scripted swarm: calls whole and streamed, thoughts, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.asgi_client import ask
from tests.asyncio_clock import run
from tests.chat_fixtures import chat_tokenizer
from tests.fakes_gateway import FakeSwarm, gateway_of

PATH = "/v1/chat/completions"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %d}}\n</tool_call>'
TWO = CALL % 1 + "\n" + CALL % 2


def answered(script: str, template: str = "hermes", **fields: Any) -> Any:
    swarm = FakeSwarm(chat_tokenizer(template), script=lambda _: script, max_position=4096)

    async def main() -> Any:
        async with gateway_of(swarm) as (_, app):
            return await ask(app, "POST", PATH, {"messages": [{"role": "user", "content": "Hi"}], **fields})

    return run(main)


def test_calls_are_in_the_message_and_end_it():
    choice = answered("Well.\n" + TWO, tools=[ADD]).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Well."
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [
        {"a": 1},
        {"a": 2},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert answered(TWO, tools=[ADD]).json()["choices"][0]["message"]["content"] is None


def test_a_stream_has_each_name_and_id_once_and_the_same_calls():
    *chunks, done = answered(TWO, tools=[ADD], stream=True).events
    assert done == "[DONE]"
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [part["index"] for part in parts if "id" in part] == [0, 1]
    assert [part["function"]["name"] for part in parts if "name" in part["function"]] == ["add", "add"]
    for index in (0, 1):
        arguments = "".join(part["function"]["arguments"] for part in parts if part["index"] == index)
        assert json.loads(arguments) == {"a": index + 1}
    assert "tool_call>" not in json.dumps(chunks)
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


def test_one_call_where_parallel_ones_are_not_wanted():
    message = answered(TWO, tools=[ADD], parallel_tool_calls=False).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


def test_a_text_with_tools_is_a_text():
    choice = answered("No tool is needed.", tools=[ADD]).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "No tool is needed.", "refusal": None}


def test_calls_are_text_where_none_are_wanted():
    given: tuple[dict[str, Any], ...] = ({}, {"tools": [ADD], "tool_choice": "none"})
    for fields in given:
        choice = answered(TWO, **fields).json()["choices"][0]
        assert choice["message"]["content"] == TWO
        assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_ends_by_its_length():
    choice = answered(CALL % 123456, tools=[ADD], max_tokens=50).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    cut = (CALL % 123456)[:50].partition('ts": ')[2]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == cut


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_is_reasoning_content(stream):
    found = answered("<think>\nhm\n</think>\n\nYes.", "qwen3", stream=stream)
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in found.events[:-1]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    else:
        message = found.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")


def test_a_template_without_tools_is_400_unless_none_is_to_be_called():
    found = answered("text", "chatml", tools=[ADD])
    assert found.status == 400
    assert "this model's chat template has no tools" in found.json()["error"]["message"]
    assert found.json()["error"]["param"] == "tools"
    assert answered("text", "chatml", tools=[ADD], tool_choice="none").status == 200


def test_a_form_and_a_forced_call_reach_the_generation_as_processors():
    def processors(**fields: Any) -> int:
        swarm = FakeSwarm(chat_tokenizer("hermes"), script=lambda _: "{}", max_position=4096)

        async def main() -> None:
            async with gateway_of(swarm) as (_, app):
                body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
                assert (await ask(app, "POST", PATH, body)).status == 200

        run(main)
        assert len({id((call.options.logits_processor or (None,))[0]) for call in swarm.calls}) == (
            len(swarm.calls) if swarm.calls[0].options.logits_processor else 1
        )
        return len(swarm.calls[0].options.logits_processor or ())

    assert processors() == 0
    assert processors(response_format={"type": "json_object"}, n=2) == 1
    assert processors(tools=[ADD], tool_choice="required") == 1
    assert processors(tools=[ADD]) == 0
