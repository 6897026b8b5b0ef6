"""The events of a swarm and of this client's sessions, for programs that watch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from client.session.trace import Event
from routing.view.changes import PeerChange

MAX_BEHIND = 1024  # events that wait for one listener; then the oldest go
MAX_LISTENERS = 32


@dataclass(frozen=True, slots=True)
class SwarmEvent:
    """An event.  at: time.perf_counter().

    kind: "peer" (joined, left, moved, silent, back; see `routing.view.changes`), or "session" (of this
    client; `what` and `data` are the kind and data of `client.session.trace.Event`).
    subject: the peer's id, or the session's in `Swarm.sessions`.
    lost: events before this one that the listener was too slow for.
    """

    at: float
    kind: Literal["peer", "session"]
    subject: str
    what: str
    data: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON
    lost: int = 0


def of_peer(change: PeerChange, at: float) -> SwarmEvent:
    """The event of a peer's change."""
    blocks = None if change.blocks is None else list(change.blocks)
    return SwarmEvent(at, "peer", change.peer, change.what, {"name": change.name, "blocks": blocks})


def of_session(name: str, event: Event) -> SwarmEvent:
    """The event of a session."""
    return SwarmEvent(event.at, "session", name, event.kind, event.data)


@dataclass(slots=True, eq=False)
class Backlog:
    """The events that wait for one listener, at most `most`; where they are more the oldest go."""

    most: int = MAX_BEHIND
    events: deque[SwarmEvent] = field(default_factory=deque)
    lost: int = 0

    def add(self, event: SwarmEvent) -> None:
        """One more."""
        if len(self.events) >= self.most:
            self.events.popleft()
            self.lost += 1
        self.events.append(event)

    def take(self) -> SwarmEvent | None:
        """The oldest; None without any."""
        if not self.events:
            return None
        event, lost = self.events.popleft(), self.lost
        if lost:
            self.lost = 0
            event = SwarmEvent(event.at, event.kind, event.subject, event.what, event.data, lost)
        return event
