"""Runs the queued steps over one span in the torch thread: batch after batch, as the batcher decides.

A step is queued here and its caller waits.  One task, `run`, has a batch computed whenever the thread is
free.  The thread itself chooses the batch at that moment (`node.serving.executor.batcher`), from all that has
arrived by then; meanwhile the event loop receives and sends.  From wire bytes to wire bytes a batch crosses
into the thread once, and rows of many sessions are decoded, computed and encoded as one tensor.  Where all
that waits is short and needs our own kernels alone, the loop's own thread computes the batch: the way into
the torch thread and back, and the turns of two threads with the interpreter, would cost more.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, cast

import numpy as np
import outcome
import torch
import trio
from numpy.typing import NDArray
from torch import Tensor

from node.devices import empty_cache, is_out_of_memory, synchronize
from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.prefix import AnySpanAdapter
from node.model.blocks.device.staging import Coming, Stage, on_device
from node.model.blocks.kv_pages import BlockShape
from node.model.blocks.parts import PART_POSITIONS
from node.model.parallel.lost import SpanLost
from node.monitor.metrics.meters import BatchMeters, ServingMeters
from node.runtime.compute_thread import Runner
from node.serving.executor import out_of_memory
from node.serving.executor.batcher import Batcher, BatchPolicy
from node.serving.executor.job_queues import RETRY_SECONDS
from node.serving.executor.jobs import Batch, Job, Kind, Piece, Segment, segments
from node.serving.executor.lone_steps import LONGEST_SECONDS, LoneSteps, is_short
from node.serving.executor.rates import MeasuredSpan, Rates, measure_decode
from node.serving.executor.waits import Waits
from tensor_codec.codecs import (
    WIRE_DTYPES,
    decode_hidden,
    encode_hidden,
    pack,
)
from tensor_codec.errors import BadResult, Draining, Refused, TooManyStreams
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import OUTLIER_CODEC, Contract, StepRange
from tensor_codec.rows.float_rows import ROW_CODECS, row_bytes, row_values

IDLE_MEASURE_SECONDS = 0.1  # for measuring again how fast an idle node is
MAX_MEASURED_STEP_SECONDS = 0.5  # a slower step is not measured again
_NUMBERS = itertools.count()  # of jobs
MAX_PART_SECONDS = 0.5  # of a part of a stateless request, by the rate of those that ran


class NotFinite(BadResult):
    """The inputs were finite, and the outputs of our own span are not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Encoded hidden states [batch, tokens, hidden], and the microseconds spent on computing them.

    packed: the same in int8o, where they go on so; the body has the values that are left then.
    """

    body: Buffer
    compute_micros: int
    packed: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """given: a step's body is in int8o.  onward: its outputs go on in int8o."""

    given: bool = False
    onward: bool = False


AS_AGREED = Packing()


class StepCache(Protocol):
    """The part of `node.model.blocks.kv_pages.SpanCache` that a step needs.  length: positions computed."""

    length: int

    def reserve(self, length: int) -> None:
        """Own pages for the positions [0, length) of every row."""


