"""The clock of a simulated swarm, and its queue of events."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Events(Generic[T]):
    """A queue of events in simulated time; events of one moment come in the order in which they were added.

    now: seconds, of the event that was taken last.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, T]] = []
        self._number = 0

    def add(self, when: float, event: T) -> None:
        """Let an event happen at a moment."""
        self._number += 1
        heapq.heappush(self._queue, (when, self._number, event))

    def take(self, until: float) -> T | None:
        """The next event, if it happens by `until`; else None, and the clock stands at `until`."""
        if self._queue and self._queue[0][0] <= until:
            self.now, _, event = heapq.heappop(self._queue)
            return event
        self.now = until
        return None
