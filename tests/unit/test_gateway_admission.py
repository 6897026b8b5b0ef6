"""Which request begins next: places, turns, and callers that want them all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.door.admission import Admission, QueueFull
from client.gateway.door.limits import QueueLimits


def admission(concurrent: int = 2, queued: int = 4) -> Admission:
    return Admission(QueueLimits(concurrent, queued))


def test_requests_begin_at_once_where_there_are_places():
    queue = admission()
    one, change = queue.enter("a")
    assert change.begin == (one,)
    two, change = queue.enter("a")
    assert change.begin == (two,)
    three, change = queue.enter("a")
    assert change.begin == ()
    assert queue.leave(one).begin == (three,)


def test_the_caller_with_fewest_answers_is_next_then_the_first_to_come():
    queue = admission(2, 8)
    first, _ = queue.enter("a")
    second, _ = queue.enter("a")
    third, _ = queue.enter("a")
    other, _ = queue.enter("b")
    late, _ = queue.enter("b")
    assert queue.leave(first).begin == (other,)
    assert queue.leave(second).begin == (third,)  # a has none now, b has one
    assert queue.leave(other).begin == (late,)


def test_callers_take_turns_where_one_answer_is_computed_at_a_time():
    queue = admission(1, 20)
    current, _ = queue.enter("a")
    for caller in "aaaabb":
        queue.enter(caller)
    turns = []
    while begin := queue.leave(current).begin:
        (current,) = begin
        turns.append(current.caller)
    assert turns == list("babaaa")


def test_a_request_for_several_answers_takes_several_places_and_holds_smaller_ones_back():
    queue = admission(4, 8)
    small, _ = queue.enter("a", 1)
    large, change = queue.enter("b", 4)
    assert not change.begin
    behind, change = queue.enter("c", 1)
    assert not change.begin, "else a large request would wait for ever"
    assert queue.leave(small).begin == (large,)
    assert queue.leave(large).begin == (behind,)


def test_a_request_for_more_answers_than_there_are_places_computes_fewer_at_a_time():
    assert admission(3).weight_of(8) == 3
    assert admission(3).weight_of(2) == 2


def test_a_full_queue_refuses_the_caller_that_fills_it_and_takes_another():
    queue = admission(1, 3)
    queue.enter("a")
    waiting = [queue.enter("a")[0] for _ in range(3)]
    with pytest.raises(QueueFull):
        queue.enter("a")
    other, change = queue.enter("b")
    assert change.leave == (waiting[-1],), "the newest of the caller that has most"
    with pytest.raises(QueueFull):
        queue.enter("b")  # it would have as many as a
    assert queue.waiting == 3
    assert queue.leave(other).begin == ()


def test_without_places_to_wait_a_request_begins_or_is_refused():
    queue = admission(1, 0)
    one, _ = queue.enter("a")
    with pytest.raises(QueueFull):
        queue.enter("b")
    queue.leave(one)
    assert queue.enter("b")[1].begin


def test_a_request_that_leaves_twice_changes_nothing():
    queue = admission(1)
    one, _ = queue.enter("a")
    two, _ = queue.enter("a")
    assert queue.leave(one).begin == (two,)
    assert queue.leave(one).begin == ()
    assert queue.computing == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=60))
def test_bounds_hold_and_nobody_waits_for_nothing(events):
    queue, tickets = admission(4, 3), []
    computing, waiting = set(), set()
    for caller, choices, leaves in events:
        if leaves and tickets:
            ticket = tickets.pop(0)
            change = queue.leave(ticket)
            computing.discard(ticket)
            waiting.discard(ticket)
        else:
            try:
                ticket, change = queue.enter(caller, queue.weight_of(choices))
            except QueueFull:
                assert queue.waiting == 3
                continue
            tickets.append(ticket)
            waiting.add(ticket)
        for each in change.leave:
            waiting.discard(each)
            tickets.remove(each)
        for each in change.begin:
            waiting.remove(each)
            computing.add(each)
        assert queue.computing == sum(each.weight for each in computing) <= 4
        assert queue.waiting == len(waiting) <= 3
        if waiting:
            assert queue.computing + min(each.weight for each in waiting) > 4 or computing
        if not computing:
            assert not waiting
