"""A gateway for tests of the page: real HTTP, the page's own routes, and a swarm that a test makes up.

A test changes the facts and publishes events from its own thread; the server runs in another one.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from client.gateway.page import routes as page_routes
from tests.api_contract import event_problems, swarm

START_SECONDS = 20.0
AT = 1_790_000_000.0


@dataclass(frozen=True)
class Part:
    """One token of an answer, or a wait for `FakeGateway.go_on`.

    hops: [(peer, held_ms)...].  events: as a chunk has them.
    """

    text: str = ""
    hops: Sequence[tuple[str, float]] = ()
    events: Sequence[dict[str, Any]] = ()
    waits: bool = False
    thinks: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer of the chat: a refusal where `status` is not 200, else its parts.

    error: of the body, or of the stream after the parts.  breaks: the connection ends without [DONE].
    """

    parts: Sequence[Part] = ()
    status: int = 200
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    breaks: bool = False
    reason: str = "stop"


def tokens(*texts: str, hops: Sequence[tuple[str, float]] = ()) -> list[Part]:
    return [Part(text, hops) for text in texts]


class FakeGateway:
    """Starts with `start`, ends with `stop`, and may start again at the same port."""

    def __init__(self) -> None:
        self.swarm: dict[str, Any] = swarm([])
        self.sessions: list[dict[str, Any]] = []
        self.models = ["SmolLM2-135M-Instruct"]
        self.keys: set[str] = set()
        self.answers: deque[Answer] = deque()
        self.bodies: list[dict[str, Any]] = []  # of the chat
        self.resumed_from: list[str] = []  # Last-Event-ID of each stream of events
        self.cancelled = 0  # answers whose reader went away
        self.port = 0
        self._events: list[tuple[int, str, str]] = []
        self._listeners: set[asyncio.Queue[tuple[int, str, str]]] = set()
        self._go_on: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    # From the test's thread

    def start(self) -> None:
        """Serve; returns when the port is open."""
        config = uvicorn.Config(
            self._app(),
            host="127.0.0.1",
            port=self.port,
            log_level="critical",
            lifespan="off",
            loop="asyncio",
        )
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self._server.started
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """End the server with all its connections."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(START_SECONDS)
        assert not self._thread.is_alive()
        self._server = None
        self._listeners.clear()

    def publish(self, event: str, data: dict[str, Any]) -> None:
        """Send an event to every listener; a swarm also becomes what /api/swarm answers."""
        assert event_problems(event, data) == []
        if event == "swarm":
            self.swarm = data
        self._call(self._publish, event, json.dumps(data))

    def say_raw(self, event: str, data: str) -> None:
        """Send an event with any data at all."""
        self._call(self._publish, event, data)

    def go_on(self) -> None:
        """Let the answer that waits go on."""
        assert self._go_on is not None
        self._call(self._go_on.set)

    def _call(self, function: Any, *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)

    # In the server's thread

    def _run(self) -> None:
        assert self._server is not None
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._go_on = asyncio.Event()
            runner.run(self._server.serve())

    def _publish(self, event: str, data: str) -> None:
        entry = (len(self._events) + 1, event, data)
        self._events.append(entry)
        for listener in self._listeners:
            listener.put_nowait(entry)

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                *page_routes(),
                Route("/api/events", self._stream_events),
                Route("/api/swarm", self._swarm),
                Route("/api/sessions", self._sessions),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not self.keys or key in self.keys:
            return None
        error = {
            "message": "this gateway has no such key",
            "type": "authentication_error",
            "code": "invalid_api_key",
        }
        return JSONResponse({"error": error}, 401)

    async def _swarm(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse(self.swarm)

    async def _sessions(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"at": AT, "sessions": self.sessions})

    async def _models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model"} for name in self.models]
        return self._refusal(request) or JSONResponse({"object": "list", "data": models})

    async def _stream_events(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        after = request.headers.get("last-event-id", "0")
        self.resumed_from.append(after)
        return StreamingResponse(self._events_after(int(after)), media_type="text/event-stream")

    async def _events_after(self, after: int) -> AsyncIterator[str]:
        queue: asyncio.Queue[tuple[int, str, str]] = asyncio.Queue()
        for entry in self._events if after > len(self._events) else self._events[after:]:
            queue.put_nowait(entry)
        self._listeners.add(queue)
        try:
            yield f": welcome\n\nevent: swarm\ndata: {json.dumps(self.swarm)}\n\n"
            while True:
                number, event, data = await queue.get()
                yield f"id: {number}\nevent: {event}\ndata: {data}\n\n"
        finally:
            self._listeners.discard(queue)

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        self.bodies.append(await request.json())
        answer = self.answers.popleft() if self.answers else Answer(tokens("Hello", "."))
        request_id = f"req-{len(self.bodies):06x}"
        headers = {"x-request-id": request_id, **answer.headers}
        if answer.status != 200:
            return JSONResponse({"error": answer.error}, answer.status, headers)
        return StreamingResponse(self._chunks(answer), 200, headers, "text/event-stream")

    async def _chunks(self, answer: Answer) -> AsyncIterator[str]:
        finished = False
        assert self._go_on is not None
        try:
            yield _chunk({"role": "assistant", "content": ""})
            for part in answer.parts:
                if part.waits:
                    self._go_on.clear()
                    await self._go_on.wait()
                    continue
                hops = [[peer, held, held * 0.9] for peer, held in part.hops]
                raceme = {"hops": hops, "events": list(part.events)}
                name = "reasoning_content" if part.thinks else "content"
                yield _chunk({name: part.text}, raceme=raceme)
                await asyncio.sleep(0.002)
            finished = True
            if answer.error is not None:
                yield f"data: {json.dumps({'error': answer.error})}\n\n"
            elif answer.breaks:
                return
            else:
                yield _chunk({}, reason=answer.reason)
                usage = {"prompt_tokens": 9, "completion_tokens": len(answer.parts), "total_tokens": 9}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.cancelled += not finished


def _chunk(delta: dict[str, str], *, reason: str | None = None, raceme: Any = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], "usage": None}
    return f"data: {json.dumps(chunk | ({'raceme': raceme} if raceme else {}))}\n\n"
