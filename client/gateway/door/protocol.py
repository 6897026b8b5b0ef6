"""uvicorn's connection with bounds on what comes before a request, and on readers that take nothing.

uvicorn bounds neither headers (with httptools) nor the time until a request, and a response that nobody
reads waits for ever.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from client.gateway.door.addresses import REFUSED_AT_ONCE, Addresses
from client.gateway.door.limits import HttpLimits

CLOSE = "raceme.close"  # of ASGI's extensions: called by an answer, ends the connection after it
SEND_BUFFER_BYTES = 64 << 10  # of the socket: a slow reader is seen after these, not after megabytes
LEFT_SECONDS = 1.0  # for a client to read why it is refused
WRITE_BUFFER_BYTES = 32 << 10  # of the event loop, after which a response waits for its reader


class BoundedProtocol(HttpToolsProtocol):
    """One connection.  Made by `bounded`, which sets `limits`, and `addresses` of all its connections."""

    limits = HttpLimits()
    addresses = Addresses(HttpLimits().max_connections_per_address)

    def __init__(self, *args: Any, **arguments: Any) -> None:  # Any: uvicorn's own
        super().__init__(*args, **arguments)
        self._header_bytes = 0
        self._in_headers = True
        self._is_refused = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        """A client comes."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        found: socket.socket | None = transport.get_extra_info("socket")
        if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        verdict = self.addresses.came(self._address)
        most = self.limits.max_connections
        beyond = len(self.connections) - most
        if verdict == "closed" or beyond > REFUSED_AT_ONCE:
            self._is_refused = True
            transport.abort()
        elif verdict == "refused":
            most = self.addresses.most
            self._refuse(503, "overloaded", f"{most} connections of this address are open, the most allowed")
        elif beyond > 0:
            self._refuse(503, "overloaded", f"{most} connections are open, that is the most allowed")
        else:
            self._wait_for_headers()

    @property
    def _address(self) -> str | None:
        """Of the client."""
        return None if self.client is None else self.client[0]

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        for timer in (self._header_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        self.addresses.left(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._is_refused:
            return
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.limits.max_header_bytes and not self._is_refused:
            most = self.limits.max_header_bytes
            self._refuse(431, "headers_too_large", f"the headers have more than {most} bytes")

    def on_message_begin(self) -> None:
        """The first bytes of a request."""
        super().on_message_begin()
        self._in_headers = True
        if self._header_timer is None:
            self._wait_for_headers()

    def on_headers_complete(self) -> None:
        """The end of the headers; the middleware looks at their size."""
        self._in_headers, self._header_bytes = False, 0
        vars(self)["scope"]["extensions"] = {CLOSE: self._close_after_answer}  # our own
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

    def _close_after_answer(self) -> None:
        """The connection ends with the answer that is being sent."""
        vars(self.cycle)["keep_alive"] = False

    def pause_writing(self) -> None:
        """The reader is slower than the answer."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self.limits.reader_seconds, self._look_at_reader)

    def resume_writing(self) -> None:
        """The reader has caught up."""
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _look_at_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread >= self._unread:  # nothing was taken; the response's task sees a client that has gone
            self.transport.abort()
            return
        self._unread = unread
        self._reader_timer = self.loop.call_later(self.limits.reader_seconds, self._look_at_reader)

    def _wait_for_headers(self) -> None:
        def too_late() -> None:
            seconds = self.limits.header_seconds
            if self._header_bytes:
                self._refuse(408, "request_timeout", f"no whole headers within {seconds:g} s")
            else:
                self.transport.close()

        self._header_timer = self.loop.call_later(self.limits.header_seconds, too_late)

    def send_400_response(self, msg: str) -> None:
        """What comes is not HTTP."""
        self._refuse(400, "invalid_http", "this is not HTTP")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer before there is a request, and close."""
        self._is_refused = True
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self.pipeline or self.cycle.response_started or not self.cycle.more_body:
                self.transport.abort()  # the answer to the request before is not over
                return
            vars(self.cycle)["disconnected"] = True  # its body is wrong: it is answered here
            self.cycle.message_event.set()
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # What still comes is dropped meanwhile: unread bytes would reset the socket, and the answer be lost.
        self.loop.call_later(LEFT_SECONDS, self.transport.close)


REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def bounded(limits: HttpLimits) -> type[BoundedProtocol]:
    """The class of connections with these limits."""
    own = {"limits": limits, "addresses": Addresses(limits.max_connections_per_address)}
    return type("Connection", (BoundedProtocol,), {**own, "__doc__": BoundedProtocol.__doc__})
