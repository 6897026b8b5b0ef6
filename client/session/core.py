"""The core of a client's session: events and the time in, actions out.

A session sends steps along hops, which push them on among themselves, and survives the loss of any hop.
All decisions are made here and in the modules that this one combines: the receiver of each frame, the step
of each answer, the failure of a hop, the time to leave a hop, the agreement on a new route.
`client.session.route` has the streams and the clock: it passes events in and performs the actions.

A change of the route has five steps: `choose`, `line_up` (opens new hops, gives the others new neighbours),
`take_over` (fills each hop with missing positions), `send_again`, `end_switch`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from client.chains.avoided_peers import busy_seconds
from client.chains.chooser import Chooser
from client.session.actions import (
    Action,
    Answered,
    Ask,
    Blame,
    Closed,
    Deliver,
    Event,
    Late,
    Leave,
    Located,
    Lost,
    Move,
    Moving,
    Note,
    Observe,
    ObserveSpeeds,
    Postpone,
    Reordering,
    Repair,
    Reported,
    Send,
    StepsGivenUp,
    StopSwitching,
    Unanswered,
    fault_note,
)
from client.session.hop_state import HopState
from client.session.repair.judgement import HALF, judge
from client.session.repair.pauses import Pauses
from client.session.repair.relocation import Relocation
from client.session.repair.watchdog import Watchdog
from client.session.repair.ways import Ways
from client.session.route_state import LineUp, Refill, RouteState, cannot_reorder
from client.session.steps import Pending, StepSource, StepTimes
from client.session.terms import Terms
from routing.names import PeerId
from tensor_codec.errors import (
    LocalProtocolError,
    MessageError,
    PeerFault,
    Refused,
    SlowPeer,
)
from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import Contract, StepRange
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import Result

BULK_BYTES = 16 * 1024  # a step with more takes a stream of its own from hop to hop
# Steps of a few tokens, of which all but one are guessed, alternate with single tokens: a stream of their own
# would be opened and closed all the time.  At most so many bytes stand in front of others' single tokens.
FEW_TOKENS, FEW_BYTES = 16, 64 * 1024


class State(enum.Enum):
    """The state of a session."""

    OPENING = enum.auto()  # no route was tried yet
    SOUND = enum.auto()  # steps are sent
    BROKEN = enum.auto()  # the route must change before the next frame is sent
    SWITCHING = enum.auto()  # a new route is agreed on and filled
    CLOSED = enum.auto()


# The states that may follow each state.  A disturbed switch is BROKEN, and begins again.
NEXT: dict[State, frozenset[State]] = {
    State.OPENING: frozenset({State.SWITCHING, State.BROKEN, State.CLOSED}),
    State.SOUND: frozenset({State.BROKEN, State.CLOSED}),
    State.BROKEN: frozenset({State.SWITCHING, State.CLOSED}),
    State.SWITCHING: frozenset({State.SOUND, State.BROKEN, State.CLOSED}),
    State.CLOSED: frozenset(),
}


@dataclass(slots=True)
class Outage:
    """A time without a sound route.

    rerouted: the route has other hops now.  refilled_at: the time at which these had all positions, until
    an answer.
    """

    why: str
    since: float
    rerouted: bool = False
    refilled_at: float | None = None

    def reroute(self) -> None:
        """The route has other hops now."""
        self.rerouted = True

    def refilled(self, now: float) -> None:
        """The route is sound again."""
        if self.rerouted:
            self.refilled_at = now

    def recovered(self, now: float) -> Note:
        """An answer has come."""
        assert self.refilled_at is not None, "asked before the route was sound"
        seconds, self.rerouted = now - self.refilled_at, False
        self.refilled_at = None
        return Note("recovered", {"seconds": now - self.since, "replay_seconds": seconds})


@dataclass(slots=True, eq=False)
class ClientSession:
    """The state machine of one session at the client.  Times are the caller's clock, in seconds.

    Promises, checked by tests/unit/test_session_core.py:
      * a step is sent only while the route is sound, and again, once, after every change of the route;
      * an answer is delivered at most once, in the order and the size of its request;
      * a step that was given up never meets a later step: the route changes first;
      * no step that reorders rows is sent to a hop that cannot;
      * the epoch grows with every change of the route, and no frame of an older epoch is passed on;
      * a disturbance in the middle of a change starts another change;
      * a hop that failed serves no further route, and is blamed once;
      * of two hops of which one is at fault each gets half of the blame; a hop that reports a second
        neighbour, or a peer that it does not know, gets all of it;
      * after `Closed` nothing is sent.

    last_error: since the last answer.  outage: the last time without a sound route.
    """

    terms: Terms
    chooser: Chooser
    route: RouteState
    state: State = State.OPENING
    steps: StepSource = field(default_factory=StepSource)
    last_error: PeerFault | Refused | None = None
    outage: Outage = field(default_factory=lambda: Outage("opening", 0.0))
    pauses: Pauses = field(default_factory=Pauses)
    ways: Ways = field(default_factory=Ways)
    relocation: Relocation = field(init=False)
    watchdog: Watchdog = field(init=False)

    def __post_init__(self) -> None:
        self.relocation = Relocation(self.terms)
        self.watchdog = Watchdog(self.relocation.lost_time)

    # --- the caller's requests ---

    def before_step(self, position: int, now: float) -> Repair | Move | None:
        """No step is on its way, and the next one begins at `position`: the actions before it."""
        if self.steps.go_back(position) and position > 0 and self.route.cannot_cut:
            self._break("going back", now)  # the caches are filled again
        if self.state is not State.SOUND:
            return Repair(self.outage.why)
        for hop in self.route.hops:
            if hop.leaving:
                return Move("draining")
        if self.ways.known and self.ways.is_move_due(self.route.hops):
            self._break("a direct way is there", now)
        return None

    def search(self) -> Move | None:
        """Search for a chain whose gain pays for a move, and mark the hops to leave."""
        leave = self.relocation.hops_to_leave(
            self.route.chain, self.steps.length, self.chooser, self.route.replacement.kinds
        )
        for hop in self.route.hops:
            if hop.hop in leave:
                hop.set_leaving()
        return Move("slow") if leave else None

    def submit(
        self, what: StepRange, body: Buffer, now: float, packed: Buffer | None = None
    ) -> tuple[Pending, Send | None]:
        """A new step, and the action that sends it; None: it goes out once the route is sound again.

        packed: see `Pending`.
        """
        most = FEW_BYTES if what.position and what.tokens <= FEW_TOKENS else BULK_BYTES
        bulk = what.tokens * self.route.contracts.current.row_bytes > most
        pending = self.steps.add(what, body, bulk, now, packed)
        if self.terms.standby:
            self.route.standbys.sent(pending.step, what.position, what.tokens)
        return pending, self._send(pending, now) if self.state is State.SOUND else None

    def take(self, pending: Pending, result: Result) -> None:
        """The caller takes the answer to a step.  `measure` follows, perhaps after the next step was sent."""
        self.last_error = None
        self.steps.collected(pending)
        if self.pauses.openings or self.pauses.endings:
            self.pauses.answered()
        pending.take(alone=not self.steps.pending)
        if pending.alone and result.epoch == self.route.epoch:
            self.route.refilled()

    def measure(self, pending: Pending, result: Result, now: float) -> tuple[StepTimes, Action | None]:
        """The parts of the time of a step whose answer was taken, and the action."""
        hops = tuple([(held / 1e6, computing / 1e6) for held, computing in pending.timings + result.timings])
        times = StepTimes(pending.seconds, hops)
        if self.outage.refilled_at is not None and self.state is State.SOUND:
            return times, self.outage.recovered(now)
        if pending.what.tokens > 1:
            return times, _speeds(self.route, pending, result)
        if not pending.is_measure:
            return times, None
        self.relocation.observe(self.route.chain.hops, times, self.route.chain.expected_seconds)
        if self.terms.batch > 1 or not pending.alone:  # rows and steps wait for each other
            return times, None
        return times, Observe(self.route.chain.hops, [held for held, _ in hops], times.total)

    # --- events ---

    def receive(self, event: Event, now: float) -> list[Action]:
        """Take in an event; the actions.  Raises MessageError for a wrong answer."""
        match event:
            case Answered(hop, result):
                return self._answered(hop, result, now)
            case Located(hop, here):
                hop.answer(here)
                return []
            case Lost(hop, error, _) if self.ways.broke(hop, error):
                return [*self._break(str(error), now), StopSwitching()]
            case Lost(hop, error, blame):
                _confirm(self.chooser, [hop])
                return self._lost(hop, error, now, share=float(blame))
            case Reported(hop, failed):
                return self._reported(hop, failed, now)
            case Late(pending):
                return self._late(pending, now)
            case Unanswered(hops, seconds):
                late = [hop for hop in hops if hop.asked_at is not None]
                _confirm(self.chooser, late)
                return [act for hop in late for act in self._lost(hop, _silence(hop, seconds), now)]
            case StepsGivenUp():
                return self._break("steps were given up", now) if self.steps.give_up() else []
            case Moving(why):
                return self._break(why, now) if self.route.has_choice() else []
            case Reordering():
                unable = self.route.reorder_rows()
                leave = [Leave(hop) for hop in self.route.standbys.give_up()]
                return leave + [
                    act for hop in unable for act in self._lost(hop, cannot_reorder(hop.hop.peer), now)
                ]
            case Closed() if self.state is State.CLOSED:
                return []
            case Closed():
                self._become(State.CLOSED)
                for hop in self.route.opened:
                    hop.close()
                leave = [Leave(hop) for hop in [*self.route.opened, *self.route.standbys.give_up()]]
                return [Note("ended"), *leave, StopSwitching(), Repair("closed")]

    def _answered(self, hop: HopState, result: Result, now: float) -> list[Action]:
        if hop in self.route.standbys.hops:
            raise MessageError("a result of a standby, which passes nothing on")
        pending = self.steps.pending.get(result.step) if not result.replay else None
        if hop.hop.stop < self.terms.run.stop:
            if pending is not None:
                _check_carried(result, pending.what, self.route.contracts.in_epoch(result.epoch))
            return self.route.carry(hop, result, pending)
        if pending is None or pending.result is not None:
            return []  # its caller has gone, or has the answer
        contract, what = self.route.contracts.in_epoch(result.epoch), pending.what
        tokens = len(result.body) // contract.row_bytes
        if (result.position, tokens) != (what.reply_position, what.reply_tokens):
            raise MessageError(
                f"{tokens} positions from {result.position} on came back,"
                f" {what.reply_tokens} from {what.reply_position} on were asked for"
            )
        pending.deliver(result, now)
        return [Deliver(pending)]

    def _reported(self, hop: HopState, failed: Failed, now: float) -> list[Action]:
        """A hop reports a fault of its own or of a neighbour."""
        error = failed.error()
        if hop in self.route.standbys.hops:
            return self._lost(hop, error, now, share=0.0)
        if failed.code == "leaving":
            hop.set_leaving()
            return []
        if isinstance(error, Refused) and failed.step is not None:
            hop.refuse()
            return [*self.note(hop.hop.peer, error), *self._break(f"{hop.hop.peer} refused a step", now)]
        if not hop.alive:
            return []
        found = judge(hop, failed, self.route.hops, partial(self.chooser.blame.accusations.accuse, now=now))
        if found.unreachable is not None:
            self.route.replacement.separate([found.unreachable])
            return self._break("{} cannot reach {}".format(*found.unreachable), now)
        if found.distrusted is not None:
            self.route.replacement.distrust(found.distrusted)
        actions: list[Action] = []
        for loss in found.losses:
            often = not loss.share and failed.code == "ended" and self.pauses.ended(hop.hop.peer)
            actions += self._lost(loss.hop, loss.error, now, share=1.0 if often else loss.share)
        return actions

    def _late(self, pending: Pending, now: float) -> list[Action]:
        """A step is late: ask the hops, give up silent hops, or leave a stuck hop."""
        found = self.watchdog.look(
            pending,
            self.route.hops,
            now,
            refilling=self.route.refilling,
            expected=self.route.chain.expected_seconds,
            part=self.route.contracts.current.replay_part,
        )
        why = f"step {pending.step} made no progress for {found.waited:.2g} s"
        if found.stuck is not None:
            lost, share = found.stuck, 1.0
            if found.before is not None:  # which of the two lies, or whether the step was lost between them
                if self.chooser.blame.accusations.accuse(found.before.hop.peer, lost.hop.peer, now):
                    lost, why = found.before, f"{why}, and it says that it has passed it on"
                else:
                    share = HALF
            return self._lost(lost, SlowPeer(why), now, share=share)
        if found.busy is not None:
            why = f"step {pending.step} takes longer than {found.waited:.2g} s"
            return self._leave(found.busy, why, now, found.held)
        _confirm(self.chooser, [hop for hop, _ in found.silent])
        silent = [
            action for hop, seconds in found.silent for action in self._lost(hop, _silence(hop, seconds), now)
        ]
        return silent or [Ask(hop) for hop in found.ask]

    def _leave(self, hop: HopState, why: str, now: float, held: float) -> list[Action]:
        """A hop has had a step for `held` seconds, too long: leave it, if there is another peer."""
        hop.set_leaving()
        if not self.route.has_choice():
            hop.set_leaving(False)
            return []
        fault = fault_note(hop.hop.peer, SlowPeer(why))
        return [fault, Postpone(hop.hop.peer, busy_seconds(held)), *self._break(why, now)]

    def _lost(
        self, hop: HopState, error: PeerFault | Refused, now: float, *, share: float = 1.0
    ) -> list[Action]:
        """Give up a hop.  share: of a fault, 0 without blame."""
        if not hop.alive:
            return []
        error.about(hop.hop.peer)
        hop.fail(error, blame=share > 0)
        self.route.standbys.lost(hop, now)
        fault = fault_note(hop.hop.peer, error)
        actions = self.note(hop.hop.peer, error, share) if share else [fault]
        if hop in self.route.hops or self.state is State.SWITCHING:
            actions += self._break(str(error), now)
        return [*actions, StopSwitching()]

    def note(self, peer: PeerId, error: PeerFault | Refused, share: float = 1.0) -> list[Action]:
        """The reports on a peer's fault, or a share of one, or refusal.  Our own bugs never come here."""
        error.about(peer)
        self.last_error = error
        fault = fault_note(peer, error, f"{type(error).__name__}: {error}")
        if isinstance(error, Refused):
            return [fault, Postpone(peer, self.route.replacement.refused(peer, error))]
        return [fault, Blame(peer, error, share)]

    def _break(self, why: str, now: float) -> list[Action]:
        """The route must change before the next frame is sent."""
        if self.state is State.SOUND:
            self.outage = Outage(why, now)
        if self.state in (State.SOUND, State.SWITCHING):
            self._become(State.BROKEN)
        return [Repair(why)]

    # --- changes of the route ---

    def begin_switch(self) -> None:
        """The change of the route begins."""
        self._become(State.SWITCHING)

    def take_over(
        self, line_up: LineUp, made: Sequence[HopState], seconds: float
    ) -> tuple[Refill | None, list[Action]]:
        """The hops of a new route have agreed: their missing positions; None where all hops are new.

        seconds: of the agreement.
        """
        before = self.route.hops
        refill, actions = self.route.take_over(
            line_up, made, self.steps.resume_point(), self.outage.why, seconds
        )
        if before and before != self.route.hops:
            self.outage.reroute()
        return refill, actions

    def send_again(self, now: float) -> list[Action]:
        """The hops have all positions: leave other hops, and send steps without an answer again.

        A step that was answered meanwhile goes out too: some hop may not have seen it.
        """
        leave: list[Action] = [Leave(hop) for hop in self.route.leave_others()]
        if self.ways.known:
            self.ways.keep(self.route.hops)
        return leave + [self._send(pending, now) for pending in self.steps.again]

    def end_switch(self, now: float, error: PeerFault | Refused | None, *, done: bool) -> None:
        """The change of the route is over.  done: to its end; else by `error`, or by an event."""
        self.last_error = error or self.last_error
        if self.state is State.SWITCHING:
            self._become(State.SOUND if done else State.BROKEN)
            if done:
                self.outage.refilled(now)

    def _send(self, pending: Pending, now: float) -> Send:
        if not self.route.contracts.anything_sent:
            self.route.contracts.sent()
        pending.start(now, self.watchdog.first_look(now))
        return Send(pending, self.route.hops[0], pending.bulk or self.route.refilling)

    def _become(self, state: State) -> None:
        if state not in NEXT[self.state]:
            raise LocalProtocolError(f"a session that is {self.state.name} becomes {state.name}")
        self.state = state


