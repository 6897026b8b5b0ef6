"""A joining server takes the window of blocks that the swarm needs most; one that moves opens no gap."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.names import peer_id_of
from routing.placement import choose_blocks, throughputs
from routing.records import Record
from routing.swarm import coverage


def span(number, start, stop, seconds=0.01, blocks=12):
    return Record(
        peer=peer_id_of(number.to_bytes(32, "big")),
        role="serve",
        blocks=blocks,
        start=start,
        stop=stop,
        seconds_per_block=seconds,
    )


parts = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 12), st.sampled_from([0.0, 0.005, 0.01, 0.02])).filter(
        lambda part: part[0] < part[1]
    ),
    max_size=6,
)


@given(parts, st.integers(1, 12))
def test_no_other_window_covers_more_that_nobody_holds(found, count):
    spans = [span(number, *part) for number, part in enumerate(found)]
    alone = [number == 0 for number in coverage(spans, 12)]
    start, stop = choose_blocks(spans, 12, count)
    assert stop - start == count
    assert sum(alone[start:stop]) == max(sum(alone[s : s + count]) for s in range(12 - count + 1))


@given(parts, st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_the_records(found, count, rng):
    spans = [span(number, *part) for number, part in enumerate(found)]
    assert choose_blocks(rng.sample(spans, len(spans)), 12, count) == choose_blocks(spans, 12, count)


@given(parts, st.integers(1, 12), st.integers(0, 2**32))
def test_the_same_chance_gives_the_same_window(found, count, seed):
    spans = [span(number, *part) for number, part in enumerate(found)]
    chosen = choose_blocks(spans, 12, count, random.Random(seed))
    assert chosen == choose_blocks(spans, 12, count, random.Random(seed))


@given(st.integers(1, 40), st.integers(1, 40))
def test_nodes_that_join_one_after_the_other_cover_the_model_with_as_few_as_can(blocks, count):
    spans = []
    for number in range(math.ceil(blocks / count)):
        spans.append(span(number, *choose_blocks(spans, blocks, count), blocks=blocks))
    assert min(coverage(spans, blocks)) >= 1


@given(st.lists(st.integers(1, 12), min_size=12, max_size=20), st.integers(0, 2**32))
def test_nodes_of_any_size_cover_the_model_before_they_double_it(counts, seed):
    """With chance among ties too, each node that joins takes at least one block that nobody holds."""
    spans, rng = [], random.Random(seed)
    for number, count in enumerate(counts):
        before = coverage(spans, 12)
        spans.append(span(number, *choose_blocks(spans, 12, count, rng)))
        after = coverage(spans, 12)
        assert min(after) >= 1 or sum(c > 0 for c in after) > sum(c > 0 for c in before)
    assert min(coverage(spans, 12)) >= 1


def test_a_hole_is_filled_before_a_slow_block_is_helped():
    spans = [span(0, 0, 4), span(1, 4, 8, 10.0), span(2, 9, 12)]
    start, stop = choose_blocks(spans, 12, 2)
    assert start <= 8 < stop


def test_among_covered_blocks_the_slowest_are_helped():
    spans = [span(0, 0, 4, 0.01), span(1, 4, 8, 0.04), span(2, 8, 12, 0.01)]
    start, _ = choose_blocks(spans, 12, 4)
    assert 3 <= start <= 5


def test_a_boast_does_not_keep_others_away_for_long():
    honest = [span(n, 0, 12, 0.01) for n in range(3)]
    boast = span(9, 0, 6, 1e-7)
    assert throughputs([*honest, boast], 12)[0] == pytest.approx(300 + 400)


def test_a_peer_that_has_not_measured_counts_as_the_median():
    assert throughputs([span(0, 0, 6, 0.01), span(1, 6, 12, 0.0)], 12) == pytest.approx((100.0,) * 12)
    assert throughputs([span(0, 0, 6, 0.0)], 12) == (1.0,) * 6 + (0.0,) * 6


def test_a_node_with_room_for_more_than_the_model_takes_it_all():
    assert choose_blocks([], 12, 99) == (0, 12)


def test_a_node_with_room_for_nothing_is_told_so():
    with pytest.raises(ValueError, match="at least 1"):
        choose_blocks([], 12, 0)
