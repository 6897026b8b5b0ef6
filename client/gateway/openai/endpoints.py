"""One way through every endpoint with a body: read it, answer it, and end when the client goes.

A handler gets the request and the object of its body, and returns a response or raises.  Whatever it enters
into `stack_of(request)` lives until the response is over: a stream goes on in there.  When the client goes,
the handler is cancelled wherever it waits: in the queue, before the first token, between two tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NoReturn, cast
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from client.gateway.door.body import Bodies, LateAnswer, read_json
from client.gateway.door.keys import Caller
from client.gateway.gateway import Gateway
from client.gateway.openai.errors import RequestError, error_of, shutting_down

Handler = Callable[[Request, dict[str, Any]], Awaitable[Response]]  # Any: JSON


def stack_of(request: Request) -> AsyncExitStack:
    """The contexts of a request: they are left when its response is over."""
    return cast(AsyncExitStack, request.state.stack)


def caller_of(request: Request) -> Caller:
    """Whoever asks."""
    return cast(Caller, request.state.caller)


def id_of(request: Request) -> str:
    """The request's id, in x-request-id."""
    return cast(str, request.state.request_id)


class Endpoint:
    """An ASGI application for one path."""

    def __init__(self, gateway: Gateway, handler: Handler, bodies: Bodies) -> None:
        """bodies: of all endpoints together."""
        self._gateway = gateway
        self._handler = handler
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["state"]["request_id"] in self._gateway.active:  # a client has used an id twice
            scope["state"]["request_id"] = uuid4().hex
        with self._bodies.share() as hold:
            await self._serve(scope, receive, send, hold)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, hold: Callable[[int], None]) -> None:
        request = Request(scope, receive, send)
        try:
            if self._gateway.is_draining:
                raise shutting_down()
            body = await read_json(request, self._gateway.settings.http, hold)
        except ClientDisconnect:
            return
        except RequestError as error:
            late = error.status in (408, 413) or error.code == "overloaded"
            answer = LateAnswer(error, receive) if late else error.response()
            await answer(scope, receive, send)
            return
        async with until_disconnect(receive, send) as send_and_note:
            await self._answer(request, body, scope, send_and_note)

    async def _answer(self, request: Request, body: dict[str, Any], scope: Scope, send: Send) -> None:
        async with AsyncExitStack() as stack:
            scope["state"]["stack"] = stack
            try:
                response = await self._handler(request, body)
            except Exception as error:  # noqa: BLE001  each has its answer; unexpected ones go to the log
                response = error_of(error, id_of(request)).response()
            await response(scope, _no_more, send)


@asynccontextmanager
async def until_disconnect(receive: Receive, send: Send) -> AsyncIterator[Send]:
    """Cancel the block when the client goes before the answer is over.  Gives `send` for the answer."""
    loop, is_over = asyncio.get_running_loop(), False

    async def send_and_note(message: Message) -> None:
        nonlocal is_over
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            is_over = True  # from here on a disconnect is the end of the connection
        await send(message)

    async def watch(scope: asyncio.Timeout) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not is_over:
            scope.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as scope:
            watcher = asyncio.create_task(watch(scope))
            try:
                yield send_and_note
            finally:
                is_over = True
                watcher.cancel()
    except TimeoutError:
        if not scope.expired():
            raise


async def _no_more() -> NoReturn:
    raise RuntimeError("the body has been read")
