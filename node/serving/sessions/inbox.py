"""Steps that wait for a session's worker, and the client's orders, which come before them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio

from routing.names import PeerId
from tensor_codec.errors import RemoteProtocolError
from tensor_codec.messages.session import Relink, Resume, Step


@dataclass(frozen=True, slots=True)
class Arrived:
    """A step, its sender, and the time of its arrival on trio's clock."""

    step: Step
    sender: PeerId
    at: float


class Inbox:
    """At most `max_steps` steps that wait, and the client's orders, which come before them.

    held: steps have to wait for a Resume.
    """

    def __init__(self, max_steps: int, *, held: bool) -> None:
        self.held = held
        self._max_steps = max_steps
        self._steps: deque[Arrived] = deque()
        self._orders: deque[Relink | Resume] = deque()
        self._changed = trio.Event()
        self._senders_waiting = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._steps)

    def put(self, arrived: Arrived) -> None:
        """Put a step in.  Raises RemoteProtocolError if its sender has overfilled the inbox."""
        if len(self._steps) >= self._max_steps:
            raise RemoteProtocolError(f"step {arrived.step.step}: too many steps are in flight")
        self._steps.append(arrived)
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for_space(self) -> bool:
        """Wait until another step fits; False when the session has ended."""
        self._senders_waiting += 1
        try:
            while len(self._steps) >= self._max_steps and not self._closed:
                await self._changed.wait()
        finally:
            self._senders_waiting -= 1
        return not self._closed

    def order(self, order: Relink | Resume) -> None:
        """Put an order in.  A Relink takes back earlier orders and all steps.

        Raises RemoteProtocolError for a second Resume: there is one after each Relink.
        """
        if isinstance(order, Relink):
            self._orders.clear()
            self._steps.clear()
            self.held = True
        elif not self.held or any(isinstance(one, Resume) for one in self._orders):
            raise RemoteProtocolError("a Resume after another one")
        self._orders.append(order)
        self._notify()

    async def take(self) -> Arrived | Relink | Resume:
        """The next order, or the next step where there is no order."""
        while True:
            if self._orders:
                return self._orders.popleft()
            if self._steps and not self.held:
                if self._senders_waiting:
                    self._notify()
                return self._steps.popleft()
            await self._changed.wait()

    def close(self) -> None:
        """Drop the steps; nothing is taken any more."""
        self._closed = True
        self._steps.clear()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
