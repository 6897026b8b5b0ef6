"""The entry point of requests without a session: forward and backward over a run of blocks.

    /raceme/compute/1   a client sends hidden states, or hidden states and a gradient, and gets a tensor of
                        equal shape back

Between two requests nothing is kept but tapes: graphs of forwards that a client wants to go back through, as
long as there is memory for them (`node.serving.training.tapes`).  A stream carries one request at a time; an
idle stream is closed.
Each request is checked here against the served span, as a session is when it opens, and runs in the torch
thread from wire bytes to wire bytes.  A client that leaves while its request waits or runs cancels it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, cast

import trio
from torch import Tensor

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.low_rank import AdapterGradients
from node.model.adapters.prefix import AnySpanAdapter
from node.model.blocks.forward_backward import (
    Activations,
    Gradients,
    StatelessSpan,
    Tape,
    backward_in_parts,
    forward_in_parts,
)
from node.model.blocks.parts import backward_parts, forward_parts
from node.monitor.metrics.meters import ServingMeters, reason_of
from node.network.admission.rates import NamedRates
from node.network.admission.shares import places_of_most
from node.network.prefixes import sharer
from node.runtime.compute_thread import Runner
from node.runtime.faults import Faults
from node.serving.adapters.sums import SpanSums
from node.serving.executor.engine import Answer, NotFinite, Parts
from node.serving.executor.out_of_memory import OutOfMemory, or_refused
from node.serving.sessions.hop_session import FrameStream
from node.serving.span_admission import SpanAdmission
from node.serving.training.tapes import Tapes, no_tapes
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import (
    BadResult,
    FrameError,
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    TooManyStreams,
)
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.forward_backward import (
    Backward,
    Forward,
    Output,
    Run,
    decode_request,
    encode_output,
    prompts_contract,
    request_contract,
)
from tensor_codec.messages.gradients import Collect

MAX_REST_SECONDS = 30.0  # until the next request of a peer whose requests were refused is read
RETRY_SECONDS = 2.0  # until a peer asks again: one of its streams has probably ended by then
MEMORY_SECONDS = Limits().memory_retry_seconds  # until it asks again where there was no memory


class PeekStream(FrameStream, Protocol):
    """A framed stream that says whether a frame is on its way."""

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""


class StatelessEngine(Protocol):
    """The part of `node.serving.executor.engine.Engine` that computes requests."""

    @property
    def meters(self) -> ServingMeters:
        """Counters of the node."""

    @property
    def part_positions(self) -> int:
        """Positions times blocks of one part."""

    async def stateless(
        self,
        peer: str,
        rows: int,
        tokens: int,
        parts: Sequence[tuple[int, int]],
        work: Parts,
        *,
        prefix: str = "",
        adapter: AnySpanAdapter | None = None,
    ) -> Answer:
        """Run `work` in the torch thread, one part at each `next`, when the request's parts are due.

        rows, tokens: of hidden states.  parts: the blocks [start, stop) of each part, in order.  adapter: of
        `work`.  A caller that is cancelled gets control back at once, and no further part is
        begun.
        Raises Refused, TooManyStreams (nothing was done), and the errors of `work`.
        """


@dataclass(frozen=True, slots=True)
class Work:
    """A request as the torch thread runs it: wire bytes in, wire bytes out.

    held: positions times blocks whose activations a backward may hold (`node.model.blocks.parts`).
    most: positions times blocks of a part; None: the usual number.
    tape: a Forward keeps its graphs there, and a Backward goes back through them.
    adapter: of the request, for all its blocks.  take: gets the gradients of the adapter's values, in the
    torch thread, once the answer of a backward is encoded; None: they are not computed.
    """

    request: Forward | Backward
    contract: Contract
    held: int = 0
    most: int | None = None
    tape: Tape | None = None
    adapter: AnySpanAdapter | None = None
    take: Callable[[AdapterGradients], None] | None = None

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The blocks [start, stop) of each part, in order."""
        contract = self.contract
        first = 0 if self.adapter is None else self.adapter.virtual_tokens
        positions, run = contract.batch * (first + contract.max_length), (contract.start, contract.stop)
        if isinstance(self.request, Backward) and self.tape is not None:
            return self.tape.runs[::-1]
        if isinstance(self.request, Backward):
            return backward_parts(positions, *run, self.held, self.most)
        return forward_parts(positions, *run, self.most)

    def __call__(self, span: StatelessSpan) -> Generator[None, None, Buffer]:
        """A part at each `next`; the return value is the encoded answer.

        Raises BadResult (an input is not finite; nothing was done), NotFinite.
        """
        request, contract = self.request, self.contract
        if self.adapter is not None:
            span = self._adapted(span, self.adapter)
        if isinstance(request, Backward):
            found = yield from self._backward(span, request)
            answers = [each for each in found if each is not None]
        else:
            answers = [(yield from self._forward(span, request))]
        try:
            bodies = [encode_hidden(answer, contract.codec) for answer in answers]
        except BadResult as bad:
            what = "backward" if isinstance(request, Backward) else "forward"
            raise NotFinite(f"{what} through blocks {contract.start}:{contract.stop}: {bad}") from None
        if self.take is not None and isinstance(request, Backward) and isinstance(span, AdaptedSpan):
            self.take(span.gradients)
        return bodies[0] if len(bodies) == 1 else b"".join(bodies)

    def _adapted(self, span: StatelessSpan, adapter: AnySpanAdapter) -> AdaptedSpan:
        """The span with the adapter; of a tape's backward the one that its forward went through."""
        if self.tape is None:
            return AdaptedSpan(span, adapter, trains=self.take is not None)
        if isinstance(self.request, Backward):
            return cast(AdaptedSpan, self.tape.span)
        self.tape.span = found = AdaptedSpan(span, adapter, trains=True)
        return found

    def _forward(self, span: StatelessSpan, request: Forward) -> Generator[None, None, Tensor]:
        hidden, prompts, run = *self._given(request), (self.contract.start, self.contract.stop)
        if self.tape is not None:
            return (yield from self.tape.forward_in_parts(span, hidden, *run, prompts, self.most))
        return (yield from forward_in_parts(span, hidden, *run, prompts, self.most))

    def _backward(self, span: StatelessSpan, request: Backward) -> Generator[None, None, Gradients]:
        grad = decode_hidden(request.grad, self.contract)
        if self.tape is not None:
            return (yield from self.tape.backward_in_parts(grad))
        hidden, prompts, run = *self._given(request), (self.contract.start, self.contract.stop)
        return (yield from backward_in_parts(span, hidden, grad, *run, prompts, self.held, self.most))

    def _given(self, request: Forward | Backward) -> tuple[Tensor, Tensor | None]:
        """The hidden states and the prompts of a request.  Raises BadResult."""
        contract, own = self.contract, request.run.prompts
        hidden = decode_hidden(request.hidden, contract)
        return hidden, decode_hidden(request.prompts, prompts_contract(contract, own)) if own else None


