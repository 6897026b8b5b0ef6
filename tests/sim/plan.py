"""The events of one run of the simulation, all drawn from one seed before anything starts.

A plan is plain values: a swarm, its clients with their generations, and the faults with the time at
which each begins and ends.  Some faults wait for a client to have so many tokens and then strike a hop
of the very chain that it uses.  Every fault ends, so every generation can come to an end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from routing.blocks import Blocks
from tests.fakes_lies import LIES

FAULTS_UNTIL = 20.0  # seconds after the start in which faults begin
LONG_FAULT, LONGEST_FAULT = 25.0, 100.0
ROOMY = 100_000  # tokens of a budget that no session fills
VOCABULARY = 26
RUNS_EVERY = 5  # seeds: one of them has sessions over runs of blocks
ROWS_EVERY = 6  # seeds: one of them has sessions whose rows change their order
DRAFTS_EVERY = 7  # seeds: one of them has sessions with steps of several tokens, of which some are taken back
GUESSES_EVERY = 3  # seeds: one of them has generations with guessed tokens
STANDBY_EVERY = 8  # seeds: one of them has clients whose sessions have standbys
LIES_EVERY = 4  # seeds: one of them has servers that lie for a while
KINDS = (
    "kill", "vanish", "freeze", "slow", "drain", "cut", "silence", "deaf", "unreachable", "partition",
    "swizzle", "full", "sick", "lossy", "clock",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A server of blocks [start, stop).

    tokens: of its cache budget.  place: decides the delays.  skew_seconds: of its wall clock.
    """

    name: str
    start: int
    stop: int
    tokens: int
    seconds_per_block: float
    place: tuple[float, float]
    skew_seconds: float


@dataclass(frozen=True, slots=True)
class Job:
    """One generation.  patience: the client leaves after so many seconds, None: it stays to the end.

    again: the prompt of a second turn in the same conversation, which shares a beginning with the first.
    run: the blocks of a session for hidden states, in place of a generation: as many positions as the
    prompt has tokens in one piece, then one after the other.
    wrong: of guessed tokens, of which every step has many, the share of wrong ones; None: the usual guesses.
    """

    at: float
    prompt: tuple[int, ...]
    new_tokens: int
    patience: float | None
    again: tuple[int, ...]
    run: Blocks | None = None
    wrong: float | None = None


@dataclass(frozen=True, slots=True)
class RowsStep:
    """One step of a session of several rows.

    tokens: of each row.  back: positions that it goes back before it.  rows: the order of the rows, if any.
    patience: the client leaves a first try of it after so many seconds, None: it makes none.
    """

    tokens: int
    back: int
    rows: tuple[int, ...] | None
    patience: float | None


