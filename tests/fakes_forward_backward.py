"""Servers in memory that answer forward and backward with whole numbers, and a client of theirs.

A block's answer depends on its number, on every position before and, by an absolute value, on the
side of a threshold where its input lies: a right gradient proves that each block ran on its own input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import trio
from torch import Tensor

from client.adapters.upload import Needs
from client.chains.avoided_peers import AvoidedPeers
from client.forward_backward import ForwardBackward
from node.model.blocks.forward_backward import finish
from node.monitor.metrics.meters import ServingMeters
from node.serving.executor.engine import Answer
from node.serving.forward_backward import ForwardBackwardListener, PeekStream
from node.serving.span_admission import SpanAdmission
from node.serving.training.tapes import TapeBudget, Tapes
from routing.chains.measured import Measured
from routing.chains.search import Chain, CostInputs, NoChain, cheapest_chain
from routing.names import PeerId
from routing.view.records import Record
from tensor_codec.blocks import Blocks
from tensor_codec.errors import PeerFault, PeerGone, TooManyStreams
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL
from tensor_codec.span_spec import SpanSpec
from tests.fakes_serving import CLIENT, HIDDEN, FakeCompute, FakeStream, stream_pair, until

BLOCKS = 6
PRIME = 61  # values and gradients stay so small that float32 holds them exactly


def blocks_on(hidden: Tensor, start: int, stop: int) -> Tensor:
    """The outputs of blocks [start, stop) for hidden states [batch, tokens, hidden]."""
    for block in range(start, stop):
        before = hidden.cumsum(1) - hidden
        hidden = (torch.remainder(3 * hidden + block + before, PRIME) - PRIME // 2).abs()
    return hidden


def gradient_of(hidden: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
    """The gradient with respect to `hidden`, by autograd through all blocks at once."""
    given = hidden.detach().clone().requires_grad_()
    return torch.autograd.grad(blocks_on(given, start, stop), given, grad)[0]


def prompted(hidden: Tensor, prompts: Tensor, start: int, stop: int) -> Tensor:
    """The outputs of blocks [start, stop) with deep prompts, [stop - start, n, hidden]."""
    for block, prompt in zip(range(start, stop), prompts, strict=True):
        rest = torch.zeros(hidden.shape[1] - len(prompt), hidden.shape[2])
        hidden = blocks_on(hidden + torch.cat([prompt, rest]), block, block + 1)
    return hidden


def prompted_gradients(
    hidden: Tensor, grad: Tensor, prompts: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to `hidden` and to `prompts`, by autograd through all blocks at once."""
    given, trained = hidden.clone().requires_grad_(), prompts.clone().requires_grad_()
    of_hidden, of_prompts = torch.autograd.grad(prompted(given, trained, start, stop), [given, trained], grad)
    return of_hidden, of_prompts


def whole_numbers(*shape: int, seed: int = 0, most: int = PRIME) -> Tensor:
    """Hidden states, or gradients where `most` is small."""
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed)).float()


