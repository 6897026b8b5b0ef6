"""Errors in OpenAI's shape: a status, a type, a code, a text without a path or a traceback."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from client.gateway.door.queue import NoPlace
from client.gateway.formats.errors import FormatError
from routing.chains.hops import NoChain
from tensor_codec.errors import PeerFault, Refused

log = logging.getLogger("raceme")

NO_CHAIN_RETRY_SECONDS = 5.0  # a server that starts again takes some seconds
REFUSED_RETRY_SECONDS = 5.0  # where the servers name no time
MAX_TEXT = 1000  # of a message: it may repeat a caller's own words


@dataclass(eq=False, slots=True)
class RequestError(Exception):
    """An answer that is an error.  param: the dotted path of a field, where one is wrong."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:  # Any: JSON
        """OpenAI's object."""
        message = self.message if len(self.message) <= MAX_TEXT else self.message[:MAX_TEXT] + "..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, dict(self.headers))


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A field that is wrong: 400."""
    return RequestError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> RequestError:
    """A field of OpenAI's that the gateway does not do: 400."""
    return RequestError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def too_many(
    message: str, retry_after_seconds: float, headers: Mapping[str, str] | None = None
) -> RequestError:
    """Too many requests or tokens: 429."""
    return RequestError(
        429,
        message,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": _seconds(retry_after_seconds), **(headers or {})},
    )


def shutting_down() -> RequestError:
    """The gateway ends: 503."""
    return RequestError(
        503,
        "this gateway is being shut down: ask another one, or again in a while",
        type="server_error",
        code="shutting_down",
        headers={"retry-after": "5", "connection": "close"},
    )


def known_error(error: BaseException) -> RequestError | None:
    """The answer to an error that has one of its own; None for all others."""
    match error:
        case RequestError():
            return error
        case FormatError():
            return invalid(error.message, error.param, error.code)
        case NoPlace():
            return too_many(str(error), error.retry_after_seconds, error.headers)
        case NoChain():
            return RequestError(
                503,
                f"the swarm cannot serve the model now: {error}",
                type="server_error",
                code="no_chain",
                headers={"retry-after": _seconds(NO_CHAIN_RETRY_SECONDS)},
            )
        case Refused():
            after = error.retry_after_seconds
            return RequestError(
                503,
                f"the swarm's servers are full: {error}",
                type="server_error",
                code="overloaded",
                headers={"retry-after": _seconds(REFUSED_RETRY_SECONDS if after is None else after)},
            )
        case PeerFault():
            return RequestError(
                502, f"the swarm's servers failed: {error}", type="server_error", code="peer_fault"
            )
    return None


def error_of(error: BaseException, request_id: str) -> RequestError:
    """The answer to an error; one that nobody expected goes to the log, with the request's id."""
    known = known_error(error)
    if known is not None:
        return known
    log.error("request %s failed", request_id, exc_info=error)
    return RequestError(
        500,
        f"an error in this gateway; its log has more about request {request_id}",
        type="server_error",
        code="internal_error",
    )


def status_of(error: BaseException) -> int:
    """The status of the answer to an error."""
    known = known_error(error)
    return 500 if known is None else known.status


def _seconds(seconds: float) -> str:
    """Of Retry-After: whole seconds, at least one."""
    return str(max(1, min(3600, math.ceil(seconds) if math.isfinite(seconds) else 3600)))
