"""The state of a request's choice, folded from its session's events."""

from __future__ import annotations

from typing import Any

import pytest

from client.gateway.monitor.requests import (
    MAX_EVENTS_KEPT,
    MAX_STEPS_KEPT,
    RATE_SECONDS,
    Choice,
    Traffic,
    percentile,
)
from client.session.trace import Event, Kind

HOPS = [{"peer": "a", "blocks": [0, 3]}, {"peer": "b", "blocks": [3, 6]}]
NEW = [{"peer": "a", "blocks": [0, 3]}, {"peer": "c", "blocks": [3, 6]}]


def tell(choice: Choice, kind: Kind, at: float = 0.0, **data: Any) -> dict[str, Any] | None:
    return choice.take_in(Event(at, kind, data), 1000.0 + at)


def step(choice: Choice, position: int, tokens: int = 1, *, received: int = 8, at: float = 0.0) -> None:
    told = tell(
        choice, "step", at, step=position, position=position, tokens=tokens, seconds=0.02,
        hops=((0.005, 0.004), (0.006, 0.001)), sent=8 * tokens, received=received,
    )  # fmt: skip
    assert told is None


def decoding() -> Choice:
    choice = Choice()
    choice.begin()
    tell(choice, "opened", hops=HOPS, codec="fp32", seconds=0.1)
    step(choice, 0, 5)
    return choice


def test_a_request_waits_prefills_and_decodes():
    choice = Choice()
    assert choice.state == "queued"
    choice.begin()
    assert choice.state == "prefill"
    told = tell(choice, "opened", 1.5, hops=HOPS, codec="fp32", seconds=0.1)
    assert told == {"what": "opened", "at": 1001.5, "hops": HOPS, "codec": "fp32", "seconds": 0.1}
    step(choice, 0, 512, received=0)  # a chunk of the prompt: its answer has no values
    assert (choice.state, choice.tokens) == ("prefill", 0)
    step(choice, 512, 30)
    assert (choice.state, choice.tokens) == ("decode", 1)
    step(choice, 542)
    assert choice.tokens == 2
    assert choice.hops({"a": "node a"}) == [
        {"peer": "a", "name": "node a", "blocks": [0, 3], "held_ms": 5.0, "computed_ms": 4.0},
        {"peer": "b", "name": "", "blocks": [3, 6], "held_ms": 6.0, "computed_ms": 1.0},
    ]
    choice.end()
    assert choice.state == "ended"


def test_a_fault_is_told_and_the_request_recovers():
    choice = decoding()
    told = tell(choice, "fault", 2.0, peer="b", error="StreamReset: ended")
    assert told == {"what": "fault", "at": 1002.0, "peer": "b", "error": "StreamReset: ended"}
    assert choice.state == "recovering"
    told = tell(
        choice, "rerouted", 2.1, why="x", kept=["a"], opened=["c"], hops=NEW, codec="fp32", seconds=0.1
    )
    assert told is not None
    assert (told["what"], told["kept"], told["opened"], told["hops"]) == ("rerouted", ["a"], ["c"], NEW)
    assert choice.recoveries == 1
    assert [hop["held_ms"] for hop in choice.hops({})] == [None, None]  # of the new route nothing is known
    told = tell(choice, "replayed", 2.2, sender="a", peer="c", start=0, stop=41, bytes=99)
    assert told is not None
    assert (told["what"], told["positions"], told["peer"]) == ("replayed", 41, "c")
    assert choice.state == "recovering"
    tell(choice, "recovered", 2.3, seconds=0.3, replay_seconds=0.1)
    assert choice.state == "decode"


def test_a_fault_before_the_first_token_recovers_to_the_prompt():
    choice = Choice()
    tell(choice, "fault", peer="b", error="gone")
    assert choice.state == "recovering"
    tell(choice, "opened", hops=HOPS, codec="fp32", seconds=0.1)
    assert choice.state == "prefill"
    tell(choice, "fault", peer="b", error="gone")
    step(choice, 0, 5, received=0)
    assert choice.state == "prefill"


