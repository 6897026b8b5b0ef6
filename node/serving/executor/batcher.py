"""Decides which steps run next, together: pure, without torch, threads or a clock.

The engine submits steps as they arrive.  Whenever the compute is free it asks for the next batch, runs it,
and says how long that took.  So a batch is put together as late as possible, from all that is ready by
then, and one batch runs at a time.  Times are seconds on the caller's clock.

One step of a large model costs about the same for one row as for many, until the hardware is full: hence
decode steps of all sessions run together.  A batch cannot be interrupted, and a peer without a part in it
waits for its end.  Fairness means short batches while several peers are active; `Cost` predicts the
seconds of a batch before it is tried.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from node.devices import has_own_memory
from node.serving.executor.active_peers import ActivePeers
from node.serving.executor.batch_cost import BatchCosts
from node.serving.executor.crowds import Crowds
from node.serving.executor.job_queues import MAX_STATELESS, MAX_STATELESS_PER_PEER, JobQueues
from node.serving.executor.jobs import Batch, Job, Kind, Piece, size_of
from tensor_codec.errors import LocalProtocolError, Refused, TooManyStreams
from tensor_codec.limits import Limits

SPLIT_POSITIONS = 512  # of a request that is taken however slow the hardware is: clients split into these
MAX_RETRY_SECONDS = 60.0
CHUNK_POSITIONS = 256  # rows * tokens of a chunk: where a prefill's speed per token levels off


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How large batches may become, and for how long a peer counts as active."""

    chunk_positions: int = CHUNK_POSITIONS
    max_rows: int = 64  # of a decode batch: beyond it the compute takes the time, not the weights
    decode_tokens: int = 16  # of a step in a decode batch, each of them a row: drafts that are verified
    max_stateless: int = MAX_STATELESS
    max_stateless_per_peer: int = MAX_STATELESS_PER_PEER
    recently_active_seconds: float = 2.0  # a token's way through a chain over slow links
    joint_slowdown: float = 1.5  # of a batch that gives every active peer its step
    crowd_slowdown: float = 1.75  # of one with more peers of a prefix, where all active prefixes have a part
    absent_slowdown: float = 1.25  # of a batch that an active peer waits for; with 1 no row could join
    rested_slowdown: float = 2.0  # of one with a crowd's rows, which rest afterwards
    resting_slowdown: float = 1.02  # of a batch that a crowd's rows join although they rest
    crowd_rest: float = 18.0  # times the seconds that a crowd's rows take from others they have no batch
    prefill_rest: float = 1.5  # as `stateless_rest`, after a chunk that cannot be short
    stateless_rest: float = 7.0  # times a part's seconds nothing long begins after it, if others decode

    def decodes(self, rows: int, tokens: int, position: int) -> bool:
        """Whether a step of several tokens joins the decode batches, as drafts that are verified do.

        The first tokens of a session are a prompt, and a long step is a chunk of one: its attention reads the
        positions before it once for all tokens.
        """
        return position > 0 and tokens <= self.decode_tokens and rows * tokens <= self.max_rows

    def rest(self, kind: Kind) -> float:
        """Times the seconds of a long batch for which nothing long begins after it, if others decode."""
        return {Kind.PREFILL: self.prefill_rest, Kind.STATELESS: self.stateless_rest}.get(kind, 1.0)


# A GPU reads the weights of a block in the time in which it multiplies some hundred rows with them: a smaller
# chunk or batch wastes it.  1,024 rows of a chunk keep an H100 busy.
CPU_POLICY = BatchPolicy()
GPU_POLICY = BatchPolicy(chunk_positions=1024, max_rows=256)


def policy_for(device: object) -> BatchPolicy:
    """The sizes of batches on a device, by its name."""
    return GPU_POLICY if has_own_memory(device) else CPU_POLICY


