"""From a text to thoughts, content and calls: whatever the pieces, nothing lost, nothing twice."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.formats.deltas import CallArguments, CallBegun, Message, chat_delta
from client.gateway.formats.families import HERMES, LLAMA3, MISTRAL, QWEN_XML
from client.gateway.formats.reader import MessageReader, Reading, id_maker
from client.gateway.formats.requests import Function

WEATHER = Function(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
    },
)
ADD = Function(name="add")
TOOLS = (WEATHER, ADD)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 3}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=exact>\ntrue\n</parameter>\n</function>\n</tool_call>"
)


def deltas_of(text, reading, *, pieces=1):
    numbers = itertools.count()
    reader = MessageReader(reading, lambda: f"id{next(numbers)}")
    deltas = []
    for at in range(0, len(text), pieces):
        deltas += reader.feed(text[at : at + pieces])
    deltas += reader.finish()
    return deltas, reader


def read(text, reading, *, pieces=1) -> Message:
    message = Message()
    for delta in deltas_of(text, reading, pieces=pieces)[0]:
        message.add(delta)
    return message


def calls_of(message):
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


WITH_TOOLS = Reading(family=HERMES, functions=TOOLS)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello, world.", "Hello, world.", []),
        (CALL, "", [("weather", {"city": "Bern", "days": 3})]),
        ("Let me look.\n\n" + CALL, "Let me look.", [("weather", {"city": "Bern", "days": 3})]),
        (CALL + "\n" + CALL + "\n", "", [("weather", {"city": "Bern", "days": 3})] * 2),
        (CALL + "\nThat is all.", "That is all.", [("weather", {"city": "Bern", "days": 3})]),
        ("a < b and <tool is no <tool_ca", "a < b and <tool is no <tool_ca", []),
        ('<tool_call>\n{"name": "fly"}\n</tool_call>', '<tool_call>\n{"name": "fly"}\n</tool_call>', []),
        ("<tool_call>\nweather!\n</tool_call>", "<tool_call>\nweather!\n</tool_call>", []),
        ("<tool_call>\nweather", "<tool_call>\nweather", []),
        ("  indented", "  indented", []),
        ("", "", []),
    ],
)
def test_calls_are_taken_out_of_a_text(text, content, calls, pieces):
    message = read(text, WITH_TOOLS, pieces=pieces)
    assert (message.content, calls_of(message)) == (content, calls)


def test_a_text_that_cannot_be_a_delimiter_comes_at_once():
    reader = MessageReader(WITH_TOOLS)
    assert [delta.text for delta in reader.feed("Hello")] == ["Hello"]
    assert reader.feed(" <to") == []
    assert "".join(delta.text for delta in reader.feed("day>")) == " <today>"


def test_a_call_s_name_and_id_come_once_and_first_and_its_arguments_in_pieces():
    deltas, reader = deltas_of(CALL, WITH_TOOLS)
    assert deltas[0] == CallBegun(0, "id0", "weather")
    assert all(isinstance(delta, CallArguments) and delta.index == 0 for delta in deltas[1:])
    assert len(deltas) > 10
    assert reader.has_called
    chunks = [chat_delta(delta)["tool_calls"][0] for delta in deltas]
    assert chunks[0] == {
        "index": 0,
        "id": "id0",
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert all(chunk.keys() == {"index", "function"} for chunk in chunks[1:])
    assert all(chunk["function"].keys() == {"arguments"} for chunk in chunks[1:])


def test_a_text_without_calls_has_called_nothing():
    assert not deltas_of("<tool_call>nothing</tool_call>", WITH_TOOLS)[1].has_called


def test_of_several_calls_the_first_is_kept_where_one_is_allowed():
    reading = Reading(family=HERMES, functions=TOOLS, many=False)
    assert len(read(CALL + CALL, reading).calls) == 1


@pytest.mark.parametrize("pieces", [1, 4, 1000])
@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        ("open", "\nIt rains.\n</think>\n\nTake a coat.", "It rains.", "Take a coat."),
        ("open", "never ends", "never ends", ""),
        ("optional", "<think>\nIt rains.\n</think>\n\nTake a coat.", "It rains.", "Take a coat."),
        ("optional", "No thought.", "", "No thought."),
        ("optional", "<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("none", "<think>kept</think>", "", "<think>kept</think>"),
    ],
)
def test_a_thought_is_no_content(thinking, text, reasoning, content, pieces):
    message = read(text, Reading(thinking=thinking), pieces=pieces)
    assert (message.reasoning, message.content) == (reasoning, content)


def test_a_call_after_a_thought_is_a_call_and_one_within_it_is_thought():
    reading = Reading(thinking="open", family=HERMES, functions=TOOLS)
    message = read(f"Perhaps {CALL}?\n</think>\n\n{CALL}", reading)
    assert message.reasoning == f"Perhaps {CALL}?"
    assert len(message.calls) == 1
    assert not message.content


@pytest.mark.parametrize("pieces", [1, 5, 1000])
def test_calls_of_tags_get_the_types_of_their_schema(pieces):
    message = read("Well.\n" + XML_CALL, Reading(family=QWEN_XML, functions=TOOLS), pieces=pieces)
    assert message.content == "Well."
    assert calls_of(message) == [("weather", {"city": "Bern", "days": 3, "exact": True})]


@pytest.mark.parametrize(
    "text", ["<tool_call>\n<function=fly>\n</function>\n</tool_call>", "<tool_call>\n<func"]
)
def test_tags_that_are_no_call_are_content(text):
    message = read(text, Reading(family=QWEN_XML, functions=TOOLS))
    assert not message.calls
    assert message.content == text


@pytest.mark.parametrize("pieces", [1, 5, 1000])
def test_mistral_s_list_of_calls(pieces):
    text = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]'
    message = read(text, Reading(family=MISTRAL, functions=TOOLS), pieces=pieces)
    assert calls_of(message) == [("add", {"a": 1}), ("add", {})]
    assert not message.content
    assert len(id_maker(MISTRAL.id_characters)()) == 9


@pytest.mark.parametrize("pieces", [1, 5, 1000])
@pytest.mark.parametrize("mark", ["", "<|python_tag|>"])
def test_llama_s_call_is_the_whole_answer(mark, pieces):
    reading = Reading(family=LLAMA3, functions=TOOLS, many=False)
    message = read(mark + '{"name": "add", "parameters": {"a": 1}}', reading, pieces=pieces)
    assert calls_of(message) == [("add", {"a": 1})]
    assert not message.content


@pytest.mark.parametrize(
    "text", ['{"name": "Ann", "age": 3}', 'So: {"name": "add", "parameters": {}}', '{"a": 1}']
)
@pytest.mark.parametrize("pieces", [1, 5, 1000])
def test_json_that_is_no_call_of_llama_s_stays_content(text, pieces):
    message = read(text, Reading(family=LLAMA3, functions=TOOLS, many=False), pieces=pieces)
    assert message.content == text
    assert not message.calls


def test_special_tokens_that_are_shown_for_the_reader_are_no_content():
    reading = Reading(family=HERMES, functions=TOOLS, hidden=("<|im_start|>", "<|im|>"))
    assert read("a<|im_start|>b", reading, pieces=1000).content == "ab"


def test_an_id_is_openai_s_kind_and_new_each_time():
    make = id_maker(24)
    assert make().startswith("call_")
    assert len({make() for _ in range(100)}) == 100


@given(
    text=st.lists(
        st.sampled_from(
            ["<think>", "</think>", "\n", " ", "a", "<tool_", CALL, "<tool_call>", "</tool_call>", "{"]
        ),
        max_size=8,
    ).map("".join),
    thinking=st.sampled_from(["none", "optional", "open"]),
    pieces=st.integers(1, 12),
)
def test_pieces_do_not_matter_and_visible_text_is_kept(text, thinking, pieces):
    reading = Reading(thinking=thinking, family=HERMES, functions=TOOLS)
    whole, cut = read(text, reading, pieces=1000), read(text, reading, pieces=pieces)
    assert (whole.content, whole.reasoning, calls_of(whole)) == (cut.content, cut.reasoning, calls_of(cut))
    said = whole.content + whole.reasoning
    assert said.count("a") == text.replace(CALL, "").count("a") + (
        text.count(CALL) - len(whole.calls)
    ) * CALL.count("a")
