"""One session at this node: what waits for its turn, and the worker that takes it step by step.

A step goes inbox -> `session` (what to do) -> `engine` (compute) -> journal -> next hop or client.
The client's orders come first: after a Relink steps of older epochs are forgotten, and nothing is
computed until Resume has said how much of the cache stays good and what is to be sent again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import trio

from node.model.blocks.kv_pages import SpanCache
from node.runtime.faults import Faults
from node.serving.cache_budget import CacheAdmission
from node.serving.executor.engine import Answer, Engine, NotFinite
from node.serving.sessions.hop_session import HopSession
from node.serving.sessions.inbox import Arrived
from node.serving.sessions.state import Compute
from routing.names import PeerId
from tensor_codec.codecs import recode
from tensor_codec.errors import (
    BadResult,
    CacheFull,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
)
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal, JournalBudget
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import MAX_HOPS, Contract, StepRange
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.session import (
    Close,
    Here,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    Where,
    decode_from_client,
    encode_here,
    encode_relinked,
    encode_result,
    encode_step,
)

REPLAY_TOKENS = 256  # positions of one part of a replay, at the most
REPLAY_BYTES = 1 << 20  # and bytes of it: parts should be small enough to be worked on one behind the other


@dataclass(slots=True)
class HopWorker:
    """What serves one session.  room: of all caches; journals: of all sessions; faults: of peers, counted."""

    hop: HopSession
    engine: Engine
    room: CacheAdmission
    journals: JournalBudget
    faults: Faults
    limits: Limits

    async def run(self) -> None:
        """Serve until the client, a deadline or a fault ends the session; then tell the client."""
        hop = self.hop
        with hop.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                await self._work()
        hop.state.close()
        if hop.over is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await tell(hop, Failed.of(hop.over, peer=hop.over.peer))

    async def lead_to_successor(self) -> bool:
        """Whether there is a way to the next hop, where the session has one."""
        hop = self.hop
        self._keep_journal()
        successor = PeerId(hop.successor) if hop.successor is not None else None
        with trio.move_on_after(self.limits.successor_seconds):
            try:
                await hop.outlet.lead_to(successor)
            except PeerFault as fault:
                self.faults.add(str(successor), fault)
                return False
        return hop.outlet.link is not None

    def _keep_journal(self) -> None:
        hop, contract = self.hop, self.hop.contract
        if hop.journal is not None and not hop.sends_on:
            self.journals.close(contract.session)
            hop.journal = None
        if hop.journal is None and hop.sends_on:
            hop.journal = self.journals.open(
                contract.session, contract.batch, contract.row_bytes, contract.max_length
            )

    def end_for(self, fault: PeerFault, sender: str) -> None:
        """End the session for what `sender` did, and tell the client who it was if not itself."""
        self.faults.add(sender, fault)
        if sender != self.hop.stream.peer:
            fault.peer = sender
        self.hop.end(fault)

    async def _read(self) -> None:
        """Take what the client sends."""
        hop = self.hop
        try:
            while (frame := await hop.stream.receive()) is not None:
                message = decode_from_client(frame, hop.contract)
                if isinstance(message, Close):
                    break
                await self._hear(message)
        except PeerGone:
            pass  # the client's going away ends its session; nobody is left to be told
        except PeerFault as fault:
            self.end_for(fault, hop.stream.peer)
        hop.end(None)

    async def _hear(self, message: Step | Relink | Resume | Where) -> None:
        hop = self.hop
        match message:
            case Step():
                if hop.predecessor is None:
                    hop.offer(message, hop.stream.peer)
                elif message.epoch == hop.epoch:
                    raise RemoteProtocolError("a step from the client, where another hop sends them")
            case Relink():
                hop.relink(message)
            case Resume():
                if message.epoch == hop.epoch:
                    hop.inbox.order(message)
            case Where():
                step = hop.state.last[0] if hop.state.last is not None else None
                await tell(hop, encode_here(Here(hop.state.length, len(hop.inbox) + hop.busy, step)))

    async def _work(self) -> None:
        """Do one thing after another; returns when a deadline has passed or the session broke."""
        hop, limits = self.hop, self.limits
        life = limits.session_life_seconds + limits.session_position_seconds * hop.contract.max_length
        life_ends = trio.current_time() + life
        patience = limits.session_first_step_seconds
        while True:
            hop.active_at = trio.current_time()
            item = None
            with trio.move_on_at(min(life_ends, trio.current_time() + patience)):
                item = await hop.inbox.take()
            if item is None:
                old = trio.current_time() >= life_ends
                why = f"older than {life:g} s" if old else f"idle for {patience} s"
                return hop.end(PeerGone(f"the session was {why}"))
            hop.busy = True
            sender = item.sender if isinstance(item, Arrived) else hop.stream.peer
            try:
                await self._do(item)
            except (Refused, NotFinite) as own:
                return hop.end(own)
            except PeerFault as fault:
                return self.end_for(fault, sender)
            hop.busy = False
            patience = limits.session_first_step_seconds if hop.inbox.held else limits.session_idle_seconds

    async def _do(self, item: Arrived | Relink | Resume) -> None:
        match item:
            case Arrived():
                await self._step(item)
            case Relink():
                await self._relink(item)
            case Resume():
                with self.hop.interruptible():
                    await self._resume(item)

    async def _relink(self, order: Relink) -> None:
        """Turn to the new successor and say where we stand."""
        hop, state = self.hop, self.hop.state
        await self._recode()
        push = await self.lead_to_successor()
        if hop.journal is not None:
            hop.journal.pinned = True  # until Resume, which counts on what is said now, has been followed
        kept = hop.journal.start if hop.journal is not None and hop.journal.stop == state.length else None
        answer = Relinked(
            order.epoch,
            push,
            state.length,
            state.length if kept is None else kept,
            state.last[0] if state.last is not None else None,
            state.can_cut,
            order.codec,
        )
        if order.epoch == hop.epoch:
            await tell(hop, encode_relinked(answer))

    async def _recode(self) -> None:
        """Bring what is kept into the codec that is agreed on now."""
        hop, contract = self.hop, self.hop.contract
        before, hop.kept_codec = hop.kept_codec, contract.codec
        if before == contract.codec:
            return
        if hop.answer is not None:
            hop.answer = replace(hop.answer, body=recode(hop.answer.body, before, contract.codec))
        if (old := hop.journal) is None:
            return
        old.pinned = True  # it is being read
        hop.journal = Journal(contract.batch, contract.row_bytes, contract.max_length)
        hop.journal.pinned = True
        for start, stop, rope_length in old.parts(old.start, old.stop, REPLAY_TOKENS):
            body = recode(old.read(start, stop), before, contract.codec)
            hop.journal.append(start, stop - start, body, rope_length)
            await trio.lowlevel.checkpoint()  # a long one takes milliseconds
        self.journals.replace(contract.session, hop.journal)

    async def _resume(self, order: Resume) -> None:
        """Go on in a new epoch: cut, and send again what the successor lacks.

        Raises RemoteProtocolError.
        """
        hop = self.hop
        hop.state.resume(order.length)
        self._cut(order.length)
        hop.has = order.has
        try:
            await self._replay(order)
        finally:
            if hop.journal is not None:
                hop.journal.pinned = False
        if order.epoch == hop.epoch:
            hop.inbox.held = False

    async def _replay(self, order: Resume) -> None:
        hop = self.hop
        if order.has < order.stop:
            if hop.journal is None or not hop.journal.start <= order.has < order.stop <= hop.journal.stop:
                raise RemoteProtocolError(f"outputs of {order.has}:{order.stop} are not here")
            part = max(1, min(REPLAY_TOKENS, hop.contract.max_tokens, REPLAY_BYTES // hop.contract.row_bytes))
            for start, stop, rope_length in hop.journal.parts(order.has, order.stop, part):
                await self._send_replay(start, hop.journal.read(start, stop), (), rope_length)

    def _cut(self, length: int) -> None:
        """Forget positions from `length` on, those too that a step computes which was interrupted."""
        hop = self.hop
        self.engine.before_next(partial(_cut_cache, hop.cache, length))
        self.room.shrink(hop.contract.session, length)
        if hop.journal is not None:
            self.journals.cut(hop.journal, length)

    async def _step(self, arrived: Arrived) -> None:
        """Compute a step, or find its stored answer, and pass it on.

        Raises Refused, NotFinite, and PeerFault for what is the fault of the step's sender.
        """
        step, hop, contract = arrived.step, self.hop, self.hop.contract  # a Relink may change it meanwhile
        tokens = len(step.body) // contract.row_bytes
        what = StepRange(step.position, tokens, step.reply, step.rope_length)
        replay = step.reply == "replay"
        decision = hop.state.replay(what) if replay else hop.state.receive(step.step, what)
        answer = hop.answer
        if isinstance(decision, Compute):
            answer = await self._compute(step, decision, contract)
        if answer is not None and step.epoch == hop.epoch:
            with hop.interruptible():
                await self._pass_on(arrived, what, answer)

    async def _compute(self, step: Step, decision: Compute, contract: Contract) -> Answer | None:
        """The answer, part of the session from now on; None where it was refused or interrupted."""
        hop, what = self.hop, decision.what
        answer: Answer | None = None
        whole = False
        try:
            with hop.interruptible() if hop.state.can_cut else trio.CancelScope():
                await self._make_room(what)
                whole = hop.sends_on  # now: a Relink may change it while this is computed
                answer = await self.engine.step(
                    hop.stream.peer, contract, hop.cache, what, step.body, whole=whole
                )
        except CacheFull as full:
            hop.state.dropped(decision)
            await tell(hop, Failed.of(full, step.step))
            return None
        except BadResult as bad:
            where = f"step {step.step}, blocks {hop.contract.start}:{hop.contract.stop}"
            raise type(bad)(f"{where}: {bad}") from None
        if answer is None:
            hop.state.dropped(decision)
            return None
        hop.state.computed(decision)
        if hop.journal is not None and whole:
            self.journals.append(hop.journal, what.position, what.tokens, answer.body, what.rope_length)
        if decision.step is not None:
            hop.answer = answer
        return answer

    async def _make_room(self, what: StepRange) -> None:
        """Have the cache cut to a step's position, and get pages for the step.  Raises CacheFull."""
        hop, session = self.hop, self.hop.contract.session
        if hop.cache.length > what.position:
            self._cut(what.position)
        await self.room.grow(session, what.position + what.tokens)

    async def _pass_on(self, arrived: Arrived, what: StepRange, answer: Answer) -> None:
        step, hop = arrived.step, self.hop
        held = int((trio.current_time() - arrived.at) * 1e6)
        # No more than the next one takes, whatever came in.
        timings = (*step.timings, (held, answer.compute_micros))[-MAX_HOPS:]
        if step.reply == "replay":
            await self._pass_on_replay(what, answer, timings)
        elif hop.successor is None:
            position = what.position if hop.relay else what.reply_position
            await self._answer(Result(step.step, position, answer.body, timings, hop.epoch))
        else:
            onward = replace(step, body=answer.body, timings=timings)
            await self._push(onward, bulk=step.bulk)

    async def _pass_on_replay(
        self, what: StepRange, answer: Answer, timings: tuple[tuple[int, int], ...]
    ) -> None:
        """What of a replay the successor has not got."""
        hop = self.hop
        stop = what.position + what.tokens
        start = max(what.position, hop.has)
        if not hop.sends_on or start >= stop:
            return
        # Out of the answer: the journal may have had no room for it.
        body = _from_position(answer.body, hop.contract, start - what.position)
        await self._send_replay(start, body, timings, what.rope_length)

    async def _send_replay(
        self, start: int, body: Buffer, timings: tuple[tuple[int, int], ...], rope_length: int
    ) -> None:
        hop, session = self.hop, self.hop.contract.session
        if hop.successor is not None:
            step = Step(session, 0, start, "replay", body, timings, hop.epoch, True, rope_length)
            await self._push(step, bulk=True)
        else:
            await self._answer(Result(0, start, body, timings, hop.epoch, True, rope_length))

    async def _answer(self, result: Result) -> None:
        hop = self.hop
        try:
            await hop.stream.send(encode_result(result))
        except PeerFault as fault:
            if not isinstance(fault, PeerGone):
                self.faults.add(hop.stream.peer, fault)
            hop.end(None)  # nobody is left to be told

    async def _push(self, step: Step, *, bulk: bool) -> None:
        hop = self.hop
        peer = hop.successor
        try:
            if hop.outlet.link is None:
                raise PeerGone(f"there is no way to {peer}")
            await hop.outlet.send(encode_step(step), bulk=bulk)
        except PeerFault as fault:
            self.faults.add(str(peer), fault)
            notice = replace(Failed.of(fault, step.step, peer), code="cannot_push")
            await tell(hop, notice)


def _from_position(body: Buffer, contract: Contract, position: int) -> Buffer:
    """What comes from `position` on of encoded hidden states [batch, tokens, hidden]."""
    if not position:
        return body
    size = len(body) // contract.batch
    skipped = position * contract.row_bytes // contract.batch
    whole = memoryview(body)
    return b"".join(whole[row * size + skipped : (row + 1) * size] for row in range(contract.batch))


def _cut_cache(cache: SpanCache, length: int) -> None:
    if cache.length > length:
        cache.cut(length)


async def tell(hop: HopSession, message: Failed | list[Buffer]) -> None:
    """Tell the client, if it is still there."""
    try:
        await hop.stream.send(encode_failed(message) if isinstance(message, Failed) else message)
    except PeerFault:
        hop.end(None)
