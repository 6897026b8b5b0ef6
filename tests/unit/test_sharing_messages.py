"""Questions for shared adapters and their answers, read with suspicion."""

from __future__ import annotations

import re

import pytest

from node.network.budgets.large_frames import SMALL_FRAME
from tensor_codec.blocks import MAX_BLOCKS, Blocks
from tensor_codec.errors import MessageError, TooManyStreams
from tensor_codec.header import pack_header
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import Drop, encode_blob_part, encode_drop
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.sharing import (
    SHARED_PIECE_BYTES,
    AskBlobs,
    AskCards,
    AskManifest,
    CardsPage,
    Question,
    decode_content,
    decode_page,
    decode_question,
    decode_shared_part,
    encode_content,
    encode_page,
    encode_question,
    is_question,
    shared_pieces,
)
from tests.adapter_fixtures import content

LIMITS = Limits()
OWN = content(2, empty=(1,))
FAILED = b"".join(encode_failed(Failed.of(TooManyStreams("later", 2.0))))


def frame(fields: dict[str, object], body: bytes = b"") -> bytes:
    return pack_header(fields) + body


@pytest.mark.parametrize(
    "question",
    [AskCards("r"), AskCards("r", "a" * 64), AskManifest(OWN.id), AskBlobs(OWN.id, Blocks(2, MAX_BLOCKS))],
)
def test_a_question_comes_back(question: Question):
    data = b"".join(encode_question(question))
    assert is_question(data)
    assert decode_question(data) == question
    with pytest.raises(MessageError):
        decode_question(data + b"\0")


def test_an_offer_is_no_question():
    assert not is_question(b"".join(encode_drop(Drop(OWN.id))))
    assert not is_question(frame({"k": 7}))
    with pytest.raises(MessageError):
        is_question(b"\0")


@pytest.mark.parametrize(
    "fields",
    [
        {"k": "cards"},
        {"k": "cards", "revision": "r" * 129},
        {"k": "cards", "revision": "r", "after": "../x"},
        {"k": "manifest", "adapter": "a" * 63},
        {"k": "manifest"},
        {"k": "blobs", "adapter": OWN.id, "start": 1, "stop": 1},
        {"k": "blobs", "adapter": OWN.id, "start": -1, "stop": 1},
        {"k": "blobs", "adapter": OWN.id, "start": 0, "stop": MAX_BLOCKS + 1},
        {"k": "offer"},
    ],
)
def test_a_question_that_cannot_be_is_refused(fields: dict[str, object]):
    with pytest.raises(MessageError):
        decode_question(frame(fields))


def test_a_page_of_the_largest_cards_comes_back_and_fits_its_frame():
    cards = tuple(
        bytes([n]) * LIMITS.max_adapter_card_bytes for n in range(LIMITS.max_adapter_cards_per_page)
    )
    data = b"".join(encode_page(CardsPage(cards, True)))
    assert len(data) < SMALL_FRAME
    assert decode_page(data, LIMITS) == CardsPage(cards, True)
    assert decode_page(b"".join(encode_page(CardsPage((), False))), LIMITS) == CardsPage((), False)


@pytest.mark.parametrize(
    ("more", "body", "says"),
    [
        (True, b"", "without a card"),
        (False, b"\0", "card of"),
        (False, b"\0\0", "card of 0 bytes"),
        (False, b"\0\5abc", "in the middle"),
        (False, b"\4\1" + bytes(1025), "1025 bytes, 1024 are allowed"),
        (False, b"\0\1a" * 65, "more than 64 cards"),
    ],
)
def test_a_page_that_breaks_a_rule_is_refused(more: bool, body: bytes, says: str):
    with pytest.raises(MessageError, match=says):
        decode_page(frame({"k": "page", "more": more}, body), LIMITS)


def test_content_comes_back_and_is_that_of_the_id():
    data = b"".join(encode_content(OWN.manifest, OWN.digests))
    found = decode_content(data, OWN.id, LIMITS)
    assert not isinstance(found, Failed)
    assert (found.manifest, found.digests) == (OWN.manifest, OWN.digests)


def test_content_with_another_id_is_refused_whatever_has_changed():
    other = content(2, seed=5, empty=(1,))
    for manifest, digests in (
        (OWN.manifest, other.digests),
        (content(1, empty=(1,)).manifest, OWN.digests),
        (OWN.manifest, tuple(reversed(OWN.digests))),
    ):
        with pytest.raises(MessageError, match="was asked for"):
            decode_content(b"".join(encode_content(manifest, digests)), OWN.id, LIMITS)
    with pytest.raises(MessageError, match="bytes of hashes"):
        decode_content(b"".join(encode_content(OWN.manifest, OWN.digests[:-1])), OWN.id, LIMITS)


def test_a_blob_comes_in_pieces_that_need_no_place_of_a_large_frame():
    blob = bytes(range(256)) * 1000
    parts = list(shared_pieces(3, blob))
    assert b"".join(bytes(part.data) for part in parts) == blob
    assert [part.at for part in parts] == [n * SHARED_PIECE_BYTES for n in range(3)]
    assert list(shared_pieces(3, b"")) == []
    assert all(len(part.data) < SMALL_FRAME - 4096 for part in parts)
    rest = len(blob)
    for part in parts:
        found = decode_shared_part(b"".join(encode_blob_part(part)), rest)
        assert not isinstance(found, Failed)
        assert (found.block, found.at, bytes(found.data)) == (3, part.at, bytes(part.data))
        rest -= len(part.data)
    with pytest.raises(MessageError, match=re.escape("are allowed now")):
        decode_shared_part(b"".join(encode_blob_part(parts[0])), 5)


def test_a_refusal_may_come_in_place_of_each_answer():
    for found in (
        decode_page(FAILED, LIMITS),
        decode_content(FAILED, OWN.id, LIMITS),
        decode_shared_part(FAILED, 5),
    ):
        assert isinstance(found, Failed)
        assert isinstance(found.error(), TooManyStreams)
