"""One rate for many flows: a flow that asks for little waits little, whatever the others ask for.

The order is that of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), the rate a token bucket's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

import trio

from tensor_codec.token_bucket import TokenBucket

_ROUNDING_BYTES = 1.0


@dataclass(eq=False, slots=True)
class Ticket:
    """A question for bytes.  start: its tag; the least goes first, the older of equals."""

    flow: Hashable
    size: int
    start: float
    number: int


class FairQueue:
    """The order of the questions, and when the first may go.

    Promises, checked by tests/unit/test_fair_rate.py:
      * in the long run no more than the rate is granted, and at once no more than the burst and one question;
      * of flows that always ask, each is granted as many bytes as the others, but for one question;
      * a flow that asks alone has the whole rate.
    """

    def __init__(self, bytes_per_second: float, burst_bytes: float, now: float) -> None:
        self._bucket = TokenBucket.full(bytes_per_second, burst_bytes, now)
        self._waiting: dict[Ticket, None] = {}
        self._finish: dict[Hashable, float] = {}  # the tag at which a flow's last question ends
        self._reached = 0.0  # the tag of the last question that went
        self._numbers = count()

    def __len__(self) -> int:
        """The number of questions that wait."""
        return len(self._waiting)

    def ask(self, flow: Hashable, size: int) -> Ticket:
        """A flow asks for so many bytes."""
        start = max(self._reached, self._finish.get(flow, 0.0))
        self._finish[flow] = start + size
        ticket = Ticket(flow, size, start, next(self._numbers))
        self._waiting[ticket] = None
        return ticket

    def wait(self, ticket: Ticket, now: float) -> float:
        """Seconds until it may go, 0 for now; infinity while another one is before it."""
        if min(self._waiting, key=lambda each: (each.start, each.number)) is not ticket:
            return math.inf
        missing = -self._bucket.level_at(now)
        return missing / self._bucket.rate if missing >= _ROUNDING_BYTES else 0.0

    def grant(self, ticket: Ticket, now: float) -> None:
        """It goes."""
        self._bucket.take(ticket.size, now)
        self._reached = max(self._reached, ticket.start)
        self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """It waits no more."""
        self._waiting.pop(ticket, None)
        if not self._waiting:  # nobody is ahead of anybody
            self._finish = {flow: at for flow, at in self._finish.items() if at > self._reached}


class FairRate:
    """Lets tasks wait for their bytes."""

    def __init__(self, bytes_per_second: float, burst_bytes: float) -> None:
        self._queue = FairQueue(bytes_per_second, burst_bytes, trio.current_time())
        self._changed = trio.Event()

    async def take(self, flow: Hashable, size: int) -> None:
        """Wait until a flow may move so many bytes.  The flows of one name share."""
        ticket = self._queue.ask(flow, size)
        try:
            while (seconds := self._queue.wait(ticket, trio.current_time())) > 0:
                with trio.move_on_after(seconds):
                    await self._changed.wait()
        except BaseException:
            self._queue.leave(ticket)
            self._wake()
            raise
        self._queue.grant(ticket, trio.current_time())
        self._wake()

    def _wake(self) -> None:
        if len(self._queue):
            self._changed.set()
            self._changed = trio.Event()
