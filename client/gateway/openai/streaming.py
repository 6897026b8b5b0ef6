"""Answers as server-sent events: the first token decides the status, errors after that come in the stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from client.gateway.door.limits import HttpLimits
from client.gateway.door.protocol import CLOSE
from client.gateway.jobs import Piece, Running
from client.gateway.openai.endpoints import id_of
from client.gateway.openai.errors import RequestError, error_of

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


def event(data: Any, name: str | None = None) -> bytes:  # Any: JSON
    """One event.  name: for its `event:` line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n").encode()


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
        self._limits = limits
        self._request_id = request_id

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Without a content-length: there is none."""
        self.body = b""
        super().init_headers(headers)
        self.raw_headers = [each for each in self.raw_headers if each[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all tokens."""

        async def put(parts: Iterable[bytes]) -> None:
            if body := b"".join(parts):
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await put(self._shape.begin())
        try:
            await put(await self._piece_or_end(self._first))
            while not self._is_over:
                try:
                    async with asyncio.timeout(self._limits.keep_alive_seconds):
                        piece = await self._running.next()
                except TimeoutError:
                    await put([KEEP_ALIVE])
                    continue
                await put(await self._piece_or_end(piece))
        except Exception as error:  # noqa: BLE001  the status has been sent: the error is an event
            failed = error_of(error, self._request_id)
            await put([*self._shape.failed(failed), self._shape.done])
            closer = scope.get("extensions", {}).get(CLOSE)
            if closer is not None:
                closer()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    _is_over = False

    async def _piece_or_end(self, piece: Piece | _NotYet | None) -> Iterable[bytes]:
        if isinstance(piece, _NotYet):
            return []
        if piece is None:
            self._is_over = True
            return [*self._shape.end(self._running), self._shape.done]
        return self._shape.piece(piece)
