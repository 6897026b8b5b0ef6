"""The client's side of sums: what is taken, what is asked for again, and the total."""

from __future__ import annotations

import struct
from itertools import permutations

import pytest
import torch

from client.adapters.sums import CallSums
from client.batch_parts import Part
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.messages.gradients import MAX_SUMMED
from tests.adapter_fixtures import content
from tests.fakes_serving import HIDDEN

A, B = Hop(PeerId("a"), 0, 2), Hop(PeerId("b"), 0, 2)
LATER = Hop(PeerId("c"), 2, 6)
VALUES = 2 * HIDDEN  # of a block with one site of rank 1
STATES = torch.zeros(1, 2, HIDDEN)


def part(number: int) -> Part:
    made = Part(STATES + number, 0, 6, STATES)
    made.number = number
    return made


def asked(sums: CallSums, hop: Hop, *numbers: int) -> None:
    for number in numbers:
        sums.at(hop, number)
        sums.confirmed(hop, part(number), STATES + number, STATES - number)


def wire(dtype: str, count: int, value: float) -> bytes:
    return struct.pack(f"<{count}{'f' if dtype == 'fp32' else 'd'}", *[value] * count)


def test_every_hop_has_a_sum_of_its_own_and_requests_their_numbers():
    sums = CallSums(content())
    one, two = sums.at(A, 0), sums.at(A, 1)
    other = sums.at(B, 0)
    assert one is not None
    assert two is not None
    assert other is not None
    assert (one.name, one.number, two.number) == (two.name, 0, 1)
    assert one.name != other.name


def test_a_hop_without_a_site_has_no_sum():
    sums = CallSums(content(empty=(0, 1)))
    assert sums.at(A, 0) is None
    assert sums.at(LATER, 0) is not None


def test_a_call_of_more_requests_than_a_sum_holds_is_refused():
    with pytest.raises(ValueError, match="more than 4096 requests"):
        CallSums(content()).at(A, MAX_SUMMED)


def test_a_sum_with_other_requests_than_were_confirmed_is_not_taken_and_all_its_requests_come_again():
    sums = CallSums(content())
    asked(sums, A, 0, 2)
    ((own, dtype),) = sums.to_collect()
    assert dtype == "fp32"
    assert not sums.take(own, dtype, frozenset({0, 1, 2}), wire(dtype, 2 * VALUES, 1))
    again = sums.again(own)
    assert [(each.number, each.start, each.stop) for each in again] == [(0, 0, 2), (2, 0, 2)]
    assert torch.equal(again[1].hidden, STATES + 2)
    assert again[1].grad is not None
    assert torch.equal(again[1].grad, STATES - 2)
    assert sums.to_collect() == []
    new = sums.at(A, 0)
    assert new is not None
    assert new.name != own.name


def test_a_sum_that_no_request_was_confirmed_of_is_nobody_s():
    sums = CallSums(content())
    sums.at(A, 0)
    assert sums.to_collect() == []
    assert sums.total() == {}


def test_sums_of_the_same_blocks_come_in_float64_and_their_total_is_rounded_once():
    values = [1.0, 2.0**-24, 2.0**-24]  # in float32 the small ones are lost one by one
    for order in permutations(range(3)):
        sums = CallSums(content())
        for number, hop in zip(order, (A, B, Hop(PeerId("d"), 0, 2)), strict=True):
            asked(sums, hop, number)
        for own, dtype in sums.to_collect():
            assert dtype == "fp64"
            (number,) = own.done
            assert sums.bytes_of(own.hop, dtype) == 8 * 2 * VALUES
            data = wire(dtype, 2 * VALUES, values[number])
            assert sums.take(own, dtype, frozenset(own.done), data)
        total = sums.total()
        assert total.keys() == {0, 1}
        assert all(torch.equal(each, torch.full((VALUES,), 1.0 + 2.0**-23)) for each in total.values())


def test_a_block_of_one_sum_alone_comes_in_float32():
    sums = CallSums(content())
    asked(sums, A, 0)
    asked(sums, LATER, 0)
    found = {own.hop: dtype for own, dtype in sums.to_collect()}
    assert found == {A: "fp32", LATER: "fp32"}
    asked(sums, B, 1)
    found = {own.hop: dtype for own, dtype in sums.to_collect()}
    assert found == {A: "fp64", B: "fp64", LATER: "fp32"}
