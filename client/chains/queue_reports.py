"""The waits of steps at peers, as the peers reported at the opening of sessions.  Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from routing.chains.load_sharing import queue_price
from routing.names import PeerId
from routing.view.records import Record

SURPRISE = 1.25  # factor over the known cost from which the client chooses again
REPORT_SECONDS = 30.0  # for which a report counts, if the peer's record is older


@dataclass(slots=True)
class QueueReports:
    """The queues that peers have reported, and when.  Times are the caller's clock, in seconds."""

    _reports: dict[PeerId, tuple[float, float]] = field(default_factory=dict)

    def report(self, peer: PeerId, queue: float, known: float, now: float) -> bool:
        """A peer reports its queue; whether that is much longer than the `known` one."""
        self._reports = {p: said for p, said in self._reports.items() if now - said[1] < REPORT_SECONDS}
        self._reports[peer] = queue, now
        return queue_price(queue) > SURPRISE * queue_price(known)

    def current(self, record: Record, sent: float, now: float) -> Record:
        """The record, with the queue that its peer has reported since.  sent: when the record was sent."""
        if not self._reports:
            return record
        queue, at = self._reports.get(record.peer, (0.0, -math.inf))
        return record if at < max(sent, now - REPORT_SECONDS) else replace(record, queue=queue)
