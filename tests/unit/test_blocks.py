"""A run of blocks, and many of them, are what the sets of their blocks are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.blocks import Blocks, coverage, gaps, merged

TOTAL = 12
runs = st.builds(Blocks, st.integers(0, TOTAL), st.integers(0, TOTAL + 3))
full = runs.filter(bool)


def blocks_of(*found: Blocks) -> set[int]:
    return {block for run in found for block in range(*run)}


@given(runs, runs)
def test_overlap_and_difference_are_those_of_the_sets(one, other):
    assert blocks_of(one.overlap(other)) == blocks_of(one) & blocks_of(other)
    left = one.minus(other)
    assert blocks_of(*left) == blocks_of(one) - blocks_of(other)
    assert len(left) <= 2
    assert all(left), "no run is empty"
    assert list(left) == sorted(left)


@given(runs, runs)
def test_a_run_contains_what_is_not_empty_and_a_subset(one, other):
    assert one.contains(other) == (bool(other) and blocks_of(other) <= blocks_of(one))


@given(runs)
def test_a_run_has_as_many_blocks_as_it_holds_and_is_false_without_one(run):
    assert run.size == len(blocks_of(run))
    assert bool(run) == (run.size > 0)
    assert {block for block in range(TOTAL + 5) if block in run} == blocks_of(run)


def test_a_run_is_the_pair_of_its_ends():
    run = Blocks(2, 5)
    assert run == (2, 5)
    assert list(run) == [2, 5]
    assert 5 not in run, "the stop is no block of it"
    assert "2" not in run


@given(full)
def test_a_run_is_read_as_it_is_written(run):
    assert Blocks.parse(str(run)) == run


@pytest.mark.parametrize(
    "text", ["", ":", "1", "1:", ":2", "2:2", "3:2", "-1:2", "1:2:3", " 1:2", "1:2\n", "a:b", "٣:٤"]
)
def test_other_texts_are_no_run(text):
    with pytest.raises(ValueError, match="is not A:B with 0 <= A < B"):
        Blocks.parse(text)


@given(st.lists(full, max_size=8))
def test_coverage_counts_the_runs_of_each_block(held):
    counts = coverage(held, TOTAL)
    assert counts == tuple(sum(block in run for run in held) for block in range(TOTAL))


@given(st.lists(full, max_size=8), full)
def test_gaps_are_the_blocks_that_nobody_holds_in_runs_that_do_not_touch(held, whole):
    found = gaps(held, whole)
    assert blocks_of(*found) == blocks_of(whole) - blocks_of(*held)
    assert all(found)
    assert all(before.stop < after.start for before, after in pairwise(found))


@given(st.lists(runs, max_size=8))
def test_merged_runs_hold_the_same_blocks_and_do_not_touch(held):
    found = merged(held)
    assert blocks_of(*found) == blocks_of(*held)
    assert all(before.stop < after.start for before, after in pairwise(found))