class ToySpan:
    """The part of a Span that `node.model.blocks.forward_backward` uses.

    done: every pass, as (rows, start, stop, with gradient).  poison: from the right answer
    to the given one.
    """

    device = torch.device("cpu")

    def __init__(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> None:
        self.start = start
        self.stop = stop
        self.dtype = dtype
        self.done: list[tuple[int, int, int, bool]] = []
        self.poison: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def _view(self, start: int, stop: int) -> tuple[Callable[..., SimpleNamespace], SimpleNamespace]:
        entry = SimpleNamespace(given=None)

        def model(*, inputs_embeds: Tensor, position_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            given = entry.given
            assert given is inputs_embeds
            assert not use_cache
            assert position_ids.tolist() == [list(range(given.shape[1]))]
            self.done.append((given.shape[0], start, stop, given.requires_grad))
            return SimpleNamespace(last_hidden_state=self.poison(blocks_on(given, start, stop)))

        assert self.start <= start < stop <= self.stop
        return model, entry


async def activations(tokens: int) -> float:
    """Bytes that a tape keeps of a position in one block."""
    return 100.0


@dataclass
class ToyEngine:
    """Runs requests one after the other, with a queue of so many.  asked: rows and tokens of each."""

    span: ToySpan
    compute: FakeCompute
    most: int = 16
    waiting: int = 0
    most_waiting: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    part_positions: int | None = None
    meters: ServingMeters = field(default_factory=ServingMeters)

    async def stateless(
        self,
        peer: str,
        rows: int,
        tokens: int,
        parts: Sequence[tuple[int, int]],
        work: Callable[[ToySpan], Generator[None, None, Buffer]],
        *,
        prefix: str = "",
        adapter: object = None,
    ) -> Answer:
        """As `node.serving.forward_backward.StatelessEngine` says."""
        if self.waiting >= self.most:
            raise TooManyStreams(f"{self.waiting} stateless requests wait", 1.0)
        self.asked.append((rows, tokens))
        self.waiting += 1
        self.most_waiting = max(self.waiting, self.most_waiting)
        try:
            body = await self.compute.run(finish, work(self.span))
        finally:
            self.waiting -= 1
        return Answer(body, int(self.compute.seconds * 1e6))


@dataclass
class ToyNode:
    """A serving node."""

    peer: PeerId
    span: ToySpan
    engine: ToyEngine
    listener: ForwardBackwardListener
    record: Record
    alive: bool = True
    streams: list[FakeStream] = field(default_factory=list)
    handlers: list[trio.CancelScope] = field(default_factory=list)

    @property
    def faults(self) -> Counter[str]:
        """The peers that this node has blamed, each with its fault."""
        counts = self.listener.faults.counts()
        return Counter({f"{peer} {kind}": count for (peer, kind), count in counts.items()})


class HandledStream(PeekStream, Protocol):
    """The part of a stream that a host needs: a FakeStream, or a FramedStream."""

    async def aclose(self) -> None:
        """End our side cleanly."""

    async def reset(self) -> None:
        """End both sides at once."""


class ToySwarm:
    """Nodes that a client reaches by name, over streams in memory."""

    def __init__(self, nursery: trio.Nursery, limits: Limits | None = None) -> None:
        self.nursery = nursery
        self.limits = limits or Limits()
        self.nodes: dict[str, ToyNode] = {}
        self.blame = AvoidedPeers()
        self.measured = Measured()
        self.most_hops: int | None = None
        self.dialled: list[str] = []
        self.client_streams: list[FakeStream] = []

    def add(
        self,
        name: str,
        start: int = 0,
        stop: int = BLOCKS,
        *,
        seconds: float = 0.0,
        dtype: str = "float32",
        tape_bytes: int = 0,
    ) -> ToyNode:
        """A node that serves blocks [start, stop); `seconds` for each request.

        tape_bytes: of all tapes; a position in a block takes 100.
        """
        peer = PeerId(name)
        span = ToySpan(start, stop, getattr(torch, dtype))
        engine = ToyEngine(span, FakeCompute(seconds))
        spec = SpanSpec("m", "r", Blocks(start, stop), dtype, hidden=HIDDEN, max_position=512)
        served = SpanAdmission(spec)
        record = Record(
            peer=peer, role="serve", state="online", model="m", revision="r", blocks=BLOCKS, start=start,
            stop=stop, dtype=dtype, seconds_per_block=1.0, prefill_seconds_per_token=0.01,
            prompts=True,
        )  # fmt: skip
        tapes = Tapes(TapeBudget(tape_bytes, self.limits.tape_idle_seconds), activations, lambda: tape_bytes)
        if tape_bytes:
            self.nursery.start_soon(tapes.run)
        listener = ForwardBackwardListener(served, engine, self.limits, tapes=tapes)
        node = ToyNode(peer, span, engine, listener, record)
        self.nodes[name] = node
        return node

    def client(self, **changes: Any) -> ForwardBackward:
        """A client of this swarm.  changes: of its fields, by name."""
        asked: dict[str, Any] = {
            "info": SimpleNamespace(
                name="m", revision="r", blocks=BLOCKS, hidden_size=HIDDEN, max_position=512
            ),
            "find_chain": self.find_chain,
            "learn": self.learn,
            "dtype_of": lambda peer: self.nodes[peer].record.dtype if peer in self.nodes else None,
            "open_stream": lambda peer: self.dial(peer),
            "compute": FakeCompute(),
            "blame": self.blame,
            "limits": self.limits,
        }
        return ForwardBackward(**(asked | changes))

    async def find_chain(
        self,
        start: int,
        stop: int,
        *,
        positions: int,
        waiting: Mapping[PeerId, int],
        other_hops: int,
        needs: Needs,
    ) -> Chain:
        """As `find_run` of `client.chains.chain_choice`: peers that failed lately only as a last resort."""
        spans = [node.record for node in self.nodes.values() if node.record.prompts or not needs.prompts]
        measured = self.measured.rates(spans, trio.current_time(), positions)
        known = CostInputs(measured=measured, waiting=waiting, positions=positions)
        most_hops = None if self.most_hops is None else self.most_hops - other_hops
        await trio.lowlevel.checkpoint()
        for excluded in (self.blame.avoided(trio.current_time()), frozenset[PeerId]()):
            try:
                return cheapest_chain(
                    spans,
                    BLOCKS,
                    part=Blocks(start, stop),
                    known=known,
                    excluded=excluded,
                    most_hops=most_hops,
                )
            except NoChain:
                if not excluded:
                    raise
                await trio.sleep(0.5)
        raise AssertionError("unreachable")

    def learn(self, peer: PeerId, seconds: float) -> None:
        """As `ChainChooser.learn_of_many`."""
        record = self.nodes[peer].record
        self.measured.learn(peer, seconds, record, trio.current_time(), prefill=True)

    async def dial(self, to: str, name: str = CLIENT, *, prefix: str = "") -> FakeStream:
        """Open a stream.  Raises PeerGone."""
        await trio.lowlevel.checkpoint()
        self.dialled.append(to)
        node = self.nodes[to]
        if not node.alive:
            raise PeerGone(f"{to} cannot be reached")
        ours, theirs = stream_pair(PeerId(name), node.peer, COMPUTE_PROTOCOL, self.limits)
        theirs.prefix = prefix
        node.streams.append(theirs)
        self.client_streams.append(ours)
        self.nursery.start_soon(self._handle, node, theirs)
        return ours

    async def _handle(self, node: ToyNode, stream: HandledStream) -> None:
        scope = trio.CancelScope()
        node.handlers.append(scope)
        try:
            with scope:
                await node.listener.serve(stream)
                await stream.aclose()
        except PeerFault as fault:
            node.listener.faults.add(stream.peer, fault)
            await stream.reset()
        finally:
            node.handlers.remove(scope)

    async def kill(self, name: str) -> None:
        """The process is gone: all its streams are reset, nothing is said."""
        node = self.nodes[name]
        node.alive = False
        for stream in node.streams:
            if not stream.closed:
                await stream.reset()
        for scope in list(node.handlers):
            scope.cancel()

    def assert_idle(self) -> None:
        """Nothing lingers at any node that lives: no stream, handler or waiting request."""
        for node in self.nodes.values():
            if node.alive:
                assert node.handlers == []
                assert node.engine.waiting == 0
                assert len(node.listener._streams) == 0
                assert node.listener._by_peer == {}


@asynccontextmanager
async def toy_swarm(limits: Limits | None = None, **changes: Any) -> AsyncIterator[ToySwarm]:
    """A swarm that is gone with the block.  When all streams have been idle, nothing is left in it."""
    limits = replace(limits or Limits(), **changes)
    async with trio.open_nursery() as nursery:
        swarm = ToySwarm(nursery, limits)
        yield swarm
        with trio.move_on_after(limits.compute_idle_seconds + 5):
            await until(lambda: not any(node.handlers for node in swarm.nodes.values() if node.alive))
        swarm.assert_idle()
        nursery.cancel_scope.cancel()
