"""Reports of hops about hops, and the pauses before a hop is asked again."""

from __future__ import annotations

from client.chains import accusations
from client.chains.accusations import REMEMBERED_SECONDS, Accusations
from client.chains.avoided_peers import AVOID_SECONDS, AvoidedPeers
from client.session.repair.pauses import ENDINGS_BORNE, MAX_PAUSE_SECONDS, PAUSE_SECONDS, Pauses
from routing.names import PeerId

A, B, C, D = map(PeerId, "ABCD")


def test_the_second_peer_that_is_reported_within_ten_minutes_makes_the_reporter_suspect():
    known = Accusations()
    assert not known.accuse(A, B, 0.0)
    assert not known.accuse(A, B, 1.0), "the same one again says nothing new"
    assert not known.accuse(C, B, 1.0), "another reporter"
    assert known.accuse(A, D, 2.0)
    assert not known.accuse(A, C, 2.0 + REMEMBERED_SECONDS)


def test_reports_about_a_peer_that_failed_are_forgotten():
    known = Accusations()
    known.accuse(A, B, 0.0)
    known.accuse(C, B, 0.0)
    known.confirm(B)
    assert not known.accuse(A, D, 1.0)
    assert known._of == {A: {D: 1.0}}


def test_a_bounded_number_of_reporters_is_remembered():
    known = Accusations()
    for number in range(2 * accusations.MAX_ACCUSERS):
        known.accuse(PeerId(str(number)), A, 0.0)
    assert len(known._of) == accusations.MAX_ACCUSERS


def test_half_a_fault_is_avoided_for_less_and_two_halves_as_one():
    avoided = AvoidedPeers()
    avoided.fault(A, 0.0, share=0.5)
    avoided.fault(B, 0.0)
    half = AVOID_SECONDS / 2**0.5
    assert avoided.avoided(half - 0.1) == {A, B}
    assert avoided.avoided(half + 0.1) == {B}
    avoided.fault(A, half + 1.0, share=0.5)
    assert avoided.avoided(half + 0.9 + AVOID_SECONDS) == {A}


def test_openings_at_one_peer_come_later_and_later_until_a_step_is_answered():
    pauses, now = Pauses(), 0.0
    waits = []
    for _ in range(9):
        at = pauses.next_opening(A, now)
        waits.append(at - now)
        now = at
    doubled = [PAUSE_SECONDS * 2**times for times in range(8)]
    assert [round(wait, 6) for wait in waits] == [0.0, *(min(pause, MAX_PAUSE_SECONDS) for pause in doubled)]
    assert pauses.next_opening(B, now) == now, "another peer"
    assert pauses.next_opening(A, now + 5.0) == now + 5.0, "long after"
    pauses.answered()
    assert pauses.next_opening(A, now) == now


def test_a_peer_may_end_sessions_so_many_times_without_an_answer_between():
    pauses = Pauses()
    assert [pauses.ended(A) for _ in range(ENDINGS_BORNE + 1)] == [False] * ENDINGS_BORNE + [True]
    pauses.answered()
    assert not pauses.ended(A)
