"""A session looks for a better chain when it has lost time, not when one step took long."""

from hypothesis import given
from hypothesis import strategies as st

from client.session.repair.lost_time import MIN_STEPS, SUSPICION, LostTime

USUAL = 0.1


def after(*steps: float, expected: float = USUAL) -> LostTime:
    lost = LostTime()
    for seconds in steps:
        lost.took(seconds, expected)
    return lost


def usual_steps(count: int = 20) -> list[float]:
    return [USUAL] * count


def test_one_long_step_is_chance():
    assert not after(*usual_steps(), 5 * USUAL).too_much(length=500, hops=3)


def test_a_chain_that_became_ten_times_slower_is_doubted_at_once():
    assert after(*usual_steps(), 10 * USUAL).too_much(length=500, hops=3)


def test_one_of_three_hops_that_became_ten_times_slower_is_doubted_after_three_steps():
    slow = 3.9 * USUAL  # two thirds as before and one third ten times
    assert not after(*usual_steps(), slow, slow).too_much(length=500, hops=3)
    assert after(*usual_steps(), slow, slow, slow).too_much(length=500, hops=3)


def test_what_costs_little_to_leave_is_left_sooner():
    steps = [*usual_steps(), 4 * USUAL]
    assert after(*steps).too_much(length=4, hops=3)
    assert not after(*steps).too_much(length=500, hops=3)


def test_quick_steps_make_up_for_slow_ones():
    mixed = [3 * USUAL, USUAL] * 30
    assert not after(*usual_steps(40), *mixed).too_much(length=500, hops=3)


def test_a_chain_that_was_slow_from_its_first_step_is_measured_by_what_it_promised():
    assert after(*[10 * USUAL] * MIN_STEPS).too_much(length=4, hops=1)
    assert not after(*[10 * USUAL] * MIN_STEPS, expected=10 * USUAL).too_much(length=4, hops=1)


def test_too_few_steps_say_nothing():
    assert not after(*[10 * USUAL] * (MIN_STEPS - 1)).too_much(length=0, hops=1)
    assert LostTime().usual() is None


def test_what_was_forgotten_does_not_count_again():
    lost = after(*usual_steps(), 10 * USUAL)
    lost.forget()
    assert not lost.too_much(length=0, hops=1)


@given(st.lists(st.floats(USUAL / 2, SUSPICION * USUAL / 2), min_size=MIN_STEPS, max_size=200))
def test_steps_that_vary_by_no_more_than_is_usual_never_make_a_session_look(steps):
    lost = LostTime()
    for seconds in steps:
        lost.took(seconds, USUAL)
        assert not lost.too_much(length=0, hops=1) or max(steps) > SUSPICION * min(steps)
