"""/api/swarm, /api/sessions, /api/traces/{id} as JSON, and /api/events as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any, Protocol

from starlette.responses import Response
from starlette.routing import Route

from client.gateway.monitor.history import MAX_LISTENERS, SWARM, Listener, frame_of
from client.gateway.monitor.monitor import MAX_TRACES, Monitor
from client.gateway.openai.errors import RequestError, invalid, shutting_down

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

KEEP_ALIVE_SECONDS = 10.0  # proxies end a stream after 60 s of silence
KEEP_ALIVE = b": keep-alive\n\n"
TAKEN_SECONDS = 30.0  # for a listener to take what was sent
BATCH_BYTES = 64 * 1024  # of a replay, sent at once
RETRY_SECONDS = 5
NO_STORE = {"cache-control": "no-store"}
STREAM = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Monitored(Protocol):
    """The part of the gateway that is needed."""

    @property
    def monitor(self) -> object:
        """Its monitor, if it has one."""


def routes(gateway: Monitored) -> list[Route]:
    """The routes of a gateway's monitor, none for a gateway without; the door stands before them."""
    monitor = gateway.monitor
    if not isinstance(monitor, Monitor):
        return []

    async def swarm(request: Request) -> Response:
        return _json(await monitor.description())

    async def sessions(request: Request) -> Response:
        return _json(monitor.sessions())

    async def traces(request: Request) -> Response:
        name = request.path_params["name"]
        found = monitor.trace(name)
        if found is None:
            message = f"the events of {name[:100]!r} are not kept: of the last {MAX_TRACES} requests they are"
            return RequestError(404, message, param="id", code="not_found").response()
        return _json(found)

    async def events(request: Request) -> Response:
        given = request.query_params.get("last_event_id") or request.headers.get("last-event-id")
        if given is not None and not (given.isascii() and given.isdigit() and len(given) <= 20):
            message = f"last_event_id is {given[:32]!r}, the id of an event is needed"
            return invalid(message, "last_event_id", "invalid_value").response()
        if request.method == "HEAD":
            return Response(headers=STREAM)
        last = None if given is None else int(given)
        first = await monitor.description()
        if monitor.stopping:
            return shutting_down().response()
        listener = monitor.feed.listen(last)
        if listener is None:
            return RequestError(
                503,
                f"{MAX_LISTENERS} pages listen to this gateway, a further one may not",
                type="server_error",
                code="too_many_listeners",
                headers={"retry-after": str(RETRY_SECONDS)},
            ).response()
        feed = monitor.feed
        since = feed.number if last is None else last if last <= feed.number else feed.first
        return EventStream(monitor, listener, frame_of(since, SWARM, first))

    return [
        Route("/api/swarm", swarm),
        Route("/api/sessions", sessions),
        Route("/api/traces/{name}", traces),
        Route("/api/events", events),
    ]


class EventStream(Response):
    """The events of one listener, until it goes, is too slow, or the gateway ends.

    first: the frame of the swarm's present state; its id is that from which the listener goes on.
    """

    def __init__(self, monitor: Monitor, listener: Listener, first: bytes) -> None:
        super().__init__(headers=STREAM)
        self._monitor = monitor
        self._listener = listener
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end.  ASGI."""
        headers = [each for each in self.raw_headers if each[0] != b"content-length"]
        gone = asyncio.create_task(_gone(receive))
        try:
            async with asyncio.timeout(TAKEN_SECONDS) as patience:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                part = self._first
                while part and not gone.done():
                    patience.reschedule(asyncio.get_running_loop().time() + TAKEN_SECONDS)
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    patience.reschedule(None)
                    part = await self._next(gone)
                if not gone.done():
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            pass  # the server closes the connection of a stream without an end
        finally:
            self._monitor.feed.leave(self._listener)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def _next(self, gone: asyncio.Task[None]) -> bytes:
        """What waits, a comment after a time of silence, or nothing at the end."""
        monitor, listener = self._monitor, self._listener
        while not (monitor.stopping or listener.lost or gone.done()):
            found = bytearray()
            now = time.monotonic()
            while len(found) < BATCH_BYTES and (entry := listener.take(now)) is not None:
                found += entry.frame
            if found:
                return bytes(found)
            news = asyncio.create_task(monitor.news())
            done, _ = await asyncio.wait(
                {news, gone}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            news.cancel()
            if not done:
                return KEEP_ALIVE
        return b""


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: dict[str, Any]) -> Response:  # Any: JSON
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=NO_STORE)
