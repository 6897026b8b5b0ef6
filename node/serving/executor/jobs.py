"""The values that the scheduler works with: jobs, the pieces that they run in, and batches of pieces."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


class Kind(enum.Enum):
    """Decode steps run together, prefills in chunks, stateless requests (forward, backward) in parts."""

    DECODE = enum.auto()
    PREFILL = enum.auto()
    STATELESS = enum.auto()


@dataclass(frozen=True, slots=True)
class Job:
    """One step or request: `rows` x `tokens` positions through the blocks [start, stop).

    number: unique.  deadline: on the caller's clock; from then on the job is not begun, and one that has
    begun goes on.  parts: of a stateless request, the blocks [start, stop) of each part, in order; empty for
    a request that runs whole.
    prefix: of the peer's network address; peers of one prefix may be one machine with many ids.  "": unknown.
    weight: of a block with its adapter against one without: 1 + adapter values / block values.
    adapter: its id, "" for none; a batch reads its values once for all jobs that have it.
    """

    number: int
    peer: str
    kind: Kind
    rows: int
    tokens: int
    start: int
    stop: int
    deadline: float = math.inf
    parts: tuple[tuple[int, int], ...] = ()
    prefix: str = ""
    weight: float = 1
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a job that one batch runs: the positions [offset, offset + tokens) of every row.

    part: of a stateless request, the index in `Job.parts`; a part covers all positions.
    """

    job: Job
    offset: int
    tokens: int
    part: int = 0

    @property
    def last(self) -> bool:
        """Whether the job is done after this piece."""
        return self.offset + self.tokens == self.job.tokens and self.part + 1 >= len(self.job.parts)


Batch = tuple[Piece, ...]


Segment = tuple[int, int, tuple[int, ...]]  # blocks [start, stop), and the indices of jobs


def segments(jobs: Sequence[Job]) -> list[Segment]:
    """Runs of blocks in order: (start, stop, indices of the jobs that are active there).

    A job joins at its first block and leaves after its last one; blocks without a job are left out.
    """
    if len(jobs) == 1:
        return [(jobs[0].start, jobs[0].stop, (0,))]
    bounds = sorted({bound for job in jobs for bound in (job.start, job.stop)})
    runs = []
    for start, stop in itertools.pairwise(bounds):
        active = tuple(i for i, job in enumerate(jobs) if job.start <= start and stop <= job.stop)
        if active:
            runs.append((start, stop, active))
    return runs


def run_of(piece: Piece) -> tuple[int, int]:
    """The blocks [start, stop) of a piece."""
    job = piece.job
    return job.parts[piece.part] if job.parts else (job.start, job.stop)


def size_of(batch: Batch) -> tuple[float, int, list[float]]:
    """Blocks that a batch runs through, each counted once; its rows times tokens; the work of each piece.

    The values of an adapter count as a part of the blocks, once for each adapter.  The work of a piece is its
    rows times tokens times blocks, times its job's weight.
    """
    blocks, positions, works, added = set[int](), 0, list[float](), dict[str, float]()
    for piece in batch:
        job = piece.job
        start, stop = job.parts[piece.part] if job.parts else (job.start, job.stop)
        blocks.update(range(start, stop))
        positions += job.rows * piece.tokens
        works.append(job.rows * piece.tokens * (stop - start) * job.weight)
        if job.adapter:
            added[job.adapter] = max(added.get(job.adapter, 0.0), (job.weight - 1) * (stop - start))
    return (len(blocks) + sum(added.values()) if added else len(blocks)), positions, works
