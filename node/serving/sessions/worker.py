"""The worker of one session at this node: it takes steps and orders one by one.

A step goes inbox -> `state` (what to do) -> `engine` (compute) -> journal -> next hop or client.
The client's orders come first.  After a Relink steps of older epochs are forgotten, and nothing is computed
until Resume has said how much of the cache stays good and which outputs are to be sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from node.runtime.faults import Faults
from node.serving.cache_budget import CacheAdmission
from node.serving.executor.engine import AS_AGREED, Answer, Engine, NotFinite, Packing
from node.serving.executor.out_of_memory import OutOfMemory, or_refused
from node.serving.sessions.frame_rates import FrameBudget
from node.serving.sessions.hop_session import HopSession, SessionCache
from node.serving.sessions.inbox import Arrived, Landed
from node.serving.sessions.moving.standby import StandbyFeed, give_way
from node.serving.sessions.state import Compute
from node.serving.sessions.together.flights import take_off
from node.serving.sessions.together.onward import message_of, timings_of
from routing.names import PeerId
from tensor_codec.codecs import recode
from tensor_codec.errors import BadResult, CacheFull, PeerFault, PeerGone, Refused, RemoteProtocolError
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal, JournalBudget
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import REPLAY_TOKENS, Contract, StepRange, are_packed
from tensor_codec.messages.fields import Failed, encode_failed, read_message
from tensor_codec.messages.session import (
    Close,
    Feed,
    Here,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    Where,
    begins_step,
    decode_from_client,
    encode_here,
    encode_relinked,
    encode_result,
    encode_step,
    read_step,
)

_STEP = frozenset({"step"})


@dataclass(slots=True)
class HopWorker:
    """Serves one session.

    admission: to the caches of all; journals: of all; faults: of peers, counted; frames: those without work.
    """

    hop: HopSession
    engine: Engine
    admission: CacheAdmission
    journals: JournalBudget
    faults: Faults
    limits: Limits
    frames: FrameBudget

    async def run(self) -> None:
        """Serve until the client, a deadline or a fault ends the session; then tell the client."""
        hop = self.hop
        with hop.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, nursery)
                nursery.start_soon(self._work)
        hop.state.close()
        if (reason := hop.end_reason) is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await send_to_client(hop, Failed.of(reason, peer=reason.peer))

    async def connect_successor(self) -> bool:
        """Connect to the next hop, where the session has one; whether there is a connection then."""
        hop = self.hop
        _open_or_close_journal(hop, self.journals)
        successor = PeerId(hop.route.successor) if hop.route.successor is not None else None
        with trio.move_on_after(self.limits.successor_seconds):
            try:
                await hop.outlet.connect(successor)
            except PeerFault as fault:
                self.faults.add(str(successor), fault, bans=False)  # the client has chosen it
                return False
        return hop.outlet.link is not None

    def end_for(self, fault: PeerFault, sender: str) -> None:
        """End the session for a fault of `sender`; the client learns its name, if it is another peer."""
        is_client = sender == self.hop.stream.peer
        self.faults.add(sender, fault, bans=is_client)  # a client can have told two hops different things
        if not is_client:
            fault.peer = sender
        self.hop.end(fault)

    async def _read(self, nursery: trio.Nursery) -> None:
        """Receive the client's messages until it closes the session or goes away.

        nursery: of the session's tasks.
        """
        hop, taker = self.hop, partial(_take_step, self)
        try:
            while (frame := await hop.stream.receive(taker=taker)) is not None:
                message = decode_from_client(frame, hop.contract)
                if isinstance(message, Close):
                    break
                if isinstance(message, Feed):
                    await self.frames.spend("relink", hop.stream)
                    if message.epoch == hop.route.epoch:
                        feed = StandbyFeed.of(hop, message, self.limits)
                        hop.outlet.follow(feed.scope)
                        nursery.start_soon(feed.run)
                else:
                    await self._handle(message)
        except PeerGone:
            pass  # the client has gone, and its session ends
        except PeerFault as fault:
            self.end_for(fault, hop.stream.peer)
        hop.end(None)

    async def _handle(self, message: Step | Relink | Resume | Where) -> None:
        hop = self.hop
        match message:
            case Step():
                if hop.route.predecessor is None:
                    speed = hop.speed_of(message.body)
                    if not take_off(self, message, hop.stream.peer, speed):
                        hop.put(message, hop.stream.peer, speed)
                elif message.epoch == hop.route.epoch:
                    raise RemoteProtocolError("a step from the client, where another hop sends them")
                if message.epoch != hop.route.epoch:
                    await self.frames.spend("idle step", hop.stream)
            case Relink():
                await self.frames.spend("relink", hop.stream)
                hop.relink(message)
            case Resume():
                if message.epoch == hop.route.epoch:
                    hop.inbox.order(message)
                else:
                    await self.frames.spend("relink", hop.stream)
            case Where():
                await self.frames.spend("where", hop.stream)
                step = hop.state.last[0] if hop.state.last is not None else None
                here = Here(hop.state.length, len(hop.inbox) + hop.busy, step)
                await send_to_client(hop, encode_here(here))

    async def _work(self) -> None:
        """Do one thing after another until a deadline has passed or the session broke."""
        hop, limits = self.hop, self.limits
        life = limits.session_life_seconds + limits.session_position_seconds * hop.contract.max_length
        life_ends = trio.current_time() + life
        patience = limits.session_first_step_seconds
        proved = False  # the client: it lets us work
        while True:
            hop.active_at = trio.current_time()
            item = None
            while item is None:  # steps without this task move `active_at` on
                since = trio.current_time() if hop.busy else hop.active_at
                if trio.current_time() >= (until := min(life_ends, since + patience)):
                    break
                with trio.move_on_at(until):
                    item = await hop.inbox.take()
            if item is None:
                old = trio.current_time() >= life_ends
                why = f"older than {life:g} s" if old else f"idle for {patience} s"
                return hop.end(PeerGone(f"the session was {why}"))
            hop.busy = True
            sender = hop.stream.peer
            try:
                if isinstance(item, Arrived):
                    sender = item.sender
                    await self._step(item)
                    if not proved:
                        proved = True
                        self.faults.worked(hop.stream.peer)
                elif isinstance(item, Landed):
                    sender = item.arrived.sender
                    await self._land(item)
                elif isinstance(item, Relink):
                    await self._relink(item)
                else:
                    with hop.interruptible():
                        await self._resume(item)
            except (Refused, NotFinite) as own:
                return hop.end(own)
            except PeerFault as fault:
                return self.end_for(fault, sender)
            hop.busy = False
            patience = limits.session_first_step_seconds if hop.inbox.held else limits.session_idle_seconds

    async def _relink(self, order: Relink) -> None:
        """Connect to the new successor and answer with the session's progress."""
        hop, state, kept = self.hop, self.hop.state, self.hop.kept
        await _recode(hop, self.journals)
        push = await self.connect_successor()
        first_kept = state.length
        if kept.journal is not None:
            kept.journal.pinned = True  # until Resume, which counts on this answer, has been followed
            if kept.journal.stop == state.length:
                first_kept = kept.journal.start
        answer = Relinked(
            order.epoch,
            push,
            state.length,
            first_kept,
            state.last[0] if state.last is not None else state.followed,
            state.can_cut,
            order.codec,
            state.orders,
            state.last is None and state.followed is not None,
        )
        if order.epoch == hop.route.epoch:
            await send_to_client(hop, encode_relinked(answer))

    async def _resume(self, order: Resume) -> None:
        """Go on in a new epoch: cut, and send the outputs again that the successor lacks.

        Raises RemoteProtocolError.
        """
        hop = self.hop
        hop.state.resume(order.length, order.step, follows=hop.route.follows)
        if hop.state.last is None:
            hop.kept.answer = None  # of positions that are forgotten
        self.cut(order.length)
        hop.kept.successor_has = order.has
        try:
            await self._replay(order)
        finally:
            if hop.kept.journal is not None:
                hop.kept.journal.pinned = False
        if order.epoch == hop.route.epoch:
            hop.inbox.held = False

    async def _replay(self, order: Resume) -> None:
        hop = self.hop
        if order.has < order.stop:
            journal = hop.kept.journal
            if journal is None or not journal.start <= order.has < order.stop <= journal.stop:
                raise RemoteProtocolError(f"outputs of {order.has}:{order.stop} are not here")
            for start, stop, rope_length in journal.parts(order.has, order.stop, hop.contract.replay_part):
                self.engine.meters.replayed["sent"] += (stop - start) * hop.contract.batch
                await self._send_replay(start, journal.read(start, stop, order.step), (), rope_length)

    def cut(self, length: int) -> None:
        """Forget positions from `length` on, those of an interrupted step too."""
        hop = self.hop
        self.engine.before_next(partial(_cut_cache, hop.cache, length))
        self.admission.shrink(hop.key, hop.guests.virtual_tokens + length)
        if hop.kept.journal is not None:
            self.journals.cut(hop.kept.journal, length)

    async def _step(self, arrived: Arrived) -> None:
        """Compute a step, or find its stored answer, and pass it on.

        Raises Refused, NotFinite, and PeerFault for a fault of the step's sender.
        """
        step, hop, contract = arrived.step, self.hop, self.hop.contract  # a Relink may change it meanwhile
        tokens = len(step.body) // (contract.packed_row_bytes if step.packed else contract.row_bytes)
        what = StepRange(step.position, tokens, step.reply, step.rope_length, step.rows)
        replay, follows = step.reply == "replay", hop.route.follows
        if follows:
            if not replay or what.position > hop.state.length:
                return  # it has missed positions, and is filled by the repair that needs it
            with hop.interruptible():
                await give_way(self.engine)
            if step.epoch != hop.route.epoch:
                return
        decision = hop.state.replay(what, follows=follows) if replay else hop.state.receive(step.step, what)
        answer = hop.kept.answer
        if isinstance(decision, Compute):
            answer = await self._compute(step, decision, contract)
        else:
            await self.frames.spend("idle step", hop.stream)
        if answer is not None and step.epoch == hop.route.epoch:
            with hop.interruptible():
                await self._pass_on(arrived, what, answer)

    async def _compute(self, step: Step, decision: Compute, contract: Contract) -> Answer | None:
        """The answer, part of the session from now on; None where it was refused or interrupted."""
        hop, what = self.hop, decision.what
        answer: Answer | None = None
        whole, number = False, step.step if hop.route.follows else None
        try:
            with hop.interruptible() if hop.state.can_cut else trio.CancelScope():
                await self._allocate(decision)
                guests = hop.guests
                whole = hop.route.sends_on  # now: a Relink may change it while this is computed
                answer = await self.engine.step(
                    hop.stream.peer,
                    contract,
                    hop.cache,
                    what,
                    step.body,
                    whole=whole,
                    prompts=None if guests.prompts is None else guests.prompts_at(what.position),
                    prefix=hop.stream.prefix,
                    adapter=guests.adapter,
                    packing=_packing(hop, step, what) if step.packed or hop.route.pack else AS_AGREED,
                )
        except (CacheFull, BadResult) as error:
            await _failed(hop, step, decision, error)
            return None
        if answer is None:
            hop.state.dropped(decision)
            return None
        return self.keep(decision, answer, whole=whole, number=number)

    def keep(self, decision: Compute, answer: Answer, *, whole: bool, number: int | None = None) -> Answer:
        """Make an answer part of the session: the journal has it, where it is whole, and a retry finds it.

        number: of the step, where the session follows a hop as its standby.
        """
        hop, what = self.hop, decision.what
        hop.state.computed(decision)
        if (journal := hop.kept.journal) is not None and whole:
            self.journals.append(journal, what.position, what.tokens, answer.body, what.rope_length)
        if number is not None:
            hop.state.follow(number)
        if decision.step is not None:
            hop.kept.answer = replace(answer, packed=None) if answer.packed is not None else answer
        else:
            self.engine.meters.replayed["computed"] += what.tokens * hop.contract.batch
        return answer

    async def _land(self, landed: Landed) -> None:
        """Finish a step that was begun without this task.

        Raises Refused, NotFinite, and PeerFault for a fault of the step's sender.
        """
        hop, step, decision = self.hop, landed.arrived.step, landed.decision
        try:
            answer = landed.result.unwrap()
        except (CacheFull, BadResult) as error:
            return await _failed(hop, step, decision, error)
        if step.epoch == hop.route.epoch:
            with hop.interruptible():
                await self._pass_on(landed.arrived, decision.what, answer)

    async def _allocate(self, decision: Compute) -> None:
        """Have the cache cut to a step's position, get pages for the step, and have the rows ordered.

        Raises CacheFull; then the rows stay as they are.
        """
        hop, what = self.hop, decision.what
        if hop.cache.length > what.position:
            self.cut(what.position)
        await self.admission.grow(hop.key, hop.guests.virtual_tokens + what.position + what.tokens)
        if decision.reorder and decision.step is not None:
            hop.state.reordered(decision)
            self.engine.before_next(_reordering(hop, what.rows, self.limits.memory_retry_seconds))
            if hop.kept.journal is not None:
                self.journals.reorder(hop.kept.journal, what.position, decision.step, what.rows)

    async def _pass_on(self, arrived: Arrived, what: StepRange, answer: Answer) -> None:
        if arrived.step.reply == "replay":
            return await self._pass_on_replay(what, answer, timings_of(arrived, answer))
        onward = message_of(self.hop, arrived, what, answer)
        if isinstance(onward, Result):
            return await self._answer(onward)
        return await self._push(onward, bulk=arrived.step.bulk)

    async def _pass_on_replay(
        self, what: StepRange, answer: Answer, timings: tuple[tuple[int, int], ...]
    ) -> None:
        """Send on the part of a replay that the successor lacks."""
        hop = self.hop
        stop = what.position + what.tokens
        start = max(what.position, hop.kept.successor_has)
        if not hop.route.sends_on or start >= stop or hop.route.follows:
            return
        # The body is the answer's: the journal may have dropped the positions.
        body = _from_position(answer.body, hop.contract, start - what.position)
        await self._send_replay(start, body, timings, what.rope_length)

    async def _send_replay(
        self, start: int, body: Buffer, timings: tuple[tuple[int, int], ...], rope_length: int
    ) -> None:
        hop, session = self.hop, self.hop.contract.session
        if hop.route.successor is not None:
            epoch = hop.route.epoch
            step = Step(
                session, 0, start, "replay", body, timings, epoch, True, rope_length, owner=hop.key[0]
            )
            await self._push(step, bulk=True)
        else:
            await self._answer(Result(0, start, body, timings, hop.route.epoch, True, rope_length))

    async def _answer(self, result: Result) -> None:
        hop = self.hop
        try:
            await hop.stream.send(encode_result(result))
        except PeerFault as fault:
            if not isinstance(fault, PeerGone):
                self.faults.add(hop.stream.peer, fault)
            hop.end(None)  # the client has gone

    async def _push(self, step: Step, *, bulk: bool) -> None:
        hop = self.hop
        peer = hop.route.successor
        try:
            if hop.outlet.link is None:
                raise PeerGone(f"there is no connection to {peer}")
            await hop.outlet.send(encode_step(step), bulk=bulk)
        except PeerFault as fault:
            self.faults.add(str(peer), fault, bans=False)
            notice = replace(Failed.of(fault, step.step, peer), code="cannot_push")
            await send_to_client(hop, notice)


