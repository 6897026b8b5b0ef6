"""Counters and histograms out of the events of sessions: pure, a few additions an event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from client.metrics import families as of
from client.session.trace import Event
from node.monitor.metrics.families import Sheet
from node.monitor.metrics.histogram import Histogram


@dataclass(slots=True)
class SessionMetrics:
    """The sessions of a client, all together.

    `Trace(on_event=metrics.listener())` for each session; `put` at a scrape, from any thread.
    Promises, checked by tests/unit/test_client_metrics.py:
      * every step, fault, reroute and recovery counts once, whatever session it is of;
      * a reroute counts under its session's last fault; without one since the last reroute under the reason
        of a move: "draining", "slow", or else "moved".
    """

    opened: int = 0
    replayed_bytes: int = 0
    relayed: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    reroutes: Counter[str] = field(default_factory=Counter)
    opening: Histogram = field(default_factory=Histogram)
    recovery: Histogram = field(default_factory=Histogram)
    steps: dict[str, Histogram] = field(default_factory=lambda: {kind: Histogram() for kind in of.STEP_KINDS})
    held: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in range(of.MAX_HOPS)])

    def listener(self) -> Callable[[Event], None]:
        """For the events of one trace, in their order."""
        return _SessionListener(self).take

    def count(self, event: Event, why: str) -> None:
        """Count one event.  why: of a fault or a reroute."""
        data = event.data
        match event.kind:
            case "step":
                decode = data["tokens"] == 1
                self.steps["decode" if decode else "prefill"].observe(data["seconds"])
                if decode:
                    for hop, times in enumerate(data["hops"]):
                        self.held[min(hop, of.MAX_HOPS - 1)].observe(times[0])
            case "opened":
                self.opened += 1
                self.opening.observe(data["seconds"])
            case "fault":
                self.faults[why] += 1
            case "rerouted":
                self.reroutes[why] += 1
            case "replayed":
                self.replayed_bytes += data["bytes"]
            case "recovered":
                self.recovery.observe(data["seconds"])
            case "relayed":
                self.relayed += 1

    def put(self, sheet: Sheet) -> None:
        """Add the samples of this moment."""
        sheet.put(of.SESSIONS_OPENED, self.opened)
        sheet.histogram(of.OPEN_SECONDS, self.opening)
        for kind, steps in self.steps.items():
            sheet.histogram(of.STEP_SECONDS, steps, kind=kind)
        for hop, held in enumerate(self.held):
            if hop == 0 or held.count:  # chains of eight hops are rare: 17 series each
                sheet.histogram(of.HELD_SECONDS, held, hop=str(hop))
        for why in of.WHY:
            sheet.put(of.FAULTS, self.faults[why], why=why)
        for why in of.WHY_REROUTED:
            sheet.put(of.REROUTES, self.reroutes[why], why=why)
        sheet.histogram(of.RECOVERY_SECONDS, self.recovery)
        sheet.put(of.REPLAYED, self.replayed_bytes)
        sheet.put(of.RELAYED, self.relayed)


@dataclass(slots=True)
class _SessionListener:
    """One trace.  why: of its last fault; "" where the chain has changed since."""

    metrics: SessionMetrics
    why: str = ""

    def take(self, event: Event) -> None:
        """Count one event."""
        if event.kind == "fault":
            self.why = event.data["why"]
        why = self.why
        if event.kind == "rerouted":
            said = event.data["why"]  # of a move it is one word
            why, self.why = self.why or (said if said in of.WHY else "moved"), ""
        self.metrics.count(event, why)
