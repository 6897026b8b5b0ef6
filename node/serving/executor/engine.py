"""Runs what waits over one span in the torch thread: batch after batch, as the batcher decides.

A step is queued here and its caller waits.  One task, `run`, has a batch computed whenever the thread
is free; which one is decided in the thread at that moment (`node.serving.executor.batcher`), out of all that
has arrived by then.  So the event loop receives and sends while a batch computes.  From wire bytes to
wire bytes a batch crosses into the thread once, and rows of many sessions are decoded, computed and
encoded as one tensor.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import outcome
import torch
import trio
from torch import Tensor

from node.model.blocks.kv_pages import SpanCache
from node.model.blocks.span import Span
from node.runtime.compute_thread import ComputeThread
from node.serving.executor.batcher import Batch, Batcher, Job, Kind, Piece, segments
from node.serving.executor.rates import Rates, measure_decode
from node.serving.executor.waits import Waits
from tensor_codec.codecs import WIRE_DTYPES, decode_hidden, encode_hidden
from tensor_codec.errors import BadResult
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract, StepRange

LOOK_SECONDS = 0.1  # for a look at how fast an idle node is
LONGEST_LOOKED_AT_SECONDS = 0.5  # of a step


class NotFinite(BadResult):
    """What came in was finite and what our own span made of it is not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Encoded hidden states [batch, tokens, hidden], and the microseconds spent on computing them."""

    body: Buffer
    compute_micros: int


@dataclass(slots=True, eq=False)
class _Work:
    """Somebody's request, from when it is queued until it is answered."""

    job: Job
    since: float = field(default_factory=time.perf_counter)
    done: trio.Event = field(default_factory=trio.Event)
    result: outcome.Outcome[Answer] | None = None
    seconds: float = 0.0

    def settle(self, result: outcome.Outcome[Answer]) -> None:
        """Answer; whoever has left does not mind."""
        self.result = result
        self.done.set()


@dataclass(slots=True, eq=False)
class _Step(_Work):
    """A step of a session.  wanted: positions of the answer.  parts: outputs of the chunks so far.

    rope_length: see `tensor_codec.messages.contract.StepRange`.
    """

    contract: Contract = field(kw_only=True)
    cache: SpanCache = field(kw_only=True)
    position: int = field(kw_only=True)
    body: Buffer = field(kw_only=True)
    wanted: int = field(kw_only=True)
    rope_length: int = field(kw_only=True)
    hidden: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Request(_Work):
    """A request without a session."""

    work: Callable[[Span], Buffer] = field(kw_only=True)


