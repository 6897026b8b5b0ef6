"""One session: hidden states in at the first block, out of the last, also after faults of hops.

The client opens a stream to every hop.  It sends steps to the first one; the hops push them on
among themselves and the last one answers.  The streams to the hops between carry orders and faults.
Where two hops cannot reach each other, the client carries hidden states between them.

When a hop fails, `collect` (or the next `submit`) has the route repaired (`client.session.route`) and
goes on: steps without an answer are sent again, and a hop that has computed one answers from memory.
The session's core (`client.session.core`) decides; this module has the caller's tensors, deadlines and
waits.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import trio
from numpy.typing import NDArray
from torch import Tensor

from client.chains.chooser import SwarmAccess
from client.session.actions import Closed, Late, Lost, Moving, Reordering, StepsGivenUp
from client.session.core import ClientSession, State, is_undisturbed
from client.session.inputs import Feed, check_input
from client.session.repair.contracts import Contracts
from client.session.route import Route, is_free
from client.session.route_state import RouteState
from client.session.standby.keeping import keep_standbys
from client.session.steps import Pending, StepTimes
from client.session.terms import Terms
from client.session.trace import Trace
from node.runtime.compute_thread import Runner
from routing.chains.hops import Chain, Hop
from tensor_codec.codecs import WIRE_DTYPES, PackedBody, decode_hidden, encode_hidden, pack
from tensor_codec.errors import BadResult, PeerFault, PeerGone, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import (
    SESSION_ID_BYTES,
    Contract,
    Reply,
    StepRange,
    are_packed,
    vector_bytes,
)
from tensor_codec.messages.session import Result
from tensor_codec.rows.float_rows import row_bytes, row_values
from tensor_codec.rows.row_order import row_order

LONG_PART = 2048  # positions: a caller's wait for one step suffices to fill caches with this number


@dataclass(slots=True, eq=False, weakref_slot=True)
class Session:
    """A session.  Made by `open_session`; its tasks run in the swarm's nursery until `close`.

    give_up_seconds: the default time of one call, repairs included.
    times: of the last step.  max_step_tokens: positions that one step may carry; longer inputs go in chunks.
    ahead: the step of `send_ahead` until its answer is taken.
    """

    terms: Terms
    swarm: SwarmAccess
    nursery: trio.Nursery
    compute: Runner
    limits: Limits
    give_up_seconds: float = 120.0
    trace: Trace = field(default_factory=Trace)
    times: StepTimes | None = None
    max_step_tokens: int = field(init=False)
    core: ClientSession = field(init=False)
    route: Route = field(init=False)
    _journal: Journal = field(init=False)
    ahead: Pending | None = None

    def __post_init__(self) -> None:
        terms = self.terms
        contract = Contract(
            session=secrets.token_bytes(SESSION_ID_BYTES),
            start=terms.run.start,
            stop=terms.run.stop,
            batch=terms.batch,
            max_length=terms.max_length,
            hidden=terms.hidden,
            codec=terms.kept_codec,
            max_step_tokens=self.limits.step_tokens(vector_bytes(terms.kept_codec, terms.hidden)),
        )
        self.max_step_tokens = contract.max_tokens
        self._journal = Journal(terms.batch, contract.row_bytes, terms.max_length)
        state = RouteState(terms, self.swarm, Contracts(terms.codec, contract))
        self.core = ClientSession(terms, self.swarm, state)
        self.route = Route(self.core, self.swarm, self._journal, self.nursery, self.limits, self.trace)

    @property
    def length(self) -> int:
        """Positions in the hops' caches, by the answers so far."""
        return self.core.steps.length

    @property
    def chain(self) -> Chain:
        """The hops that it runs along now."""
        return self.core.route.chain

    @property
    def relay(self) -> bool:
        """Whether the client carries hidden states between some of the hops."""
        return any(hop.relay for hop in self.core.route.hops)

    @property
    def working_hops(self) -> tuple[Hop, ...]:
        """The hops without a known fault."""
        return tuple([hop.hop for hop in self.core.route.hops if hop.alive and not hop.refused])

    def encode(self, hidden: Tensor) -> Buffer | PackedBody:
        """Hidden states [batch, tokens, hidden] as `submit` takes them.  Raises BadResult for NaN.

        They are narrowed to the codec at the time of sending, since the hops may be others by then.  Where
        they go in int8o, what is kept has lost as much already: a replay sends what was sent.
        """
        kept, now = self.terms.kept_codec, self.core.route.contracts.current.codec
        if now != kept:
            encode_hidden(hidden, now)  # raises for a value beyond its range
        body = encode_hidden(hidden, kept)
        pack_from = self.core.route.pack
        if pack_from and are_packed(hidden.shape[0] * hidden.shape[1], pack_from):
            return pack(body, kept, hidden.shape[2])
        return body

    def decode(self, result: Result) -> Tensor:
        """The hidden states [batch, tokens, hidden] of an answer, in the codec's dtype.  Raises BadResult."""
        try:
            return decode_hidden(result.body, self.core.route.contracts.in_epoch(result.epoch))
        except BadResult as error:
            error.about(self.chain.hops[-1].peer)
            raise

    def distrust(self, error: BadResult) -> None:
        """The last hop sent a wrong answer (see `decode`): replace it."""
        for hop in self.core.route.hops:
            if hop.hop.peer == error.peer:
                self.route.tell(Lost(hop, error))

    async def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rows: Sequence[int] | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """Run hidden states [batch, tokens, hidden] through the chain.

        position: of the first token; default: after the cached positions; a lower one cuts the caches there.
        reply: positions to get back ("all", "last", or "none": returns None).
        seconds: for the step, repairs included; default: `give_up_seconds`, and once more for every
        LONG_PART of positions while caches are filled again.
        rows: an item for each row; before the step row i of the cached positions becomes the former row
        rows[i] (transformers' `reorder_cache`).  Rows may be named more than once or not at all.  A step with
        `rows` that raises has left the rows, and `length`, as they were before it, but for a cut.
        rope_length: positions of the whole prompt, where it comes in several steps and the model's rotary
        angles depend on its length; default: up to the end of this step.
        Returns hidden states [batch, tokens or 1, hidden] after the session's last block, in the codec's
        dtype: before the final norm, where that is the model's last one.  A step of 0 tokens is answered
        here, with [batch, 0, hidden]: nothing is sent, and the caches stay as they are.
        A hop that fails is replaced, and the step goes on.  Raises ValueError for an input that no server
        would take; NoChain, PeerFault or Refused when the time is up; the session may be used again, from
        `length` on.
        """
        check_input(self.terms, hidden, position, reply, seconds)
        begin, tokens = self.length if position is None else int(position), int(hidden.shape[1])
        if not tokens:
            if rows is not None:
                raise ValueError("a step of 0 tokens does nothing, it cannot reorder rows")
            return _answer_to_nothing(self, reply)
        deadline, until = deadlines(self.give_up_seconds, begin, seconds)
        body = await self.compute.run(self.encode, hidden)
        whole = begin + tokens if rope_length is None else rope_length
        pending = await self.submit(
            body, begin, tokens, reply, deadline=deadline, rope_length=whole, rows=rows
        )
        result = await self.collect(pending, deadline=deadline, until=until)
        if reply == "none":
            return None
        try:
            return await _decoded(self, [result])
        except BaseException:
            if pending.what.rows and self.length == begin + tokens:
                self.core.steps.revoke(pending)
                self.give_up_steps()
            raise

    async def prefill(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """Run any number of positions through the chain, in chunks: several hops work at once.

        Everything is as in `step`, which takes `max_step_tokens` positions at most; `seconds` is for all
        of it, and the default grows with its length while answers come.  After an error the caches hold
        `length` positions, perhaps a part of these.
        """
        check_input(self.terms, hidden, position, reply, seconds)
        begin, tokens = self.length if position is None else int(position), int(hidden.shape[1])
        if not tokens:
            return _answer_to_nothing(self, reply)
        stop = begin + tokens
        if stop > self.terms.max_length:
            raise ValueError(
                f"{tokens} positions from {begin} on, {self.terms.max_length} in all are allowed"
            )
        deadline, until = deadlines(self.give_up_seconds, stop, seconds)
        whole = stop if rope_length is None else rope_length
        results: list[Result] = []

        async def body_of(first: int, last: int) -> Buffer | PackedBody:
            return await self.compute.run(self.encode, hidden[:, first - begin : last - begin])

        feed = Feed(self, reply, deadline, until, self.give_up_seconds, whole, self.terms.batch)
        await feed.run(begin, stop, body_of, lambda _, result: results.append(result))
        return None if reply == "none" else await _decoded(self, results if reply == "all" else results[-1:])

    async def submit(
        self,
        body: Buffer | PackedBody,
        position: int,
        tokens: int,
        reply: Reply,
        *,
        deadline: float | None = None,
        rope_length: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Pending:
        """Send one encoded step; `collect` waits for the answer.

        Several steps may be on their way (`Limits.max_steps_in_flight`): hops then work on different steps
        at one time.  rope_length: see `StepRange`.  rows: see `step`; only while no other step is on its way.
        Raises as `step`.
        """
        deadline = trio.current_time() + self.give_up_seconds if deadline is None else deadline
        if self.ahead is not None:
            await self.collect(self.ahead, deadline=deadline)
        if not 0 < tokens <= self.max_step_tokens or position + tokens > self.terms.max_length:
            raise ValueError(
                f"{tokens} positions from {position} on, {self.max_step_tokens} a step and"
                f" {self.terms.max_length} in all are allowed"
            )
        if not 0 <= rope_length <= self.terms.max_length:
            raise ValueError(f"a rope_length of {rope_length}, 0 to {self.terms.max_length} are allowed")
        if self.terms.rope is None or rope_length <= position + 1:
            rope_length = 0  # the angles do not depend on it
        order = () if rows is None else _order_of(rows, self.terms, position, len(self.core.steps.pending))
        if order and not self.core.route.reorders:
            self.route.tell(Reordering())
        if not self.core.steps.pending:
            if position > self.core.steps.length:
                raise ValueError(f"a step from position {position} on, the caches hold {self.length}")
            await _before_step(self, position, deadline)
        elif position != self._journal.stop:
            raise ValueError(
                f"a step from position {position} on, others up to {self._journal.stop} are on their way"
            )
        if order:
            self._journal.reorder(position, self.core.steps.next_step, order)
        return await self._send(StepRange(position, tokens, reply, rope_length, order), body)

    async def send_ahead(self, body: Buffer | PackedBody, position: int, tokens: int = 1) -> bool:
        """Send a step of a few positions before anybody asks for its answer; whether it was sent.

        It is not where something has to be done before, for which `submit` waits: a repair, a move, or a full
        stream.  `take` of `ahead` gives its answer, of all its positions; a `submit` before that drops the
        answer, and the positions stay in the caches.  A position below `length` cuts the caches there.
        """
        core = self.core
        if position + tokens > self.terms.max_length or core.route.cannot_cut or not is_free(self.route):
            return False
        if tokens > self.max_step_tokens or not is_undisturbed(core, position, trio.current_time()):
            return False
        if position < core.steps.length:
            core.steps.go_back(position)
            self._journal.cut(position)
        self.ahead = await self._send(StepRange(position, tokens, "last" if tokens == 1 else "all"), body)
        return True

    async def _send(self, what: StepRange, body: Buffer | PackedBody) -> Pending:
        """Number a step, and send it if the route is sound."""
        packed: Buffer | None = None
        if isinstance(body, PackedBody):
            packed, body = body.wire, body.kept
        self._journal.append(what.position, what.tokens, body, what.rope_length)
        pending, send = self.core.submit(what, body, trio.current_time(), packed)
        try:
            if send is not None:
                with contextlib.suppress(PeerFault):  # the core knows; `collect` repairs it
                    await self.route.send(send)
        except BaseException:
            self.give_up_steps()  # nobody will collect it
            raise
        return pending

    async def collect(
        self, pending: Pending, *, deadline: float | None = None, until: float | None = None
    ) -> Result:
        """The answer to a submitted step.  Raises as `step`.

        until: the latest deadline, which moves while a replay before the step makes progress.
        """
        result = await self.take(pending, deadline=deadline, until=until)
        self.measure(pending)
        return result

    async def take(
        self, pending: Pending, *, deadline: float | None = None, until: float | None = None
    ) -> Result:
        """As `collect`; the caller gives the step to `measure` when it has done what is more urgent."""
        deadline = trio.current_time() + self.give_up_seconds if deadline is None else deadline
        pending.wait(trio.current_time())
        try:
            while pending.result is None:
                if until is not None:
                    deadline = max(deadline, min(pending.watch.refilled_at + self.give_up_seconds, until))
                if self.core.state is State.CLOSED:
                    raise PeerGone("the session was closed")
                if pending.given_up:
                    raise SlowPeer(f"step {pending.step} was given up with one before it")
                if self.core.state is not State.SOUND:
                    await self.route.repair(deadline)
                    continue
                await self._wait(pending, deadline)
        except BaseException:
            self.give_up_steps()
            raise
        if pending is self.ahead:
            self.ahead = None
        self.core.take(pending, pending.result)
        return pending.result

    def measure(self, pending: Pending) -> None:
        """Take the measurements of a step whose answer was taken, and note them in the trace."""
        what, result = pending.what, pending.result
        assert result is not None, "measured before its answer was taken"
        self.times, action = self.core.measure(pending, result, trio.current_time())
        if action is not None:
            self.route.apply([action])
        self.trace.add(
            "step",
            step=pending.step,
            position=what.position,
            tokens=what.tokens,
            seconds=self.times.total,
            hops=self.times.hops,
            sent=what.tokens * self.route.contract.row_bytes,
            received=len(result.body),
        )

    def give_up_steps(self) -> None:
        """Give up the steps on their way: their late answers must not meet later steps."""
        self.ahead = None
        for step in self.core.steps.pending:
            self._journal.take_back_orders(step)
        self.route.tell(StepsGivenUp())

    def close(self) -> None:
        """End the session: its tasks say goodbye to the hops and close the streams."""
        self.route.tell(Closed())

    async def aclose(self) -> None:
        """End the session, and wait until the streams are closed."""
        self.close()
        await self.route.wait_closed()

    async def _wait(self, pending: Pending, deadline: float) -> None:
        """Wait for news, or for the time to look after the step.  Raises SlowPeer at the deadline."""
        news = self.route.news
        first = pending is next(iter(self.core.steps.pending.values()), None)
        with trio.move_on_at(min(deadline, pending.watch.look_at if first else math.inf)):
            await news.wait()
            return
        now = trio.current_time()
        if now >= deadline:
            raise SlowPeer(f"no answer to step {pending.step} by the caller's deadline")
        await self.route.perform(self.core.receive(Late(pending), now))


def encoded_row(session: Session, row: NDArray[np.float32]) -> Buffer | PackedBody:
    """As `Session.encode`, of one hidden state [hidden].  Raises BadResult for NaN."""
    route, kept = session.core.route, session.terms.kept_codec
    if are_packed(1, route.pack):
        return session.encode(torch.from_numpy(row).view(1, 1, -1))
    if (now := route.contracts.current.codec) != kept:
        row_bytes(row, now)  # raises for a value beyond its range
    return row_bytes(row, kept)


def encoded_rows(session: Session, rows: Sequence[NDArray[np.float32]]) -> Buffer | PackedBody:
    """As `encoded_row`, of a few hidden states [hidden], one after the other."""
    if are_packed(len(rows), session.core.route.pack):
        return session.encode(torch.from_numpy(np.stack(rows))[None])
    return encoded_row(session, np.concatenate(rows))


def decoded_rows(session: Session, result: Result) -> Tensor:
    """The hidden states float32 [1, tokens, hidden] of an answer of a few positions.  Raises BadResult."""
    try:
        values = row_values(result.body, session.core.route.contracts.in_epoch(result.epoch).codec)
    except BadResult as error:
        error.about(session.chain.hops[-1].peer)
        raise
    return torch.from_numpy(values).view(1, -1, session.terms.hidden)


def _answer_to_nothing(session: Session, reply: Reply) -> Tensor | None:
    """Of an input of 0 positions.  Raises PeerGone after `close`."""
    if session.core.state is State.CLOSED:
        raise PeerGone("the session was closed")
    shape = session.terms.batch, 0, session.terms.hidden
    return None if reply == "none" else torch.empty(shape, dtype=WIRE_DTYPES[session.route.contract.codec])


async def _decoded(session: Session, results: Sequence[Result]) -> Tensor:
    """The hidden states of these answers, one after the other.  Raises BadResult."""
    try:
        parts = [await session.compute.run(session.decode, result) for result in results]
    except BadResult as error:
        session.distrust(error)
        raise
    return parts[0] if len(parts) == 1 else await session.compute.run(partial(torch.cat, dim=1), parts)


async def _before_step(session: Session, position: int, deadline: float) -> None:
    """No step is on its way: the time for repairs and for moves.  Raises as `step`."""
    core, now = session.core, trio.current_time()
    todo = core.before_step(position, now)
    session._journal.cut(position)
    if core.state is not State.SOUND:
        return await session.route.repair(deadline)
    if not core.route.refilling:
        await session.route.end_bulk()
    if todo is None and core.relocation.is_search_due(core.steps.length, len(core.route.hops), now):
        todo = core.search()
        core.relocation.searched(now, trio.current_time(), moves=todo is not None)
    if todo is not None and session.route.tell(Moving(todo.why)):
        await session.route.repair(deadline)


def deadlines(give_up_seconds: float, positions: int, seconds: float | None) -> tuple[float, float]:
    """The deadline of a call, and the latest one where it has to fill caches with so many positions.

    seconds: that the caller gives; None: `give_up_seconds`, and once more for every LONG_PART of positions.
    """
    if seconds is not None:
        return trio.current_time() + seconds, trio.current_time() + seconds
    deadline = trio.current_time() + give_up_seconds
    return deadline, deadline + give_up_seconds * (positions // LONG_PART)


def _order_of(rows: Sequence[int], terms: Terms, position: int, under_way: int) -> tuple[int, ...]:
    """The order of rows of a step, empty where every row stays.  Raises ValueError.

    under_way: steps without an answer.
    """
    order = row_order(rows, terms.batch)
    if under_way:
        raise ValueError(f"rows are reordered while no step is on its way, {under_way} are: collect them")
    return order if position else ()


async def open_session(
    terms: Terms,
    swarm: SwarmAccess,
    *,
    nursery: trio.Nursery,
    compute: Runner,
    limits: Limits,
    give_up_seconds: float = 120.0,
    deadline: float | None = None,
    trace: Trace | None = None,
) -> Session:
    """Open a session along the best chain, at all hops at once.

    nursery: where the session's tasks run until `close`.  deadline: on trio's clock.
    Raises NoChain, PeerFault, Refused when the deadline has passed.
    """
    trace = trace if trace is not None else Trace()
    session = Session(terms, swarm, nursery, compute, limits, give_up_seconds, trace)
    try:
        await session.route.repair(trio.current_time() + give_up_seconds if deadline is None else deadline)
    except BaseException:
        session.close()
        raise
    if terms.standby:
        nursery.start_soon(keep_standbys, session.route)
    return session
