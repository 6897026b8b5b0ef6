"""A swarm in memory: hops that compute with small integers, streams that are queues, and clients.

The blocks' answers depend on every block's number and on every position before, so a right answer
proves which blocks ran, once, in order, and over which cache.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
import trio
from numpy.typing import NDArray
from torch import Tensor

from client.chains.chain_choice import ChainChooser
from client.chains.chain_wait import ViewChanges
from client.chains.chooser import SwarmAccess
from client.generation.conversation import Conversation
from client.generation.head_batches import HeadBatches
from client.session.session import Session, open_session
from client.session.terms import Terms
from client.session.trace import Trace
from node.model.adapters.low_rank import SpanAdapter
from node.model.blocks.kv_pages import Prefix
from node.model.blocks.rope import LengthRope
from node.serving.adapters.desk import AdapterDesk
from node.serving.adapters.listener import AdapterListener
from node.serving.cache_budget import CacheBudget
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates
from node.serving.sessions.frame_rates import FrameBudget, FrameRates
from node.serving.sessions.hop_session import FrameStream
from node.serving.sessions.listener import Listener
from node.serving.sessions.push_reader import read_pushes
from node.serving.span_admission import SpanAdmission
from routing.chains.alternatives import Constraints
from routing.chains.link_speeds import LinkSpeeds
from routing.chains.measured import Measured
from routing.chains.search import Chain, Hop
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tensor_codec.adapters import PREFIX
from tensor_codec.blocks import Blocks
from tensor_codec.errors import PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import Buffer, FrameDecoder, encode_frame
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.contract import OUTLIER_CODEC, Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import Run
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    Open,
    Result,
    decode_from_hop,
    decode_open_reply,
    encode_open,
)
from tensor_codec.span_spec import SpanSpec

HIDDEN = 4
PRIME = 8191  # all values stay whole numbers that every codec's dtype but bf16 holds exactly
CLIENT = PeerId("client")
T = TypeVar("T")


class FakeCache:
    """The inputs of every block of the run, [batch, length, hidden] each.

    prefix: of each block the sum of the keys and values in front, once `begin_with` was called.
    """

    def __init__(self, batch: int, max_length: int) -> None:
        self.batch = batch
        self.max_length = max_length
        self.given: dict[int, Tensor] = {}
        self.prefix: dict[int, int] = {}
        self.length = 0
        self.closed = False

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        assert 0 <= length <= self.length
        self.length = length
        self.given = {block: given[:, :length] for block, given in self.given.items()}

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes the former row order[i]."""
        index = torch.tensor(list(order))
        self.given = {block: given.index_select(0, index) for block, given in self.given.items()}

    def reserve(self, length: int) -> None:
        """Room for the positions before `length`."""
        assert not self.closed
        assert length <= self.max_length

    def begin_with(self, prefix: Prefix) -> None:
        """Every block adds the sum of its keys and values from now on."""
        assert not self.length
        for block, own in prefix.blocks.items():
            self.prefix[block] = int(own.keys.sum() + own.values.sum())

    def close(self) -> None:
        """Give everything back."""
        self.closed = True


class FakeArena:
    """Makes caches.  held: the blocks that it has stores for, as far as it was told.
    given_back: how often memory was."""

    held: tuple[int, int] | None = None
    given_back: int = 0

    def give_back_memory(self) -> None:
        """Count the calls."""
        self.given_back += 1

    def hold(self, start: int, shapes: Sequence[object]) -> None:
        """Have stores for these blocks."""
        self.held = start, start + len(shapes)

    def open(self, batch: int, max_length: int) -> FakeCache:
        """An empty cache."""
        return FakeCache(batch, max_length)


