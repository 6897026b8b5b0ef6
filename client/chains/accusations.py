"""Which peers have said of which others that these were at fault.  Pure.

One report of a hop about its neighbour says that one of the two is bad, and not which.  A hop that reports a
second neighbour is the likelier one: it is the same in both pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from routing.names import PeerId

REMEMBERED_SECONDS = 600.0
MAX_ACCUSERS = 1024


@dataclass(slots=True)
class Accusations:
    """The reports of the last ten minutes, of all sessions.  Times are the caller's clock, in seconds."""

    _of: dict[PeerId, dict[PeerId, float]] = field(default_factory=dict)  # by accuser: the accused, and when

    def accuse(self, accuser: PeerId, accused: PeerId, now: float) -> bool:
        """Note a report; whether the accuser has reported another peer before, and so is at fault itself."""
        known = self._of.pop(accuser, {})
        earlier = {peer: at for peer, at in known.items() if now - at < REMEMBERED_SECONDS}
        others = bool(earlier.keys() - {accused})
        if len(self._of) >= MAX_ACCUSERS:
            del self._of[next(iter(self._of))]
        self._of[accuser] = {**earlier, accused: now}
        return others

    def confirm(self, accused: PeerId) -> None:
        """This peer has failed before our eyes: the reports about it were right."""
        for accuser in [accuser for accuser, peers in self._of.items() if accused in peers]:
            del self._of[accuser][accused]
            if not self._of[accuser]:
                del self._of[accuser]
