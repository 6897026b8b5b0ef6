"""One record on its way into a view, and in it."""

from __future__ import annotations

from dataclasses import dataclass

from routing.names import PeerId
from routing.view.records import NOBODY, Record
from tensor_codec.limits import Limits


@dataclass(frozen=True, slots=True)
class Arrival:
    """A verified record, its wire form, and its known age: seconds since its peer sent it.

    source: the neighbour that sent it to us; nobody for our own.
    """

    record: Record
    wire: bytes
    age: float = 0.0
    source: PeerId = NOBODY


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in the view.

    sent: when its peer sent it, on our clock, by the stated ages.  source: the neighbour that first told of
    this peer.  life_seconds: the longest that it counts, whatever its peer says.
    """

    record: Record
    wire: bytes
    sent: float
    source: PeerId = NOBODY
    life_seconds: float = Limits().record_life_seconds

    @property
    def expires(self) -> float:
        """When it ends, on our clock."""
        return self.sent + min(self.record.ttl_seconds, self.life_seconds)
