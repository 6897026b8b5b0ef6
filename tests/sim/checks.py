"""The promises, looked at after a run.  Each check returns sentences that begin with the promise's name.

P1        same tokens as the whole model
P2        no row of a cache computed twice (the span itself raises; see people.py)
P3        every call ends by its deadline, with a token or an error that names its cause
P6        nothing lingers 5 s after the end
progress  a call that fails had a reason: for the last seconds there was no time in which the client
          knew and could reach servers of all blocks that nothing happened to
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from routing.blocks import Blocks, gaps
from routing.chains.search import NoChain
from routing.names import PeerId
from tests.fakes_serving import HIDDEN, PRIME, FakeEmbedAndHead, whole_model
from tests.sim import glue
from tests.sim.faults import Happened
from tests.sim.people import Call, RowsStory, Story, World
from tests.sim.plan import ROOMY, ClientPlan, Fault, Plan

SLACK_SECONDS = 2.5  # beyond the deadline: a session may take a second to say goodbye
VIEW_SECONDS = 12.0  # until the views are true again after a fault
RECOVERY_SECONDS = 15.0  # until a session works again, and one step's deadline more
BASE_TASKS = 2  # of a node without sessions: the engine, the announcements


def expected_tokens(prompt: Sequence[int], count: int, blocks: int) -> list[int]:
    """The greedy tokens of the whole model: `generated`, one position at a time and in plain numbers."""
    ends, tokens = FakeEmbedAndHead(), list(prompt)
    sums = [[0] * HIDDEN for _ in range(blocks)]  # of each block's inputs so far
    for position in range(len(prompt) + count - 1):
        values = [tokens[position] * factor + 1 for factor in range(1, HIDDEN + 1)]
        for block, before in enumerate(sums):
            sums[block] = [a + b for a, b in zip(before, values, strict=True)]
            values = [(3 * value + block + 1 + a) % PRIME for value, a in zip(values, before, strict=True)]
        if position >= len(prompt) - 1:
            tokens.append(sum(values) % ends.vocabulary)
    return tokens[len(prompt) :]


def expected_sums(prompt: Sequence[int], count: int, run: Blocks) -> list[int]:
    """The right sums of a session over a run, for the prompt and for each position after it."""
    hidden = glue.hidden_of(tuple(prompt), count)
    whole, tokens = whole_model(hidden, *run), len(prompt)
    ends = range(tokens, hidden.shape[1] + 1)
    return [glue.sum_of(whole[:, 0 if end == tokens else end - 1 : end]) for end in ends]


def check_story(
    story: Story, plan: Plan, happened: Sequence[Happened], first_seen: Mapping[PeerId, float]
) -> Iterator[str]:
    """P1, P3 and progress of one generation.  first_seen: when its client heard of each server."""
    who = f"{story.client.name} with {len(story.prompt)} + {story.new_tokens} tokens"
    run = Blocks(0, plan.blocks) if story.run is None else story.run
    of_story = (story.prompt, story.new_tokens)
    expected = expected_tokens(*of_story, plan.blocks) if story.run is None else expected_sums(*of_story, run)
    found = story.tokens
    if found != expected[: len(found)]:
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
        yield f"P1: {who}: token {at} is {found[at]}, not {expected[at]}"
    failed = any(call.error is not None for call in story.calls)
    if story.done and not failed and len(found) != story.new_tokens:
        yield f"P1: {who}: {len(found)} tokens came"
    for number, call in enumerate(story.calls):
        for complaint in _check_call(
            story.client, call, plan, [*happened, *_unknown(call, plan, first_seen)], run
        ):
            yield f"{complaint} (token {number} of {who}, from {call.began:.2f} to {call.ended:.2f})"


def check_rows(
    story: RowsStory, plan: Plan, happened: Sequence[Happened], first_seen: Mapping[PeerId, float]
) -> Iterator[str]:
    """P1, P3 and progress of one session of some rows, beside a plain list of each row's inputs."""
    who = f"{story.client.name} with {story.job.batch} rows"
    given: Tensor | None = None
    for number, step in enumerate(story.applied):
        before = step.hidden[:, :0] if given is None else given[:, : step.position]
        if step.rows is not None:
            before = before[list(step.rows)]
        given = torch.cat([before, step.hidden], dim=1)
        expected = whole_model(given, 0, plan.blocks)[:, step.position :]
        if step.found is None or not torch.equal(step.found, expected):
            yield f"P1: {who}: the answer to step {number} of {len(story.applied)} is not the whole model's"
            break
    for number, call in enumerate(story.calls):
        known = [*happened, *_unknown(call, plan, first_seen)]
        for complaint in _check_call(story.client, call, plan, known, Blocks(0, plan.blocks)):
            yield f"{complaint} (call {number} of {who}, from {call.began:.2f} to {call.ended:.2f})"


