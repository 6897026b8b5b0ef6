"""A record's `queue`: what a step waits, in times of its own computing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.serving.executor.waits import REMEMBERED_SECONDS, Waits


def under_load(waited: float, computed: float, until: float = 60.0, every: float = 0.05) -> Waits:
    waits, now = Waits(), 0.0
    while now < until:
        now += every
        waits.observe(waited, computed, 1, now)
    return waits


def test_nothing_is_known_of_who_has_computed_nothing():
    assert Waits().queue(5.0) == 0.0


def test_steps_that_wait_three_times_as_long_as_they_are_computed():
    assert under_load(0.03, 0.01).queue(60.0) == pytest.approx(3.0, rel=0.01)


def test_steps_that_do_not_wait():
    assert under_load(0.0, 0.01).queue(60.0) == 0.0


def test_one_step_that_waited_is_chance():
    waits = Waits()
    waits.observe(0.03, 0.01, 1, 0.0)
    assert waits.queue(0.0) == pytest.approx(1.5)  # beside the one that is reckoned in always


def test_many_steps_of_one_batch_count_like_as_many():
    one, many = Waits(), Waits()
    many.observe(0.04, 0.08, 8, 0.0)
    for _ in range(8):
        one.observe(0.005, 0.01, 1, 0.0)
    assert one.queue(1.0) == pytest.approx(many.queue(1.0))


def test_when_nobody_comes_any_more_there_is_no_wait():
    waits = under_load(0.03, 0.01)
    assert waits.queue(60.0 + REMEMBERED_SECONDS) > 2.5
    assert waits.queue(60.0 + 15 * REMEMBERED_SECONDS) < 0.01


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1e-6, 10), st.integers(1, 50)), max_size=30))
def test_it_never_exceeds_the_longest_wait(steps):
    waits, now = Waits(), 0.0
    for waited, computed, count in steps:
        now += waited
        waits.observe(waited * count, computed * count, count, now)
    most = max((waited / computed for waited, computed, _ in steps), default=0.0)
    assert 0.0 <= waits.queue(now) <= most * (1 + 1e-9)
