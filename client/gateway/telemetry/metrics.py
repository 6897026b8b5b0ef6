"""The gateway's own counters and histograms, and its scrape: requests, sessions, swarm."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from client.metrics import families as of
from client.metrics.sessions import SessionMetrics
from node.config import VERSION
from node.monitor.metrics.exposition import exposition
from node.monitor.metrics.families import BUILD_INFO, NODE_SCRAPE, Sheet, text
from node.monitor.metrics.histogram import Histogram
from node.monitor.metrics.swarm import put_servers, put_swarm


class CountedRequest(Protocol):
    """The part of a gateway's request that is counted."""

    @property
    def route(self) -> str:
        """The pattern of its path."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of them that the caches held already."""

    @property
    def completion_tokens(self) -> int:
        """Tokens that were generated for it."""

    @property
    def queued_seconds(self) -> float:
        """Time that it waited for admission."""


@dataclass(frozen=True, slots=True)
class ScrapedGateway:
    """What a scrape reads of a gateway at its moment.  facts: the description of its swarm."""

    active: int
    queued: int
    ready: bool
    model: str
    revision: str
    facts: Mapping[str, Any]  # Any: JSON


@dataclass(slots=True)
class _Timed:
    """A request that is served.  last: when its last token came, None before the first."""

    began: float
    last: float | None = None

    def token(self, now: float) -> float:
        """A token has come: the seconds since the one before, or since the beginning."""
        before, self.last = self.began if self.last is None else self.last, now
        return now - before


@dataclass(slots=True)
class GatewayMetrics:
    """Counts a gateway's requests.  For one thread; any thread may scrape.

    sessions: of the gateway's client.  clock: in seconds.
    Promises, checked by tests/unit/test_gateway_metrics.py:
      * every answer counts once under its route and its status, whatever was asked;
      * its first token is one observation of the time to the first token, and each further one of the time
        per output token;
      * every label comes from a closed set, whatever a route, a reason or a status is.
    """

    clock: Callable[[], float] = time.perf_counter
    sessions: SessionMetrics = field(default_factory=SessionMetrics)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rejections: Counter[str] = field(default_factory=Counter)
    cancellations: Counter[str] = field(default_factory=Counter)
    _answered: Counter[tuple[str, str]] = field(default_factory=Counter)
    _first: dict[str, Histogram] = field(default_factory=dict)
    _further: dict[str, Histogram] = field(default_factory=dict)
    _whole: dict[str, Histogram] = field(default_factory=dict)
    _queue: Histogram = field(default_factory=Histogram)
    _running: dict[int, _Timed] = field(default_factory=dict)  # by id() of requests that are held elsewhere
    _scrape_seconds: float = 0.0

    # --- for those that serve requests ---

    def request_began(self, request: CountedRequest) -> None:
        """A request for tokens has been read."""
        self._running[id(request)] = _Timed(self.clock())

    def first_token(self, request: CountedRequest, seconds: float | None = None) -> None:
        """Its first token is there.  seconds: since the request's arrival; None: since `request_began`."""
        since_arrival = self._running[id(request)].token(self.clock())
        _of_route(self._first, request.route).observe(since_arrival if seconds is None else seconds)

    def token(self, request: CountedRequest) -> None:
        """A further token is there."""
        _of_route(self._further, request.route).observe(self._running[id(request)].token(self.clock()))

    def ended(self, request: CountedRequest, status: int = 200, cancelled_by: str = "") -> None:
        """The request is over.  cancelled_by: client, deadline, shutdown; "" where it was answered."""
        timed = self._running.pop(id(request), None)
        if timed is not None:
            _of_route(self._whole, request.route).observe(self.clock() - timed.began)
        self._queue.observe(request.queued_seconds)
        self.prompt_tokens += request.prompt_tokens
        self.cached_tokens += request.cached_tokens
        self.generated_tokens += request.completion_tokens
        if cancelled_by:
            self.cancellations[_one_of(cancelled_by, of.CANCELLED_BY, "client")] += 1

    def answered(self, path: str, status: int) -> None:
        """An answer to a request of any kind has begun.  path: of its URL."""
        known = str(status) if 100 <= status <= 599 else "other"
        self._answered[route_of(path), known] += 1

    def rejected(self, reason: str) -> None:
        """A request was turned away before it was served."""
        self.rejections[_one_of(reason, of.REASONS)] += 1

    # --- for a scrape ---

    def scrape(self, gateway: ScrapedGateway, accept: str) -> tuple[str, bytes]:
        """The content type and the text of every metric of the gateway.  For any thread."""
        began = self.clock()
        sheet = Sheet()
        labels = dict.fromkeys(BUILD_INFO.labels, "")
        labels |= {"version": VERSION, "role": "gateway", "model": text(gateway.model)}
        sheet.put(BUILD_INFO, 1, **{**labels, "revision": gateway.revision})
        sheet.put(of.ACTIVE, gateway.active)
        sheet.put(of.QUEUED, gateway.queued)
        sheet.put(of.READY, float(gateway.ready))
        self._put(sheet)
        self.sessions.put(sheet)
        put_swarm(sheet, gateway.facts)
        put_servers(sheet, gateway.facts)
        sheet.put(NODE_SCRAPE, self._scrape_seconds)
        found = exposition(sheet, accept)
        self._scrape_seconds = self.clock() - began
        return found

    def _put(self, sheet: Sheet) -> None:
        for (route, status), count in sorted(self._answered.copy().items()):
            sheet.put(of.REQUESTS, count, route=route, status=status)
        for family, by_route in (
            (of.FIRST_TOKEN, self._first),
            (of.OUTPUT_TOKEN, self._further),
            (of.REQUEST_SECONDS, self._whole),
        ):
            for route, histogram in sorted(by_route.copy().items()):
                sheet.histogram(family, histogram, route=route)
        sheet.histogram(of.QUEUE_SECONDS, self._queue)
        sheet.put(of.PROMPT_TOKENS, self.prompt_tokens)
        sheet.put(of.CACHED_TOKENS, self.cached_tokens)
        sheet.put(of.GENERATED_TOKENS, self.generated_tokens)
        for reason in of.REASONS:
            sheet.put(of.REJECTED, self.rejections[reason], reason=reason)
        for by in of.CANCELLED_BY:
            sheet.put(of.CANCELLED, self.cancellations[by], by=by)


def route_of(path: str) -> str:
    """The route of a path, one of ROUTES."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    if path.startswith("/api/"):
        return "/api"
    if path == "/" or path.startswith("/assets/"):
        return "page"
    return _one_of(path, of.ROUTES)


def _of_route(histograms: dict[str, Histogram], route: str) -> Histogram:
    return histograms.setdefault(_one_of(route, of.ROUTES), Histogram())


def _one_of(value: str, known: tuple[str, ...], otherwise: str = "other") -> str:
    return value if value in known else otherwise
