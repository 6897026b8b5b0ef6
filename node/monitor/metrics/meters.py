"""What a serving node counts where it happens; everything else is read when a scrape asks.

The counters of rare events are always there.  Those of batches cost the compute thread a few additions and
exist only where somebody scrapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from node.monitor.metrics.histogram import ROWS, Histogram
from tensor_codec.errors import REFUSALS, Refused

KINDS = ("decode", "prefill", "stateless")  # of batches, as `node.serving.executor.jobs.Kind` names them
OTHER = "other"
REASONS = (*(kind.__name__ for kind in REFUSALS.values() if kind is not Refused), OTHER)


class BatchMeters:
    """The batches of a node's engines, by the kind of their jobs.

    rows: rows of a batch.  seconds: of computing it.  positions: rows times tokens that were computed.
    waits: seconds that decode steps waited.
    Promise, checked by tests/unit/test_metrics.py: one batch is one observation of rows and of seconds.
    """

    __slots__ = ("positions", "rows", "seconds", "waits")

    def __init__(self) -> None:
        self.rows: Mapping[str, Histogram] = {kind: Histogram(ROWS) for kind in KINDS}
        self.seconds: Mapping[str, Histogram] = {kind: Histogram() for kind in KINDS}
        self.positions = dict.fromkeys(KINDS, 0)
        self.waits = Histogram()

    def computed(self, kind: str, rows: int, positions: int, seconds: float) -> None:
        """A batch is done.  positions: 0 for a part of a request that later parts go on with."""
        self.rows[kind].observe(rows)
        self.seconds[kind].observe(seconds)
        self.positions[kind] += positions


@dataclass(slots=True)
class ServingMeters:
    """Counters of a node over all spans that it serves, one after the other.

    sessions_refused, requests_refused: by reason, see `reason_of`.  requests: forward and backward.
    replayed: tokens that were "sent" again to a hop, and "computed" again here.
    batches: None where nobody scrapes.
    """

    sessions_refused: Counter[str] = field(default_factory=Counter)
    requests_refused: Counter[str] = field(default_factory=Counter)
    replayed: Counter[str] = field(default_factory=Counter)
    batches: BatchMeters | None = None


def reason_of(error: Refused) -> str:
    """The reason of a refusal, one of REASONS."""
    name = type(error).__name__
    return name if name in REASONS else OTHER
