"""Spans of requests for OpenTelemetry (the extra `raceme[otel]`): one a request, children for its parts.

Names and attributes are those of OpenTelemetry's conventions for generative AI, as far as there are any; the
others begin with `raceme.`.  A request with `raceme.trace` has an event in its span for each step, and for
each fault and what mends it; the SDK keeps the last 128 events of a span, OTEL_SPAN_EVENT_COUNT_LIMIT says
otherwise.  Prompts and answers are in no span.  Spans leave in batches, from a thread of
the SDK.  Nothing here is imported unless an endpoint is set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from client.gateway.telemetry.children import ChildSpan, SessionEvents, SessionSpans, Value, hops_of
from node.config import VERSION, ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

    from client.gateway.requests import ActiveRequest
    from client.session.trace import Event, Trace

OPERATIONS = {"chat": "chat", "completion": "text_completion", "response": "chat"}
REASONS = {"end": "stop"}  # in the words of OpenAI's API
EXPORT_SECONDS = 5.0  # at the end, for spans that are on their way
TRACES_PATH = "/v1/traces"  # of OTLP over HTTP

# The headers traceparent and tracestate (W3C Trace Context) of the request that is served in this context.
caller_context: ContextVar[Mapping[str, str]] = ContextVar("caller_context", default={})  # noqa: B039  read only


class RequestSpan(Protocol):
    """The span of one request."""

    def began(self) -> None:
        """It has left the admission queue."""

    def follow(self, trace: Trace) -> None:
        """An answer of it is computed by a session with this trace, until `leave` or the request's end."""

    def leave(self, trace: Trace) -> None:
        """That answer is over; the session may serve another request."""

    def token(self, finish_reason: str | None) -> None:
        """A token has come."""

    def ended(self, status: int, cancelled_by: str) -> None:
        """Its end.  status: of HTTP.  cancelled_by: client, deadline, shutdown; "" where it was answered."""


class Spans(Protocol):
    """Makes the spans of all requests."""

    def request(self, request: ActiveRequest) -> RequestSpan:
        """A request has come."""

    def close(self) -> None:
        """Send what is left; may take EXPORT_SECONDS."""


class NoSpan:
    """No span."""

    def began(self) -> None:
        """See `RequestSpan`."""

    def follow(self, trace: Trace) -> None:
        """See `RequestSpan`."""

    def leave(self, trace: Trace) -> None:
        """See `RequestSpan`."""

    def token(self, finish_reason: str | None) -> None:
        """See `RequestSpan`."""

    def ended(self, status: int, cancelled_by: str) -> None:
        """See `RequestSpan`."""


class NoSpans:
    """A gateway without OpenTelemetry."""

    def request(self, request: ActiveRequest) -> RequestSpan:
        """See `Spans`."""
        return NoSpan()

    def close(self) -> None:
        """Nothing is open."""