def _take_step(worker: HopWorker, frame: Buffer) -> bool:
    """Begin a step of the client that needs no task, see `FramedStream.receive`.  Raises PeerFault."""
    hop = worker.hop
    if hop.route.predecessor is not None or not begins_step(frame):
        return False
    step = read_step(read_message(frame, _STEP), hop.contract)
    return take_off(worker, step, hop.stream.peer, hop.speed_of(step.body))


def _open_or_close_journal(hop: HopSession, journals: JournalBudget) -> None:
    kept, contract, sends_on = hop.kept, hop.contract, hop.route.sends_on
    if kept.journal is not None and not sends_on:
        journals.close(hop.key)
        kept.journal = None
    if kept.journal is None and sends_on:
        kept.journal = journals.open(hop.key, contract.batch, contract.row_bytes, contract.max_length)


async def _recode(hop: HopSession, journals: JournalBudget) -> None:
    """Bring the kept outputs into the codec that is agreed on now."""
    kept, contract = hop.kept, hop.contract
    before, kept.codec = kept.codec, contract.codec
    if before == contract.codec:
        return
    if kept.answer is not None:
        kept.answer = replace(
            kept.answer, body=recode(kept.answer.body, before, contract.codec, contract.hidden)
        )
    if (old := kept.journal) is None:
        return
    old.pinned = True  # it is being read
    kept.journal = Journal(contract.batch, contract.row_bytes, contract.max_length)
    kept.journal.pinned = True
    for start, stop, rope_length in old.parts(old.start, old.stop, REPLAY_TOKENS):
        body = recode(old.read(start, stop, before=0), before, contract.codec, contract.hidden)
        kept.journal.append(start, stop - start, body, rope_length)
        old.give_back(stop)  # no session takes its journal's memory twice
        await trio.lowlevel.checkpoint()  # a long one takes milliseconds
    kept.journal.adopt_orders(old)
    journals.replace(hop.key, kept.journal)


