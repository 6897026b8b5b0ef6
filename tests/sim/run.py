"""Runs one seed: plan, swarm, faults, checks; the same seed gives the same run, frame for frame."""

from __future__ import annotations

import math
import random
import secrets
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import trio
import trio._core._run as trio_run
import trio.testing

from tensor_codec.limits import Limits
from tests.sim.checks import check_idle, check_rows, check_story
from tests.sim.directory import Gossip
from tests.sim.faults import Injector
from tests.sim.network import Network
from tests.sim.people import Client, Clock, Node, Twice, World
from tests.sim.plan import Plan, make_plan

JOIN_SECONDS = 3.0  # until all participants know each other
SETTLE_SECONDS = 5.0  # P6
MAX_SECONDS = 3600.0  # of the run's clock


@dataclass(slots=True)
class Outcome:
    """The result of a seed.  failures: empty if every promise was kept.  trace: of all frames sent.

    errors: generations that ended in one.  longest_wait: for a token that came, in seconds.
    row_steps: of sessions whose rows change their order.
    """

    seed: int
    failures: list[str] = field(default_factory=list)
    trace: int = 0
    frames: int = 0
    tokens: int = 0
    row_steps: int = 0
    errors: int = 0
    longest_wait: float = 0.0
    virtual_seconds: float = 0.0


def _clock() -> trio.testing.MockClock:
    """A clock that jumps to the next deadline.  Of all calls of a run it has the most: they are short."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    def jump() -> None:
        seconds = trio_run.GLOBAL_RUN_CONTEXT.runner.deadlines.next_deadline() - clock._virtual_base
        if 0 < seconds < math.inf:
            clock.jump(seconds)

    clock.current_time = partial(getattr, clock, "_virtual_base")  # its rate is 0
    clock._autojump = jump
    return clock


def run_seed(seed: int, *, log: Callable[[str], None] | None = None) -> Outcome:
    """Run one seed.  log: called with each event, a line."""
    rng = random.Random(seed)
    return run_plan(make_plan(seed, rng), rng, log=log)


def run_plan(plan: Plan, rng: random.Random, *, log: Callable[[str], None] | None = None) -> Outcome:
    """Run a plan.  rng: of everything that is decided on the way."""
    outcome = Outcome(plan.seed)
    clock = Clock()
    mock_clock = _clock()
    with _reproducible(plan.seed, rng, clock):
        try:
            trio.run(_run, plan, rng, clock, outcome, log, clock=mock_clock)
        except Exception as error:  # noqa: BLE001  any error is a finding of the seed
            outcome.failures.insert(0, _told(error))
    return outcome


@contextmanager
def _reproducible(seed: int, rng: random.Random, clock: Clock) -> Iterator[None]:
    """Nothing is decided by chance, by the machine's clock or by the order of tasks, but by the seed."""
    before = trio_run._r.getstate()
    trio_run._r.seed(seed)
    with (
        mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(time, "perf_counter", clock.now),
        mock.patch.object(secrets, "token_bytes", rng.randbytes),
    ):
        yield
    trio_run._r.setstate(before)


def _told(error: Exception) -> str:
    """The first error of a group, with the place that raised it."""
    leaf: BaseException = error
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    frames = traceback.extract_tb(leaf.__traceback__)[-3:]
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
    name = "P2" if isinstance(leaf, Twice) else "bug"
    return f"{name}: {type(leaf).__name__}: {leaf} ({where})"


async def _run(
    plan: Plan, rng: random.Random, clock: Clock, outcome: Outcome, log: Callable[[str], None] | None
) -> None:
    def tell(what: str) -> None:
        if log is not None:
            log(f"{trio.current_time():8.3f} {what}")

    limits = Limits(
        record_ttl_seconds=30.0,
        announce_seconds=8.0,
        max_step_tokens=plan.max_step_tokens,
    )
    async with trio.open_nursery() as nursery:
        network = Network(plan, limits, rng)
        world = World(plan.blocks, limits, network, Gossip(network, rng), clock, nursery, tell)
        injector = Injector(world, rng)
        for node in [Node(each, world) for each in plan.nodes]:
            await node.run(nursery)
        nursery.start_soon(world.gossip.run)
        clients = [Client(each, world) for each in plan.clients]
        await trio.sleep(JOIN_SECONDS)
        with trio.move_on_after(MAX_SECONDS) as scope:
            await _all(plan, clients, injector)
            well = max((each.well for each in injector.happened), default=0.0)
            await trio.sleep_until(max(well, trio.current_time()) + SETTLE_SECONDS)
        if scope.cancelled_caught:
            outcome.failures.append(f"P3: not all was done after {MAX_SECONDS} s")
        _judge(plan, world, injector, outcome)
        nursery.cancel_scope.cancel()


async def _all(plan: Plan, clients: list[Client], injector: Injector) -> None:
    """Until every client has ended and every fault is over."""
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.run)
            if client.plan.killed is not None:
                nursery.start_soon(_kill, client, client.plan.killed)
        for fault in plan.faults:
            nursery.start_soon(injector.strike, fault)


async def _kill(client: Client, at: float) -> None:
    await trio.sleep_until(at)
    client.kill()


def _judge(plan: Plan, world: World, injector: Injector, outcome: Outcome) -> None:
    """Fill in the outcome."""
    outcome.virtual_seconds = trio.current_time()
    outcome.trace, outcome.frames = world.network.trace, world.network.frames
    for client in world.clients.values():
        first_seen = client.directory.first_seen
        for story in client.stories:
            outcome.tokens += len(story.tokens)
            outcome.errors += sum(call.error is not None for call in story.calls)
            waits = [call.ended - call.began for call in story.calls if call.token is not None]
            outcome.longest_wait = max(outcome.longest_wait, *waits, 0.0)
            outcome.failures += check_story(story, plan, injector.happened, first_seen)
        for rows in client.rows_stories:
            outcome.row_steps += len(rows.applied)
            outcome.errors += sum(call.error is not None for call in rows.calls)
            outcome.failures += check_rows(rows, plan, injector.happened, first_seen)
    outcome.failures += check_idle(world)
