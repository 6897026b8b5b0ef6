"""NAT-PMP's packets, byte by byte as RFC 6886 has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.mapping.nat_pmp import address_request, map_request, read_address, read_mapping
from node.network.mapping.plan import MappingError

ADDRESS = bytes.fromhex("0080 0000 00000e10 cb007107")
MAPPING = bytes.fromhex("0082 0000 00000e10 7a62 9c40 00000e10")


def test_the_questions_are_those_of_the_standard():
    assert address_request() == bytes.fromhex("0000")
    assert map_request(31330, 40_000, 3600) == bytes.fromhex("0002 0000 7a62 9c40 00000e10")


def test_the_answers_are_read():
    assert read_address(ADDRESS) == "203.0.113.7"
    assert read_mapping(MAPPING, 31330) == (40_000, 3600)


def test_the_answer_to_another_port_is_not_ours():
    assert read_mapping(MAPPING, 31331) is None


@pytest.mark.parametrize(
    ("result", "word"),
    [(1, "version"), (2, "allow"), (3, "address"), (4, "port"), (5, "request"), (99, "99")],
)
def test_a_refusal_says_why_also_without_a_body(result: int, word: str):
    refusal = MAPPING[:2] + result.to_bytes(2, "big") + MAPPING[4:]
    for answer in (refusal, refusal[:8], refusal[:4]):
        with pytest.raises(MappingError, match=word):
            read_mapping(answer, 31330)


@given(st.binary(max_size=64))
def test_any_bytes_are_an_answer_or_a_refusal_or_nothing(answer: bytes):
    for read in (read_address, lambda each: read_mapping(each, 31330)):
        try:
            found = read(answer)
        except MappingError:
            assert int.from_bytes(answer[2:4], "big") != 0
        else:
            assert found is None or len(answer) in (12, 16)
