"""POST /v1/chat/completions over a scripted swarm: shapes, streams, usage, ends, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from client.gateway.settings import GatewaySettings
from client.gateway.telemetry.spans import NoSpan, NoSpans
from routing.blocks import Blocks
from routing.chains.hops import NoChain
from tensor_codec.errors import CacheFull, PeerGone
from tests.asgi_client import ask, exchange
from tests.asyncio_clock import run
from tests.fakes_gateway import REVISION, FakeSwarm, gateway_of, hole, record, tiny_tokenizer, view_of

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "say hello"}]
FINGERPRINT = f"raceme-{REVISION[:8]}-float32"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def answered(swarm: FakeSwarm, body: Any, settings: GatewaySettings | None = None, **more: Any) -> Any:
    async def main() -> Any:
        async with gateway_of(swarm, settings) as (_, app):
            return await ask(app, "POST", CHAT, body, **more)

    return run(main)


def error_of(found: Any) -> tuple[int, str, str | None]:
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert ".py" not in error["message"]
    return found.status, error["type"], error["code"]


def test_a_whole_answer_has_openai_s_shape(tokenizer):
    swarm = FakeSwarm(tokenizer)
    found = answered(swarm, chat(), headers={"x-request-id": "abc"})
    assert found.status == 200
    assert found.headers["content-type"] == "application/json"
    assert found.headers["x-request-id"] == "abc"
    body = found.json()
    assert isinstance(body.pop("created"), int)
    prompt = len(swarm.calls[0].prompt)
    assert body == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 12,
            "total_tokens": prompt + 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert tokenizer.decode(swarm.calls[0].prompt) == "user: say hello assistant: "


def test_a_stream_begins_with_the_role_and_ends_with_done(tokenizer):
    found = answered(FakeSwarm(tokenizer), chat(stream=True, stream_options={"include_usage": True}))
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.headers["cache-control"] == "no-cache"
    assert found.headers["x-accel-buffering"] == "no"
    *chunks, done = found.events
    assert done == "[DONE]"
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "hello world"
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({str(chunk[name]) for chunk in chunks}) == 1
    assert first["object"] == "chat.completion.chunk"


def test_without_include_usage_no_chunk_speaks_of_usage(tokenizer):
    found = answered(FakeSwarm(tokenizer), chat(stream=True))
    assert not any("usage" in chunk for chunk in found.events[:-1])
    assert len(found.events[-2]["choices"]) == 1


@pytest.mark.parametrize(
    ("fields", "text", "reason", "tokens"),
    [
        ({"max_tokens": 5}, "hello", "length", 5),
        ({"max_completion_tokens": 3, "max_tokens": 9}, "hel", "length", 3),
        ({"stop": " wor"}, "hello", "stop", 9),
        ({"stop": ["zz", "ll"]}, "he", "stop", 4),
        ({"stop": "d"}, "hello worl", "stop", 11),
        ({}, "hello world", "stop", 12),
    ],
)
def test_ends_of_an_answer_are_equal_with_and_without_a_stream(tokenizer, fields, text, reason, tokens):
    whole = answered(FakeSwarm(tokenizer), chat(**fields)).json()
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["choices"][0]["finish_reason"] == reason
    assert whole["usage"]["completion_tokens"] == tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = answered(FakeSwarm(tokenizer), chat(**fields, **options)).events[:-1]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert chunks[-2]["choices"][0]["finish_reason"] == reason
    assert chunks[-1]["usage"] == whole["usage"]


def test_several_answers_have_their_own_index_seed_and_conversation(tokenizer):
    swarm = FakeSwarm(tokenizer)
    body = answered(swarm, chat(n=3, seed=5, max_tokens=4)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["hell"] * 3
    assert sorted(call.options.seed for call in swarm.calls) == [5, 6, 7]
    assert len({id(call.conversation) for call in swarm.calls}) == 3
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["prompt_tokens"] == len(swarm.calls[0].prompt)


def test_a_stream_of_several_answers_is_told_apart_by_index(tokenizer):
    chunks = answered(FakeSwarm(tokenizer), chat(n=2, stream=True)).events[:-1]
    for index in range(2):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "hello world"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]


def test_log_probabilities_of_a_chat(tokenizer):
    fields = chat(logprobs=True, top_logprobs=3, max_tokens=2)
    choice = answered(FakeSwarm(tokenizer), fields).json()["choices"][0]
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("h", [104], -0.25)
    assert second["token"] == "e"
    assert [each["logprob"] for each in first["top_logprobs"]] == [-0.25, -1.5, -9999.0]
    assert choice["logprobs"]["refusal"] is None
    chunks = answered(FakeSwarm(tokenizer), chat(logprobs=True, max_tokens=2, stream=True)).events[:-1]
    entries = [
        entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in entries] == ["h", "e"]
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_the_end_token_has_no_log_probability_and_held_back_text_has(tokenizer):
    swarm = FakeSwarm(tokenizer, script=lambda _: "ab")
    found = answered(swarm, chat(logprobs=True, stop="abc", stream=True)).events[:-1]
    choices = [chunk["choices"][0] for chunk in found]
    with_logprobs = [choice for choice in choices if choice["logprobs"]]
    assert [choice["delta"] for choice in with_logprobs] == [{"content": ""}, {"content": ""}]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "ab"


def test_a_token_without_text_sends_nothing(tokenizer):
    swarm = FakeSwarm(tokenizer, script=lambda _: "ab")
    found = answered(swarm, chat(stop="abc", stream=True)).events[:-1]
    assert len(found) == 3  # the role, "ab" with the end token, the end


def test_fields_reach_the_generation(tokenizer):
    swarm = FakeSwarm(tokenizer)
    fields = {"temperature": 0.3, "top_p": 0.8, "seed": 9, "presence_penalty": 0.5, "logit_bias": {"5": -100}}
    assert answered(swarm, chat(**fields)).status == 200
    options = swarm.calls[0].options
    assert (options.temperature, options.top_p, options.seed, options.presence_penalty) == (0.3, 0.8, 9, 0.5)
    assert dict(options.logit_bias) == {5: -100}
    assert options.generation_config is False


def test_the_default_temperature_is_the_operator_s(tokenizer):
    swarm = FakeSwarm(tokenizer)
    answered(swarm, chat(), GatewaySettings(default_temperature=0.0))
    answered(swarm, chat(temperature=1.5), GatewaySettings(default_temperature=0.0))
    assert [call.options.temperature for call in swarm.calls] == [0.0, 1.5]


def test_a_request_may_name_servers_and_their_number(tokenizer):
    swarm = FakeSwarm(tokenizer)
    peer = "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"
    answered(swarm, chat(raceme={"max_hops": 2, "block_peers": [peer]}))
    constraints = swarm.conversations[0].constraints
    assert (constraints.most_hops, set(constraints.blocked)) == (2, {peer})


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"nonsense", None, None),
        (b"[]", None, None),
        (chat(temperature=3), None, "temperature"),
        (chat(audio={}), "unsupported_parameter", "audio"),
        (chat(what=1), "unknown_parameter", "what"),
        (chat(max_tokens=10_000), "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded", "messages"),
        (chat(logit_bias={"96": 1}), None, "logit_bias.96"),
    ],
)
def test_a_wrong_request_is_400_and_reaches_no_server(tokenizer, body, code, param):
    swarm = FakeSwarm(tokenizer)
    found = answered(swarm, body)
    assert error_of(found) == (400, "invalid_request_error", code)
    assert found.json()["error"]["param"] == param
    assert not swarm.conversations


@pytest.mark.parametrize("name", [None, "", "tiny"])
def test_the_model_may_be_left_out(tokenizer, name):
    assert answered(FakeSwarm(tokenizer), chat(model=name)).json()["model"] == "tiny"


def test_an_unknown_model_is_404(tokenizer):
    found = answered(FakeSwarm(tokenizer), chat(model="gpt-4"))
    assert error_of(found) == (404, "invalid_request_error", "model_not_found")


def failing(error: Exception, at: int = 0) -> Any:
    def step(number: int) -> None:
        if number == at:
            raise error

    return step


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "after"),
    [
        (NoChain([Blocks(3, 4)], 6, alone=False), 503, "no_chain", "5"),
        (CacheFull("no room", 3.2), 503, "overloaded", "4"),
        (CacheFull("no room"), 503, "overloaded", "5"),
        (PeerGone("a hop has gone"), 502, "peer_fault", None),
        (ValueError("the options forbid every token"), 400, None, None),
        (RuntimeError("secret /etc/path.py"), 500, "internal_error", None),
    ],
)
def test_an_error_before_the_first_token_is_a_status(tokenizer, stream, error, status, code, after):
    found = answered(FakeSwarm(tokenizer, step=failing(error)), chat(stream=stream))
    assert error_of(found)[::2] == (status, code)
    assert found.headers.get("retry-after") == after
    assert "secret" not in found.body.decode()
    if code == "no_chain":
        assert "3:4" in found.json()["error"]["message"]
    if code == "internal_error":
        assert found.headers["x-request-id"] in found.json()["error"]["message"]


def test_an_error_after_the_first_token_is_an_event_and_the_end(tokenizer):
    found = answered(FakeSwarm(tokenizer, step=failing(PeerGone("gone"), 3)), chat(stream=True))
    assert found.status == 200
    *chunks, error, done = found.events
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "hel"
    assert error["error"]["code"] == "peer_fault"
    assert done == "[DONE]"


def test_the_status_waits_for_the_first_token_and_at_most_two_seconds(tokenizer):
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        swarm = FakeSwarm(tokenizer, step=lambda _: asyncio.sleep(1.9))
        async with gateway_of(swarm) as (_, app), exchange(app, "POST", CHAT, chat(stream=True)) as found:
            began = clock()
            await found.wait_for("assistant")
            assert clock() - began == pytest.approx(1.9)
        swarm = FakeSwarm(tokenizer, step=lambda _: asyncio.sleep(60))
        async with gateway_of(swarm) as (_, app), exchange(app, "POST", CHAT, chat(stream=True)) as found:
            began = clock()
            await found.wait_for("assistant")
            assert clock() - began == pytest.approx(2.0)
            assert found.status == 200

    run(main)


def test_silence_in_a_stream_is_filled_with_comments(tokenizer):
    swarm = FakeSwarm(tokenizer, step=lambda number: asyncio.sleep(35) if number == 2 else None)
    found = answered(swarm, chat(stream=True))
    assert found.body.count(b": keep-alive\n\n") == 3
    assert found.events[-1] == "[DONE]"


def test_a_swarm_with_a_hole_is_waited_for_and_then_503(tokenizer):
    found = answered(FakeSwarm(tokenizer, seen=hole()), chat(stream=True))
    assert error_of(found)[::2] == (503, "no_chain")
    assert "4:6" in found.json()["error"]["message"]


def test_a_hole_that_is_filled_meanwhile_is_no_error(tokenizer):
    async def main() -> Any:
        swarm = FakeSwarm(tokenizer, seen=hole())
        async with gateway_of(swarm) as (_, app), exchange(app, "POST", CHAT, chat()) as found:
            await asyncio.sleep(4)
            assert found.status is None
            swarm.change(view_of(record()))
            await found.end()
            return found

    assert run(main).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_the_generation(tokenizer, stream):
    async def main() -> None:
        swarm = FakeSwarm(tokenizer, step=lambda _: asyncio.sleep(0.5))
        async with gateway_of(swarm) as (gateway, app):
            async with exchange(app, "POST", CHAT, chat(stream=stream)) as found:
                await asyncio.sleep(2.2)
                assert bool(found.body) == stream
                began = asyncio.get_running_loop().time()
                found.leave()
            assert asyncio.get_running_loop().time() - began < 0.5
            assert swarm.calls[0].ended
            assert swarm.calls[0].tokens < 6
            assert swarm.conversations[0].closed == 1
            assert not gateway.active
            assert gateway.admission.state.computing == 0

    run(main)


def test_a_slow_reader_holds_the_generation_back(tokenizer):
    async def main() -> None:
        swarm = FakeSwarm(tokenizer, script=lambda _: "a" * 400)
        async with gateway_of(swarm) as (_, app), exchange(app, "POST", CHAT, chat(stream=True)) as found:
            found.takes.clear()
            await asyncio.sleep(100)
            assert swarm.calls[0].tokens < 30
            found.takes.set()
            await found.wait_for("[DONE]")

    run(main)


def test_a_trace_is_told_where_it_is_asked_for(tokenizer):
    chunks = answered(FakeSwarm(tokenizer), chat(stream=True, raceme={"trace": True})).events[:-1]
    assert [chunk for chunk in chunks if "raceme" in chunk]
    plain = answered(FakeSwarm(tokenizer), chat(stream=True)).events[:-1]
    assert not [chunk for chunk in plain if "raceme" in chunk]


class RecordedSpans(NoSpans):
    """Whether the requests that have had a span were traced."""

    def __init__(self) -> None:
        self.traced: list[bool] = []

    def request(self, request: Any) -> Any:
        self.traced.append(request.traced)
        return NoSpan()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HELLO, "n": 2}),
        ("/v1/completions", {"prompt": "say hello"}),
        ("/v1/responses", {"input": "say hello"}),
    ],
)
def test_a_trace_is_in_the_span_too_where_it_is_asked_for(tokenizer, path, fields):
    async def main() -> RecordedSpans:
        spans = RecordedSpans()
        async with gateway_of(FakeSwarm(tokenizer), spans=spans) as (_, app):
            for more in ({}, {"raceme": {"trace": True}}):
                assert (await ask(app, "POST", path, {**fields, **more})).status == 200
        return spans

    spans = run(main)
    assert spans.traced == [False, True]


def test_text_beyond_ascii_is_sent_as_it_is(tokenizer):
    found = answered(FakeSwarm(tokenizer), {"messages": [{"role": "user", "content": "grüße \U0001f600"}]})
    assert found.status == 200
    assert json.loads(found.body)
