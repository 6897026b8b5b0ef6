"""Which decode steps the event loop computes itself."""

from __future__ import annotations

from node.serving.executor.lone_steps import APART_SECONDS, LONGEST_SECONDS, LOOP_SECONDS, LoneSteps, is_short

A, B = b"a" * 16, b"b" * 16


def test_a_session_that_decodes_alone_is_alone_from_its_first_step_on():
    steps = LoneSteps()
    assert all(steps.is_alone(A, 0.01 * number) for number in range(5))


def test_sessions_that_decode_in_turn_are_never_alone():
    steps = LoneSteps()
    steps.is_alone(A, 0.0)
    assert not any(steps.is_alone((A, B)[number % 2], 0.01 * number) for number in range(1, 9))


def test_a_session_is_alone_again_at_the_second_step_after_another_one_has_gone():
    steps = LoneSteps()
    assert [steps.is_alone(session, 0.0) for session in (A, B, A, A)] == [True, False, False, True]


def test_steps_of_two_sessions_are_alone_where_they_are_far_apart():
    steps = LoneSteps()
    steps.is_alone(A, 0.0)
    assert not steps.is_alone(B, APART_SECONDS)
    assert steps.is_alone(A, 2.5 * APART_SECONDS)


def test_a_step_that_waited_while_the_loop_computed_another_one_is_not_alone():
    steps = LoneSteps()
    assert steps.is_alone(A, 0.0)
    steps.computed(0.01)
    assert not steps.is_alone(A, 0.01 + LOOP_SECONDS / 2)
    assert steps.is_alone(A, 0.01 + 2 * LOOP_SECONDS)


def test_a_step_is_short_up_to_a_time_that_the_loop_can_be_away():
    assert is_short(LONGEST_SECONDS / 10, 9)
    assert not is_short(LONGEST_SECONDS / 10, 11)
