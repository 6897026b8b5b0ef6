"""The entry point of a serving node for sessions of clients, and for steps pushed by previous hops.

    /raceme/session/1   a client opens a session, sends steps, gets results
    /raceme/push/1      a previous hop sends steps of many sessions

Every byte is checked here, once, against the contract of its session.  The session itself is in
`hop_session` and `worker`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import trio
from torch import Tensor

from node.model.blocks.kv_pages import BlockShape
from node.monitor.metrics.meters import reason_of
from node.network.prefixes import sharer
from node.runtime.faults import Faults
from node.serving.cache_budget import FREE_AGAIN_SECONDS, CacheAdmission, CacheBudget
from node.serving.executor.engine import Engine
from node.serving.executor.out_of_memory import or_refused
from node.serving.sessions.frame_rates import FrameBudget, FrameRates
from node.serving.sessions.hop_session import (
    FrameStream,
    Guests,
    HopSession,
    KeptOutputs,
    SessionCache,
    SessionKey,
    SessionRoute,
)
from node.serving.sessions.inbox import Inbox
from node.serving.sessions.moving.client_stream import ClientStream
from node.serving.sessions.prompt_budget import HeldPrompts, PromptBudget
from node.serving.sessions.push import Outlet, PushLinks, Sender
from node.serving.sessions.session_table import Place, SessionTable
from node.serving.sessions.state import ServerSession
from node.serving.sessions.step_room import StepRoom
from node.serving.sessions.together.outbox import Outbox
from node.serving.sessions.together.pushed import PushedSteps
from node.serving.sessions.worker import HopWorker, send_to_client
from node.serving.span_admission import LEAVING, SpanAdmission
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden
from tensor_codec.errors import (
    CacheFull,
    Draining,
    PeerGone,
    Refused,
    TooManyStreams,
)
from tensor_codec.journal import JournalBudget
from tensor_codec.limits import Limits
from tensor_codec.messages.attach import Attach, decode_first
from tensor_codec.messages.contract import HEADER_BYTES, Contract, vector_bytes
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.forward_backward import prompts_contract
from tensor_codec.messages.session import (
    Open,
    Opened,
    check_prompts,
    encode_opened,
    owner_tag,
)
from tensor_codec.rows.row_order import MAX_ORDERED_ROWS

OPEN_AGAIN_SECONDS = 1.0  # until a session that was given up has ended


class CachePool(Protocol):
    """The part of `node.model.blocks.kv_pages.PagePool` that sessions need."""

    def open(self, batch: int, max_length: int) -> SessionCache:
        """An empty cache of `batch` rows."""

    def hold(self, start: int, shapes: Sequence[BlockShape | None]) -> None:
        """Have stores for the blocks from `start` on, one for each shape."""

    def give_back_memory(self) -> None:
        """Give the memory of pages without an owner back to the system.  Runs in the torch thread."""


@dataclass(frozen=True, slots=True)
class SessionBytes:
    """Room for the prompts that sessions hold, and for the steps that wait at them."""

    prompts: PromptBudget
    steps: StepRoom


@dataclass(slots=True)
class Listener:
    """Serves sessions over one span.

    admission: of requests for blocks.  pool: of the caches' pages; budget: how many each session may hold.
    open_stream: to a peer of our view, for pushing.  faults: of peers, counted.
    pushed: steps that previous hops send.
    journal_tokens: tokens of outputs that are kept for replays; None: as many as the caches hold.
    packs: whether hidden states may lose values on their way, in int8o, where the client asks for it.
    """

    admission: SpanAdmission
    engine: Engine
    pool: CachePool
    budget: CacheBudget
    open_stream: Callable[[PeerId], Awaitable[Sender]]
    limits: Limits = field(default_factory=Limits)
    faults: Faults = field(default_factory=Faults)
    journal_tokens: int | None = None
    packs: bool = True
    _sessions: SessionTable = field(default_factory=SessionTable)
    _frames: FrameBudget = field(init=False)
    pushed: PushedSteps = field(init=False)
    _cache_admission: CacheAdmission = field(init=False)
    journals: JournalBudget = field(init=False)
    _bytes: SessionBytes = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        outbox = Outbox(limits.max_steps_per_frame)
        self.engine.after_batch = outbox.flush
        links = PushLinks(
            self.open_stream,
            limits.successor_dials_per_client_per_second,
            limits.successor_dials_per_client_burst,
            outbox,
        )
        self.pushed = PushedSteps(self._sessions, self.faults, self._worker, links)
        self._bytes = SessionBytes(PromptBudget(self.limits), StepRoom(self.limits))
        self._cache_admission = CacheAdmission(self.budget, self.limits.cache_wait_seconds, self._give_way)
        tokens = self.budget.tokens if self.journal_tokens is None else self.journal_tokens
        self.journals = JournalBudget(tokens)
        self._frames = FrameBudget(FrameRates(self.limits), self._sessions.count_of)

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    async def serve_session(self, stream: FrameStream, refusal: Refused | None = None) -> None:
        """Serve the stream of one client until its session ends, or goes on elsewhere.  Raises PeerFault.

        refusal: of every new session, for now.
        """
        stream.limit = HEADER_BYTES + self.limits.max_prompt_bytes_per_peer
        judge = partial(self._bytes.prompts.judge, self.admission, stream.peer, stream.prefix)
        stream.judge = judge if refusal is None else lambda _beginning, _size: refusal
        try:
            frame = await stream.receive(self.limits.frame_start_seconds)
            if frame is None:
                return
            opened = decode_first(frame)
            del frame  # with its prompts it is large
            stream.judge = None  # of the frames of a session its contract is the limit
            if isinstance(opened, Attach):
                return await self._sessions.attach(stream, opened)
            if refusal is not None:
                raise refusal
            key = owner_tag(stream.peer), opened.session
            await self._end_earlier(key, opened)
            self._check(stream.peer, key, opened)
            place = self._sessions.places[key] = Place(opened.epoch)
            try:
                holding: AbstractContextManager[None] = nullcontext()
                if opened.prompts:
                    give_way = partial(self._sessions.end, key)
                    held = HeldPrompts(stream.peer, stream.prefix, len(opened.body), give_way)
                    holding = self._bytes.prompts.hold(held)
                adapting = self.admission.using(stream.peer, opened.spec, trio.current_time)
                with place.opening, holding, adapting as adapter:
                    prompts = await self._prompts_of(opened) if opened.prompts else None
                    opened = replace(opened, body=b"")
                    guests = Guests.of(prompts, adapter)
                    length = _cache_length(opened, guests, self.admission.spec.max_position)
                    await self._cache_admission.admit(key, stream.peer, opened.batch, length, stream.prefix)
                    with self._place(stream, opened, guests) as hop:
                        if guests.prefix is not None:  # before any step: its pages are the row's first
                            await self._cache_admission.grow(key, guests.virtual_tokens)
                            begin = partial(hop.cache.begin_with, guests.prefix)
                            seconds = self.limits.memory_retry_seconds
                            await self.engine.compute.run(or_refused(begin, "a prefix", seconds))
                        await self._run(hop)
                if place.refusal is not None:
                    raise place.refusal
            finally:
                self._sessions.free(key)
        except Refused as refusal:
            self.engine.meters.sessions_refused[reason_of(refusal)] += 1
            await stream.send(encode_failed(Failed.of(refusal)))

    def end_youngest(self, reason: Refused) -> bool:
        """End the session that was opened last; False where all are ending."""
        for hop in reversed(self._sessions.all()):
            if not hop.scope.cancel_called:
                hop.end(reason)
                return True
        return False

    async def drain(self) -> None:
        """Take no new session, and let the clients of open sessions move elsewhere.  Bounded.

        Each client gets a notice.  Its session is served until it has moved, was silent for
        `drain_idle_seconds`, or `drain_seconds` are over.
        """
        self.admission.drain()
        await self._hand_over(self._sessions.all)

    async def hand_over_others(self) -> None:
        """Let sessions of blocks that are served no longer move elsewhere, as `drain` does."""

        def others() -> list[HopSession]:
            served = self.admission.spec.blocks
            held = ((hop, Blocks(hop.contract.start, hop.contract.stop)) for hop in self._sessions.all())
            return [hop for hop, blocks in held if not served.contains(blocks)]

        await self._hand_over(others)

    async def _hand_over(self, which: Callable[[], list[HopSession]]) -> None:
        limits = self.limits
        async with trio.open_nursery() as nursery:
            for hop in which():
                nursery.start_soon(send_to_client, hop, replace(Failed.of(_leaving()), code="leaving"))
        with trio.move_on_after(limits.drain_seconds):
            while hops := which():
                silent = trio.current_time() - limits.drain_idle_seconds
                for hop in hops:
                    if not hop.in_use and hop.active_at <= silent:
                        hop.end(_leaving())
                with trio.move_on_after(limits.drain_idle_seconds / 4):
                    await self._sessions.one_ended.wait()
        for hop in which():
            hop.end(_leaving())
        with trio.move_on_after(limits.drain_seconds):
            while which():
                await self._sessions.one_ended.wait()

    async def _end_earlier(self, key: SessionKey, opened: Open) -> None:
        """End the earlier session of a client that comes back, in a later epoch, to a hop it gave up."""
        place, earlier = self._sessions.places.get(key), self._sessions.by_key.get(key)
        if place is None:
            return
        if opened.epoch <= (place.epoch if earlier is None else earlier.route.epoch):
            return
        place.opening.cancel()
        with trio.move_on_after(self.limits.cache_wait_seconds):
            while self._sessions.places.get(key) is place:
                await self._sessions.one_ended.wait()

    def _give_way(self, key: Hashable) -> None:
        """End a session for those of others: its client's network holds more than its share of the cache."""
        hop = next((hop for hop in self._sessions.all() if hop.key == key), None)
        if hop is not None:
            why = "others wait for cache, of which your network holds more than its share"
            hop.end(CacheFull(why, FREE_AGAIN_SECONDS))

    def _worker(self, hop: HopSession) -> HopWorker:
        return HopWorker(
            hop, self.engine, self._cache_admission, self.journals, self.faults, self.limits, self._frames
        )

    async def _prompts_of(self, opened: Open) -> Tensor:
        """The deep prompts of a session, checked in the torch thread.  Raises BadResult."""
        contract = prompts_contract(self._contract(opened), opened.prompts)
        return await self.engine.compute.run(decode_hidden, opened.body, contract)

    def _contract(self, opened: Open) -> Contract:
        hidden = self.admission.spec.hidden
        return Contract(
            session=opened.session,
            start=opened.spec.blocks.start,
            stop=opened.spec.blocks.stop,
            batch=opened.batch,
            max_length=opened.max_length,
            hidden=hidden,
            codec=opened.codec,
            max_step_tokens=self.limits.step_tokens(vector_bytes(opened.codec, hidden)),
            packs=self.packs,
        )

    @contextmanager
    def _place(self, stream: FrameStream, opened: Open, guests: Guests) -> Iterator[HopSession]:
        """An admitted session, until it ends.  Raises Refused, MessageError."""
        contract, key = self._contract(opened), (owner_tag(stream.peer), opened.session)
        cache = self.pool.open(opened.batch, opened.max_length)
        try:
            self._check_still_served(opened)  # it may have waited since it was checked
            hop = HopSession(
                contract=contract,
                stream=ClientStream(stream, self.limits.session_detached_seconds)
                if stream.relayed
                else stream,
                state=ServerSession(opened.max_length, can_cut=self.engine.span.can_cut),
                cache=cache,
                outlet=Outlet(
                    self.pushed.links, self.limits.session_idle_seconds, sharer(stream.peer, stream.prefix)
                ),
                inbox=Inbox(
                    self.limits.max_steps_in_flight,
                    held=opened.held,
                    room=self._bytes.steps.of_session(stream.peer, stream.prefix),
                ),
                route=SessionRoute(
                    opened.epoch,
                    opened.predecessor,
                    opened.successor,
                    opened.relay,
                    opened.pack,
                    opened.gather,
                    opened.follows,
                ),
                kept=KeptOutputs(opened.codec),
                active_at=trio.current_time(),
                guests=guests,
            )
            with self._sessions.holding(hop):
                yield hop
        finally:
            self.engine.before_next(cache.close)  # a batch may still be computing with its pages
            self._cache_admission.release(key)
            self.journals.close(key)

    def _check(self, peer: PeerId, key: SessionKey, opened: Open) -> None:
        """Check an Open against the served span.  Raises Refused, MessageError."""
        served = self.admission.spec
        self.admission.check_open()
        if key in self._sessions.places:
            raise TooManyStreams("a session of yours with this id is open already", OPEN_AGAIN_SECONDS)
        self.admission.admits(opened.spec)
        if opened.prompts:
            check_prompts(opened, served.hidden)
        if opened.max_length > served.max_position:
            raise Refused(f"a session of {opened.max_length} positions, the model has {served.max_position}")
        position = opened.batch * vector_bytes(opened.codec, served.hidden)
        if not self.limits.step_tokens(position):
            raise Refused(
                f"one position of {opened.batch} rows takes {position} bytes, a frame of"
                f" {self.limits.max_frame_bytes} has no room for it (--max-frame-bytes)"
            )
        mine = self._sessions.count_of(peer)
        if mine >= self.limits.sessions_of(peer):
            raise TooManyStreams(f"{mine} sessions of yours are open, that is the limit", 5.0)

    def _check_still_served(self, opened: Open) -> None:
        """Raise Draining where the session's blocks are served no longer, or not for long."""
        self.admission.check_open()
        if not self.admission.spec.blocks.contains(opened.spec.blocks):
            raise Draining(LEAVING)

    async def _run(self, hop: HopSession) -> None:
        """Answer Open, then serve until the client, a deadline, a fault or the drain ends it."""
        worker = self._worker(hop)
        try:
            push = await worker.connect_successor()
            rows = 1 < hop.contract.batch <= MAX_ORDERED_ROWS
            opened = Opened(push, hop.state.can_cut, self.engine.queue, rows, moves=hop.stream.relayed)
            await hop.stream.send(encode_opened(opened))
            await worker.run()
        finally:
            hop.inbox.close()
            if isinstance(hop.stream, ClientStream):
                hop.stream.release()
            await hop.outlet.aclose()


def _cache_length(opened: Open, guests: Guests, most: int) -> int:
    """Positions of each row in the cache.  most: of the model.  Raises Refused where these are fewer."""
    length = guests.virtual_tokens + opened.max_length
    if length > most:
        raise Refused(
            f"a session of {opened.max_length} positions after a prefix of {guests.virtual_tokens},"
            f" the model has {most}"
        )
    return length


def _leaving() -> PeerGone:
    return PeerGone(LEAVING)
