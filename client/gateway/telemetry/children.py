"""The parts of a request that get a span of their own, out of the events of its sessions: pure.

open_chain          the session was opened at its hops
raceme.recovery     from the first fault to the next answer, with the peers that were lost and that took over

A request with `raceme.trace` has events in its own span besides: every step, and what a recovery consists of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.session.trace import Event

Value = str | int | float | bool | tuple[str, ...] | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChildSpan:
    """A part of a request.  began, ended: on the clock of events (`time.perf_counter`), in seconds."""

    name: str
    began: float
    ended: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """A moment of a request.  at: on the clock of events, in seconds."""

    name: str
    at: float
    attributes: Mapping[str, Value]


@dataclass(slots=True)
class SessionEvents:
    """Turns the events of one session into events of a span.  hops: of the session now, see `hops_of`.

    Promises, checked by tests/unit/test_span_children.py:
      * every step is an event, with its hops and the time that each had it and computed;
      * every fault, reroute, replay, recovery and relay is an event;
      * no text of a prompt or an answer is in one.
    """

    hops: tuple[str, ...] = ()

    def take(self, event: Event) -> SpanEvent | None:
        """The event of the span for this one; None for the opening, which is a span, and for the end."""
        data = event.data
        if event.kind in ("opened", "rerouted"):
            self.hops = hops_of(data)
        found: dict[str, Value | None]
        match event.kind:
            case "step":
                found = self._step(data)
            case "fault":
                found = {"peer": data["peer"], "why": data["why"], "error": data["error"]}
            case "rerouted":
                found = {
                    "why": data["why"],
                    "kept_peers": tuple(data["kept"]),
                    "opened_peers": tuple(data["opened"]),
                    "hops": self.hops,
                    "seconds": data["seconds"],
                }
            case "replayed":
                found = {key: data.get(key) for key in ("sender", "peer", "start", "stop", "bytes")}
            case "recovered":
                found = {"seconds": data["seconds"], "replay_seconds": data.get("replay_seconds")}
            case "relayed":
                found = {"sender": data["sender"], "peer": data["peer"]}
            case _:
                return None
        attributes = {f"raceme.{key}": value for key, value in found.items() if value is not None}
        return SpanEvent(f"raceme.{event.kind}", event.at, attributes)

    def _step(self, data: Mapping[str, Any]) -> dict[str, Value | None]:  # Any: JSON
        return {
            "step": data.get("step"),
            "position": data.get("position"),
            "tokens": data["tokens"],
            "seconds": data["seconds"],
            "hops": self.hops,
            "held_seconds": tuple(float(held) for held, _ in data["hops"]),
            "computed_seconds": tuple(float(computed) for _, computed in data["hops"]),
            "sent_bytes": data.get("sent"),
            "received_bytes": data.get("received"),
        }


@dataclass(slots=True)
class SessionSpans:
    """Folds the events of one session into the spans of its parts.

    Promises, checked by tests/unit/test_span_children.py:
      * a recovery is one span, however many faults and reroutes it had;
      * one that the session did not survive is a failed span;
      * no text of a prompt or an answer is in a span: events hold none.
    """

    _since: float | None = None  # of the recovery under way
    _lost: dict[str, str] = field(default_factory=dict)  # peers, and why
    _taken: list[str] = field(default_factory=list)  # peers that took over
    _replayed: int = 0  # positions
    _reroutes: int = 0

    def take(self, event: Event) -> ChildSpan | None:
        """The span that this event ends, if it ends one."""
        data = event.data
        match event.kind:
            case "opened":
                return ChildSpan(
                    "open_chain", event.at - data["seconds"], event.at, {"raceme.hops": hops_of(data)}
                )
            case "fault":
                self._since = event.at if self._since is None else self._since
                self._lost[data["peer"]] = data["why"]
            case "rerouted":
                self._since = event.at - data["seconds"] if self._since is None else self._since
                self._taken += [peer for peer in data["opened"] if peer not in self._taken]
                self._reroutes += 1
            case "replayed":
                self._replayed += data["stop"] - data["start"]
            case "recovered" | "ended":
                return self._recovery(event)
        return None

    def _recovery(self, event: Event) -> ChildSpan | None:
        if self._since is None:
            return None
        span = ChildSpan(
            "raceme.recovery",
            self._since,
            event.at,
            {
                "raceme.lost_peers": tuple(self._lost),
                "raceme.why": tuple(dict.fromkeys(self._lost.values())),
                "raceme.opened_peers": tuple(self._taken),
                "raceme.reroutes": self._reroutes,
                "raceme.replayed_positions": self._replayed,
            },
            failed=event.kind == "ended",
        )
        self._since, self._lost, self._taken, self._replayed, self._reroutes = None, {}, [], 0, 0
        return span


def hops_of(data: Mapping[str, Any]) -> tuple[str, ...]:  # Any: JSON
    """The hops of a route: "PEER 0:10" each."""
    hops: Iterable[Mapping[str, Any]] = data["hops"]  # Any: JSON
    return tuple(f"{hop['peer']} {hop['blocks'][0]}:{hop['blocks'][1]}" for hop in hops)
