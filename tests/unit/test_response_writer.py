"""A response as it grows: OpenAI's events in their order, and the same response with and without a stream."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from client.gateway.formats.deltas import CallArguments, CallBegun, Content, Reasoning
from client.gateway.openai.responses.writer import ResponseWriter

USAGE = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}


def writer() -> ResponseWriter:
    numbers = itertools.count()
    return ResponseWriter("resp_1", 5, {"model": "m", "store": False}, lambda kind: f"{kind}_{next(numbers)}")


def events_of(*tokens, is_whole=True):
    own = writer()
    events = own.begin()
    for deltas in tokens:
        events += own.token(deltas)
    return events + own.end(is_whole=is_whole, usage=USAGE)


def kinds(events):
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_has_openai_s_events_in_their_order():
    events = events_of([Content("Hel")], [], [Content("lo")])
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"] == {
        "id": "message_0",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    assert events[4] == {
        "type": "response.output_text.delta",
        "sequence_number": 4,
        "item_id": "message_0",
        "output_index": 0,
        "content_index": 0,
        "delta": "Hel",
        "logprobs": [],
    }
    response = events[-1]["response"]
    assert response["usage"] == USAGE
    assert response["output"][0]["content"] == [
        {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    ]
    assert response["output"][0]["status"] == response["status"] == "completed"


def test_a_call_has_its_name_at_once_and_its_arguments_in_pieces():
    events = events_of(
        [CallBegun(0, "call_1", "add")], [CallArguments(0, '{"a"')], [CallArguments(0, ": 1}")]
    )
    assert kinds(events)[2:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    added = events[2]["item"]
    assert (added["call_id"], added["name"], added["arguments"]) == ("call_1", "add", "")
    assert events[5]["arguments"] == '{"a": 1}'
    assert events[-1]["response"]["output"] == [
        {
            "id": "function_call_0",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_1",
            "name": "add",
            "arguments": '{"a": 1}',
        }
    ]


def test_a_thought_a_text_and_calls_are_items_one_after_the_other():
    events = events_of(
        [Reasoning("hm")],
        [Content("so"), CallBegun(0, "c0", "a"), CallArguments(0, "{}"), CallBegun(1, "c1", "b")],
        [CallArguments(1, "{}")],
    )
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert output[0]["summary"] == []


def test_an_answer_without_any_text_is_an_empty_message():
    output = events_of([], [])[-1]["response"]["output"]
    assert [item["content"][0]["text"] for item in output] == [""]


def test_an_answer_that_ends_by_its_length_is_incomplete_and_says_why():
    last = events_of([Content("a")], is_whole=False)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["status"] == "incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_logprobs_come_with_the_text_of_their_tokens():
    own = writer()
    own.begin()
    assert own.token([], {"token": "a"}) == []
    event = own.token([Content("ab")], {"token": "b"})[-1]
    assert event["logprobs"] == [{"token": "a"}, {"token": "b"}]
    done = own.end(is_whole=True, usage=USAGE)
    assert done[0]["logprobs"] == [{"token": "a"}, {"token": "b"}]
    assert done[-1]["response"]["output"][0]["content"][0]["logprobs"] == [{"token": "a"}, {"token": "b"}]


def test_an_error_ends_the_items_and_the_response():
    own = writer()
    own.begin()
    own.token([Content("a")])
    events = own.fail("the swarm is gone", "no_chain", None)
    assert kinds(events)[-2:] == ["error", "failed"]
    assert events[-2]["message"] == "the swarm is gone"
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"] == {"code": "no_chain", "message": "the swarm is gone"}
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a"


pieces = st.one_of(
    st.builds(Content, st.text(min_size=1, max_size=3)),
    st.builds(Reasoning, st.text(min_size=1, max_size=3)),
    st.just("call"),
    st.just("arguments"),
)


@given(st.lists(st.lists(pieces, max_size=3), max_size=8), st.booleans())
def test_whatever_comes_numbers_go_up_and_what_is_added_is_done_and_adds_up(tokens, is_whole):
    calls = itertools.count()
    latest, made = -1, []
    for token in tokens:
        own: list[Any] = []
        for piece in token:
            if piece == "call":
                latest = next(calls)
                own.append(CallBegun(latest, f"c{latest}", "f"))
            elif piece == "arguments":
                if own and isinstance(own[-1], CallBegun):
                    own.append(CallArguments(latest, "{}"))
            else:
                own.append(piece)
        made.append(own)
    events = events_of(*made, is_whole=is_whole)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    open_items, texts = set(), {}
    for event in events:
        index = event.get("output_index")
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert not open_items
                open_items.add(index)
            case "output_item.done":
                open_items.remove(index)
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                assert index in open_items
                texts[index] = texts.get(index, "") + event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == texts.get(index, "")
            case "function_call_arguments.done":
                assert event["arguments"] == texts.get(index, "")
    assert not open_items
    again = writer()
    for own in made:
        again.token(own)
    assert again.response(is_whole=is_whole, usage=USAGE) == events[-1]["response"]
