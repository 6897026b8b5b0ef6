"""Who is unknown, late, known or silent, by what was asked and what came of it."""

import pytest

from routing.names import PeerId
from routing.view.answers import FAILURES, FRESH_SECONDS, GRACE_SECONDS, UNKNOWN, Answers, Liveness

A, B = PeerId("a"), PeerId("b")


def known(at=0.0, rtt=0.01):
    answers = Answers()
    answers.ask(A, at)
    answers.answered(A, rtt, at)
    answers.done(A)
    return answers


def test_who_was_never_asked_is_unknown():
    answers = Answers()
    assert answers.unknown([A, B], 0.0) == [A, B]
    assert answers.is_due(A, 0.0)
    assert not answers.silent()
    assert answers.rtts(0.0) == {}


def test_who_does_not_answer_at_once_is_late_and_then_silent():
    answers = Answers()
    answers.ask(A, 10.0)
    assert answers.late(10.0) == set()
    assert answers.late(10.0 + GRACE_SECONDS) == {A}
    assert answers.unknown([A], 10.0 + GRACE_SECONDS) == [A]
    answers.overdue(A, 11.0)
    assert answers.silent() == {A}
    assert answers.late(11.0) == set()
    answers.answered(A, 1.2, 11.2)  # slow, and there
    answers.done(A)
    assert answers.silent() == set()
    assert answers.rtts(12.0) == {A: 1.2}


def test_the_first_question_without_an_answer_is_enough():
    answers = Answers()
    answers.ask(A, 0.0)
    answers.failed(A, 2.0)
    answers.done(A)
    assert answers.silent() == {A}
    assert answers.unknown([A], 2.0) == []


def test_who_has_answered_before_is_silent_after_two_failures_in_a_row():
    answers = known()
    for failure in range(FAILURES):
        assert answers.silent() == set()
        assert answers.rtts(3.0) == {A: 0.01}
        answers.failed(A, 3.0 + failure)
    assert answers.silent() == {A}
    assert answers.rtts(5.0) == {}
    answers.answered(A, 0.02, 6.0)
    assert answers.silent() == set()
    answers.failed(A, 7.0)
    assert answers.silent() == set()


def test_an_overdue_answer_says_nothing_of_who_has_answered_before():
    answers = known()
    answers.ask(A, 3.0)
    answers.overdue(A, 4.0)
    assert answers.silent() == answers.late(4.0) == set()


def test_a_distance_is_the_shortest_of_a_minute_and_old_where_there_is_no_newer_one():
    answers = known(0.0, 0.02)
    answers.answered(A, 0.01, 10.0)
    answers.answered(A, 0.05, 20.0)
    assert answers.rtts(21.0) == {A: 0.01}
    assert answers.rtts(75.0) == {A: 0.05}
    assert answers.rtts(20.0 + FRESH_SECONDS) == {}
    assert answers.rtts(100.0, 600.0) == {A: 0.05}


def test_nobody_is_asked_again_within_a_minute_whether_he_answered_or_not():
    answers = known()
    answers.ask(B, 0.0)
    assert not answers.is_due(B, 1.0)
    answers.failed(B, 2.0)
    answers.done(B)
    for peer in (A, B):
        assert not answers.is_due(peer, FRESH_SECONDS - 1)
        assert answers.is_due(peer, FRESH_SECONDS + 2)


def test_a_question_that_could_not_go_out_says_nothing():
    answers = Answers()
    answers.ask(A, 0.0)
    answers.withdrawn(A)
    assert answers.is_due(A, 0.1)
    assert answers.silent() == answers.late(1.0) == set()


def test_each_peer_is_waited_for_from_its_own_question_on():
    answers = known()
    answers.ask(B, 10.0)
    assert answers.wait_for([A, B], 10.0, 0.5) == pytest.approx(0.5)
    assert answers.wait_for([A, B], 10.4, 0.5) == pytest.approx(0.1)
    assert answers.wait_for([A, B], 11.0, 0.5) < 0
    assert answers.wait_for([A], 10.0, 0.5) == 0.0


def test_silence_is_forgotten_after_a_minute_and_who_left_at_once():
    answers = Answers()
    for peer in (A, B):
        answers.ask(peer, 0.0)
        answers.failed(peer, 0.0)
        answers.done(peer)
    answers.forget({A}, 1.0)
    assert answers.silent() == {A}
    answers.forget({A}, FRESH_SECONDS + 1)
    assert answers.silent() == set()


def test_of_very_many_peers_those_asked_last_are_kept():
    answers = Answers()
    for number in range(10_000):
        answers.ask(PeerId(f"{number}"), float(number))
        answers.done(PeerId(f"{number}"))
    assert len(answers._peers) <= 4096
    assert not answers.is_due(PeerId("9999"), 9999.0)


def test_a_peer_that_answers_is_told_with_its_distance():
    answers = known(at=10.0, rtt=0.02)
    assert answers.liveness([A, B], 12.0) == {A: Liveness("yes", None, 0.02), B: UNKNOWN}
    answers.ask(B, 12.0)
    assert answers.liveness([B], 12.5) == {B: UNKNOWN}  # it may still answer


def test_silence_is_counted_from_the_last_answer():
    answers = known(at=10.0)
    for failure in range(FAILURES):
        answers.failed(A, 13.0 + failure)
    assert answers.liveness([A], 15.0) == {A: Liveness("silent", 5.0)}
    answers.answered(A, 0.02, 16.0)
    assert answers.liveness([A], 16.0)[A].answers == "yes"


def test_silence_of_a_peer_that_never_answered_is_counted_from_its_first_question():
    answers = Answers()
    for at in (20.0, 23.0, 26.0):
        answers.ask(A, at)
        answers.failed(A, at + 2.0)
        answers.done(A)
    assert answers.liveness([A], 30.0) == {A: Liveness("silent", 10.0)}


def test_an_answer_of_more_than_a_minute_ago_says_nothing():
    assert known().liveness([A], FRESH_SECONDS + 1.0) == {A: UNKNOWN}
