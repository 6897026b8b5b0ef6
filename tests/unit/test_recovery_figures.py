"""What `benchmarks recovery` makes of what it has seen."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.recovery.fault_rates import Cell, Killer
from benchmarks.recovery.lost_clients import invite
from benchmarks.recovery.recovery import parse, strike_number, summary
from benchmarks.recovery.watched import Watched, percentile, trace_figures

STEPS = Watched([1, 2, 3, 4], [0.0, 1.0, 1.1, 3.1], [1.0, 0.1, 2.0, 0.1])


def test_a_gap_is_the_time_to_the_next_token_less_what_it_takes_otherwise():
    assert STEPS.typical == 0.1
    assert STEPS.gap(2.0, first=0.9) == pytest.approx(1.9)


def test_a_fault_at_the_end_of_a_token_is_felt_by_the_next_one():
    assert STEPS.gap(1.05, first=0.9) == pytest.approx(1.9)


def test_a_fault_in_the_prompt_is_measured_against_an_undisturbed_prompt():
    assert STEPS.gap(0.5, first=0.9) == pytest.approx(0.1)
    assert STEPS.gap(0.5, first=0.2) == pytest.approx(0.8)


def test_a_fault_that_came_when_all_was_over_is_that_of_the_last_token():
    assert STEPS.gap(9.0, first=0.9) == pytest.approx(0.0)


def test_a_slow_server_was_used_up_to_the_last_token_whose_chain_had_it():
    seen = Watched([1] * 5, [0.0, 1.0, 1.5, 3.5, 5.5], [1.0, 0.5, 2.0, 2.0, 0.5])
    seen.peers = [["a", "b"]] * 4 + [["a", "c"]]
    assert seen.steps_with("b", at=1.6) == 2
    assert seen.steps_with("a", at=1.6) is None
    assert seen.speeds(at=1.6) == pytest.approx((2.0, 3 / 4.5))


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 10), (0.95, 19), (1.0, 20)])
def test_percentiles_are_of_the_nearest_rank_and_leave_out_what_is_not_known(share, value):
    assert percentile([None, *range(20, 0, -1)], share) == value
    assert percentile([None], share) is None


def test_the_trace_tells_what_came_behind_the_strike():
    events = [
        SimpleNamespace(at=1.0, kind="fault", data={}),
        SimpleNamespace(at=2.0, kind="replayed", data={"start": 0, "stop": 9}),
        SimpleNamespace(at=5.5, kind="fault", data={}),
        SimpleNamespace(at=5.9, kind="replayed", data={"start": 0, "stop": 40}),
        SimpleNamespace(at=6.0, kind="recovered", data={"seconds": 0.4, "replay_seconds": 0.1}),
        SimpleNamespace(at=6.9, kind="replayed", data={"start": 40, "stop": 42}),
        SimpleNamespace(at=7.0, kind="recovered", data={"seconds": 0.2, "replay_seconds": 0.1}),
    ]
    conversation: Any = SimpleNamespace(trace=SimpleNamespace(events=events))
    figures = trace_figures(conversation, 5.0)
    expected = {"detect_s": 0.5, "replay_s": 0.2, "recovered_s": pytest.approx(0.6), "replayed": 42.0}
    assert figures == expected
    untraced: Any = SimpleNamespace()
    assert set(trace_figures(untraced, 5.0).values()) == {None}


def test_a_strike_comes_where_it_was_asked_for():
    rng = random.Random(0)
    assert [strike_number(when, 64, rng) for when in ("prefill", "first", "middle", "last")] == [0, 1, 32, 63]
    assert {strike_number("random", 4, rng) for _ in range(100)} == {1, 2, 3}


def test_gaps_of_all_runs_are_put_together():
    rows: list[dict[str, Any]] = [
        {"gaps_s": [0.1, 0.4], "tokens_equal": True},
        {"gap_s": 0.2, "tokens_equal": False},
    ]
    found = summary(parse([]), rows)
    assert (found["gap_s_p50"], found["gap_s_p95"], found["ok"]) == (0.2, 0.4, False)


class Servers:
    """Stands in for a swarm of two servers, of which `spare` is there or not."""

    def __init__(self, spare):
        self.victim = SimpleNamespace(online=True, ending=False, node=SimpleNamespace(process=self))
        self.spare = SimpleNamespace(known=lambda view: spare)

    def of(self, peer):
        return self.victim

    def others(self, replica):
        return [self.spare]

    def send_signal(self, number):
        self.signal = number


def killer(spare, rate):
    servers: Any = Servers(spare)
    swarm: Any = SimpleNamespace(view=lambda: None)
    return Killer(servers, swarm, rate, random.Random(0))


CHAIN = SimpleNamespace(session=SimpleNamespace(chain=SimpleNamespace(hops=[SimpleNamespace(peer="a")])))


def test_a_kill_waits_until_there_is_a_spare_server():
    waiting = killer(spare=False, rate=1.0)
    assert [waiting.step(CHAIN) for _ in range(3)] == [False] * 3
    assert (waiting.waiting, waiting.kills) == (3, 0)
    waiting.replicas.spare.known = lambda view: True
    assert waiting.step(CHAIN)
    assert (waiting.waiting, waiting.kills) == (3, 1)


def test_nobody_is_killed_at_a_rate_of_nothing():
    idle = killer(spare=True, rate=0.0)
    assert not any(idle.step(CHAIN) for _ in range(100))


def test_steps_per_second_count_the_time_of_what_was_not_finished():
    cell = Cell(tokens=100, rate=0.1, restart=True, limit=10, seconds=50.0, finished=2)
    assert cell.row(runs=5)["steps_per_s"] == 4.0


def test_half_of_the_clients_are_killed_in_each_phase():
    guests = invite(parse(["--runs", "10"]), ["x"], [1, 2], first=1.0)
    assert [guest.phase for guest in guests] == ["prefill", "decode"] * 5
    assert all(0 <= guest.wait <= 0.5 for guest in guests)
