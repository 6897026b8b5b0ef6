"""Forward and backward through a run of blocks without a session: for training and for research.

A batch is cut by rows into requests (`client.batch_parts`), several of them under way at a time.  Each goes
from hop to hop through the client, as in Petals (arXiv:2312.08361).  The client keeps every hop's input, so a
hop that fails is replaced and its own part alone is done again.  A request changes nothing at a server and
may be repeated: the result is that of an undisturbed pass, or an error.

A backward needs the input of every hop.  `forward_kept` hands them out, and a `backward` of these asks for no
forward again.  Hops are asked to keep the graph of a forward that a backward follows, its tape: the backward
then sends them the gradient alone, and they compute nothing again.  A hop that has lost the tape gets the
input, which is here in any case.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
import trio
from torch import Tensor

from client.adapters.sums import CallSums, HopSum
from client.adapters.upload import AdapterUse, Needs
from client.batch_parts import (
    LEAST_POSITIONS,
    BatchCutter,
    HopInput,
    KeptInputs,
    KeptPart,
    Part,
    positions_of_a_request,
)
from client.chains.avoided_peers import AvoidedPeers
from client.chains.chooser import PeerStream
from client.request_streams import Asked, RequestStreams
from node.model.checkpoint.info import ModelInfo
from node.runtime.compute_thread import Runner
from routing.blocks import Blocks
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import BadResult, NoAdapter, NoTape, PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import WHOLE_CODECS, codec_for
from tensor_codec.messages.forward_backward import (
    TAPE_ID_BYTES,
    Backward,
    Forward,
    Output,
    Run,
    encode_request,
    prompts_contract,
    request_contract,
)
from tensor_codec.messages.gradients import Collect, Summed
from tensor_codec.span_spec import SpanSpec

T = TypeVar("T")
OpenStream = Callable[[PeerId], Awaitable[PeerStream]]

UNDER_WAY = 8  # requests of one call, at all peers together
UNDER_WAY_PER_PEER = 3  # one comes, one is computed, one goes back; within max_compute_streams_per_peer


class FindChain(Protocol):
    """Finds the hops of a request: the chain with the highest throughput known now."""

    def __call__(
        self,
        start: int,
        stop: int,
        *,
        positions: int,
        waiting: Mapping[PeerId, int],
        other_hops: int,
        needs: Needs,
    ) -> Awaitable[Chain]:
        """positions: of all rows.  waiting: see `cheapest_chain`.
        other_hops: hops of the whole chain for other blocks.  needs: that each hop must meet.

        Raises NoChain when none came up in time.
        """


class Gradients(NamedTuple):
    """The answer of a backward.  prompts: None where there are none.

    adapter: for each block with sites the gradient of the values of its blob, in their order, float32 and
    flat: the sum over all rows; None where the client has brought no adapter.
    """

    hidden: Tensor
    prompts: Tensor | None
    adapter: Mapping[int, Tensor] | None = None


class _Question(NamedTuple):
    """What a hop is asked for: the output for `hidden`, or, with `grad`, the gradient.

    tape: a forward's is to be kept under this id; a backward goes back through it, without `hidden`.
    """

    hop: Hop
    hidden: Tensor
    grad: Tensor | None = None
    tape: bytes = b""


class _Answer(NamedTuple):
    """prompts: the gradient of the prompts, where there is one.  tape: the id of a tape that is kept."""

    tensor: Tensor
    prompts: Tensor | None
    tape: bytes


@dataclass(slots=True)
class ForwardBackward:
    """Forward and backward through a swarm, of any number of tasks at a time.

    find_chain, dtype_of (None: the peer has left), open_stream: the swarm's.  learn: takes the seconds
    of a peer for a request, divided by positions and blocks.
    codec: "fp32" or "bf16"; else each hop's own, which loses nothing: gradients never travel in int8o.
    step_seconds: a request at one hop may take REQUEST_STEPS times as long.  give_up_seconds: for one
    hop's part, with all its retries and new chains.
    """

    info: ModelInfo
    find_chain: FindChain
    learn: Callable[[PeerId, float], None]
    dtype_of: Callable[[PeerId], str | None]
    open_stream: OpenStream
    compute: Runner
    blame: AvoidedPeers
    limits: Limits = field(default_factory=Limits)
    codec: str = "auto"
    step_seconds: float = 30.0
    give_up_seconds: float = 120.0
    _planned: Counter[PeerId] = field(default_factory=Counter)  # parts under way whose chain has the peer
    _limiters: defaultdict[PeerId, trio.CapacityLimiter] = field(
        default_factory=lambda: defaultdict(partial(trio.CapacityLimiter, UNDER_WAY_PER_PEER))
    )
    _streams: RequestStreams = field(init=False)
    _cutter: BatchCutter = field(init=False)

    def __post_init__(self) -> None:
        self._cutter = BatchCutter(self.info, self.limits, self.codec)
        self._streams = RequestStreams(self.open_stream, self.limits, self.step_seconds)

    async def forward(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        prompts: Tensor | None = None,
        adapter: AdapterUse | None = None,
    ) -> Tensor:
        """Blocks [start, stop) on `hidden`: see `client.swarm.Swarm.forward`."""
        parts = await self._cut(hidden, Blocks(start, stop), adapter, prompts=prompts)
        done = await self._each(parts, partial(self._forward_part, tapes=False))
        return await self.compute.run(torch.cat, [output for _, output in done])

    async def forward_kept(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        prompts: Tensor | None = None,
        adapter: AdapterUse | None = None,
    ) -> tuple[Tensor, KeptInputs]:
        """`forward`, and the inputs of all hops: see `client.swarm.Swarm.forward_kept`."""
        parts = await self._cut(hidden, Blocks(start, stop), adapter, prompts=prompts, tensors=2)
        done = await self._each(parts, partial(self._forward_part, tapes=True))
        output = await self.compute.run(torch.cat, [output for _, output in done])
        kept = tuple(KeptPart(part, tuple(inputs)) for part, (inputs, _) in zip(parts, done, strict=True))
        return output, KeptInputs(start, stop, tuple(output.shape), kept, adapter)

    async def backward(
        self,
        hidden: Tensor,
        grad: Tensor,
        start: int,
        stop: int,
        prompts: Tensor | None = None,
        adapter: AdapterUse | None = None,
    ) -> Gradients:
        """The gradient with respect to `hidden`: see `client.swarm.Swarm.backward`."""
        run = Blocks(start, stop)
        parts = await self._cut(hidden, run, adapter, grad=grad, prompts=prompts, tensors=2)
        sums = _sums_for(parts, adapter)
        done = await self._each(parts, self._forward_and_back)
        found = await self.compute.run(_joined, [found for _, found in done])
        return found._replace(adapter=await self._collect(sums))

    async def backward_kept(self, kept: KeptInputs, grad: Tensor) -> Gradients:
        """The gradient with respect to the input of a `forward_kept`: see `client.swarm.Swarm.backward`."""
        parts = kept.parts()
        grad = await self.compute.run(self._cutter.gradient, grad, kept.shape)
        rows = torch.split(grad, [len(each.part.hidden) for each in parts])
        again = [each.again(some) for each, some in zip(parts, rows, strict=True)]
        sums = _sums_for(again, kept.adapter)
        inputs = {id(part): each.inputs for part, each in zip(again, parts, strict=True)}

        async def back(part: Part) -> tuple[list[HopInput], Gradients]:
            self._plan(part, tuple(each.hop.peer for each in inputs[id(part)]))
            return await self._back(part, inputs[id(part)])

        done = await self._each(again, back)
        kept.follow([hops for hops, _ in done])
        found = await self.compute.run(_joined, [found for _, found in done])
        return found._replace(adapter=await self._collect(sums))

    async def _cut(
        self,
        hidden: Tensor,
        run: Blocks,
        adapter: AdapterUse | None,
        *,
        grad: Tensor | None = None,
        prompts: Tensor | None = None,
        tensors: int = 1,
    ) -> list[Part]:
        """The parts of a call, checked in the torch thread.  Raises ValueError, NoChain.

        The chain that the first one would take says whether small parts pay.
        """
        first = 0 if adapter is None else adapter.virtual_tokens
        cut = partial(self._cutter.cut, grad=grad, prompts=prompts, tensors=tensors, first=first)
        whole: list[Part] = await self.compute.run(cut, hidden, *run)
        parts = [replace(part, adapter=adapter) for part in whole]
        positions = sum(part.positions for part in parts)
        if positions <= LEAST_POSITIONS:
            return parts
        chain = await self._chain(parts[0], *run, 0)
        size = positions_of_a_request(positions, len(chain.hops))
        return [each for part in parts for each in part.divided(size)]

    async def _each(self, parts: Sequence[Part], do: Callable[[Part], Awaitable[T]]) -> list[T]:
        """`do` all parts, a few at a time: their answers, in order.  The first failure ends the others."""
        answers: dict[int, T] = {}
        failure: PeerFault | Refused | NoChain | ValueError | None = None
        window = trio.Semaphore(UNDER_WAY)

        async def run(index: int) -> None:
            nonlocal failure
            part = parts[index]
            try:
                answers[index] = await do(part)
            except (PeerFault, Refused, NoChain, ValueError) as error:
                failure = failure or error
                nursery.cancel_scope.cancel()
            finally:
                self._plan(part, ())
                window.release()

        async with trio.open_nursery() as nursery:
            for index in range(len(parts)):
                await window.acquire()
                nursery.start_soon(run, index)
        if failure is not None:
            raise failure
        return [answers[index] for index in range(len(parts))]

    async def _forward_part(self, part: Part, *, tapes: bool) -> tuple[list[HopInput], Tensor]:
        run = Blocks(part.start, part.stop)
        return await self._onward(part, part.hidden, run, to_the_end=True, tapes=tapes)

    async def _forward_and_back(self, part: Part) -> tuple[list[HopInput], Gradients]:
        hops, _ = await self._onward(part, part.hidden, Blocks(part.start, part.stop), to_the_end=False)
        return await self._back(part, hops)

    async def _collect(self, sums: CallSums | None) -> Mapping[int, Tensor] | None:
        """The gradients of a call's adapter, by blocks.  Sums that are lost are computed again.

        Raises the errors of a backward.
        """
        if sums is None:
            return None
        deadline = trio.current_time() + self.give_up_seconds
        while wanted := sums.to_collect():
            lost: list[HopSum] = []
            failures: list[PeerFault | Refused] = []
            async with trio.open_nursery() as nursery:
                for own, dtype in wanted:
                    limiter = self._limiters[own.hop.peer]
                    nursery.start_soon(_collect_one, self._streams, limiter, sums, own, dtype, lost, failures)
            for error in failures:
                if isinstance(error, PeerFault) and error.peer is not None:
                    self._take_note(error, PeerId(error.peer), avoided=False)
            if lost and trio.current_time() >= deadline:
                peers = ", ".join(sorted(own.hop.peer for own in lost))
                raise PeerGone(f"the gradients of an adapter could not be collected from {peers}")
            await self._each([part for own in lost for part in sums.again(own)], self._forward_and_back)
        return await self.compute.run(sums.total)

    async def _back(self, part: Part, inputs: Sequence[HopInput]) -> tuple[list[HopInput], Gradients]:
        """The gradient of a part through hops with these inputs, the last one first; and these hops.

        A hop that fails is replaced for its own blocks, from its input: the hops that were asked in the end
        are answered too.
        """
        assert part.grad is not None
        hops, grad = list(inputs), part.grad
        at = len(hops) - 1  # the hop that is asked now
        lost = False  # that hop; its input is still there

        async def back() -> _Answer:
            nonlocal lost, at
            if lost:
                hop, hidden = hops[at].hop, hops[at].hidden
                again, _ = await self._onward(
                    part, hidden, hop.blocks, to_the_end=False, other_hops=len(hops) - 1
                )
                hops[at : at + 1] = again
                at += len(again) - 1
            lost = True
            given = hops[at]
            hops[at] = HopInput(given.hop, given.hidden)  # a tape is good for one backward
            answer = await self._ask(part, _Question(given.hop, given.hidden, grad, given.tape))
            lost = False
            return answer

        found: list[Tensor] = []
        while at >= 0:
            grad, own, _ = await self._until_done(back)
            found[:0] = [] if own is None else [own]
            at -= 1
        return hops, Gradients(grad, await self.compute.run(torch.cat, found) if found else None)

    async def _onward(
        self,
        part: Part,
        hidden: Tensor,
        run: Blocks,
        *,
        to_the_end: bool,
        other_hops: int = 0,
        tapes: bool = True,
    ) -> tuple[list[HopInput], Tensor]:
        """Forward from hop to hop: the input of each, and the output of the last hop that was asked.

        to_the_end: False where the last hop's answer is not needed; then it is not asked.
        other_hops: hops of the part's chain for other blocks.  tapes: a backward follows.
        """
        inputs: list[HopInput] = []
        ahead: deque[Hop] = deque()

        async def hop_on() -> _Answer:
            if not ahead:
                begin = inputs[-1].hop.stop if inputs else run.start
                ahead.extend(await self._hops(part, begin, run.stop, other_hops + len(inputs)))
            if ahead[0].stop == run.stop and not to_the_end:
                return _Answer(hidden, None, b"")
            try:
                tape = os.urandom(TAPE_ID_BYTES) if tapes else b""
                return await self._ask(part, _Question(ahead[0], hidden, tape=tape))
            except (PeerFault, Refused):
                ahead.clear()
                raise

        while not inputs or inputs[-1].hop.stop < run.stop:
            given, (hidden, _, tape) = hidden, await self._until_done(hop_on)
            inputs.append(HopInput(ahead.popleft(), given, tape))
        return inputs, hidden

    async def _hops(self, part: Part, start: int, stop: int, other_hops: int) -> list[Hop]:
        """Plan the chain of a part through these blocks.  Raises NoChain."""
        self._plan(part, ())
        chain = await self._chain(part, start, stop, other_hops)
        self._plan(part, tuple(hop.peer for hop in chain.hops))
        codecs = {hop.peer: _codec(self.codec, self.dtype_of(hop.peer)) for hop in chain.hops}
        return [piece for hop in chain.hops for piece in self._cutter.pieces(hop, part, codecs[hop.peer])]

    async def _chain(self, part: Part, start: int, stop: int, other_hops: int) -> Chain:
        return await self.find_chain(
            start,
            stop,
            positions=part.positions,
            waiting=self._planned,
            other_hops=other_hops,
            needs=Needs(part.prompts is not None, part.adapter),
        )

    def _plan(self, part: Part, peers: tuple[PeerId, ...]) -> None:
        self._planned.subtract(part.plan(peers))
        self._planned.update(peers)

    async def _until_done(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat `attempt` for up to give_up_seconds.  Raises PeerFault, Refused, NoChain."""
        deadline = trio.current_time() + self.give_up_seconds
        failure: PeerFault | Refused | None = None
        while failure is None or trio.current_time() < deadline:
            try:
                with trio.fail_at(deadline):
                    return await attempt()
            except (PeerFault, Refused) as error:
                failure = error
            except NoChain as error:
                raise (failure or error) from error
            except trio.TooSlowError:
                break
        raise failure or SlowPeer(f"no answer within {self.give_up_seconds} s")

    async def _ask(self, part: Part, question: _Question) -> _Answer:
        """One request at one hop, and others where it has lost the tape or the adapter.

        Raises ValueError (it is too large), PeerFault, Refused with `peer`.
        """
        brought = False
        while True:
            try:
                return await self._ask_once(part, question)
            except NoTape:
                question = question._replace(tape=b"")
            except NoAdapter:  # it had the adapter, as far as was known here
                peer = question.hop.peer
                if brought or part.adapter is None or not part.adapter.forget(peer):
                    self.blame.refused(peer, None, trio.current_time())
                    raise
                brought = True

    async def _ask_once(self, part: Part, question: _Question) -> _Answer:
        """See `_ask`.  Raises NoTape and NoAdapter too, which are no reason to avoid the peer."""
        hop, peer = question.hop, question.hop.peer
        limiter = self._limiters[peer]
        avoided = peer in self.blame.avoided(trio.current_time())
        try:
            if (dtype := self.dtype_of(peer)) is None:
                raise PeerGone(f"{peer} has just left the swarm")
            if part.adapter is not None:
                await part.adapter.bring(
                    peer, SpanSpec(self.info.name, self.info.revision, hop.blocks, dtype)
                )
            summed = None
            if question.grad is not None and part.sums is not None:
                summed = part.sums.at(hop, part.number)
            asked = await self.compute.run(self._encode, question, dtype, part, summed)
            async with limiter:
                under_way = limiter.borrowed_tokens
                output = await self._streams.ask(peer, asked)
            answer, own = await self.compute.run(_decode, output, asked)
        except (PeerFault, Refused) as error:
            error.about(peer)
            if not isinstance(error, NoTape | NoAdapter):
                self._take_note(error, peer, avoided)
            raise
        self.blame.worked(peer)
        if question.grad is not None and part.sums is not None:
            part.sums.confirmed(hop, part, question.hidden, question.grad)
        if question.grad is None and output.timings:
            held = output.timings[0][0] / 1e6 / under_way  # the hop had the others too
            self.learn(peer, held / (part.positions * (hop.stop - hop.start)))
        return _Answer(answer, own, question.tape if output.taped and question.grad is None else b"")

    def _encode(self, question: _Question, dtype: str, part: Part, summed: Summed | None) -> Asked:
        """Runs in the torch thread: the request.  Raises ValueError."""
        hop, hidden, grad, tape = question
        prompts = part.prompts_of(hop)
        codec = _codec(self.codec, dtype)
        adapter = None if part.adapter is None else part.adapter.name
        spec = SpanSpec(self.info.name, self.info.revision, hop.blocks, dtype, adapter)
        own = 0 if prompts is None else prompts.shape[1]
        run = Run(spec, hidden.shape[0], codec, own, tape, summed)
        of_tape = grad is not None and tape != b""
        try:
            body: Buffer = b"" if of_tape else encode_hidden(hidden, codec)
            trained: Buffer = b"" if prompts is None or of_tape else encode_hidden(prompts, codec)
            gradient = None if grad is None else encode_hidden(grad, codec)
        except BadResult:  # it was finite as it came
            raise ValueError(f"hidden states, gradients or prompts are too large for {codec}") from None
        fitting = self._cutter.max_positions(codec, 1 if grad is None else 2, own * hop.blocks.size)
        if (positions := hidden.shape[0] * hidden.shape[1]) > fitting:
            raise ValueError(f"{positions} positions for a {dtype} hop, {fitting} fit into one request")
        request: Forward | Backward = Forward(run, body, trained)
        if gradient is not None:
            request = Backward(run, body, gradient, trained)
        contract = request_contract(request, self.info.hidden_size, self.limits.max_step_tokens)
        return Asked(encode_request(request), contract, 0 if grad is None else own)

    def _take_note(self, error: PeerFault | Refused, peer: PeerId, avoided: bool) -> None:
        """Avoid a peer that failed.  avoided: it was avoided already when it was asked."""
        now = trio.current_time()
        if isinstance(error, Refused):
            self.blame.refused(peer, error.retry_after_seconds, now)
        elif avoided or peer not in self.blame.avoided(now):  # else: one fault of several requests
            self.blame.fault(peer, now)


