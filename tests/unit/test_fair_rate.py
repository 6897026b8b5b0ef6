"""One rate for many flows: nobody waits for the greed of another."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from node.network.budgets.fair_rate import FairQueue, FairRate

RATE, BURST = 1000.0, 100.0


def test_a_lone_flow_has_the_whole_rate():
    queue, now, granted = FairQueue(RATE, BURST, 0.0), 0.0, 0
    while now < 10.0:
        ticket = queue.ask("a", 50)
        now += queue.wait(ticket, now)
        queue.grant(ticket, now)
        granted += 50
    assert granted == pytest.approx(RATE * 10, rel=0.03)


@given(
    st.lists(st.integers(1, 200), min_size=2, max_size=6),
    st.integers(50, 200),
)
def test_flows_that_always_ask_get_as_much_as_each_other_and_together_the_rate(sizes: list[int], rounds: int):
    queue, now = FairQueue(RATE, BURST, 0.0), 0.0
    waiting = {flow: queue.ask(flow, size) for flow, size in enumerate(sizes)}
    granted = Counter[int]()
    for _ in range(rounds):
        flow, ticket = min(waiting.items(), key=lambda each: queue.wait(each[1], now))
        seconds = queue.wait(ticket, now)
        assert seconds < math.inf
        now += seconds
        queue.grant(ticket, now)
        granted[flow] += ticket.size
        waiting[flow] = queue.ask(flow, sizes[flow])
        most, least = max(granted[each] for each in waiting), min(granted[each] for each in waiting)
        assert most - least <= 2 * max(sizes)
    assert sum(granted.values()) <= BURST + RATE * now + 2 * max(sizes)


def test_a_small_question_goes_before_the_hundredth_large_one_of_another():
    queue = FairQueue(RATE, BURST, 0.0)
    large = [queue.ask("greedy", 100) for _ in range(100)]
    queue.grant(large[0], 0.0)
    queue.grant(large[1], 0.1)
    small = queue.ask("modest", 1)
    assert queue.wait(small, 10.0) == 0.0
    assert queue.wait(large[2], 10.0) == math.inf


def test_a_flow_that_was_silent_has_saved_nothing_up():
    queue = FairQueue(RATE, BURST, 0.0)
    for now in range(100):
        queue.grant(queue.ask("busy", 100), float(now))
    late = [queue.ask("late", 100) for _ in range(3)]
    busy = queue.ask("busy", 100)
    for now, ticket in enumerate((late[0], late[1], busy, late[2]), 1000):
        assert queue.wait(ticket, float(now)) == 0.0
        queue.grant(ticket, float(now))


def test_a_question_that_is_given_up_holds_nobody_up():
    queue = FairQueue(RATE, BURST, 0.0)
    first, second = queue.ask("a", 10), queue.ask("b", 10)
    assert queue.wait(second, 0.0) == math.inf
    queue.leave(first)
    assert queue.wait(second, 0.0) == 0.0
    queue.leave(second)
    assert len(queue) == 0


async def test_tasks_share_the_rate_and_a_cancelled_one_gives_way(autojump_clock: trio.testing.MockClock):
    rate, got = FairRate(RATE, BURST), Counter[str]()

    async def flow(name: str, size: int) -> None:
        while True:
            await rate.take(name, size)
            got[name] += size
            await trio.lowlevel.checkpoint()

    with trio.move_on_after(10.0):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(flow, "greedy", 100)
            nursery.start_soon(flow, "modest", 20)
            with trio.move_on_after(1.0):
                await flow("leaves", 50)
    assert sum(got.values()) == pytest.approx(RATE * 10, rel=0.05)
    assert got["modest"] == pytest.approx(got["greedy"], rel=0.1), "five tasks of one flow are one flow"
