"""The door of a serving node: sessions of clients, and steps pushed by previous hops.

    /raceme/session/1   a client opens a session, sends steps, gets results
    /raceme/push/1      a previous hop sends steps of many sessions

Every byte is checked here, once, against the contract of its session.  Inside a session one worker
takes step after step from a bounded inbox, asks `session` what to do, has `engine` do it, and
passes the answer to the next hop or back to the client.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import trio

from node.model.arena import Arena, SpanCache
from node.serving.cache import CacheBudget
from node.serving.engine import Answer, Engine, NotFinite
from node.serving.push import PushLink, PushLinks, Sender
from node.serving.session import Repeat, ServerSession
from routing.names import PeerId
from tensor_codec.errors import (
    BadResult,
    CacheFull,
    Draining,
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    TooManyStreams,
    WrongRevision,
)
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages import (
    MAX_HOPS,
    Close,
    Contract,
    Failed,
    Open,
    Opened,
    Result,
    Step,
    StepRange,
    decode_from_client,
    decode_open,
    encode_failed,
    encode_opened,
    encode_result,
    encode_step,
    read_message,
    read_step,
    step_session,
)


@dataclass(frozen=True, slots=True)
class Served:
    """What this node offers: a session must ask for exactly this, or for a part of its blocks.

    dtype: what the span computes in, by name.  hidden_size, max_position: of the model.
    can_cut: whether caches can go back to an earlier position.
    """

    model: str
    revision: str
    start: int
    stop: int
    dtype: str
    hidden_size: int
    max_position: int
    can_cut: bool = True


class FrameStream(Protocol):
    """What the listener needs of a framed stream (see node/network/streams.py)."""

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """Send one frame; raises SlowPeer or PeerGone."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """The next frame, None at a clean end; raises PeerFault."""


@dataclass(frozen=True, slots=True)
class _Arrived:
    step: Step
    sender: PeerId
    at: float  # time.perf_counter()


@dataclass(slots=True)
class _Hop:
    """One session at this node."""

    opened: Open
    contract: Contract
    stream: FrameStream
    state: ServerSession
    cache: SpanCache
    inbox: trio.MemorySendChannel[_Arrived]
    arrivals: trio.MemoryReceiveChannel[_Arrived]
    scope: trio.CancelScope
    link: PushLink | None = None
    answer: Answer | None = None
    busy: bool = False  # a step is being computed or passed on
    over: PeerFault | Refused | None = None  # why the session ended, if not by its client's wish

    @property
    def in_use(self) -> bool:
        """Whether steps are in flight here."""
        return self.busy or bool(self.arrivals.statistics().current_buffer_used)

    def end(self, reason: PeerFault | Refused | None) -> None:
        """Stop the session's tasks; the first reason stands."""
        if self.over is None:
            self.over = reason
        self.scope.cancel()

    def offer(self, step: Step, sender: PeerId) -> None:
        """Put a step into the inbox.  RemoteProtocolError if its sender has overfilled it."""
        try:
            self.inbox.send_nowait(_Arrived(step, sender, time.perf_counter()))
        except trio.WouldBlock:
            raise RemoteProtocolError(f"step {step.step}: too many steps are in flight") from None