@dataclass(frozen=True, slots=True)
class RowsJob:
    """One session of `batch` rows whose order changes, as a beam search changes it; of one row: of drafts."""

    at: float
    batch: int
    steps: tuple[RowsStep, ...]


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """A client and its generations, which run beside each other.  killed: at that time, if at all.

    standby: its sessions have standbys.
    """

    name: str
    place: tuple[float, float]
    wait_seconds: float
    step_seconds: float
    give_up_seconds: float
    jobs: tuple[Job, ...]
    killed: float | None
    rows_jobs: tuple[RowsJob, ...] = ()
    standby: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """Something goes wrong at `at` and is well again after `seconds`.

    who: participants that it strikes; the role of each depends on the kind (see faults.py).
    hit: (client, tokens, hop): strike when that client has so many tokens, or at `at` if that is
    earlier, and then that hop of its chain in place of who[0].
    """

    kind: str
    at: float
    seconds: float
    who: tuple[str, ...]
    amount: float = 0.0
    hit: tuple[str, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.  loss: of a frame that arrives late; max_step_tokens, window: see network.py, Limits."""

    seed: int
    blocks: int
    nodes: tuple[NodePlan, ...]
    clients: tuple[ClientPlan, ...]
    faults: tuple[Fault, ...]
    loss: float
    jitter: float
    bytes_per_second: float
    max_step_tokens: int
    window: int

    @property
    def faults_end(self) -> float:
        """When all is well again, at the latest."""
        return max((fault.at + fault.seconds for fault in self.faults), default=0.0)


def make_plan(seed: int, rng: random.Random) -> Plan:
    """The plan of a seed.  rng: seeded with it; it goes on to the run."""
    blocks = rng.randint(6, 12)
    nodes = _nodes(rng, blocks)
    clients = tuple(_client(rng, index) for index in range(rng.choice((1, 1, 2, 2, 3, 4))))
    if seed % RUNS_EVERY == RUNS_EVERY - 1:  # drawn apart: the plans of all other seeds stay as they are
        clients = _with_runs(clients, blocks, random.Random(f"runs {seed}"))
    if seed % ROWS_EVERY == 1:  # apart, as these
        rows_jobs = _rows_jobs(random.Random(f"rows {seed}"))
        clients = (replace(clients[0], rows_jobs=rows_jobs), *clients[1:])
    if seed % STANDBY_EVERY == 1:
        clients = tuple(replace(each, standby=True) for each in clients)
    if seed % DRAFTS_EVERY == DRAFTS_EVERY - 2:  # apart, as these
        own = random.Random(f"drafts {seed}")
        clients = tuple(replace(each, rows_jobs=(*each.rows_jobs, *_drafts_jobs(own))) for each in clients)
    if seed % GUESSES_EVERY == GUESSES_EVERY - 1:  # apart, as these
        clients = _with_guesses(clients, random.Random(f"guesses {seed}"))
    names = [node.name for node in nodes], [client.name for client in clients]
    count = rng.choice((0, 1, 2, 3, 4, 5, 6, 8))
    faults = tuple(_fault(rng, *names) for _ in range(count))
    if seed % LIES_EVERY == 3:  # apart, as these
        faults += _lies(random.Random(f"lies {seed}"), *names)
    return Plan(
        seed=seed,
        blocks=blocks,
        nodes=nodes,
        clients=clients,
        faults=faults,
        loss=rng.choice((0.0, 0.0, 0.01, 0.05)),
        jitter=rng.choice((0.0, 0.005, 0.05)),
        bytes_per_second=rng.choice((1e4, 1e5, 1e7)),
        max_step_tokens=rng.choice((2048, 2048, 16, 7)),
        window=rng.choice((256 * 1024, 256 * 1024, 2048)),
    )


def _nodes(rng: random.Random, blocks: int) -> tuple[NodePlan, ...]:
    """Servers whose spans cover the model once or more, the first cover of them with room for all."""
    spans: list[tuple[int, int, bool]] = []
    for cover in range(rng.choice((1, 2, 2, 2, 3))):
        start = 0
        while start < blocks:
            stop = min(blocks, start + rng.randint(1, max(2, blocks * 2 // 3)))
            spans.append((start, stop, cover == 0))
            start = stop
    wanted = rng.choice((5, 5, 6, 8, 10, 12, 30))
    while len(spans) < wanted:
        start = rng.randrange(blocks)
        spans.append((start, rng.randint(start + 1, blocks), False))
    rng.shuffle(spans)
    return tuple(_node(rng, index, *span) for index, span in enumerate(spans))


def _node(rng: random.Random, index: int, start: int, stop: int, roomy: bool) -> NodePlan:
    return NodePlan(
        name=f"n{index:02}",
        start=start,
        stop=stop,
        tokens=ROOMY if roomy else rng.choice((ROOMY, ROOMY, 256, 96, 32)),
        seconds_per_block=rng.choice((0.001, 0.01, 0.03)),
        place=_place(rng),
        skew_seconds=rng.choice((0.0, 0.0, -120.0, 120.0, 86400.0, -86400.0)),
    )


def _client(rng: random.Random, index: int) -> ClientPlan:
    return ClientPlan(
        name=f"c{index}",
        place=_place(rng),
        wait_seconds=rng.choice((5.0, 15.0, 30.0)),
        step_seconds=rng.choice((2.0, 5.0, 30.0)),
        give_up_seconds=rng.choice((10.0, 30.0, 60.0, 120.0)),
        jobs=tuple(_job(rng) for _ in range(rng.choice((1, 1, 2)))),
        killed=rng.uniform(1, FAULTS_UNTIL) if rng.random() < 0.08 else None,
    )


def _job(rng: random.Random) -> Job:
    prompt = _tokens(rng, rng.choice((rng.randint(1, 60), rng.randint(1, 8))))
    turns = rng.random() < 0.25
    return Job(
        at=rng.uniform(0, 8),
        prompt=prompt,
        new_tokens=rng.choice((rng.randint(5, 15), rng.randint(5, 15), rng.randint(5, 40))),
        patience=rng.uniform(0.2, 15) if rng.random() < 0.12 else None,
        again=(*prompt[: rng.randint(0, len(prompt))], *_tokens(rng, rng.randint(1, 6))) if turns else (),
    )


def _with_runs(clients: tuple[ClientPlan, ...], blocks: int, rng: random.Random) -> tuple[ClientPlan, ...]:
    """The clients, with half of their jobs over a run of blocks."""

    def job_with_run(job: Job) -> Job:
        start = rng.randrange(blocks)
        run = Blocks(start, rng.randint(start + 1, blocks))
        return replace(job, run=run) if rng.random() < 0.5 else job

    return tuple(replace(client, jobs=tuple(map(job_with_run, client.jobs))) for client in clients)


def _with_guesses(clients: tuple[ClientPlan, ...], rng: random.Random) -> tuple[ClientPlan, ...]:
    """The clients, with guessed tokens in all their generations."""

    def job_with_guesses(job: Job) -> Job:
        return replace(job, wrong=rng.choice((0.0, 0.1, 0.3, 0.7)))

    return tuple(replace(client, jobs=tuple(map(job_with_guesses, client.jobs))) for client in clients)


def _rows_jobs(rng: random.Random) -> tuple[RowsJob, ...]:
    """Sessions whose rows change their order."""
    return tuple(_rows_job(rng) for _ in range(rng.choice((1, 1, 2))))


def _rows_job(rng: random.Random) -> RowsJob:
    batch = rng.randint(2, 4)
    first = RowsStep(rng.choice((1, 3, 20)), 0, None, None)
    steps = tuple(_rows_step(rng, batch) for _ in range(rng.randint(5, 25)))
    return RowsJob(rng.uniform(0, 8), batch, (first, *steps))


def _rows_step(rng: random.Random, batch: int) -> RowsStep:
    rows = tuple(rng.randrange(batch) for _ in range(batch))
    return RowsStep(
        tokens=rng.choice((1, 1, 1, 1, 3)),
        back=rng.choice((0, 0, 0, 0, 0, 1, 4)),
        rows=rng.choice((rows, rows, tuple(rng.sample(range(batch), batch)), None)),
        patience=rng.uniform(0.01, 1) if rng.random() < 0.1 else None,
    )


def _drafts_jobs(rng: random.Random) -> tuple[RowsJob, ...]:
    """Two sessions at about one moment whose steps verify drafts: some of a step's tokens are taken back."""
    return tuple(_drafts_job(rng) for _ in range(2))


def _drafts_job(rng: random.Random) -> RowsJob:
    steps = [RowsStep(rng.choice((1, 3, 20)), 0, None, None)]
    for _ in range(rng.randint(5, 20)):
        back = rng.randrange(steps[-1].tokens) if len(steps) > 1 else 0
        patience = rng.uniform(0.01, 1) if rng.random() < 0.1 else None
        steps.append(RowsStep(rng.choice((1, 1, 2, 4, 8, 16)), back, None, patience))
    return RowsJob(rng.uniform(1, 2), 1, tuple(steps))


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCABULARY) for _ in range(count))


