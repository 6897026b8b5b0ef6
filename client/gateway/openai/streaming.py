"""Answers as server-sent events: the first token decides the status, errors after that come in the stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from client.gateway.door.limits import HttpLimits
from client.gateway.door.protocol import CLOSE
from client.gateway.jobs import Piece, Running
from client.gateway.openai.endpoints import id_of
from client.gateway.openai.errors import RequestError, error_of
from client.gateway.requests import Usage

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Shape(Protocol):
    """The events of a stream.  done: the last bytes, also after an error."""

    @property
    def done(self) -> bytes:
        """The bytes at the end."""

    def begin(self) -> Iterable[bytes]:
        """Before the first token."""

    def piece(self, piece: Piece) -> Iterable[bytes]:
        """Of a token."""

    def end(self, running: Running) -> Iterable[bytes]:
        """After the last token."""

    def failed(self, error: RequestError) -> Iterable[bytes]:
        """In place of the rest."""


encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(data: Any, name: str | None = None) -> bytes:  # Any: JSON
    """One event.  name: for its `event:` line."""
    text = encoded(data)
    return (f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n").encode()


class Chunks:
    """The events of one stream, each with a choice: what all of them have is encoded once.

    head: their first fields.  wants_usage: each chunk has the field too, null until the last one.
    """

    def __init__(self, head: Mapping[str, Any], *, wants_usage: bool) -> None:  # Any: JSON
        self._head = head
        self._begin = f'data: {encoded(dict(head))[:-1]},"choices":['
        self._end = "]" + (',"usage":null' if wants_usage else "")

    def chunk(self, choice: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> bytes:  # Any: JSON
        """One event.  facts: of the hops of its token, where they are wanted."""
        more = "" if facts is None else f',"raceme":{encoded(facts)}'
        return f"{self._begin}{encoded(choice)}{self._end}{more}}}\n\n".encode()

    def usage(self, usage: Usage) -> bytes:
        """The last one."""
        return event({**self._head, "choices": [], "usage": usage.body()})


async def stream(request: Request, running: Running, shape: Shape, limits: HttpLimits) -> EventStream:
    """The stream of a job's answers, once its first token has come, or after `first_token_seconds`.

    Raises the errors of the job that come before.
    """
    first: Piece | _NotYet | None = _NOT_YET
    try:
        async with asyncio.timeout(limits.first_token_seconds):
            first = await running.next()
    except TimeoutError:
        pass
    return EventStream(running, shape, first, limits, id_of(request))


class _NotYet:
    """Stands for a token that has not come."""


_NOT_YET = _NotYet()


class EventStream(Response):
    """The response.  Made by `stream`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        running: Running,
        shape: Shape,
        first: Piece | _NotYet | None,
        limits: HttpLimits,
        request_id: str,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **running.headers})
        self._running = running
        self._shape = shape
        self._first = first
        self._request_id = request_id
        self._silence = Silence(limits.keep_alive_seconds, running.end_silence)

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Without a content-length: there is none."""
        self.body = b""
        super().init_headers(headers)
        self.raw_headers = [each for each in self.raw_headers if each[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all tokens; those that are there at the same moment in one write."""

        async def put(parts: Iterable[bytes]) -> None:
            if body := b"".join(parts):
                self._silence.broken()
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await put(self._shape.begin())
        try:
            with self._silence.watched():
                first = await self._running.batch() if isinstance(self._first, _NotYet) else self._first
                pieces = [first] if isinstance(first, Piece) else first
                while pieces is not None:
                    parts = [part for piece in pieces for part in self._shape.piece(piece)]
                    await put(parts if pieces else [KEEP_ALIVE])
                    pieces = await self._running.batch()
            await put([*self._shape.end(self._running), self._shape.done])
        except Exception as error:  # noqa: BLE001  the status has been sent: the error is an event
            failed = error_of(error, self._request_id)
            await put([*self._shape.failed(failed), self._shape.done])
            closer = scope.get("extensions", {}).get(CLOSE)
            if closer is not None:
                closer()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Silence:
    """Notices that nothing was sent for a time.  One timer for a stream, and not one for each token."""

    def __init__(self, seconds: float, notice: Callable[[], object]) -> None:
        """notice: called after every `seconds` of silence."""
        self._seconds = seconds
        self._notice = notice
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def broken(self) -> None:
        """Something is sent now."""
        self._since = asyncio.get_running_loop().time()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notice silence within the block."""
        self.broken()
        self._look_in(self._seconds)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left = self._since + self._seconds - asyncio.get_running_loop().time()
        if left <= 0:
            self._notice()
        self._look_in(left if left > 0 else self._seconds)
