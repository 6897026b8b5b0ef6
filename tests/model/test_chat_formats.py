"""A request's messages, tools and form, prepared with chat templates in the manner of several families."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from client.gateway.formats.chat import ChatFormats
from client.gateway.formats.errors import FormatError
from client.gateway.formats.requests import ResponseFormat, ToolChoice, Tools
from client.gateway.formats.templates import ChatTemplate
from tests.chat_fixtures import CHATML, END, TEMPLATES, chat_tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED = [{"role": "user", "content": "Hello"}]


@cache
def formats(template, special=()):
    tokenizer = chat_tokenizer(template, special=special)
    return ChatFormats(tokenizer, vocabulary=len(tokenizer), end_ids=[tokenizer.eos_token_id])


def prepare(template="hermes", messages=ASKED, *, special=(), **fields):
    types: dict[str, Any] = {"tools": Tools, "tool_choice": ToolChoice, "response_format": ResponseFormat}
    given = {
        name: TypeAdapter(types[name]).validate_python(value) if name in types else value
        for name, value in fields.items()
        if value is not None
    }
    return formats(template, special).prepare(messages, **given)


def prompt(template="hermes", messages=ASKED, **fields):
    return chat_tokenizer(template).decode(prepare(template, messages, **fields).prompt_ids)


def test_a_plain_chat_has_the_template_s_prompt_and_no_form():
    prepared = prepare("chatml")
    assert prompt("chatml") == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert prepared.arguments() == {}
    assert prepared.reading.is_plain


def test_a_developer_is_the_system_and_null_is_no_text():
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": None}]
    assert prompt("chatml", messages).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "<|im_start|>assistant\n<|im_end|>" in prompt("chatml", messages)


@pytest.mark.parametrize(
    "choice", [None, "auto", "required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_template_without_tools_refuses_them(choice):
    with pytest.raises(FormatError, match="this model's chat template has no tools") as caught:
        prepare("chatml", tools=[WEATHER], tool_choice=choice)
    assert caught.value.param == "tools"


def test_a_template_without_tools_takes_tools_that_are_not_to_be_called():
    assert prompt("chatml", tools=[WEATHER], tool_choice="none") == prompt("chatml")


def test_tools_stand_in_the_prompt_unless_none_is_to_be_called():
    assert '"name": "weather"' in prompt(tools=[WEATHER, CLOCK])
    assert '"clock"' in prompt(tools=[WEATHER, CLOCK])
    assert "weather" not in prompt(tools=[WEATHER], tool_choice="none")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert "strict" not in prompt(tools=[strict])


@pytest.mark.parametrize(
    ("choice", "parallel", "functions", "many", "is_held"),
    [
        (None, None, ["weather", "clock"], True, False),
        ("auto", None, ["weather", "clock"], True, False),
        ("auto", False, ["weather", "clock"], False, False),
        ("required", None, ["weather", "clock"], True, True),
        ("required", False, ["weather", "clock"], False, True),
        ({"type": "function", "function": {"name": "clock"}}, None, ["clock"], False, True),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "clock"}}],
                },
            },
            None,
            ["clock"],
            True,
            True,
        ),
        ("none", None, [], True, False),
    ],
)
def test_the_choice_of_tools(choice, parallel, functions, many, is_held):
    prepared = prepare(tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=parallel)
    assert [function.name for function in prepared.reading.functions] == functions
    assert (prepared.constraint is not None) == is_held
    assert prepared.reading.many == many or not functions


def test_a_strict_tool_is_held_to_its_schema_where_the_model_may_choose():
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert prepare(tools=[strict]).constraint is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters.type",
        ),
        ({"template_arguments": {"tokenize": True}}, "chat_template_kwargs"),
        ({"template_arguments": {"return_tensors": "pt"}}, "chat_template_kwargs"),
    ],
)
def test_fields_that_contradict_are_refused_by_their_path(fields, param):
    with pytest.raises(FormatError) as caught:
        prepare(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ResponseFormat, {"type": "xml"}),
        (ResponseFormat, {"type": "json_schema"}),
        (ResponseFormat, {"type": "json_schema", "json_schema": {"schema": {}}}),
        (ResponseFormat, {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        (ResponseFormat, {"type": "json_schema", "json_schema": {"name": "a", "schema": "text"}}),
        (ResponseFormat, {"type": "json_object", "more": 1}),
        (ResponseFormat, "json_object"),
        (Tools, [{"type": "custom", "custom": {"name": "a"}}]),
        (Tools, [{"type": "function", "function": {"name": "two words"}}]),
        (Tools, [{"type": "function", "function": {"name": "a" * 65}}]),
        (Tools, [{"type": "function", "function": {"name": "a", "parameters": []}}]),
        (Tools, [{"type": "function"}]),
        (Tools, [CLOCK] * 129),
        (ToolChoice, "any"),
        (ToolChoice, {"type": "function"}),
        (ToolChoice, {"type": "function", "function": {"name": 5}}),
        (ToolChoice, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
    ],
)
def test_fields_of_another_form_are_refused(kind, value):
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


HISTORY = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


@pytest.mark.parametrize("tools", [[WEATHER], None])
def test_earlier_calls_and_results_stand_in_the_prompt_as_the_family_writes_them(tools):
    fields = {"tools": tools} if tools else {}
    text = prompt(messages=HISTORY, **fields)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text


def test_a_template_without_tools_shows_earlier_calls_as_text():
    text = prompt("chatml", messages=HISTORY)
    assert '{"name": "weather", "arguments": {"city": "Bern"}}' in text
    assert "sunny" in text


@pytest.mark.parametrize("arguments", ["not json", "[1]", "5", '"text"'])
def test_arguments_in_the_history_that_are_no_object_are_refused_by_their_path(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(FormatError) as caught:
        prepare(messages=[*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert caught.value.param == "messages.1.tool_calls.0.function.arguments"


def test_what_a_template_refuses_is_said_in_its_words():
    call = {"id": "long-id-of-openai", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    with pytest.raises(FormatError, match="length 9") as caught:
        prepare("mistral", messages=[*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert "\n" not in caught.value.message


def test_a_template_that_breaks_is_one_line_without_a_path():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages[0].nothing.at.all }}"
    broken = ChatFormats(tokenizer, vocabulary=len(tokenizer), end_ids=[2])
    with pytest.raises(FormatError) as caught:
        broken.prepare(ASKED)
    assert "\n" not in caught.value.message
    assert "/" not in caught.value.message
    assert "Traceback" not in caught.value.message


def test_a_model_without_a_template_says_what_else_there_is():
    with pytest.raises(FormatError, match="/v1/completions"):
        prepare(None)


def test_a_template_of_its_own_for_tools_is_taken_where_there_are_tools():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TEMPLATES["hermes"]}
    both = ChatFormats(tokenizer, vocabulary=len(tokenizer), end_ids=[2])
    tools = TypeAdapter(Tools).validate_python([WEATHER])
    assert "<tools>" in tokenizer.decode(both.prepare(ASKED, tools=tools).prompt_ids)
    assert "<tools>" not in tokenizer.decode(both.prepare(ASKED).prompt_ids)


def test_a_family_that_nobody_knows_refuses_tools_and_names_the_known():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ tools }}" + CHATML
    unknown = ChatFormats(tokenizer, vocabulary=len(tokenizer), end_ids=[2])
    tools = TypeAdapter(Tools).validate_python([WEATHER])
    with pytest.raises(FormatError, match="hermes"):
        unknown.prepare(ASKED, tools=tools)
    assert unknown.prepare(ASKED, tools=tools, tool_choice="none").reading.is_plain


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("hermes", "hermes"),
        ("qwen3", "hermes"),
        ("xml", "qwen-xml"),
        ("mistral", "mistral"),
        ("llama3", "llama3"),
    ],
)
def test_families_are_known_by_their_templates(template, family):
    assert prepare(template, tools=[WEATHER]).reading.family.name == family


@pytest.mark.parametrize(
    ("template", "arguments", "thinking"),
    [
        ("hermes", {}, "none"),
        ("qwen3", {}, "optional"),
        ("qwen3", {"enable_thinking": True}, "optional"),
        ("qwen3", {"enable_thinking": False}, "none"),
        ("thinking", {}, "open"),
    ],
)
def test_whether_an_answer_begins_with_a_thought(template, arguments, thinking):
    assert prepare(template, template_arguments=arguments).reading.thinking == thinking


def test_delimiters_that_are_special_tokens_are_shown_to_the_reader_and_others_are_hidden():
    tags = ("<tool_call>", "</tool_call>")
    prepared = prepare(tools=[WEATHER], special=tags)
    assert prepared.arguments()["skip_special_tokens"] is False
    assert END in prepared.reading.hidden
    assert not set(tags) & set(prepared.reading.hidden)
    assert "skip_special_tokens" not in prepare(tools=[WEATHER]).arguments()
    assert prepare(special=tags).arguments() == {}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}},
        {"type": "json_schema", "json_schema": {"name": "a"}},
    ],
)
def test_a_form_is_a_logits_processor_new_for_each_choice(response_format):
    prepared = prepare(response_format=response_format)
    first, second = prepared.arguments()["logits_processor"], prepared.arguments()["logits_processor"]
    assert first[0] is not second[0]
    assert prepare(response_format={"type": "text"}).arguments() == {}
    form = TypeAdapter(ResponseFormat).validate_python(response_format)
    assert formats("hermes").prepare_text([5, 6], form).arguments()["logits_processor"]
    assert formats("hermes").prepare_text([5, 6]).arguments() == {}


def test_a_bad_schema_is_refused_by_its_path():
    with pytest.raises(FormatError) as caught:
        prepare(
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}
        )
    assert caught.value.param == "response_format.json_schema.schema"


def test_the_tokens_of_messages_alone():
    messages = [{"role": "user", "content": "Hi"}]
    tools = TypeAdapter(Tools).validate_python([WEATHER])
    assert formats("hermes").prompt_ids(messages) == prepare(messages=messages).prompt_ids
    assert (
        formats("hermes").prompt_ids(messages, tools)
        == prepare(messages=messages, tools=[WEATHER]).prompt_ids
    )


def test_a_template_knows_tools_by_its_text():
    assert ChatTemplate(chat_tokenizer("hermes")).knows_tools()
    assert not ChatTemplate(chat_tokenizer("chatml")).knows_tools()