async def _failed(hop: HopSession, step: Step, decision: Compute, error: CacheFull | BadResult) -> None:
    """A step was refused, and the session goes on.  Raises BadResult where it cannot."""
    if isinstance(error, BadResult):
        where = f"step {step.step}, blocks {hop.contract.start}:{hop.contract.stop}"
        raise type(error)(f"{where}: {error}") from None
    hop.state.dropped(decision)
    await send_to_client(hop, Failed.of(error, step.step))


def _packing(hop: HopSession, step: Step, what: StepRange) -> Packing:
    """How a step came, and how its outputs go on.  A replay goes on as exactly as it came."""
    rows, contract, route = what.tokens * hop.contract.batch, hop.contract, hop.route
    onward = route.pack and route.successor is not None and contract.packs and step.reply != "replay"
    return Packing(step.packed, onward=bool(onward) and are_packed(rows, route.pack))


def _from_position(body: Buffer, contract: Contract, position: int) -> Buffer:
    """The positions from `position` on of encoded hidden states [batch, tokens, hidden]."""
    if not position:
        return body
    size = len(body) // contract.batch
    skipped = position * contract.row_bytes // contract.batch
    whole = memoryview(body)
    return b"".join(whole[row * size + skipped : (row + 1) * size] for row in range(contract.batch))


def _reordering(hop: HopSession, rows: Sequence[int], seconds: float) -> Callable[[], None]:
    """Reorders the rows in the torch thread; where there is no memory for it, the session ends."""
    token = trio.lowlevel.current_trio_token()
    select = or_refused(hop.cache.select, "rows in another order", seconds)

    def chore() -> None:
        try:
            select(rows)
        except OutOfMemory as refused:
            token.run_sync_soon(hop.end, refused)

    return chore


def _cut_cache(cache: SessionCache, length: int) -> None:
    if cache.length > length:
        cache.cut(length)


async def send_to_client(hop: HopSession, message: Failed | list[Buffer]) -> None:
    """Send a message to the client, if it is still there."""
    try:
        await hop.stream.send(encode_failed(message) if isinstance(message, Failed) else message)
    except PeerFault:
        hop.end(None)
