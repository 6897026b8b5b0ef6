"""Requests and tokens for each minute of a key."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.gateway.door.keys import Caller
from client.gateway.door.rates import Rates, duration


def test_a_minute_s_requests_are_taken_at_once_and_then_evenly():
    rates, caller = Rates(), Caller("a", requests_per_minute=60)
    assert all(rates.take(caller, 0, 0.0).wait_seconds == 0 for _ in range(60))
    assert 0 < rates.take(caller, 0, 0.0).wait_seconds <= 1
    assert rates.take(caller, 0, 1.0).wait_seconds == 0


def test_another_key_s_rate_is_its_own():
    rates = Rates()
    rates.take(Caller("a", requests_per_minute=1), 0, 0.0)
    assert rates.take(Caller("a", requests_per_minute=1), 0, 0.0).wait_seconds == 60
    assert rates.take(Caller("b", requests_per_minute=1), 0, 0.0).wait_seconds == 0


def test_tokens_that_an_answer_has_not_had_come_back():
    rates, caller = Rates(), Caller("a", tokens_per_minute=100)
    taken = rates.take(caller, 80, 0.0)
    assert taken.tokens == 80
    assert rates.take(caller, 80, 0.0).wait_seconds == 36
    rates.give_back(caller, 70, 0.0)
    assert rates.take(caller, 80, 0.0).wait_seconds == 0


def test_a_request_larger_than_a_minute_s_tokens_is_taken_from_a_full_bucket():
    rates, caller = Rates(), Caller("a", tokens_per_minute=100)
    taken = rates.take(caller, 1000, 0.0)
    assert (taken.wait_seconds, taken.tokens) == (0, 100)
    assert rates.take(caller, 1000, 30.0).wait_seconds == 30


def test_a_request_that_is_not_taken_costs_nothing():
    rates, caller = Rates(), Caller("a", requests_per_minute=2, tokens_per_minute=100)
    rates.take(caller, 100, 0.0)
    assert rates.take(caller, 50, 0.0).wait_seconds == 30
    assert rates.state(caller, 0.0).headers()["x-ratelimit-remaining-requests"] == "1"


def test_a_caller_without_rates_has_no_headers_and_no_wait():
    rates = Rates()
    for _ in range(1000):
        assert rates.take(Caller("a"), 10**9, 0.0).wait_seconds == 0
    assert rates.state(Caller("a"), 0.0).headers() == {}


def test_the_headers_are_openai_s():
    rates, caller = Rates(), Caller("a", requests_per_minute=10, tokens_per_minute=1000)
    state = rates.take(caller, 400, 0.0)
    assert state.headers() == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "6s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "24s",
    }


def test_durations():
    found = [duration(each) for each in (0, 0.0004, 0.82, 1.25, 59.9, 60, 3661)]
    assert found == ["0s", "1ms", "820ms", "1.25s", "59.9s", "1m0s", "61m1s"]


def test_a_file_with_other_rates_holds_from_then_on():
    rates = Rates()
    rates.take(Caller("a", requests_per_minute=100), 0, 0.0)
    assert rates.take(Caller("a", requests_per_minute=1), 0, 0.0).wait_seconds == 0
    assert rates.take(Caller("a", requests_per_minute=1), 0, 0.0).wait_seconds == 60
    assert rates.take(Caller("a"), 0, 0.0).wait_seconds == 0


@given(st.lists(st.floats(0, 5), max_size=80))
def test_within_any_minute_a_key_begins_at_most_twice_its_requests(pauses):
    rates, caller, now, began = Rates(), Caller("a", requests_per_minute=5), 0.0, []
    for pause in pauses:
        now += pause
        if rates.take(caller, 0, now).wait_seconds == 0:
            began.append(now)
    for first in began:
        assert sum(first <= each < first + 60 for each in began) <= 10
