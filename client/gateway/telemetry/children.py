"""The parts of a request that get a span of their own, out of the events of its sessions: pure.

open_chain          the session was opened at its hops
raceme.recovery     from the first fault to the next answer, with the peers that were lost and that took over
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.session.trace import Event

Value = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChildSpan:
    """A part of a request.  began, ended: on the clock of events (`time.perf_counter`), in seconds."""

    name: str
    began: float
    ended: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    failed: bool = False


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
