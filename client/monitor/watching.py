"""A client that watches its swarm: its live sessions, the pings of more servers, and the listeners to events.

Nothing runs and nothing more is sent until somebody asks for liveness or for events, or has connected with
`monitor=True`.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from client.monitor.events import MAX_LISTENERS, Backlog, SwarmEvent, of_peer, of_session
from client.monitor.sessions import SessionStatus, session_status
from client.session.core import State
from routing.view.changes import peer_changes

if TYPE_CHECKING:
    from client.session.session import Session
    from client.session.trace import Event, Trace
    from routing.names import PeerId
    from routing.view.answers import Liveness
    from routing.view.view import SwarmView

WATCH_AGAIN_SECONDS = 60.0  # for which one question for liveness has more servers pinged


class Pings(Protocol):
    """The part of `node.network.directory.pings.Asker` that is used."""

    def monitor(self, seconds: float, routes: Callable[[], Iterable[PeerId]]) -> None:
        """Ping more servers for so long."""

    def liveness(self, peers: Iterable[PeerId]) -> dict[PeerId, Liveness]:
        """Who answers."""

    def ask(self, peer: PeerId) -> None:
        """Ping a peer now."""


class WatchedDirectory(Protocol):
    """The part of `node.network.directory.directory.Directory` that is used."""

    @property
    def pings(self) -> Pings:
        """Who answers."""

    def view(self) -> SwarmView:
        """The swarm as known now."""

    async def changed(self, since: SwarmView | None = None) -> None:
        """Return when the view differs from `since`."""


class Watching:
    """The watching side of a `Swarm`.

    always: more servers are pinged from the start, not only after a question.
    """

    def __init__(self, directory: WatchedDirectory, nursery: trio.Nursery, *, always: bool = False) -> None:
        self._directory = directory
        self._nursery = nursery
        self._always = always
        self._numbers = itertools.count(1)
        self._sessions: weakref.WeakKeyDictionary[Session, str] = weakref.WeakKeyDictionary()
        self._relays: dict[str, Relay] = {}
        self._listeners: dict[Backlog, trio.Event] = {}
        self._following: trio.CancelScope | None = None
        if always:
            self._watch(math.inf)

    # --- sessions ---

    def traced(self, trace: Trace) -> str:
        """The name of a session that is about to be opened; its events go to the listeners from now on."""
        name = f"session-{next(self._numbers)}"
        if self._listeners or self._always:
            self._relay(name, trace)
        return name

    def opened(self, name: str, session: Session) -> None:
        """The session is open.  It is listed until it is closed."""
        self._sessions[session] = name

    def sessions(self) -> list[SessionStatus]:
        """The live sessions, the oldest first."""
        return [
            session_status(name, session.core.state, session.chain.hops, session.length, session.trace)
            for session, name in list(self._sessions.items())
            if session.core.state is not State.CLOSED
        ]

    def routes(self) -> list[PeerId]:
        """The peers of the live sessions, those of the newest session first."""
        live = [each for each in self._sessions if each.core.state is not State.CLOSED]
        return list(dict.fromkeys(hop.peer for session in reversed(live) for hop in session.chain.hops))

    # --- peers ---

    def liveness(self) -> dict[PeerId, Liveness]:
        """Whether each peer of the view answers; asks on for WATCH_AGAIN_SECONDS."""
        self._watch(WATCH_AGAIN_SECONDS)
        records = self._directory.view().records()
        return self._directory.pings.liveness([r.peer for r in records if r.role != "client"])

    def _watch(self, seconds: float) -> None:
        self._directory.pings.monitor(seconds, self.routes)

    # --- events ---

    async def events(self) -> AsyncGenerator[SwarmEvent, None]:
        """See `Swarm.events`."""
        if len(self._listeners) >= MAX_LISTENERS:
            raise RuntimeError(f"{MAX_LISTENERS} programs listen to this swarm already")
        backlog = Backlog()
        self._listeners[backlog] = trio.Event()
        for session, name in list(self._sessions.items()):
            if session.core.state is not State.CLOSED:
                self._relay(name, session.trace)
        if self._following is None:
            self._following = trio.CancelScope()
            self._nursery.start_soon(self._follow, self._following)
        try:
            while True:
                while (event := backlog.take()) is not None:
                    yield event
                self._listeners[backlog] = news = trio.Event()
                if not backlog.events:
                    await news.wait()
        finally:
            del self._listeners[backlog]
            if not self._listeners and self._following is not None:
                self._following.cancel()
                self._following = None
            if not self._listeners and not self._always:
                for name in list(self._relays):
                    self._relays.pop(name).end()

    def _publish(self, event: SwarmEvent) -> None:
        """Give an event to every listener."""
        for backlog, news in self._listeners.items():
            backlog.add(event)
            news.set()

    def _relay(self, name: str, trace: Trace) -> None:
        """Have the events of a session's trace published until the session ends."""
        if name not in self._relays:
            self._relays[name] = Relay(trace, partial(self._note, name))

    def _note(self, name: str, event: Event) -> None:
        if event.kind == "fault":
            self._directory.pings.ask(event.data["peer"])  # a page shows soon whether that peer is there
        if event.kind == "ended":
            self._relays.pop(name).end()
        self._publish(of_session(name, event))

    async def _follow(self, scope: trio.CancelScope) -> None:
        """Publish the events of peers until the last listener has gone."""
        with scope:
            before = self._directory.view()
            while True:
                self._watch(WATCH_AGAIN_SECONDS)
                with trio.move_on_after(WATCH_AGAIN_SECONDS / 2):
                    await self._directory.changed(before)
                after = self._directory.view()
                for change in peer_changes(before, after):
                    self._publish(of_peer(change, time.perf_counter()))
                before = after


class Relay:
    """Gives the events of a trace to a function until `end`."""

    def __init__(self, trace: Trace, note: Callable[[Event], None]) -> None:
        self._trace, self._note = trace, note
        trace.listen(note)

    def end(self) -> None:
        """The function hears no more."""
        self._trace.unlisten(self._note)