Held = Callable[[int, float], Awaitable[int]]


async def _one_part(tokens: int, more: float) -> int:
    return 0  # the activations of one part are always held


@dataclass(slots=True)
class HeldActivations:
    """How many activations a backward may hold: by their size, measured at the first one, and by memory.

    part: bytes of one part's.  most: bytes besides.  free: bytes of memory now.  measures: each measures one
    kind of blocks, in the torch thread; steps of sessions may run between two of them.
    """

    part: int
    most: int
    free: Callable[[], int]
    compute: Runner
    measures: Callable[[], Sequence[Callable[[], Activations]]]
    _activations: Activations | None = None

    async def positions(self, tokens: int, more: float) -> int:
        """Positions times blocks whose activations may be held now.

        tokens: of a row.  more: bytes of a position in one block besides those that are measured.
        Raises OutOfMemory.
        """
        held = self.part + min(self.most, self.free())
        return int(held / (await self.of_a_position(tokens) + more))

    async def of_a_position(self, tokens: int) -> float:
        """Bytes of a position in one block.  tokens: of its row."""
        if self._activations is None:
            measures = [or_refused(measure, "a backward", MEMORY_SECONDS) for measure in self.measures()]
            kinds = [await self.compute.run(measure) for measure in measures]
            self._activations = Activations.most(kinds)
        return self._activations.of_a_position(tokens)