def is_undisturbed(session: ClientSession, position: int, now: float) -> bool:
    """Whether a step from `position` on can be sent with nothing to do before, but for a cut."""
    if session.state is not State.SOUND or session.steps.pending or position > session.steps.length:
        return False
    if session.route.refilling or any(hop.leaving for hop in session.route.hops):
        return False
    if session.ways.known and session.ways.is_move_due(session.route.hops):
        return False
    return not session.relocation.is_search_due(session.steps.length, len(session.route.hops), now)


def _check_carried(result: Result, what: StepRange, contract: Contract) -> None:
    """Raises MessageError where a hop's output is not that of all positions of a step."""
    tokens = len(result.body) // contract.row_bytes
    if tokens and (result.position, tokens) != (what.position, what.tokens):
        raise MessageError(
            f"{tokens} positions from {result.position} on came back to be carried on,"
            f" the step has {what.tokens} from {what.position} on"
        )


def _confirm(chooser: Chooser, hops: Iterable[HopState]) -> None:
    """These hops fail before our eyes: reports of others about them were right."""
    for hop in hops:
        if hop.alive:
            chooser.blame.accusations.confirm(hop.hop.peer)


def _silence(hop: HopState, seconds: float) -> SlowPeer:
    return SlowPeer(f"{hop.hop.peer} has said nothing for {seconds:.2g} s")


def _speeds(route: RouteState, pending: Pending, result: Result) -> Action | None:
    """Of the links to the hops after the last point at which the client carried the step."""
    if not result.speeds or result.epoch != route.epoch:
        return None
    return ObserveSpeeds(route.chain.hops[len(pending.timings) :], result.speeds)
