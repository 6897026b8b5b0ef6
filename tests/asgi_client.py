"""A client of an ASGI application without sockets: it reads a stream as it comes, and may go at any time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1:8000"
Headers = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass
class Exchange:
    """One request and its answer."""

    sent: list[bytes]  # parts of the body that come
    hangs: bool = False  # whether the body never ends
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    over: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    takes: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: the reader takes nothing

    def __post_init__(self) -> None:
        self.takes.set()

    async def receive(self) -> dict[str, Any]:
        if self.sent:
            part = self.sent.pop(0)
            return {"type": "http.request", "body": part, "more_body": self.hangs or bool(self.sent)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Mapping[str, Any]) -> None:
        await self.takes.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.over = not message.get("more_body", False)
            if self.over:
                self.gone.set()
        self.news.set()

    def leave(self) -> None:
        """The client goes."""
        self.gone.set()

    async def end(self) -> None:
        """Return when the answer is over."""
        while not self.over:
            self.news.clear()
            await self.news.wait()

    async def wait_for(self, text: str) -> None:
        """Return when the body holds a text."""
        while text.encode() not in self.body:
            assert not self.over, self.body
            self.news.clear()
            await self.news.wait()

    @property
    def events(self) -> list[Any]:
        """The data of the events until now, as JSON; "[DONE]" as it is."""
        return events_of(self.body.decode())

    def json(self) -> Any:
        return json.loads(self.body)


def events_of(text: str) -> list[Any]:
    found = []
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
    return found


def scope_of(method: str, path: str, headers: Headers, client: str) -> dict[str, Any]:
    given = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
    if not any(name.lower() == "host" for name, _ in given):
        given.append(("host", HOST))
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given if value],
        "client": (client, 5000),
        "server": ("127.0.0.1", 8000),
        "state": {},
        "extensions": {},
    }


@asynccontextmanager
async def exchange(
    app: Any,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Headers = (),
    client: str = "127.0.0.1",
    parts: Sequence[bytes] | None = None,
    hangs: bool = False,
) -> AsyncIterator[Exchange]:
    """A request under way; at the end of the block the client goes, if the answer is not over."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    made = Exchange(list(parts) if parts is not None else [content], hangs)
    task = asyncio.create_task(app(scope_of(method, path, headers, client), made.receive, made.send))
    try:
        yield made
    finally:
        made.leave()
        await task


async def ask(app: Any, method: str, path: str, body: Any = None, **more: Any) -> Exchange:
    """A request, and its whole answer."""
    async with exchange(app, method, path, body, **more) as made:
        await made.end()
    return made
