"""The feed of events: numbered, kept for a while, and given to each listener in turn.  Pure.

Promises, checked by tests/unit/test_feed.py:
  * ids grow with every event, also from one start of the gateway to the next;
  * a listener that names the last id it has seen gets every later event that is still kept, in order;
  * a listener that takes nothing for PATIENCE_SECONDS is `lost` once MAX_BEHIND events wait for it, and one
    for which MAX_WAITING wait at once; it costs no more memory than these.

The state of the swarm and summaries of steps come often, and a newer one replaces an older one: these are
kept apart, so that a busy minute does not push a server's loss out of the history.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_KEPT = 1000  # events for listeners that come again: hours of a quiet swarm, a minute of a storm
MAX_LISTENERS = 32
MAX_BEHIND = 64  # events that wait for one listener that is slow
PATIENCE_SECONDS = 2.0  # a burst is no slowness: the loss of a server is four events of each session
MAX_WAITING = 1024  # of 0.5 KiB each, but for the swarm, which waits once
SWARM = "swarm"


class Entry(NamedTuple):
    """One event: its id, its kind, and its frame of server-sent events."""

    number: int
    kind: str
    frame: bytes


def frame_of(number: int, kind: str, data: dict[str, Any]) -> bytes:  # Any: JSON
    """An event as the text/event-stream of the HTML standard has it; JSON has no line break of its own."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"id: {number}\nevent: {kind}\ndata: {text}\n\n".encode("utf-8", "replace")


@dataclass(slots=True, eq=False)
class Listener:
    """One listener's events.

    replay: the kept events that it has missed, which count to nobody's backlog.  waiting: later ones.
    since: when it last took one, or when the first of those that wait came.
    lost: it was too slow and must come again.
    """

    replay: Iterator[Entry]
    waiting: deque[Entry] = field(default_factory=deque)
    since: float = 0.0
    lost: bool = False

    def add(self, entry: Entry, now: float) -> None:
        """An event happens.  A state of the swarm that still waits is replaced by the new one."""
        if entry.kind == SWARM:
            self.waiting = deque(each for each in self.waiting if each.kind != SWARM)
        if not self.waiting:
            self.since = now
        is_slow = len(self.waiting) >= MAX_BEHIND and now - self.since >= PATIENCE_SECONDS
        if is_slow or len(self.waiting) >= MAX_WAITING:
            self.lost = True
            self.waiting.clear()
            return
        self.waiting.append(entry)

    def take(self, now: float) -> Entry | None:
        """The next event; None where none waits."""
        self.since = now
        found = next(self.replay, None)
        if found is None and self.waiting:
            found = self.waiting.popleft()
        return found


@dataclass(slots=True)
class Feed:
    """The history and its listeners.  first: the id before the first event; number: the newest id."""

    first: int = 0
    listeners: list[Listener] = field(default_factory=list)
    number: int = field(init=False)
    _events: deque[Entry] = field(default_factory=lambda: deque(maxlen=MAX_KEPT))
    _steps: deque[Entry] = field(default_factory=lambda: deque(maxlen=MAX_KEPT))

    def __post_init__(self) -> None:
        self.number = self.first

    def publish(
        self, kind: str, data: dict[str, Any], now: float, *, often: bool = False
    ) -> Entry:  # Any: JSON
        """Number an event, keep it, and give it to every listener.

        now: of any clock that never goes back, in seconds.  often: a summary, kept with its like.
        """
        self.number += 1
        entry = Entry(self.number, kind, frame_of(self.number, kind, data))
        if kind != SWARM:
            (self._steps if often else self._events).append(entry)
        for listener in self.listeners:
            if not listener.lost:
                listener.add(entry, now)
        return entry

    def listen(self, last: int | None = None) -> Listener | None:
        """A new listener; None where MAX_LISTENERS listen.

        last: the last id that it has seen, None for a new one: it gets what comes.  An id that this feed
        never gave (of an earlier start of the gateway, or 0) gets all that is kept.
        """
        if len(self.listeners) >= MAX_LISTENERS:
            return None
        listener = Listener(iter(()) if last is None else iter(self.after(last)))
        self.listeners.append(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """The listener has gone."""
        if listener in self.listeners:
            self.listeners.remove(listener)

    def after(self, last: int) -> list[Entry]:
        """The kept events after this id, in order; all where this feed never gave it."""
        if last > self.number:
            last = 0
        return [entry for entry in heapq.merge(self._events, self._steps) if entry.number > last]