def test_each_token_has_the_times_of_its_own_step_and_the_events_before_it():
    choice = decoding()
    step(choice, 5)
    tell(choice, "fault", peer="b", error="gone")
    tell(choice, "rerouted", why="x", kept=["a"], opened=["c"], hops=NEW, codec="fp32", seconds=0.1)
    tell(choice, "recovered", seconds=0.3, replay_seconds=0.1)
    step(choice, 6)
    step(choice, 7)
    first, second, third, fourth, fifth = (choice.token() for _ in range(5))
    assert [event["kind"] for event in first["events"]] == ["opened"]
    assert (second["events"], fourth["events"]) == ([], [])
    assert [event["kind"] for event in third["events"]] == ["fault", "rerouted", "recovered"]
    assert all(event["at"] >= 1000.0 for event in third["events"])
    assert third["hops"] == [["a", 5.0, 4.0], ["c", 6.0, 1.0]]
    assert fifth == {"hops": [], "events": []}


def test_an_answer_that_comes_again_is_no_further_token():
    choice = decoding()
    step(choice, 5)
    step(choice, 0, 5, received=0)  # the values of position 5 could not be read: all comes again
    step(choice, 5)
    assert choice.tokens == 2
    step(choice, 6)
    assert choice.tokens == 3
    for _ in range(2):
        choice.token()
    assert choice.token()["hops"]
    assert not choice.token()["hops"]


def test_a_summary_has_the_tokens_and_the_means_since_the_last_one():
    choice = Choice()
    assert choice.summary() is None
    tell(choice, "opened", hops=HOPS, codec="fp32", seconds=0.1)
    step(choice, 0, 512, received=0)
    step(choice, 512, 30)
    step(choice, 542)
    assert choice.summary() == {
        "what": "steps", "tokens": 2, "seconds": 0.06, "hops": [["a", 5.0, 4.0], ["b", 6.0, 1.0]]
    }  # fmt: skip
    assert choice.summary() is None
    step(choice, 543)
    tell(choice, "rerouted", why="x", kept=[], opened=["c"], hops=NEW, codec="fp32", seconds=0.1)
    told = choice.summary()
    assert told is not None
    assert (told["tokens"], told["hops"]) == (1, [])  # a token is never lost, times of another route are


def test_the_rate_is_that_of_the_last_tokens_and_ends_with_them():
    choice = decoding()
    for number in range(40):
        step(choice, 5 + number, at=10 + number / 20)
    assert choice.rate(12.0) == pytest.approx(20.0)
    assert choice.rate(12.0 + RATE_SECONDS) == 0.0
    assert Choice().rate(0.0) == 0.0


def test_memory_is_bounded():
    choice = decoding()
    for number in range(3000):
        step(choice, 5 + number)
        tell(choice, "fault", peer="b", error="gone")
    assert len(choice.steps) == MAX_STEPS_KEPT
    assert len(choice.events) == MAX_EVENTS_KEPT
    assert sum(1 for _ in iter(lambda: bool(choice.token()["events"]), False)) < 3000


def test_the_end_of_a_session_is_not_the_end_of_its_request():
    choice = decoding()
    assert tell(choice, "ended") is None
    assert choice.state == "decode"
    assert choice.events[-1][1]["kind"] == "ended"


def test_traffic_counts_tokens_and_sorts_single_steps():
    traffic = Traffic()
    assert traffic.look(2.0) == {"tokens_per_second": 0.0, "step_ms_p50": None, "step_ms_p95": None}
    for number in range(1, 101):
        data = {"tokens": 1, "received": 8, "seconds": number / 1000}
        traffic.add(Event(0.0, "step", data))
    traffic.add(Event(0.0, "step", {"tokens": 512, "received": 0, "seconds": 9.0}))
    traffic.add(Event(0.0, "fault", {}))
    assert traffic.look(2.0) == {"tokens_per_second": 50.0, "step_ms_p50": 50.0, "step_ms_p95": 95.0}
    assert traffic.look(2.0)["tokens_per_second"] == 0.0
    assert percentile([0.5], 0.95) == 500.0
