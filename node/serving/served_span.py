"""A served span: from when it is in memory until its sessions have moved elsewhere.

A node serves one span after the other, and mostly only one; all of them share one `ServingSetup`.  A move
to blocks of which the node holds some already makes no new served span: the present one goes on with other
blocks, and so do the sessions of the blocks that stay.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import trio

from node.config import VERSION, ConfigError
from node.devices import empty_cache, kind_of
from node.model.adapters.kernels import prepare
from node.model.adapters.prefix import guest_shapes
from node.model.blocks.forward_backward import kinds_of_blocks, measure_activations
from node.model.blocks.span import DTYPES, Span
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.info import ModelInfo
from node.model.checkpoint.tensors import block_tensors
from node.monitor.metrics.meters import ServingMeters, reason_of
from node.network.sharing.seeds import Seeds
from node.runtime.compute_thread import Runner
from node.runtime.faults import Faults
from node.runtime.nurseries import background_nursery
from node.runtime.watermarks import trim_heap
from node.serving import memory
from node.serving.adapters.desk import AdapterDesk
from node.serving.adapters.listener import AdapterListener
from node.serving.adapters.sums import Shapes, SpanSums
from node.serving.cache_budget import CacheBudget
from node.serving.executor.batcher import policy_for
from node.serving.executor.engine import Engine, EngineSpan
from node.serving.executor.rates import rates_at_start
from node.serving.forward_backward import ForwardBackwardListener, HeldActivations, PeekStream
from node.serving.memory import Precision
from node.serving.placement.placement import Placement
from node.serving.sessions.frame_rates import FrameBudget, FrameRates
from node.serving.sessions.hop_session import FrameStream
from node.serving.sessions.listener import Listener
from node.serving.sessions.push import Sender
from node.serving.sessions.push_reader import read_pushes
from node.serving.sessions.together.pushed import PushedSteps
from node.serving.span_admission import SpanAdmission
from node.serving.training.tapes import TapeBudget, Tapes
from routing.blocks import Blocks
from routing.names import PeerId
from routing.view.records import Record, State
from tensor_codec.errors import Draining, MessageError, Refused, TooManyStreams, WrongRevision
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import OUTLIER_CODEC, vector_bytes
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.info import PeerInfo, decode_describe, encode_info
from tensor_codec.span_spec import SpanSpec

log = logging.getLogger("raceme")


@dataclass(frozen=True, slots=True)
class ServingSetup:
    """The settings and resources with which a node serves any span.

    name: of the node.  placement: its devices.  precision: of the weights, and of the computing.  open_push:
    a stream to a peer, for pushing.  faults: of peers, counted.  training_bytes: see
    `memory.training_bytes_that_fit`.  stated: the memory of the span and of all that peers can add to it.
    adapters: None: none are taken.  meters: counters over all spans.
    """

    folder: ModelFolder
    info: ModelInfo
    name: str
    placement: Placement
    precision: Precision
    cache_tokens: int
    journal_tokens: int | None
    limits: Limits
    open_push: Callable[[PeerId], Awaitable[Sender]]
    faults: Faults
    training_bytes: int = 0
    stated: memory.Memory | None = None
    adapters: AdapterDesk | None = None
    meters: ServingMeters = field(default_factory=ServingMeters)

    @property
    def device(self) -> str:
        """The first device, which says of what kind all are."""
        return self.placement.device

    @property
    def shared(self) -> Seeds:
        """The adapters that the node gives to others."""
        return Seeds() if self.adapters is None else self.adapters.seeder.seeds

    def spec(self, blocks: Blocks) -> SpanSpec:
        """The spec for serving these blocks."""
        return SpanSpec(
            model=self.info.name,
            revision=self.info.revision,
            blocks=blocks,
            dtype=self.precision.dtype,
            quantize=self.precision.quantize,
            hidden=self.info.hidden_size,
            max_position=self.info.max_position,
        )

    def record(self, spec: SpanSpec, state: State) -> Record:
        """The node's record of a span; rates and free memory are still to come."""
        return Record(
            role="serve",
            state=state,
            name=self.name,
            version=VERSION,
            model=spec.model,
            revision=spec.revision,
            blocks=self.info.blocks,
            start=spec.blocks.start,
            stop=spec.blocks.stop,
            dtype=spec.dtype,
            quantize=spec.quantize,
        )

    def fetch(self, blocks: Blocks) -> None:
        """Bring the files of these blocks into the cache.  Raises ConfigError."""
        tensors = self.folder.tensors
        self.folder.need({tensors[name].file for name in block_tensors(self.folder, *blocks)})

    def check_room(self, count: int) -> None:
        """Raise ConfigError unless `count` more blocks fit besides the loaded ones.

        Runs in the torch thread.
        """
        info, step_tokens = self.placement.sized(self.info), self.limits.max_step_tokens
        self.placement.room().check_fits(info, count, self.precision, self.cache_tokens, step_tokens)


