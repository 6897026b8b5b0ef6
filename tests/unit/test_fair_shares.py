"""Who gives way where something is used up: prefixes have equal shares, and peers of one prefix share one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.serving.cache_budget import CacheBudget
from node.serving.fair_shares import who_yields
from tensor_codec.errors import CacheFull

HOME, CROWD, THIRD = "192.0.2.1/32", "198.51.100.1/32", "203.0.113.1/32"


@dataclass
class Part:
    prefix: str
    peer: str
    weight: int
    yields: bool = False


def test_nobody_gives_way_where_one_prefix_has_everything_to_its_own_peers_or_without_an_address():
    crowd = [Part(CROWD, f"id {number}", 25) for number in range(4)]
    assert who_yields(crowd, CROWD, 100) is None
    assert who_yields(crowd, "", 100) is None
    assert who_yields([Part("", "a", 100)], HOME, 100) is None


def test_the_youngest_session_of_the_largest_peer_of_the_largest_prefix_gives_way():
    crowd = [Part(CROWD, peer, weight) for peer, weight in (("a", 20), ("b", 30), ("b", 5), ("a", 20))]
    assert who_yields([*crowd, Part(HOME, "c", 10)], THIRD, 100) is crowd[3]
    crowd[3].yields = True
    assert who_yields([*crowd, Part(HOME, "c", 10)], THIRD, 100) is crowd[2]


def test_a_prefix_gives_way_to_those_with_less_than_their_share_and_only_beyond_its_own():
    assert who_yields([Part(CROWD, "a", 51), Part(HOME, "b", 49)], HOME, 100) is not None
    assert who_yields([Part(CROWD, "a", 50), Part(HOME, "b", 49)], HOME, 100) is None
    assert who_yields([Part(CROWD, "a", 60), Part(HOME, "b", 50)], HOME, 100) is None


@given(
    st.lists(st.tuples(st.sampled_from([HOME, CROWD, THIRD]), st.sampled_from("abc"), st.integers(1, 40))),
    st.sampled_from([HOME, CROWD, THIRD]),
)
def test_those_who_get_do_not_have_to_give_at_once(parts: list[tuple[str, str, int]], asks: str):
    """So two prefixes do not end each other's sessions in turn."""
    holders = [Part(*part) for part in parts]
    gives = who_yields(holders, asks, 100)
    if gives is not None:
        others = [part for part in holders if part is not gives]
        again = who_yields(others, gives.prefix, 100)
        assert again is None or again.prefix != asks


# The cache


def test_four_ids_of_one_address_hold_the_whole_cache_only_as_long_as_nobody_else_wants_any():
    budget = CacheBudget(1536, 0.25, least_share_tokens=16)
    for number in range(8):
        budget.admit(number, f"id {number // 2}", 1, 192, CROWD)
        budget.grow(number, 192)
    with pytest.raises(CacheFull) as full:
        budget.admit("new", "honest", 1, 384, HOME)
    assert full.value.retry_after_seconds == 2.0
    assert budget.make_yield(CROWD) is None
    assert budget.make_yield("") is None
    ended = []
    while True:
        try:
            budget.admit("new", "honest", 1, 384, HOME)
            break
        except CacheFull:
            ended.append(budget.make_yield(HOME))
            budget.release(ended[-1])
    assert ended == [7], "one page is enough to begin with"
    length = 0
    while length < 384:
        try:
            budget.grow("new", length + 16)
            length += 16
        except CacheFull:
            if (gone := budget.make_yield(HOME)) is None:
                break
            ended.append(gone)
            budget.release(gone)
    assert budget.held_tokens("honest") == 384
    assert len(ended) <= 4, "the others stay"


def test_rows_without_pages_count_as_a_part_too():
    budget = CacheBudget(1600, 1.0, page_tokens=16)
    budget.admit("rows", "a", 100, 16, CROWD)
    try:
        budget.admit("new", "honest", 1, 16, HOME)
    except CacheFull:
        assert budget.make_yield(HOME) == "rows"
    else:
        raise AssertionError("as many rows as there are pages")