class Engine:
    """The compute of a serving node.  `run` must be running for anything to be answered.

    rates: measured at start, then kept up by what is served.
    waits: of decode steps.
    """

    def __init__(
        self, span: Span, compute: ComputeThread, rates: Rates, limits: Limits | None = None
    ) -> None:
        self.span = span
        self.compute = compute
        self.rates = rates
        self.waits = Waits()
        self.batcher = Batcher(
            rates.decode_seconds_per_block, rates.prefill_seconds_per_block_token, limits or Limits()
        )
        self._lock = threading.Lock()  # around the batcher: the torch thread takes batches from it
        self._works: dict[int, _Work] = {}
        self._chores: list[Callable[[], None]] = []
        self._numbers = itertools.count()
        self._wanted = trio.Event()

    @property
    def queue_length(self) -> int:
        """Steps and requests waiting or running."""
        return self.batcher.waiting

    @property
    def queue(self) -> float:
        """How long a decode step waits, in times of its own computing: what a record says of it."""
        return round(self.waits.queue(time.perf_counter()), 2)

    async def run(self) -> None:
        """Compute what is queued, until cancelled.  What escapes is a bug of ours."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while (settled := await self.compute.run(self._turn)) is not None:
                for work, result in settled:
                    work.settle(result)
            with self._lock:
                again = self.batcher.resume_at()
            if again < math.inf:
                with trio.move_on_after(max(0.0, again - time.perf_counter())):
                    await self._wanted.wait()
                self._wanted.set()

    async def step(
        self, peer: str, contract: Contract, cache: SpanCache, what: StepRange, body: Buffer, *, whole: bool
    ) -> Answer:
        """Compute one step: `body` in the contract's codec in, the same out.

        cache: at the step's position by then (see `before_next`), with pages to be had for its tokens.
        whole: answer with all positions, not only with those that the step wants back.
        Raises TooManyStreams (nothing was done), BadResult (what came in is not finite; nothing was
        done), NotFinite.
        """
        kind = Kind.DECODE if what.tokens == 1 else Kind.PREFILL
        job = Job(next(self._numbers), peer, kind, contract.batch, what.tokens, contract.start, contract.stop)
        wanted = what.tokens if whole else what.reply_tokens
        return await self._answer(
            _Step(
                job, contract=contract, cache=cache, position=what.position, body=body, wanted=wanted,
                rope_length=what.rope_length,
            )
        )  # fmt: skip

    async def stateless(
        self, peer: str, rows: int, tokens: int, start: int, stop: int, work: Callable[[Span], Buffer]
    ) -> Answer:
        """Run `work` in the torch thread when it is this request's turn.

        rows, tokens, start, stop: what it costs.  Raises TooManyStreams (nothing was done), and what
        `work` raises of PeerFault.
        """
        job = Job(next(self._numbers), peer, Kind.STATELESS, rows, tokens, start, stop)
        return await self._answer(_Request(job, work=work))

    async def look_again(self) -> None:
        """Measure what a decode step takes now, for about LOOK_SECONDS; call this when nothing is served.

        Not where steps take very long: who comes meanwhile would have to wait for two.
        """
        seconds = self.rates.alone * (self.span.stop - self.span.start)
        if self.batcher.waiting or seconds > LONGEST_LOOKED_AT_SECONDS:
            return
        self.rates.measured(await self.compute.run(measure_decode, self.span, LOOK_SECONDS))

    def before_next(self, chore: Callable[[], None]) -> None:
        """Do this in the torch thread before the next batch, after the one that runs now.

        For what a batch must not be surprised by: a cut and the end of a cache that it computes with.
        """
        with self._lock:
            self._chores.append(chore)

    async def _answer(self, work: _Work) -> Answer:
        number = work.job.number
        with self._lock:
            self.batcher.submit(work.job, time.perf_counter())
            self._works[number] = work
        self._wanted.set()
        try:
            await work.done.wait()
        finally:
            with self._lock:
                self.batcher.cancel(number)
                del self._works[number]
        assert work.result is not None
        return work.result.unwrap()

    # From here on: in the torch thread.

    def _turn(self) -> list[tuple[_Work, outcome.Outcome[Answer]]] | None:
        """Take the next batch and run it; what is answered by it, or None if nothing waits."""
        with self._lock:
            # Before any pages are taken: the budget has counted these as given back.
            chores, self._chores = self._chores, []
            for chore in chores:
                chore()
            batch = self.batcher.next(time.perf_counter())
            if batch is None:
                return None
            works = [self._works[piece.job.number] for piece in batch]
        began = time.perf_counter()
        settled: list[tuple[_Work, outcome.Outcome[Answer]]] = []
        try:
            self._compute(batch, works, settled)
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                for work, result in settled:
                    if isinstance(result, outcome.Error):
                        self.batcher.cancel(work.job.number)
                self.batcher.finished(batch, seconds, time.perf_counter())
        kind = batch[0].job.kind
        if kind is not Kind.STATELESS:
            rows_tokens = sum(piece.job.rows * piece.tokens for piece in batch)
            blocks = len(set().union(*(range(piece.job.start, piece.job.stop) for piece in batch)))
            self.rates.observe(rows_tokens, blocks, seconds, decode=kind is Kind.DECODE)
        if kind is Kind.DECODE:
            waited = sum(began - work.since for work in works)
            self.waits.observe(waited, seconds * len(works), len(works), began + seconds)
        return settled

    def _compute(
        self, batch: Batch, works: list[_Work], settled: list[tuple[_Work, outcome.Outcome[Answer]]]
    ) -> None:
        began = time.perf_counter()

        def micros() -> int:
            return int((time.perf_counter() - began) * 1e6)

        first = works[0]
        if isinstance(first, _Request):
            try:
                settled.append((first, outcome.Value(Answer(first.work(self.span), micros()))))
            except BadResult as bad:
                settled.append((first, outcome.Error(bad)))
            return
        steps = [work for work in works if isinstance(work, _Step)]
        if batch[0].job.kind is Kind.PREFILL:
            for piece, step in zip(batch, steps, strict=True):
                self._chunk(piece, step, time.perf_counter(), settled)
            return
        steps, hidden = _decoded(steps, settled)
        if not steps:
            return
        hidden = self._decode([Piece(step.job, 0, 1) for step in steps], steps, hidden)
        for step, body in zip(steps, _encoded(steps, hidden), strict=True):
            result: outcome.Outcome[Answer]
            result = (
                outcome.Error(body) if isinstance(body, NotFinite) else outcome.Value(Answer(body, micros()))
            )
            settled.append((step, result))

    def _decode(self, pieces: Sequence[Piece], steps: Sequence[_Step], hidden: Tensor) -> Tensor:
        """One position of every step's rows: hidden [rows, hidden_size] -> the same shape.

        Each step joins at its first block and leaves behind its last.
        """
        for step in steps:
            step.cache.reserve(step.position + 1)
        parts = list(torch.split(hidden, [step.contract.batch for step in steps]))
        for start, stop, active in segments(pieces):
            together = [steps[i].cache for i in active]
            lengths = [steps[i].rope_length for i in active]
            rows = self.span.decode(
                torch.cat([parts[i] for i in active]), together, start, stop, rope_lengths=lengths
            )
            for i, part in zip(
                active, torch.split(rows, [steps[i].contract.batch for i in active]), strict=True
            ):
                parts[i] = part
        for step in steps:
            step.cache.length = step.position + 1
        return torch.cat(parts)

    def _chunk(
        self,
        piece: Piece,
        step: _Step,
        began: float,
        settled: list[tuple[_Work, outcome.Outcome[Answer]]],
    ) -> None:
        """A part of a prefill; the answer when it was the last one."""
        contract = step.contract
        try:
            if step.hidden is None:
                step.hidden = decode_hidden(step.body, contract)
            given = step.hidden[:, piece.offset : piece.offset + piece.tokens]
            answer = self.span.forward(
                given, step.cache, step.position + piece.offset, contract.start, contract.stop,
                rope_length=step.rope_length,
            )  # fmt: skip
            wanted_from = step.job.tokens - step.wanted - piece.offset
            if wanted_from < piece.tokens:
                step.parts.append(answer[:, max(0, wanted_from) :])
            step.seconds += time.perf_counter() - began
            if not piece.last:
                return
            body: Buffer = b""
            if step.parts:
                body = encode_hidden(torch.cat(step.parts, 1), contract.codec)
        except BadResult as bad:
            own = bad if step.hidden is None else NotFinite(str(bad))
            settled.append((step, outcome.Error(own)))
        else:
            settled.append((step, outcome.Value(Answer(body, int(step.seconds * 1e6)))))


def _decoded(
    steps: Sequence[_Step], settled: list[tuple[_Work, outcome.Outcome[Answer]]]
) -> tuple[list[_Step], Tensor]:
    """The steps' hidden states one below the other, [rows, hidden_size].

    A step that holds NaN or infinity is answered so, and left out.
    """
    sound: list[_Step] = []
    rows: list[Tensor] = []
    for codec in {step.contract.codec: None for step in steps}:
        same = [step for step in steps if step.contract.codec == codec]
        flat = torch.frombuffer(bytearray().join(step.body for step in same), dtype=WIRE_DTYPES[codec])
        wide = flat.view(-1, same[0].contract.hidden).float()
        if not bool(torch.isfinite(wide).all()):
            kept = []
            for step, part in zip(
                same, torch.split(wide, [step.contract.batch for step in same]), strict=True
            ):
                if bool(torch.isfinite(part).all()):
                    kept.append((step, part))
                else:
                    bad = BadResult("received hidden states hold NaN or infinity")
                    settled.append((step, outcome.Error(bad)))
            same, wide = [step for step, _ in kept], torch.cat([part for _, part in kept] or [wide[:0]])
        sound += same
        rows.append(wide)
    return sound, torch.cat(rows)


def _encoded(steps: Sequence[_Step], hidden: Tensor) -> list[Buffer | NotFinite]:
    """Each step's rows as bytes of its codec, or why they must not leave this machine."""
    bodies: dict[int, Buffer | NotFinite] = {}
    first = 0
    places = []
    for step in steps:
        places.append((first, first + step.contract.batch))
        first += step.contract.batch
    for codec in {step.contract.codec for step in steps}:
        wire = hidden.to(device="cpu", dtype=WIRE_DTYPES[codec]).contiguous()
        finite = torch.isfinite(wire).all(-1).tolist()
        data = memoryview(wire.view(torch.uint8).numpy().data).cast("B")
        row = data.nbytes // len(wire)
        for index, (step, (begin, end)) in enumerate(zip(steps, places, strict=True)):
            if step.contract.codec != codec:
                continue
            if not all(finite[begin:end]):
                bodies[index] = NotFinite("computed hidden states hold NaN or infinity")
            else:
                bodies[index] = data[begin * row : end * row] if step.wanted else b""
    return [bodies[index] for index in range(len(steps))]
