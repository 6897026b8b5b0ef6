"""Steps that wait for a session's worker, and the client's orders, which come before them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio

from routing.names import PeerId
from tensor_codec.errors import (
    RemoteProtocolError,
)
from tensor_codec.messages.session import (
    Relink,
    Resume,
    Step,
)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A step and when it came, on trio's clock."""

    step: Step
    sender: PeerId
    at: float


class Inbox:
    """Steps that wait, at most `most`, and the client's orders, which come before them.

    held: steps have to wait for a Resume.
    """

    def __init__(self, most: int, *, held: bool) -> None:
        self.held = held
        self._most = most
        self._steps: deque[Arrived] = deque()
        self._orders: deque[Relink | Resume] = deque()
        self._changed = trio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._steps)

    def offer(self, arrived: Arrived) -> None:
        """Put a step in.  RemoteProtocolError if its sender has overfilled it."""
        if len(self._steps) >= self._most:
            raise RemoteProtocolError(f"step {arrived.step.step}: too many steps are in flight")
        self._steps.append(arrived)
        self._tell()

    async def room(self) -> bool:
        """Wait for a place; False when the session has ended."""
        while len(self._steps) >= self._most and not self._closed:
            await self._changed.wait()
        return not self._closed

    def order(self, order: Relink | Resume) -> None:
        """Put an order in.  A Relink takes back what was ordered before, and all steps.

        Raises RemoteProtocolError for a second Resume: there is one after each Relink.
        """
        if isinstance(order, Relink):
            self._orders.clear()
            self._steps.clear()
            self.held = True
        elif not self.held or any(isinstance(one, Resume) for one in self._orders):
            raise RemoteProtocolError("a Resume after another one")
        self._orders.append(order)
        self._tell()

    async def take(self) -> Arrived | Relink | Resume:
        """What is to be done next."""
        while True:
            if self._orders:
                return self._orders.popleft()
            if self._steps and not self.held:
                self._tell()
                return self._steps.popleft()
            await self._changed.wait()

    def close(self) -> None:
        """Nobody takes anything any more."""
        self._closed = True
        self._steps.clear()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
