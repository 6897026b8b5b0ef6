"""Steps that wait for a session's worker, and the client's orders, which come before them.

A step may be under way without the worker (`node.serving.sessions.together.flights`): nothing is taken then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import outcome
import trio

from node.network.budgets.large_frames import FramePlace
from node.serving.executor.engine import Answer
from node.serving.sessions.state import Compute
from node.serving.sessions.step_room import SMALL_STEP, SessionRoom
from routing.names import PeerId
from tensor_codec.errors import RemoteProtocolError
from tensor_codec.messages.session import Relink, Resume, Step


@dataclass(frozen=True, slots=True)
class Arrived:
    """A step, its sender, and the time of its arrival on trio's clock.

    speed: of the link that it came by, bytes per second; 0: unknown.
    """

    step: Step
    sender: PeerId
    at: float
    speed: int = 0


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that the engine has answered, and that is not done: an error, or an answer to pass on."""

    arrived: Arrived
    decision: Compute
    result: outcome.Outcome[Answer]


class UnderWay(Protocol):
    """See `node.serving.sessions.together.flights.Flight`."""

    def interrupt(self) -> None:
        """The route changes."""

    def cancel(self) -> None:
        """The session is over."""


class Inbox:
    """At most `max_steps` steps that wait, and the client's orders, which come before them.

    held: steps have to wait for a Resume.  room: for the bytes of the steps, and of the step taken last.
    """

    def __init__(self, max_steps: int, *, held: bool, room: SessionRoom) -> None:
        self.held = held
        self.room = room
        self._max_steps = max_steps
        self._steps: deque[tuple[Arrived, FramePlace | None]] = deque()
        self._taken: FramePlace | None = None
        self._orders: deque[Relink | Resume] = deque()
        self._changed = trio.Event()
        self._senders_waiting = 0
        self._closed = False
        self._flight: UnderWay | None = None
        self._landed: Landed | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, is under way without the worker, or will come from a sender that waits."""
        return not (
            self._steps or self.held or self._flight or self._orders or self._senders_waiting
            or self._landed or self._closed
        )  # fmt: skip

    def take_off(self, flight: UnderWay) -> None:
        """A step is under way without the worker, until `land`."""
        self._flight = flight

    def land(self, landed: Landed | None) -> None:
        """It is not any more.  landed: what the worker has to do with it, before anything else."""
        self._flight, self._landed = None, landed
        if landed or self._steps or self._orders:
            self._notify()

    def __len__(self) -> int:
        return len(self._steps)

    def put(self, arrived: Arrived, place: FramePlace | None = None) -> None:
        """Put a step in.  place: of `wait_for_space`.

        Raises RemoteProtocolError if its sender has overfilled the inbox, TooManyStreams where the node has
        no room for its bytes.
        """
        if self._closed:
            return self.room.remove(place)
        if len(self._steps) >= self._max_steps:
            self.room.remove(place)
            raise RemoteProtocolError(f"step {arrived.step.step}: too many steps are in flight")
        if place is None and len(arrived.step.body) > SMALL_STEP:
            place = self.room.add(len(arrived.step.body))
        self._steps.append((arrived, place))
        self._changed.set()
        self._changed = trio.Event()
        return None

    async def wait_for_space(self, size: int) -> tuple[bool, FramePlace | None]:
        """Wait until another step fits; the place of its bytes.  False when the session has ended."""
        self._senders_waiting += 1
        try:
            while len(self._steps) >= self._max_steps and not self._closed:
                await self._changed.wait()
        finally:
            self._senders_waiting -= 1
        place = None
        if size > SMALL_STEP and not self._closed:
            place = await self.room.wait(size)
        return not self._closed, place

    def order(self, order: Relink | Resume) -> None:
        """Put an order in.  A Relink takes back earlier orders and all steps.

        Raises RemoteProtocolError for a second Resume: there is one after each Relink.
        """
        if isinstance(order, Relink):
            if self._flight is not None:
                self._flight.interrupt()
            self._orders.clear()
            self._drop_steps()
            self.held = True
        elif not self.held or any(isinstance(one, Resume) for one in self._orders):
            raise RemoteProtocolError("a Resume after another one")
        self._orders.append(order)
        self._notify()

    async def take(self) -> Arrived | Landed | Relink | Resume:
        """The next order, or the next step where there is no order; the step before it is done with."""
        if self._taken is not None:
            self.room.remove(self._taken)
            self._taken = None
        while True:
            if self._landed is not None:
                landed, self._landed = self._landed, None
                return landed
            if self._flight is not None:
                await self._changed.wait()
                continue
            if self._orders:
                return self._orders.popleft()
            if self._steps and not self.held:
                if self._senders_waiting:
                    self._notify()
                arrived, self._taken = self._steps.popleft()
                return arrived
            await self._changed.wait()

    def close(self) -> None:
        """Drop the steps; nothing is taken any more."""
        self._closed = True
        if self._flight is not None:
            self._flight.cancel()
            self._flight = None
        self._drop_steps()
        self.room.close()
        self._notify()

    def _drop_steps(self) -> None:
        for _, place in self._steps:
            self.room.remove(place)
        self._steps.clear()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
