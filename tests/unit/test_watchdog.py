"""When hops are asked for a late step, and which of them has failed."""

from __future__ import annotations

import pytest

from client.session.hop_state import HopState
from client.session.repair.lost_time import LostTime
from client.session.repair.watchdog import (
    ASK_AT,
    DEADLINE_FACTOR,
    MAX_HOP_SECONDS,
    MIN_HOP_SECONDS,
    Findings,
    Watchdog,
)
from client.session.steps import Pending
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.messages.contract import REPLAY_TOKENS, StepRange
from tensor_codec.messages.session import Here


def watchdog(*recent: float) -> Watchdog:
    """One that has seen steps of these seconds."""
    lost = LostTime()
    lost.recent.extend(recent)
    return Watchdog(lost)


def some_hops(count: int = 3) -> list[HopState]:
    return [HopState(Hop(PeerId("ABC"[i]), 2 * i, 2 * i + 2), "float32", "fp32") for i in range(count)]


def late_step(dog: Watchdog, *, position: int = 0, tokens: int = 1) -> Pending:
    pending = Pending(7, StepRange(position, tokens), b"", False, 0.0)
    pending.start(0.0, dog.first_look(0.0))
    return pending


def look(dog, pending, hops, now, *, refilling=False, expected=0.1) -> Findings:
    return dog.look(pending, hops, now, refilling=refilling, expected=expected)


# A hop's deadline is four times the 95th percentile of the recent steps, from 1 to 30 s.


def test_a_hops_deadline_is_a_multiple_of_the_slow_steps_and_not_of_the_quickest():
    recent = [1.0] * 15 + [2.0] * 5
    assert watchdog(*recent).hop_seconds() == DEADLINE_FACTOR * 2.0 == 8.0
    assert watchdog(*[0.5] * 99, 25.0).hop_seconds() == 2.0, "one step alone says nothing"
    assert watchdog(5.0, 1.0, 1.0, 1.0).hop_seconds() == 4.0


def test_a_hops_deadline_has_bounds():
    assert watchdog().hop_seconds() == MIN_HOP_SECONDS
    assert watchdog(0.001).hop_seconds() == MIN_HOP_SECONDS
    assert watchdog(100.0).hop_seconds() == MAX_HOP_SECONDS


# Hops are asked after a quarter of the deadline, and none is silent before the rest has passed.


def test_hops_are_asked_first_and_given_up_at_the_deadline():
    dog, hops = watchdog(1.0), some_hops()
    pending = late_step(dog)
    assert pending.watch.look_at == ASK_AT * 4.0
    assert look(dog, pending, hops, 1.0).ask == hops
    assert pending.watch.look_at == 4.0
    for hop in hops:
        hop.ask(1.0)
    for hop in hops[:2]:
        hop.answer(Here(0, 0))
    assert look(dog, pending, hops, 3.9) == Findings()
    (silent,) = look(dog, pending, hops, 4.0).silent
    assert silent == (hops[2], 4.0)


def test_a_hop_that_was_given_up_for_silence_has_twice_the_time_after_each_fault():
    dog = watchdog()
    for fault in range(8):
        (hop,) = some_hops(1)
        pending = late_step(dog)
        look(dog, pending, [hop], 0.25)
        hop.ask(0.25)
        patience = min(0.75 * 2 ** min(fault, 5), MAX_HOP_SECONDS)
        assert look(dog, pending, [hop], 0.25 + 0.98 * patience).silent == ()
        assert [each for each, _ in look(dog, pending, [hop], 0.25 + patience).silent] == [hop]


# A step that makes progress is waited for; one that makes none is lost, or waits at a busy hop.


def answered(dog, pending, hops, now, answers, **how) -> Findings:
    """All hops are asked, answer at once, and the answers are looked at."""
    look(dog, pending, hops, now, **how)
    for hop, here in zip(hops, answers, strict=True):
        hop.ask(now)
        hop.answer(here)
    return look(dog, pending, hops, now + 1.0, **how)


def test_a_step_that_gets_from_hop_to_hop_is_waited_for():
    dog, hops = watchdog(1.0), some_hops()
    pending = late_step(dog)
    before, after = Here(4, 0, 6), Here(5, 0, 7)
    assert answered(dog, pending, hops, 1.0, [before, before, before]) == Findings()
    assert answered(dog, pending, hops, 5.0, [after, before, before]) == Findings()
    assert answered(dog, pending, hops, 9.0, [after, after, before]) == Findings()


def test_a_step_that_no_hop_has_and_that_makes_no_progress_was_lost_at_the_first_without_it():
    dog, hops = watchdog(1.0), some_hops()
    pending = late_step(dog)
    answers = [Here(5, 0, 7), Here(4, 0, 6), Here(4, 0, 6)]
    answered(dog, pending, hops, 1.0, answers)
    found = answered(dog, pending, hops, 5.0, answers)
    assert (found.stuck, found.busy) == (hops[1], None)


@pytest.mark.parametrize(
    ("position", "tokens", "refilling", "patience"),
    [(0, 1, False, 4.0), (0, 11, False, 10.0), (11, 1, True, 10.0), (11, 1, False, 4.0)],
)
def test_a_busy_hop_has_as_long_as_its_positions_may_take(position, tokens, refilling, patience):
    for waited, left in ((patience - 0.1, False), (patience + 0.1, True)):
        dog, hops = watchdog(1.0), some_hops(1)
        pending = late_step(dog, position=position, tokens=tokens)
        answered(dog, pending, hops, 1.0, [Here(4, 1, 6)], refilling=refilling)
        moved_at = pending.watch.moved_at
        found = answered(dog, pending, hops, moved_at + waited - 1.0, [Here(4, 1, 6)], refilling=refilling)
        assert found.busy is (hops[0] if left else None)
        assert found.stuck is None