class FakeSpan:
    """Blocks [start, stop); block b makes (3 h + b + 1 + all it was given before) mod 8191 of each h.

    steps: every step computed, as (position, tokens, start, stop).  batches: of each decode, the adapters of
    its sessions.  poison: a function from the
    right answer to the given one.  rope: then the angles that a position takes are added to it.
    """

    rope: LengthRope | None = None

    block_values = 100.0

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.hidden_size = HIDDEN
        self.steps: list[tuple[int, int, int, int]] = []
        self.batches: list[list[str | None]] = []
        self.poison: Callable[[Tensor], Tensor] = lambda hidden: hidden

    can_cut = True
    repeats = True
    fused = True
    in_any_thread = False

    def new_stage(self) -> None:
        """Nothing is copied."""

    def planned(self, stage: object, *caches_and_run: Any, **how: Any) -> Callable[[Tensor], Tensor]:
        """See `Span.planned`."""
        return lambda hidden: self.decode(hidden, *caches_and_run, **how)

    @property
    def shapes(self) -> tuple[None, ...]:
        """One for each block."""
        return (None,) * (self.stop - self.start)

    def part(self, start: int, stop: int) -> FakeSpan:
        """A span of some of the blocks."""
        assert self.start <= start < stop <= self.stop
        return FakeSpan(start, stop)

    def joined(self, others: Sequence[FakeSpan]) -> FakeSpan:
        """One span of neighbours."""
        spans = sorted([self, *others], key=lambda span: span.start)
        assert all(one.stop == two.start for one, two in itertools.pairwise(spans))
        return FakeSpan(spans[0].start, spans[-1].stop)

    def decode_row(self, values: NDArray[np.float32], cache: FakeCache, start: int, stop: int) -> None:
        """`decode` of one row, in place."""
        values[:] = self.decode(torch.from_numpy(values[None]), [cache], start, stop, rope_lengths=[0])[
            0
        ].numpy()

    def new_cache(self, batch: int, max_length: int) -> FakeCache:
        """An empty cache."""
        return FakeCache(batch, max_length)

    def forward(
        self,
        hidden: Tensor,
        cache: FakeCache,
        position: int,
        start: int,
        stop: int,
        *,
        rope_length: int = 0,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
    ) -> Tensor:
        """Compute a step: [batch, tokens, hidden] -> the same shape.  An adapter adds its rank."""
        assert self.start <= start < stop <= self.stop
        assert position == cache.length, "a hole, or a cache that was not cut"
        tokens = hidden.shape[1]
        assert position + tokens <= cache.max_length
        hidden = hidden.to(torch.float64)
        angles = torch.zeros(tokens, 1, dtype=torch.float64)
        if self.rope is not None:
            lengths = [max(rope_length, position + token + 1) for token in range(tokens)]
            angles[:, 0] = torch.tensor([sum(self.rope.factors(length)) for length in lengths])
        for block in range(start, stop):
            hidden = hidden + angles
            if prompts is not None:
                own = prompts[block - start, position : position + tokens]
                hidden = torch.cat([hidden[:, : len(own)] + own, hidden[:, len(own) :]], dim=1)
            given = cache.given.get(block, hidden[:, :0])
            cache.given[block] = torch.cat([given, hidden], dim=1)
            before = cache.given[block].cumsum(1)[:, position:] - hidden
            added = cache.prefix.get(block, 0) + (0 if adapter is None else adapter.rank)
            hidden = (3 * hidden + block + 1 + before + added) % PRIME
        cache.length += tokens
        self.steps.append((position, tokens, start, stop))
        return self.poison(hidden.to(torch.float32))

    def decode(
        self,
        hidden: Tensor,
        caches: Sequence[FakeCache],
        start: int,
        stop: int,
        *,
        rope_lengths: Sequence[int],
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """The next positions of each row of several sessions: [positions, hidden] -> the same shape."""
        parts, first = [], 0
        owners, counts = adapters or [None] * len(caches), tokens or [1] * len(caches)
        self.batches.append([None if each is None else each.id for each in owners])
        for cache, rope_length, adapter, count in zip(caches, rope_lengths, owners, counts, strict=True):
            length, last = cache.length, first + cache.batch * count
            rows = hidden[first:last].view(cache.batch, count, -1)
            answer = self.forward(rows, cache, length, start, stop, rope_length=rope_length, adapter=adapter)
            parts.append(answer.flatten(0, 1))
            cache.length = length  # the caller that merged them moves it on
            first = last
        return torch.cat(parts)


def whole_model(hidden: Tensor, start: int, stop: int, adapter: SpanAdapter | None = None) -> Tensor:
    """The outputs of blocks [start, stop) for hidden states [batch, tokens, hidden], all at once."""
    span = FakeSpan(start, stop)
    cache = FakeCache(hidden.shape[0], hidden.shape[1])
    return span.forward(hidden, cache, 0, start, stop, adapter=adapter)


def some_hidden(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Whole numbers [batch, tokens, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, PRIME, (batch, tokens, HIDDEN), generator=generator).float()


class FakeEmbedAndHead:
    """Embeds a token as small numbers and reads the next one out of the sum of a hidden state."""

    vocabulary = 26
    stateless = True
    finds_best = True
    rope: LengthRope | None = None

    def __init__(self, end_tokens: Iterable[int] = ()) -> None:
        self.eos_ids = frozenset(end_tokens)
        self.tokenizer = self
        self.embedded: list[int] = []  # tokens in each call

    def row_of(self, token: int) -> None:
        """`embed` computes it."""

    def embed(self, ids: Tensor, position: int) -> Tensor:
        """Token ids [1, tokens] -> [1, tokens, hidden]."""
        self.embedded.append(ids.shape[1])
        return (ids[..., None] * torch.arange(1, HIDDEN + 1) + 1).float()

    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        """[1, tokens, hidden] -> logits [1, tokens, vocabulary]."""
        best = hidden.sum(-1).long() % self.vocabulary
        return torch.nn.functional.one_hot(best, self.vocabulary).float()

    def best_of(self, hidden: Tensor) -> int:
        """The place of the largest logit after [1, 1, hidden]."""
        return int(self.head(hidden, best_only=True)[0, -1].argmax())

    def bests_of(self, hidden: Tensor) -> list[int]:
        """The same of each row [rows, 1, hidden]."""
        return [int(row.argmax()) for row in self.head(hidden, best_only=True)[:, -1]]

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        """A letter for each token."""
        return "".join(chr(ord("a") + token) for token in tokens)


def generated(prompt: list[int], count: int, blocks: int) -> list[int]:
    """The greedy tokens of the whole model, each from everything before it."""
    ends, tokens = FakeEmbedAndHead(), list(prompt)
    for _ in range(count):
        hidden = whole_model(ends.embed(torch.tensor([tokens]), 0), 0, blocks)
        tokens.append(int(ends.head(hidden)[0, -1].argmax()))
    return tokens[len(prompt) :]


class FakeCompute:
    """Runs functions one at a time, after `seconds` of the test's clock, in the caller's own task."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._lock = trio.Lock()

    @property
    def is_idle(self) -> bool:
        """Whether no function waits or runs; False where each takes time, which passes in `run` alone."""
        return not self.seconds and not self._lock.locked()

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """function(*args)."""
        async with self._lock:
            await trio.sleep(self.seconds)
            return function(*args)


@dataclass
class _Pipe:
    """The state that both ends of a stream share."""

    reset: bool = False


class FakeStream:
    """One end of a stream of frames: two bounded queues, with FramedStream's errors and deadlines."""

    def __init__(
        self,
        peer: PeerId,
        protocol: str,
        limits: Limits,
        send_channel: trio.MemorySendChannel[bytes],
        receive_channel: trio.MemoryReceiveChannel[bytes],
        pipe: _Pipe,
    ) -> None:
        self.peer = peer
        self.prefix = ""
        self.relayed = False
        self.is_direct_now: Callable[[], bool] = lambda: False
        self.batches = False
        self.protocol = protocol
        self.limits = limits
        self.closed = False
        self.speed = 0
        self.pipe = pipe
        self.other: FakeStream
        self.frozen: dict[PeerId, trio.Event] = {}  # peers whose process is stopped
        self._send = send_channel
        self._receive = receive_channel
        self.judge: Callable[[bytes, int], Refused | None] | None = None  # frames come whole
        self._decoder = FrameDecoder(limits.max_frame_bytes)

    @property
    def has_better_way(self) -> bool:
        """Whether it runs through a relay, and a new stream would not."""
        return self.relayed and self.is_direct_now()

    @property
    def is_free(self) -> bool:
        """Whether a frame goes out without a wait."""
        room = self._send.statistics()
        return room.current_buffer_used < room.max_buffer_size

    @property
    def limit(self) -> int:
        """Most bytes of a frame that has not come yet."""
        return self._decoder.max_frame

    @limit.setter
    def limit(self, size: int) -> None:
        self._decoder.max_frame = min(size, self.limits.max_frame_bytes)

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return self._decoder.in_frame

    async def send(self, frame: Buffer | Iterable[Buffer], seconds: float | None = None) -> None:
        """Send one frame.  Raises SlowPeer, PeerGone."""
        await self.send_bytes(encode_frame(frame, self.limits.max_frame_bytes), seconds)

    def send_now(self, frame: Buffer | Iterable[Buffer]) -> bool:
        """Send one frame where that needs no waiting."""
        try:
            self._send.send_nowait(encode_frame(frame, self.limits.max_frame_bytes))
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def send_bytes(self, data: bytes, seconds: float | None = None) -> None:
        """Send bytes, frames or not."""
        try:
            with trio.fail_after(self.limits.reply_taken_seconds if seconds is None else seconds):
                await self._send.send(data)
        except trio.TooSlowError:
            await self.reset()
            raise SlowPeer(f"{self.peer} did not take {len(data)} bytes") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PeerGone(f"{self.peer} is gone") from error
        except trio.Cancelled:
            await self.reset()  # as a frame cut short does
            raise

    async def receive(
        self, seconds: float | None = None, taker: Callable[[Buffer], bool] | None = None
    ) -> bytearray | None:
        """The next frame, None at a clean end.  Raises SlowPeer, PeerGone, FrameError."""
        while (frame := await self._next(seconds)) is not None:
            try:
                if taker is None or not taker(frame):
                    break
            except PeerFault:
                break
        return frame

    async def _next(self, seconds: float | None) -> bytearray | None:
        decoder = self._decoder
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            frame = decoder.take() if decoder._buffer else None
            while frame is None:
                try:
                    data = await self._receive.receive()
                    while (stopped := self.frozen.get(self.other.peer)) is not None:
                        await stopped.wait()
                except trio.EndOfChannel:
                    if self.pipe.reset:
                        raise PeerGone(f"{self.peer} reset the stream") from None
                    decoder.close()
                    return None
                except trio.ClosedResourceError as error:
                    raise PeerGone("the stream is closed") from error
                frame = decoder.take(data)
            return frame
        raise SlowPeer(f"no whole frame from {self.peer} within {seconds} s")

    async def send_eof(self) -> None:
        """End our side; frames may still be received."""
        self._send.close()

    async def aclose(self) -> None:
        """End our side cleanly, and want nothing more."""
        self.closed = True
        self._send.close()
        self._receive.close()

    async def reset(self) -> None:
        """End both sides at once."""
        self.pipe.reset = True
        for end in (self, self.other):
            end._send.close()
        self.closed = True
        self._receive.close()


def stream_pair(
    one: PeerId, other: PeerId, protocol: str, limits: Limits, frames: int = 16
) -> tuple[FakeStream, FakeStream]:
    """The ends of `one` and `other`; each knows its peer.  frames: that fit in each direction."""
    there_send, there = trio.open_memory_channel[bytes](frames)
    back_send, back = trio.open_memory_channel[bytes](frames)
    pipe = _Pipe()
    near = FakeStream(other, protocol, limits, there_send, back, pipe)
    far = FakeStream(one, protocol, limits, back_send, there, pipe)
    near.other, far.other = far, near
    return near, far


R = TypeVar("R", Open, Run)
Liar = Callable[[FakeStream], Awaitable[None]]


@dataclass
class FakeNode:
    """A serving node of a World.  liar: serves streams in place of the listener."""

    peer: PeerId
    span: FakeSpan
    compute: FakeCompute
    listener: Listener
    alive: bool = True
    liar: Liar | None = None
    adapters: AdapterListener | None = None
    handlers: list[trio.CancelScope] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks that it serves, (start, stop)."""
        return self.span.start, self.span.stop

    @property
    def faults(self) -> Counter[str]:
        """The peers that this node has blamed, each with its fault."""
        counts = self.listener.faults.counts()
        return Counter({f"{peer} {kind}": count for (peer, kind), count in counts.items()})

    @property
    def budget(self) -> CacheBudget:
        """Of the node's caches."""
        return self.listener.budget

    def assert_idle(self) -> None:
        """Nothing lingers: no session, promised token, waiting step, handler, link or stream."""
        assert self.listener.session_count == 0
        assert self.budget.free_tokens == self.budget.tokens
        assert self.listener.engine.batcher.waiting == 0
        assert self.handlers == []
        assert self.listener.pushed.links._links == {}
        assert [stream.protocol for stream in self.streams if not stream.closed] == []


class World:
    """Nodes that reach each other by name, over streams in memory.

    unreachable: pairs (from, to) that have no way.  relayed: those whose new streams run through a relay.
    limits: of all nodes.  prefixes: of peers' addresses.
    link_seconds: the round trip between any two.  old: peers that read no other codec than fp32 and bf16.
    speeds: of links, as far as a client knows them.
    """

    def __init__(self, nursery: trio.Nursery, limits: Limits | None = None) -> None:
        self.nursery = nursery
        self.limits = limits or Limits()
        self.nodes: dict[PeerId, FakeNode] = {}
        self.unreachable: set[tuple[PeerId, PeerId]] = set()
        self.relayed: set[tuple[PeerId, PeerId]] = set()
        self.out_of_sight: set[PeerId] = set()
        self.link_seconds = 1e-3
        self.old: set[PeerId] = set()
        self.speeds = LinkSpeeds()
        self.prefixes: dict[PeerId, str] = {}
        self.frozen: dict[PeerId, trio.Event] = {}
        self.client_streams: list[FakeStream] = []
        self.dialled: list[tuple[PeerId, PeerId]] = []
        self.frames = FrameBudget(FrameRates(self.limits), lambda _: 0)

    def add(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        seconds: float = 0.0,
        tokens: int = 10**6,
        can_cut: bool = True,
        desk: AdapterDesk | None = None,
        **spec: Any,  # of SpanSpec's fields
    ) -> FakeNode:
        """A node that serves blocks [start, stop); `seconds` for each step.  desk: then it takes adapters."""
        peer = PeerId(name)
        span, compute = FakeSpan(start, stop), FakeCompute(seconds)
        span.can_cut = can_cut
        engine = Engine(span, compute, Rates(1.0, 1.0), self.limits)
        served = SpanSpec("m", "r", Blocks(start, stop), "float32", hidden=HIDDEN, max_position=4096)
        admission = SpanAdmission(replace(served, **spec), adapters=None if desk is None else desk.store)
        listener = Listener(
            admission,
            engine,
            FakeArena(),
            CacheBudget(tokens, max_session_tokens=self.limits.max_session_tokens),
            lambda to: self.dial(peer, to, PUSH_PROTOCOL),
            self.limits,
        )
        self.nursery.start_soon(engine.run)
        node = self.nodes[peer] = FakeNode(peer, span, compute, listener)
        if desk is not None:
            known = {"q_proj": (HIDDEN, HIDDEN), PREFIX: (HIDDEN, HIDDEN)}
            shapes = dict.fromkeys(range(start, stop), known)
            node.adapters = AdapterListener(
                admission, desk, lambda: shapes, compute, self.limits, listener.faults
            )
        return node

    def record(self, node: FakeNode) -> Record:
        """The node's record."""
        served = node.listener.admission.spec
        return Record(
            peer=node.peer,
            role="serve",
            state="online",
            name=node.peer,
            version="test",
            model=served.model,
            revision=served.revision,
            blocks=self.blocks,
            start=served.blocks.start,
            stop=served.blocks.stop,
            dtype=served.dtype,
            quantize="none",
            seconds_per_block=node.compute.seconds / served.blocks.size or 1e-3,
            session_tokens=node.listener.budget.session_tokens,
            rtt=dict.fromkeys(self.nodes, self.link_seconds),
            codecs=() if node.peer in self.old else (OUTLIER_CODEC,),
            batches=node.peer not in self.old,
            lora=0 if node.adapters is None else self.limits.max_adapter_rank,
            adapters=() if node.adapters is None else node.adapters.desk.store.announced,
            seq=1,
            ttl_seconds=86400.0,
        )

    @property
    def blocks(self) -> int:
        """Of the model: as many as the nodes hold."""
        return max(node.span.stop for node in self.nodes.values())

    def view(self) -> SwarmView:
        """The view of every peer: all nodes, the dead ones too, but not the nodes taken out of sight."""
        entries = {
            peer: Entry(self.record(node), b"", 0.0)
            for peer, node in self.nodes.items()
            if peer not in self.out_of_sight
        }
        return SwarmView("", entries=entries)

    def routes(self, client: PeerId = CLIENT, constraints: Constraints | None = None) -> ChainChooser:
        """A chooser of chains for a client's sessions, over streams of this world."""

        async def dial(peer: PeerId, addresses: Sequence[str], protocol: str) -> FakeStream:
            return await self.dial(client, peer, protocol)

        async def changed(since: SwarmView) -> None:
            await until(lambda: set(self.view().entries) != set(since.entries))

        return ChainChooser(
            "m",
            "r",
            self.blocks,
            view=self.view,
            rtts=lambda: dict.fromkeys(self.nodes, self.link_seconds),
            dial=dial,
            changes=ViewChanges(changed),
            constraints=constraints or Constraints(),
            measured=Measured(speeds=self.speeds),
        )

    def add_chain(self, *boundaries: int, seconds: float = 0.0) -> Chain:
        """A node for each pair of neighbouring boundaries, and the chain of them all."""
        hops = []
        for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            node = self.add(f"hop{index}", start, stop, seconds=seconds)
            hops.append(Hop(node.peer, start, stop))
        return Chain(tuple(hops), 0.0)

    async def dial(self, me: PeerId, to: PeerId, protocol: str) -> FakeStream:
        """Open a stream.  Raises PeerGone."""
        await trio.lowlevel.checkpoint()
        self.dialled.append((me, to))
        node = self.nodes.get(to)
        if node is None or not node.alive or (me, to) in self.unreachable:
            raise PeerGone(f"{to} cannot be reached")
        ours, theirs = stream_pair(me, to, protocol, self.limits)
        ours.frozen = theirs.frozen = self.frozen
        ours.batches = to not in self.old
        ours.relayed = theirs.relayed = (me, to) in self.relayed
        ours.is_direct_now = lambda: (me, to) not in self.relayed
        theirs.prefix = self.prefixes.get(me, "")
        node.streams.append(theirs)
        if me in self.nodes:
            self.nodes[me].streams.append(ours)
        else:
            self.client_streams.append(ours)
        self.nursery.start_soon(self._handle, node, theirs)
        return ours

    async def _handle(self, node: FakeNode, stream: FakeStream) -> None:
        """Handle an inbound stream as `node.network.host` does."""
        scope = trio.CancelScope()
        node.handlers.append(scope)
        try:
            with scope:
                if node.liar is not None:
                    await node.liar(stream)
                elif stream.protocol == ADAPTER_PROTOCOL:
                    assert node.adapters is not None
                    await node.adapters.serve(stream)
                elif stream.protocol == SESSION_PROTOCOL:
                    await node.listener.serve_session(stream)
                else:
                    await serve_push(node.listener, stream, self.frames)
                await stream.aclose()
        except PeerFault as fault:
            node.listener.faults.add(stream.peer, fault)
            await stream.reset()
        finally:
            node.handlers.remove(scope)

    async def kill(self, peer: str) -> None:
        """The process is gone: all its streams are reset, nothing is said."""
        node = self.nodes[PeerId(peer)]
        node.alive = False
        for stream in node.streams:
            if not stream.closed:
                await stream.reset()
        for scope in list(node.handlers):
            scope.cancel()

    def revive(self, peer: str) -> None:
        """The process is started again: the same identity, nothing in memory."""
        self.nodes[PeerId(peer)].alive = True

    def freeze(self, peer: str) -> None:
        """The process is stopped: frames to it wait, and it sends nothing."""
        self.frozen[PeerId(peer)] = trio.Event()

    def thaw(self, peer: str) -> None:
        """It goes on where it was."""
        self.frozen.pop(PeerId(peer)).set()

    async def open(
        self,
        chain: Chain | None = None,
        *,
        max_length: int = 64,
        batch: int = 1,
        codec: str = "fp32",
        give_up_seconds: float = 30.0,
        client: PeerId = CLIENT,
        routes: ChainChooser | None = None,
        deadline: float | None = None,
        trace: Trace | None = None,
        **terms: Any,  # of Terms' fields
    ) -> Session:
        """A session of a client, along `chain` at first, where one is given."""
        run = Blocks(0, self.blocks) if chain is None else Blocks(chain.hops[0].start, chain.hops[-1].stop)
        asked = Terms("m", "r", run, HIDDEN, batch, max_length, codec)
        routes = self.routes(client) if routes is None else routes
        return await open_session(
            replace(asked, **terms),
            routes if chain is None else cast(SwarmAccess, _FirstAlong(chain, routes)),
            nursery=self.nursery,
            compute=FakeCompute(),
            limits=self.limits,
            give_up_seconds=give_up_seconds,
            deadline=deadline,
            trace=trace,
        )

    @property
    def quiet(self) -> bool:
        """Whether no handler runs at a node that lives and the clients have closed all streams."""
        handlers = any(node.handlers for node in self.nodes.values() if node.alive)
        return not handlers and all(stream.closed for stream in self.client_streams)

    def assert_idle(self) -> None:
        """Nothing lingers at any node that lives, nor at the clients."""
        for node in self.nodes.values():
            if node.alive:
                node.assert_idle()
        assert [stream for stream in self.client_streams if not stream.closed] == []


class _FirstAlong:
    """Routes whose first choice is made."""

    def __init__(self, chain: Chain, routes: ChainChooser) -> None:
        self.chain: Chain | None = chain
        self.routes = routes

    def choose(self, start: int, stop: int, **how: Any) -> Chain:
        chain, self.chain = self.chain, None
        return chain or self.routes.choose(start, stop, **how)

    def __getattr__(self, name: str) -> object:
        return getattr(self.routes, name)


async def serve_push(listener: Listener, stream: FrameStream, frames: FrameBudget) -> None:
    """Give each frame of a push stream to a listener, as a node's StreamDispatch does.  Raises PeerFault."""
    await read_pushes(stream, (listener.pushed,), frames)


async def until(condition: Callable[[], bool]) -> None:
    """Look every tenth of a second of the test's clock, which costs none of ours."""
    while not condition():  # noqa: ASYNC110  the condition has no event to wait for
        await trio.sleep(0.1)


@asynccontextmanager
async def swarm(limits: Limits | None = None) -> AsyncIterator[World]:
    """A world that is gone with the block, with nothing left in it."""
    async with trio.open_nursery() as nursery:
        world = World(nursery, limits)
        yield world
        with trio.move_on_after(5):  # P6
            await until(lambda: world.quiet)
        world.assert_idle()
        nursery.cancel_scope.cancel()


def conversation_of(
    world: World, routes: ChainChooser | None = None, *, standby: bool = False, **changes: Any
) -> Conversation:
    """A client's tokens in this world.  routes: its view of the swarm, and the peers that it avoids.

    standby: see `Terms`.  changes: of the conversation's fields, by name.
    """
    routes = world.routes() if routes is None and world.nodes else routes

    async def open_chain(*, max_length: int, deadline: float, trace: Trace) -> Session:
        return await world.open(
            max_length=max_length, deadline=deadline, trace=trace, routes=routes, standby=standby
        )

    def worked(session: Session) -> None:
        assert routes is not None
        routes.worked(session.working_hops)

    values: dict[str, Any] = {
        "local_model": FakeEmbedAndHead(),
        "compute": FakeCompute(),
        "open_chain": open_chain,
        "worked": worked,
        "max_length": 64,
        "give_up_seconds": 60.0,
    }
    values |= changes
    return Conversation(heads=HeadBatches(values["local_model"], values["compute"]), **values)


def best(logits: Tensor) -> int:
    """The greedy pick."""
    return int(logits.argmax())


async def continued(conversation: Conversation, prompt: list[int], count: int) -> list[int]:
    """So many greedy tokens after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(await conversation.logits_after(tokens, best))
    return tokens[len(prompt) :]


def hops_of(conversation: Conversation) -> str:
    """The peers of its chain now."""
    assert conversation.session is not None
    return " ".join(hop.peer for hop in conversation.session.chain.hops)


def with_changes(request: R, **changes: Any) -> R:
    """The request with these changes; fields of its spec, `start` and `stop` too, are changed there."""
    spec = request.spec
    blocks = Blocks(changes.pop("start", spec.blocks.start), changes.pop("stop", spec.blocks.stop))
    own = {name: changes.pop(name) for name in ("model", "revision", "dtype", "adapter") if name in changes}
    return replace(request, spec=replace(spec, blocks=blocks, **own), **changes)


class RawClient:
    """A client without a protocol of its own: a stream to one hop, and the messages one by one."""

    def __init__(self, stream: FakeStream, opened: Open) -> None:
        self.stream = stream
        self.opened = opened

    @staticmethod
    async def open(world: World, peer: str, name: str = CLIENT, **changes: Any) -> tuple[RawClient, object]:
        """Dial, say Open, and return the client with the hop's answer."""
        node = world.nodes[PeerId(peer)]
        spec = SpanSpec("m", "r", node.listener.admission.spec.blocks, "float32")
        wanted = Open(bytes(16), spec, 1, 64, "fp32")
        opened = with_changes(wanted, **changes)
        stream = await world.dial(PeerId(name), PeerId(peer), SESSION_PROTOCOL)
        await stream.send(encode_open(opened))
        frame = await stream.receive(30.0)
        return RawClient(stream, opened), None if frame is None else decode_open_reply(frame)

    async def receive(self, world: World) -> Result | Failed | None:
        """The hop's next message; None when it has closed."""
        contract = Contract(
            self.opened.session,
            self.opened.spec.blocks.start,
            self.opened.spec.blocks.stop,
            self.opened.batch,
            self.opened.max_length,
            HIDDEN,
            self.opened.codec,
            world.limits.max_step_tokens,
        )
        frame = await self.stream.receive(100.0)
        return None if frame is None else cast(Result | Failed, decode_from_hop(frame, contract))
