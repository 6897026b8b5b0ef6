"""The admission queue of an asyncio program: `Admission` decides, futures wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from client.gateway.door.admission import Admission, Change, QueueFull, Ticket
from client.gateway.door.limits import QueueLimits

MEMORY = 0.9  # of the usual seconds of an answer, with each answer that ends
MAX_RETRY_SECONDS = 60.0


class NoPlace(Exception):
    """A request was refused.

    why: for metrics.  retry_after_seconds: when asking again may help.  places: to compute and to wait.
    """

    def __init__(self, message: str, why: str, retry_after_seconds: float, places: int) -> None:
        super().__init__(message)
        self.why = why
        self.retry_after_seconds = retry_after_seconds
        self.places = places

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers: the gateway's places are what is used up."""
        return {
            "x-ratelimit-limit-requests": str(self.places),
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": f"{self.retry_after_seconds:.3g}s",
        }


class AdmissionQueue:
    """Requests wait here for their turn.  Belongs to one event loop."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.state = Admission(limits)
        self._futures: dict[Ticket, asyncio.Future[None]] = {}
        self._usual_seconds = 2.0  # of an answer

    @asynccontextmanager
    async def place(self, caller: str, choices: int) -> AsyncIterator[int]:
        """A place to compute; the answers that may be computed at a time.

        choices: the answers of the request.  Raises NoPlace.
        """
        weight = self.state.weight_of(choices)
        try:
            ticket, change = self.state.enter(caller, weight)
        except QueueFull:
            raise self._full() from None
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures[ticket] = turn
        self._apply(change)
        began = math.inf
        try:
            await self._wait(turn)
            began = asyncio.get_running_loop().time()
            yield weight
        finally:
            self._learn(asyncio.get_running_loop().time() - began)
            self._futures.pop(ticket, None)
            self._apply(self.state.leave(ticket))

    @property
    def retry_after_seconds(self) -> float:
        """When a place may be free."""
        turns = (self.state.waiting + 1) / self.limits.max_concurrent
        return min(MAX_RETRY_SECONDS, max(1.0, math.ceil(turns * self._usual_seconds)))

    @property
    def _places(self) -> int:
        return self.limits.max_concurrent + self.limits.max_queued

    async def _wait(self, turn: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(self.limits.queue_seconds):
                await turn
        except TimeoutError:
            raise NoPlace(
                f"no place within {self.limits.queue_seconds:g} s: {self.limits.max_concurrent} answers are"
                f" computed at a time, and {self.state.waiting} requests wait",
                "queue_time",
                self.retry_after_seconds,
                self._places,
            ) from None

    def _full(self) -> NoPlace:
        return NoPlace(
            f"{self.state.computing} answers are computed and {self.state.waiting} requests wait,"
            f" {self.limits.max_queued} may wait",
            "queue_full",
            self.retry_after_seconds,
            self._places,
        )

    def _apply(self, change: Change) -> None:
        for ticket in change.begin:
            if not self._futures[ticket].done():
                self._futures[ticket].set_result(None)
        for ticket in change.leave:
            if not self._futures[ticket].done():
                self._futures[ticket].set_exception(self._full())

    def _learn(self, seconds: float) -> None:
        if seconds > 0 and seconds != math.inf:
            self._usual_seconds = MEMORY * self._usual_seconds + (1 - MEMORY) * seconds
