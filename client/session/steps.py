"""Steps of a session without an answer, and the parts of a step's time.  Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from client.session.repair.replay_plan import ResumePoint, Sent
from routing.names import PeerId
from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import StepRange
from tensor_codec.messages.session import Result


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The parts of one step's time, in seconds.

    hops: for each hop in the chain's order, the time that it held the step and the time that it computed.
    """

    total: float
    hops: tuple[tuple[float, float], ...]

    @property
    def network(self) -> float:
        """The part in which no hop held the step: the wire, and this process."""
        return self.total - sum(held for held, _ in self.hops)


@dataclass(slots=True, eq=False)
class StepWatch:
    """The known progress of a step.  Times are the caller's clock, in seconds.

    since: time of sending, or of the last look without a fault.  look_at: time of the next question to the
    hops.
    asked: whether they have been asked.  moved_at: time of the step's last progress, by the hops' reports.
    furthest: of each hop the most progress that it reported (last step, positions), and how often it grew.
    at: the hop that has the step, by these reports, and since when.
    refilled_at: time of the last progress of a replay before the step.
    """

    since: float = 0.0
    look_at: float = math.inf
    asked: bool = False
    moved_at: float = 0.0
    furthest: dict[PeerId, tuple[int, int, int]] = field(default_factory=dict)
    at: tuple[PeerId, float] | None = None
    refilled_at: float = -math.inf

    def start(self, now: float, look_at: float) -> None:
        """The step was sent."""
        if self.furthest:
            self.furthest = {}
        self.at, self.moved_at = None, now
        self.since, self.look_at, self.asked = now, look_at, False

    def postpone(self, now: float, look_at: float) -> None:
        """The step is all right so far."""
        self.since, self.look_at, self.asked = now, look_at, False

    def ask(self, look_at: float) -> None:
        """The hops are asked now; their answers are due at `look_at`."""
        self.asked, self.look_at = True, look_at

    def wait(self, look_at: float) -> None:
        """Some hops have not answered yet, and have time until `look_at`."""
        self.look_at = look_at

    def saw(
        self, reports: Mapping[PeerId, tuple[int, int]], now: float, *, refilling: bool, most_moves: int
    ) -> bool:
        """Take in the hops' reports (last step, positions); whether the step has moved on.

        Only growth counts, and of each hop as often as honest work may grow: `most_moves`.
        """
        first, moved = not self.furthest, False
        for peer, (step, length) in reports.items():
            last_step, last_length, moves = self.furthest.get(peer, (step, length, 0))
            if step > last_step or length > last_length:
                moves += 1
                moved |= moves <= most_moves
            self.furthest[peer] = max(step, last_step), max(length, last_length), moves
        if moved and refilling:
            self.refilled_at = now
        if moved or first:
            self.moved_at = now
        return moved or first

    def held_since(self, peer: PeerId, now: float) -> float:
        """The step is at this hop, by the reports; since when."""
        if self.at is None or self.at[0] != peer:
            self.at = peer, now
        return self.at[1]


@dataclass(slots=True, eq=False)
class Pending:
    """A step on its way.

    body: its hidden states in the client's journal codec.  packed: the same in int8o, where they were made
    to travel so.  bulk: it takes a stream of its own from hop to
    hop.
    began: time of its submission.  timings: of the hops before the last point at which the client carried it.
    awaited_at: when its caller began to wait; None: at once.  answered_at: when the answer came.
    alone: no other step was on its way when its answer was taken.
    """

    step: int
    what: StepRange
    body: Buffer
    bulk: bool
    began: float
    packed: Buffer | None = None
    result: Result | None = None
    timings: tuple[tuple[int, int], ...] = ()
    given_up: bool = False
    awaited_at: float | None = None
    answered_at: float = 0.0
    alone: bool = False
    watch: StepWatch = field(default_factory=StepWatch)

    def start(self, now: float, look_at: float) -> None:
        """The step is sent now, perhaps once more."""
        self.timings = ()
        self.watch.start(now, look_at)

    def carry(self, timings: tuple[tuple[int, int], ...]) -> None:
        """The client has the step in hand, after hops with these times."""
        self.timings += timings

    def wait(self, now: float) -> None:
        """Its caller waits for the answer from now on."""
        if self.awaited_at is None:
            self.awaited_at = now

    def deliver(self, result: Result, now: float) -> None:
        """The answer is there."""
        self.result, self.answered_at = result, now

    def take(self, *, alone: bool) -> None:
        """Its caller takes the answer.  alone: no other step is on its way."""
        self.alone = alone

    @property
    def seconds(self) -> float:
        """From its submission to its answer."""
        return self.answered_at - self.began

    @property
    def is_measure(self) -> bool:
        """Whether its time says something of the hops: its caller has waited for most of it.

        Else the caller may have kept this process from reading an answer that was there already.
        """
        waited_from = self.began if self.awaited_at is None else self.awaited_at
        return waited_from - self.began <= self.answered_at - waited_from

    def give_up(self) -> None:
        """The caller has gone."""
        self.given_up = True


