"""Every field of a request: what is taken, what is refused, and the path of what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from client.gateway.door.body import json_object
from client.gateway.openai.errors import RequestError
from client.gateway.openai.fields import parse
from client.gateway.openai.requests import (
    HARMLESS_IN_CHAT,
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    ChatRequest,
    CompletionRequest,
)
from client.gateway.openai.sampling import new_tokens, sampling_arguments, servers_of

PEER = "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
LOOKUP = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatRequest:
    return parse(
        ChatRequest,
        {"messages": HELLO, **fields},
        unsupported=UNSUPPORTED_IN_CHAT,
        harmless=HARMLESS_IN_CHAT,
    )


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"prompt": "hello", **fields}, unsupported=UNSUPPORTED_IN_COMPLETIONS)


def refused(function: Any, *args: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        function(*args, **fields)
    assert error.value.status == 400
    assert error.value.type == "invalid_request_error"
    assert error.value.message
    return error.value


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0},
        {"temperature": 2.0, "top_p": 1, "n": 4, "seed": -1},
        {"n": 2.0, "max_tokens": 5.0},  # whole numbers of JSON
        {"top_p": 0, "top_k": -1, "min_p": 0.5, "repetition_penalty": 1.3},
        {"stop": "a"},
        {"stop": []},
        {"stop": ["a", "b", "c", "d" * 256]},
        {"logit_bias": {"5": -100, "6": 100.0}},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "verbosity": "low"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "modalities": ["text"]},
        {"audio": None, "functions": None, "temperature": None, "unheard_of": None},
        {"raceme": {"max_hops": 2, "block_peers": [PEER], "trace": True}},
        {"tools": [LOOKUP], "tool_choice": "auto", "parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_openai_takes_is_taken(fields):
    assert chat(**fields).messages[0].text == "hello"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e999}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ["x" * 257]}, "stop.0"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"more": True}}, "stream_options.more"),
        ({"user": 5}, "user"),
        ({"metadata": "x"}, "metadata"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"raceme": {"max_hops": 0}}, "raceme.max_hops"),
        ({"raceme": {"speed": 1}}, "raceme.speed"),
        ({"model": 5}, "model"),
        ({"tools": "look_up"}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [LOOKUP] * 129}, "tools"),
        ({"tool_choice": "never"}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice"),
        ({"tool_choice": {"function": {"name": "look_up"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "user", "content": "x", "mood": "good"}]}, "messages.1.mood"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(fields, param):
    error = refused(chat, **fields)
    assert error.param is not None
    assert error.param == param or error.param.startswith(f"{param}.")


@pytest.mark.parametrize("name", [*UNSUPPORTED_IN_CHAT])
def test_what_openai_has_and_the_gateway_does_not_do_is_refused(name):
    error = refused(chat, **{name: {"any": "value"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", ["temprature", "max_new_tokens", "__proto__", "ignore_eos", "prompt"])
def test_a_field_that_nobody_knows_is_refused(name):
    error = refused(chat, **{name: 1})
    assert (error.param, error.code) == (name, "unknown_parameter")


def test_a_missing_field_is_named():
    error = refused(parse, ChatRequest, {})
    assert (error.param, error.code) == ("messages", "missing_required_parameter")
    assert refused(parse, CompletionRequest, {}).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
    ],
)
def test_the_kinds_of_prompts(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], ["a", 1], {"a": 1}, 5, None, ["a"] * 9, [[1]] * 9, [-1], [True], [1.5]]
)
def test_other_prompts_are_refused(prompt):
    error = refused(completion, prompt=prompt)
    assert error.param.startswith("prompt")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"logprobs": 6}, "logprobs", None),
        ({"logprobs": True}, "logprobs", None),
        ({"echo": "yes"}, "echo", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown_parameter"),
    ],
)
def test_the_fields_of_completions(fields, param, code):
    error = refused(completion, **fields)
    assert (error.param, error.code) == (param, code)


def test_an_earlier_answer_comes_back_as_it_was_given():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": [call],
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "5"}]}
    fields = chat(messages=[*HELLO, answer, result])
    assert [message.for_template() for message in fields.messages[1:]] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "call_1"},
    ]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "a\nb"


def arguments(fields: Any, **more: Any) -> dict[str, Any]:
    return dict(sampling_arguments(fields, default_temperature=1.0, vocabulary=96, **more))


def test_openai_s_defaults_hold_and_not_the_model_s_file():
    assert arguments(chat()) == {"generation_config": False, "temperature": 1.0, "top_k": 0}


def test_fields_become_arguments():
    given = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1.0, "seed": 7, "stop": "x"}
    found = arguments(
        chat(**given, frequency_penalty=-1, top_k=5, logit_bias={"5": 3}, repetition_penalty=1.1)
    )
    assert found == {
        **given, "generation_config": False, "frequency_penalty": -1, "top_k": 5, "logit_bias": {5: 3},
        "repetition_penalty": 1.1,
    }  # fmt: skip


def test_each_answer_has_a_seed_of_its_own():
    seeds = [arguments(chat(seed=7, n=3), choice=choice)["seed"] for choice in range(3)]
    assert seeds == [7, 8, 9]


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused():
    for key in ("96", "-1", "a", "", "1.0", "٣"):
        error = refused(arguments, chat(logit_bias={key: 1}))
        assert error.param == f"logit_bias.{key}"


def test_the_length_of_an_answer():
    assert new_tokens(10, 5, 100, "messages") == 5
    assert new_tokens(10, None, 100, "messages") == 90
    assert new_tokens(10, None, 10_000, "messages") == 1024
    for prompt, asked in ((10, 91), (100, None), (101, 1)):
        error = refused(new_tokens, prompt, asked, 100, "messages")
        assert error.code == "context_length_exceeded"
        assert "maximum context length is 100 tokens" in error.message
        assert str(prompt + (asked or 1)) in error.message


def test_max_completion_tokens_goes_before_max_tokens():
    assert chat(max_tokens=5, max_completion_tokens=7).new_tokens == 7
    assert chat(max_tokens=5).new_tokens == 5


def test_servers_of_a_request():
    assert servers_of(chat().raceme) is None
    assert servers_of(chat(raceme={"trace": True}).raceme) is None
    servers = servers_of(chat(raceme={"max_hops": 2, "block_peers": [PEER]}).raceme)
    assert (servers.most_hops, servers.blocked) == (2, {PEER})
    error = refused(servers_of, chat(raceme={"block_peers": ["nobody"]}).raceme)
    assert error.param == "raceme.block_peers"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[]", "a list"),
        (b'"x"', "a string"),
        (b"5", "a number"),
        (b"null", "null"),
        (b"true", "true or false"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the body has a number of more than 4300 digits"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"[" * 128 + b"]" * 128 + b"}", "nested too deeply: 128 levels are allowed"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deeply"),
        (b'{"a": "\\ud800"}', "surrogate"),
    ],
)
def test_what_is_no_object_of_json_is_refused(body, says):
    assert says in refused(json_object, body).message


def test_as_many_levels_as_are_allowed_are_read_and_brackets_in_a_text_are_none():
    deep = b'{"a":' + b"[" * 127 + b"]" * 127 + b"}"
    assert json_object(deep) == json.loads(deep)
    assert json_object(b'{"a": [' + b"[]," * 1000 + b"[]]}") == {"a": [[]] * 1001}
    assert json_object(json.dumps({"a": "[{" * 1000}).encode()) == {"a": "[{" * 1000}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stop": [None]}, "stop.0 is null: "),
        ({"n": True}, "n is true: "),
        ({"stop": 7}, "stop is 7: "),
        ({"seed": "\u00e9"}, 'seed is "\u00e9": '),
        ({"logit_bias": [None, False]}, "logit_bias is [null, false]: Input should be an object"),
        ({"messages": [[]]}, "messages.0 is []: Input should be an object"),
        ({"response_format": "json"}, 'response_format is "json": Input should be an object'),
    ],
)
def test_a_wrong_value_is_shown_as_it_stands_in_json(fields, says):
    assert refused(chat, **fields).message.startswith(says)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "a"}], "messages.0.role"),
        ([{"role": "tool", "content": "a"}], "messages.0.tool_call_id"),
    ],
)
def test_a_field_that_is_missing_has_its_code_whoever_misses_it(messages, param):
    error = refused(chat, messages=messages)
    assert (error.param, error.code) == (param, "missing_required_parameter")
