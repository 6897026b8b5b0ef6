"""The history of events and its listeners, as pure values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.monitor.history import (
    MAX_BEHIND,
    MAX_KEPT,
    MAX_LISTENERS,
    MAX_WAITING,
    SWARM,
    Feed,
    Listener,
    frame_of,
)


def taken(listener: Listener, now: float = 0.0) -> list[int]:
    found = []
    while (entry := listener.take(now)) is not None:
        found.append(entry.number)
    return found


def listening(feed: Feed, last: int | None = None) -> Listener:
    listener = feed.listen(last)
    assert listener is not None
    return listener


def test_ids_grow_from_the_first_one_on():
    feed = Feed(first=100)
    assert [feed.publish("peer", {}, 0.0).number for _ in range(3)] == [101, 102, 103]


def test_an_event_is_one_frame_of_one_line_of_json():
    text = "line\nbreak\r\u2028 <b>\x00"
    frame = frame_of(7, "peer", {"name": text}).decode()
    assert frame.startswith("id: 7\nevent: peer\ndata: {")
    assert frame.endswith("}\n\n")
    (line,) = [each for each in frame.split("\n") if each.startswith("data: ")]
    assert "\r" not in frame
    assert json.loads(line.removeprefix("data: ")) == {"name": text}
    assert b"?" in frame_of(8, "peer", {"name": "\udc80"})  # half a character is no error
    with pytest.raises(ValueError, match="not JSON compliant"):
        frame_of(9, "traffic", {"rate": float("nan")})


@given(
    st.lists(st.sampled_from(["peer", "steps", SWARM]), max_size=60),
    st.integers(0, 70),
    st.integers(1, 20),
)
def test_a_listener_that_comes_again_gets_each_later_event_once_in_order(
    kinds: list[str], back: int, split: int
):
    feed, numbers = Feed(first=10), []
    for kind in kinds[:split]:
        entry = feed.publish(kind, {}, 0.0, often=kind == "steps")
        numbers += [entry.number] * (kind != SWARM)
    last = max(10, feed.number - back)
    listener = listening(feed, last)
    got = taken(listener)
    assert got == [number for number in numbers if number > last]
    later = [feed.publish(kind, {}, 0.0, often=kind == "steps") for kind in kinds[split:]]
    swarms = [entry.number for entry in later if entry.kind == SWARM]
    expected = [entry.number for entry in later if entry.kind != SWARM] + swarms[-1:]
    assert taken(listener) == sorted(expected)  # of the swarm's states that waited the newest alone


def test_an_id_of_an_earlier_start_gets_all_that_is_kept():
    feed = Feed(first=1000)
    numbers = [feed.publish("peer", {}, 0.0).number for _ in range(5)]
    assert taken(listening(feed, 0)) == numbers
    assert taken(listening(feed, 10**15)) == numbers
    assert taken(listening(feed, numbers[2])) == numbers[3:]
    assert taken(listening(feed, numbers[-1])) == []
    assert taken(listening(feed)) == []


def test_the_history_is_bounded_and_summaries_push_no_other_event_out():
    feed = Feed()
    first = feed.publish("peer", {}, 0.0).number
    for _ in range(3 * MAX_KEPT):
        feed.publish("session", {}, 0.0, often=True)
    found = taken(listening(feed, 0))
    assert found[0] == first
    assert len(found) == MAX_KEPT + 1
    for _ in range(3 * MAX_KEPT):
        feed.publish("peer", {}, 0.0)
    assert len(taken(listening(feed, 0))) == 2 * MAX_KEPT


def test_a_listener_that_takes_nothing_is_lost_when_it_is_far_behind_and_keeps_nothing():
    feed = Feed()
    slow, quick = listening(feed), listening(feed)
    for number in range(MAX_BEHIND):
        feed.publish("peer", {}, 0.1 * number)
        assert taken(quick, 0.1 * number) == [number + 1]
    assert not slow.lost
    feed.publish("peer", {}, 0.1 * MAX_BEHIND)
    assert slow.lost
    assert not slow.waiting
    assert not quick.lost
    feed.publish("peer", {}, 100.0)
    assert not slow.waiting


def test_a_burst_is_no_slowness_but_has_its_bound():
    feed = Feed()
    listener = listening(feed)
    for number in range(2 * MAX_BEHIND):
        feed.publish("peer", {}, 5.0 + number / 1000)
    assert not listener.lost
    assert len(taken(listener, 5.2)) == 2 * MAX_BEHIND
    for _ in range(MAX_WAITING):
        feed.publish("peer", {}, 6.0)
    assert not listener.lost
    feed.publish("peer", {}, 6.0)
    assert listener.lost


def test_a_listener_that_takes_some_is_not_lost():
    feed = Feed()
    listener = listening(feed)
    for number in range(3 * MAX_BEHIND):
        now = 0.2 * number
        feed.publish("peer", {}, now)
        feed.publish("peer", {}, now)
        listener.take(now)
    assert not listener.lost


def test_a_long_replay_is_nobodys_backlog():
    feed = Feed()
    for _ in range(MAX_KEPT):
        feed.publish("peer", {}, 0.0)
    listener = listening(feed, 0)
    for _ in range(MAX_BEHIND):
        feed.publish("peer", {}, 0.0)
    assert not listener.lost
    assert taken(listener) == list(range(1, MAX_KEPT + MAX_BEHIND + 1))


def test_states_of_the_swarm_never_pile_up():
    feed = Feed()
    slow = listening(feed)
    for _ in range(10 * MAX_BEHIND):
        feed.publish(SWARM, {}, 0.0)
    assert len(slow.waiting) == 1
    assert not slow.lost


def test_more_listeners_than_allowed_get_no_place_until_one_leaves():
    feed = Feed()
    all_of_them = [listening(feed) for _ in range(MAX_LISTENERS)]
    assert feed.listen() is None
    feed.leave(all_of_them[3])
    feed.leave(all_of_them[3])
    again: Any = feed.listen()
    assert again is not None
    assert len(feed.listeners) == MAX_LISTENERS
