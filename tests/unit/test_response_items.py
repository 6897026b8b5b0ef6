"""The items of a response's input as messages of a chat, and its fields as those of a chat."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from client.gateway.formats.errors import FormatError
from client.gateway.openai.responses.fields import (
    Choice,
    FunctionTools,
    TextOptions,
    chat_choice,
    chat_format,
    chat_tools,
    own_error,
    repeated,
)
from client.gateway.openai.responses.items import Item, messages_of

CALL = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "2"}


def messages(*items, instructions=None):
    return messages_of(TypeAdapter(list[Item]).validate_python(list(items)), instructions)


def test_a_string_is_a_user_s_message_after_the_instructions():
    assert messages_of("Hi", "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert messages_of("Hi", None) == [{"role": "user", "content": "Hi"}]


def test_messages_in_both_forms():
    assert messages(
        {"role": "developer", "content": "a"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}],
        },
    ) == [{"role": "developer", "content": "a"}, {"role": "user", "content": "bc"}]


def test_an_output_comes_back_as_it_was_given():
    item = {
        "id": "msg_1",
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert messages(item) == [{"role": "assistant", "content": "Hello"}]


def test_calls_belong_to_one_assistant_s_message_and_outputs_are_tools():
    second = {**CALL, "call_id": "call_2", "id": "fc_2", "status": "completed"}
    found = messages({"role": "user", "content": "?"}, CALL, second, OUTPUT)
    assert [message["role"] for message in found] == ["user", "assistant", "tool"]
    assert [call["id"] for call in found[1]["tool_calls"]] == ["call_1", "call_2"]
    assert found[1]["content"] is None
    assert found[2] == {"role": "tool", "tool_call_id": "call_1", "content": "2"}


def test_a_call_after_text_of_the_assistant_is_in_the_same_message():
    found = messages({"role": "assistant", "content": "Let me see."}, CALL)
    assert len(found) == 1
    assert found[0]["content"] == "Let me see."
    assert len(found[0]["tool_calls"]) == 1


def test_a_thought_belongs_to_what_follows_it():
    thought = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    assert messages(thought, CALL)[0]["reasoning_content"] == "hm"
    assert messages(thought, {"role": "assistant", "content": "x"})[0]["reasoning_content"] == "hm"
    assert "reasoning_content" not in messages(thought, {"role": "user", "content": "x"})[0]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "web_search_call", "id": "ws_1"},
        {"role": "tool", "content": "a"},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]},
        {"role": "user", "content": "a", "more": 1},
        {"type": "function_call", "call_id": "a", "name": "b"},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        "text",
    ],
)
def test_items_of_another_kind_are_refused(item):
    with pytest.raises(ValidationError):
        messages(item)


def test_forms_tools_and_choices_become_those_of_a_chat():
    schema = {"type": "object"}
    text = TextOptions.model_validate(
        {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    )
    form = chat_format(text)
    assert (form.type, form.json_schema.name, form.json_schema.schema_) == ("json_schema", "a", schema)
    assert chat_format(TextOptions.model_validate({"format": {"type": "json_object"}})).type == "json_object"
    assert chat_format(None) is None
    tools = TypeAdapter(FunctionTools).validate_python(
        [{"type": "function", "name": "add", "parameters": schema}]
    )
    assert chat_tools(tools)[0].function.name == "add"
    assert chat_tools(None) is None
    choice = TypeAdapter(Choice).validate_python({"type": "function", "name": "add"})
    assert chat_choice(choice).function.name == "add"
    assert chat_choice("required") == "required"
    some = TypeAdapter(Choice).validate_python(
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}
    )
    assert chat_choice(some).allowed_tools.tools[0].function.name == "add"
    fields = repeated(tools, choice, text)
    assert fields["tools"] == [
        {"type": "function", "name": "add", "description": None, "parameters": schema, "strict": None}
    ]
    assert fields["tool_choice"] == {"type": "function", "name": "add"}
    assert fields["text"]["format"] == {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    assert repeated(None, None, None) == {
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("response_format.json_schema.schema", "text.format.schema"),
        ("tools.3.function.parameters", "tools.3.parameters"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("messages.2.tool_calls.0.function.arguments", "input"),
        ("messages", "input"),
        ("tools", "tools"),
        (None, None),
    ],
)
def test_errors_name_the_fields_of_a_response(theirs, ours):
    assert own_error(FormatError("no", theirs)).param == ours
