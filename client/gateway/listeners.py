"""Who is told of requests: the monitor behind the page, and metrics; each can be left out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self

from client.gateway.requests import ActiveRequest
from client.session.trace import Trace

if TYPE_CHECKING:
    from types import TracebackType


class RequestWatch(Protocol):
    """One request, as the monitor follows it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def began(self, choices: int | None = None) -> None:
        """It has left the admission queue.  choices: that are computed at a time; None: all."""

    def answered(self, choice: int) -> None:
        """One of its answers is over; its session may serve another request from now on."""

    def trace(self, choice: int = 0) -> Trace:
        """A trace for a new session of one of its answers."""

    def follow(self, trace: Trace, choice: int = 0) -> None:
        """An answer goes on with a session that has this trace."""

    def token(self, choice: int = 0) -> Mapping[str, Any]:
        """A token has come; the hops and events of it, for a chunk.  Any: JSON."""


class RequestMonitor(Protocol):
    """Follows all requests."""

    def request(self, id: str, kind: str, model: str, *max_tokens: int | None) -> RequestWatch:
        """A new request.  max_tokens: of each of its answers."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Its own tasks run within the block."""

    def stop(self) -> None:
        """The gateway is about to end: listeners leave."""


class RequestMetrics(Protocol):
    """Counts all requests.  Every method is called in the event loop and returns at once."""

    def request_began(self, request: ActiveRequest) -> None:
        """It has come, and may have to wait."""

    def first_token(self, request: ActiveRequest, seconds: float) -> None:
        """Its first token, this long after it came."""

    def token(self, request: ActiveRequest) -> None:
        """A token after the first."""

    def ended(self, request: ActiveRequest, status: int, cancelled_by: str) -> None:
        """Its end.  cancelled_by: "client", "deadline", "shutdown", or "" where it was answered."""

    def rejected(self, reason: str) -> None:
        """A request was not taken."""

    def answered(self, path: str, status: int) -> None:
        """An answer of any kind has begun."""


class NoWatch:
    """Follows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def began(self, choices: int | None = None) -> None:
        """See `RequestWatch`."""

    def answered(self, choice: int) -> None:
        """See `RequestWatch`."""

    def trace(self, choice: int = 0) -> Trace:
        """See `RequestWatch`."""
        return Trace()

    def follow(self, trace: Trace, choice: int = 0) -> None:
        """See `RequestWatch`."""

    def token(self, choice: int = 0) -> Mapping[str, Any]:
        """See `RequestWatch`."""
        return {}


class NoMonitor:
    """A gateway without a monitor."""

    def request(self, id: str, kind: str, model: str, *max_tokens: int | None) -> RequestWatch:
        """See `RequestMonitor`."""
        return NoWatch()

    def running(self) -> AbstractAsyncContextManager[None]:
        """See `RequestMonitor`."""
        return nullcontext()

    def stop(self) -> None:
        """See `RequestMonitor`."""


class NoMetrics:
    """A gateway without metrics."""

    def request_began(self, request: ActiveRequest) -> None:
        """See `RequestMetrics`."""

    def first_token(self, request: ActiveRequest, seconds: float) -> None:
        """See `RequestMetrics`."""

    def token(self, request: ActiveRequest) -> None:
        """See `RequestMetrics`."""

    def ended(self, request: ActiveRequest, status: int, cancelled_by: str) -> None:
        """See `RequestMetrics`."""

    def rejected(self, reason: str) -> None:
        """See `RequestMetrics`."""

    def answered(self, path: str, status: int) -> None:
        """See `RequestMetrics`."""
