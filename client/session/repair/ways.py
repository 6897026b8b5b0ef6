"""The hops of a session whose stream can be replaced: those that were reached through a relay.  Pure.

Such a hop's session moves over to a direct connection once there is one, and to another circuit where its way
breaks: the hop keeps its cache.  Each move is a change of the route with the same hops, so that no step is
lost or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from client.session.hop_state import HopState
from tensor_codec.errors import PeerFault, PeerGone, Refused

MAX_MOVES = 8  # of one hop in a session: a way that dies again and again is no better than none


@dataclass(slots=True)
class Way:
    """The way to one hop.

    better: whether it runs through a relay and a direct connection is there.
    wanted: the next change of the route brings the hop another stream.  broken: its stream is.
    """

    better: Callable[[], bool]
    wanted: bool = False
    broken: bool = False
    moves: int = 0

    @property
    def is_worn(self) -> bool:
        """Whether it has changed too often."""
        return self.moves >= MAX_MOVES

    def want(self, *, broken: bool = False) -> None:
        """Another stream is wanted; broken: for this one has failed."""
        self.wanted, self.broken = True, self.broken or broken

    def change(self, *, moved: bool) -> None:
        """The try is over."""
        self.wanted = False
        self.broken = self.broken and not moved
        self.moves += 1


@dataclass(slots=True)
class Ways:
    """Decides when a hop gets another stream.

    Promises, checked by tests/unit/test_ways.py:
      * a hop moves between two steps, once there is a better way, and MAX_MOVES times at most;
      * a hop whose stream breaks has one try on another stream, and is lost where that fails;
      * a hop whose better way cannot be taken stays where it is;
      * a hop that never ran through a relay is lost with its stream.
    """

    known: dict[HopState, Way] = field(default_factory=dict)

    def add(self, hop: HopState, better: Callable[[], bool]) -> None:
        """This hop's stream runs through a relay, and the hop takes another one in its place."""
        self.known[hop] = Way(better)

    def is_move_due(self, hops: Iterable[HopState]) -> bool:
        """No step is on its way: whether some hops should move now."""
        due = [way for hop in hops if (way := self.known.get(hop)) is not None and way.better()]
        due = [way for way in due if not way.is_worn]
        for way in due:
            way.want()
        return bool(due)

    def broke(self, hop: HopState, error: PeerFault | Refused) -> bool:
        """A hop's stream has failed; whether another stream may save the hop."""
        way = self.known.get(hop)
        if way is None or not isinstance(error, PeerGone) or way.is_worn or not hop.alive:
            return False
        way.want(broken=True)
        return True

    def wants(self, hop: HopState) -> bool:
        """Whether the hop gets another stream before it is told of a new route."""
        return hop in self.known and self.known[hop].wanted

    def moved(self, hop: HopState) -> None:
        """It has another stream."""
        self.known[hop].change(moved=True)

    def stays(self, hop: HopState) -> bool:
        """It got no other stream; whether it has its old one.  Else its next fault is its loss."""
        way = self.known[hop]
        way.change(moved=False)
        if way.broken:
            del self.known[hop]
        return not way.broken

    def keep(self, hops: Iterable[HopState]) -> None:
        """The session has these hops alone."""
        self.known = {hop: way for hop in hops if (way := self.known.get(hop)) is not None}
