"""Questions whether a peer is reached, and their answers: any bytes are a value in bounds or refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.errors import MessageError
from tensor_codec.header import pack_header
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.reach import (
    MAX_ADDRESS_CHARACTERS,
    MAX_ADDRESSES,
    OUTCOMES,
    REACH_FRAME_BYTES,
    Outcome,
    Reached,
    ReachQuestion,
    Seen,
    decode_reach,
    decode_reached,
    decode_seen,
    encode_reach,
    encode_reached,
    encode_seen,
)

NONCE = bytes(range(8))
outcomes = st.dictionaries(st.integers(0, MAX_ADDRESSES - 1), st.sampled_from(sorted(OUTCOMES)))


@given(st.lists(st.text(min_size=1, max_size=40), max_size=MAX_ADDRESSES), outcomes)
def test_what_is_said_is_read(texts: list[str], came: dict[int, Outcome]) -> None:
    question = ReachQuestion(tuple(texts), NONCE)
    assert decode_reach(b"".join(encode_reach(question))) == question
    seen = Seen("/ip4/192.0.2.1/tcp/1", NONCE)
    assert decode_seen(b"".join(encode_seen(seen))) == seen
    assert decode_reached(b"".join(encode_reached(Reached(came, NONCE)))) == Reached(came, NONCE)


def test_the_largest_question_and_answer_fit_into_a_frame() -> None:
    question = ReachQuestion(("x" * MAX_ADDRESS_CHARACTERS,) * MAX_ADDRESSES, NONCE)
    assert len(b"".join(encode_reach(question))) <= REACH_FRAME_BYTES
    worst = Reached(dict.fromkeys(range(MAX_ADDRESSES), "another peer"), NONCE)
    assert len(b"".join(encode_reached(worst))) <= REACH_FRAME_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"addresses": ["x"] * (MAX_ADDRESSES + 1)},
        {"addresses": ["x" * (MAX_ADDRESS_CHARACTERS + 1)]},
        {"addresses": [""]},
        {"addresses": [1]},
        {"addresses": "x"},
        {"nonce": bytes(7)},
        {"nonce": "12345678"},
    ],
)
def test_a_question_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        decode_reach(pack_header({"k": "reach", "addresses": [], "nonce": NONCE} | fields))


@pytest.mark.parametrize(
    "pairs",
    [
        [[0, "reached"]] * 2,
        [[MAX_ADDRESSES, "reached"]],
        [[-1, "reached"]],
        [[True, "reached"]],
        [[0, "maybe"]],
        [[0]],
        ["reached"],
        [[n, "reached"] for n in range(MAX_ADDRESSES + 1)],
    ],
)
def test_an_outcome_out_of_bounds_is_refused(pairs: list[Any]) -> None:
    with pytest.raises(MessageError):
        decode_reached(pack_header({"k": "reached", "outcomes": pairs, "nonce": NONCE}))


def test_a_refusal_may_come_in_place_of_either_part() -> None:
    frame = pack_header({"k": "failed", "code": "too_many", "message": "later", "retry": 5.0})
    for decode in (decode_seen, decode_reached):
        found = decode(frame)
        assert isinstance(found, Failed)
        assert found.retry_after_seconds == 5.0


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_a_message_error(data: bytes) -> None:
    for decode in (decode_reach, decode_seen, decode_reached):
        with contextlib.suppress(MessageError):
            decode(data)
