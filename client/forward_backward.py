"""Forward and backward through a run of blocks without a session: for training and for research.

A batch is cut by rows into requests, several of them under way at a time.  Each goes from hop to hop
through the client, as in Petals (arXiv:2312.08361).  The client keeps every hop's input, so a hop
that fails is replaced and its own part alone is done again.  A request changes nothing at a server and
may be repeated: the result is that of an undisturbed pass, or an error.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
import trio
from torch import Tensor

from client.chains.avoided_peers import AvoidedPeers
from client.chains.chooser import PeerStream
from node.model.checkpoint.info import ModelInfo
from node.runtime.compute_thread import Runner
from node.runtime.values import shown
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import BadResult, PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import CODEC_BYTES, Contract, codec_for
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import (
    Backward,
    Forward,
    Output,
    Run,
    decode_output,
    encode_request,
    request_contract,
)
from tensor_codec.span_spec import SpanSpec

T = TypeVar("T")
OpenStream = Callable[[PeerId], Awaitable[PeerStream]]

# Of all rows of one request, unless one row is longer: see client.generation.conversation.
REQUEST_POSITIONS = 512
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
    ) -> Awaitable[Chain]:
        """positions: of all rows.  waiting: see `cheapest_chain`.
        other_hops: hops of the whole chain for other blocks.

        Raises NoChain when none came up in time.
        """


@dataclass(frozen=True, slots=True)
class Kept:
    """A hop and its input: enough to do its part again, there or elsewhere."""

    hop: Hop
    hidden: Tensor


@dataclass(slots=True)
class Part:
    """Some rows of a call.  planned: the peers of its chain."""

    hidden: Tensor
    grad: Tensor | None
    planned: tuple[PeerId, ...] = ()

    def plan(self, peers: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
        """Take another chain; returns the peers of the one before."""
        before, self.planned = self.planned, peers
        return before


@dataclass(slots=True)
class ForwardBackward:
    """Forward and backward through a swarm, of any number of tasks at a time.

    find_chain, dtype_of (None: the peer has left), open_stream: the swarm's.  learn: takes the seconds
    of a peer for a request, divided by positions and blocks.
    codec: "auto" for each hop's own, which loses nothing; else "fp32" or "bf16".
    step_seconds: for one request at one hop.  give_up_seconds: for one hop's part, with all its
    retries and new chains.
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
    _limiters: dict[PeerId, trio.CapacityLimiter] = field(default_factory=dict)
    _idle: defaultdict[PeerId, list[PeerStream]] = field(default_factory=lambda: defaultdict(list))

    async def forward(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Blocks [start, stop) on `hidden`: see `client.swarm.Swarm.forward`."""
        return await self._in_parts(await self.compute.run(self._cut, hidden, None, start, stop), start, stop)

    async def backward(self, hidden: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
        """The gradient with respect to `hidden`: see `client.swarm.Swarm.backward`."""
        return await self._in_parts(await self.compute.run(self._cut, hidden, grad, start, stop), start, stop)

    def _cut(self, hidden: Tensor, grad: Tensor | None, start: int, stop: int) -> list[Part]:
        """Runs in the torch thread: check the tensors, and cut them into requests.  Raises ValueError."""
        if not 0 <= start < stop <= self.info.blocks:
            raise ValueError(f"blocks {start}:{stop} of a model that has 0:{self.info.blocks}")
        hidden = self._checked("hidden", hidden)
        if grad is not None:
            grad = self._checked("grad", grad)
            if grad.shape != hidden.shape:
                raise ValueError(f"grad is {list(grad.shape)} and hidden {list(hidden.shape)}")
        batch, tokens, _ = hidden.shape
        if tokens > self.info.max_position:
            raise ValueError(f"rows of {tokens} positions, the model has {self.info.max_position}")
        tensors = 1 if grad is None else 2
        # With the hops' own codec a long row may still fit at two bytes a value.
        codecs = ("fp32", "bf16") if self.codec == "auto" else (self.codec,)
        room = [self._max_positions(codec, tensors) for codec in codecs]
        max_positions = next((each for each in room if tokens <= each), None)
        if max_positions is None:
            raise ValueError(
                f"rows of {tokens} positions, {max(room)} fit into one request of {tensors} x"
                f" {self.info.hidden_size} values a position (max_step_tokens is"
                f" {self.limits.max_step_tokens}, max_frame_bytes {self.limits.max_frame_bytes})"
            )
        rows = max(1, min(max_positions, REQUEST_POSITIONS) // tokens)
        cuts = range(0, batch, rows)
        return [Part(hidden[i : i + rows], None if grad is None else grad[i : i + rows]) for i in cuts]

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in its form here: on the CPU, in float32 or bfloat16.  Raises ValueError."""
        size = self.info.hidden_size
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {shown(tensor)}, a tensor of torch is needed")
        if tensor.dim() != 3 or tensor.shape[2] != size or not tensor.numel():
            raise ValueError(f"{name} is {list(tensor.shape)}, [batch, tokens, {size}] is needed")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, a float dtype is needed")
        dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
        kept = tensor.detach().to("cpu", dtype)
        if not bool(torch.isfinite(kept).all()):
            raise ValueError(f"{name} holds NaN or infinity")
        return kept

    def _max_positions(self, codec: str, tensors: int) -> int:
        """The largest number of positions, of all rows, in one request."""
        return self.limits.step_tokens(tensors * self.info.hidden_size * CODEC_BYTES[codec])

    async def _in_parts(self, parts: Sequence[Part], start: int, stop: int) -> Tensor:
        """All parts, a few at a time: their answers as one tensor.  The first failure ends the others."""
        answers: list[Tensor | None] = [None] * len(parts)
        failure: PeerFault | Refused | NoChain | ValueError | None = None
        window = trio.Semaphore(UNDER_WAY)

        async def run(index: int) -> None:
            nonlocal failure
            part = parts[index]
            try:
                answers[index] = await self._pass(part, start, stop)
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
        return await self.compute.run(torch.cat, answers)

    async def _pass(self, part: Part, start: int, stop: int) -> Tensor:
        """One part forward through all hops; where it has a gradient, the gradient back to the first."""
        if part.grad is None:
            return (await self._onward(part, part.hidden, start, stop, to_the_end=True))[1]
        grad = part.grad
        kept, _ = await self._onward(part, part.hidden, start, stop, to_the_end=False)
        hops = len(kept)  # of the whole way
        lost = False  # the last hop of `kept`; its input is still there

        async def back() -> Tensor:
            nonlocal lost, hops
            if lost:
                hop = kept[-1].hop
                again, _ = await self._onward(
                    part, kept[-1].hidden, hop.start, hop.stop, to_the_end=False, other_hops=hops - 1
                )
                hops += len(again) - 1
                kept[-1:] = again
            lost = True
            answer = await self._ask(kept[-1].hop, kept[-1].hidden, grad)
            lost = False
            return answer

        while kept:
            grad = await self._until_done(back)
            kept.pop()
        return grad

    async def _onward(
        self, part: Part, hidden: Tensor, start: int, stop: int, *, to_the_end: bool, other_hops: int = 0
    ) -> tuple[list[Kept], Tensor]:
        """Forward from hop to hop: the input of each, and the output of the last hop that was asked.

        to_the_end: False where the last hop's answer is not needed; then it is not asked.
        other_hops: hops of the part's chain for other blocks.
        """
        kept: list[Kept] = []
        ahead: deque[Hop] = deque()

        async def hop_on() -> Tensor:
            if not ahead:
                begin = kept[-1].hop.stop if kept else start
                ahead.extend(await self._hops(part, begin, stop, other_hops + len(kept)))
            if ahead[0].stop == stop and not to_the_end:
                return hidden
            try:
                return await self._ask(ahead[0], hidden, None)
            except (PeerFault, Refused):
                ahead.clear()
                raise

        while not kept or kept[-1].hop.stop < stop:
            given, hidden = hidden, await self._until_done(hop_on)
            kept.append(Kept(ahead.popleft(), given))
        return kept, hidden

    async def _hops(self, part: Part, start: int, stop: int, other_hops: int) -> Sequence[Hop]:
        """Plan the chain of a part through these blocks.  Raises NoChain."""
        self._plan(part, ())
        positions = part.hidden.shape[0] * part.hidden.shape[1]
        chain = await self.find_chain(
            start, stop, positions=positions, waiting=self._planned, other_hops=other_hops
        )
        self._plan(part, tuple(hop.peer for hop in chain.hops))
        return chain.hops

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

    async def _ask(self, hop: Hop, hidden: Tensor, grad: Tensor | None) -> Tensor:
        """One request at one hop.  Raises ValueError (it is too large), PeerFault, Refused with `peer`."""
        peer, dtype = hop.peer, self.dtype_of(hop.peer)
        limiter = self._limiters.setdefault(peer, trio.CapacityLimiter(UNDER_WAY_PER_PEER))
        avoided = peer in self.blame.avoided(trio.current_time())
        try:
            if dtype is None:
                raise PeerGone(f"{peer} has just left the swarm")
            parts, contract = await self.compute.run(self._encode, hop, dtype, hidden, grad)
            async with limiter:
                under_way = limiter.borrowed_tokens
                output = await self._exchange(peer, parts, contract)
            answer = await self.compute.run(decode_hidden, output.body, contract)
        except (PeerFault, Refused) as error:
            error.about(peer)
            self._take_note(error, peer, avoided)
            raise
        self.blame.worked(peer)
        if grad is None and output.timings:
            held = output.timings[0][0] / 1e6 / under_way  # the hop had the others too
            self.learn(peer, held / (contract.batch * contract.max_length * (hop.stop - hop.start)))
        return answer

    def _encode(
        self, hop: Hop, dtype: str, hidden: Tensor, grad: Tensor | None
    ) -> tuple[list[Buffer], Contract]:
        """Runs in the torch thread: the parts of the request's frame.  Raises ValueError."""
        codec = codec_for(frozenset({dtype})) if self.codec == "auto" else self.codec
        spec = SpanSpec(self.info.name, self.info.revision, hop.blocks, dtype)
        run = Run(spec, hidden.shape[0], codec)
        tensors = [hidden] if grad is None else [hidden, grad]
        try:
            bodies = [encode_hidden(tensor, codec) for tensor in tensors]
        except BadResult:  # it was finite as it came
            raise ValueError(f"hidden states or gradients are too large for {codec}") from None
        request = Forward(run, *bodies) if grad is None else Backward(run, *bodies)
        fitting, positions = self._max_positions(codec, len(tensors)), hidden.shape[0] * hidden.shape[1]
        if positions > fitting:
            raise ValueError(f"{positions} positions for a {dtype} hop, {fitting} fit into one request")
        contract = request_contract(request, self.info.hidden_size, self.limits.max_step_tokens)
        return encode_request(request), contract

    def _take_note(self, error: PeerFault | Refused, peer: PeerId, avoided: bool) -> None:
        """Avoid a peer that failed.  avoided: it was avoided already when it was asked."""
        now = trio.current_time()
        if isinstance(error, Refused):
            self.blame.refused(peer, error.retry_after_seconds, now)
        elif avoided or peer not in self.blame.avoided(now):  # else: one fault of several requests
            self.blame.fault(peer, now)

    async def _exchange(self, peer: PeerId, parts: list[Buffer], contract: Contract) -> Output:
        """Send a request and take the answer, on a stream that is open if there is one.

        Raises PeerFault, Refused.
        """
        message = None
        if self._idle[peer]:
            with suppress(PeerGone):  # closed as idle; a second request does no harm
                message = await self._question(self._idle[peer].pop(), parts, contract)
        if message is None:
            message = await self._question(await self.open_stream(peer), parts, contract)
        if isinstance(message, Failed):
            raise message.error()
        return message

    async def _question(self, stream: PeerStream, parts: list[Buffer], contract: Contract) -> Output | Failed:
        """Send a request and return its answer.  Raises SlowPeer, PeerGone, FrameError, MessageError.

        The stream is kept for the next request, or reset.  Reading begins with the sending: a peer
        that refuses does not wait for the whole frame.
        """
        size = sum(len(part) for part in parts)
        seconds = self.step_seconds + 2 * size / self.limits.frame_floor_bytes_per_second
        frame: Buffer | None = None
        fault: PeerFault | None = None
        sent = kept = False

        async def send() -> None:
            nonlocal fault, sent
            try:
                await stream.send(parts)
                sent = True
            except PeerFault as error:
                fault = error  # an answer that came in before can still be read

        async def receive() -> None:
            nonlocal frame, fault
            try:
                frame = await stream.receive()
            except PeerFault as error:
                fault = fault or error
            nursery.cancel_scope.cancel()

        try:
            with trio.move_on_after(seconds) as limit:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    nursery.start_soon(receive)
            if frame is None and limit.cancelled_caught:
                raise SlowPeer(f"no answer within {seconds:.3g} s")
            if frame is None:
                raise fault or PeerGone("the stream was closed instead of an answer")
            message = decode_output(frame, contract)
            kept = sent
        finally:
            if not kept:
                await stream.reset()
        if kept:
            self._idle[PeerId(stream.peer)].append(stream)
        return message
