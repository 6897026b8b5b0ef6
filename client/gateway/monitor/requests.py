"""The state of one choice of a request, folded from the events of its session's trace.  Pure.

    queued -> prefill -> decode -> ended
                 \\        |  ^
                  \\       v  |
                   > recovering

An answer of the last hop with values is a token's; chunks of a prompt before the last bring none.  An answer
that comes again for positions that were answered already (its values could not be read) is no further token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from client.session.trace import Event

State = Literal["queued", "prefill", "decode", "recovering", "ended"]
RATE_TOKENS = 32  # the last ones, of which the rate is the mean
RATE_SECONDS = 5.0  # without a token in which the rate is 0
MAX_STEPS_KEPT = 256  # of one choice, for /api/traces: 100 requests take 20 MB at most
MAX_EVENTS_KEPT = 128  # of the other kinds
MAX_UNREAD = 256  # steps whose token nobody has taken: the bridge to trio holds 8 tokens

Json = dict[str, Any]  # Any: JSON
Kept = tuple[int, Json]  # an event with its place in the order of its request's events


@dataclass(slots=True)
class Window:
    """The steps since the last summary."""

    tokens: int = 0
    began: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    hops: list[list[float]] = field(default_factory=list)  # of each hop, held and computed seconds in all

    def add(self, step: Mapping[str, Any], tokens: int) -> None:  # Any: JSON
        """One step.  Times of another number of hops than before begin anew: the route has changed."""
        if len(self.hops) != len(step["hops"]):
            self.hops, self.steps = [[0.0, 0.0] for _ in step["hops"]], 0
        for total, (held, computed) in zip(self.hops, step["hops"], strict=True):
            total[0] += held
            total[1] += computed
        self.tokens += tokens
        self.seconds += step["seconds"]
        self.steps += 1

    def reroute(self) -> None:
        """The route has changed: the times of its hops begin anew."""
        self.hops, self.steps = [], 0


@dataclass(slots=True)
class Choice:
    """One choice of a request: one session, or several one after the other.

    index: among the choices of the request.  max_tokens: of its answer, None where there is no bound.
    Times are seconds of the caller's clock, `at` Unix seconds.
    """

    index: int = 0
    max_tokens: int | None = None
    state: State = "queued"
    route: list[tuple[str, list[int]]] = field(default_factory=list)  # peer, blocks
    tokens: int = 0
    recoveries: int = 0
    steps: deque[Kept] = field(default_factory=lambda: deque(maxlen=MAX_STEPS_KEPT))
    events: deque[Kept] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS_KEPT))
    _answered: int = 0  # positions whose answer has come
    _last: Mapping[str, Any] | None = None  # the last step.  Any: JSON
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_TOKENS + 1))
    _window: Window = field(default_factory=Window)
    _unread: deque[tuple[str, Json]] = field(default_factory=lambda: deque(maxlen=MAX_UNREAD))

    def begin(self) -> None:
        """The request has left the queue."""
        if self.state == "queued":
            self.state = "prefill"

    def take_in(self, event: Event, at: float, number: int = 0) -> Json | None:
        """Take in an event of the trace; the event for the feed, None for a step.

        at: Unix seconds.  number: its place among the request's events.
        """
        said = {"kind": event.kind, "at": round(at, 6), **event.data}
        if event.kind == "step":
            self._step(event, (number, said))
            return None
        self.events.append((number, said))
        match event.kind:
            case "opened" | "rerouted":
                self.route = [(hop["peer"], list(hop["blocks"])) for hop in event.data["hops"]]
                self._last = None
                self._window.reroute()
                self.recoveries += event.kind == "rerouted"
                if event.kind == "opened":
                    self.state = "prefill"
            case "fault":
                self.state = "recovering"
            case "recovered":
                self.state = "decode" if self.tokens else "prefill"
        if event.kind == "ended":
            return None  # of a session; the request's own end is told once, by its watch
        self._unread.append(("event", said))
        more = {"positions": said["stop"] - said["start"]} if event.kind == "replayed" else {}
        told = {key: value for key, value in said.items() if key != "kind"}
        return {"what": event.kind, **told, **more}

    def _step(self, event: Event, kept: Kept) -> None:
        step, end = event.data, event.data["position"] + event.data["tokens"]
        token = step["received"] > 0 and end > self._answered
        if token:
            self._answered = end
            self.tokens += 1
            self._times.append(event.at)
            self.state = "decode"
        elif self.state in ("queued", "recovering"):
            self.state = "decode" if self.tokens else "prefill"
        self._last = step
        self._window.add(step, int(token))
        self.steps.append(kept)
        self._unread.append(("token" if token else "step", kept[1]))

    def token(self) -> Json:
        """The hops' times of the next token, and the events up to it: the facts of one chunk of a stream."""
        hops: list[list[Any]] = []  # Any: JSON
        events: list[Json] = []
        while self._unread:
            kind, said = self._unread.popleft()
            if kind == "event":
                events.append(said)
            else:
                hops = self._named([[held, computed] for held, computed in said["hops"]])
            if kind == "token":
                break
        return {"hops": hops, "events": events}

    def rate(self, now: float) -> float:
        """Tokens per second of the last RATE_TOKENS tokens."""
        if len(self._times) < 2 or now - self._times[-1] > RATE_SECONDS:
            return 0.0
        seconds = self._times[-1] - self._times[0]
        return (len(self._times) - 1) / seconds if seconds > 0 else 0.0

    def summary(self) -> Json | None:
        """The steps since the last summary, None without any.  hops: means."""
        window, self._window = self._window, Window()
        if not window.steps and not window.tokens:
            return None
        hops = self._named([[total / window.steps for total in hop] for hop in window.hops])
        return {"what": "steps", "tokens": window.tokens, "seconds": round(window.seconds, 6), "hops": hops}

    def hops(self, names: Mapping[str, str]) -> list[Json]:
        """The route with the times of the last step."""
        times: Sequence[Sequence[float]] = self._last["hops"] if self._last is not None else ()
        known = len(times) == len(self.route)
        return [
            {
                "peer": peer,
                "name": names.get(peer, ""),
                "blocks": blocks,
                "held_ms": _ms(times[place][0]) if known else None,
                "computed_ms": _ms(times[place][1]) if known else None,
            }
            for place, (peer, blocks) in enumerate(self.route)
        ]

    def _named(self, times: list[list[float]]) -> list[list[Any]]:  # Any: JSON
        if len(times) != len(self.route):
            return []
        pairs = zip(self.route, times, strict=True)
        return [[peer, _ms(held), _ms(computed)] for (peer, _), (held, computed) in pairs]

    def end(self) -> None:
        """The request is over."""
        self.state = "ended"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


@dataclass(slots=True)
class Traffic:
    """Tokens and steps of all requests since the last look."""

    tokens: int = 0
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=4096))  # seconds of single tokens

    def add(self, event: Event) -> None:
        """One event of a trace."""
        if event.kind == "step":
            self.tokens += event.data["received"] > 0
            if event.data["tokens"] == 1:
                self.steps.append(event.data["seconds"])

    def look(self, seconds: float) -> Json:
        """The rate and the percentiles (None without a step) of the last `seconds`; begins anew."""
        steps, rate = sorted(self.steps), self.tokens / seconds if seconds > 0 else 0.0
        self.tokens = 0
        self.steps.clear()
        return {
            "tokens_per_second": round(rate, 3),
            "step_ms_p50": percentile(steps, 0.5),
            "step_ms_p95": percentile(steps, 0.95),
        }


def percentile(ordered: Sequence[float], part: float) -> float | None:
    """The nearest-rank percentile of seconds in ascending order, in ms; None of none."""
    if not ordered:
        return None
    return _ms(ordered[max(0, math.ceil(part * len(ordered)) - 1)])
