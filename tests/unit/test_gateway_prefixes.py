"""Conversations kept for the next turn: whose, how many, how long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from client.gateway.door.limits import PrefixLimits
from client.gateway.prefixes import Kept, PrefixPool, common_length

LIMITS = PrefixLimits(max_conversations=3, max_tokens=100, idle_seconds=50, least_tokens=4)
OWNER = ("key", "model", None)


def kept(owner: Any = OWNER, length: int = 200) -> Kept:
    return Kept(owner, SimpleNamespace(close=lambda: None), length)


def pool_with(*tokens: list[int], owner: Any = OWNER) -> tuple[PrefixPool, list[Kept]]:
    pool, all_kept = PrefixPool(LIMITS), []
    for each in tokens:
        one = kept(owner)
        assert pool.keep(one, each, 0.0) == []
        all_kept.append(one)
    return pool, all_kept


def test_the_longest_common_prefix_is_given_and_is_given_once():
    pool, (short, long) = pool_with([1, 2, 3, 4, 9], [1, 2, 3, 4, 5, 6])
    assert pool.take(OWNER, [1, 2, 3, 4, 5, 6, 7], 20, 1.0) is long
    assert pool.take(OWNER, [1, 2, 3, 4, 5, 6, 7], 20, 1.0) is short
    assert pool.take(OWNER, [1, 2, 3, 4, 5, 6, 7], 20, 1.0) is None


def test_of_equal_prefixes_the_one_that_loses_fewest_tokens_is_given():
    pool, (long, short) = pool_with([1, 2, 3, 4, *range(50, 60)], [1, 2, 3, 4])
    assert pool.take(OWNER, [1, 2, 3, 4, 5], 20, 1.0) is short
    assert pool.take(OWNER, [1, 2, 3, 4, 5], 20, 1.0) is long


def test_no_caller_gets_another_s_conversation():
    pool, _ = pool_with([1, 2, 3, 4, 5])
    for other in (("other", "model", None), ("key", "model:adapter", None), ("key", "model", "servers")):
        assert pool.take(other, [1, 2, 3, 4, 5, 6], 20, 1.0) is None
    assert pool.take(OWNER, [1, 2, 3, 4, 5, 6], 20, 1.0) is not None


def test_a_short_prefix_is_not_worth_a_conversation():
    pool, _ = pool_with([1, 2, 3, 9, 9, 9])
    assert pool.take(OWNER, [1, 2, 3, 4], 20, 1.0) is None


def test_a_conversation_without_room_for_the_answer_is_left():
    pool, _ = pool_with([1, 2, 3, 4, 5])
    assert pool.take(OWNER, [1, 2, 3, 4, 5], 201, 1.0) is None
    assert pool.take(OWNER, [1, 2, 3, 4, 5], 200, 1.0) is not None


def test_after_its_idle_time_a_conversation_is_given_to_nobody():
    pool, (one,) = pool_with([1, 2, 3, 4, 5])
    assert pool.next_end == 50
    assert pool.expire(49.9) == []
    assert pool.take(OWNER, [1, 2, 3, 4, 5], 20, 50.0) is None
    assert pool.expire(50.0) == [one]
    assert len(pool) == 0


def test_the_oldest_make_room():
    pool, (first, second, third) = pool_with([1] * 10, [2] * 10, [3] * 10)
    fourth = kept()
    assert pool.keep(fourth, [4] * 10, 1.0) == [first]
    assert pool.keep(kept(), [5] * 85, 2.0) == [second, third]
    assert pool.tokens == 95


def test_one_that_is_too_large_alone_goes_itself():
    pool, _ = pool_with([1] * 10)
    large = kept()
    assert pool.keep(large, [2] * 101, 1.0) == [large]
    assert len(pool) == 1


def test_a_conversation_of_a_few_tokens_is_not_kept():
    pool, one = PrefixPool(LIMITS), kept()
    assert pool.keep(one, [1, 2, 3], 0.0) == [one]


def test_all_go_at_the_end():
    pool, all_kept = pool_with([1] * 10, [2] * 10)
    assert pool.clear() == all_kept
    assert len(pool) == 0


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_the_common_prefix_is_the_longest(one, other):
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert length in (len(one), len(other)) or one[length] != other[length]


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 30)), max_size=40))
def test_the_bounds_hold_whatever_is_kept(events):
    pool, now = PrefixPool(LIMITS), 0.0
    for tokens, pause in events:
        now += pause
        pool.expire(now)
        pool.keep(kept(), [7] * tokens, now)
        assert len(pool) <= 3
        assert pool.tokens <= 100
