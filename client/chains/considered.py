"""The servers that a client compares, and the distances to them and between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from routing.chains.alternatives import Constraints
from routing.chains.distances import Distances
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView


@dataclass(slots=True)
class Considered:
    """Few of many servers, drawn once for each view and its constraints.

    distances: kept from view to view.
    position_bytes: of one position's hidden state on the wire; 0: not known, and relays carry it in no time.
    """

    distances: Distances = field(default_factory=Distances)
    position_bytes: int = 0
    _drawn: dict[bool, tuple[SwarmView, Constraints, Sequence[Record]]] = field(default_factory=dict)

    def servers(
        self, view: SwarmView, constraints: Constraints, silent: bool, draw: Callable[[], Sequence[Record]]
    ) -> Sequence[Record]:
        """The servers drawn for this view, by `draw` if it is a new one.  silent: silent servers too."""
        known = self._drawn.get(silent)
        if known is None or known[0] is not view or known[1] is not constraints:
            known = self._drawn[silent] = view, constraints, draw()
        return known[2]

    def carrying(self, view: SwarmView, spans: Sequence[Record], positions: int) -> dict[PeerId, float]:
        """Seconds that so many positions take through the relays of each relayed peer."""
        size = positions * self.position_bytes
        return {s.peer: size / view.relayed_rate(s) for s in spans if s.reach == "relayed"}
