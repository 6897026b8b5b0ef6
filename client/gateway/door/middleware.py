"""What every request passes first: its id, size of headers, Host, Origin and key; and what every answer gets.

A plain ASGI middleware around all routes.  What it refuses is answered in OpenAI's shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.gateway.door.hosts import Hosts, Origins
from client.gateway.door.keys import Caller, KeyRing
from client.gateway.openai.errors import RequestError, error_of
from client.gateway.telemetry.spans import caller_context

_SOUND_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_TRACE_HEADERS = ("traceparent", "tracestate")  # of W3C
_OPEN_PATHS = re.compile(r"/(health|assets/.*)?")
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom the gateway answers.

    open_paths: besides the page and /health, without a key.
    rejected: called with the reason, answered: with each path and status; for metrics.
    """

    keys: KeyRing
    hosts: Hosts = field(default_factory=Hosts)
    origins: Origins = field(default_factory=Origins)
    max_header_bytes: int = 32 << 10
    open_paths: frozenset[str] = frozenset()
    rejected: Callable[[str], object] = lambda _: None
    answered: Callable[[str, int], object] = lambda _path, _status: None

    def caller_of(self, scope: Scope, headers: Headers) -> Caller:
        """Whoever asks.  Raises RequestError where that needs a key and none of ours is shown."""
        client = scope.get("client")
        if not self.keys.is_needed:
            return Caller(client[0] if client else "local")
        kind, _, shown = headers.get("authorization", "").partition(" ")
        key = self.keys.find(shown.strip(" \t")) if kind.lower() == "bearer" else None
        if key is not None:
            return Caller(key.name, key.requests_per_minute, key.tokens_per_minute)
        if _OPEN_PATHS.fullmatch(scope["path"]) or scope["path"] in self.open_paths:
            return Caller("")
        self.rejected("key")
        what = "this key is not one of the gateway's" if shown else "a key is needed"
        raise RequestError(
            401,
            f"{what}: Authorization: Bearer KEY",
            type="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def check_host(self, headers: Headers) -> None:
        """Raise RequestError for a name that is not ours, and for a page that may not ask."""
        named, origin = headers.getlist("host") or [""], headers.get("origin")
        host = next((each for each in named if not self.hosts.admits(each)), None)
        if host is not None:
            self.rejected("host")
            raise RequestError(
                403,
                f"this gateway does not answer under the name {host[:80]!r} (--allowed-host)",
                type="permission_error",
                code="host_not_allowed",
            )
        if origin is not None and not self.origins.admits(origin, named[0]):
            self.rejected("origin")
            raise RequestError(
                403,
                f"pages of {origin[:80]!r} may not ask this gateway (--cors-origin)",
                type="permission_error",
                code="origin_not_allowed",
            )


class Door:
    """The middleware.  `scope["state"]` gets `request_id` and `caller`."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "traceparent" in headers:
            caller_context.set({name: headers[name] for name in _TRACE_HEADERS if name in headers})
        given = headers.get("x-request-id", "")
        request_id = given if _SOUND_ID.fullmatch(given) else uuid4().hex
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._rules.answered(scope["path"], message["status"])
                self._add_headers(MutableHeaders(scope=message), headers, scope["state"]["request_id"])
            await send(message)

        try:
            response = self._look(scope, headers, request_id)
            await (self._app if response is None else response)(scope, receive, send_guarded)
        except Exception as error:  # noqa: BLE001  an answer without a traceback; the log has it
            failed = error_of(error, request_id)
            if not has_begun:
                await failed.response()(scope, receive, send_guarded)

    def _look(self, scope: Scope, headers: Headers, request_id: str) -> Response | None:
        """The answer where there is nothing more to ask; None where the request goes on."""
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        state: dict[str, Any] = scope.setdefault("state", {})  # Any: starlette's
        state["request_id"] = request_id
        if size > self._rules.max_header_bytes:
            most = self._rules.max_header_bytes
            return headers_too_large(f"headers and URL take {size} bytes, {most} are allowed").response()
        try:
            self._rules.check_host(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                return Response(status_code=204, headers=self._rules.origins.preflight(_plain(headers)))
            state["caller"] = self._rules.caller_of(scope, headers)
        except RequestError as refused:
            return refused.response()
        return None

    def _add_headers(self, answer: MutableHeaders, asked: Headers, request_id: str) -> None:
        answer["x-request-id"] = request_id
        for name, value in SECURITY_HEADERS.items():
            answer.setdefault(name, value)
        origin, host = asked.get("origin"), asked.get("host", "")
        origins = self._rules.origins
        if origin is not None and origins.is_foreign(origin, host) and origins.admits(origin, host):
            answer["cross-origin-resource-policy"] = "cross-origin"
            for name, value in origins.headers(origin).items():
                answer[name] = value


def headers_too_large(message: str) -> RequestError:
    """431, and the end of the connection."""
    return RequestError(431, message, code="headers_too_large", headers={"connection": "close"})


def _plain(headers: Headers) -> Mapping[str, str]:
    return dict(headers.items())
