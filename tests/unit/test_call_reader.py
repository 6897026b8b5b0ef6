"""The JSON of calls: however it is cut into pieces the same calls, and no call that is none."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.formats.call_reader import CallReader
from client.gateway.formats.deltas import CallArguments, CallBegun, Content, Message
from client.gateway.formats.families import HERMES, LLAMA3, MISTRAL, Family

NAMES = ("look_up", "add")


def read(text, *, family: Family = HERMES, pieces: int = 1, is_whole: bool = True, names=NAMES):
    numbers = itertools.count()
    reader = CallReader(family, names, 0, lambda: f"id{next(numbers)}")
    deltas = []
    for at in range(0, len(text), pieces):
        deltas += reader.feed(text[at : at + pieces])
    return deltas + reader.finish(is_whole=is_whole)


def message_of(deltas) -> Message:
    message = Message()
    for delta in deltas:
        message.add(delta)
    return message


def calls_of(deltas):
    return [(call.name, json.loads(call.arguments)) for call in message_of(deltas).calls]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(), values, max_size=4),
    name_first=st.booleans(),
    indent=st.none() | st.integers(0, 2),
    more=st.dictionaries(st.sampled_from(["id", "type", "note"]), values, max_size=2),
    pieces=st.integers(1, 7),
    ascii_only=st.booleans(),
)
def test_a_call_is_read_whatever_its_arguments_order_blanks_and_pieces(
    arguments, name_first, indent, more, pieces, ascii_only
):
    pairs = [("name", "look_up"), ("arguments", arguments), *more.items()]
    text = json.dumps(dict(pairs if name_first else pairs[::-1]), indent=indent, ensure_ascii=ascii_only)
    assert calls_of(read(text, pieces=pieces)) == [("look_up", arguments)]


@given(
    calls=st.lists(st.dictionaries(st.text(), values, max_size=2), min_size=1, max_size=4),
    pieces=st.integers(1, 9),
)
def test_a_list_of_calls_is_read_call_by_call(calls, pieces):
    text = json.dumps([{"name": "add", "arguments": each} for each in calls])
    deltas = read(text, family=MISTRAL, pieces=pieces)
    assert calls_of(deltas) == [("add", each) for each in calls]
    begun = [delta for delta in deltas if isinstance(delta, CallBegun)]
    assert [each.index for each in begun] == list(range(len(calls)))
    assert len({each.id for each in begun}) == len(calls)


def test_the_name_comes_before_the_arguments_and_the_arguments_as_they_are_written():
    text = '{"name": "look_up", "arguments": {"city":  "Bern", "n": [1, {"a": "}"}]}}'
    deltas = read(text)
    assert deltas[0] == CallBegun(0, "id0", "look_up")
    assert all(isinstance(delta, CallArguments) for delta in deltas[1:])
    assert len(deltas) > 20  # they come as the text comes
    assert message_of(deltas).calls[0].arguments == '{"city":  "Bern", "n": [1, {"a": "}"}]}'


def test_arguments_before_the_name_wait_for_it():
    deltas = read('{"arguments": {"a": 1}, "name": "add"}')
    assert deltas == [CallBegun(0, "id0", "add"), CallArguments(0, '{"a": 1}')]


def test_arguments_within_a_string_are_its_content():
    assert calls_of(read(r'{"name": "add", "arguments": "{\"a\": 1}"}')) == [("add", {"a": 1})]


@pytest.mark.parametrize("text", ['{"name": "add"}', '{"name": "add", "arguments": null}'])
def test_a_call_without_arguments_has_an_empty_object(text):
    assert calls_of(read(text)) == [("add", {})]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "unknown", "arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"arguments": {}}',
        "{}",
        "look_up(1)",
        '["add"]',
        "{'name': 'add'}",
        '{"name" "add"}',
        '{"arguments": , "name": "add"}',
        '{"na',
        "",
    ],
)
@pytest.mark.parametrize("pieces", [1, 5, 100])
def test_text_that_is_no_call_comes_out_unchanged(text, pieces):
    whole = message_of(read(text, pieces=pieces))
    assert not whole.calls
    assert whole.content == HERMES.trigger + text + HERMES.closes


def test_a_cut_call_keeps_what_it_has():
    deltas = read('{"name": "add", "arguments": {"a": 1', is_whole=False)
    assert message_of(deltas).calls[0].arguments == '{"a": 1'
    assert not message_of(deltas).content
    deltas = read('{"name": "ad', is_whole=False)
    assert message_of(deltas).content == HERMES.trigger + '{"name": "ad'


def test_what_follows_a_finished_call_is_dropped():
    assert calls_of(read('{"name": "add", "arguments": {"a": 1}} and more')) == [("add", {"a": 1})]


def test_the_key_of_the_arguments_is_the_family_s():
    text = '{"type": "function", "name": "add", "parameters": {"a": 1}}'
    assert calls_of(read(text, family=LLAMA3)) == [("add", {"a": 1})]


@given(text=st.text(alphabet='{}[]",:\\ nameargutsd1', max_size=60), pieces=st.integers(1, 8))
def test_no_text_breaks_the_reader_and_pieces_do_not_matter(text, pieces):
    whole, cut = message_of(read(text, pieces=1000)), message_of(read(text, pieces=pieces))
    assert (whole.content, [(c.name, c.arguments) for c in whole.calls]) == (
        cut.content,
        [(c.name, c.arguments) for c in cut.calls],
    )
    assert whole.calls or whole.content == HERMES.trigger + text + HERMES.closes
    assert Content("") not in read(text, pieces=pieces)
