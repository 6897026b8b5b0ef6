"""POST /v1/completions, /tokenize, /detokenize, /v1/models, /health and /ready over a scripted swarm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from client.gateway.settings import GatewaySettings
from tests.asgi_client import ask
from tests.asyncio_clock import run
from tests.fakes_gateway import (
    END,
    MISSING,
    REVISION,
    FakeSwarm,
    gateway_of,
    hole,
    record,
    tiny_tokenizer,
    view_of,
)

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def answered(
    swarm: FakeSwarm, body: Any, path: str = PATH, settings: GatewaySettings | None = None, **more: Any
) -> Any:
    async def main() -> Any:
        async with gateway_of(swarm, settings, **more) as (_, app):
            return await ask(app, "GET" if body is None else "POST", path, body)

    return run(main)


def ids(text: str) -> list[int]:
    return [ord(character) - 32 + 4 for character in text]


def test_a_whole_text_has_openai_s_shape(tokenizer):
    swarm = FakeSwarm(tokenizer)
    body = answered(swarm, {"prompt": "abc"}).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 12
    assert swarm.calls[0].prompt == ids("abc")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (ids("abc"), ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([ids("abc"), ids("de")], ["abc", "de"]),
    ],
)
def test_prompts_of_every_kind(tokenizer, prompt, prompts):
    swarm = FakeSwarm(tokenizer, script=lambda text: text.upper())
    body = answered(swarm, {"prompt": prompt, "n": 2}).json()
    assert [choice["text"] for choice in body["choices"]] == [p.upper() for p in prompts for _ in range(2)]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(prompts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


@pytest.mark.parametrize("prompt", ["abc", ids("abc")])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(tokenizer, prompt, stream):
    found = answered(
        FakeSwarm(tokenizer), {"prompt": prompt, "echo": True, "stream": stream, "max_tokens": 2}
    )
    if stream:
        assert "".join(chunk["choices"][0]["text"] for chunk in found.events[:-1]) == "abche"
    else:
        assert found.json()["choices"][0]["text"] == "abche"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_computes_nothing(tokenizer, stream):
    swarm = FakeSwarm(tokenizer)
    body = {"prompt": ["abc", "de"], "echo": True, "max_tokens": 0, "stream": stream}
    found = answered(swarm, body)
    assert not swarm.calls
    if stream:
        choices = [chunk["choices"][0] for chunk in found.events[:-1]]
    else:
        choices = found.json()["choices"]
        assert found.json()["usage"]["completion_tokens"] == 0
    assert [choice["text"] for choice in choices] == ["abc", "de"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 2


def test_log_probabilities_of_a_text_are_equal_with_and_without_a_stream(tokenizer):
    fields = {"prompt": "abc", "logprobs": 2, "max_tokens": 3}
    whole = answered(FakeSwarm(tokenizer), fields).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["h", "e", "l"]
    assert whole["token_logprobs"] == [-0.25] * 3
    assert whole["text_offset"] == [0, 1, 2]
    assert all(len(each) == 2 for each in whole["top_logprobs"])
    chunks = answered(FakeSwarm(tokenizer), {**fields, "stream": True}).events[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {name: [each for part in parts for each in part[name]] for name in whole} == whole


def test_a_stream_of_text(tokenizer):
    fields = {"prompt": "abc", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = answered(FakeSwarm(tokenizer), fields).events
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 15


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": ["a", ""]}, "prompt.1", None),
        ({"prompt": [96]}, "prompt", None),
        ({"prompt": [[5], [2**31 - 1]]}, "prompt.1", None),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "best_of": 1}, "best_of", "unsupported_parameter"),
        ({"prompt": "a" * 600}, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 600}, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "model": "other"}, "model", "model_not_found"),
    ],
)
def test_wrong_requests_for_text(tokenizer, body, param, code):
    swarm = FakeSwarm(tokenizer)
    error = answered(swarm, body).json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert not swarm.conversations


def test_tokens_of_a_text_and_back(tokenizer):
    swarm = FakeSwarm(tokenizer)
    found = answered(swarm, {"prompt": "abc"}, "/tokenize").json()
    assert found == {"count": 3, "max_model_len": 512, "tokens": ids("abc")}
    found = answered(swarm, {"prompt": "abc", "return_token_strs": True}, "/tokenize").json()
    assert found["token_strs"] == ["a", "b", "c"]
    assert answered(swarm, {"tokens": ids("abc")}, "/detokenize").json() == {"prompt": "abc"}
    assert answered(swarm, {"tokens": []}, "/detokenize").json() == {"prompt": ""}
    messages = {"messages": [{"role": "user", "content": "x"}]}
    found = answered(swarm, messages, "/tokenize").json()
    assert answered(swarm, {"tokens": found["tokens"]}, "/detokenize").json() == {
        "prompt": "user: x assistant: "
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "more": 1}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [96]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "abc"}),
    ],
)
def test_wrong_requests_for_tokens(tokenizer, path, body):
    found = answered(FakeSwarm(tokenizer), body, path)
    assert found.status == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_the_models_are_the_swarm_s_and_one_for_each_adapter(tokenizer):
    adapters = {"story": "story", "prefix": SimpleNamespace(virtual_tokens=12)}
    found = answered(FakeSwarm(tokenizer), None, "/v1/models", adapters=adapters).json()
    first, story, prefix = found["data"]
    assert found["object"] == "list"
    assert first == {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "raceme",
        "max_model_len": 512,
        "raceme": {"revision": REVISION, "blocks": 6, "complete": True, "holes": []},
    }
    assert (story["id"], story["parent"]) == ("tiny:story", "tiny")
    assert prefix["max_model_len"] == 500
    one = answered(FakeSwarm(tokenizer), None, "/v1/models/tiny:story", adapters=adapters)
    assert one.json() == story
    missing = answered(FakeSwarm(tokenizer), None, "/v1/models/tiny:other", adapters=adapters)
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_s_model_computes_with_it(tokenizer):
    swarm = FakeSwarm(tokenizer)
    body = {"prompt": "abc", "model": "mine:story"}
    settings = GatewaySettings(served_name="mine")
    assert (
        answered(swarm, body, settings=settings, adapters={"story": "story#1"}).json()["model"]
        == "mine:story"
    )
    assert swarm.conversations[0].adapter == "story#1"
    assert answered(swarm, {**body, "model": "tiny"}, settings=settings).status == 404


def test_the_length_is_the_smallest_bound(tokenizer):
    swarm = FakeSwarm(tokenizer, seen=view_of(record(session_tokens=100)))
    assert answered(swarm, None, "/v1/models").json()["data"][0]["max_model_len"] == 100


def test_ready_once_a_token_was_computed_and_while_no_block_is_missing(tokenizer):
    swarm = FakeSwarm(tokenizer)
    assert answered(swarm, None, "/health").json() == {"status": "ok"}
    assert answered(swarm, None, "/ready").json() == {"status": "ready", "missing_blocks": []}
    found = answered(swarm, None, "/ready", ready=False)
    assert (found.status, found.json()["status"]) == (503, "starting")
    found = answered(FakeSwarm(tokenizer, seen=hole()), None, "/ready")
    assert (found.status, found.json()["missing_blocks"]) == (503, MISSING)
    assert found.headers["retry-after"] == "5"
    assert answered(FakeSwarm(tokenizer, seen=hole()), None, "/health").status == 200


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/embeddings", "/v1/models/", "//", "/assets/../keys"]
)
def test_another_path_is_404_in_openai_s_shape(tokenizer, path):
    found = answered(FakeSwarm(tokenizer), None, path)
    assert found.status == 404
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert END == 2


def test_another_method_is_405_in_openai_s_shape(tokenizer):
    async def main() -> Any:
        async with gateway_of(FakeSwarm(tokenizer)) as (_, app):
            return [
                await ask(app, method, path)
                for method, path in (("GET", PATH), ("DELETE", "/v1/models"), ("PUT", "/health"))
            ]

    for found in run(main):
        assert found.status == 405
        assert found.json()["error"]["code"] == "method_not_allowed"
        assert found.headers["allow"]
