"""What all sessions of a client have in common, besides its view of the swarm."""

from __future__ import annotations

from dataclasses import dataclass, field

from client.chains.queue_reports import QueueReports
from client.chains.shared_streams import SharedStreams


@dataclass(frozen=True, slots=True)
class OfSessions:
    """queues: that peers have reported.  shared: streams to peers."""

    queues: QueueReports = field(default_factory=QueueReports)
    shared: SharedStreams = field(default_factory=SharedStreams)