@dataclass(slots=True)
class Listener:
    """Serves sessions over one span.

    served: what is offered.  arena: where caches are; budget: who may have how much of it.
    open_stream: to a peer of our view, for pushing.  blame counts peers' faults ("peer error").
    """

    served: Served
    engine: Engine
    arena: Arena
    budget: CacheBudget
    open_stream: Callable[[PeerId], Awaitable[Sender]]
    limits: Limits = field(default_factory=Limits)
    blame: Counter[str] = field(default_factory=Counter)
    draining: bool = False
    _sessions: dict[bytes, _Hop] = field(default_factory=dict)
    _ids: set[bytes] = field(default_factory=set)  # of sessions, those that wait for room included
    _links: PushLinks = field(init=False)
    _no_session: trio.Event = field(default_factory=trio.Event)
    _more_room: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self._links = PushLinks(self.open_stream)

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    async def serve_session(self, stream: FrameStream) -> None:
        """Serve the stream of one client until its session ends.  Raises PeerFault."""
        frame = await stream.receive(self.limits.frame_start_seconds)
        if frame is None:
            return
        opened = decode_open(frame)
        try:
            self._check(stream.peer, opened)
            self._ids.add(opened.session)
            try:
                await self._when_there_is_room(
                    partial(self.budget.admit, opened.session, stream.peer, opened.batch, opened.max_length)
                )
                with self._place(stream, opened) as hop:
                    await self._run(hop)
            finally:
                self._ids.discard(opened.session)
        except Refused as refusal:
            await stream.send(encode_failed(Failed.of(refusal)))

    async def serve_push(self, stream: FrameStream) -> None:
        """Take steps that a previous hop pushes until it closes the stream.  Raises PeerFault."""
        while (frame := await stream.receive()) is not None:
            message = read_message(frame, frozenset({"step"}))
            hop = self._sessions.get(step_session(message))
            if hop is None or hop.scope.cancel_called:
                continue  # it ended while the step was on its way
            if hop.opened.predecessor != stream.peer:
                raise MessageError("a step of a session that another peer feeds")
            try:
                hop.offer(read_step(message, hop.contract), stream.peer)
            except (MessageError, RemoteProtocolError) as fault:
                # Perhaps the client opened its two hops differently: the stream, which serves
                # other sessions too, goes on.
                self._end_for(hop, fault, stream.peer)

    async def drain(self) -> None:
        """Take no new session, and end each one when its steps in flight are answered.  Bounded."""
        self.draining = True
        for hop in self._sessions.values():
            if not hop.in_use:
                hop.end(_leaving())
        with trio.move_on_after(self.limits.drain_seconds):
            await self._no_session_left()
        for hop in self._sessions.values():
            hop.end(_leaving())
        with trio.move_on_after(self.limits.drain_seconds):
            await self._no_session_left()

    async def _no_session_left(self) -> None:
        while self._sessions:
            if self._no_session.is_set():
                self._no_session = trio.Event()
            await self._no_session.wait()

    def _end_for(self, hop: _Hop, fault: PeerFault, sender: PeerId) -> None:
        """End a session for what `sender` did, and tell its client who it was if not itself."""
        self.blame[f"{sender} {type(fault).__name__}"] += 1
        if sender != hop.stream.peer:
            fault.peer = sender
        hop.end(fault)

    async def _when_there_is_room(self, take: Callable[[], None]) -> None:
        """Take pages of the cache as soon as there are some.  Raises CacheFull after a bounded wait."""
        deadline = trio.current_time() + self.limits.cache_wait_seconds
        while True:
            try:
                return take()
            except CacheFull as full:
                if full.retry_after_seconds is None or trio.current_time() >= deadline:
                    raise
            with trio.move_on_at(deadline):
                await self._more_room.wait()

    def _there_is_room(self) -> None:
        """Wake those who wait for pages."""
        self._more_room.set()
        self._more_room = trio.Event()

    @contextmanager
    def _place(self, stream: FrameStream, opened: Open) -> Iterator[_Hop]:
        """A session that was admitted, until it ends.  Raises Refused, MessageError."""
        contract = Contract(
            session=opened.session,
            start=opened.start,
            stop=opened.stop,
            batch=opened.batch,
            max_length=opened.max_length,
            hidden=self.served.hidden_size,
            codec=opened.codec,
            max_step_tokens=self.limits.max_step_tokens,
        )
        inbox, arrivals = trio.open_memory_channel[_Arrived](self.limits.max_steps_in_flight)
        cache = self.arena.open(opened.batch, opened.max_length)
        try:
            if self.draining:  # since it was checked it may have waited
                raise _draining()
            hop = _Hop(
                opened=opened,
                contract=contract,
                stream=stream,
                state=ServerSession(opened.max_length, can_cut=self.served.can_cut),
                cache=cache,
                inbox=inbox,
                arrivals=arrivals,
                scope=trio.CancelScope(),
            )
            self._sessions[opened.session] = hop
            yield hop
        finally:
            self._sessions.pop(opened.session, None)
            self.engine.before_next(cache.close)  # a batch may still be computing with its pages
            self.budget.release(opened.session)
            self._there_is_room()
            inbox.close()
            arrivals.close()
            if not self._sessions:
                self._no_session.set()

    def _check(self, peer: PeerId, opened: Open) -> None:
        """Whether we serve what is asked for.  Raises Refused, MessageError."""
        served = self.served
        if self.draining:
            raise _draining()
        if opened.session in self._ids:
            raise MessageError("a session with this id is open already")
        if opened.revision != served.revision:
            raise WrongRevision(
                f"revision {opened.revision} of {opened.model} was asked for,"
                f" {served.revision} of {served.model} is served here"
            )
        if opened.dtype != served.dtype:
            raise WrongRevision(f"dtype {opened.dtype} was asked for, {served.dtype} is served here")
        if not served.start <= opened.start < opened.stop <= served.stop:
            raise WrongRevision(
                f"blocks {opened.start}:{opened.stop} were asked for,"
                f" {served.start}:{served.stop} are served here"
            )
        if opened.adapter is not None:
            raise WrongRevision(f"adapter {opened.adapter} was asked for, none is served here")
        tokens = opened.batch * opened.max_length
        if tokens > self.limits.max_session_tokens:
            raise Refused(f"a session of {tokens} tokens, {self.limits.max_session_tokens} are allowed")
        if opened.max_length > served.max_position:
            raise Refused(f"a session of {opened.max_length} positions, the model has {served.max_position}")
        mine = sum(1 for hop in self._sessions.values() if hop.stream.peer == peer)
        if mine >= self.limits.max_sessions_per_peer:
            raise TooManyStreams(f"{mine} sessions of yours are open, that is the limit", 5.0)

    async def _run(self, hop: _Hop) -> None:
        """Answer Open, then serve until the client, a deadline, a fault or the drain ends it."""
        async with AsyncExitStack() as stack:
            successor = hop.opened.successor
            if successor is not None:
                try:
                    hop.link = await stack.enter_async_context(self._links.use(PeerId(successor)))
                except PeerFault as fault:
                    self.blame[f"{successor} {type(fault).__name__}"] += 1
            await hop.stream.send(encode_opened(Opened(push=hop.link is not None)))
            with hop.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, hop)
                    await self._work(hop)
            hop.state.close()
            if hop.over is not None:
                with trio.CancelScope(shield=True), trio.move_on_after(1):
                    await _tell(hop, Failed.of(hop.over, peer=hop.over.peer))

    async def _read(self, hop: _Hop) -> None:
        """Take what the client sends."""
        try:
            while (frame := await hop.stream.receive()) is not None:
                message = decode_from_client(frame, hop.contract)
                if isinstance(message, Close):
                    break
                hop.offer(message, hop.stream.peer)
        except PeerGone:
            pass  # the client's going away ends its session; nobody is left to be told
        except PeerFault as fault:
            self._end_for(hop, fault, hop.stream.peer)
        hop.end(None)

    async def _work(self, hop: _Hop) -> None:
        """Do step after step; returns when a deadline has passed or the session broke."""
        limits = self.limits
        life_ends = trio.current_time() + limits.session_life_seconds
        patience = limits.session_first_step_seconds
        while True:
            arrived = None
            with trio.move_on_at(min(life_ends, trio.current_time() + patience)):
                arrived = await hop.arrivals.receive()
            if arrived is None:
                old = trio.current_time() >= life_ends
                why = f"older than {limits.session_life_seconds} s" if old else f"idle for {patience} s"
                return hop.end(PeerGone(f"the session was {why}"))
            hop.busy = True
            try:
                await self._step(hop, arrived)
            except (Refused, NotFinite) as own:
                return hop.end(own)
            except PeerFault as fault:
                return self._end_for(hop, fault, arrived.sender)
            hop.busy = False
            if self.draining and not hop.in_use:
                return hop.end(_leaving())
            patience = limits.session_idle_seconds

    async def _step(self, hop: _Hop, arrived: _Arrived) -> None:
        """Compute a step, or find its stored answer, and pass it on.

        Raises Refused, NotFinite, and PeerFault for what is the fault of the step's sender.
        """
        step, contract = arrived.step, hop.contract
        what = StepRange(step.position, len(step.body) // contract.row_bytes, step.reply)
        decision = hop.state.receive(step.step, what)
        if isinstance(decision, Repeat):
            answer = hop.answer
        else:
            whole = hop.opened.successor is not None
            try:
                await self._make_room(hop, what)
            except CacheFull as full:
                hop.state.dropped(decision)
                return await _tell(hop, Failed.of(full, step.step))
            try:
                answer = await self.engine.step(
                    hop.stream.peer, contract, hop.cache, decision, step.body, whole=whole
                )
            except BadResult as bad:
                where = f"step {step.step}, blocks {contract.start}:{contract.stop}"
                raise type(bad)(f"{where}: {bad}") from None
            hop.state.computed(decision)
            hop.answer = answer
        if answer is not None:
            await self._pass_on(hop, arrived, what, answer)

    async def _make_room(self, hop: _Hop, what: StepRange) -> None:
        """Have the cache cut to a step's position, and get pages for the step.  Raises CacheFull."""
        if hop.cache.length > what.position:  # a cut, or what a cancelled step left behind
            self.engine.before_next(partial(hop.cache.cut, what.position))
            self.budget.shrink(hop.contract.session, what.position)
            self._there_is_room()
        length = what.position + what.tokens
        await self._when_there_is_room(partial(self.budget.grow, hop.contract.session, length))

    async def _pass_on(self, hop: _Hop, arrived: _Arrived, what: StepRange, answer: Answer) -> None:
        step = arrived.step
        held = int((time.perf_counter() - arrived.at) * 1e6)
        # No more than the next one takes, whatever came in.
        timings = (*step.timings, (held, answer.compute_micros))[-MAX_HOPS:]
        if hop.link is None:
            result = Result(step.step, what.reply_position, answer.body, timings)
            try:
                await hop.stream.send(encode_result(result))
            except PeerFault as fault:
                if not isinstance(fault, PeerGone):
                    self.blame[f"{hop.stream.peer} {type(fault).__name__}"] += 1
                hop.end(None)  # nobody is left to be told
            return
        onward = Step(step.session, step.step, step.position, step.reply, answer.body, timings)
        try:
            await hop.link.send(encode_step(onward))
        except PeerFault as fault:
            self.blame[f"{hop.link.peer} {type(fault).__name__}"] += 1
            notice = replace(Failed.of(fault, step.step, hop.link.peer), code="cannot_push")
            await _tell(hop, notice)


def _draining() -> Draining:
    return Draining("this node is leaving the swarm")


def _leaving() -> PeerGone:
    return PeerGone("this node is leaving the swarm")


async def _tell(hop: _Hop, failed: Failed) -> None:
    """Tell the client, if it is still there."""
    try:
        await hop.stream.send(encode_failed(failed))
    except PeerFault:
        hop.end(None)
