"""Digests and records on the wire: whole again at the other end, and nothing else gets in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.view.exchange import (
    DIGEST_ENTRIES,
    RECORDS_BYTES,
    Digest,
    Records,
    decode,
    encode_digest,
    encode_records,
)
from routing.view.records import Record
from routing.view.view import Arrival
from tensor_codec.errors import MessageError
from tensor_codec.header import pack_header


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


@given(st.dictionaries(st.integers(0, 2**256 - 1), st.integers(0, 2**63), max_size=20), st.booleans())
def test_a_digest_is_read_back_as_it_was(seqs, ask):
    seqs = {key(number): seq for number, seq in seqs.items()}
    (frame,) = encode_digest(seqs, ask=ask)
    assert decode(frame) == Digest(seqs, last=True, ask=ask)


def test_a_long_digest_comes_in_frames_of_which_one_is_the_last():
    seqs = {key(number): number for number in range(2 * DIGEST_ENTRIES + 1)}
    parts = [decode(frame) for frame in encode_digest(seqs, ask=True)]
    assert [part.last for part in parts] == [False, False, True]
    assert {p: s for part in parts for p, s in part.seqs.items()} == seqs


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1024), st.floats(0, 3600)), max_size=60))
def test_records_come_out_in_order_with_an_age_that_is_never_less(items):
    arrivals = [Arrival(Record(), wire, age) for wire, age in items]
    frames = list(encode_records(arrivals))
    got = [item for frame in frames for item in decode(frame).items]
    assert [wire for wire, _ in got] == [wire for wire, _ in items]
    for (_, read), (_, sent) in zip(got, items, strict=True):
        assert sent <= read <= sent + 0.001
    assert all(len(frame) <= RECORDS_BYTES + 64 for frame in frames)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_message_error(data):
    try:
        decode(data)
    except MessageError:
        return


@given(st.sampled_from(["digest", "records"]), st.binary(max_size=200))
def test_any_body_gives_a_message_or_a_message_error(kind, body):
    try:
        message = decode(pack_header({"type": kind, "last": True, "ask": False}) + body)
    except MessageError:
        return
    if isinstance(message, Records):
        assert sum(len(wire) + 6 for wire, _ in message.items) == len(body)
    else:
        assert len(message.seqs) * 40 == len(body)


ENTRY = bytes(32) + (5).to_bytes(8, "big")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        pack_header({}),
        pack_header({"type": "gossip"}) + ENTRY,
        pack_header({"type": "digest"}) + ENTRY,
        pack_header({"type": "digest", "last": 1, "ask": False}) + ENTRY,
        pack_header({"type": "digest", "last": True, "ask": False}) + ENTRY[:-1],
        pack_header({"type": "digest", "last": True, "ask": False}) + ENTRY + ENTRY,
        pack_header({"type": "digest", "last": True, "ask": False}) + bytes(32) + b"\xff" * 8,
        pack_header({"type": "digest", "last": True, "ask": False}) + bytes(40 * (DIGEST_ENTRIES + 1)),
        pack_header({"type": "records"}),
        pack_header({"type": "records"}) + b"\x00\x00\x00\x00\x00\x00",
        pack_header({"type": "records"}) + b"\x00\x05\x00\x00\x00\x00abcd",
        pack_header({"type": "records"}) + b"\x00\x01\x00\x00\x00\x00a\x00",
        pack_header({"type": "records"}) + bytes(RECORDS_BYTES + 1),
    ],
)
def test_a_malformed_message_is_refused(frame):
    with pytest.raises(MessageError):
        decode(frame)


def test_no_records_make_no_frame():
    assert list(encode_records([])) == []