def _codec(chosen: str, dtype: str | None) -> str:
    """The codec of requests to a hop.  dtype: of its computing; None: unknown."""
    return chosen if chosen in WHOLE_CODECS else codec_for(frozenset({dtype or ""}))


async def _collect_one(
    streams: RequestStreams,
    limiter: trio.CapacityLimiter,
    sums: CallSums,
    own: HopSum,
    dtype: str,
    lost: list[HopSum],
    failures: list[PeerFault | Refused],
) -> None:
    """Take the sum of a hop; where it cannot be had it joins `lost`."""
    peer = own.hop.peer
    try:
        size = sums.bytes_of(own.hop, dtype)
        async with limiter:
            numbers, data = await streams.collect(peer, Collect(own.name, dtype), size)
    except (PeerFault, Refused) as error:
        error.about(peer)
        failures.append(error)
        lost.append(own)
        return
    if not sums.take(own, dtype, numbers, data):
        lost.append(own)


def _sums_for(parts: Sequence[Part], adapter: AdapterUse | None) -> CallSums | None:
    """Number the parts of a backward, and have their gradients of the adapter summed; None without any."""
    if adapter is None or adapter.content is None:
        return None
    sums = CallSums(adapter.content)
    for number, part in enumerate(parts):
        part.begin_sums(sums, number)
    return sums


def _decode(output: Output, asked: Asked) -> tuple[Tensor, Tensor | None]:
    """Runs in the torch thread: the tensors of an answer.  Raises BadResult."""
    answer = decode_hidden(output.body, asked.contract)
    if not asked.prompts:
        return answer, None
    return answer, decode_hidden(output.prompts, prompts_contract(asked.contract, asked.prompts))


def _joined(found: Sequence[Gradients]) -> Gradients:
    """Runs in the torch thread: the gradients of a batch.  Those of prompts are sums, in float32."""
    hidden = torch.cat([each.hidden for each in found])
    sums = [each.prompts.float() for each in found if each.prompts is not None]
    return Gradients(hidden, torch.stack(sums).sum(0) if sums else None)
