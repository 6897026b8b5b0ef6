"""Faults of peers, counted by peer and kind: one count for a whole node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tensor_codec.errors import PeerFault

MAX_COUNTED = 4096  # pairs of a peer and a kind


@dataclass(slots=True)
class Faults:
    """The number of each peer's faults, by the name of the error.

    A peer is known by its id, or by its address where it proved no id.  Memory is bounded: at MAX_COUNTED
    pairs the rarer half is dropped, so that made-up peer ids cannot fill it.
    """

    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, peer: str, fault: PeerFault) -> None:
        """Count one fault of this peer."""
        key = (peer, type(fault).__name__)
        if key not in self._counts and len(self._counts) >= MAX_COUNTED:
            for rare, _ in self._counts.most_common()[MAX_COUNTED // 2 :]:
                del self._counts[rare]
        self._counts[key] += 1

    def count(self, peer: str, kind: type[PeerFault]) -> int:
        """The number of faults of this kind by this peer."""
        return self._counts[peer, kind.__name__]

    def counts(self) -> dict[tuple[str, str], int]:
        """Every count, by peer and kind; a copy."""
        return dict(self._counts)
