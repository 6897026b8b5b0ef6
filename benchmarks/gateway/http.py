"""A caller of a gateway that costs next to nothing: streams of OpenAI's API over plain sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
SECONDS = 120.0  # for one answer


@dataclass(slots=True)
class Streamed:
    """One streamed answer.  at: when each text came, in seconds since the request was sent."""

    status: int = 0
    texts: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: Mapping[str, Any] | None = None  # Any: JSON
    hops: list[str] = field(default_factory=list)  # peers of the last step, where a trace was asked for

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.at[0]

    def add(self, chunk: Mapping[str, Any], seconds: float) -> None:  # Any: JSON
        """Take in one event of the stream."""
        self.error = chunk.get("error", self.error)
        self.hops = [hop[0] for hop in chunk.get("raceme", {}).get("hops", [])] or self.hops
        for choice in chunk.get("choices", ()):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text = choice["text"] if "text" in choice else choice.get("delta", {}).get("content")
            if text:
                self.texts.append(text)
                self.at.append(seconds)


@asynccontextmanager
async def posted(
    port: int,
    path: str,
    body: Mapping[str, Any],  # Any: JSON
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request that has been sent; its connection is cut at the end of the block."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + content)
        yield reader, writer
    finally:
        writer.transport.abort()


async def events(reader: asyncio.StreamReader, answer: Streamed, began: float) -> AsyncIterator[Streamed]:
    """The answer after each of its events, to its end.

    A chunk of the transfer holds one event, so whatever does not begin with `data:` may be passed over.
    """
    answer.status = int((await reader.readline()).split()[1])
    async for line in reader:
        if line.startswith(b"data: {"):
            answer.add(json.loads(line[6:]), time.perf_counter() - began)
            yield answer


async def stream(port: int, path: str, **body: Any) -> Streamed:  # Any: JSON
    """One answer, whole.  Raises TimeoutError."""
    answer, began = Streamed(), time.perf_counter()
    async with asyncio.timeout(SECONDS), posted(port, path, {"stream": True, **body}) as (reader, _):
        async for _answer in events(reader, answer, began):
            pass
    return answer


async def get(port: int, path: str) -> tuple[int, str]:
    """The status and the body of a GET."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(10):
            data = await reader.read()
    finally:
        writer.transport.abort()
    head_bytes, _, content = data.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), content.decode(errors="replace")


def value(scrape: str, name: str) -> float:
    """The sum of all samples of this name."""
    rows = [line.rpartition(" ") for line in scrape.splitlines() if line.startswith(name)]
    return sum(float(number) for sample, _, number in rows if sample.partition("{")[0] == name)
