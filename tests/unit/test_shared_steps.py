"""Frames of many sessions: each step and each result comes out as it went in, and nothing else does."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.errors import MessageError
from tensor_codec.header import pack_header
from tensor_codec.messages.contract import MAX_EPOCH, MAX_STEP, Contract, Reply
from tensor_codec.messages.fields import read_message
from tensor_codec.messages.session import Result, Step
from tensor_codec.messages.steps import (
    bytes_of,
    check_result,
    check_step,
    comes_with_others,
    encode_results,
    encode_steps,
    read_results,
    read_steps,
    travels_with_others,
)

MOST = 64
ids, u32 = st.binary(min_size=16, max_size=16), st.integers(0, (1 << 32) - 1)
CONTRACT = Contract(bytes(16), 0, 2, batch=2, max_length=8, hidden=3, codec="fp32", max_step_tokens=8)
ROW = bytes(CONTRACT.row_bytes)


@st.composite
def many_steps(draw: st.DrawFn) -> list[Step]:
    hops = draw(st.integers(0, 3))
    timings = st.tuples(*[st.tuples(u32, u32)] * hops)
    replies: st.SearchStrategy[Reply] = st.sampled_from(["all", "last", "none"])
    step = st.builds(
        Step, ids, st.integers(0, MAX_STEP), u32, replies, st.binary(min_size=1, max_size=40), timings,
        st.integers(0, MAX_EPOCH), owner=st.sampled_from([b"", b"12345678"]),
    )  # fmt: skip
    return draw(st.lists(step, min_size=1, max_size=5))


def steps_of(frame: bytes, most: int = MOST) -> list[Step]:
    return read_steps(read_message(frame, frozenset({"steps"})), most)


def results_of(frame: bytes) -> list[tuple[bytes, Result]]:
    return read_results(read_message(frame, frozenset({"results"})), MOST)


@given(many_steps())
def test_steps_come_out_as_they_went_in(steps: list[Step]):
    assert all(map(travels_with_others, steps))
    parts = encode_steps(steps)
    assert steps_of(b"".join(parts)) == steps
    assert sum(map(len, parts[1:])) == sum(map(bytes_of, steps))


@given(many_steps())
def test_results_come_out_as_they_went_in(steps: list[Step]):
    given = [(one.session, Result(one.step, one.position, one.body, one.timings, one.epoch)) for one in steps]
    given[0] = given[0][0], replace(given[0][1], body=b"")  # of a step that wants nothing back
    parts = encode_results(given)
    assert results_of(b"".join(parts)) == given
    assert sum(map(len, parts[1:])) == sum(bytes_of(result) for _, result in given)


@given(many_steps(), st.data())
def test_a_frame_with_other_bytes_is_a_message_error_or_other_steps(steps: list[Step], data: st.DataObject):
    frame = bytearray(b"".join(encode_steps(steps)))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for other in (bytes(frame), bytes(frame[:cut])):
        try:
            found = steps_of(other)
        except MessageError:
            continue
        assert len(found) <= MOST
        assert sum(len(one.body) for one in found) <= len(other)


def test_no_frame_has_more_steps_than_the_limit():
    step = Step(bytes(16), 1, 0, "last", ROW)
    assert len(steps_of(b"".join(encode_steps([step] * MOST)))) == MOST
    with pytest.raises(MessageError, match=r"c is 65, an integer in 1\.\.64"):
        steps_of(b"".join(encode_steps([step] * (MOST + 1))))
    with pytest.raises(MessageError, match=r"c is 0"):
        steps_of(pack_header({"k": "steps", "c": 0, "h": 0}))


def test_records_that_are_announced_and_missing_take_no_memory():
    with pytest.raises(MessageError, match=r"10 body bytes, 64 records of 557 are announced"):
        steps_of(pack_header({"k": "steps", "c": 64, "h": 64}) + bytes(10))


def test_hidden_states_that_no_record_names_are_refused_and_so_are_missing_ones():
    step = Step(bytes(16), 1, 0, "last", ROW)
    frame = b"".join(encode_steps([step, step]))
    with pytest.raises(MessageError, match="1 body bytes after the last one"):
        steps_of(frame + b"x")
    with pytest.raises(MessageError, match="a step of 24 body bytes, 23 are left"):
        steps_of(frame[:-1])
    with pytest.raises(MessageError, match="a step of 0 body bytes"):
        steps_of(b"".join(encode_steps([replace(step, body=b"")])))


def test_a_step_without_a_known_reply_is_refused():
    frame = bytearray(b"".join(encode_steps([Step(bytes(16), 1, 0, "last", ROW)])))
    assert struct.unpack_from("B", frame, len(frame) - len(ROW) - 1) == (1,)
    frame[len(frame) - len(ROW) - 1] = 4
    with pytest.raises(MessageError, match="reply 4"):
        steps_of(bytes(frame))


@pytest.mark.parametrize(
    "other",
    [
        {"bulk": True},
        {"rope_length": 9},
        {"rows": (0,)},
        {"packed": True},
        {"speeds": (7,)},
        {"reply": "replay"},
    ],
)
def test_a_step_that_says_more_travels_alone(other: dict[str, object]):
    assert not travels_with_others(replace(Step(bytes(16), 1, 0, "last", ROW), **other))  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"replay": True}, {"rope_length": 9}, {"speeds": (7,)}])
def test_a_result_that_says_more_comes_alone(other: dict[str, object]):
    assert not comes_with_others(replace(Result(1, 0, ROW), **other))  # type: ignore[arg-type]


def test_a_step_is_checked_against_its_session():
    step = Step(bytes(16), 1, 7, "last", ROW)
    check_step(step, CONTRACT)
    for wrong in (
        replace(step, body=ROW + b"x"),
        replace(step, body=ROW + ROW),  # beyond the end of the cache
        replace(step, position=8),
        replace(step, position=(1 << 32) - 1),
        replace(step, reply="replay"),
    ):
        with pytest.raises(MessageError):
            check_step(wrong, CONTRACT)


def test_a_result_is_checked_against_its_session():
    check_result(Result(1, 7, ROW), CONTRACT)
    check_result(Result(1, 8, b""), CONTRACT)
    for wrong in (Result(1, 7, ROW + b"x"), Result(1, 8, ROW), Result(1, 9, b"")):
        with pytest.raises(MessageError):
            check_result(wrong, CONTRACT)
