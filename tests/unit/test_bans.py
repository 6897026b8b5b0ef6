"""Bans: when they begin, how they grow, when they are forgiven."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.runtime.bans import FORGIVEN_SECONDS, MAX_NAMES, BanRule, Bans

RULE = BanRule(faults=3, window_seconds=60.0, first_seconds=15.0, longest_seconds=3600.0)


def test_three_faults_within_a_minute_ban_and_two_do_not():
    bans = Bans(RULE)
    assert [bans.fault("a", now) for now in (0.0, 30.0)] == [0, 0]
    assert bans.seconds_left("a", 30.0) == 0
    assert bans.fault("a", 59.0) == 15
    assert bans.seconds_left("a", 60.0) == 14
    assert bans.seconds_left("a", 74.0) == 0
    assert bans.seconds_left("b", 60.0) == 0
    assert bans.banned(60.0) == {"a": 14.0}


def test_faults_that_are_far_apart_ban_nobody():
    bans = Bans(RULE)
    assert not any(bans.fault("a", 31.0 * number) for number in range(100))


def test_a_relapse_is_banned_for_twice_as_long_up_to_an_hour():
    bans, now, lengths = Bans(RULE), 0.0, []
    for _ in range(12):
        while not (seconds := bans.fault("a", now)):
            now += 1.0
        lengths.append(seconds)
        now += seconds + 1.0
    assert lengths == [min(15.0 * 2**number, 3600.0) for number in range(12)]


def test_a_grave_fault_bans_at_once_and_for_its_own_time():
    bans = Bans(RULE)
    assert bans.fault("a", 0.0, at_least=60.0) == 60
    assert bans.fault("a", 61.0, at_least=60.0) == 60
    assert bans.fault("a", 122.0, at_least=60.0) == 60
    assert bans.fault("a", 183.0, at_least=60.0) == 120, "the fourth ban of the rule is longer"


def test_faults_during_a_ban_neither_prolong_it_nor_count_afterwards():
    bans = Bans(RULE)
    for _ in range(3):
        bans.fault("a", 0.0)
    assert not any(bans.fault("a", 1.0) for _ in range(50))
    assert bans.seconds_left("a", 15.0) == 0
    assert not bans.fault("a", 16.0)


@pytest.mark.parametrize(("bans_before", "patience"), [(1, FORGIVEN_SECONDS), (9, 3600.0)])
def test_time_forgives(bans_before: int, patience: float):
    bans, now = Bans(RULE), 0.0
    for _ in range(bans_before):
        while not (seconds := bans.fault("a", now)):
            pass
        now += seconds + 0.5
    assert bans.fault("a", now + patience) == 0
    assert len(bans) == 1
    assert bans.fault("a", now + patience + 1) == 0
    assert bans.fault("a", now + patience + 2) == 15, "the first ban again"


def test_made_up_names_fill_no_memory_and_end_no_long_ban():
    bans = Bans(RULE)
    for _ in range(3):
        bans.fault("long", 0.0, at_least=600.0)
    for number in range(3 * MAX_NAMES):
        bans.fault(f"made up {number}", 1.0, at_least=60.0)
        assert len(bans) <= MAX_NAMES
    assert bans.seconds_left("long", 1.0) == 599


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 100)), max_size=60))
def test_nobody_is_banned_for_fewer_faults_than_the_rule_s(steps: list[tuple[str, float]]):
    bans, now = Bans(RULE), 0.0
    since_ban: dict[str, list[float]] = {"a": [], "b": []}
    for name, pause in steps:
        now += pause
        banned_before = bans.seconds_left(name, now) > 0
        seconds = bans.fault(name, now)
        if banned_before:
            assert seconds == 0
            continue
        since_ban[name].append(now)
        recent = [at for at in since_ban[name] if at >= now - RULE.window_seconds]
        assert (seconds > 0) == (len(recent) >= RULE.faults)
        if seconds:
            since_ban[name].clear()