@dataclass(slots=True, eq=False)
class ServedSpan:
    """A span in memory and its listeners.  Made by `load_served_span`; `run` must be running.

    admission: of both listeners; its spec says which of the span's blocks are served.
    """

    setup: ServingSetup
    admission: SpanAdmission
    listener: Listener
    stateless: ForwardBackwardListener
    adapters: AdapterListener | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _ended: trio.Event = field(default_factory=trio.Event)

    @property
    def spec(self) -> SpanSpec:
        """The spec of the blocks that are served now."""
        return self.admission.spec

    def record(self, state: State) -> Record:
        """The node's record of the span, rates and free memory included."""
        engine, listener = self.listener.engine, self.listener
        return replace(
            self.setup.record(self.spec, state),
            seconds_per_block=engine.rates.decode_seconds_per_block,
            prefill_seconds_per_token=engine.rates.prefill_seconds_per_block_token,
            cache_tokens=listener.budget.free_tokens,
            session_tokens=listener.budget.session_tokens,
            step_tokens=listener.limits.step_tokens(vector_bytes("fp32", self.spec.hidden)),
            prompts=True,
            codecs=(OUTLIER_CODEC,) if self.setup.precision.packs else (),
            batches=True,
            queue=engine.queue,
            lora=self.lora,
            adapters=() if self.setup.adapters is None else self.setup.adapters.store.announced,
        )

    @property
    def lora(self) -> int:
        """The largest rank of an adapter that guests may bring; 0 where none is taken."""
        takes = self.adapters is not None and any(self.adapters.shapes().values())
        return self.setup.limits.max_adapter_rank if takes else 0

    @property
    def threads(self) -> int:
        """The threads that compute now, in each process of the node; asked in the event loop's thread."""
        return torch.get_num_threads()

    def info(self) -> PeerInfo:
        """The span's state at this moment, for a peer that asks."""
        record, listener = self.record("online"), self.listener
        return PeerInfo(
            state="draining" if self.admission.draining else "online",
            model=record.model,
            revision=record.revision,
            blocks=record.blocks,
            start=record.start,
            stop=record.stop,
            dtype=record.dtype,
            quantize=record.quantize,
            sessions=listener.session_count,
            cache_tokens=record.cache_tokens,
            cache_size=listener.budget.all_tokens,
            page_tokens=listener.budget.page_tokens,
            session_tokens=record.session_tokens,
            step_tokens=record.step_tokens,
            queue=record.queue,
            seconds_per_block=record.seconds_per_block,
            prefill_seconds_per_token=record.prefill_seconds_per_token,
            name=record.name,
            version=record.version,
            threads=self.threads,
        )

    async def run(self) -> None:
        """Compute steps and requests, until `end`."""
        try:
            with self._scope:
                async with background_nursery() as nursery:
                    nursery.start_soon(self.stateless.tapes.run)
                    if self.setup.adapters is not None:
                        nursery.start_soon(self.setup.adapters.expire)
                    await self.listener.engine.run()
        finally:
            self._ended.set()

    async def drain(self) -> None:
        """Take nothing new; let sessions and requests finish or move elsewhere.  Bounded."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listener.drain)
            nursery.start_soon(self.stateless.drain)

    def serve(self, spec: SpanSpec) -> None:
        """Admit sessions and requests for the blocks of this spec alone from now on.  The span has them."""
        self.admission.spec = spec

    async def hand_over_others(self) -> None:
        """Let sessions and requests of blocks that are no longer served finish or move.  Bounded."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listener.hand_over_others)
            nursery.start_soon(self.stateless.finish_others)

    async def take_up(self, fresh: Sequence[EngineSpan], compute: Runner) -> None:
        """Have these blocks too from now on.

        Raises torch's out-of-memory errors; nothing is changed then.
        """
        await compute.run(self._compute_with, self.listener.engine.span.joined(fresh))
        await self.load_own_adapters()

    async def give_back(self, compute: Runner) -> None:
        """Keep only the blocks that are served.  Nothing may go through the others any more."""
        await compute.run(self._give_back)
        if self.setup.adapters is not None:
            self.setup.adapters.store.forget_other_blocks(self.spec.blocks)

    async def load_own_adapters(self) -> None:
        """Have the operator's adapters for all blocks.  Raises ConfigError."""
        if (desk := self.setup.adapters) is not None and desk.own:
            engine, shapes = self.listener.engine, guest_shapes(self.listener.engine.span)
            try:
                await desk.load_own(sorted(shapes), shapes, engine.compute)
            except MessageError as error:
                raise ConfigError(f"--adapter: {error}") from None

    def _give_back(self) -> None:
        self._compute_with(self.listener.engine.span.part(*self.spec.blocks))

    def _compute_with(self, span: EngineSpan) -> None:
        """Runs in the torch thread, so between two batches."""
        self.listener.pool.hold(span.start, span.shapes)
        self.listener.engine.span = span

    async def end(self) -> None:
        """Stop computing; to be called once `run` has been started."""
        self._scope.cancel()
        await self._ended.wait()


