"""The body of a request: bounded in bytes and in time, then JSON, strictly."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from client.gateway.door.limits import HttpLimits
from client.gateway.openai.errors import RequestError, invalid

LIMITS = HttpLimits()
LEFT_SECONDS = 2.0  # for a client to stop sending a body that is refused, and to read why
LEFT_BYTES = 64 << 20


class Bodies:
    """The bytes of all bodies that are held, within a bound."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """One request's part: call it with each number of bytes; they are given back after the block.

        It raises RequestError (503) where all requests together would hold more than is allowed.
        """
        mine = 0

        def add(size: int) -> None:
            nonlocal mine
            if self.held + size > self._most:
                raise RequestError(
                    503,
                    f"all requests together hold {self.held} bytes, {self._most} are allowed",
                    type="server_error",
                    code="overloaded",
                    headers={"retry-after": "5", "connection": "close"},
                )
            self.held += size
            mine += size

        try:
            yield add
        finally:
            self.held -= mine


async def read_json(
    request: Request, limits: HttpLimits, hold: Callable[[int], None]
) -> dict[str, Any]:  # Any: JSON
    """The object that the body holds.  hold: called with the bytes that come, before they are kept.

    Raises RequestError (400, 408, 413, 415, 503), ClientDisconnect.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(415, f"content-encoding {encoding[:40]!r}: send the body as it is")
    return json_object(await _body(request, limits, hold), limits.max_body_levels)


async def _body(request: Request, limits: HttpLimits, hold: Callable[[int], None]) -> bytes:
    most = limits.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > most:
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                if len(body) + len(part) > most:
                    raise too_large(most)
                hold(len(part))
                body += part
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise RequestError(
            408,
            f"the body has not come within {limits.body_seconds:g} s",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None


def json_object(body: bytes, max_levels: int = LIMITS.max_body_levels) -> dict[str, Any]:  # Any: JSON
    """A JSON object.  Raises RequestError for anything else, and for what JSON does not have (NaN).

    max_levels: of lists and objects in one another.
    """
    too_deep = invalid(f"the body is nested too deeply: {max_levels} levels are allowed")
    try:
        text = body.decode("utf-8")
        found = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise too_deep from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise invalid(f"the body is not JSON: {error}") from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise invalid(f"the body has a number of more than {most} digits") from None
    if not isinstance(found, dict):
        raise invalid(f"the body is {_kind(found)}, a JSON object is needed")
    if text.count("[") + text.count("{") > max_levels and _levels(found, max_levels) > max_levels:
        raise too_deep
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise invalid("the body holds half of a surrogate pair: that is no text") from None
    return found


def _levels(found: dict[str, Any], most: int) -> int:  # Any: JSON
    """Lists and objects in one another, counted up to `most` + 1.  O(n), without recursion."""
    level: list[dict[str, Any] | list[Any]] = [found]
    count = 0
    while level and count <= most:
        count += 1
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in children for child in each if isinstance(child, dict | list)]
    return count


def too_large(most: int) -> RequestError:
    """413, and the end of the connection."""
    return RequestError(
        413,
        f"the body has more than {most} bytes (--max-body)",
        code="request_too_large",
        headers={"connection": "close"},
    )


class LateAnswer(JSONResponse):
    """An answer to a request whose body still comes: what comes is dropped for a moment.

    A socket that is closed with unread bytes is reset, and the client would lose the answer.
    """

    def __init__(self, error: RequestError, receive: Receive) -> None:
        super().__init__(error.body(), error.status, dict(error.headers))
        self._receive = receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer, then wait for the client, then end it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        dropped = 0
        try:
            async with asyncio.timeout(LEFT_SECONDS):
                while dropped < LEFT_BYTES:
                    message = await self._receive()
                    dropped += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _refuse(word: str) -> NoReturn:
    raise invalid(f"the body is not JSON: {word} is no number of JSON")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
