"""Seeds of the simulation: those of every run, those that failed once, and proof that they can fail."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import trio

from client.generation.conversation import Conversation
from client.session.core import ClientSession
from node.network.streams import FramedStream
from node.serving.cache_budget import CacheBudget
from node.serving.executor.engine import Engine
from node.serving.sessions.state import Compute, ServerSession
from node.serving.sessions.worker import HopWorker
from routing.blocks import Blocks
from tensor_codec.errors import PeerGone
from tensor_codec.journal import Journal
from tensor_codec.messages.contract import StepRange
from tests.fakes_serving import FakeSpan, generated
from tests.sim.checks import expected_tokens
from tests.sim.many import open_pool, run_in_time, run_many
from tests.sim.people import Span
from tests.sim.plan import (
    DRAFTS_EVERY,
    GUESSES_EVERY,
    ROOMY,
    ROWS_EVERY,
    RUNS_EVERY,
    ClientPlan,
    Fault,
    Job,
    NodePlan,
    Plan,
    RowsJob,
    RowsStep,
    make_plan,
)
from tests.sim.run import Outcome, run_plan, run_seed

SEEDS, A_TIME = 125, 25
# Seeds that failed once, each with its finding.  They stand for the plans that `make_plan` draws today.
ENDLESS_BLAME = "every try of a hop that is needed doubles its time out, and only one that refuses is left"
REFUSALS_TAKE_TURNS = "two peers without room are asked in turn, and one that has room never"
RELAYED = "what a hop sent to be carried on was taken for the last hop's answer, once the route had changed"
TOO_PATIENT = "a hop that computed one step for a hundred times as long as usual was waited for"
HELD_BACK = "a replay was held back by a hop that said nothing, and nobody asked it"
REFUSED_ONE_BY_ONE = (
    "hops without room refused one after the other, until no time was left for those with room"
)
FAILED_ONCE = {
    135: RELAYED,
    322: REFUSED_ONE_BY_ONE,
    388: TOO_PATIENT,
    568: HELD_BACK,
    870: ENDLESS_BLAME,
    981: REFUSALS_TAKE_TURNS,
}


@pytest.fixture(scope="module")
def other() -> Iterator[ProcessPoolExecutor]:
    """Another process, with another order of sets of strings."""
    with open_pool(1) as pool:
        with mock.patch.dict(
            os.environ, PYTHONHASHSEED="2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        ):
            pool.submit(int)  # starts the process
        yield pool


@pytest.mark.parametrize("first", range(0, SEEDS, A_TIME))
def test_many_seeds_keep_every_promise(first, other):
    there = run_many(range(first + 1, first + A_TIME, 2), other)
    outcomes = [*map(run_in_time, range(first, first + A_TIME, 2)), *there]
    assert sorted(outcome.seed for outcome in outcomes) == list(range(first, first + A_TIME))
    assert {outcome.seed: outcome.failures for outcome in outcomes if outcome.failures} == {}
    assert sum(outcome.tokens for outcome in outcomes) > 20 * A_TIME
    assert sum(outcome.errors for outcome in outcomes) < A_TIME


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_a_seed_that_failed_once(seed):
    assert run_seed(seed).failures == []


def test_a_seed_gives_the_same_run_in_every_process(other):
    """In any order of sets of strings, and whatever seeds a process has run before."""
    assert other.submit(hash, "n0").result() != hash("n0")
    there = run_many(range(1, 4), other)
    assert [run_seed(seed).trace for seed in range(1, 4)] == [outcome.trace for outcome in there]


def test_what_is_expected_is_what_the_whole_model_gives():
    assert expected_tokens([3, 1, 4], 12, 7) == generated([3, 1, 4], 12, 7)


# One fault at a time: three hops with a replica each, and something that does not get well for long.

CHAIN = tuple(
    NodePlan(f"n{part}{replica}", 2 * part, 2 * part + 2, ROOMY, 0.01 * (1 + replica), (0.5, 0.5), 0.0)
    for part in range(3)
    for replica in range(2)
)
ALONE = tuple(node for node in CHAIN if node.name.endswith("0"))
BLOCKS = 6


def plan_of(*faults: Fault, nodes: tuple[NodePlan, ...] = CHAIN, step_seconds: float = 2.0) -> Plan:
    """One client with one generation of 20 tokens."""
    job = Job(at=1.0, prompt=(1, 2, 3), new_tokens=20, patience=None, again=())
    client = ClientPlan("c0", (0.5, 0.4), 15.0, step_seconds, 60.0, (job,), None)
    return Plan(1, BLOCKS, nodes, (client,), faults, 0.0, 0.0, 1e7, 2048, 256 * 1024)


def run(plan: Plan) -> Outcome:
    """Run a plan."""
    return run_plan(plan, random.Random(plan.seed))


LONGEST_WAIT = {
    "kill": 2.0,
    "vanish": 20.0,
    "freeze": 20.0,
    "drain": 2.0,
    "full": 2.0,
    "sick": 2.0,
    "cut": 2.0,
    "silence": 20.0,
    "deaf": 20.0,
    "unreachable": 2.0,
    "lossy": 4.0,
    "slow": 20.0,
}


@pytest.mark.parametrize("hop", range(3))
@pytest.mark.parametrize("kind", LONGEST_WAIT)
def test_a_hop_that_fails_for_long_is_replaced_and_no_token_is_lost(kind, hop):
    who = ("n00", "n10") if kind in ("cut", "silence", "deaf", "unreachable", "lossy") else ("n00",)
    outcome = run(plan_of(Fault(kind, 20.0, 100.0, who, 100.0, ("c0", 5, hop))))
    assert outcome.failures == []
    assert (outcome.tokens, outcome.errors) == (20, 0)
    assert outcome.longest_wait < LONGEST_WAIT[kind]


def over(run: Blocks, plan: Plan) -> Plan:
    """The plan, with a session for hidden states over a run of blocks in place of its generation."""
    (client,) = plan.clients
    jobs = tuple(replace(job, run=run) for job in client.jobs)
    return replace(plan, clients=(replace(client, jobs=jobs),))


@pytest.mark.parametrize("hop", range(2))
@pytest.mark.parametrize("kind", ["kill", "vanish", "freeze", "drain", "full", "slow"])
def test_a_session_over_a_run_of_blocks_survives_as_a_generation_does(kind, hop):
    outcome = run(over(Blocks(3, 5), plan_of(Fault(kind, 20.0, 100.0, ("n10",), 100.0, ("c0", 5, hop)))))
    assert outcome.failures == []
    assert (outcome.tokens, outcome.errors) == (20, 0)
    assert outcome.longest_wait < LONGEST_WAIT[kind]


def test_what_a_run_does_not_need_may_be_gone():
    faults = (Fault("kill", 0.5, 100.0, (node.name,)) for node in CHAIN if node.stop <= 2)
    outcome = run(over(Blocks(3, 5), plan_of(*faults)))
    assert outcome.failures == []
    assert (outcome.tokens, outcome.errors) == (20, 0)


def test_a_block_left_out_of_a_run_is_found():
    plan = over(Blocks(2, 6), plan_of())
    assert run(plan).failures == []
    with a_block_left_out():
        assert any(failure.startswith("P1: ") for failure in run(plan).failures)


def test_some_seeds_have_sessions_over_runs_of_blocks():
    plans = [make_plan(seed, random.Random(seed)) for seed in range(50)]
    jobs = [job for plan in plans for client in plan.clients for job in client.jobs]
    runs = [job.run for job in jobs if job.run is not None]
    assert 5 <= len(runs) <= len(jobs) / 5
    assert all(plan.seed % RUNS_EVERY == RUNS_EVERY - 1 for plan in plans if "run=Blocks" in repr(plan))
    assert any(blocks.start > 0 for blocks in runs)


@pytest.mark.parametrize("kind", ["kill", "vanish", "freeze", "silence", "drain"])
def test_without_a_replica_a_generation_waits_until_the_hop_is_back(kind):
    who = ("n10", "c0") if kind == "silence" else ("n10",)
    outcome = run(plan_of(Fault(kind, 1.0, 10.0, who), nodes=ALONE))
    assert outcome.failures == []
    assert (outcome.tokens, outcome.errors) == (20, 0)


def test_a_block_that_nobody_serves_any_more_is_an_error_that_says_so():
    outcome = run(plan_of(Fault("kill", 20.0, 100.0, ("n10",), hit=("c0", 5, 1)), nodes=ALONE))
    assert outcome.failures == []
    assert outcome.errors == 1


def test_a_peer_with_room_is_found_beside_two_that_have_none():
    full = [NodePlan(name, 2, 4, 64, 0.001, (0.5, 0.5), 0.0) for name in ("n11", "n12")]
    faults = (Fault("full", 0.5, 90.0, (node.name,)) for node in full)
    outcome = run(plan_of(*faults, nodes=(*ALONE, *full)))
    assert outcome.failures == []
    assert (outcome.tokens, outcome.errors) == (20, 0)


@pytest.mark.parametrize(("give_up_seconds", "errors"), [(10.0, 1), (60.0, 0)])
def test_of_two_sides_the_one_with_a_chain_goes_on_and_the_other_when_they_are_one_again(
    give_up_seconds, errors
):
    """n10, n11 and the client c1 are cut off, with no block but 2 and 3, in the midst of its tokens."""
    job = Job(at=1.0, prompt=(1, 2, 3), new_tokens=40, patience=None, again=())
    clients = tuple(
        ClientPlan(name, (0.5, 0.4), 15.0, 2.0, give_up_seconds, (job,), None) for name in ("c0", "c1")
    )
    third = NodePlan("n12", 2, 4, ROOMY, 0.03, (0.5, 0.5), 0.0)
    partition = Fault("partition", 5.0, 30.0, ("n10", "n11", "c1"))
    outcome = run(replace(plan_of(partition, nodes=(*CHAIN, third)), clients=clients))
    assert outcome.failures == []
    assert outcome.errors == errors
    assert outcome.tokens == 80 if not errors else 40 < outcome.tokens < 80
    assert outcome.longest_wait > 20 if not errors else outcome.longest_wait < 5


# Rows that change their order: one client with one session of three rows, and no generation.

ORDERS = ((2, 0, 1), (0, 0, 2), None, (1, 1, 1), (2, 2, 0), (0, 2, 2), (1, 0, 0), None, (2, 2, 2), (1, 2, 0))


def rows_plan(*faults: Fault, patience: float | None = None) -> Plan:
    """A prompt of three positions, then twenty tokens of each row; every third step has been left once."""
    steps = [RowsStep(3, 0, None, None)]
    for number, rows in enumerate(ORDERS * 2):
        steps.append(RowsStep(1, 2 if number % 7 == 6 else 0, rows, patience if number % 3 == 2 else None))
    plan = plan_of(*faults)
    (client,) = plan.clients
    job = RowsJob(at=1.0, batch=3, steps=tuple(steps))
    return replace(plan, clients=(replace(client, jobs=(), rows_jobs=(job,)),))


@pytest.mark.parametrize("patience", [None, 0.02, 0.05])
@pytest.mark.parametrize("hop", range(3))
@pytest.mark.parametrize("at", range(1, 11))
def test_a_server_that_is_killed_at_a_step_that_reorders_rows_loses_and_repeats_no_order(at, hop, patience):
    fault = Fault("kill", 100.0, 100.0, ("n00",), hit=("c0", at, hop))
    outcome = run(rows_plan(fault, patience=patience))
    assert outcome.failures == []
    assert (outcome.row_steps, outcome.errors) == (21, 0)


@pytest.mark.parametrize("kind", ["freeze", "drain", "full", "cut", "unreachable", "slow", "lossy"])
def test_rows_keep_their_order_through_other_faults(kind):
    for hop, at in ((0, 3), (1, 5), (2, 8)):
        who = ("n00", "n10") if kind in ("cut", "unreachable", "lossy") else ("n00",)
        outcome = run(rows_plan(Fault(kind, 100.0, 20.0, who, 100.0, ("c0", at, hop)), patience=0.05))
        assert outcome.failures == []
        assert (outcome.row_steps, outcome.errors) == (21, 0)


def test_one_seed_in_six_has_sessions_whose_rows_change_their_order():
    plans = [make_plan(seed, random.Random(seed)) for seed in range(SEEDS)]
    jobs = [job for plan in plans for client in plan.clients for job in client.rows_jobs if job.batch > 1]
    assert sum(any(job in jobs for job in plan.clients[0].rows_jobs) for plan in plans) == len(
        range(1, SEEDS, ROWS_EVERY)
    )
    repeats = [step for job in jobs for step in job.steps if step.rows and len(set(step.rows)) < job.batch]
    assert len(repeats) > 2 * len(jobs)


def test_one_seed_in_seven_has_drafts_that_share_batches_with_single_tokens(monkeypatch):
    together: list[Sequence[int]] = []
    decode = FakeSpan.decode

    def noted(self: FakeSpan, *args: Any, tokens: Sequence[int] | None = None, **how: Any) -> Any:
        together.append(tokens or [])
        return decode(self, *args, tokens=tokens, **how)

    monkeypatch.setattr(FakeSpan, "decode", noted)
    for seed in range(DRAFTS_EVERY - 2, 5 * DRAFTS_EVERY, DRAFTS_EVERY):
        outcome = run_seed(seed)
        assert outcome.failures == []
        assert outcome.row_steps > 0
    assert any(max(tokens, default=1) > 1 and len(tokens) > 1 for tokens in together)


def test_one_seed_in_three_has_guessed_tokens_of_which_some_are_wrong(monkeypatch):
    steps: list[StepRange] = []
    submit = ClientSession.submit

    def noted(self: ClientSession, what: StepRange, *args: Any) -> Any:
        steps.append(what)
        return submit(self, what, *args)

    monkeypatch.setattr(ClientSession, "submit", noted)
    again = 0
    for seed in range(GUESSES_EVERY - 1, 12 * GUESSES_EVERY, GUESSES_EVERY):
        steps.clear()
        assert run_seed(seed).failures == []
        guessed = [step for step in steps if step.position and step.tokens > 1 and step.reply == "all"]
        again += sum(
            step.position < before.position + before.tokens
            for before, step in pairwise(steps)
            if before in guessed
        )
        assert guessed or seed % RUNS_EVERY == RUNS_EVERY - 1
    assert again > 20  # the caches were cut after wrong guesses


CHURN_NODES, CHURN_MINUTES, GENERATIONS = 20, 10, 60


def churning(seed: int) -> Plan:
    """Thirty percent of the servers are replaced every minute: they end, and come back with empty caches."""
    rng = random.Random(seed)
    nodes = tuple(
        NodePlan(f"n{number:02}", start, start + 4, ROOMY, 0.01, (rng.random(), rng.random()), 0.0)
        for number, start in enumerate([0, 4, 8, 2, 6] * (CHURN_NODES // 5))
    )
    seconds, kinds = 60 * CHURN_MINUTES, ("kill", "kill", "drain", "vanish")
    faults = tuple(
        Fault(
            rng.choice(kinds),
            rng.uniform(0, seconds),
            rng.uniform(5, 20),
            (who,),
        )
        for _ in range(CHURN_MINUTES)
        for who in rng.sample([node.name for node in nodes], CHURN_NODES * 3 // 10)
    )
    clients = tuple(
        ClientPlan(
            f"c{number}", (rng.random(), rng.random()), 15.0, 5.0, 60.0,
            tuple(
                Job(rng.uniform(0, seconds), (1, 2, 3), rng.randint(10, 60), None, ())
                for _ in range(GENERATIONS // 3)
            ), None,
        )
        for number in range(3)
    )  # fmt: skip
    return Plan(seed, 12, nodes, clients, faults, 0.0, 0.005, 1e7, 2048, 256 * 1024)


def test_in_a_swarm_that_is_replaced_by_thirty_percent_a_minute_generations_finish():
    outcomes = [run_plan(churning(seed), random.Random(seed)) for seed in range(2)]
    assert [outcome.failures for outcome in outcomes] == [[]] * len(outcomes)
    assert sum(outcome.errors for outcome in outcomes) <= 0.01 * GENERATIONS * len(outcomes)
    assert sum(outcome.tokens for outcome in outcomes) >= 9 * GENERATIONS * len(outcomes)


# Each check can fail: the same swarm with a bug in it.


@contextmanager
def applied_twice() -> Iterator[None]:
    """A server that computes every step of a decode twice."""
    step = Engine.step

    async def twice(self, *args, **more):
        await step(self, *args, **more)
        return await step(self, *args, **more)

    with mock.patch.object(Engine, "step", twice):
        yield


@contextmanager
def a_block_left_out() -> Iterator[None]:
    """A hop that does not compute its first block of a step of one token."""
    forward = Span.forward

    def short(self, hidden, cache, position, start, stop, **more):
        skip = hidden.shape[1] == 1 and stop - start > 1
        return forward(self, hidden, cache, position, start + skip, stop, **more)

    with mock.patch.object(Span, "forward", short):
        yield


@contextmanager
def streams_left_open() -> Iterator[None]:
    """No stream is closed."""

    async def nothing(self):
        await trio.lowlevel.checkpoint()

    with mock.patch.object(FramedStream, "aclose", nothing):
        yield


@contextmanager
def pages_kept() -> Iterator[None]:
    """A server that does not give back the pages of a session that has ended."""
    with mock.patch.object(CacheBudget, "release"):
        yield


@contextmanager
def late() -> Iterator[None]:
    """A client that does not look at its deadline."""
    logits_after = Conversation.logits_after

    async def slowly(self, *args, **kwargs):
        await trio.sleep(self.give_up_seconds + 5)
        return await logits_after(self, *args, **kwargs)

    with mock.patch.object(Conversation, "logits_after", slowly):
        yield


@contextmanager
def orders_forgotten() -> Iterator[None]:
    """Journals that send rows again where they stood when they first went out."""
    read = Journal.read
    with mock.patch.object(
        Journal, "read", lambda self, start, stop, before=None: read(self, start, stop, 0)
    ):
        yield


@contextmanager
def orders_applied_again() -> Iterator[None]:
    """A server that orders its rows for every step that it computes, also where they are in that order."""
    receive = ServerSession.receive

    def forgetful(self, step, what):
        found = receive(self, step, what)
        return replace(found, reorder=bool(what.rows)) if isinstance(found, Compute) else found

    with mock.patch.object(ServerSession, "receive", forgetful):
        yield


@pytest.mark.parametrize("bug", [orders_forgotten, orders_applied_again])
def test_a_bug_with_orders_of_rows_is_found(bug):
    plans = [
        rows_plan(Fault("kill", 100.0, 100.0, ("n00",), hit=("c0", at, hop)))
        for at in range(1, 11)
        for hop in range(3)
    ]
    with bug():
        found = (failure for plan in plans for failure in run(plan).failures)  # no further than the first
        assert any(failure.startswith("P1: c0 with 3 rows") for failure in found)


def failing_with(error: Exception) -> Callable[[], mock._patch]:
    """A client whose every call fails so."""

    async def fail(self, *args, **kwargs):
        await trio.lowlevel.checkpoint()
        raise error

    return lambda: mock.patch.object(Conversation, "logits_after", fail)


def crashing() -> mock._patch:
    """A server with a bug of its own."""
    return mock.patch.object(HopWorker, "_allocate", side_effect=ZeroDivisionError)


def gone(peer: str | None) -> PeerGone:
    """An error, with a name in it or not."""
    error = PeerGone("gone")
    error.peer = peer
    return error


@pytest.mark.parametrize(
    ("promise", "bug"),
    [
        ("P2: ", applied_twice),
        ("P1: ", a_block_left_out),
        ("P6: a stream is open", streams_left_open),
        ("P6: n", pages_kept),
        ("P3: a call took", late),
        ("P3: an error names no cause", failing_with(gone(None))),
        ("progress: ", failing_with(gone("n00"))),
        ("bug: ZeroDivisionError", crashing),
    ],
)
def test_a_bug_is_found(promise, bug):
    plan = plan_of()
    assert run(plan).failures == []
    with bug():
        failures = run(plan).failures
    assert any(failure.startswith(promise) for failure in failures), failures