def _check_call(
    client: ClientPlan, call: Call, plan: Plan, happened: Sequence[Happened], run: Blocks
) -> Iterator[str]:
    if call.ended - call.began > client.give_up_seconds + SLACK_SECONDS:
        yield f"P3: a call took {call.ended - call.began:.2f} s, {client.give_up_seconds} s are allowed"
    if call.error is None:
        return
    what = f"{type(call.error).__name__}: {call.error}"
    if not glue.names_its_cause(call.error):
        yield f"P3: an error names no cause: {what}"
    patience = VIEW_SECONDS if isinstance(call.error, NoChain) else RECOVERY_SECONDS + client.step_seconds
    since = _well_since(call, plan, happened, run)
    if call.ended - since > patience:
        yield f"progress: there was a chain {_told(since)}: {what}"


def _well_since(call: Call, plan: Plan, happened: Sequence[Happened], run: Blocks) -> float:
    """Since when in a call the client could reach servers of its blocks, none of which any fault concerned.

    Servers with little room do not count.  Minus infinity where there was no fault before or in the call
    (frames that come late are none, but may make a step or an opening slow).
    """
    faults = [fault for fault in happened if fault.began < call.ended]
    if not faults and not plan.loss:
        return -math.inf
    since, struck = call.ended, set[str]()
    for fault in sorted(faults, key=lambda each: -each.well):
        since = max(min(since, fault.well), call.began)
        struck.update(fault.who)
        if call.client in struck or not _covered(plan, struck, run):
            return since
    return call.began


def _unknown(call: Call, plan: Plan, first_seen: Mapping[PeerId, float]) -> Iterator[Happened]:
    """Servers that the client did not know when its call began: to it they were not there."""
    for node in plan.nodes:
        peer = PeerId(node.name)
        seen = first_seen.get(peer, math.inf)
        if seen > call.began:
            yield Happened(Fault("unknown", 0.0, seen, (peer,)), (peer,), 0.0, seen)


def _told(since: float) -> str:
    return f"since {since:.2f}" if since > -math.inf else "all the time"


def _covered(plan: Plan, struck: set[str], run: Blocks) -> bool:
    useful = [each for each in plan.nodes if each.name not in struck and each.tokens >= ROOMY]
    return not gaps(useful, run)


def check_idle(world: World) -> Iterator[str]:
    """P6: nothing lingers at any node that lives, nor at the clients."""
    for node in world.nodes.values():
        if not node.alive:
            continue
        found = glue.left_over(node.listener)
        if node.handlers:
            found.append(f"{node.handlers} handlers")
        if (tasks := len(node.nursery.child_tasks)) > BASE_TASKS:
            found.append(f"{tasks - BASE_TASKS} tasks")
        if found:
            yield f"P6: {node.peer} still has {', '.join(found)}"
    living = [peer for peer, each in world.network.participants.items() if each.alive]
    for stream in world.network.lingering(living):
        yield f"P6: a stream is open: {stream}"