class OpenTelemetrySpans:
    """Spans by a tracer of OpenTelemetry.  provider: to be shut down by `close`; None: the caller's."""

    def __init__(self, tracer: Tracer, provider: TracerProvider | None = None) -> None:
        self._tracer = tracer
        self._provider = provider

    def request(self, request: ActiveRequest) -> RequestSpan:
        """See `Spans`."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(caller_context.get()))
        operation = OPERATIONS[request.kind]
        span = self._tracer.start_span(
            f"{operation} {request.model}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "raceme",
                "gen_ai.request.model": request.model,
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.response.id": request.id,
                "http.route": request.route,
            },
        )
        return _RequestSpan(self._tracer, span, request)

    def close(self) -> None:
        """Send what is left; takes up to EXPORT_SECONDS."""
        if self._provider is not None:
            self._provider.force_flush(int(EXPORT_SECONDS * 1e3))
            self._provider.shutdown()


@dataclass(slots=True)
class _RequestSpan:
    """The span of one request.  Times of children are `time.perf_counter`'s, put on the clock of spans."""

    tracer: Tracer
    span: Span
    request: ActiveRequest
    _arrived: float = field(default_factory=time.perf_counter)
    _began: float | None = None
    _had_token: bool = False
    _reasons: list[str] = field(default_factory=list)
    _followed: list[tuple[Trace, Callable[[Event], None]]] = field(default_factory=list)
    _traced: int = 0  # sessions whose events are noted
    _offset: int = field(default_factory=lambda: time.time_ns() - time.perf_counter_ns())

    def began(self) -> None:
        """See `RequestSpan`."""
        self._began = time.perf_counter()
        self._child(ChildSpan("queue", self._arrived, self._began))

    def follow(self, trace: Trace) -> None:
        """See `RequestSpan`."""
        self._listen(trace, partial(self._take, SessionSpans()))
        if self.request.traced and self.span.is_recording():
            route = trace.route
            self._traced += 1
            events = SessionEvents(() if route is None else hops_of(route.data))
            self._listen(trace, partial(self._note, events, self._traced))

    def _listen(self, trace: Trace, listener: Callable[[Event], None]) -> None:
        trace.listen(listener)
        self._followed.append((trace, listener))

    def leave(self, trace: Trace) -> None:
        """See `RequestSpan`."""
        for followed, listener in self._followed:
            if followed is trace:
                followed.unlisten(listener)
        self._followed = [each for each in self._followed if each[0] is not trace]

    def token(self, finish_reason: str | None) -> None:
        """See `RequestSpan`."""
        if not self._had_token:
            self._had_token = True
            began = self._arrived if self._began is None else self._began
            tokens: dict[str, Value] = {
                "raceme.prompt_tokens": self.request.prompt_tokens,
                "raceme.cached_prompt_tokens": self.request.cached_tokens,
            }
            self._child(ChildSpan("prefill", began, time.perf_counter(), tokens))
        if finish_reason is not None:
            self._reasons.append(REASONS.get(finish_reason, finish_reason))

    def ended(self, status: int, cancelled_by: str) -> None:
        """See `RequestSpan`."""
        from opentelemetry.trace import Status, StatusCode

        for followed, listener in self._followed:
            followed.unlisten(listener)
        request = self.request
        self.span.set_attributes(
            {
                "gen_ai.usage.input_tokens": request.prompt_tokens,
                "gen_ai.usage.output_tokens": request.completion_tokens,
                "raceme.cached_prompt_tokens": request.cached_tokens,
                "gen_ai.response.finish_reasons": self._reasons,
                "http.response.status_code": status,
            }
        )
        if cancelled_by:
            self.span.set_attribute("raceme.cancelled_by", cancelled_by)
        if status >= 500:
            self.span.set_attribute("error.type", str(status))
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()

    def _take(self, session: SessionSpans, event: Event) -> None:
        """An event of a session, in trio's thread."""
        if (child := session.take(event)) is not None:
            self._child(child)

    def _note(self, events: SessionEvents, session: int, event: Event) -> None:
        """An event of a session that the caller wants to know, in trio's thread."""
        if (noted := events.take(event)) is not None:
            attributes = dict(noted.attributes) | {"raceme.session": session}
            self.span.add_event(noted.name, attributes, self._nanoseconds(noted.at))

    def _child(self, child: ChildSpan) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        context: Context = set_span_in_context(self.span)
        span = self.tracer.start_span(
            child.name, context, attributes=dict(child.attributes), start_time=self._nanoseconds(child.began)
        )
        if child.failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._nanoseconds(child.ended))

    def _nanoseconds(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


def open_spans(endpoint: str | None) -> Spans:
    """Spans that go to an OTLP endpoint over HTTP, `http://HOST:4318`; none without one.

    The SDK's own environment variables (OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS, samplers) hold.
    Raises ConfigError.
    """
    if not endpoint:
        return NoSpans()
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--otlp-endpoint {endpoint}: a URL is needed, for instance http://127.0.0.1:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            'spans need the packages of OpenTelemetry: pip install ".[otel]" in Raceme\'s folder'
        ) from None
    known: dict[str, Any] = {"service.version": VERSION}  # Any: the SDK's
    resource = Resource.create(known)
    if resource.attributes.get("service.name", "unknown_service").startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "raceme-gateway"}))
    provider = TracerProvider(resource=resource)
    path = "" if parts.path.rstrip("/").endswith(TRACES_PATH) else TRACES_PATH
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + path, timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetrySpans(provider.get_tracer("raceme.gateway", VERSION), provider)
