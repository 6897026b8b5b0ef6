"""The gateway's sight of its swarm and of its own requests: a thin asyncio shell around the feed.

    monitor = Monitor(swarm)
    async with monitor.running():
        with monitor.request("5f0c", "chat", "m", 100) as watch:
            async for token in swarm.generate(..., trace=watch.trace()):
                facts = watch.token()

A fault of a session comes from trio's thread at its moment.  Steps wait for the next token of their request,
or for the next tick, so that a token costs an append.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from client.gateway.monitor.history import SWARM, Feed
from client.gateway.monitor.requests import Choice, Json, Kept, Traffic
from client.session.trace import Event, Trace
from routing.view.changes import PeerChange, peer_changes
from routing.view.description import describe

if TYPE_CHECKING:
    from types import TracebackType

    from client.api import SwarmLike
    from client.session.trace import Listener
    from routing.view.view import SwarmView

log = logging.getLogger("raceme")

TICK_SECONDS = 0.25  # between two summaries of a session's steps
SWARM_SECONDS = 2.0  # between two states of the swarm, at least, unless a peer falls silent or answers again
DISTANCES_SECONDS = 10.0  # the same, where nothing but round trips and times of silence has changed
FRESH_SECONDS = 0.5  # for which a description serves all who ask
LOOK_SECONDS = 0.25  # between two looks at a view that changes all the time
SHARE = 0.05  # of the event loop, at most, for states of a very large swarm
MAX_TRACES = 100  # requests whose events /api/traces has
MAX_INBOX = 4096  # events of one request between two ticks; a token has one
ANSWERS = ("chatcmpl-", "cmpl-", "resp_")  # that stand before a request's id in the id of its answer
DISTANCES = ("rtt_ms", "silent_s")


class Monitor:
    """Requests, the feed of events and the swarm's description, of one gateway.

    swarm: the asyncio handle.  listener: makes one more listener of each new trace, for metrics.
    counts: of steps, for the traffic.
    """

    def __init__(self, swarm: SwarmLike, *, listener: Callable[[], Listener] | None = None) -> None:
        self.swarm = swarm
        self.feed = Feed(first=int(time.time() * 1000))
        self.listener = listener
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[RequestWatch, None] = {}  # in their order; two may have one id
        self._traces: dict[str, RequestWatch] = {}
        self._names: dict[str, str] = {}
        self.counts = Traffic()
        self._looked = time.monotonic()
        self._last_traffic = self.counts.look(1.0)
        self._last_swarm: tuple[float, Json] | None = None  # the description, and when it was made
        self._answers_changed = asyncio.Event()  # a peer has fallen silent, or answers again
        self._describing = asyncio.Lock()  # one description serves all who ask at a time
        self.stopping = False  # listeners leave, so that the gateway can end

    # --- requests ---

    def request(self, id: str, kind: str, model: str, *max_tokens: int | None) -> RequestWatch:
        """A request has come; it may have to queue.  max_tokens: of each of its choices."""
        watch = RequestWatch(self, id, kind, model, max_tokens or (None,))
        self._live[watch] = None
        self._traces.pop(id, None)
        self._traces[id] = watch
        while len(self._traces) > MAX_TRACES:
            del self._traces[next(iter(self._traces))]
        watch.wait()
        return watch

    def sessions(self) -> Json:
        """The live sessions, one for each choice of each request."""
        self._drain()
        now = time.perf_counter()
        found = [each for watch in self._live for each in watch.sessions(self._names, now)]
        return {"at": time.time(), "sessions": found}

    def trace(self, name: str) -> Json | None:
        """The events of one of the last MAX_TRACES requests; None of another.

        name: the request's id (x-request-id), or that of its answer, which begins with one of ANSWERS.
        """
        known = (name.removeprefix(kind) for kind in ("", *ANSWERS) if name.startswith(kind))
        watch = next((self._traces[each] for each in known if each in self._traces), None)
        return None if watch is None else {"id": watch.name, "events": watch.events()}

    def traffic(self) -> Json:
        """The rates of the last two seconds, and the requests of now."""
        queued = sum(watch.queues for watch in self._live)
        return {**self._last_traffic, "active": len(self._live) - queued, "queued": queued}

    # --- the swarm ---

    async def description(self, seconds: float = FRESH_SECONDS) -> Json:
        """The swarm as /api/swarm shows it, at most so many seconds old."""
        async with self._describing:
            if self._last_swarm is None or time.monotonic() - self._last_swarm[0] >= seconds:
                found = await self._describe()
                self._last_swarm = time.monotonic(), found
            return {**self._last_swarm[1], "recent": self.traffic()}

    async def _describe(self) -> Json:
        liveness = await self.swarm.liveness()
        view = self.swarm.view()
        self._name(view)
        rtts = {peer: each.rtt for peer, each in liveness.items() if each.rtt is not None}
        found = describe(view, rtts, liveness=liveness)
        info = self.swarm.info
        facts = {"model": info.name, "revision": info.revision, "me": self.swarm.peer_id}
        return {"at": time.time(), **facts, "recent": self.traffic(), **found}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the swarm and the requests until the end of the block."""
        self._loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(each) for each in (self._follow(), self._show(), self._tick())]
        for task in tasks:
            task.add_done_callback(_report)
        try:
            yield
        finally:
            self.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop = None

    def stop(self) -> None:
        """Have the listeners leave; new ones are refused."""
        self.stopping = True
        self.wake()

    async def _follow(self) -> None:
        """Tell of peers that come, go, move, fall silent or answer again."""
        before = self.swarm.view()
        self._name(before)
        await self.swarm.liveness()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWARM_SECONDS):
                    await self.swarm.changed(before)
            after = self.swarm.view()
            for change in peer_changes(before, after):
                self.feed.publish("peer", _peer_event(change), time.monotonic())
                if change.what in ("silent", "back"):
                    self._answers_changed.set()
            if after is not before:
                self._name(after)
                self.wake()
            before = after
            await asyncio.sleep(LOOK_SECONDS)

    async def _show(self) -> None:
        """Tell listeners of the swarm's state when it has changed, every SWARM_SECONDS at most."""
        told, said = -DISTANCES_SECONDS, dict[str, Any]()  # Any: JSON
        while True:
            began = time.monotonic()
            fresh = 0.0 if self._answers_changed.is_set() else FRESH_SECONDS
            self._answers_changed.clear()
            if self.feed.listeners:
                found = await self.description(fresh)
                lasting = _lasting(found)
                if lasting != said or began - told >= DISTANCES_SECONDS:
                    told, said = began, lasting
                    self.feed.publish(SWARM, found, began)
                    self.wake()
            took = time.monotonic() - began
            await asyncio.sleep(took / SHARE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, SWARM_SECONDS - took / SHARE)):
                    await self._answers_changed.wait()

    async def _tick(self) -> None:
        """Summaries of steps, and the traffic."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._drain()
            for watch in list(self._live):
                watch.summarise()
            now = time.monotonic()
            if now - self._looked >= SWARM_SECONDS:
                self._last_traffic = self.counts.look(now - self._looked)
                self._looked = now
                self.feed.publish("traffic", {"at": time.time(), **self.traffic()}, now, often=True)
            self.wake()

    def _drain(self) -> None:
        for watch in list(self._live):
            watch.drain()

    def _name(self, view: SwarmView) -> None:
        self._names = {record.peer: record.name for record in view.records()}

    # --- for the watches and the listeners ---

    async def news(self) -> None:
        """Wait until something was published."""
        await self._news.wait()

    def wake(self) -> None:
        """Wake the listeners."""
        self._news.set()
        self._news = asyncio.Event()

    def publish(self, data: Json, *, often: bool = False) -> None:
        """An event of a session."""
        self.feed.publish("session", data, time.monotonic(), often=often)
        if not often:
            self.wake()

    def ended(self, watch: RequestWatch) -> None:
        """A request is over."""
        self._live.pop(watch, None)

    def soon(self, function: Callable[[], object]) -> None:
        """Call a function in the event loop, from any thread; nothing once the gateway has ended."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(function)


