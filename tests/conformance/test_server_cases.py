"""What the tests of llama.cpp's server and of vLLM's ask of a server, in our own words.

llama.cpp: tools/server/tests (security, chat completion, completion).  vLLM: tests/entrypoints/openai, whose
names were a checklist (bias validation, body that is no object, null tool choice, empty list of prompts).
"""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import KEY, MODEL, PERSON, WEATHER, Served

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKED = [{"role": "user", "content": "Hello"}]


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(CHAT, json={"model": MODEL, "messages": ASKED, "max_tokens": 8, "seed": 1, **fields})


def text(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(TEXT, json={"model": MODEL, "prompt": "Once", "max_tokens": 8, "seed": 1, **fields})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream, which must end with [DONE]."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def is_error(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text
    found: dict[str, Any] = body["error"]
    return found


# Security


@pytest.mark.parametrize("path", ["/health", "/"])
def test_some_paths_need_no_key(served: Served, path: str) -> None:
    assert httpx.get(served.url + path).status_code in (200, 404)


@pytest.mark.parametrize(
    "key", [None, "", "wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer", f"Bearer  {KEY} x"]
)
@pytest.mark.parametrize(
    "path", ["/v1/models", f"/v1/models/{MODEL}", "/api/swarm", "/api/events", "/api/sessions"]
)
def test_other_paths_need_a_key(served: Served, path: str, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    error = is_error(httpx.get(served.url + path, headers=headers), 401)
    assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, "/tokenize", "/detokenize"])
def test_no_body_is_read_without_a_key(served: Served, path: str) -> None:
    assert is_error(httpx.post(served.url + path, content=b"{"), 401)["code"] == "invalid_api_key"


def test_an_unknown_path_is_openai_s_error(http: httpx.Client) -> None:
    is_error(http.get("/v1/embeddings"), 404)
    is_error(http.post("/v1/embeddings", json={}), 404)


def test_a_page_of_an_allowed_origin_may_ask_and_another_may_not(served: Served) -> None:
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = httpx.options(served.url + CHAT, headers={"origin": "https://allowed.example", **asked})
    assert allowed.status_code in (200, 204)
    assert allowed.headers["access-control-allow-origin"] == "https://allowed.example"
    refused = httpx.options(served.url + CHAT, headers={"origin": "https://other.example", **asked})
    assert "access-control-allow-origin" not in refused.headers


def test_a_name_that_leads_here_by_rebinding_is_refused(served: Served, http: httpx.Client) -> None:
    is_error(http.get("/v1/models", headers={"host": "evil.example"}), 403)


# Bodies and fields


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"5", b"null", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_a_body_that_is_no_object_is_an_error(http: httpx.Client, path: str, body: bytes) -> None:
    is_error(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            None,
        ),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, None),
        ({"logit_bias": {"1000000": 1}}, "logit_bias.1000000"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "sound"}}, None),
        ({"response_format": {"type": 123}}, None),
        ({"response_format": {"type": "json_schema"}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 123}}}, None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": 123}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [{"type": "function"}]}, None),
        ({"tools": [WEATHER], "tool_choice": "weather"}, None),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"audio": {}}, "audio"),
        ({"functions": []}, "functions"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    error = is_error(chat(http, **fields))
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": {"a": 1}}, None),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 10**7}, "prompt"),
    ],
)
def test_a_field_of_a_completion_that_is_wrong_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    error = is_error(text(http, **fields))
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, None),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}},
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "xml"}}}, None),
        ({"tools": [{"type": "web_search"}]}, None),
        ({"tools": [{"type": "function", "name": "a b"}]}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_field_of_a_response_that_is_wrong_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    error = is_error(http.post(RESPONSES, json={"model": MODEL, "input": "Hello", **fields}))
    assert param is None or error["param"] == param


def test_fields_without_an_effect_are_taken(http: httpx.Client) -> None:
    taken = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "verbosity": "low", "tool_choice": None, "tools": None,
    }  # fmt: skip
    assert chat(http, **taken).status_code == 200
    assert chat(http, tool_choice="none").status_code == 200
    given = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "background": False,
        "truncation": "disabled",
    }
    answer = http.post(RESPONSES, json={"input": "Hello", "max_output_tokens": 4, **given})
    assert answer.status_code == 200
    assert answer.json()["metadata"] == {"a": "b"}


