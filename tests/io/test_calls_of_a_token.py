"""How many Python functions one token enters over three hops: a count, so it may be asserted.

A real client, real listeners and engines, over streams in memory and blocks that compute with small
integers: the transport and torch are not in it.  `pytest -s tests/io/test_calls_of_a_token.py` prints where
the calls are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest
import trio
import trio.testing

from node.serving.executor.rates import Rates
from tests.fakes_serving import best, conversation_of, generated, swarm
from tests.traced import Called, Tracer

PROMPT = [1, 2, 3, 4]
HOPS = 3
MAX_CALLS = 325
MAX_QUEUED_CALLS = 425  # of one whose steps go through the queues; the engine reads and writes rows by numpy
MAX_SERVER_CALLS = 235  # of all hops, with reading and writing their messages and the client's
MAX_SCHEDULER_CALLS_OF_A_HOP = 40  # with one step waiting
EXECUTOR = "node/serving/executor/"
SCHEDULER = {
    EXECUTOR + name for name in ("active_peers.py", "batch_cost.py", "batcher.py", "job_queues.py", "jobs.py")
}


async def calls_of_a_token(*, queued: bool) -> Sequence[Called]:
    """Every entry of a function, and every time that a coroutine goes on, for the token after ten others.

    queued: steps go through the queue, as next to other sessions.
    """
    tracer = Tracer()
    async with swarm() as world:
        world.add_chain(0, 3, 6, 8)
        for node in world.nodes.values():
            node.span.in_any_thread = not queued
            node.listener.engine.rates = Rates(1e-5, 1e-6)
        conversation = conversation_of(world)
        tokens = list(PROMPT)
        for _ in range(10):
            tokens.append(await conversation.logits_after(tokens, best, follow=int))
        await trio.testing.wait_all_tasks_blocked()  # the next step has come back
        tracer.start()
        try:
            tokens.append(await conversation.logits_after(tokens, best, follow=int))
            await trio.testing.wait_all_tasks_blocked()  # the one after it
        finally:
            tracer.stop()
        assert tokens[len(PROMPT) :] == generated(PROMPT, 11, 8)
        conversation.close()
    return tracer.calls


@pytest.fixture(scope="module")
def calls() -> Sequence[Called]:
    """The fewest of three tokens: where a machine is busy a step waits, and is charged for it."""
    return fewest(queued=False)


def fewest(*, queued: bool) -> Sequence[Called]:
    return min((trio.run(partial(calls_of_a_token, queued=queued)) for _ in range(3)), key=len)


def part_of(call: Called) -> str:
    return "scheduler" if call.module in SCHEDULER else call.module.rpartition("/")[0]


def test_a_token_over_three_hops_enters_few_functions(calls: Sequence[Called]):
    parts = Counter(map(part_of, calls))
    lines = [f"{count:5} {part}" for part, count in parts.most_common()]
    sys.stdout.write("\n".join(["", *lines, f"{len(calls):5} calls for one token over {HOPS} hops", ""]))
    servers = [count for part, count in parts.items() if not part.startswith(("client", "routing"))]
    assert sum(servers) <= MAX_SERVER_CALLS
    assert len(calls) <= MAX_CALLS


def test_the_scheduler_takes_at_most_40_calls_a_hop_for_a_step_that_waits_alone():
    calls = fewest(queued=True)
    assert len(calls) <= MAX_QUEUED_CALLS
    scheduler = Counter(call.name for call in calls if call.module in SCHEDULER)
    assert scheduler["Batcher.submit"] == scheduler["Batcher.finished"] == HOPS  # the count sees every hop
    assert scheduler["Batcher.next"] == HOPS, "asked for a batch although nothing waits"
    assert sum(scheduler.values()) <= MAX_SCHEDULER_CALLS_OF_A_HOP * HOPS
