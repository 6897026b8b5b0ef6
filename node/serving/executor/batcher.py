"""Decides which steps run next, together: pure, without torch, threads or a clock.

The engine submits steps as they arrive.  Whenever the compute is free it asks for the next batch, runs
it, and says how long that took; so a batch is put together as late as possible, out of all that is
ready by then, and one runs at a time.  Times are seconds on the caller's clock.

One step of a large model costs about the same for one row as for many, until the hardware is full:
that is why decode steps of all sessions run together.  It is also why this is where a server is
shared out.  A turn (the running of one batch) cannot be interrupted, so whoever is not part of it
waits for its end; fairness is a matter of keeping turns short while several peers are there, and
`Cost` is what tells short from long before it is tried.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from node.serving.executor.batch_cost import MIN_SECONDS, Cost
from tensor_codec.errors import LocalProtocolError, TooManyStreams
from tensor_codec.limits import Limits

MAX_PASSED_OVER = 3  # turns that a peer with something to run may be passed over for cheaper ones
RETRY_SECONDS = 1.0


class Kind(enum.Enum):
    """Decode steps run together, prefills in chunks, stateless requests (forward, backward) whole."""

    DECODE = enum.auto()
    PREFILL = enum.auto()
    STATELESS = enum.auto()


@dataclass(frozen=True, slots=True)
class Job:
    """One step: `rows` x `tokens` positions through the blocks [start, stop).

    number: unlike that of any other job.  deadline: when it is not worth starting any more.
    """

    number: int
    peer: str
    kind: Kind
    rows: int
    tokens: int
    start: int
    stop: int
    deadline: float = math.inf

    @property
    def blocks(self) -> int:
        """Blocks that the job goes through."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Piece:
    """The positions [offset, offset + tokens) of every row of a job."""

    job: Job
    offset: int
    tokens: int

    @property
    def last(self) -> bool:
        """Whether the job is done after this piece."""
        return self.offset + self.tokens == self.job.tokens

    @property
    def work(self) -> int:
        """Positions times blocks."""
        return self.job.rows * self.tokens * self.job.blocks


Batch = tuple[Piece, ...]


