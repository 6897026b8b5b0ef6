"""The jobs that wait, by kind and by peer: bounds, progress and deadlines, without any choice."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

from node.serving.executor.jobs import Job, Kind
from tensor_codec.errors import LocalProtocolError, TooManyStreams
from tensor_codec.limits import Limits

RETRY_SECONDS = 1.0
MAX_STATELESS = 16  # waiting, of all peers: each may take seconds
MAX_STATELESS_PER_PEER = 4


@dataclass(slots=True)
class JobQueues:
    """Jobs that wait or run.

    lanes: of each kind, the queue of each peer; peers stand in the order in which they are served.
    done: of each job, positions of a row that have run; of a stateless request, its parts that have run.
    next_deadline: no job that has not begun has an earlier deadline.
    """

    limits: Limits
    max_stateless: int = MAX_STATELESS
    max_stateless_per_peer: int = MAX_STATELESS_PER_PEER
    lanes: dict[Kind, dict[str, deque[Job]]] = field(default_factory=lambda: {kind: {} for kind in Kind})
    jobs: dict[int, Job] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    expired: list[Job] = field(default_factory=list)
    next_deadline: float = math.inf
    _stateless: int = 0

    def waiting_of(self, peer: str) -> int:
        """Jobs of this peer that wait or run."""
        return sum(len(lane.get(peer, ())) for lane in self.lanes.values())

    def add(self, job: Job) -> None:
        """Queue a job.  Raises TooManyStreams, and then nothing has changed."""
        if job.number in self.jobs:
            raise LocalProtocolError(f"job {job.number} was submitted twice")
        lanes, stateless = self.lanes, job.kind is Kind.STATELESS
        if stateless:
            waiting, allowed = self._stateless, self.max_stateless
            mine, allowed_mine = len(lanes[job.kind].get(job.peer, ())), self.max_stateless_per_peer
        else:
            waiting, allowed = len(self.jobs) - self._stateless, self.limits.max_waiting_steps
            mine = len(lanes[Kind.DECODE].get(job.peer, ())) + len(lanes[Kind.PREFILL].get(job.peer, ()))
            allowed_mine = self.limits.max_waiting_steps_per_peer
        if waiting >= allowed or mine >= allowed_mine:
            what = "stateless requests" if stateless else "steps"
            if waiting >= allowed:
                raise TooManyStreams(f"{waiting} {what} wait for compute here, {allowed} may", RETRY_SECONDS)
            raise TooManyStreams(
                f"{mine} {what} of yours wait for compute here, {allowed_mine} may", RETRY_SECONDS
            )
        queue = lanes[job.kind].get(job.peer)
        if queue is None:
            queue = lanes[job.kind][job.peer] = deque()
        queue.append(job)
        self.jobs[job.number] = job
        self.done[job.number] = 0
        self._stateless += stateless
        self.next_deadline = min(self.next_deadline, job.deadline)

    def remove(self, job: Job) -> None:
        """Forget a job that is here."""
        del self.jobs[job.number], self.done[job.number]
        self._stateless -= job.kind is Kind.STATELESS
        lane = self.lanes[job.kind]
        queue = lane[job.peer]
        if len(queue) > 1:
            queue.remove(job)
        else:
            del lane[job.peer]

    def expire(self, now: float, running: Container[int]) -> None:
        """Move the jobs whose deadline has come to `expired`, except those that have begun.

        running: the numbers of jobs of which a piece runs now.
        """
        waiting = [
            job for job in self.jobs.values() if not self.done[job.number] and job.number not in running
        ]
        self.next_deadline = math.inf
        for job in waiting:
            if job.deadline <= now:
                self.remove(job)
                self.expired.append(job)
            else:
                self.next_deadline = min(self.next_deadline, job.deadline)

    def in_rounds(self, kind: Kind) -> list[Job]:
        """The first job of every peer, then the second one of every peer, and so on."""
        queues = self.lanes[kind].values()
        if len(queues) == 1:
            return list(itertools.chain.from_iterable(queues))
        rounds = itertools.zip_longest(*queues)
        return [job for jobs in rounds for job in jobs if job is not None]
