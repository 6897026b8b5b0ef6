"""The jobs that wait, by kind and by peer: bounds, progress and deadlines, without any choice."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from node.serving.executor.jobs import Batch, Job, Kind
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
    expired: jobs that were taken out before they began: they were too late, or made room for another prefix.
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
    _by_party: Counter[str] = field(default_factory=Counter)

    def waiting_of_party(self, party: str) -> int:
        """Jobs of the peers of this prefix that wait or run."""
        return self._by_party[party]

    def waiting_of(self, peer: str) -> int:
        """Jobs of this peer that wait or run."""
        return sum(len(lane.get(peer, ())) for lane in self.lanes.values())

    def add(self, job: Job, running: Batch = ()) -> None:
        """Queue a job.  Raises TooManyStreams, and then nothing has changed.

        Where the queue is full, the prefix with the most jobs makes room for one with fewer: its last job is
        taken out.  running: the batch that runs now.
        """
        if job.number in self.jobs:
            raise LocalProtocolError(f"job {job.number} was submitted twice")
        lanes, stateless = self.lanes, job.kind is Kind.STATELESS
        if stateless:
            waiting, allowed = self._stateless, self.max_stateless
            mine = len(lanes[job.kind].get(job.peer, ()))
            allowed_mine = self.limits.part_of(job.peer, self.max_stateless, self.max_stateless_per_peer)
        else:
            waiting, allowed = len(self.jobs) - self._stateless, self.limits.max_waiting_steps
            mine = len(lanes[Kind.DECODE].get(job.peer, ())) + len(lanes[Kind.PREFILL].get(job.peer, ()))
            allowed_mine = self.limits.max_waiting_steps_per_peer
            if self.limits.peer_shares is not None:
                allowed_mine = self.limits.waiting_steps_of(job.peer)
        yields = None
        if waiting >= allowed and mine < allowed_mine and (job.prefix or self._has_own_share(job)):
            yields = self._last_of_most(job, running)
        if (waiting >= allowed and yields is None) or mine >= allowed_mine:
            what = "stateless requests" if stateless else "steps"
            if waiting >= allowed:
                raise TooManyStreams(f"{waiting} {what} wait for compute here, {allowed} may", RETRY_SECONDS)
            raise TooManyStreams(
                f"{mine} {what} of yours wait for compute here, {allowed_mine} may", RETRY_SECONDS
            )
        if yields is not None:
            self.remove(yields)
            self.expired.append(yields)
        queue = lanes[job.kind].get(job.peer)
        if queue is None:
            queue = lanes[job.kind][job.peer] = deque()
        queue.append(job)
        self.jobs[job.number] = job
        self.done[job.number] = 0
        self._by_party[job.prefix or job.peer] += 1
        self._stateless += stateless
        self.next_deadline = min(self.next_deadline, job.deadline)

    def remove(self, job: Job) -> None:
        """Forget a job that is here."""
        del self.jobs[job.number], self.done[job.number]
        self._stateless -= job.kind is Kind.STATELESS
        self._by_party[job.prefix or job.peer] -= 1
        if not self._by_party[job.prefix or job.peer]:
            del self._by_party[job.prefix or job.peer]
        lane = self.lanes[job.kind]
        queue = lane[job.peer]
        if len(queue) > 1:
            queue.remove(job)
        else:
            del lane[job.peer]

    def _last_of_most(self, new: Job, running: Batch) -> Job | None:
        """The last job that has not begun of the prefix with the most jobs; None unless `new`'s has fewer.

        Steps and stateless requests are counted apart.  O(jobs).
        """
        stateless = new.kind is Kind.STATELESS
        alike = [job for job in self.jobs.values() if (job.kind is Kind.STATELESS) == stateless]
        counts = Counter(job.prefix for job in alike if job.prefix)
        most = max(counts.values(), default=0)
        if not most or (counts[new.prefix] + 1 >= most and not self._has_own_share(new)):
            return None
        begun = {piece.job.number for piece in running}
        waiting = [job for job in alike if not self.done[job.number] and job.number not in begun]
        return next((job for job in reversed(waiting) if counts[job.prefix] == most), None)

    def _has_own_share(self, job: Job) -> bool:
        return self.limits.own_share(job.peer) is not None

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
        """The first job of every peer, then the second one of every peer, and so on.

        Peers of one prefix are one line of such rounds, where there are several prefixes.
        """
        queues = self.lanes[kind].values()
        if len(queues) == 1:
            return list(itertools.chain.from_iterable(queues))
        of_parties: dict[str, list[deque[Job]]] = {}
        for queue in queues:
            of_parties.setdefault(queue[0].prefix or queue[0].peer, []).append(queue)
        if len(of_parties) in (1, len(queues)):
            return _rounds(queues)
        return _rounds([_rounds(own) for own in of_parties.values()])


def _rounds(queues: Iterable[Iterable[Job]]) -> list[Job]:
    rounds = itertools.zip_longest(*queues)
    return [job for jobs in rounds for job in jobs if job is not None]