def _place(rng: random.Random) -> tuple[float, float]:
    return rng.random(), rng.random()


def _fault(rng: random.Random, nodes: list[str], clients: list[str]) -> Fault:
    kind = rng.choice(KINDS)
    who = _who(rng, kind, nodes, clients)
    seconds = rng.choice((rng.uniform(0.1, 3), rng.uniform(3, 12), rng.uniform(12, LONG_FAULT)))
    if rng.random() < 0.08:
        seconds = rng.uniform(LONG_FAULT, LONGEST_FAULT)
    amount = {"slow": rng.choice((10.0, 100.0)), "clock": rng.choice((-200.0, 200.0))}.get(kind, 0.0)
    hit = None
    if rng.random() < 0.6:
        hit = rng.choice(clients), rng.randint(0, 20), rng.randrange(8)
    return Fault(kind, rng.uniform(0, FAULTS_UNTIL), seconds, who, amount, hit)


def _lies(rng: random.Random, nodes: list[str], clients: list[str]) -> tuple[Fault, ...]:
    """A server or two that lie; amount: the number of the lie."""
    return tuple(
        Fault(
            "lies",
            rng.uniform(0, FAULTS_UNTIL),
            rng.uniform(5, LONG_FAULT),
            (rng.choice(nodes),),
            float(rng.randrange(len(LIES))),
            (rng.choice(clients), rng.randint(0, 10), rng.randrange(8)),
        )
        for _ in range(rng.choice((1, 1, 2)))
    )


def _who(rng: random.Random, kind: str, nodes: list[str], clients: list[str]) -> tuple[str, ...]:
    if kind in ("cut", "silence", "deaf", "unreachable", "lossy"):
        one = rng.choice(nodes)
        return one, rng.choice([name for name in nodes + clients if name != one])
    if kind in ("partition", "swizzle"):
        everybody = nodes + clients if kind == "partition" else nodes
        return tuple(rng.sample(everybody, rng.randint(1, max(1, len(everybody) // 2))))
    return (rng.choice(nodes),)
