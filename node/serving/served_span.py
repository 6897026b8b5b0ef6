"""A stint: the serving of one span, from when it is in memory until its sessions have moved elsewhere.

A node serves one after the other, mostly a single one; what they have in common is `ServingSetup`.  A move to
blocks of which some are held already is no new stint: this one goes on with other blocks, and so do the
sessions of those that stay.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import trio

from node.config import VERSION, ConfigError
from node.model.blocks.span import DTYPES, Span, load_span
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.info import ModelInfo
from node.model.checkpoint.source import cache_dir
from node.model.checkpoint.tensors import block_tensors
from node.runtime.compute_thread import ComputeThread
from node.runtime.faults import Faults
from node.serving import memory
from node.serving.cache_budget import CacheBudget
from node.serving.executor.engine import Engine
from node.serving.executor.rates import RatesFile, device_name, rates_at_start, rates_key
from node.serving.forward_backward import ForwardBackwardListener, PeekStream
from node.serving.sessions.hop_session import FrameStream
from node.serving.sessions.listener import Listener, Served
from node.serving.sessions.push import Sender
from routing.names import PeerId, Revision
from routing.view.records import Record, State
from tensor_codec.errors import Draining
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import CODEC_BYTES
from tensor_codec.messages.fields import Failed, encode_failed

log = logging.getLogger("raceme")


@dataclass(frozen=True, slots=True)
class ServingSetup:
    """What a node serves with, whichever blocks.

    name: of the node.  activations: what is computed and cached in.  open_push: a stream to a peer, for
    pushing.  faults: of peers, counted.
    """

    folder: ModelFolder
    info: ModelInfo
    name: str
    device: str
    dtype: str
    quantize: str
    activations: str
    threads: int
    cache_tokens: int
    journal_tokens: int | None
    limits: Limits
    open_push: Callable[[PeerId], Awaitable[Sender]]
    faults: Faults

    def offer(self, start: int, stop: int) -> Offer:
        """To serve these blocks."""
        return Offer(self.info, start, stop, self.dtype, self.quantize, self.name)

    def fetch(self, start: int, stop: int) -> None:
        """Bring the files of these blocks into the cache.  Raises ConfigError."""
        tensors = self.folder.tensors
        self.folder.need({tensors[name].file for name in block_tensors(self.folder, start, stop)})

    def check_room(self, blocks: int) -> None:
        """Whether so many blocks fit beside what is loaded.  Raises ConfigError.

        Runs in the torch thread.
        """
        free = memory.free_bytes(self.device)
        memory.check_fits(
            self.info, blocks, self.dtype, self.cache_tokens, free, self.quantize, self.activations,
            self.limits.max_step_tokens,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Offer:
    """The span that this node serves, or is about to."""

    info: ModelInfo
    start: int
    stop: int
    dtype: str
    quantize: str
    name: str

    def served(self, can_cut: bool) -> Served:
        """What sessions are checked against."""
        info = self.info
        return Served(
            info.name, info.revision, self.start, self.stop, self.dtype, info.hidden_size,
            info.max_position, can_cut,
        )  # fmt: skip

    def record(self, state: State, listener: Listener | None = None) -> Record:
        """What we announce.  listener: for the rates and the room, once there are some."""
        record = Record(
            role="serve",
            state=state,
            name=self.name,
            version=VERSION,
            model=self.info.name,
            revision=self.info.revision,
            blocks=self.info.blocks,
            start=self.start,
            stop=self.stop,
            dtype=self.dtype,
            quantize=self.quantize,
        )
        if listener is None:
            return record
        engine = listener.engine
        return replace(
            record,
            seconds_per_block=engine.rates.decode_seconds_per_block,
            prefill_seconds_per_token=engine.rates.prefill_seconds_per_block_token,
            cache_tokens=listener.budget.free_tokens,
            session_tokens=listener.budget.session_tokens,
            step_tokens=listener.limits.step_tokens(self.info.hidden_size * CODEC_BYTES["fp32"]),
            queue=engine.queue,
        )


@dataclass(slots=True, eq=False)
class ServedSpan:
    """A span in memory and the doors to it.  Made by `load_served_span`; `run` must be running.

    offer: the blocks that are served; the span has these at least.
    """

    offer: Offer
    listener: Listener
    stateless: ForwardBackwardListener
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _ended: trio.Event = field(default_factory=trio.Event)

    def record(self, state: State) -> Record:
        """What we announce of it."""
        return self.offer.record(state, self.listener)

    async def run(self) -> None:
        """Compute what is asked for, until `end`."""
        try:
            with self._scope:
                await self.listener.engine.run()
        finally:
            self._ended.set()

    async def drain(self) -> None:
        """Take nothing new and let what is under way finish or move elsewhere.  Bounded."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listener.drain)
            nursery.start_soon(self.stateless.drain)

    def offers(self, offer: Offer) -> None:
        """Take sessions and requests for these blocks from now on.  The span has them."""
        self.offer = offer
        served = replace(self.listener.served, start=offer.start, stop=offer.stop)
        self.listener.served = self.stateless.served = served

    async def hand_over_others(self) -> None:
        """Let what goes through blocks that are no longer offered finish or move elsewhere.  Bounded."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listener.hand_over_others)
            nursery.start_soon(self.stateless.finish_others)

    async def take_up(self, fresh: Sequence[Span], compute: ComputeThread) -> None:
        """Have these blocks too from now on.

        Raises what torch raises without memory; nothing is changed then.
        """
        await compute.run(self._compute_with, self.listener.engine.span.joined(fresh))

    async def give_back(self, compute: ComputeThread) -> None:
        """Have the blocks that are offered alone.  Nothing may go through the others any more."""
        await compute.run(self._give_back)
        can_cut = self.listener.engine.span.can_cut
        self.listener.served = self.stateless.served = replace(self.listener.served, can_cut=can_cut)

    def _give_back(self) -> None:
        self._compute_with(self.listener.engine.span.part(self.offer.start, self.offer.stop))

    def _compute_with(self, span: Span) -> None:
        """Runs in the torch thread, so between two batches."""
        self.listener.pool.hold(span.start, span.shapes)
        self.listener.engine.span = span

    async def end(self) -> None:
        """Stop computing; to be called once `run` has been started."""
        self._scope.cancel()
        await self._ended.wait()


async def load_served_span(
    setup: ServingSetup, offer: Offer, compute: ComputeThread, *, in_pieces: bool = False
) -> ServedSpan:
    """Load and measure these blocks.  Raises ConfigError, and what torch raises without memory.

    in_pieces: as `load_blocks` does, for who serves meanwhile.
    """
    if in_pieces:
        first, *others = await load_blocks(setup, offer, compute)
        span = first.joined(others)
        del first, others
    else:
        span = await compute.run(_load_span, setup, offer)
    file, key = kept_rates(setup.info.revision, setup.device, setup.dtype, setup.quantize, setup.threads)
    rates = await compute.run(rates_at_start, span, file, key)
    limits = setup.limits
    engine = Engine(span, compute, rates, limits)
    pool = await compute.run(span.new_arena, setup.cache_tokens, setup.info.max_position)
    budget = CacheBudget(
        pool.free_tokens, limits.cache_share_per_peer, limits.least_share_tokens, pool.page_tokens,
        limits.max_session_tokens,
    )  # fmt: skip
    served = offer.served(span.can_cut)
    listener = Listener(
        served, engine, pool, budget, setup.open_push, limits, setup.faults,
        journal_tokens=setup.journal_tokens,
    )  # fmt: skip
    return ServedSpan(offer, listener, ForwardBackwardListener(served, engine, limits, setup.faults))


async def load_blocks(setup: ServingSetup, offer: Offer, compute: ComputeThread) -> list[Span]:
    """These blocks, a span of each: between two of them what is served gets its turn in the torch thread.

    Raises as `load_served_span`.
    """
    return [
        await compute.run(_load_span, setup, replace(offer, start=block, stop=block + 1))
        for block in range(offer.start, offer.stop)
    ]


def kept_rates(
    revision: Revision, device: str, dtype: str, quantize: str, threads: int
) -> tuple[RatesFile, str]:
    """Where figures of earlier runs are, and under which key those of a run like this."""
    key = rates_key(revision, device_name(device), dtype, quantize, threads, VERSION)
    return RatesFile(cache_dir() / "rates.json"), key


def _load_span(setup: ServingSetup, offer: Offer) -> Span:
    """Runs in the torch thread."""
    return load_span(
        setup.folder,
        offer.start,
        offer.stop,
        dtype=DTYPES[offer.dtype],
        device=setup.device,
        quantize=offer.quantize,
    )


def forget_unused(device: str) -> None:
    """Give back the memory of what nobody refers to any more.  Runs in the torch thread."""
    gc.unfreeze()
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


# What loading may end with that is not a bug: torch says RuntimeError where there is no memory.
LOAD_FAULTS = (ConfigError, OSError, MemoryError, RuntimeError)


RETRY_SECONDS = 2.0  # after which the new blocks may be there


@dataclass(slots=True)
class StreamDispatch:
    """Leads each stream to the stint of the moment; where there is none, it says so.

    leaving: the one before, while its sessions move elsewhere.
    """

    limits: Limits
    served_span: ServedSpan | None = None
    leaving: ServedSpan | None = None

    @property
    def served_spans(self) -> tuple[ServedSpan, ...]:
        """Those that have sessions, the present one first."""
        return tuple(
            served_span for served_span in (self.served_span, self.leaving) if served_span is not None
        )

    async def serve_session(self, stream: FrameStream) -> None:
        """Serve the stream of one session.  Raises PeerFault."""
        if self.served_span is None:
            await self._refuse(stream)
        else:
            await self.served_span.listener.serve_session(stream)

    async def serve_request(self, stream: PeekStream) -> None:
        """Serve a stream of requests without a session.  Raises PeerFault."""
        if self.served_span is None:
            await self._refuse(stream)
        else:
            await self.served_span.stateless.serve(stream)

    async def serve_push(self, stream: FrameStream) -> None:
        """Take steps that a peer pushes, until it closes the stream.  Raises PeerFault."""
        while (frame := await stream.receive()) is not None:
            for served_span in self.served_spans:
                if await served_span.listener.take_push(frame, stream.peer):
                    break

    async def _refuse(self, stream: FrameStream) -> None:
        if await stream.receive(self.limits.frame_start_seconds) is not None:
            no = Draining("this node is loading other blocks", RETRY_SECONDS)
            await stream.send(encode_failed(Failed.of(no)))
