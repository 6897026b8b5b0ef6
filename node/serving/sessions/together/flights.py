"""Steps that need no task of their session: decided on arrival, computed with others, passed on after it.

The usual step continues its session's cache by one position, or by a few as drafts that are verified do, and
nothing else of the session waits or is under way.  It may begin below the cache's length, where drafts before
it were wrong.  Such a step goes to the engine at once.  When its batch has an answer, `Outbox.flush` sends
the outputs of all sessions of the batch.  Everything else, and whatever goes wrong here, is for the session's
worker: the step waits in the inbox, or its answer does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import outcome
import trio

from node.serving.cache_budget import CacheAdmission
from node.serving.executor.engine import Answer, Engine, StepOwner, joins
from node.serving.sessions.hop_session import HopSession
from node.serving.sessions.inbox import Arrived, Landed
from node.serving.sessions.state import Compute, State
from node.serving.sessions.step_room import SMALL_STEP
from node.serving.sessions.together.onward import message_of
from routing.names import PeerId
from tensor_codec.errors import Refused
from tensor_codec.messages.contract import StepRange
from tensor_codec.messages.session import Result, Step


class Worker(Protocol):
    """The part of `node.serving.sessions.worker.HopWorker` that a step without its task needs."""

    hop: HopSession
    engine: Engine
    admission: CacheAdmission

    def cut(self, length: int) -> None:
        """See there."""

    def keep(self, decision: Compute, answer: Answer, *, whole: bool) -> Answer:
        """See there."""


@dataclass(slots=True, eq=False)
class Flight:
    """A step under way without a task.

    whole: see `Engine.step`.  number: of the engine's job.  answer: once there is one.  over: nothing more is
    to be done.
    """

    worker: Worker
    arrived: Arrived
    decision: Compute
    whole: bool
    number: int = field(default=-1, init=False)
    answer: Answer | None = field(default=None, init=False)
    over: bool = field(default=False, init=False)

    def begin(self, owner: StepOwner) -> None:
        """Have the engine compute it.  Raises TooManyStreams."""
        hop, step, what = self.worker.hop, self.arrived.step, self.decision.what
        hop.take_off(self)
        self.number = self.worker.engine.begin(
            owner, hop.contract, what, step.body, self.answered, whole=self.whole
        )

    def interrupt(self) -> None:
        """The route changes: give the step up, where the cache can be cut to its position again."""
        if self.worker.hop.state.can_cut:
            self.cancel()
            self.worker.hop.state.dropped(self.decision)
            self.worker.hop.landed(None)

    def cancel(self) -> None:
        """The session is over."""
        self.over = True
        self.worker.engine.withdraw(self.number)

    def answered(self, result: outcome.Outcome[Answer]) -> None:
        """The engine's answer: part of the session from now on, and on its way with those of its batch."""
        if self.over:
            return
        worker, hop, arrived = self.worker, self.worker.hop, self.arrived
        if isinstance(result, outcome.Error):
            self.over = True
            return hop.landed(Landed(arrived, self.decision, result))
        answer = self.answer = worker.keep(self.decision, result.unwrap(), whole=self.whole)
        if arrived.step.epoch != hop.route.epoch:
            return self.sent(done=True)
        message, outbox = message_of(hop, arrived, self.decision.what, answer), hop.outlet.links.outbox
        if isinstance(message, Result):
            gather = hop.stream.peer, b"" if hop.route.relay else hop.route.gather
            outbox.add_result(gather, hop.contract.session, hop.stream, message, self)
        elif (link := hop.outlet.shared) is not None:
            outbox.add_step(link, message, self)
        else:
            self.sent(done=False)

    def sent(self, *, done: bool) -> None:
        """See `outbox.Sent`: what needs a wait is for the session's worker."""
        assert self.answer is not None
        if not self.over:
            self.over = True
            left = None if done else Landed(self.arrived, self.decision, outcome.Value(self.answer))
            self.worker.hop.landed(left)


def take_off(worker: Worker, step: Step, sender: PeerId, speed: int = 0) -> bool:
    """Begin a step without its session's task; False where that cannot be, and nothing was done."""
    hop = worker.hop
    if not (tokens := _usual_tokens(hop, worker.engine, step)):
        return False
    if hop.cache.length > step.position:
        worker.cut(step.position)
    if not worker.admission.grow_now(hop.key, hop.guests.virtual_tokens + step.position + tokens):
        return False
    what = StepRange(step.position, tokens, step.reply, step.rope_length)
    decision = hop.state.receive(step.step, what)
    assert isinstance(decision, Compute), "a usual step is a new one"
    arrived = Arrived(step, sender, trio.current_time(), speed)
    owner = StepOwner(hop.stream.peer, hop.stream.prefix, hop.cache, hop.guests.adapter)
    try:
        Flight(worker, arrived, decision, whole=hop.route.sends_on).begin(owner)
    except Refused as refusal:
        hop.end(refusal)
    return True


def _usual_tokens(hop: HopSession, engine: Engine, step: Step) -> int:
    """The positions of a step that continues its session while nothing else is to be done; else 0."""
    state, position, contract = hop.state, step.position, hop.contract
    tokens = 1 if len(step.body) == contract.row_bytes else _drafts(hop, engine, step)
    is_usual = (
        hop.inbox.is_empty
        and not hop.busy
        and state.state is State.OPEN
        and state.last is not None  # the worker has done the session's first step
        and state.last[0] < step.step
        and (state.length == position or (state.can_cut and 0 < position < state.length))
        and state.length == hop.cache.length
        and state.ordered is None
        and step.epoch == hop.route.epoch
        and not (step.bulk or step.rows or step.packed or hop.route.pack or step.reply == "replay")
        and position + tokens <= contract.max_length
        and hop.guests.prompts_at(position) is None
    )
    return tokens if is_usual else 0


def _drafts(hop: HopSession, engine: Engine, step: Step) -> int:
    """The positions of a step of several that decode batches take; 0: it is for the worker.

    The worker counts the bytes of a step that is not small.
    """
    tokens, rest = divmod(len(step.body), hop.contract.row_bytes)
    if rest or len(step.body) > SMALL_STEP or not joins(engine, hop.contract.batch, tokens, step.position):
        return 0
    return tokens
