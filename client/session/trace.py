"""The events of a session: its hops, its steps, and its faults."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MAX_EVENTS = 20_000  # about 10 MB; the oldest go first

log = logging.getLogger("raceme")
_CHANGING = threading.Lock()  # of a trace's listeners, from several threads

Kind = Literal["opened", "step", "fault", "rerouted", "replayed", "recovered", "relayed", "ended"]


@dataclass(frozen=True, slots=True)
class Event:
    """An event.  at: time.perf_counter().  data: JSON; its keys depend on the kind.

    opened      hops, codec: of hidden states; seconds
    step        step, position, tokens, seconds, hops: for each (seconds held, seconds computed),
                sent, received: bytes of hidden states
    fault       peer, error; why: gone, slow, bad, draining or refused
    rerouted    why, kept, opened: peers; hops, codec, seconds
    replayed    sender, peer, start, stop: positions; bytes
    recovered   seconds since the fault, replay_seconds: from the new route to the next answer
    relayed     sender, peer: the client carries hidden states between them
    ended
    """

    at: float
    kind: Kind
    data: Mapping[str, Any]  # Any: JSON


Listener = Callable[[Event], object]


@dataclass(slots=True)
class Trace:
    """The events of one session, oldest first; at most `MAX_EVENTS`.

    on_event: called with each event at its moment, in the thread of the swarm's event loop (trio), before
    anything else goes on: it must return at once and not wait.  So a program hears of a server that died
    before the next token comes.  An error of it is logged, and it is not called again.
    """

    events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    counts: Counter[str] = field(default_factory=Counter)
    on_event: Listener | None = None
    route: Event | None = None  # "opened" or "rerouted", whose hops the session has now
    _others: tuple[Listener, ...] = ()

    def add(self, kind: Kind, **data: Any) -> None:  # Any: JSON
        """Note an event of now."""
        self.counts[kind] += 1
        event = Event(time.perf_counter(), kind, data)
        self.events.append(event)
        if kind != "step":
            self._note_route(event)
        if self.on_event is not None or self._others:
            self._tell(event)

    def _note_route(self, event: Event) -> None:
        if event.kind in ("opened", "rerouted"):
            self.route = event
        elif event.kind == "ended":
            self.route = None

    def listen(self, listener: Listener) -> None:
        """Have another function called with each event from now on, as `on_event`.  From any thread."""
        with _CHANGING:
            self._others = (*self._others, listener)

    def unlisten(self, listener: Listener) -> None:
        """Call that function no more; nothing happens where it is not called.  From any thread."""
        with _CHANGING:
            self._others = tuple(each for each in self._others if each != listener)

    def _tell(self, event: Event) -> None:
        for listener in (self.on_event, *self._others):
            if listener is None:
                continue
            try:
                listener(event)
            except Exception:  # the program's, whatever it is: the session of many goes on
                log.exception("a listener of a trace has failed, and is not called again")
                if listener is self.on_event:
                    self.on_event = None
                self.unlisten(listener)

    def of(self, *kinds: Kind) -> Iterator[Event]:
        """The events of these kinds."""
        return (event for event in self.events if event.kind in kinds)

    def write(self, path: Path) -> None:
        """One event a line, as JSON, times in seconds from the first one.  Raises OSError."""
        began = self.events[0].at if self.events else 0.0
        lines = (
            json.dumps({"at": round(event.at - began, 6), "kind": event.kind, **event.data})
            for event in self.events
        )
        # Opened without waiting: a FIFO may have no reader.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
