"""GET /metrics and /health of a node: a small HTTP server on trio, over h11.

Each connection carries one request.  Its bytes, its seconds and the number of connections are bounded
(`Limits`), so that a slow or hostile reader costs the node nothing but a place here.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import h11
import trio

from node.config import ConfigError
from node.monitor.metrics.address import MetricsAddress
from node.monitor.metrics.exposition import exposition
from node.monitor.metrics.node import NodeMetrics
from tensor_codec.limits import Limits

log = logging.getLogger("raceme")

PLAIN = "text/plain; charset=utf-8"
_READ_BYTES = 4096
_LEFT_UNREAD = 64  # reads of bytes that are dropped after the answer: a reset would overtake it
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_PAUSE_SECONDS = 0.1  # before the next accept, where the system has no room for a socket


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request."""

    status: int
    body: bytes
    content_type: str = PLAIN
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[str], Answer]  # from an Accept header


def pages_of(metrics: NodeMetrics, clock: Callable[[], float] = time.perf_counter) -> Mapping[str, Page]:
    """The pages of a node by their paths."""

    def scrape(accept: str) -> Answer:
        began = clock()
        content_type, body = exposition(metrics.sheet(), accept)
        metrics.scraped(clock() - began)
        return Answer(200, body, content_type)

    def health(_: str) -> Answer:
        return Answer(200, json.dumps(metrics.health()).encode() + b"\n", "application/json")

    return {"/metrics": scrape, "/health": health}


def answer(request: h11.Request, address: MetricsAddress, pages: Mapping[str, Page]) -> Answer:
    """The answer to a request whose head has come.  Reads the pages, and decides nothing else."""
    headers = dict(request.headers)
    host = headers.get(b"host", b"").decode("latin-1")
    if not address.admits(host):
        return _plain(403, f"the host {host[:64]!r} is not one of this node's: see --metrics-host")
    path = request.target.decode("latin-1").partition("?")[0]
    if path not in pages:
        return _plain(404, f"there are {' and '.join(pages)}")
    if request.method != b"GET":
        return Answer(405, b"GET alone is answered\n", headers={"Allow": "GET"})
    return pages[path](headers.get(b"accept", b"").decode("latin-1"))


def _plain(status: int, text: str) -> Answer:
    return Answer(status, text.encode("utf-8", "replace") + b"\n")


@dataclass(slots=True)
class MetricsEndpoint:
    """Serves `pages` at an address, until cancelled.  Made and started by `open_endpoint`."""

    address: MetricsAddress
    pages: Mapping[str, Page]
    limits: Limits
    _places: trio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._places = trio.Semaphore(self.limits.max_metrics_connections)

    async def run(
        self,
        listeners: Sequence[trio.abc.Listener[trio.SocketStream]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept connections at these sockets."""
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept, listener, nursery)
            task_status.started()

    async def _accept(self, listener: trio.abc.Listener[trio.SocketStream], nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in _NO_MORE_FILES:
                        raise
                    await trio.sleep(_PAUSE_SECONDS)
                    continue
                await self._places.acquire()
                nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        try:
            await self.serve(stream)
        finally:
            self._places.release()

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Answer one request within `metrics_seconds`, and close the stream."""
        try:
            with suppress(trio.BrokenResourceError), trio.move_on_after(self.limits.metrics_seconds):
                await self._exchange(stream)
        finally:
            await trio.aclose_forcefully(stream)

    async def _exchange(self, stream: trio.abc.HalfCloseableStream) -> None:
        most = self.limits.max_metrics_request_bytes
        parser, request = h11.Connection(h11.SERVER, max_incomplete_event_size=most), None
        try:
            request = await _head(parser, stream, most)
            if request is None:
                return
            found = answer(request, self.address, self.pages)
        except h11.RemoteProtocolError as error:
            found = _plain(error.error_status_hint or 400, "not a request of HTTP/1.1")
        head = {
            "Content-Type": found.content_type,
            "Content-Length": str(len(found.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
            **found.headers,
        }
        sent = parser.send(h11.Response(status_code=found.status, headers=list(head.items()))) or b""
        if request is None or request.method != b"HEAD":
            sent += parser.send(h11.Data(data=found.body)) or b""
        await stream.send_all(sent + (parser.send(h11.EndOfMessage()) or b""))
        await stream.send_eof()
        for _ in range(_LEFT_UNREAD):
            if not await stream.receive_some(_READ_BYTES):
                break


async def _head(parser: h11.Connection, stream: trio.abc.ReceiveStream, most: int) -> h11.Request | None:
    """The line and the headers of the request, at most so many bytes; None where the client leaves.

    Raises RemoteProtocolError.
    """
    room = most
    while True:
        event = parser.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        if not room:
            raise h11.RemoteProtocolError(f"more than {most} bytes", error_status_hint=431)
        data = await stream.receive_some(min(_READ_BYTES, room))
        room -= len(data)
        parser.receive_data(bytes(data))


async def open_endpoint(
    address: MetricsAddress, pages: Mapping[str, Page], limits: Limits, nursery: trio.Nursery
) -> tuple[str, int]:
    """Listen, and serve in `nursery`; the address that was taken.  Raises ConfigError."""
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise ConfigError(f"--metrics {address}: cannot listen there: {error.strerror or error}") from None
    endpoint = MetricsEndpoint(address, pages, limits)
    host, port = listeners[0].socket.getsockname()[:2]
    await nursery.start(partial(endpoint.run, listeners))
    log.info("metrics at http://%s/metrics", MetricsAddress(host, port))
    return host, port
