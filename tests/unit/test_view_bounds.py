"""The edges of the view: the last moment at which something counts, and the first at which it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.names import public_key_of
from routing.view.view import (
    MAX_CLAIMED_SPEED,
    REMEMBER_SECONDS,
    Arrival,
    SwarmView,
    believed_rates,
    expire,
    likely_adjacent,
    merge,
)
from tests.unit.test_view import PEERS, arrival, span, view_of


def test_a_record_is_passed_on_until_it_ends_and_not_at_its_end():
    view = view_of(span(0, ttl_seconds=10.0), now=5.0)
    assert [passed.age for passed in view.held([PEERS[0], PEERS[1]], 14.5)] == [9.5]
    assert [passed.age for passed in view.missing({}, 14.5)] == [9.5]
    assert view.held([PEERS[0]], 15.0) == view.missing({}, 15.0) == []


def test_a_record_is_passed_on_as_it_came_and_never_from_the_future():
    view = merge(SwarmView("public"), [Arrival(span(0), b"wire", -3.0)], 5.0).view
    assert view.missing({}, 6.0) == view.held([PEERS[0]], 6.0) == [Arrival(span(0), b"wire", 0.0)]


def test_a_first_record_is_passed_on_to_those_that_know_nothing_of_its_peer():
    view = view_of(span(0, seq=0), span(1, seq=4))
    assert {passed.record.peer for passed in view.missing({}, 1.0)} == {PEERS[0], PEERS[1]}
    assert view.missing({public_key_of(PEERS[0]): 0, public_key_of(PEERS[1]): 4}, 1.0) == []


def test_what_ended_is_in_the_digest_for_as_long_as_it_is_remembered():
    view = expire(view_of(span(0, seq=7, ttl_seconds=10.0)), 10.0)
    assert view.digest() == {public_key_of(PEERS[0]): 7}
    view = merge(view, [arrival(span(1, ttl_seconds=10.0))], REMEMBER_SECONDS - 1.0).view
    assert public_key_of(PEERS[0]) in expire(view, REMEMBER_SECONDS + 9.9).digest()
    assert public_key_of(PEERS[0]) not in expire(view, REMEMBER_SECONDS + 10.0).digest()


def test_the_view_knows_when_its_first_record_ends():
    view = view_of(span(0, ttl_seconds=30.0), span(1, ttl_seconds=20.0))
    assert view.next_expiry == 20.0
    view = expire(view, 20.0)
    assert (view.next_expiry, set(view.entries), set(view.ended)) == (30.0, {PEERS[0]}, {PEERS[1]})
    assert merge(view, [arrival(span(2, ttl_seconds=40.0))], 21.0).view.next_expiry == 30.0
    assert expire(view, 30.0).next_expiry == float("inf")


def test_of_what_ended_as_much_as_the_view_holds_is_remembered_the_latest_first():
    view = SwarmView("public", max_records=3)
    for number, ttl in enumerate((30.0, 10.0, 20.0)):
        view = merge(view, [arrival(span(number, ttl_seconds=ttl))], 0.0).view
    view = expire(view, 30.0)
    assert set(view.ended) == {PEERS[0], PEERS[1], PEERS[2]}
    view = expire(merge(view, [arrival(span(3, ttl_seconds=10.0))], 31.0).view, 41.0)
    assert set(view.ended) == {PEERS[0], PEERS[2], PEERS[3]}


def test_a_dropped_record_does_not_keep_those_after_it_out():
    arrivals = [
        arrival(span(0, swarm="f00d")),
        arrival(span(1), age=1000.0),
        arrival(span(2, seq=1)),
        arrival(span(3)),
    ]
    view = merge(view_of(span(2, seq=5)), arrivals, 1.0).view
    assert set(view.entries) == {PEERS[2], PEERS[3]}
    small = merge(SwarmView("public", max_records=1), [arrival(span(0))], 0.0).view
    found = merge(small, [arrival(span(1)), arrival(span(0, seq=9))], 1.0)
    assert found.changed == (PEERS[0],)


def test_a_peer_that_does_not_answer_serves_nothing_and_is_kept():
    view = replace(view_of(span(0), span(1)), silent=frozenset({PEERS[0]}))
    assert [record.peer for record in view.spans("r")] == [PEERS[1]]
    assert {record.peer for record in view.spans("r", silent=True)} == {PEERS[0], PEERS[1]}


def test_one_position_goes_at_the_rate_of_a_step_and_several_at_that_of_a_prefill():
    spans = [span(0, seconds_per_block=0.004, prefill_seconds_per_token=0.001)]
    assert believed_rates(spans) == believed_rates(spans, positions=1) == {PEERS[0]: 0.004}
    assert believed_rates(spans, positions=2) == {PEERS[0]: pytest.approx(0.002)}
    assert believed_rates(spans, {PEERS[0]: 0.5}, positions=2) == {PEERS[0]: 0.5}


def test_a_claim_just_as_fast_as_is_believed_is_believed():
    spans = [
        span(n, seconds_per_block=s) for n, s in enumerate((0.004, 0.004, 0.004 / MAX_CLAIMED_SPEED, 9.0))
    ]
    assert believed_rates(spans) == {s.peer: s.seconds_per_block for s in spans}


def test_adjacent_are_those_that_reach_further_or_could_do_a_part_and_nobody_else():
    me = span(0, 10, 20)
    after = [span(1, 20, 30), span(2, 11, 21), span(3, 11, 20), span(4, 19, 20)]
    before = [span(5, 0, 10), span(6, 9, 19), span(7, 10, 19), span(8, 10, 11)]
    others = [span(9, 21, 30), span(10, 0, 9), span(11, 10, 20), span(12, 11, 19)]
    view = view_of(me, *after, *before, *others)
    found = [record.peer for record in likely_adjacent(view, me, 99)]
    assert set(found) == {record.peer for record in (*after, *before)}
    assert {found[0], found[1]} <= {PEERS[n] for n in (1, 2, 5, 6)}
    assert len(likely_adjacent(view, me, 3)) == 3