def test_an_empty_model_is_the_only_one_and_another_is_unknown(http: httpx.Client) -> None:
    assert chat(http, model="").json()["model"] == MODEL
    assert is_error(chat(http, model="gpt-4o"), 404)["code"] == "model_not_found"


# What comes out


def test_a_stream_and_a_whole_answer_are_equal(http: httpx.Client) -> None:
    whole = chat(http, max_tokens=40).json()["choices"][0]["message"]["content"]
    chunks = events(chat(http, max_tokens=40, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    whole = text(http, max_tokens=40).json()["choices"][0]["text"]
    chunks = events(text(http, max_tokens=40, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


def test_a_stream_has_one_head_in_all_chunks_a_role_and_an_end(http: httpx.Client) -> None:
    chunks = events(chat(http, stream=True, stream_options={"include_usage": True}))
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] <= 8
    assert all("usage" not in chunk for chunk in events(chat(http, stream=True)))


@pytest.mark.parametrize("ask", [chat, text])
def test_a_seed_decides(http: httpx.Client, ask: Any) -> None:
    def said(seed: int | None) -> str:
        choice = ask(http, seed=seed, max_tokens=24, temperature=1.0).json()["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    assert said(7) == said(7)
    assert len({said(seed) for seed in range(5)}) > 1
    assert len({said(None) for _ in range(5)}) > 1


def test_several_answers_differ_and_are_the_same_again(http: httpx.Client) -> None:
    first, again = (chat(http, n=3, max_tokens=20).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) > 1
    chunks = events(chat(http, n=3, max_tokens=20, stream=True))
    for index, whole in enumerate(texts):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in parts) == whole


def test_logprobs_are_of_the_tokens_that_came(http: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 12}
    choice = chat(http, **fields).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        likely = [each["logprob"] for each in entry["top_logprobs"]]
        assert likely == sorted(likely, reverse=True)
        assert sum(math.exp(each) for each in likely) <= 1.001
    streamed = [
        entry
        for chunk in events(chat(http, **fields, stream=True))
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [(entry["token"], round(entry["logprob"], 4)) for entry in streamed] == [
        (entry["token"], round(entry["logprob"], 4)) for entry in entries
    ]
    assert chat(http).json()["choices"][0]["logprobs"] is None


def test_logprobs_of_a_greedy_answer_are_the_likeliest(http: httpx.Client) -> None:
    entries = chat(http, logprobs=True, top_logprobs=1, temperature=0).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)


def test_logprobs_of_a_response(http: httpx.Client) -> None:
    fields = {
        "input": "Hello",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "temperature": 0,
    }
    answer = http.post(RESPONSES, json={**fields, "max_output_tokens": 6}).json()
    part = answer["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])


def test_a_bias_of_100_makes_a_token_certain_and_one_of_minus_100_impossible(http: httpx.Client) -> None:
    (token,) = http.post("/tokenize", json={"prompt": "x", "add_special_tokens": False}).json()["tokens"]
    for ask in (chat, text):
        choice = ask(http, logit_bias={str(token): 100}).json()["choices"][0]
        assert (choice["message"]["content"] if "message" in choice else choice["text"]) == "x" * 8
    likeliest = chat(http, temperature=0, max_tokens=1).json()["choices"][0]["message"]["content"]
    ids = http.post("/tokenize", json={"prompt": likeliest, "add_special_tokens": False}).json()["tokens"]
    if ids:
        other = chat(http, temperature=0, max_tokens=1, logit_bias={str(ids[0]): -100}).json()
        assert other["choices"][0]["message"]["content"] != likeliest


def test_a_stop_string_ends_a_text_before_it(http: httpx.Client) -> None:
    whole = text(http, max_tokens=40).json()["choices"][0]["text"]
    stop = whole[5:8]
    cut = text(http, max_tokens=40, stop=[stop]).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_a_length_ends_a_text(http: httpx.Client) -> None:
    answer = text(http, max_tokens=3, logit_bias={"2": -100}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_prompts_in_all_kinds(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Once"}).json()["tokens"]
    one = text(http, prompt="Once", temperature=0).json()["choices"][0]["text"]
    assert text(http, prompt=ids, temperature=0).json()["choices"][0]["text"] == one
    several = text(http, prompt=["Once", "Twice"], temperature=0).json()["choices"]
    assert [choice["index"] for choice in several] == [0, 1]
    assert several[0]["text"] == one
    assert text(http, prompt=[ids, ids], temperature=0).json()["choices"][1]["text"] == one
    assert text(http, prompt="Once", temperature=0, echo=True).json()["choices"][0]["text"] == "Once" + one
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "Once"


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        ({"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}, {"name", "age"}),
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "a",
                    "schema": {
                        "properties": {"b": {"const": 42}},
                        "required": ["b"],
                        "additionalProperties": False,
                        "type": "object",
                    },
                },
            },
            {"b"},
        ),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_schema_holds_at_any_temperature(
    http: httpx.Client, form: dict[str, Any], keys: set[str], temperature: float
) -> None:
    choice = chat(http, response_format=form, temperature=temperature, max_tokens=400).json()["choices"][0]
    assert json.loads(choice["message"]["content"]).keys() == keys
    assert choice["finish_reason"] == "stop"


def test_a_schema_holds_for_each_of_several_answers_and_for_a_completion(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for choice in chat(http, response_format=form, max_tokens=300, n=2).json()["choices"]:
        assert json.loads(choice["message"]["content"]).keys() == {"name", "age"}
    choice = text(http, response_format=form, max_tokens=300).json()["choices"][0]
    assert json.loads(choice["text"]).keys() == {"name", "age"}


def test_an_object_begins_as_one_and_is_cut_by_its_length(http: httpx.Client) -> None:
    choice = chat(http, response_format={"type": "json_object"}, max_tokens=3).json()["choices"][0]
    assert choice["message"]["content"].startswith("{")


def test_strings_of_a_schema_may_be_any_text_with_unicode_in_keys(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"größe": {"type": "boolean"}},
        "required": ["größe"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = chat(http, response_format=form, max_tokens=60)
    # A vocabulary of ASCII writes the key with escapes, or cannot.
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert json.loads(answer.json()["choices"][0]["message"]["content"]).keys() == {"größe"}


def test_calls_of_several_tools_and_of_one(http: httpx.Client) -> None:
    clock = {
        "type": "function",
        "function": {
            "name": "clock",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    }
    fields = {"tools": [WEATHER, clock], "max_tokens": 600}
    names = set()
    for seed in range(6):
        choice = chat(http, **fields, tool_choice="required", parallel_tool_calls=False, seed=seed).json()[
            "choices"
        ][0]
        (call,) = choice["message"]["tool_calls"]
        names.add(call["function"]["name"])
        json.loads(call["function"]["arguments"])
    assert names <= {"weather", "clock"}
    named = {"type": "function", "function": {"name": "clock"}}
    (call,) = chat(http, **fields, tool_choice=named).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "clock"
    assert json.loads(call["function"]["arguments"]) == {}  # perhaps with a space
    plain = chat(http, **fields | {"max_tokens": 8}, tool_choice="none").json()["choices"][0]["message"]
    assert "tool_calls" not in plain


def test_variables_of_the_chat_template_may_be_set_and_arguments_of_the_library_may_not(
    http: httpx.Client,
) -> None:
    assert chat(http, chat_template_kwargs={"enable_thinking": False}).status_code == 200
    assert is_error(chat(http, chat_template_kwargs={"tokenize": True}))["param"] == "chat_template_kwargs"


def test_a_response_in_events(http: httpx.Client) -> None:
    fields = {"input": "Hello", "max_output_tokens": 8, "temperature": 0}
    whole = http.post(RESPONSES, json=fields).json()
    streamed = http.post(RESPONSES, json={**fields, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    blocks = [
        block.split("\n") for block in streamed.text.split("\n\n") if block and not block.startswith(":")
    ]
    names = [block[0].removeprefix("event: ") for block in blocks]
    datas = [json.loads(block[1].removeprefix("data: ")) for block in blocks]
    assert names == [data["type"] for data in datas]
    assert names[:4] == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert names[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    last = datas[-1]["response"]
    assert [item["content"][0]["text"] for item in last["output"]] == [
        item["content"][0]["text"] for item in whole["output"]
    ]
    assert whole["usage"].keys() == {
        "input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens",
    }  # fmt: skip
