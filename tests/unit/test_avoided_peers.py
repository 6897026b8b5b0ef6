"""Whom a client avoids, and for how long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.chains.avoided_peers import AVOID_SECONDS, MAX_AVOID_SECONDS, AvoidedPeers, busy_seconds
from routing.names import PeerId

A, B = PeerId("a"), PeerId("b")


def avoided_until(blame: AvoidedPeers, peer: PeerId, now: float) -> float:
    """The time from which the peer is used again; whole seconds."""
    return next(float(at) for at in range(int(now), int(now) + 10_000) if peer not in blame.avoided(at))


def test_nobody_is_avoided_who_did_nothing():
    assert AvoidedPeers().avoided(0.0) == frozenset()


def test_the_time_doubles_with_every_fault_up_to_an_hour():
    blame, now, times = AvoidedPeers(), 0.0, []
    for _ in range(12):
        blame.fault(A, now)
        times.append(avoided_until(blame, A, now) - now)
        now += times[-1]
    assert times == [15, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]


def test_an_hour_is_the_most_after_any_number_of_faults():
    blame, now = AvoidedPeers(), 0.0
    for _ in range(2000):
        blame.fault(A, now)
        now += MAX_AVOID_SECONDS
    blame.fault(A, now)
    assert avoided_until(blame, A, now) == now + MAX_AVOID_SECONDS


def test_a_peer_that_fails_while_it_is_avoided_is_not_avoided_for_longer():
    """Where there is nobody else it is tried all the time, and one day it will be back."""
    blame = AvoidedPeers()
    for tenth in range(140):
        blame.fault(A, tenth / 10)
    assert avoided_until(blame, A, 14.0) == AVOID_SECONDS
    blame.fault(A, AVOID_SECONDS)
    assert avoided_until(blame, A, AVOID_SECONDS) == 3 * AVOID_SECONDS


def test_those_that_will_be_forgiven_first_come_first():
    blame = AvoidedPeers()
    blame.fault(A, 5.0)
    blame.refused(B, 3.0, 5.0)
    assert blame.soonest_first(6.0) == [B, A]
    assert blame.soonest_first(8.5) == [A]


def test_a_fault_concerns_its_peer_alone():
    blame = AvoidedPeers()
    blame.fault(A, 0.0)
    assert blame.avoided(1.0) == {A}
    blame.fault(B, 10.0)
    assert blame.avoided(11.0) == {A, B}
    assert blame.avoided(AVOID_SECONDS) == {B}


def test_a_refusal_is_heeded_for_as_long_as_it_says():
    blame = AvoidedPeers()
    blame.refused(A, 2.0, 100.0)
    assert A in blame.avoided(101.9)
    assert A not in blame.avoided(102.0)


def test_a_refusal_that_does_not_say_when_to_come_back_counts_like_a_first_fault():
    blame = AvoidedPeers()
    blame.refused(A, None, 0.0)
    assert A in blame.avoided(AVOID_SECONDS - 0.1)
    assert A not in blame.avoided(AVOID_SECONDS)


def test_refusals_are_not_faults():
    blame = AvoidedPeers()
    for _ in range(10):
        blame.refused(A, 1.0, 0.0)
    blame.fault(A, 10.0)
    assert avoided_until(blame, A, 10.0) == 10.0 + AVOID_SECONDS


def test_a_refusal_does_not_shorten_the_time_that_a_fault_has_earned():
    blame = AvoidedPeers()
    blame.fault(A, 0.0)
    blame.fault(A, AVOID_SECONDS)
    blame.refused(A, 1.0, AVOID_SECONDS + 5.0)
    assert A in blame.avoided(3 * AVOID_SECONDS - 1)


def test_a_peer_that_answers_is_forgiven():
    blame = AvoidedPeers()
    for _ in range(6):
        blame.fault(A, 0.0)
    blame.worked(A)
    blame.worked(B)
    assert blame.avoided(0.0) == frozenset()
    blame.fault(A, 100.0)
    assert avoided_until(blame, A, 100.0) == 100.0 + AVOID_SECONDS


def test_a_later_refusal_does_not_shorten_an_earlier_one_and_the_longer_time_counts():
    blame = AvoidedPeers()
    blame.refused(B, 100.0, 0.0)
    blame.refused(A, 20.0, 0.0)
    blame.refused(A, 1.0, 1.0)
    assert A in blame.avoided(19.9)
    assert A not in blame.avoided(20.0)
    blame.fault(A, 0.0)
    assert A in blame.avoided(19.9)
    assert blame.soonest_first(1.0) == [A, B]
    blame.fault(A, 30.0)
    assert A in blame.avoided(30.0 + 2 * AVOID_SECONDS - 0.1)


def test_refusals_that_are_over_are_forgotten():
    blame = AvoidedPeers()
    for number in range(1000):
        blame.refused(PeerId(f"peer {number}"), 1.0, float(number))
    assert len(blame._refused_until) == 1


def test_a_record_forgives_no_peer_that_was_not_gone():
    blame = AvoidedPeers()
    blame.refused(A, 5.0, 0.0)
    blame.seen_online(A, 4.0)
    assert A in blame.avoided(4.5)
    blame.seen_online(B, 4.0)
    assert B not in blame.avoided(4.5)


def test_an_answer_to_another_session_does_not_take_a_refusal_back():
    blame = AvoidedPeers()
    blame.fault(A, 0.0)
    blame.refused(A, 5.0, 0.0)
    blame.worked(A)
    assert A in blame.avoided(4.9)
    assert A not in blame.avoided(5.0)


@given(st.lists(st.tuples(st.sampled_from(["fault", "refused", "worked"]), st.floats(0, 100)), max_size=40))
def test_nobody_is_avoided_for_more_than_an_hour(events):
    blame, now, refused_until = AvoidedPeers(), 0.0, 0.0
    for kind, seconds in events:
        now += seconds
        if kind == "fault":
            blame.fault(A, now)
        elif kind == "refused":
            blame.refused(A, seconds, now)
            refused_until = max(refused_until, now + seconds)
        else:
            blame.worked(A)
            assert (A in blame.avoided(now)) == (now < refused_until)
    assert A not in blame.avoided(now + MAX_AVOID_SECONDS)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 3600.0])
def test_what_is_avoided_is_a_question_of_the_callers_clock(seconds):
    blame = AvoidedPeers()
    blame.fault(A, seconds)
    assert blame.avoided(seconds) == {A}
    assert blame.avoided(seconds + AVOID_SECONDS) == frozenset()


def test_a_peer_that_was_gone_and_says_later_that_it_serves_has_been_started_again():
    blame = AvoidedPeers()
    blame.fault(A, 100.0, gone=True)
    blame.seen_online(A, 99.0)
    blame.seen_online(A, 100.5)
    assert blame.avoided(101.0) == {A}, "it may have said so before it went"
    blame.seen_online(A, 102.0)
    assert blame.avoided(102.0) == frozenset()
    blame.fault(A, 110.0, gone=True)
    assert avoided_until(blame, A, 110.0) == 110.0 + 2 * AVOID_SECONDS


def test_a_peer_that_was_slow_or_wrong_is_not_believed_sooner():
    blame = AvoidedPeers()
    blame.fault(A, 100.0)
    blame.seen_online(A, 110.0)
    assert blame.avoided(111.0) == {A}


def test_a_peer_that_is_always_busy_costs_a_small_part_of_the_time():
    assert busy_seconds(0.1) == AVOID_SECONDS
    for held in (2.0, 4.0, 10.0, 30.0):
        assert held / (held + busy_seconds(held)) <= 0.12