async def load_served_span(
    setup: ServingSetup, blocks: Blocks, compute: Runner, *, in_pieces: bool = False
) -> ServedSpan:
    """Load and measure these blocks.  Raises ConfigError, and torch's out-of-memory errors.

    in_pieces: block by block, as `load_blocks` does, for a node that serves meanwhile.
    """
    if in_pieces:
        first, *others = await load_blocks(setup, blocks, compute)
        span = first.joined(others)
        del first, others
    else:
        span = await compute.run(_load_span, setup, blocks)
    threads = await compute.run(torch.get_num_threads)  # changes with the nodes on the machine
    file, key = setup.placement.kept_rates(setup.info.revision, setup.precision, threads)
    rates = await compute.run(rates_at_start, span, file, key)
    limits = setup.limits
    engine = Engine(span, compute, rates, limits, meters=setup.meters, policy=policy_for(setup.device))
    kept = DTYPES[setup.precision.caches]
    pool = await compute.run(span.new_arena, setup.cache_tokens, setup.info.max_position, kept)
    await compute.run(span.record, pool)
    budget = CacheBudget(
        pool.free_tokens, limits.cache_share_per_peer, limits.least_share_tokens, pool.page_tokens,
        limits.max_session_tokens, limits.own_shares,
    )  # fmt: skip
    desk = setup.adapters
    admission = SpanAdmission(setup.spec(blocks), adapters=None if desk is None else desk.store)
    listener = Listener(
        admission, engine, pool, budget, setup.open_push, limits, setup.faults,
        journal_tokens=setup.journal_tokens, packs=setup.precision.packs,
    )  # fmt: skip
    part = memory.part_bytes(setup.info, setup.precision, limits.max_step_tokens)
    free = setup.placement.free_for_training
    for_tapes = memory.tape_bytes_of(setup.training_bytes, limits)
    held = HeldActivations(
        part, setup.training_bytes - for_tapes, free, compute,
        lambda: [partial(measure_activations, engine.span, block) for block in kinds_of_blocks(engine.span)],
    )  # fmt: skip
    tapes = Tapes(
        TapeBudget(for_tapes, limits.tape_idle_seconds, limits.own_shares), held.of_a_position, free
    )
    stateless = ForwardBackwardListener(admission, engine, limits, setup.faults, held.positions, tapes)
    served = ServedSpan(setup, admission, listener, stateless)
    if desk is not None:
        await compute.run(prepare, span)
        shapes = KnownShapes(engine)
        served.adapters = AdapterListener(
            admission, desk, shapes, compute, limits, setup.faults, engine.others_decode
        )
        stateless.sums = SpanSums(desk.sums, desk.store, shapes, compute)
        await served.load_own_adapters()
    return served


@dataclass(slots=True)
class KnownShapes:
    """The shapes of each block that the engine has, see `guest_shapes`: found once for each span."""

    engine: Engine
    _of: EngineSpan | None = None
    _shapes: Shapes = field(default_factory=dict)

    def __call__(self) -> Shapes:
        """See above."""
        if self._of is not self.engine.span:
            self._of, self._shapes = self.engine.span, guest_shapes(self.engine.span)
        return self._shapes


async def load_blocks(setup: ServingSetup, blocks: Blocks, compute: Runner) -> list[Span]:
    """Load these blocks, a span of each: between two of them the torch thread computes for the present span.

    Raises as `load_served_span`.
    """
    places = await compute.run(setup.placement.places, blocks.size)
    return [
        await compute.run(_load_span, setup, Blocks(block, block + 1), (place,))
        for block, place in zip(range(*blocks), places, strict=True)
    ]


def _load_span(setup: ServingSetup, blocks: Blocks, places: Sequence[int] | None = None) -> Span:
    """Runs in the torch thread."""
    return setup.placement.load(setup.folder, blocks, setup.precision, places)


def forget_unused(device: str) -> None:
    """Give back the memory of objects without a reference.  Runs in the torch thread."""
    gc.unfreeze()
    gc.collect()
    if kind_of(device) != "cpu":
        empty_cache()