def segments(pieces: Sequence[Piece]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Runs of blocks in order, (start, stop, indices of the pieces that are active there).

    A piece joins at its first block and leaves at its last one; blocks that nobody uses are left out.
    """
    bounds = sorted({bound for piece in pieces for bound in (piece.job.start, piece.job.stop)})
    runs = []
    for start, stop in itertools.pairwise(bounds):
        active = tuple(i for i, p in enumerate(pieces) if p.job.start <= start and stop <= p.job.stop)
        if active:
            runs.append((start, stop, active))
    return runs


@dataclass(slots=True)
class _Peer:
    """A peer that has jobs, or had one a moment ago.

    seen: when one was last submitted or run; hasty: the same of short decode steps.  charged: seconds
    of compute that it had, on a scale where newcomers begin at the least of the others.
    """

    seen: float
    charged: float
    hasty: float = -math.inf
    passed_over: Counter[Kind] = field(default_factory=Counter)


@dataclass(slots=True)
class Batcher:
    """Queues of steps, and the choice of what runs next.

    Promises, checked by tests/unit/test_batcher.py:
      * ready decode steps of all sessions run in one batch, whatever blocks each of them uses;
      * a prefill runs in chunks, in order; short ones of a peer share a turn of no more positions than
        one chunk, so that sessions which begin together get their first tokens together;
      * between two turns of prefill or stateless requests a decode batch runs if a step is ready, so
        a decode step waits for one of them at most, and for the decode batch that it just missed;
      * a step of a peer that had no part in the last decode batch does not even wait for the chunk;
      * stateless requests and prefills take turns when both wait;
      * every peer's first decode step is in the next decode batch if the rows allow it; of chunks and
        stateless requests the peer runs next that had the least compute, and nobody is passed over
        more than a few times;
      * while other peers are active a turn is short: beyond one step of each peer, decode steps join
        only while the batch takes `joint_slowdown` times as long as one row (`absent_slowdown` times
        if an active peer has no part in it); and if anyone decodes, a chunk takes
        `absent_slowdown` times as long, and so much more as the next decode batch will stay below its own;
      * what cannot be short (many rows, a large stateless request) rests afterwards for as long as it
        took, if other peers run short decode steps: nothing long begins in that time;
      * a peer with one session keeps at least half of its speed beside one that floods;
      * queues are bounded, for all and for each peer;
      * what is cancelled or expired is not begun, and leaves no trace;
      * a session's rows are never split, and a job of more than `most_rows` runs alone.

    Half of its speed: a step that takes D alone, and comes T after the last answer, makes a cycle of
    T + D.  Beside others it waits for the end of the turn that it just missed and for its own batch,
    1.25 D and 1.5 D at most: T + 2.75 D, less than twice as much where T is at least 0.75 D.  (3.5 D,
    where it missed another's step of several rows.)  The network's round trip, other hops and the
    client's own compute are in T; with T near 0 it keeps 0.36.  After a long turn it has the server
    for as long as that turn took: half of its speed on the average, less a step that the next long
    turn catches.  All that compares batches through the same blocks, and is as good as `Cost` is.

    Peers are charged by seconds for chunks, because one that also decodes has had compute already when
    its chunk comes due, which round robin by turn would forget; but not strictly, because its prefill
    would then starve behind its own decode steps while another peer's prefills never end.

    decode_seconds_per_block, prefill_seconds_per_block_token: a first guess, then learned.
    """

    decode_seconds_per_block: float
    prefill_seconds_per_block_token: float
    limits: Limits = field(default_factory=Limits)
    chunk_tokens: int = 256  # rows * tokens: where a prefill's speed per token levels off
    most_rows: int = 64  # of a decode batch: beyond it compute, not weights, is what is waited for
    most_stateless: int = 16  # waiting, of all peers: each may take seconds
    most_stateless_per_peer: int = 4
    recently_active_seconds: float = 2.0  # a token's way through a chain over slow links
    joint_slowdown: float = 1.5  # of a batch that gives every active peer its step
    absent_slowdown: float = 1.25  # of a turn that an active peer waits for; with 1 no row could join
    _costs: dict[Kind, Cost] = field(init=False)
    _lanes: dict[Kind, dict[str, deque[Job]]] = field(init=False)  # peers in the order of their turns
    _offsets: dict[int, int] = field(default_factory=dict)  # of unfinished jobs, running or not
    _expired: list[Job] = field(default_factory=list)
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _running: Batch | None = None
    _rest_until: float = -math.inf
    _last_other: Kind = Kind.STATELESS  # of prefill and stateless, which had its turn last
    _after_decode: bool = False
    _let_ahead: bool = False  # the chunk that is due has let a decode batch go before it
    _last_peers: frozenset[str] = frozenset()  # of the last decode batch

    def __post_init__(self) -> None:
        per_position = self.prefill_seconds_per_block_token
        fixed = max(self.decode_seconds_per_block - per_position, MIN_SECONDS)
        self._costs = {kind: Cost(fixed, per_position) for kind in Kind}
        self._lanes = {kind: {} for kind in Kind}

    @property
    def waiting(self) -> int:
        """Jobs that wait or run."""
        return len(self._offsets)

    def waiting_of(self, peer: str) -> int:
        """Jobs of this peer that wait or run."""
        return sum(len(lane.get(peer, ())) for lane in self._lanes.values())

    def resume_at(self) -> float:
        """After `next` gave None: when to ask again, even if nothing is submitted until then.

        Infinity, unless all that waits is held back by the rest after a long turn.
        """
        return self._rest_until if self._offsets and self._running is None else math.inf

    def submit(self, job: Job, now: float) -> None:
        """Queue a job.  Raises TooManyStreams, and then nothing has changed."""
        if job.number in self._offsets:
            raise LocalProtocolError(f"job {job.number} was submitted twice")
        stateless = job.kind is Kind.STATELESS
        kinds = (Kind.STATELESS,) if stateless else (Kind.DECODE, Kind.PREFILL)
        most = self.most_stateless if stateless else self.limits.max_waiting_steps
        mine = self.most_stateless_per_peer if stateless else self.limits.max_waiting_steps_per_peer
        what = "stateless requests" if stateless else "steps"
        waiting = sum(len(queue) for kind in kinds for queue in self._lanes[kind].values())
        if waiting >= most:
            raise TooManyStreams(f"{waiting} {what} wait for compute here, {most} may", RETRY_SECONDS)
        waiting = sum(len(self._lanes[kind].get(job.peer, ())) for kind in kinds)
        if waiting >= mine:
            raise TooManyStreams(
                f"{waiting} {what} of yours wait for compute here, {mine} may", RETRY_SECONDS
            )
        peer = self._touch(job, now)
        if not self.waiting_of(job.peer):  # it earned nothing by being away
            others = [other.charged for other in self._peers.values() if other is not peer]
            peer.charged = max(peer.charged, min(others, default=0.0))
        self._lanes[job.kind].setdefault(job.peer, deque()).append(job)
        self._offsets[job.number] = 0

    def cancel(self, number: int) -> None:
        """Forget a job, if it is still there; of one that is running, no further piece will run."""
        self._expired = [job for job in self._expired if job.number != number]
        for job in self._jobs():
            if job.number == number:
                return self._remove(job)

    def expired(self, now: float) -> list[Job]:
        """Jobs whose deadline passed before they were done: each is told once, and was taken out."""
        self._look_at_clock(now)
        expired, self._expired = self._expired, []
        return expired

    def next(self, now: float) -> Batch | None:
        """The batch to run now, or None.  The next call comes after `finished`."""
        if self._running is not None:
            raise LocalProtocolError("a batch was asked for while one is running")
        self._look_at_clock(now)
        for kind in self._turns():
            batch = self._decode_batch(now) if kind is Kind.DECODE else self._single(kind, now)
            if batch:
                self._began(kind, batch)
                return batch
        return None

    def finished(self, batch: Batch, seconds: float, now: float) -> None:
        """The batch that `next` gave was run, in so many seconds; also if it failed."""
        if batch is not self._running:
            raise LocalProtocolError("a batch is finished that is not running")
        self._running = None
        if any(self._is_long(piece.job) for piece in batch):
            rest = min(seconds, self.recently_active_seconds)  # the others would be forgotten by then
            self._rest_until = max(self._rest_until, now + rest)
        work = sum(piece.work for piece in batch)
        self._costs[batch[0].job.kind].learn(_blocks(batch), work, seconds)
        for piece in batch:
            self._touch(piece.job, now).charged += seconds * piece.work / work
            if piece.job.number not in self._offsets:
                continue  # cancelled meanwhile
            if piece.last:
                self._remove(piece.job)
            else:
                self._offsets[piece.job.number] += piece.tokens

    def _turns(self) -> tuple[Kind, ...]:
        """The kinds in the order in which they are asked for something to run."""
        others = (Kind.PREFILL, Kind.STATELESS)
        if self._last_other is Kind.PREFILL:
            others = (Kind.STATELESS, Kind.PREFILL)
        missed = any(peer not in self._last_peers for peer in self._lanes[Kind.DECODE])
        if not self._after_decode or (missed and not self._let_ahead):
            return (Kind.DECODE, *others)
        return (*others, Kind.DECODE)

    def _began(self, kind: Kind, batch: Batch) -> None:
        self._running = batch
        for piece in batch:  # its peer goes to the end of the round
            lane = self._lanes[kind]
            lane[piece.job.peer] = lane.pop(piece.job.peer)
        if kind is Kind.DECODE:
            others = self._lanes[Kind.PREFILL] or self._lanes[Kind.STATELESS]
            self._let_ahead = self._after_decode and bool(others)
            self._after_decode = True
            self._last_peers = frozenset(piece.job.peer for piece in batch)
        else:
            self._let_ahead = self._after_decode = False
            self._last_other = kind

    def _decode_batch(self, now: float) -> Batch:
        """One step of every peer, then more of them, round by round, while rows and seconds allow."""
        cost, jobs, rows, work = self._costs[Kind.DECODE], list[Job](), 0, 0
        blocks, peers = set[int](), set[str]()
        full = set[str]()  # peers one of whose steps did not fit: later ones must not overtake it
        most_seconds = math.nan
        for job in _round_robin(self._lanes[Kind.DECODE]):
            if job.peer in full or self._held_back(job, now):
                continue
            further = job.peer in peers
            if further and math.isnan(most_seconds):  # every peer's first step is in by now
                most_seconds = self._most_seconds(jobs, peers)
            wider = blocks.union(range(job.start, job.stop))
            more = work + job.rows * job.tokens * job.blocks
            too_slow = further and cost.seconds(len(wider), more) > most_seconds
            if jobs and (rows + job.rows > self.most_rows or too_slow):
                full.add(job.peer)
                continue
            jobs.append(job)
            peers.add(job.peer)
            blocks, work, rows = wider, more, rows + job.rows
        return tuple(Piece(job, 0, job.tokens) for job in jobs)

    def _most_seconds(self, jobs: list[Job], peers: set[str]) -> float:
        """How long a decode batch with these jobs may become by further ones of their peers."""
        if len(self._peers) == 1:
            return math.inf
        slowdown = self.joint_slowdown if self._peers.keys() <= peers else self.absent_slowdown
        return slowdown * min(self._one_row(job) for job in jobs)

    def _single(self, kind: Kind, now: float) -> Batch:
        """A chunk, or a whole stateless request, of the peer that had the least compute."""
        firsts = (
            next((job for job in queue if not self._held_back(job, now)), None)
            for queue in self._lanes[kind].values()
        )
        heads = [job for job in firsts if job is not None]
        if not heads:
            return ()

        def rank(job: Job) -> tuple[int, float]:
            peer = self._peers[job.peer]
            passed = peer.passed_over[kind]
            return (-passed if passed >= MAX_PASSED_OVER else 0, peer.charged)

        job = min(heads, key=rank)  # the first of equals: they are in the order of their turns
        for other in heads:
            self._peers[other.peer].passed_over[kind] += 1
        self._peers[job.peer].passed_over[kind] = 0
        if kind is Kind.STATELESS:
            return (Piece(job, 0, job.tokens),)
        return self._chunks(job, self._chunk(job, now), now)

    def _chunks(self, job: Job, tokens: int, now: float) -> Batch:
        """The next piece of a prefill, `tokens` a row at most, and whole ones of its peer in what is left."""
        offset = self._offsets[job.number]
        pieces = [Piece(job, offset, min(tokens, job.tokens - offset))]
        left = (tokens - pieces[0].tokens) * job.rows if pieces[0].last else 0
        for other in self._lanes[Kind.PREFILL][job.peer]:
            remaining = other.tokens - self._offsets[other.number]
            if other is job or other.rows * remaining > left or self._held_back(other, now):
                continue
            pieces.append(Piece(other, self._offsets[other.number], remaining))
            left -= other.rows * remaining
        return tuple(pieces)

    def _chunk(self, job: Job, now: float) -> int:
        """Tokens per row of a prefill's next piece."""
        positions = self.chunk_tokens
        if len(self._peers) > 1 and self._hasty(now):  # the same for all, or a short one had no chance
            # Whoever misses a decode batch waits for this turn and for the next batch: both count.
            seconds = self.joint_slowdown + self.absent_slowdown - self._next_slowdown()
            seconds *= self._one_row(job) / job.blocks
            cost = self._costs[Kind.PREFILL]
            positions = min(positions, int((seconds - cost.per_block) / cost.per_position))
        return max(1, positions // job.rows)

    def _next_slowdown(self) -> float:
        """What the next decode batch will take against one row, as far as it is there already."""
        waiting = (job.rows * job.tokens for queue in self._lanes[Kind.DECODE].values() for job in queue)
        cost = self._costs[Kind.DECODE]
        return min(self.joint_slowdown, cost.seconds(1, 1 + sum(waiting)) / cost.seconds(1, 1))

    def _one_row(self, job: Job) -> float:
        """Seconds of a decode step of one row through the job's blocks: what waiting is measured by."""
        return self._costs[Kind.DECODE].seconds(job.blocks, job.blocks)

    def _is_long(self, job: Job) -> bool:
        """Whether the job's smallest piece alone takes longer than a shared turn may."""
        positions = job.rows * (1 if job.kind is Kind.PREFILL else job.tokens)
        seconds = self._costs[job.kind].seconds(job.blocks, job.blocks * positions)
        return seconds > self.joint_slowdown * self._one_row(job)

    def _held_back(self, job: Job, now: float) -> bool:
        """Whether the job must wait because a long turn is only just over."""
        return now < self._rest_until and self._is_long(job) and bool(self._hasty(now) - {job.peer})

    def _hasty(self, now: float) -> set[str]:
        """Peers that run short decode steps, now or a moment ago."""
        since = now - self.recently_active_seconds
        return {name for name, peer in self._peers.items() if peer.hasty >= since}

    def _look_at_clock(self, now: float) -> None:
        """Take out what has expired, and forget peers that have gone."""
        running = {piece.job.number for piece in self._running or ()}
        for job in [job for job in self._jobs() if job.deadline <= now and job.number not in running]:
            self._remove(job)
            self._expired.append(job)
        gone = now - self.recently_active_seconds
        for name in [name for name, peer in self._peers.items() if peer.seen < gone]:
            if not self.waiting_of(name):
                del self._peers[name]

    def _touch(self, job: Job, now: float) -> _Peer:
        peer = self._peers.get(job.peer)
        if peer is None:
            peer = self._peers[job.peer] = _Peer(now, 0.0)
        peer.seen = now
        if job.kind is Kind.DECODE and not self._is_long(job):
            peer.hasty = now
        return peer

    def _jobs(self) -> Iterator[Job]:
        return (job for lane in self._lanes.values() for queue in lane.values() for job in queue)

    def _remove(self, job: Job) -> None:
        del self._offsets[job.number]
        lane = self._lanes[job.kind]
        lane[job.peer].remove(job)
        if not lane[job.peer]:
            del lane[job.peer]


def _blocks(batch: Batch) -> int:
    """Blocks that a batch runs through, each counted once."""
    return len(set().union(*(range(piece.job.start, piece.job.stop) for piece in batch)))


def _round_robin(lane: dict[str, deque[Job]]) -> Iterator[Job]:
    """Every peer's first job, then every peer's second one, and so on."""
    for jobs in itertools.zip_longest(*lane.values()):
        yield from (job for job in jobs if job is not None)