@dataclass(slots=True)
class ForwardBackwardListener:
    """Serves forward and backward over one span.

    admission: to the served span.  faults: of peers, counted.
    held: from the tokens of its rows, and bytes of a position for its adapter, the positions times blocks
    whose activations a backward that comes now may hold.  tapes: of this span; without memory by default.
    sums: of gradients of adapters; None: none are computed.
    """

    admission: SpanAdmission
    engine: StatelessEngine
    limits: Limits = field(default_factory=Limits)
    faults: Faults = field(default_factory=Faults)
    held: Held = _one_part
    tapes: Tapes = field(default_factory=no_tapes)
    sums: SpanSums | None = None
    _refused: NamedRates = field(init=False)  # bytes of refused requests
    _streams: dict[int, _Serving] = field(default_factory=dict)
    _by_peer: Counter[str] = field(default_factory=Counter)
    _quiet: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        limits = self.limits
        a_second, burst = limits.refused_compute_bytes_per_second, limits.refused_compute_bytes_burst
        self._refused = NamedRates(a_second, burst)

    async def serve(self, stream: PeekStream) -> None:
        """Answer request after request until the client ends the stream.  Raises PeerFault."""
        try:
            with self._admit(stream) as serving, serving.scope:
                await self._serve(stream, serving)
        except Refused as refusal:
            self.engine.meters.requests_refused[reason_of(refusal)] += 1
            await stream.send(encode_failed(Failed.of(refusal)))

    async def drain(self) -> None:
        """Take no new request, finish those in hand within `drain_seconds`, then end all streams."""
        self.admission.drain()
        for serving in self._streams.values():
            if not serving.busy:
                serving.scope.cancel()
        with trio.move_on_after(self.limits.drain_seconds):
            await self._until_quiet()
        for serving in self._streams.values():
            serving.scope.cancel()
        with trio.move_on_after(self.limits.drain_seconds):
            await self._until_quiet()

    async def finish_others(self) -> None:
        """Finish the requests in hand for blocks that are served no longer.  Bounded, as `drain`."""
        served = self.admission.spec.blocks
        others = [
            (serving, serving.done)
            for serving in self._streams.values()
            if serving.blocks and not served.contains(serving.blocks)
        ]
        with trio.move_on_after(self.limits.drain_seconds):
            for _, done in others:
                await done.wait()
        for serving, done in others:
            if not done.is_set():
                serving.scope.cancel()
        with trio.move_on_after(self.limits.drain_seconds):
            for _, done in others:
                await done.wait()
        self.tapes.budget.drop_outside(served)

    async def _until_quiet(self) -> None:
        while self._streams:
            if self._quiet.is_set():
                self._quiet = trio.Event()
            await self._quiet.wait()

    @contextmanager
    def _admit(self, stream: PeekStream) -> Iterator[_Serving]:
        """Hold a stream's place: the number of places bounds the memory of requests.  Raises Refused."""
        peer, limits = stream.peer, self.limits
        self.admission.check_open()
        if self._by_peer[peer] >= limits.part_of(
            peer, limits.max_compute_streams, limits.max_compute_streams_per_peer
        ):
            raise TooManyStreams(f"{self._by_peer[peer]} such streams of yours are open", RETRY_SECONDS)
        if sum(not each.yields for each in self._streams.values()) >= limits.max_compute_streams:
            if (last := self._last_of_most(peer, stream.prefix)) is None:
                raise TooManyStreams(f"{len(self._streams)} such streams are open here", RETRY_SECONDS)
            last.yields = True
            last.scope.cancel()
        serving = _Serving(limits.prefix_of(peer, stream.prefix))
        self._streams[id(serving)] = serving
        self._by_peer[peer] += 1
        try:
            yield serving
        finally:
            del self._streams[id(serving)]
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]
            if not self._streams:
                self._quiet.set()

    def _last_of_most(self, peer: str, prefix: str) -> _Serving | None:
        """The stream that makes room for one of this peer: of the prefix with the most, an idle one first.

        None where no other prefix has more.
        """
        has_share = self.limits.own_share(peer) is not None
        of_most = places_of_most(list(self._streams.values()), prefix, own_share=has_share)
        return min(of_most, key=lambda each: each.busy, default=None)

    async def _serve(self, stream: PeekStream, serving: _Serving) -> None:
        idle_seconds = self.limits.frame_start_seconds
        while not self.admission.draining:
            if (frame := await self._next_request(stream, idle_seconds)) is None:
                return None
            serving.busy = True
            try:
                answer = await self._answer(stream, frame, serving)
            except _Unfit as unfit:  # said before the stream closes: a reset would overtake it
                self.faults.add(stream.peer, unfit.fault)
                return await stream.send(encode_failed(Failed.of(unfit.fault)))
            if answer is None:
                return None  # the client has gone
            sending = stream.send(answer)
            del answer  # up to a frame, of which a slow client has us hold one copy
            await sending
            serving.busy = False
            idle_seconds = self.limits.compute_idle_seconds
        return None

    async def _answer(self, stream: PeekStream, frame: Buffer, serving: _Serving) -> list[Buffer] | None:
        """The parts of the frame that answers a request; None where the client left before it was there.

        Raises _Unfit; PeerFault for a frame that is no request at all.
        """
        arrived = time.perf_counter()
        asked = decode_request(frame)
        try:
            if isinstance(asked, Collect):
                return await self._collected(stream, asked)
            spec = asked.run.spec
            self.admission.admits(spec)
            request = asked.divided(self.admission.spec.hidden)
            contract = self._contract(request)
            with serving.computing(spec.blocks):
                computed, taped = await self._computed(stream, request, contract)
        except Refused as refusal:
            self.engine.meters.requests_refused[reason_of(refusal)] += 1
            self._refused.take(sharer(stream.peer, stream.prefix), trio.current_time(), len(frame))
            if isinstance(refusal, OutOfMemory):
                self.tapes.budget.drop_all()  # they hold a device's memory
            return encode_failed(Failed.of(refusal))
        except NotFinite as own:
            return encode_failed(Failed.of(own))
        except (MessageError, RemoteProtocolError, BadResult) as fault:
            raise _Unfit(fault) from None
        if computed is None:
            return None
        held = int((time.perf_counter() - arrived) * 1e6)
        return encode_output(Output(computed.body, ((held, computed.compute_micros),), taped=taped))

    async def _computed(
        self, stream: PeekStream, request: Forward | Backward, contract: Contract
    ) -> tuple[Answer | None, bool]:
        """The answer, see `_compute`, and whether a tape of it is kept.

        Raises PeerFault, Refused, NotFinite.
        """
        backward, run = isinstance(request, Backward), request.run
        using = self.admission.using(stream.peer, run.spec, trio.current_time)
        with using as adapter, self._summing(stream, run) as take:
            tokens, more = self._tokens(contract, adapter), 0.0 if adapter is None else adapter.kept_bytes
            async with self.tapes.tape_for(stream.peer, stream.prefix, request, contract, adapter) as kept:
                held = await self.held(tokens, more) if backward and kept is None else 0
                tape = None if kept is None else kept.tape
                work = Work(request, contract, held, self.engine.part_positions, tape, adapter, take)
                computed = await self._compute(stream, work, contract)
                if kept is not None:
                    kept.answered = computed is not None
        return computed, kept is not None and not backward

    def _tokens(self, contract: Contract, adapter: AnySpanAdapter | None) -> int:
        """Of a row, with the places of its prefix.  Raises Refused where there is no room for them."""
        if adapter is None or not adapter.virtual_tokens:
            return contract.max_length
        first, most = adapter.virtual_tokens, self.admission.spec.max_position
        tokens, rows = first + contract.max_length, self.limits.max_step_tokens
        if tokens > most:
            raise Refused(
                f"{contract.max_length} positions after a prefix of {first} were sent, the model has {most}"
            )
        if contract.batch * tokens > rows:
            raise Refused(
                f"{contract.batch} rows of {contract.max_length} positions after a prefix of {first} were"
                f" sent, {rows} positions are allowed with those of the prefix (--max-step-tokens)"
            )
        return tokens

    def _summing(
        self, stream: PeekStream, run: Run
    ) -> AbstractContextManager[Callable[[AdapterGradients], None] | None]:
        """Where the gradients of a request's adapter go; None where it names no sum.

        Raises Refused, PeerFault.
        """
        if run.summed is None or run.spec.adapter is None:
            return nullcontext()
        if self.sums is None:
            raise Refused("no gradients of adapters are computed here")
        return self.sums.adding(stream.peer, stream.prefix, run.summed, run.spec)

    async def _collected(self, stream: PeekStream, asked: Collect) -> list[Buffer]:
        """Send a sum, and return the last part of it.  Raises Refused, PeerFault."""
        if self.sums is None:
            raise Refused("no gradients of adapters are computed here")
        return await self.sums.collected(stream.peer, asked, stream.send)

    async def _compute(self, stream: PeekStream, work: Work, contract: Contract) -> Answer | None:
        """The computed answer; None where the client leaves before.  Raises PeerFault, Refused, NotFinite.

        Any frame that the client sends meanwhile is a fault, and ends the computing.
        """
        answer: Answer | None = None
        fault: PeerFault | Refused | None = None
        too_early = RemoteProtocolError("a request while another one is under way on this stream")

        async def watch() -> None:
            nonlocal fault
            try:
                if await stream.receive() is not None:
                    fault = too_early
            except FrameError:
                fault = too_early
            except PeerGone:
                pass
            except PeerFault as error:
                fault = error
            nursery.cancel_scope.cancel()

        stream.limit = 0  # nothing is read of a request that comes too early
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                answer = await self.engine.stateless(
                    stream.peer, contract.batch, contract.max_length, work.parts, work, prefix=stream.prefix,
                    adapter=work.adapter,
                )  # fmt: skip
            except (PeerFault, Refused) as error:
                fault = error
            nursery.cancel_scope.cancel()
        stream.limit = self.limits.max_frame_bytes
        if fault is not None:
            raise fault
        return answer

    async def _next_request(self, stream: PeekStream, idle_seconds: float) -> Buffer | None:
        """The next frame; None at the end of the stream, or after `idle_seconds` without a byte.

        One that has begun by then has the time that any frame has.  Nothing is read from a peer that has sent
        too many requests in vain: refusing costs less than receiving.  Raises PeerFault.
        """
        if seconds := self._refused.wait(sharer(stream.peer, stream.prefix), trio.current_time()):
            await trio.sleep(min(seconds, MAX_REST_SECONDS))
        with trio.move_on_after(idle_seconds):
            return await stream.receive()
        return await stream.receive() if stream.in_frame else None

    def _contract(self, request: Forward | Backward) -> Contract:
        """The request's contract.  Raises Refused, MessageError."""
        served = self.admission.spec
        contract = request_contract(request, served.hidden, self.limits.max_step_tokens)
        if contract.max_length > served.max_position:
            raise Refused(f"{contract.max_length} positions were sent, the model has {served.max_position}")
        return contract


class _Unfit(Exception):
    """A request that can be read and must not be computed: a fault, which the peer is told."""

    def __init__(self, fault: PeerFault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(slots=True)
class _Serving:
    """One stream.

    prefix: of its peer's address.  busy: whether a request is under way; blocks: of that request; done: set
    at its end.  yields: it ends for a stream of another prefix.
    """

    prefix: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    busy: bool = False
    blocks: Blocks | None = None
    done: trio.Event = field(default_factory=trio.Event)
    yields: bool = False

    @contextmanager
    def computing(self, blocks: Blocks) -> Iterator[None]:
        """Mark these blocks as in use within the context."""
        self.blocks, self.done = blocks, trio.Event()
        try:
            yield
        finally:
            self.blocks = None
            self.done.set()