class RequestWatch:
    """One request of the gateway, from its arrival to its end.  Made by `Monitor.request`.

    For the gateway's event loop, but for the events of traces, which come from trio's thread.
    """

    def __init__(
        self, monitor: Monitor, name: str, kind: str, model: str, max_tokens: Sequence[int | None]
    ) -> None:
        """max_tokens: of each choice."""
        self.name = name
        self.began_at = time.time()
        self._monitor = monitor
        self._facts: Json = {"kind": kind, "model": model, "began": self.began_at}
        self._choices = {index: Choice(index, most) for index, most in enumerate(max_tokens)}
        self._inbox: deque[tuple[int, Event]] = deque(maxlen=MAX_INBOX)
        self._notes: list[tuple[int, Trace, Listener]] = []  # each ends with its choice
        self._own: deque[Kept] = deque(maxlen=8)  # events of the request itself
        self._numbers = itertools.count()
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def queues(self) -> bool:
        """Whether the request waits for its turn."""
        return all(choice.state == "queued" for choice in self._choices.values())

    def wait(self) -> None:
        """The request has come."""
        most = [choice.max_tokens for choice in self._choices.values()]
        said = {"kind": self._facts["kind"], "model": self._facts["model"]}
        self._note_own("queued", **said, max_tokens=None if None in most else sum(each or 0 for each in most))
        for choice in self._choices.values():
            self._tell(choice, "queued", **said, max_tokens=choice.max_tokens)

    def began(self, choices: int | None = None) -> None:
        """The request has left the queue.  choices: that are computed at a time; None: all."""
        for choice in list(self._choices.values())[:choices]:
            choice.begin()

    def answered(self, choice: int) -> None:
        """A choice is over; others of the request may go on, and its session serves another request."""
        self.drain()
        self._end(choice)

    def trace(self, choice: int = 0) -> Trace:
        """A new trace for one choice; its events come here until the end of the request."""
        trace = Trace()
        if self._monitor.listener is not None:
            trace.listen(self._monitor.listener())
        self.follow(trace, choice)
        return trace

    def follow(self, trace: Trace, choice: int = 0) -> None:
        """The events of a trace that exists already, of a kept conversation, come here until the end.

        Its session was opened for another request: the route that it goes on along is told first.
        """
        note = self._note(choice)
        if (route := trace.route) is not None:
            note(_opened(route))
        trace.listen(note)
        self._notes.append((choice, trace, note))

    def token(self, choice: int = 0) -> Json:
        """For each token: {"hops": [[peer, held_ms, computed_ms]...], "events": [{"kind", "at", ...}]}."""
        self.drain()
        return self._choices[choice].token() if choice in self._choices else {"hops": [], "events": []}

    def end(self) -> None:
        """The request is over; a second call does nothing."""
        if self._over:
            return
        self.drain()
        for index in list(self._choices):
            self._end(index)
        self._over = True
        self._inbox.clear()
        self._note_own("ended", tokens=sum(choice.tokens for choice in self._choices.values()))
        self._monitor.ended(self)

    def _end(self, index: int) -> None:
        """A choice is over; a second call does nothing."""
        for trace, note in [(trace, note) for each, trace, note in self._notes if each == index]:
            trace.unlisten(note)
        self._notes = [each for each in self._notes if each[0] != index]
        choice = self._choices.get(index)
        if choice is not None and choice.state != "ended":
            self.summarise()
            choice.end()
            self._tell(choice, "ended", tokens=choice.tokens)

    # --- for the monitor ---

    def sessions(self, names: dict[str, str], now: float) -> list[Json]:
        """Each choice that is not over, as /api/sessions shows it."""
        return [
            {
                "id": self._id(index),
                **self._facts,
                "hops": choice.hops(names),
                "tokens": choice.tokens,
                "max_tokens": choice.max_tokens,
                "tokens_per_second": round(choice.rate(now), 3),
                "state": choice.state,
                "recoveries": choice.recoveries,
            }
            for index, choice in self._choices.items()
            if choice.state != "ended"
        ]

    def events(self) -> list[Json]:
        """The events that are kept, in their order."""
        self.drain()
        found = list(self._own)
        for index, choice in self._choices.items():
            more = {"choice": index} if index else {}
            found += [(number, said | more) for number, said in (*choice.events, *choice.steps)]
        return [said for _, said in sorted(found, key=lambda kept: kept[0])]

    def drain(self) -> None:
        """Take in the events that have come from trio's thread."""
        offset = time.time() - time.perf_counter()
        while self._inbox:
            index, event = self._inbox.popleft()
            choice = self._choices.setdefault(index, Choice(index))
            self._monitor.counts.add(event)
            if choice.state == "ended":
                continue
            told = choice.take_in(event, event.at + offset, next(self._numbers))
            if told is not None:
                self.summarise()
                self._monitor.publish({"id": self._id(index), **told})

    def summarise(self) -> None:
        """Tell of the steps since the last summary."""
        for index, choice in self._choices.items():
            told = choice.summary()
            if told is not None:
                facts = {"at": time.time(), "id": self._id(index), **told}
                self._monitor.publish(facts, often=True)

    def _note_own(self, what: str, **data: Any) -> None:  # Any: JSON
        """An event of the request itself, for its trace."""
        self._own.append((next(self._numbers), {**data, "kind": what, "at": time.time()}))

    def _tell(self, choice: Choice, what: str, **data: Any) -> None:  # Any: JSON
        """An event of a choice, for the listeners."""
        self._monitor.publish({"at": time.time(), "id": self._id(choice.index), "what": what, **data})

    def _id(self, index: int) -> str:
        """The id of a choice's session: the request's own, and for further choices a number after it."""
        return f"{self.name}.{index}" if index else self.name

    def _note(self, index: int) -> Listener:
        def note(event: Event) -> None:  # in trio's thread
            if self._over:
                return
            self._inbox.append((index, event))
            if event.kind != "step":
                self._monitor.soon(self.drain)

        return note


def _opened(route: Event) -> Event:
    """The event with which a request hears of a route that its session has already."""
    facts = {"hops": route.data["hops"], "codec": route.data.get("codec"), "seconds": 0.0}
    return Event(time.perf_counter(), "opened", facts)


def _report(task: asyncio.Task[None]) -> None:
    """A task of the monitor has ended: before the gateway does only by an error."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the page shows the swarm no longer", exc_info=error)


def _peer_event(change: PeerChange) -> Json:
    return {
        "at": time.time(),
        "peer": change.peer,
        "name": change.name,
        "what": change.what,
        "blocks": None if change.blocks is None else list(change.blocks),
    }


def _lasting(description: Json) -> Json:
    """The description without times and distances, which change all the time."""
    peers = [{k: v for k, v in peer.items() if k not in DISTANCES} for peer in description["peers"]]
    return {k: v for k, v in description.items() if k not in ("at", "recent")} | {"peers": peers}