@dataclass(slots=True)
class Batcher:
    """Queues of steps, and the choice of the next batch.

    Promises, checked by tests/unit/test_batcher.py:
      * ready decode steps of all sessions run in one batch, whatever blocks each of them uses;
      * a prefill runs in chunks, in order; short prefills of a peer share a batch of at most one chunk's
        positions, so that sessions which begin together get their first tokens together;
      * a stateless request runs in its parts, in order; one that has begun ends before another one begins;
      * between two batches of chunks or parts a decode batch runs if a step is ready, so a decode step
        waits for one of them at most, and for the decode batch that it just missed;
      * a step of a peer without a part in the last decode batch does not even wait for the chunk;
      * parts of stateless requests and chunks alternate when both wait;
      * every peer's first decode step is in the next decode batch if the rows allow it and it does not
        rest; of chunks and
        stateless requests the peer with the least compute runs next, and no peer is passed over more than a
        few times;
      * a peer whose steps have drafts waits for no longer chunks or parts than one with single tokens;
      * while other peers are active a batch is short: beyond one step of each peer, decode steps join
        only while the batch takes `joint_slowdown` times as long as one row (`absent_slowdown` times
        if an active peer has no part in it); and if a peer decodes, a chunk takes
        `absent_slowdown` times as long, plus the time by which the next decode batch stays below its limit;
      * a job that cannot be short (many rows, a large part) starts a cool-down as long as it took, if other
        peers run short decode steps: nothing long begins in that time (`prefill_rest` times as long after
        a chunk, `stateless_rest` times as long after a part of a stateless request);
      * a chunk is not so short that the pass over the weights takes most of its time (`least_chunk`);
      * a peer with one session keeps at least half of its speed next to one that floods;
      * queues are bounded, for all and for each peer; where one is full, the network prefix with the most
        jobs makes room for one with fewer;
      * prefixes share the compute before the peers of each: however many peers one prefix has, a peer of
        another prefix is in every decode batch, which then takes `crowd_slowdown` times one row at most
        (`absent_slowdown` times if an active prefix has no part in it), and
        of chunks and requests the prefix with the least compute runs next;
      * after a batch with rows of a crowd (see `Crowds`), `rested_slowdown` times one row at most, the crowd
        rests: its steps and chunks leave others about four fifths of their speed;
      * a stateless request that would take longer than `max_compute_seconds` is refused, and so are further
        ones of a peer whose requests wait for so long;
      * a peer is charged for the time that its adapter adds to a batch;
      * a job that is cancelled or expired is not begun, and leaves no trace;
      * a session's rows are never split, and a job of more than `max_rows` runs alone.

    Half of its speed: a step that takes D alone, and comes T after the last answer, makes a cycle of
    T + D.  Next to others it waits for the end of the batch that it just missed and for its own batch,
    1.25 D and 1.5 D at most: T + 2.75 D, less than twice as much where T is at least 0.75 D.  (3.5 D,
    where it missed another's step of several rows.)  The network's round trip, other hops and the
    client's own compute are in T; with T near 0 it keeps 0.36.  After a long batch it has the server
    for as long as that batch took: half of its speed on the average, less a step that the next long
    batch catches.  All that compares batches through equal blocks, and is as good as `Cost` is.

    Peers are charged by seconds for chunks: a peer that also decodes has had compute already when its chunk
    comes due, and round robin by batch would forget that.  But not strictly: its prefill would then starve
    after its own decode steps while another peer's prefills never end.

    decode_seconds_per_block, prefill_seconds_per_block_token: a first guess of `costs`, which then learn.
    """

    decode_seconds_per_block: float
    prefill_seconds_per_block_token: float
    limits: Limits = field(default_factory=Limits)
    policy: BatchPolicy = field(default_factory=BatchPolicy)
    _queues: JobQueues = field(init=False)
    costs: BatchCosts = field(init=False)
    _peers: ActivePeers = field(init=False)
    parties: ActivePeers = field(init=False)  # prefixes; peers without one
    _crowds: Crowds = field(init=False)
    _running: Batch | None = None
    _cool_down_until: float = -math.inf
    _last_other: Kind = Kind.STATELESS  # of prefill and stateless, the kind that ran last
    _after_decode: bool = False
    _decode_went_ahead: bool = False  # of the chunk or part that is due
    _last_decoders: frozenset[str] = frozenset()  # the peers of the last decode batch

    def __post_init__(self) -> None:
        policy = self.policy
        self._queues = JobQueues(self.limits, policy.max_stateless, policy.max_stateless_per_peer)
        self.costs = BatchCosts(
            self.decode_seconds_per_block, self.prefill_seconds_per_block_token, policy.joint_slowdown
        )
        self._peers = ActivePeers(policy.recently_active_seconds)
        self.parties = ActivePeers(policy.recently_active_seconds)
        self._crowds = Crowds(policy.recently_active_seconds, policy.crowd_rest)

    @property
    def waiting(self) -> int:
        """Jobs that wait or run."""
        return len(self._queues.jobs)

    def resume_at(self, now: float) -> float:
        """After `next(now)` returned None: when to ask again, even if nothing is submitted until then.

        Infinity, unless all waiting jobs are held back by the cool-down after a long batch or by the rest of
        crowds: to the end of one, or until the peers have left that it is for.
        """
        if not self._queues.jobs or self._running is not None:
            return math.inf
        cooled, rested = (
            min(self._cool_down_until, self._peers.decoders_leave_at(now)),
            self._crowds.resume_at(now),
        )
        return min(cooled, rested) if cooled > now else rested

    def submit(self, job: Job, now: float) -> None:
        """Queue a job.  Raises TooManyStreams, and then nothing has changed."""
        queues, party = self._queues, job.prefix or job.peer
        others = len(self._peers.by_name) > 1 or job.peer not in self._peers.by_name
        newcomer = others and not queues.waiting_of(job.peer)
        new_party = newcomer and not queues.waiting_of_party(party)
        if job.kind is Kind.STATELESS:
            self._check_seconds(job, now)
        queues.add(job, self._running or ())
        short_decode = job.kind is Kind.DECODE and not self.costs.is_long(job)
        peer = self._peers.touch(job.peer, now, short_decode=short_decode)
        if (known := self.parties.by_name.get(party)) is not None:
            known.last_active_at = now  # as `touch` does, in no call
            if short_decode:
                known.last_short_decode_at = now
        else:
            known = self.parties.touch(party, now, short_decode=short_decode)
        if job.tokens > 1 and job.kind is Kind.DECODE:
            peer.last_drafts_at = known.last_drafts_at = now
        if newcomer:
            self._peers.charge_as_newcomer(job.peer)
        if new_party:
            self.parties.charge_as_newcomer(party)

    def cancel(self, number: int) -> None:
        """Forget a job, if it is still there; if it is running, no further piece of it will run."""
        queues = self._queues
        if queues.expired:
            queues.expired = [job for job in queues.expired if job.number != number]
        if (job := queues.jobs.get(number)) is not None:
            queues.remove(job)

    def expired(self, now: float) -> list[Job]:
        """Jobs whose deadline came before they had begun: each is returned once, and was taken out."""
        if now >= self._queues.next_deadline:
            self._look_at_clock(now)
        expired, self._queues.expired = self._queues.expired, []
        return expired

    def next(self, now: float) -> Batch | None:
        """The batch to run now, or None.  The next call comes after `finished`."""
        if self._running is not None:
            raise LocalProtocolError("a batch was asked for while one is running")
        if now >= self._queues.next_deadline or now >= min(self._peers.look_at, self.parties.look_at):
            self._look_at_clock(now)
        lanes = self._queues.lanes
        for kind in self._kinds_in_order():
            if not lanes[kind]:
                continue
            batch = self._decode_batch(now) if kind is Kind.DECODE else self._single(kind, now)
            if batch:
                self._begin(kind, batch)
                return batch
        return None

    def finished(self, batch: Batch, seconds: float, now: float) -> tuple[float, int]:
        """The batch of `next` was run, in `seconds`; also if it failed.

        Returns its size: the blocks that it ran through, each counted once, with what adapters add to them,
        and its rows times tokens.
        """
        if batch is not self._running:
            raise LocalProtocolError("a batch is finished that is not running")
        self._running = None
        queues = self._queues
        blocks, positions, works = size_of(batch)
        work = sum(works)
        shares = [part / work for part in works]
        if any(piece.job.adapter for piece in batch) and len(batch) > 1:
            shares = self.costs.shares(batch, works)
        for piece, share in zip(batch, shares, strict=True):
            job = piece.job
            if long := self.costs.is_long(job):
                rest = seconds * self.policy.rest(job.kind)
                self._cool_down_until = max(self._cool_down_until, now + rest)
            peer = self._peers.touch(job.peer, now, short_decode=job.kind is Kind.DECODE and not long)
            if job.tokens > 1 and job.kind is Kind.DECODE:
                peer.last_drafts_at = now
            peer.compute_seconds += seconds * share
            if (party := self.parties.by_name.get(job.prefix or job.peer)) is not None:
                party.last_active_at = now
                party.compute_seconds += seconds * share
            if job.number not in queues.jobs:
                continue  # cancelled meanwhile
            if piece.last:
                queues.remove(job)
            else:
                queues.done[job.number] += 1 if job.parts else piece.tokens
        if batch[0].job.kind is not Kind.STATELESS and len(self.parties.by_name) > 1:
            self._crowds.ran(batch, seconds, self.costs.least_row(batch), now)
        self.costs.learn(batch[0].job.kind, blocks, work, seconds)
        return blocks, positions

    def ran_alone(self, peer: str, party: str, blocks: int, seconds: float, now: float) -> None:
        """A decode step of one row was computed outside the queues, which were empty.

        Peers are charged, and costs learnt, as if it had come through `submit`, `next` and `finished`.
        """
        newcomer = len(self._peers.by_name) > 1 or peer not in self._peers.by_name
        for known, name in ((self._peers, peer), (self.parties, party)):
            one = known.touch(name, now, short_decode=True)
            if newcomer:
                known.charge_as_newcomer(name)
            one.compute_seconds += seconds
        self._after_decode, self._decode_went_ahead = True, False
        if self._last_decoders != {peer}:
            self._last_decoders = frozenset({peer})
        self.costs.learn(Kind.DECODE, blocks, blocks, seconds)
        if now >= min(self._peers.look_at, self.parties.look_at):
            self._look_at_clock(now)

    def _kinds_in_order(self) -> tuple[Kind, ...]:
        """The kinds in the order in which they are asked for something to run."""
        others = (Kind.PREFILL, Kind.STATELESS)
        if self._last_other is Kind.PREFILL:
            others = (Kind.STATELESS, Kind.PREFILL)
        missed = not self._last_decoders.issuperset(self._queues.lanes[Kind.DECODE])
        if not self._after_decode or (missed and not self._decode_went_ahead):
            return (Kind.DECODE, *others)
        return (*others, Kind.DECODE)

    def _begin(self, kind: Kind, batch: Batch) -> None:
        self._running = batch
        lanes = self._queues.lanes
        peers = set()
        for piece in batch:
            peers.add(piece.job.peer)
            if len(lanes[kind]) > 1:  # its peer comes last in the next round
                lanes[kind][piece.job.peer] = lanes[kind].pop(piece.job.peer)
        if kind is Kind.DECODE:
            others = lanes[Kind.PREFILL] or lanes[Kind.STATELESS]
            self._decode_went_ahead = self._after_decode and bool(others)
            self._after_decode = True
            self._last_decoders = frozenset(peers)
        else:
            self._decode_went_ahead = self._after_decode = False
            self._last_other = kind

    def _decode_batch(self, now: float) -> Batch:
        """One step of every peer, then more of them, in rounds, while rows and seconds allow."""
        cost, pieces, rows, work = self.costs.of[Kind.DECODE], list[Piece](), 0, 0.0
        blocks, peers, parties, adapters = set[int](), set[str](), set[str](), dict[str, float]()
        full = set[str]()  # peers with a step that did not fit: later steps must not overtake it
        max_seconds = max_crowd = max_resting = math.nan
        cooling, several = now < self._cool_down_until, len(self.parties.by_name) > 1
        jobs, resting, crowds = self._queues.in_rounds(Kind.DECODE), frozenset[str](), frozenset[str]()
        if several:
            prefills = itertools.chain.from_iterable(self._queues.lanes[Kind.PREFILL].values())
            self._crowds.look((*jobs, *prefills), now)
            resting, crowds = self._crowds.resting(Kind.DECODE, now), self._crowds.known
        if resting:
            jobs.sort(key=lambda job: (job.prefix or job.peer) in resting)
        for job in jobs:
            if job.peer in full or (cooling and self._held_back(job, now)):
                continue
            party, limit = job.prefix or job.peer, math.inf
            if party in resting:
                if not pieces:
                    break  # crowds alone wait
                if math.isnan(max_resting):  # all others' steps are in by now
                    max_resting = self.policy.resting_slowdown * self.costs.least_row(pieces)
                limit = max_resting
            elif party in crowds and party in parties:
                limit = self.policy.rested_slowdown * self.costs.least_row(pieces)
            elif job.peer in peers:
                if math.isnan(max_seconds):  # every peer's first step is in by now
                    max_seconds = self._max_decode_seconds(pieces, peers)
                limit = max_seconds
            elif several and job.prefix in parties:
                if math.isnan(max_crowd):  # every prefix's first step is in by now
                    together = self.parties.by_name.keys() <= parties
                    slowdown = self.policy.crowd_slowdown if together else self.policy.absent_slowdown
                    max_crowd = slowdown * self.costs.least_row(pieces)
                limit = max_crowd
            wider = blocks.union(range(job.start, job.stop))
            more = work + job.rows * job.tokens * (job.stop - job.start) * job.weight
            read = adapters
            if job.adapter:
                read = adapters | {job.adapter: (job.weight - 1) * (job.stop - job.start)}
            too_slow = limit < math.inf and cost.seconds(len(wider) + sum(read.values()), more) > limit
            if pieces and (rows + job.rows * job.tokens > self.policy.max_rows or too_slow):
                full.add(job.peer)
                continue
            pieces.append(Piece(job, 0, job.tokens))
            peers.add(job.peer)
            parties.add(party)
            blocks, work, rows, adapters = wider, more, rows + job.rows * job.tokens, read
        return tuple(pieces)

    def _max_decode_seconds(self, pieces: list[Piece], peers: set[str]) -> float:
        """The longest time for a decode batch of these pieces and further ones of their peers."""
        if len(self._peers.by_name) == 1:
            return math.inf
        policy = self.policy
        slowdown = policy.joint_slowdown if self._peers.by_name.keys() <= peers else policy.absent_slowdown
        return slowdown * self.costs.least_row(pieces)

    def _single(self, kind: Kind, now: float) -> Batch:
        """A chunk, or a part of a stateless request, of the peer that had the least compute."""
        heads = self._heads(kind, now)
        if not heads:
            return ()
        party = self.parties.choose([job.prefix or job.peer for job in heads], kind)
        heads = [job for job in heads if (job.prefix or job.peer) == party]
        peer = self._peers.choose([job.peer for job in heads], kind)
        job = next(job for job in heads if job.peer == peer)
        if kind is Kind.STATELESS:
            return (Piece(job, 0, job.tokens, self._queues.done[job.number]),)
        return self._chunks(job, self._chunk_tokens(job, now), now)

    def _heads(self, kind: Kind, now: float) -> list[Job]:
        """Each peer's first job of a kind that may run now; alone a stateless request that has begun."""
        lane, done = self._queues.lanes[kind], self._queues.done
        if kind is Kind.STATELESS:  # a request under way holds memory between its parts
            for job in (job for queue in lane.values() for job in queue if done[job.number]):
                return [] if self._held_back(job, now) else [job]
        if now >= max(self._cool_down_until, self._crowds.until[kind]):
            return [queue[0] for queue in lane.values()]
        ready = ([job for job in queue if not self._held_back(job, now)] for queue in lane.values())
        return [jobs[0] for jobs in ready if jobs]

    def _chunks(self, job: Job, tokens: int, now: float) -> Batch:
        """The next piece of a prefill, at most `tokens` a row, and whole prefills of its peer."""
        done = self._queues.done
        pieces = [Piece(job, done[job.number], min(tokens, job.tokens - done[job.number]))]
        left = (tokens - pieces[0].tokens) * job.rows if pieces[0].last else 0
        for other in self._queues.lanes[Kind.PREFILL][job.peer]:
            remaining = other.tokens - done[other.number]
            if other is job or other.rows * remaining > left or self._held_back(other, now):
                continue
            pieces.append(Piece(other, done[other.number], remaining))
            left -= other.rows * remaining
        return tuple(pieces)

    def _chunk_tokens(self, job: Job, now: float) -> int:
        """Tokens a row of a prefill's next piece."""
        policy, positions = self.policy, self.policy.chunk_positions
        # The same for all peers with prefills: else a peer with short chunks would never catch up.
        decoders = self._crowds.waited_for(job, self._peers.decoders(now))
        others = self._crowds.waited_for(job, self._queues.lanes[Kind.PREFILL].keys() - {job.peer})
        if decoders and (others or decoders - {job.peer}):
            # A peer that misses a decode batch waits for this chunk and for the next batch: both count.
            waiting = [one for queue in self._queues.lanes[Kind.DECODE].values() for one in queue]
            next_slowdown = self.costs.next_slowdown(sum(one.rows * one.tokens for one in waiting))
            seconds = policy.joint_slowdown + policy.absent_slowdown - next_slowdown
            blocks = job.stop - job.start
            seconds *= self.costs.one_row(blocks) / blocks / job.weight
            cost = self.costs.of[Kind.PREFILL]
            positions = min(positions, int((seconds - cost.per_block) / cost.per_position))
        least = min(self.costs.least_chunk(job.rows), policy.chunk_positions // job.rows)
        return max(1, least, positions // job.rows)

    def _held_back(self, job: Job, now: float) -> bool:
        """Whether a job must wait for the cool-down after a long batch, or a chunk for the rest of crowds."""
        if now < self._cool_down_until and self.costs.is_long(job):
            # Drafts wait for single tokens, and not for each other.
            peers = self._peers
            decoders = peers.short_decoders(now) if job.kind is Kind.DECODE else peers.decoders(now)
            if self._crowds.waited_for(job, decoders) - {job.peer}:
                return True
        return job.kind is Kind.PREFILL and job.prefix in self._crowds.resting(job.kind, now)

    def _look_at_clock(self, now: float) -> None:
        """Take out expired jobs, and forget peers that have gone."""
        if now >= self._queues.next_deadline:
            self._queues.expire(now, {piece.job.number for piece in self._running or ()})
        if now >= self._peers.look_at:
            self._peers.forget(now, self._queues.waiting_of)
        if now >= self.parties.look_at:
            self.parties.forget(now, self._queues.waiting_of_party)

    def _check_seconds(self, job: Job, now: float) -> None:
        """Raise Refused, TooManyStreams where a stateless request would take, or wait for, too long."""
        most = self.limits.max_compute_seconds
        own = self.costs.stateless_seconds(job)
        others = self._crowds.waited_for(job, self._peers.decoders(now)) - {job.peer}
        rest = self.policy.stateless_rest if others and self.costs.is_long(job) else 0.0
        rested = (1 + rest) * own
        if rested > most and job.rows * job.tokens > SPLIT_POSITIONS:
            raise Refused(
                f"a request of {job.rows} x {job.tokens} positions takes about {rested:.0f} s here now,"
                f" {most:g} s are allowed: split it into requests of {SPLIT_POSITIONS} positions"
            )
        ahead = self._queues.lanes[Kind.STATELESS].get(job.peer, ())
        waiting = (1 + rest) * sum(self.costs.stateless_seconds(other) for other in ahead)
        if waiting and rested + waiting > most:
            raise TooManyStreams(
                f"requests of yours that take about {waiting:.0f} s wait here, {most:g} s are allowed",
                min(waiting, MAX_RETRY_SECONDS),
            )