@dataclass(slots=True, eq=False)
class StepSource:
    """The steps of a session: sent, answered, and to send again.

    length: positions in the hops' caches, by the answers so far.
    pending: by step, oldest first.  sent: without an answer, given up or not.
    again: the steps of the last `resume_point`.  next_step: the number of the next one.
    ordered: the last answered step that reordered rows in the hops' caches, -1 if none did.
    """

    length: int = 0
    pending: dict[int, Pending] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    again: list[Pending] = field(default_factory=list)
    next_step: int = 0
    ordered: int = -1
    _ordered_before: int = -1

    def add(
        self, what: StepRange, body: Buffer, bulk: bool, now: float, packed: Buffer | None = None
    ) -> Pending:
        """Number a step.  bulk: the step is long.  packed: see `Pending`.

        All pending steps travel on one stream, that of the oldest: on two streams one could overtake another.
        """
        if self.pending:
            bulk = next(iter(self.pending.values())).bulk
        pending = Pending(self.next_step, what, body, bulk, now, packed)
        self.next_step += 1
        self.pending[pending.step] = pending
        self.sent.append(Sent(pending.step, what))
        return pending

    def collected(self, pending: Pending) -> None:
        """The answer to a step has been taken."""
        self.pending.pop(pending.step, None)
        self.length = pending.what.position + pending.what.tokens
        if pending.what.rows:
            self._ordered_before, self.ordered = self.ordered, pending.step
        self.sent = [one for one in self.sent if one.step > pending.step]

    def revoke(self, pending: Pending) -> None:
        """The answer taken last, to a step that reordered rows, is of no use: the step has none yet."""
        self.pending = {pending.step: pending, **self.pending}
        self.sent.insert(0, Sent(pending.step, pending.what))
        self.length, self.ordered = pending.what.position, self._ordered_before

    def give_up(self) -> bool:
        """Give up the pending steps; whether any of them may still be on its way, or has reordered rows."""
        pending = list(self.pending.values())
        given_up = [one for one in pending if one.result is None]
        self.pending.clear()
        for one in given_up:
            one.give_up()
        return bool(given_up) or any(one.what.rows for one in pending)

    def go_back(self, position: int) -> bool:
        """The next step begins at `position`; whether the caches hold more positions."""
        if position >= self.length:
            return False
        self.length = position
        if not position:
            self.ordered = -1  # nothing is left of it
        return True

    def resume_point(self) -> ResumePoint:
        """The point from which the hops must resume now.  Then `again` holds the steps to send again."""
        pending = list(self.pending.values())
        self.again = [one for one in pending if one.result is None]
        if self.again:
            position, step = self.again[0].what.position, self.again[0].step
        elif pending:  # all have their answers, which nobody has taken yet
            position, step = pending[-1].what.position + pending[-1].what.tokens, self.next_step
        else:
            position, step = self.length, self.sent[0].step if self.sent else self.next_step
        ordered = [one.step for one in pending if one.what.rows and one.step < step]
        numbers = [one.step for one in self.again]
        return ResumePoint(position, self.sent, numbers, step, max([self.ordered, *ordered]))
