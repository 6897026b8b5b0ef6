"""Room for large frames that arrive, of a whole node: bytes that no window of a stream bounds.

A frame up to SMALL_FRAME waits within its stream's window, so it needs no place here.  A larger one takes its
place before more of it is read.  Until then its stream is not read, and the peer's credit runs out.

On one connection frames up to a quarter of `beside_bytes` share `beside_bytes`, and larger ones come one
after the other.  Where the node's room is used up, the network prefix with the most bytes loses its youngest
frame to one of a prefix that has fewer with it; inside one prefix the same holds for peers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from tensor_codec.limits import KIB, MIB, Limits

SMALL_FRAME = 128 * KIB  # with its prefix: half of the least window, which the peer can always send


@dataclass(slots=True, eq=False)
class FramePlace:
    """A frame that arrives.  connection, peer, prefix: of its sender.  size: in bytes, as announced.

    granted: called when the place is there.  evicted: called when it is lost to another peer's frame.
    """

    connection: Hashable
    peer: str
    prefix: str
    size: int
    granted: Callable[[], None]
    evicted: Callable[[], None]


class LargeFrames:
    """The places of large frames, and the frames that wait for one.

    Promises, checked by tests/unit/test_large_frames.py:
      * all places together never have more than `max_bytes`, those of a connection never more than
        `beside_bytes` and one frame;
      * on a connection without a place the first frame that waits gets one, or room is made for it.
    """

    def __init__(self, max_bytes: int, beside_bytes: int = 4 * MIB) -> None:
        self._max_bytes = max_bytes
        self._beside_bytes = beside_bytes
        self._places: list[FramePlace] = []  # the oldest first
        self._waiting: list[FramePlace] = []

    @classmethod
    def of(cls, limits: Limits) -> LargeFrames:
        """The places that these limits allow."""
        return cls(limits.max_large_frames * limits.max_frame_bytes, limits.large_bytes_per_connection)

    @property
    def bytes(self) -> int:
        """Bytes of all places."""
        return sum(place.size for place in self._places)

    def ask(self, place: FramePlace) -> None:
        """Wait for a place; `granted` may be called at once."""
        self._waiting.append(place)
        self._grant()

    def leave(self, place: FramePlace) -> None:
        """Give a place back, or stop waiting for it.  Twice does no harm."""
        for places in (self._places, self._waiting):
            if place in places:
                places.remove(place)
                self._grant()

    def _grant(self) -> None:
        held_up: set[tuple[Hashable, bool]] = set()  # connections, and the kind of frames that wait there
        news: list[Callable[[], None]] = []
        for place in list(self._waiting):
            line = place.connection, self._is_small(place)
            if line in held_up or not self._fits_connection(place) or not self._make_room(place, news):
                held_up.add(line)
            else:
                self._waiting.remove(place)
                self._places.append(place)
                news.append(place.granted)
        for tell in news:  # last: they may come back to `leave`
            tell()

    def _is_small(self, place: FramePlace) -> bool:
        return place.size * 4 <= self._beside_bytes

    def _fits_connection(self, place: FramePlace) -> bool:
        small = self._is_small(place)
        of_kind = [
            each.size
            for each in self._places
            if each.connection == place.connection and self._is_small(each) == small
        ]
        return sum(of_kind) + place.size <= self._beside_bytes if small else not of_kind

    def _make_room(self, place: FramePlace, news: list[Callable[[], None]]) -> bool:
        """Whether the node has room for this frame now; frames of peers that have more are dropped for it."""
        while self.bytes + place.size > self._max_bytes:
            victim = self._of_the_largest(place)
            if victim is None:
                return False
            self._places.remove(victim)
            news.append(victim.evicted)
        return True

    def _of_the_largest(self, place: FramePlace) -> FramePlace | None:
        """The youngest frame of the prefix with most bytes, else of the peer with most in the same prefix.

        None where the place's own prefix, or peer, would have no less than that.
        """
        own = [each for each in self._places if each.prefix == place.prefix]
        return _youngest(self._places, place, _prefix_of) or _youngest(own, place, _peer_of)


def _youngest(
    places: Sequence[FramePlace], newcomer: FramePlace, part: Callable[[FramePlace], str]
) -> FramePlace | None:
    used: Counter[str] = Counter()
    for each in places:
        used[part(each)] += each.size
    largest = max(used, key=lambda key: used[key], default="")
    if used[largest] <= used[part(newcomer)] + newcomer.size:
        return None
    return next(each for each in reversed(places) if part(each) == largest)


def _prefix_of(place: FramePlace) -> str:
    return place.prefix


def _peer_of(place: FramePlace) -> str:
    return place.peer
