"""Decides what to do with each step of one session; computes, sends and times nothing.

A session is a cache of `length` positions at one hop.  A step brings hidden states for the positions from
`position` on.  Its number only grows.  An earlier number is a retry: its answer goes out again, and it is
never applied twice.  A position below the length cuts the cache there first (regeneration, speculation, a
shared prefix).

When the session's route changes, the client says how much of the cache stays good (`resume`).  The missing
positions after it come as a replay: steps without numbers, each continuing the cache.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tensor_codec.errors import LocalProtocolError, RemoteProtocolError
from tensor_codec.messages.contract import StepRange


class State(enum.Enum):
    """Where a session is in its life."""

    OPEN = enum.auto()
    COMPUTING = enum.auto()
    CLOSED = enum.auto()


@dataclass(frozen=True, slots=True)
class Compute:
    """Run the step.  cut: set the cache to this length first, or None where it fits already.

    step: None for a part of a replay.  reorder: order the rows by `what.rows` after the cut; else they stand
    in that order already.
    """

    step: int | None
    what: StepRange
    cut: int | None
    reorder: bool = False


@dataclass(frozen=True, slots=True)
class Repeat:
    """Send the stored answer of this step again."""

    step: int


@dataclass(slots=True)
class ServerSession:
    """The state machine of one session at one hop.

    Promises, checked by tests/unit/test_session_state.py:
      * a step is computed at most once, whatever is retried (P2);
      * the cached length never exceeds max_length, and has no holes;
      * the length advances only with the answer: a cancelled step leaves no trace;
      * a replay continues the cache and nothing else: no hole, no overlap;
      * a step's order of rows is applied at most once, and a cut after it never mixes two orders;
      * after an error every later call raises RemoteProtocolError.

    orders: the cache has the orders of rows of all steps below this number, and of no other step.
    ordered: the last step whose order was applied to it.
    """

    max_length: int
    can_cut: bool = True
    length: int = 0
    last: tuple[int, StepRange] | None = None
    state: State = State.OPEN
    orders: int = 0
    ordered: tuple[int, StepRange] | None = None
    followed: int | None = None

    def receive(self, step: int, what: StepRange) -> Compute | Repeat:
        """Decide about a step.  Raises RemoteProtocolError."""
        if self.state is State.COMPUTING:
            raise LocalProtocolError("a step was offered while another is being computed")
        if self.state is State.CLOSED:
            raise RemoteProtocolError(f"step {step} after the session was closed")
        if self.last is not None and step == self.last[0] and what == self.last[1]:
            return Repeat(step)
        if self.last is not None and step <= self.last[0]:
            self._fail(f"step {step} ({what}) after step {self.last[0]} ({self.last[1]})")
        if self.ordered is not None and step <= self.ordered[0] and (step, what) != self.ordered:
            self._fail(f"step {step} ({what}) after the order of step {self.ordered[0]} ({self.ordered[1]})")
        if what.position > self.length:
            self._fail(f"step {step} is for position {what.position}, the cache holds {self.length}")
        if not 0 < what.tokens <= self.max_length - what.position:
            self._fail(
                f"step {step} is for {what.tokens} positions from {what.position} on,"
                f" the session was opened for {self.max_length}"
            )
        cut = what.position if what.position < self.length else None
        if cut and not self.can_cut:  # to 0 every cache can: it begins again
            self._fail(f"step {step} goes back to position {cut}, which this model cannot")
        self.state = State.COMPUTING
        return Compute(step, what, cut, bool(what.rows) and step >= self.orders)

    def reordered(self, compute: Compute) -> None:
        """The rows are in the order of `compute` from now on, whether it will be computed or not."""
        if self.state is not State.COMPUTING or compute.step is None or not compute.reorder:
            raise LocalProtocolError(f"the rows were ordered for step {compute.step} without a request")
        self.length = compute.what.position
        self.orders, self.ordered = compute.step + 1, (compute.step, compute.what)

    def replay(self, what: StepRange, *, follows: bool = False) -> Compute:
        """Decide about a part of a replay.  Raises RemoteProtocolError.

        follows: of a standby, whose cache goes back where its sender's outputs did.
        """
        if self.state is State.COMPUTING:
            raise LocalProtocolError("a replay was offered while a step is being computed")
        if self.state is State.CLOSED:
            raise RemoteProtocolError("a replay after the session was closed")
        goes_back = follows and what.position < self.length and (self.can_cut or not what.position)
        in_place = goes_back or what.position == self.length
        if not in_place or not 0 < what.tokens <= self.max_length - what.position:
            self._fail(
                f"a replay of {what.tokens} positions from {what.position} on does not continue a cache of"
                f" {self.length}, opened for {self.max_length}"
            )
        self.state = State.COMPUTING
        return Compute(None, what, what.position if goes_back else None)

    def follow(self, step: int) -> None:
        """The cache is that of a hop at `step`, up to its length."""
        self.followed = step

    def resume(self, length: int, step: int | None = None, *, follows: bool = False) -> None:
        """Go on from `length` positions and forget the later ones.  Raises RemoteProtocolError.

        A forgotten step may come again, under its old number.
        step: where rows were reordered, the first step that comes after the replay, which brings rows in the
        order before it.  follows: it goes on as a standby.
        """
        self.followed = None if not follows else self.followed
        if self.state is not State.OPEN:
            raise LocalProtocolError("a session was resumed in the middle of a step, or after its end")
        if length > self.length:
            self._fail(f"the session is to go on from {length}, the cache holds {self.length}")
        if self.ordered is not None and step is not None and length:
            number, what = self.ordered
            if step < number or (step == number and length < what.position):
                self._fail(
                    f"the session is to go on from {length} with step {step}, the rows of the cache were"
                    f" reordered over {what.position} positions by step {number}"
                )
        if length < self.length:
            if length and not self.can_cut:
                self._fail(f"the session is to go back to position {length}, which this model cannot")
            self.length, self.last = length, None
        if not length:
            self.orders, self.ordered = 0, None
        self.orders = max(self.orders, step or 0)

    def computed(self, compute: Compute) -> None:
        """Make the answer to `compute` part of the session."""
        if self.state is not State.COMPUTING:
            raise LocalProtocolError(f"step {compute.step} was computed without a request")
        self.state = State.OPEN
        self.length = compute.what.position + compute.what.tokens
        if compute.step is not None:
            self.last = (compute.step, compute.what)

    def dropped(self, compute: Compute) -> None:
        """`compute` was refused before it began: it may come again; a cut stays."""
        if self.state is not State.COMPUTING:
            raise LocalProtocolError(f"step {compute.step} was dropped without a request")
        self.state = State.OPEN
        if compute.cut is not None:
            self.length = compute.cut

    def close(self) -> None:
        """Refuse everything from now on."""
        self.state = State.CLOSED

    def _fail(self, reason: str) -> None:
        self.close()
        raise RemoteProtocolError(reason)
