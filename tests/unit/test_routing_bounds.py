"""Answers, measurements and exchanges at their edges: the last moment of a figure, the largest frame."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from routing.chains.load_sharing import QUEUE_PENALTY, queue_markup, queue_price, rendezvous
from routing.chains.measured import (
    DOUBTED,
    DOUBTED_HALF_SECONDS,
    HALF_SECONDS,
    HALVES_KEPT,
    LOCAL_SECONDS,
    NEWEST,
    Measured,
    Seen,
    admitted,
)
from routing.view.answers import FAILURES, FRESH_SECONDS, GRACE_SECONDS, Answers
from routing.view.exchange import (
    DIGEST_ENTRIES,
    RECORDS_BYTES,
    Digest,
    Records,
    decode,
    encode_digest,
    encode_records,
)
from routing.view.records import MAX_RTT_SECONDS, MAX_SEQ, MAX_TTL_SECONDS, MIN_RATE_SECONDS
from routing.view.view import Arrival
from tensor_codec.errors import MessageError
from tests.unit.test_view import PEERS, span

A, B, C = PEERS[:3]


# What a client has measured.


def test_a_measurement_weighs_half_after_its_half_life_and_longer_where_the_peer_is_doubted():
    trusted, doubted = Seen(1.0, DOUBTED, 100.0), Seen(1.0, DOUBTED + 0.1, 100.0)
    assert (trusted.doubted, doubted.doubted) == (False, True)
    assert trusted.weight(99.0) == trusted.weight(100.0) == 1.0
    assert trusted.weight(100.0 + HALF_SECONDS) == doubted.weight(100.0 + DOUBTED_HALF_SECONDS) == 0.5
    assert trusted.weight(100.0 + 2 * HALF_SECONDS) == 0.25


def test_a_measurement_replaces_a_claim_and_moves_by_the_weight_of_the_newest_step():
    measured, claims = Measured(), span(0, seconds_per_block=0.01, queue=1.0)
    measured.learn(A, 0.04, claims, 0.0)
    assert measured.decode[A].ratio == pytest.approx(2.0)
    assert replace(measured.decode[A], ratio=2.0) == Seen(0.04, 2.0, 0.0)
    measured.learn(A, 0.02, claims, 0.0)
    assert measured.decode[A].seconds == pytest.approx(NEWEST * 0.02 + (1 - NEWEST) * 0.04)
    measured.learn(A, 0.5, None, 0.0)
    assert measured.decode[A].ratio == pytest.approx(0.036 / 0.02), (
        "of a peer that has left the last ratio stays"
    )
    assert measured.prefill == {}


def test_a_prefill_is_compared_with_the_claimed_prefill():
    measured = Measured()
    measured.learn(
        A, 0.006, span(0, seconds_per_block=1.0, prefill_seconds_per_token=0.002), 5.0, prefill=True
    )
    assert measured.prefill[A].ratio == pytest.approx(3.0)
    assert replace(measured.prefill[A], ratio=3.0) == Seen(0.006, 3.0, 5.0)
    measured.learn(B, 0.006, span(1, seconds_per_block=0.0), 5.0)
    assert measured.decode[B].ratio == 1.0
    measured.learn(C, 0.0, None, 5.0)
    assert measured.decode[C] == Seen(MIN_RATE_SECONDS, 1.0, 5.0)


def test_a_figure_is_forgotten_after_its_half_lives_when_another_peer_is_measured():
    measured = Measured()
    measured.learn(A, 0.01, None, 0.0)
    measured.learn(B, 0.01, None, HALVES_KEPT * HALF_SECONDS)
    assert set(measured.decode) == {A, B}
    measured.learn(A, 0.01, None, 1.0)
    measured.learn(C, 0.01, None, HALVES_KEPT * HALF_SECONDS + 1.5, prefill=True)
    assert set(measured.decode) == {B}


def test_a_new_measurement_is_the_rate_and_an_old_one_the_claim():
    spans = [span(0, seconds_per_block=0.01), span(1, seconds_per_block=0.01)]
    measured = Measured()
    measured.learn(A, 0.02, spans[0], 0.0)
    assert measured.rates(spans, 0.0) == {A: pytest.approx(0.02)}
    assert measured.rates(spans, HALF_SECONDS) == {A: pytest.approx(math.sqrt(0.02 * 0.01))}
    assert measured.rates(spans, 100 * HALF_SECONDS) == {A: pytest.approx(0.01)}
    assert measured.rates(spans, 0.0, positions=4) == {}, "a trusted peer's prefill is left to its claim"


def test_a_claimed_queue_makes_a_peer_slower_than_measured_and_none_makes_it_no_faster():
    measured = Measured()
    measured.learn(A, 0.02, span(0, seconds_per_block=0.01, queue=1.0), 0.0)
    assert measured.rates([span(0, seconds_per_block=0.01)], 0.0) == {A: pytest.approx(0.02)}
    assert measured.rates([span(0, seconds_per_block=0.01, queue=4.0)], 0.0) == {A: pytest.approx(0.05)}


def test_a_doubted_peers_other_claims_count_as_slower_too():
    spans = [span(0, seconds_per_block=0.01, prefill_seconds_per_token=0.001)]
    measured = Measured()
    measured.learn(A, 0.05, spans[0], 0.0)
    assert measured.rates(spans, 0.0, positions=3) == {A: pytest.approx(3 * 0.001 * 5)}
    assert measured.rates(spans, DOUBTED_HALF_SECONDS, positions=3) == {A: pytest.approx(3 * 0.001 * 5**0.5)}


def test_unexplained_time_is_charged_to_the_fastest_hops_until_they_are_as_slow_as_the_next():
    total = 10.0 + LOCAL_SECONDS
    assert admitted([1.0, 2.0, 4.0], [1, 1, 1], total, 0.0) == pytest.approx([3.0, 3.0, 4.0])
    assert admitted([1.0, 4.0, 4.0], [1, 2, 2], total + 3.0, 0.25) == pytest.approx([2.5, 5.0, 5.0])
    assert admitted([1.0, 2.0], [1, 1], 13.0 + LOCAL_SECONDS, 0.0) == pytest.approx([6.5, 6.5])
    assert admitted([1.0, 4.0], [2, 2], 10.0 + LOCAL_SECONDS, 0.0) == pytest.approx([5.0, 5.0])


def test_a_rest_that_is_small_or_that_the_network_explains_is_charged_to_nobody():
    held = [3.0, 3.0]
    assert admitted(held, [1, 1], 8.0, 0.0) is held  # 2 s less the client's own are below a quarter
    assert admitted(held, [1, 1], 8.02, 0.0) != held
    assert admitted(held, [1, 1], 10.0, 1.0) is held
    assert admitted(held, [1], 100.0, 0.0) is held, "of hops that do not say what they held nothing is known"


def test_a_queue_costs_four_times_its_wait():
    assert (queue_price(0.0), queue_price(2.0)) == (1.0, 1.0 + 2 * QUEUE_PENALTY)
    assert queue_markup([span(0), span(1, queue=1.0)]) == {A: 1.0, B: (1 + QUEUE_PENALTY) / 2}


def test_a_rendezvous_is_the_same_for_the_same_seed_and_stays_while_others_come():
    few = rendezvous("seed", PEERS[:20], 5)
    assert (len(few), rendezvous("seed", reversed(PEERS[:20]), 5)) == (5, few)
    assert rendezvous("other", PEERS[:20], 5) != few
    more = rendezvous("seed", PEERS, 5)
    assert [peer for peer in more if peer in PEERS[:20]] == [peer for peer in few if peer in more]
    assert sorted(rendezvous("seed", PEERS[:3], 5)) == sorted(PEERS[:3])


# Who answers.


def test_an_answer_counts_for_a_minute():
    answers = Answers()
    assert answers.is_due(A, 0.0)
    answers.ask(A, 0.0)
    assert (answers.under_way(A), answers.is_due(A, 1000.0)) == (0.0, False)
    answers.answered(A, 0.1, 1.0)
    answers.done(A)
    assert answers.under_way(A) is None
    assert answers.has_answered(A, FRESH_SECONDS + 0.9)
    assert not answers.has_answered(A, FRESH_SECONDS + 1.0)
    assert not answers.is_due(A, FRESH_SECONDS - 0.1)
    assert answers.is_due(A, FRESH_SECONDS)


def test_the_shortest_round_trip_of_a_minute_counts_below_the_largest():
    answers = Answers()
    for when, rtt in ((0.0, 0.1), (10.0, 0.3), (20.0, 0.2)):
        answers.answered(A, rtt, when)
    answers.answered(B, MAX_RTT_SECONDS, 20.0)
    assert answers.rtts(20.0) == {A: 0.1}
    assert answers.rtts(FRESH_SECONDS) == {A: 0.2}
    assert answers.rtts(20.0 + FRESH_SECONDS - 0.1) == {A: 0.2}
    assert answers.rtts(20.0 + FRESH_SECONDS) == {}
    assert answers.rtts(24.9, seconds=5.0) == {A: 0.1}
    assert answers.rtts(25.0, seconds=5.0) == {}
    assert answers.rtts(100.0, seconds=90.0) == {A: 0.2}, "the newest, where none is of the last minute"


def test_a_peer_that_never_answered_is_silent_at_its_first_failure_and_another_at_its_second():
    answers = Answers()
    answers.answered(A, 0.1, 0.0)
    for failures in range(1, FAILURES + 1):
        answers.failed(A, 1.0)
        assert (A in answers.silent()) == (failures == FAILURES)
    answers.failed(B, 1.0)
    assert answers.silent() == {A, B}
    answers.answered(A, 0.1, 2.0)
    answers.failed(A, 3.0)
    assert answers.silent() == {B}, "an answer makes the count begin anew"
    assert answers.unknown([A, B, C], 3.0) == [C]


def test_a_first_question_is_late_after_the_grace_and_silent_when_overdue():
    answers = Answers()
    answers.ask(A, 1.0)
    assert answers.late(1.0 + GRACE_SECONDS - 0.001) == frozenset()
    assert answers.late(1.0 + GRACE_SECONDS) == {A}
    assert answers.wait_for([A, B], 1.5, 2.0) == pytest.approx(1.5)
    assert answers.wait_for([B], 1.5, 2.0) == 0.0
    answers.overdue(A, 3.0)
    assert (answers.silent(), answers.late(3.0)) == ({A}, frozenset())
    answers.answered(B, 0.1, 3.0)
    answers.ask(B, 3.0)
    answers.overdue(B, 5.0)
    assert answers.silent() == {A}
    assert answers.late(5.0) == frozenset()


def test_a_withdrawn_question_is_due_again():
    answers = Answers()
    answers.ask(A, 1.0)
    answers.withdrawn(A)
    answers.withdrawn(B)
    answers.done(B)
    assert (answers.under_way(A), answers.is_due(A, 1.0), answers.under_way(B)) == (None, True, None)


def test_peers_that_left_and_long_silent_ones_are_forgotten_unless_they_are_being_asked():
    answers = Answers()
    for peer in (A, B, C):
        answers.ask(peer, 1.0)
        answers.failed(peer, 1.0)
    answers.done(A)
    answers.done(B)
    answers.forget([A, B], FRESH_SECONDS)
    assert answers.silent() == {A, B, C}
    answers.forget([A], FRESH_SECONDS + 0.5)
    assert answers.silent() == {A, C}
    answers.forget([A], FRESH_SECONDS + 1.0)
    assert answers.silent() == {C}


# What peers tell each other.


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (1, [1]), (DIGEST_ENTRIES, [DIGEST_ENTRIES])])
def test_a_digest_is_one_frame_up_to_its_largest(count, sizes):
    seqs = {index.to_bytes(32, "big"): index for index in range(count)}
    frames = [decode(frame) for frame in encode_digest(seqs, ask=True)]
    assert [(len(frame.seqs), frame.last, frame.ask) for frame in frames] == [(sizes[0], True, True)]
    assert frames[0].seqs == seqs


def test_one_entry_more_is_another_frame_and_only_the_second_is_the_last():
    seqs = {index.to_bytes(32, "big"): index for index in range(DIGEST_ENTRIES + 1)}
    first, second = (decode(frame) for frame in encode_digest(seqs, ask=False))
    assert isinstance(first, Digest)
    assert isinstance(second, Digest)
    assert [(len(one.seqs), one.last, one.ask) for one in (first, second)] == [
        (DIGEST_ENTRIES, False, False),
        (1, True, False),
    ]


def test_a_digest_with_a_seq_beyond_the_largest_or_too_many_entries_is_refused():
    (frame,) = encode_digest({bytes(32): MAX_SEQ}, ask=True)
    assert decode(frame).seqs == {bytes(32): MAX_SEQ}
    (frame,) = encode_digest({bytes(32): MAX_SEQ + 1}, ask=True)
    with pytest.raises(MessageError, match="a digest names a peer twice, or a seq above"):
        decode(frame)
    (empty,) = encode_digest({}, ask=True)
    for body in (bytes(39), bytes(80), bytes(40 * (DIGEST_ENTRIES + 1))):
        with pytest.raises(MessageError):
            decode(empty + body)


def passed_on(size: int, age: float = 0.0) -> Arrival:
    return Arrival(span(0), bytes(size), age)


def test_records_share_a_frame_up_to_its_largest_size():
    half = RECORDS_BYTES // 2 - 6
    (frame,) = encode_records([passed_on(half), passed_on(half)])
    assert [len(wire) for wire, _ in decode(frame).items] == [half, half]
    frames = list(encode_records([passed_on(half), passed_on(half + 1)]))
    assert [[len(wire) for wire, _ in decode(one).items] for one in frames] == [[half], [half + 1]]
    assert list(encode_records([])) == []


def test_an_age_is_rounded_up_to_a_millisecond_and_cut_to_the_longest_ttl():
    (frame,) = encode_records([passed_on(5, 0.0101), passed_on(5, 1e9)])
    found = decode(frame)
    assert isinstance(found, Records)
    assert [age for _, age in found.items] == [0.011, MAX_TTL_SECONDS]


def test_a_frame_of_records_holds_whole_records_and_nothing_else():
    (frame,) = encode_records([passed_on(5)])
    assert len(decode(frame).items) == 1
    for wrong in (frame[:-1], frame + b"x", frame + bytes(5), frame + bytes(6), frame[:-11]):
        with pytest.raises(MessageError):
            decode(wrong)
    (full,) = encode_records([passed_on(RECORDS_BYTES - 6)])
    assert len(decode(full).items[0][0]) == RECORDS_BYTES - 6
    (large,) = encode_records([passed_on(RECORDS_BYTES - 5)])
    with pytest.raises(MessageError, match="bytes of records, allowed are 1 to"):
        decode(large)