# Errors of loading that are not a bug: torch raises RuntimeError where there is no memory.
LOAD_FAULTS = (ConfigError, OSError, MemoryError, RuntimeError)


NO_ADAPTERS = "this node divides its blocks among several devices, and takes no adapters"
RETRY_SECONDS = 2.0  # until a client asks again: the new blocks may be loaded by then


@dataclass(frozen=True, slots=True)
class _Pushed:
    """The sessions of the spans that are served whenever it is asked."""

    dispatch: StreamDispatch

    def __iter__(self) -> Iterator[PushedSteps]:
        return iter([span.listener.pushed for span in self.dispatch.served_spans])


@dataclass(slots=True)
class StreamDispatch:
    """Passes each stream to the span that is served now; where there is none, the peer is asked to come back.

    leaving: the span before, while its sessions move elsewhere.  admitting: new sessions and requests; False
    where memory is short.  meters: of the node.
    """

    limits: Limits
    meters: ServingMeters = field(default_factory=ServingMeters)
    served_span: ServedSpan | None = None
    leaving: ServedSpan | None = None
    admitting: bool = True
    _frames: FrameBudget = field(init=False)

    def __post_init__(self) -> None:
        self._frames = FrameBudget(FrameRates(self.limits), lambda _: 0)

    @property
    def served_spans(self) -> tuple[ServedSpan, ...]:
        """The spans that have sessions, the present one first."""
        return tuple(span for span in (self.served_span, self.leaving) if span is not None)

    async def serve_session(self, stream: FrameStream) -> None:
        """Serve the stream of one session.  Raises PeerFault."""
        if not self.served_spans:
            await self._refuse(stream, self.meters.sessions_refused)
        else:  # a session that is open may go on over this stream even where there is no room for another
            admits = self.served_span is not None and self.admitting
            await self.served_spans[0].listener.serve_session(stream, None if admits else self._refusal())

    async def serve_request(self, stream: PeekStream) -> None:
        """Serve a stream of requests without a session.  Raises PeerFault."""
        if self.served_span is None or not self.admitting:
            await self._refuse(stream, self.meters.requests_refused)
        else:
            await self.served_span.stateless.serve(stream)

    async def serve_adapter(self, stream: PeekStream) -> None:
        """Take adapters that a client brings.  Raises PeerFault."""
        if (span := self.served_span) is None or not self.admitting:
            await self._refuse(stream)
        elif span.adapters is None:
            await self._refuse_with(stream, WrongRevision(NO_ADAPTERS))
        else:
            await span.adapters.serve(stream)

    async def serve_info(self, stream: FrameStream) -> None:
        """Answer one question for the node's state.  Raises PeerFault."""
        if (span := self.served_span) is None:
            return await self._refuse(stream)
        if (frame := await stream.receive(self.limits.frame_start_seconds)) is not None:
            decode_describe(frame)
            await stream.send(encode_info(span.info()))
        return None

    async def serve_push(self, stream: FrameStream) -> None:
        """Take steps that a peer pushes, until it closes the stream.  Raises PeerFault."""
        await read_pushes(stream, _Pushed(self), self._frames)

    async def _refuse(self, stream: FrameStream, count: Counter[str] | None = None) -> None:
        await self._refuse_with(stream, self._refusal(), count)

    def _refusal(self) -> Refused:
        loading = Draining("this node is loading other blocks", RETRY_SECONDS)
        return self._short_of_memory() if self.served_span is not None else loading

    async def _refuse_with(self, stream: FrameStream, no: Refused, count: Counter[str] | None = None) -> None:
        """Answer the first message with a refusal."""
        stream.judge = lambda _beginning, _size: no  # nothing is kept of a large one
        try:
            if await stream.receive(self.limits.frame_start_seconds) is None:
                return
        except Refused:
            pass  # of `judge`
        if count is not None:
            count[reason_of(no)] += 1
        await stream.send(encode_failed(Failed.of(no)))

    def _short_of_memory(self) -> Refused:
        return TooManyStreams("this node is short of memory", self.limits.memory_retry_seconds)

    # --- for the guard of the node's memory ---

    async def give_back_memory(self) -> None:
        """Give memory that no session uses back to the system, and that of tapes."""
        for span in self.served_spans:
            span.stateless.tapes.budget.drop_all()
            await span.listener.engine.compute.run(span.listener.pool.give_back_memory)
        await trio.to_thread.run_sync(trim_heap)

    def end_youngest(self) -> bool:
        """End the session that was opened last, for its client to go on elsewhere; False without one."""
        return any(span.listener.end_youngest(self._short_of_memory()) for span in self.served_spans)