class EngineSpan(MeasuredSpan, Protocol):
    """The part of `node.model.blocks.span.Span` that an engine needs.

    Any: caches of the span's own kind.
    """

    @property
    def can_cut(self) -> bool:
        """Whether a session's cache can go back to any earlier position."""

    @property
    def repeats(self) -> bool:
        """Whether a step that failed in the middle may be computed again with the same caches."""

    @property
    def fused(self) -> bool:
        """Whether `decode` takes several positions of a session."""

    @property
    def in_any_thread(self) -> bool:
        """Whether a decode step may be computed outside the torch thread, where that one is idle."""

    @property
    def block_values(self) -> float:
        """Numbers in the matrices of a block, on the average."""

    @property
    def shapes(self) -> Sequence[BlockShape | None]:
        """The shape of each block's cache, None for a convolution."""

    def part(self, start: int, stop: int) -> Self:
        """A span of the blocks [start, stop) of this one."""

    def joined(self, others: Sequence[Self]) -> Self:
        """One span of these blocks and those of `others`."""

    def forward(
        self,
        hidden: Tensor,
        cache: Any,
        position: int,
        start: int,
        stop: int,
        /,
        *,
        rope_length: int = 0,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
    ) -> Tensor:
        """See `Span.forward`."""

    def decode(
        self,
        hidden: Tensor,
        caches: Sequence[Any],
        start: int,
        stop: int,
        /,
        *,
        rope_lengths: Sequence[int],
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Span.decode`."""

    def decode_row(self, values: NDArray[np.float32], cache: Any, start: int, stop: int, /) -> None:
        """See `Span.decode_row`."""

    def new_stage(self) -> Stage | None:
        """See `Span.new_stage`."""

    def planned(
        self,
        stage: Stage,
        caches: Sequence[Any],
        start: int,
        stop: int,
        /,
        *,
        rope_lengths: Sequence[int],
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """See `Span.planned`."""


@dataclass(frozen=True, slots=True)
class StepOwner:
    """The session of a step: its client's peer and network prefix, its cache, its adapter."""

    peer: str
    prefix: str
    cache: StepCache
    adapter: SpanAdapter | None = None


Then = Callable[[outcome.Outcome[Answer]], None]


@dataclass(slots=True, eq=False)
class _Work:
    """One request, from when it is queued until it is answered.

    then: called with the answer, in trio's thread.  seconds: computing it, so far.
    """

    job: Job
    since: float
    then: Then = field(kw_only=True)
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Step(_Work):
    """A step of a session.  wanted: positions of the answer.  parts: outputs of the chunks so far."""

    contract: Contract = field(kw_only=True)
    cache: StepCache = field(kw_only=True)
    what: StepRange = field(kw_only=True)
    body: Buffer = field(kw_only=True)
    wanted: int = field(kw_only=True)
    prompts: Tensor | None = field(kw_only=True, default=None)
    adapter: SpanAdapter | None = field(kw_only=True, default=None)
    packing: Packing = field(kw_only=True, default=AS_AGREED)
    hidden: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)


# A part at each `next`; the return value is the answer.  Any: of the engine's span, the methods needed.
Parts = Callable[[Any], Generator[None, None, Buffer]]


@dataclass(slots=True, eq=False)
class _Request(_Work):
    """A request without a session.  under_way: after its first part."""

    work: Parts = field(kw_only=True)
    under_way: Generator[None, None, Buffer] | None = None


Settled = list[tuple[_Work, outcome.Outcome[Answer]]]


class Engine:
    """The compute of a serving node.  `run` must be running for anything to be answered.

    rates: measured at start, then updated by every batch.  waits: of decode steps.
    clock: in seconds; every time here is on it.  meters: of the node.  policy: of batches, by the device.

    Where memory ends in the middle of a batch, decode steps run again in halves and chunks in smaller ones;
    what then still finds none is refused alone (see `node.serving.executor.out_of_memory`).
    Where the span is lost, everything is refused as by a node that leaves: sessions go on elsewhere.
    """

    def __init__(
        self,
        span: EngineSpan,
        compute: Runner,
        rates: Rates,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.perf_counter,
        meters: ServingMeters | None = None,
        policy: BatchPolicy | None = None,
    ) -> None:
        self.span = span
        self.compute = compute
        self.rates = rates
        self.waits = Waits()
        self.meters = meters or ServingMeters()
        self.batcher = Batcher(
            rates.decode_seconds_per_block, rates.prefill_seconds_per_block_token, limits or Limits(),
            policy or BatchPolicy(),
        )  # fmt: skip
        self.after_batch: Callable[[], None] = lambda: None  # called once all answers of a batch were given
        self._lone = LoneSteps()
        self._short = False  # whether memory ended in this batch: its time says nothing
        self._ahead: dict[int, Tensor] = {}  # hidden states of steps that wait, read while a device computed
        self._clock = clock
        self._lock = threading.Lock()  # around the batcher: the torch thread takes batches from it
        self._works: dict[int, _Work] = {}
        self._chores: list[Callable[[], None]] = []
        self._wanted = trio.Event()

    @property
    def limits(self) -> Limits:
        """Of the node."""
        return self.batcher.limits

    @property
    def queue(self) -> float:
        """The mean wait of a decode step, as a multiple of its computing: a record announces it."""
        return round(self.waits.queue(self._clock()), 2)

    def others_decode(self, party: str) -> bool:
        """Whether a prefix other than this one, or a peer without one, runs short decode steps or drafts."""
        with self._lock:
            return bool(self.batcher.parties.decoders(self._clock()) - {party})

    async def run(self) -> None:
        """Compute the queued jobs, until cancelled.  An exception that escapes is our bug."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            resume_at = -math.inf
            while resume_at <= self._clock():
                if is_here := _is_for_the_loop(self):
                    settled, resume_at = self._run_batch()
                else:
                    settled, resume_at = await self.compute.run(self._run_batch)
                with self._lock:
                    for work, _ in settled:
                        _forget(self, work.job.number)
                for work, result in settled:
                    work.then(result)
                self.after_batch()
                if is_here:
                    await trio.lowlevel.checkpoint()  # the loop has its time before the next batch
            if resume_at < math.inf:
                with trio.move_on_after(max(0.0, resume_at - self._clock())):
                    await self._wanted.wait()
                self._wanted.set()

    async def step(
        self,
        peer: str,
        contract: Contract,
        cache: StepCache,
        what: StepRange,
        body: Buffer,
        *,
        whole: bool,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
        prefix: str = "",
        packing: Packing = AS_AGREED,
    ) -> Answer:
        """Compute one step: hidden states in the contract's codec in, and its outputs in that codec out.

        body: [batch, tokens, hidden].
        cache: at the step's position by then (see `before_next`), with pages to be had for its tokens.
        whole: answer with all positions, not only with those that the step wants back.
        prompts: deep prompts for some of its positions, see `Span.forward`; the step then runs as a prefill.
        A step of a few tokens behind others runs in decode batches, see `BatchPolicy.decodes`.
        adapter: of the session, for all its blocks.
        prefix: of the peer's network address.  packing: where the step, or its outputs, travel in int8o.
        Raises TooManyStreams (the queues are full, or the step was not begun within `step_wait_seconds`;
        nothing was done), BadResult (an input is not finite; nothing was done), NotFinite.
        """
        is_joint = joins(self, contract.batch, what.tokens, what.position)
        kind = Kind.DECODE if is_joint and prompts is None else Kind.PREFILL
        now = self._clock()
        job = Job(
            next(_NUMBERS), peer, kind, contract.batch, what.tokens, contract.start, contract.stop,
            now + self.limits.step_wait_seconds,
            prefix=prefix if self.limits.peer_shares is None else self.limits.prefix_of(peer, prefix),
        )  # fmt: skip
        if adapter is not None:
            job = _with_adapter(job, adapter, self.span)
        wanted = what.tokens if whole else what.reply_tokens
        return await self._answer(
            lambda then: _Step(
                job, now, then=then, contract=contract, cache=cache, what=what, body=body, wanted=wanted,
                prompts=prompts, adapter=adapter, packing=packing,
            )
        )  # fmt: skip

    def begin(
        self,
        owner: StepOwner,
        contract: Contract,
        what: StepRange,
        body: Buffer,
        then: Then,
        *,
        whole: bool,
    ) -> int:
        """Queue a step that `joins`, as `step` does; its number, for `withdraw`.

        One of one position that is alone and short is computed at once, by the caller's thread (see
        `LoneSteps`).
        then: called once with its answer, in trio's thread; `after_batch` follows when all answers of its
        batch were given.  Raises TooManyStreams; then nothing was done.
        """
        now, limits, number = self._clock(), self.limits, next(_NUMBERS)
        peer, prefix = owner.peer, owner.prefix
        if limits.peer_shares is not None:
            prefix = limits.prefix_of(peer, prefix)
        wanted = what.tokens if whole else what.reply_tokens
        is_one = contract.batch == what.tokens == wanted == 1
        if self._lone.is_alone(contract.session, now) and is_one and not owner.adapter:
            result = _at_once(self, owner, prefix or peer, contract, what, body)
            if result is not None:
                then(result)
                self.after_batch()
                if isinstance(result, outcome.Value):  # now that the answer is on its way
                    _learn_alone(self, peer, prefix or peer, contract, result.value.compute_micros)
                return number
        job = Job(
            number, peer, Kind.DECODE, contract.batch, what.tokens, contract.start, contract.stop,
            now + limits.step_wait_seconds,
            prefix=prefix,
        )  # fmt: skip
        if owner.adapter is not None:
            job = _with_adapter(job, owner.adapter, self.span)
        step = _Step(
            job, now, then=then, contract=contract, cache=owner.cache, what=what, body=body,
            wanted=wanted, adapter=owner.adapter,
        )  # fmt: skip
        _submit(self, step)
        return number

    def withdraw(self, number: int) -> None:
        """Forget a step of `begin` that has no answer yet."""
        with self._lock:
            self.batcher.cancel(number)
            _forget(self, number)

    @property
    def part_positions(self) -> int:
        """Positions times blocks of a part of a stateless request: at most half a second's."""
        each = self.batcher.costs.of[Kind.STATELESS].per_position
        return int(min(PART_POSITIONS, max(self.batcher.policy.chunk_positions, MAX_PART_SECONDS / each)))

    async def stateless(
        self,
        peer: str,
        rows: int,
        tokens: int,
        parts: Sequence[tuple[int, int]],
        work: Parts,
        *,
        adapter: AnySpanAdapter | None = None,
        prefix: str = "",
    ) -> Answer:
        """Run `work` in the torch thread, a part for each batch that the batcher gives this request.

        rows, tokens: of hidden states.  parts: the blocks [start, stop) of each part, in order.  Batches of
        steps may run between two parts; no part of another request does.  adapter: that `work` computes with.
        Raises Refused, TooManyStreams (nothing was done), and the PeerFault that `work` raises.
        """
        start, stop = min(start for start, _ in parts), max(stop for _, stop in parts)
        job = Job(
            next(_NUMBERS), peer, Kind.STATELESS, rows, tokens, start, stop, parts=tuple(parts),
            prefix=self.limits.prefix_of(peer, prefix),
        )  # fmt: skip
        if adapter is not None:
            job = _with_adapter(job, adapter, self.span)
        return await self._answer(lambda then: _Request(job, self._clock(), then=then, work=work))

    async def measure_again(self) -> None:
        """Measure a decode step, for about IDLE_MEASURE_SECONDS; call this when nothing is served.

        Not where steps take very long: a step that comes meanwhile would have to wait for two.
        """
        seconds = self.rates.alone * (self.span.stop - self.span.start)
        if self.batcher.waiting or seconds > MAX_MEASURED_STEP_SECONDS:
            return
        measure = out_of_memory.or_refused(measure_decode, "a measurement", 0.0)
        with suppress(out_of_memory.OutOfMemory, Draining):  # the figures stay as they are
            self.rates.measured(await self.compute.run(measure, self.span, IDLE_MEASURE_SECONDS))

    def before_next(self, chore: Callable[[], None]) -> None:
        """Run `chore` in the torch thread after the batch that runs now and before the next one.

        For changes under a batch: a cut and the end of a cache that it computes with.
        """
        with self._lock:
            self._chores.append(chore)

    async def _answer(self, make: Callable[[Then], _Work]) -> Answer:
        answers: list[outcome.Outcome[Answer]] = []
        done = trio.Event()

        def then(result: outcome.Outcome[Answer]) -> None:
            answers.append(result)
            done.set()

        work = make(then)
        _submit(self, work)
        try:
            await done.wait()
        except BaseException:
            self.withdraw(work.job.number)
            raise
        return answers[0].unwrap()

    # From here on: in the torch thread, or in the loop's while that one is idle.

    def _run_batch(self) -> tuple[Settled, float]:
        """Run the next batch: its answers, and when to call again if nothing is queued until then.

        At once, as long as something waits that may run.
        """
        settled: Settled = []
        with self._lock:
            # Before any pages are taken: the budget has counted these as given back.
            chores, self._chores = self._chores, []
            for chore in chores:
                chore()
            now = self._clock()
            batch = self.batcher.next(now)
            for job in self.batcher.expired(now):
                settled.append((self._works[job.number], outcome.Error(_taken_out(job, now, self.limits))))
            if batch is None:
                return settled, self.batcher.resume_at(now)
            works = [self._works[piece.job.number] for piece in batch]
        began = self._clock()
        self._short = False
        try:
            self._compute(batch, works, settled)
        except SpanLost:
            self._short = True
            answered = {id(work) for work, _ in settled}
            refused = [work for work in works if id(work) not in answered]
            settled += [(work, outcome.Error(out_of_memory.span_lost())) for work in refused]
        finally:
            ended = self._clock()
            with self._lock:
                for work, result in settled:
                    if isinstance(result, outcome.Error):
                        self.batcher.cancel(work.job.number)
                size = self.batcher.finished(batch, ended - began, ended)
                resume_at = -math.inf if self.batcher.waiting else math.inf
        if not self._short:
            _observe(self, batch[0].job.kind, size, works, began, ended)
        if self.meters.batches is not None:
            _count(self.meters.batches, batch, size[1], [began - work.since for work in works], ended - began)
        return settled, resume_at

    def _compute(self, batch: Batch, works: Sequence[_Work], settled: Settled) -> None:
        began = self._clock()
        first = works[0]
        if isinstance(first, _Request):
            return self._part(batch[0], first, began, settled)
        steps = cast("Sequence[_Step]", works)  # a batch is of one kind
        if batch[0].job.kind is Kind.PREFILL:
            for piece, step in zip(batch, steps, strict=True):
                self._chunk(piece, step, self._clock(), settled)
            return None
        sound, hidden = _taken(self._ahead, steps, settled) if self._ahead else _decoded(steps, settled)
        return self._rows(sound, hidden, began, settled) if sound else None

    def _rows(self, steps: Sequence[_Step], hidden: Tensor, began: float, settled: Settled) -> None:
        """Decode steps in one batch; where there is no memory for it, in two."""
        try:
            computed = self._decode(steps, hidden)
            bodies = _encoded(steps, computed if computed.is_cpu else _fetched(self, steps, computed))
        except out_of_memory.FAULTS as error:
            if not is_out_of_memory(error):
                raise
        else:
            micros = int((self._clock() - began) * 1e6)
            for step, body in zip(steps, bodies, strict=True):
                if isinstance(body, NotFinite):
                    settled.append((step, outcome.Error(body)))
                elif step.packing.onward:
                    settled.append((step, _packed(step, body, micros)))
                else:
                    settled.append((step, outcome.Value(Answer(body, micros))))
            return
        # By now the error is gone, and with it all that the attempt held.
        self._short = True
        empty_cache()
        untouched = all(step.cache.length == step.what.position for step in steps)
        if len(steps) == 1 or not self.span.repeats or not untouched:
            for step in steps:
                settled.append((step, outcome.Error(_no_memory(step, self.span, self.limits))))
            return
        half = len(steps) // 2
        first = sum(_rows_of(step) for step in steps[:half])
        self._rows(steps[:half], hidden[:first], began, settled)
        self._rows(steps[half:], hidden[first:], began, settled)

    def _part(self, piece: Piece, request: _Request, began: float, settled: Settled) -> None:
        """A part of a stateless request; the answer when it was the last one."""
        short = False
        try:
            if request.under_way is None:
                request.under_way = request.work(self.span)
            next(request.under_way)
        except StopIteration as end:
            assert piece.last, "fewer parts than were announced"
            request.seconds += self._clock() - began
            settled.append((request, outcome.Value(Answer(end.value, int(request.seconds * 1e6)))))
        except BadResult as bad:
            settled.append((request, outcome.Error(bad)))
        except out_of_memory.FAULTS as error:
            if not is_out_of_memory(error):
                raise
            short = True
        else:
            assert not piece.last, "more parts than were announced"
            synchronize(getattr(self.span, "device", "cpu"))  # or the time would be that of the launches
            request.seconds += self._clock() - began
        if short:
            request.under_way = None
            self._short = True
            empty_cache()
            settled.append((request, outcome.Error(_no_memory(request, self.span, self.limits))))

    def _decode(self, steps: Sequence[_Step], hidden: Tensor) -> Tensor:
        """The positions of every step's rows: hidden [rows, hidden_size] -> the same shape.

        Each step joins at its first block and leaves after its last.
        """
        rows_of, jobs, mixed, ragged = [], [], False, False
        for step in steps:
            job = step.job
            step.cache.reserve(step.what.position + job.tokens)
            rows_of.append(job.rows * job.tokens)
            jobs.append(job)
            mixed = mixed or step.adapter is not None
            ragged = ragged or job.tokens > 1
        runs = segments(jobs)
        if len(runs) == 1 and not mixed:  # nothing is taken apart
            rows = self.span.decode(
                hidden, [step.cache for step in steps], *runs[0][:2],
                rope_lengths=[step.what.rope_length for step in steps],
                tokens=[job.tokens for job in jobs] if ragged else None,
            )  # fmt: skip
            for step in steps:
                step.cache.length = step.what.position + step.job.tokens
            return rows
        if len(runs) > 1 and (stage := self.span.new_stage()) is not None:
            return _staged(self.span, stage, steps, hidden, runs, mixed=mixed, ragged=ragged)
        parts = list(torch.split(hidden, rows_of))
        join = torch.cat if len(runs) == 1 else _joined
        for start, stop, active in runs:
            caches, lengths, given, sizes = [], [], [], []
            adapters: list[SpanAdapter | None] | None = None
            if mixed:
                active = _by_adapter(steps, active)
                adapters = [steps[index].adapter for index in active]
            for index in active:
                caches.append(steps[index].cache)
                lengths.append(steps[index].what.rope_length)
                given.append(parts[index])
                sizes.append(rows_of[index])
            rows = self.span.decode(
                join(given), caches, start, stop, rope_lengths=lengths, adapters=adapters,
                tokens=[jobs[index].tokens for index in active] if ragged else None,
            )  # fmt: skip
            for index, part in zip(active, torch.split(rows, sizes), strict=True):
                parts[index] = part
        for step in steps:
            step.cache.length = step.what.position + step.job.tokens
        return join(parts)

    def _chunk(self, piece: Piece, step: _Step, began: float, settled: Settled) -> None:
        """A chunk of a prefill; the answer when it was the last one."""
        contract, short = step.contract, False
        try:
            if step.hidden is None:
                step.hidden = decode_hidden(step.body, contract, packed=step.packing.given)
            given = step.hidden[:, piece.offset : piece.offset + piece.tokens]
            answer = self.span.forward(
                given, step.cache, step.what.position + piece.offset, contract.start, contract.stop,
                rope_length=step.what.rope_length, prompts=step.prompts, adapter=step.adapter,
            )  # fmt: skip
            wanted_from = step.job.tokens - step.wanted - piece.offset
            if wanted_from < piece.tokens:
                # in the wire's dtype, so that outputs take no more memory than the step
                step.parts.append(answer[:, max(0, wanted_from) :].to(WIRE_DTYPES[contract.codec]))
            if not piece.last:
                synchronize(answer.device)  # or the time would be that of the launches
            step.seconds += self._clock() - began
            if not piece.last:
                return
            body: Buffer = b""
            if step.parts:
                body = encode_hidden(torch.cat(step.parts, 1), contract.codec)
        except BadResult as bad:
            own = bad if step.hidden is None else NotFinite(str(bad))
            settled.append((step, outcome.Error(own)))
        except out_of_memory.FAULTS as error:
            if not is_out_of_memory(error):
                raise
            short = True
        else:
            micros = int(step.seconds * 1e6)
            is_packed = step.packing.onward and len(body)
            plain = outcome.Value(Answer(body, micros))
            settled.append((step, _packed(step, body, micros) if is_packed else plain))
        if short:
            self._short = True
            empty_cache()
            self._chunk_in_halves(piece, step, settled)

    def _chunk_in_halves(self, piece: Piece, step: _Step, settled: Settled) -> None:
        """A chunk for which there was no memory, in two; refused where the cache has taken it in part."""
        untouched = self.span.repeats and step.cache.length == step.what.position + piece.offset
        if not untouched or piece.tokens <= out_of_memory.LEAST_TOKENS:
            settled.append((step, outcome.Error(_no_memory(step, self.span, self.limits))))
            return
        half, answered = piece.tokens // 2, len(settled)
        self._chunk(replace(piece, tokens=half), step, self._clock(), settled)
        if len(settled) == answered:
            rest = replace(piece, offset=piece.offset + half, tokens=piece.tokens - half)
            self._chunk(rest, step, self._clock(), settled)


def joins(engine: Engine, rows: int, tokens: int, position: int) -> bool:
    """Whether a step without deep prompts runs in decode batches."""
    return tokens == 1 or (engine.span.fused and engine.batcher.policy.decodes(rows, tokens, position))


def _submit(engine: Engine, work: _Work) -> None:
    """Queue a request.  Raises TooManyStreams; then nothing was done."""
    with engine._lock:
        engine.batcher.submit(work.job, work.since)
        engine._works[work.job.number] = work
    engine._wanted.set()


def _forget(engine: Engine, number: int) -> None:
    """A request is answered, or given up.  The caller has the lock."""
    engine._works.pop(number, None)
    if engine._ahead:
        engine._ahead.pop(number, None)


def _with_adapter(job: Job, adapter: AnySpanAdapter, span: EngineSpan) -> Job:
    values = span.block_values * (job.stop - job.start)
    weight = 1 + adapter.values(job.start, job.stop) / max(values, 1.0)
    return replace(job, weight=weight, adapter=adapter.id)


def _taken_out(job: Job, now: float, limits: Limits) -> TooManyStreams:
    """The reason why a job was not begun."""
    if job.deadline > now:
        what = "others wait for compute here, and most of what waits is of your network"
        return TooManyStreams(what, RETRY_SECONDS)
    seconds = limits.step_wait_seconds
    return TooManyStreams(f"the step waited {seconds:g} s for compute here, no longer may", RETRY_SECONDS)


def _observe(
    engine: Engine, kind: Kind, size: tuple[float, int], works: Sequence[_Work], began: float, ended: float
) -> None:
    """Update the announced figures by a batch.  size: its blocks, and its rows times tokens."""
    if kind is Kind.STATELESS:
        return
    blocks, positions = size
    engine.rates.observe(positions, blocks, ended - began, decode=kind is Kind.DECODE)
    if kind is Kind.DECODE:
        waited = 0.0
        for work in works:
            waited += began - work.since
        engine.waits.observe(waited, (ended - began) * len(works), len(works), ended)


def _at_once(
    engine: Engine, owner: StepOwner, party: str, contract: Contract, what: StepRange, body: Buffer
) -> outcome.Outcome[Answer] | None:
    """The answer to a step of one row, computed in the caller's thread; None: it has to be queued.

    Only where nothing else is computed or waits, and for a step that is short.
    """
    cache, blocks, batcher = owner.cache, contract.stop - contract.start, engine.batcher
    alone = not batcher.waiting and batcher.parties.by_name.keys() <= {party}  # active a moment ago
    free = alone and engine.compute.is_idle and not engine._chores
    if not free or not engine.span.in_any_thread or not is_short(engine.rates.alone, blocks):
        return None
    began = engine._clock()
    try:
        values = row_values(body, contract.codec)
        cache.reserve(what.position + 1)
        engine.span.decode_row(values, cache, contract.start, contract.stop)
    except BadResult as bad:
        return outcome.Error(bad)
    except out_of_memory.FAULTS as error:
        if is_out_of_memory(error):
            return None  # nothing was kept: the queue's way knows what to do
        raise
    cache.length = what.position + 1
    try:
        encoded: Buffer = row_bytes(values, contract.codec)
    except BadResult as bad:
        return outcome.Error(NotFinite(str(bad)))
    return outcome.Value(Answer(encoded, int((engine._clock() - began) * 1e6)))


def _learn_alone(engine: Engine, peer: str, party: str, contract: Contract, micros: int) -> None:
    """Update the figures by a step that was computed at once, in so many microseconds."""
    now, blocks, seconds = engine._clock(), contract.stop - contract.start, micros / 1e6
    engine._lone.computed(now)
    engine.batcher.ran_alone(peer, party, blocks, seconds, now)
    engine.rates.observe(1, blocks, seconds, decode=True)
    engine.waits.observe(0.0, seconds, 1, now)
    if engine.meters.batches is not None:
        engine.meters.batches.computed("decode", 1, 1, seconds)
        engine.meters.batches.waits.observe(0.0)


def _fetched(engine: Engine, steps: Sequence[_Step], hidden: Tensor) -> Tensor:
    """A batch's answer on the host, by one copy.  Meanwhile the steps that wait are read."""
    coming, own = Coming(hidden), {step.job.number for step in steps}
    while not coming.is_here and _read_ahead(engine, own):
        pass
    return coming.wait()


def _read_ahead(engine: Engine, running: Collection[int]) -> bool:
    """Read the hidden states of decode steps that have come since the batch began; whether any has.

    running: the numbers of the batch's own.
    """
    with engine._lock:
        fresh = [
            work
            for number, work in engine._works.items()
            if isinstance(work, _Step)
            and work.job.kind is Kind.DECODE
            and number not in engine._ahead
            and number not in running
        ]
    sound, hidden = _decoded(fresh, []) if fresh else ([], None)
    if hidden is not None:
        parts = torch.split(hidden, [_rows_of(step) for step in sound])
        with engine._lock:  # those that were cancelled meanwhile are left out
            for step, rows in zip(sound, parts, strict=True):
                if step.job.number in engine._works:
                    engine._ahead[step.job.number] = rows
    return bool(sound)


def _is_for_the_loop(engine: Engine) -> bool:
    """Whether all that waits is short enough for the event loop's thread, and needs our own kernels alone."""
    if not engine.compute.is_idle or not engine.span.in_any_thread or engine._chores or engine._ahead:
        return False
    start, stop, work = engine.span.stop, engine.span.start, 0
    for one in engine._works.values():
        job = one.job
        is_plain = isinstance(one, _Step) and one.packing is AS_AGREED and one.contract.codec in ROW_CODECS
        if not is_plain or job.kind is not Kind.DECODE or job.adapter:
            return False
        start, stop = min(start, job.start), max(stop, job.stop)
        work += job.rows * job.tokens * (job.stop - job.start)
    return engine.batcher.costs.of[Kind.DECODE].seconds(stop - start, work) <= LONGEST_SECONDS


def _taken(ahead: dict[int, Tensor], steps: Sequence[_Step], settled: Settled) -> tuple[list[_Step], Tensor]:
    """`_decoded` of steps of which some were read ahead."""
    known = [step for step in steps if step.job.number in ahead]
    fresh = [step for step in steps if step.job.number not in ahead]
    parts = [ahead.pop(step.job.number) for step in known]
    if fresh:
        sound, hidden = _decoded(fresh, settled)
        known, parts = known + sound, [*parts, hidden]
    return known, torch.cat(parts)


def _staged(
    span: EngineSpan,
    stage: Stage,
    steps: Sequence[_Step],
    hidden: Tensor,
    runs: Sequence[Segment],
    *,
    mixed: bool,
    ragged: bool,
) -> Tensor:
    """All runs of blocks after one copy to the device.  ragged: some steps have several tokens."""
    plans: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = []
    for start, stop, active in runs:
        active = _by_adapter(steps, active) if mixed else active
        own = [steps[index] for index in active]
        compute = span.planned(
            stage, [step.cache for step in own], start, stop,
            rope_lengths=[step.what.rope_length for step in own],
            adapters=[step.adapter for step in own] if mixed else None,
            tokens=[step.job.tokens for step in own] if ragged else None,
        )  # fmt: skip
        plans.append((active, compute))
    parts = list(torch.split(stage.send(hidden), [_rows_of(step) for step in steps]))
    for active, compute in plans:
        given = [parts[index] for index in active]
        answer = compute(given[0] if len(given) == 1 else torch.cat(given))
        for index, part in zip(active, torch.split(answer, [len(each) for each in given]), strict=True):
            parts[index] = part
    for step in steps:
        step.cache.length = step.what.position + step.job.tokens
    return torch.cat(parts)


def _no_memory(work: _Work, span: EngineSpan, limits: Limits) -> Refused:
    """The answer where memory ended.  The session of a step goes on if its cache can be cut."""
    is_step = isinstance(work, _Step)
    what = f"a {'step' if is_step else 'request'} of {work.job.rows} x {work.job.tokens} positions"
    whole = isinstance(work, _Step) and (
        span.can_cut or (span.repeats and work.cache.length == work.what.position)
    )
    return out_of_memory.refusal(what, limits.memory_retry_seconds, cache_is_whole=whole)


def _count(
    meters: BatchMeters, batch: Batch, positions: int, waited: Sequence[float], seconds: float
) -> None:
    """Count a batch for those that scrape.  positions: its rows times tokens.  waited: seconds, by piece."""
    first = batch[0]
    kind, rows = first.job.kind, 0
    for piece in batch:
        rows += piece.job.rows * piece.job.tokens if kind is Kind.DECODE else piece.job.rows
    if kind is Kind.STATELESS and not first.last:
        positions = 0  # the parts of a request go through its blocks one after the other
    meters.computed(kind.name.lower(), rows, positions, seconds)
    if kind is Kind.DECODE:
        for wait in waited:
            meters.waits.observe(wait)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows one below the other.

    Steps that begin at a later block bring rows that are still on the CPU next to rows of a device, and the
    rows of a span over several devices come from each of them: all meet where the last such rows are.
    """
    device = next((part.device for part in reversed(parts) if not part.is_cpu), None)
    if device is None or all(part.device == device for part in parts):
        return torch.cat(list(parts))
    dtype = next(part.dtype for part in parts if part.device == device)
    fresh = [part for part in parts if part.is_cpu]
    moved = on_device(torch.cat(fresh), device, dtype) if fresh else torch.empty(0)  # one copy for all
    there = iter(torch.split(moved, [len(part) for part in fresh]))
    return torch.cat([next(there) if part.is_cpu else part.to(device, dtype) for part in parts])


def _by_adapter(steps: Sequence[_Step], active: Sequence[int]) -> tuple[int, ...]:
    """These indices of steps, those of one adapter next to each other; those without one come first."""

    def place(index: int) -> int:
        adapter = steps[index].adapter
        return -1 if adapter is None else first.setdefault(id(adapter), index)

    first: dict[int, int] = {}
    return tuple(sorted(active, key=place))


def _rows_of(step: _Step) -> int:
    """Rows of a decode batch that are a step's: of each row of its session, one for each token."""
    return step.job.rows * step.job.tokens


def _decoded(steps: Sequence[_Step], settled: Settled) -> tuple[list[_Step], Tensor]:
    """The steps' hidden states one below the other, [rows, hidden_size], and the steps in that order.

    A step that holds NaN, infinity or bytes that its codec cannot have is answered so, and left out.
    """
    if (values := _plain_values(steps)) is not None:
        return list(steps), values
    sound: list[_Step] = []
    rows: list[Tensor] = []
    by_codec: dict[str, list[_Step]] = {}
    for step in steps:
        packed = step.packing.given
        by_codec.setdefault(OUTLIER_CODEC if packed else step.contract.codec, []).append(step)
    for codec, same in by_codec.items():
        if codec == OUTLIER_CODEC:
            for step in same:  # few: these rows come over slow links
                try:
                    unpacked = decode_hidden(step.body, step.contract, packed=True)
                except BadResult as error:
                    settled.append((step, outcome.Error(error)))
                else:
                    sound.append(step)
                    rows.append(unpacked.flatten(0, 1).float())
            continue
        bodies = bytearray()
        for step in same:
            bodies += step.body
        flat = torch.frombuffer(bodies, dtype=WIRE_DTYPES[codec])
        wide = flat.view(-1, same[0].contract.hidden).float()
        if not bool(torch.isfinite(wide).all()):
            kept = []
            for step, part in zip(same, torch.split(wide, [_rows_of(step) for step in same]), strict=True):
                if bool(torch.isfinite(part).all()):
                    kept.append((step, part))
                else:
                    bad = BadResult("received hidden states hold NaN or infinity")
                    settled.append((step, outcome.Error(bad)))
            same, wide = [step for step, _ in kept], torch.cat([part for _, part in kept] or [wide[:0]])
        sound += same
        rows.append(wide)
    return sound, torch.cat(rows or [torch.empty(0, steps[0].contract.hidden)])


def _plain_values(steps: Sequence[_Step]) -> Tensor | None:
    """`_decoded` of steps in one codec, without operations of torch; None: for `_decoded`."""
    contract = steps[0].contract
    if contract.codec not in ROW_CODECS:
        return None
    bodies = bytearray()
    for step in steps:
        if step.packing.given or step.contract.codec != contract.codec:
            return None
        bodies += step.body
    try:
        values = row_values(bodies, contract.codec)
    except BadResult:  # `_decoded` says of which step
        return None
    return torch.from_numpy(values.reshape(-1, contract.hidden))


def _plain_bodies(steps: Sequence[_Step], hidden: Tensor) -> list[Buffer | NotFinite] | None:
    """`_encoded` of steps in one codec that want all their positions; None: for `_encoded`."""
    codec = steps[0].contract.codec
    if codec not in ROW_CODECS or hidden.dtype is not torch.float32 or not hidden.is_contiguous():
        return None
    if any(step.contract.codec != codec or step.wanted != step.job.tokens for step in steps):
        return None
    try:
        data = row_bytes(hidden.numpy(), codec)
    except BadResult:  # `_encoded` says of which step
        return None
    if len(steps) == 1:
        return [data]
    row, begin, bodies = data.nbytes // len(hidden), 0, list[Buffer | NotFinite]()
    for step in steps:
        end = begin + _rows_of(step) * row
        bodies.append(bytes(data[begin:end]))
        begin = end
    return bodies


def _packed(step: _Step, body: Buffer, micros: int) -> outcome.Outcome[Answer]:
    """The answer to a step whose outputs go on in int8o.  body: they, in the contract's codec."""
    try:
        both = pack(body, step.contract.codec, step.contract.hidden)
    except BadResult as bad:  # beyond bfloat16's range
        return outcome.Error(NotFinite(str(bad)))
    return outcome.Value(Answer(both.kept, micros, both.wire))


def _encoded(steps: Sequence[_Step], hidden: Tensor) -> list[Buffer | NotFinite]:
    """Each step's rows of hidden [rows, hidden_size] as bytes of its codec, or why they must not leave.

    hidden: on the host.
    The bytes are a step's own where there are several: a session keeps them, and not those of a whole batch.
    """
    if (plain := _plain_bodies(steps, hidden)) is not None:
        return plain
    wires: dict[str, tuple[list[bool], memoryview]] = {}
    bodies: list[Buffer | NotFinite] = []
    begin = 0
    for step in steps:
        end, codec = begin + step.job.rows * step.job.tokens, step.contract.codec
        if codec not in wires:
            wire = hidden.to(device="cpu", dtype=WIRE_DTYPES[codec]).contiguous()
            finite = torch.isfinite(wire).all(-1).tolist()
            wires[codec] = finite, memoryview(wire.view(torch.uint8).numpy().data).cast("B")
        finite, data = wires[codec]
        row = data.nbytes // len(finite)
        if not all(finite[begin:end]):
            bodies.append(NotFinite("computed hidden states hold NaN or infinity"))
        elif step.wanted == step.job.tokens:
            body = data[begin * row : end * row]
            bodies.append(bytes(body) if len(steps) > 1 else body)
        else:  # of each of its rows the last positions
            lasts = range(begin + step.job.tokens, end + 1, step.job.tokens)
            bodies.append(b"".join(data[(last - step.wanted) * row : last * row] for last in lasts))
        begin = end
    return bodies