def test_a_busy_hop_without_progress_for_as_long_as_any_hop_may_take_is_lost():
    dog, hops = watchdog(1.0), some_hops(1)
    pending = late_step(dog, tokens=REPLAY_TOKENS)
    answered(dog, pending, hops, 1.0, [Here(4, 1, 6)])
    found = answered(dog, pending, hops, pending.watch.moved_at + MAX_HOP_SECONDS, [Here(4, 1, 6)])
    assert found.stuck is hops[0]


def test_a_replay_that_makes_progress_is_noted_as_the_reason_to_wait():
    dog, hops = watchdog(1.0), some_hops(1)
    pending = late_step(dog, position=300)
    answered(dog, pending, hops, 1.0, [Here(0, 1)], refilling=True)
    assert pending.watch.refilled_at < 0
    answered(dog, pending, hops, 5.0, [Here(256, 1)], refilling=True)
    assert pending.watch.refilled_at == 6.0


# Only growth up to what was sent is progress, and a hop does not hold a step for ever.


def stall(dog, pending, hops, answers, *, until=1000.0, **how) -> tuple[float, Findings]:
    """The time at which a hop is left that gives these answers, one after the other, each second."""
    now = 1.0
    for answer in answers:
        found = answered(dog, pending, hops, now, answer, **how)
        now = pending.watch.look_at
        if found != Findings():
            return now, found
        assert now < until
    raise AssertionError("it was not left")


@pytest.mark.parametrize("length", [lambda number: number, lambda number: 40 - number % 7])
def test_a_hop_that_says_other_positions_each_time_is_left_as_one_that_says_nothing_new(length):
    dog, hops = watchdog(1.0), some_hops(1)
    pending = late_step(dog, position=40)
    lies = ([Here(length(number), 1, 6)] for number in range(1000))
    now, found = stall(dog, pending, hops, lies)
    assert found.busy is hops[0] or found.stuck is hops[0]
    assert now <= 25.0


def test_a_hop_that_crawls_is_left_after_twice_the_time_that_its_positions_may_take():
    dog, hops = watchdog(), some_hops(1)
    pending = late_step(dog, tokens=11)
    lies = ([Here(number, 1)] for number in range(1000))
    _, found = stall(dog, pending, hops, lies, expected=0.05)
    assert found.busy is hops[0]
    assert 2 * MIN_HOP_SECONDS < found.held <= 3 * MIN_HOP_SECONDS
    dog = watchdog(1.0)
    pending = late_step(dog, tokens=11)  # 4 x 1 s x (1 + 10 x 0.15)
    for second in range(1, 9):
        assert answered(dog, pending, hops, float(second), [Here(second, 1)]) == Findings()


def test_a_hop_that_is_further_each_time_has_a_step_for_thirty_seconds_at_most():
    dog, hops = watchdog(5.0), some_hops(1)
    pending = late_step(dog, position=4000)
    pending.watch.start(0.0, 1.0)
    lies = ([Here(number, 1, number)] for number in range(1000))
    now, found = stall(dog, pending, hops, lies)
    assert found.busy is hops[0] or found.stuck is hops[0]
    assert now <= MAX_HOP_SECONDS + 2 * dog.hop_seconds()


def test_a_replay_has_as_long_again_for_each_of_its_parts_and_no_longer():
    dog, hops = watchdog(5.0), some_hops(1)
    pending = late_step(dog, position=3 * 256)
    lies = ([Here(number, 1)] for number in range(1000))
    now, found = stall(dog, pending, hops, lies, refilling=True)
    assert found.busy is hops[0] or found.stuck is hops[0]
    assert now <= 4 * MAX_HOP_SECONDS + 2 * dog.hop_seconds()
    dog, hops = watchdog(5.0), some_hops(1)
    pending = late_step(dog, position=3 * 256)
    for part in range(4):
        assert (
            answered(dog, pending, hops, 1 + 25.0 * part, [Here(256 * part, 1)], refilling=True) == Findings()
        )


def test_of_a_hop_that_has_passed_a_step_on_by_its_own_word_and_one_that_has_nothing_either_may_lie():
    dog, hops = watchdog(1.0), some_hops()
    pending = late_step(dog)
    answers = [Here(5, 0, 7), Here(4, 0, 6), Here(4, 0, 6)]
    answered(dog, pending, hops, 1.0, answers)
    found = answered(dog, pending, hops, 5.0, answers)
    assert (found.stuck, found.before) == (hops[1], hops[0])
    dog, hops = watchdog(1.0), some_hops()
    pending = late_step(dog)
    answers = [Here(4, 0, 6)] * 3
    answered(dog, pending, hops, 1.0, answers)
    assert answered(dog, pending, hops, 5.0, answers).before is None, "the client itself sent it"
    dog, hops = watchdog(1.0), some_hops()
    pending = late_step(dog)
    answers = [Here(5, 0, 7)] * 3
    answered(dog, pending, hops, 1.0, answers)
    found = answered(dog, pending, hops, 5.0, answers)
    assert (found.stuck, found.before) == (hops[2], None), "the client has no answer of the last one"
