"""Room for large frames that arrive or are in hand, of a whole node: bytes that no window of a stream bounds.

A frame up to SMALL_FRAME waits within its stream's window, so it needs no place here.  A larger one takes its
place before more of it is read.  Until then its stream is not read, and the peer's credit runs out.  The
place is given back when its reader asks for the next frame, or leaves the stream.

On one connection frames up to a quarter of `beside_bytes` share `beside_bytes`, and larger ones come one
after the other.  Where the node's room is used up, the network with the most bytes (a /24, or a /48 of IPv6)
loses its youngest frame to one of a network that has fewer with it; inside one network the same holds for
addresses, and at one address for peers.  A peer with a share of its own (`Limits.peer_shares`) stands beside
these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from node.network.prefixes import network_of
from tensor_codec.limits import KIB, Limits

SMALL_FRAME = 128 * KIB  # with its prefix: half of the least window, which the peer can always send


@dataclass(slots=True, eq=False)
class FramePlace:
    """A frame that arrives, or is in hand.  size: in bytes, as announced.

    connection, peer, prefix: of its sender.  granted: called when the place is there.  evicted: called when
    it is lost to another peer's frame.
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
      * all places together never have more than `max_bytes`, and frames that arrive on a connection never
        more than `beside_bytes` and one frame;
      * on a connection without a place the first frame that waits gets one, or room is made for it, unless
        peers with no more than its own have all the room.
    """

    def __init__(
        self, max_bytes: int, beside_bytes: int, own_shares: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """own_shares: peers with a part of `max_bytes` of their own, and that part.

        Up to it they lose no place, and others make room for them whatever these have.
        """
        self.bytes = 0  # of all places
        self._own = {peer: int(share * max_bytes) for peer, share in own_shares.items()}
        self._max_bytes = max_bytes
        self._beside_bytes = beside_bytes
        self._places: dict[FramePlace, None] = {}  # the oldest first
        self._waiting: dict[FramePlace, None] = {}
        self._arriving: dict[FramePlace, None] = {}
        self._lines: Counter[tuple[Hashable, bool]] = Counter()  # bytes that arrive, by connection and kind

    @classmethod
    def of(cls, limits: Limits) -> LargeFrames:
        """The places that these limits allow to frames of peers."""
        most = limits.max_large_frames * limits.max_frame_bytes
        return cls(most, limits.large_bytes_per_connection, limits.own_shares)

    def ask(self, place: FramePlace) -> None:
        """Wait for a place; `granted` may be called at once."""
        self._waiting[place] = None
        self._grant()

    def arrived(self, place: FramePlace) -> None:
        """The frame is whole and in hand: it keeps its place, and others may come on its connection."""
        if place in self._arriving:
            self._leave_line(place)
            self._grant()

    def leave(self, place: FramePlace) -> None:
        """Give a place back, or stop waiting for it.  Twice does no harm."""
        if place in self._places:
            self._remove(place)
        elif place in self._waiting:
            del self._waiting[place]
        else:
            return
        if self._waiting:
            self._grant()

    def _grant(self) -> None:
        """Give places to the frames that wait, in their order: none overtakes another of its line or peer."""
        held_up: set[Hashable] = set()
        news: list[Callable[[], None]] = []
        for place in list(self._waiting):
            line = self._line(place)
            if line in held_up or place.peer in held_up:
                continue
            if not self._fits_line(place):
                held_up.add(line)
                continue
            if not self._make_room(place, news):
                held_up.add(place.peer)
                continue
            del self._waiting[place]
            self._places[place] = self._arriving[place] = None
            self._lines[line] += place.size
            self.bytes += place.size
            news.append(place.granted)
        for tell in news:  # last: they may come back to `leave`
            tell()

    def _line(self, place: FramePlace) -> tuple[Hashable, bool]:
        """Frames of a connection that wait for each other: its small ones, or its others."""
        return place.connection, place.size * 4 <= self._beside_bytes

    def _fits_line(self, place: FramePlace) -> bool:
        line = self._line(place)
        return self._lines[line] + place.size <= self._beside_bytes if line[1] else not self._lines[line]

    def _leave_line(self, place: FramePlace) -> None:
        line = self._line(place)
        del self._arriving[place]
        self._lines[line] -= place.size
        if not self._lines[line]:
            del self._lines[line]

    def _remove(self, place: FramePlace) -> None:
        del self._places[place]
        self.bytes -= place.size
        if place in self._arriving:
            self._leave_line(place)

    def _make_room(self, place: FramePlace, news: list[Callable[[], None]]) -> bool:
        """Whether the node has room for this frame now; frames of peers that have more are dropped for it."""
        if place.size > self._max_bytes:
            return False
        missing = self.bytes + place.size - self._max_bytes
        victims: list[FramePlace] = []
        places = self._losers() if missing > 0 else []
        insists = missing > 0 and self._used_by(place.peer) + place.size <= self._own.get(place.peer, 0)
        while missing > 0:
            victim = _of_all(places) if insists else _of_the_largest(places, place)
            if victim is None:
                return False
            victims.append(victim)
            places.remove(victim)
            missing -= victim.size
        for victim in victims:
            self._remove(victim)
            news.append(victim.evicted)
        return True

    def _used_by(self, peer: str) -> int:
        return sum(place.size for place in self._places if place.peer == peer)

    def _losers(self) -> list[FramePlace]:
        """The places that may be lost to others, the oldest first."""
        safe = {peer for peer, own in self._own.items() if self._used_by(peer) <= own}
        return [place for place in self._places if place.peer not in safe]


def _of_all(places: Sequence[FramePlace]) -> FramePlace | None:
    """The youngest frame of the network with most bytes, of the address and peer in it with most."""
    for part in (_network_of, _prefix_of, _peer_of):
        used = Counter[str]()
        for each in places:
            used[part(each)] += each.size
        largest = max(used, key=lambda key: used[key], default="")
        places = [each for each in places if part(each) == largest]
    return places[-1] if places else None


def _of_the_largest(places: Sequence[FramePlace], newcomer: FramePlace) -> FramePlace | None:
    """The youngest frame of the network with most bytes, else of the address in it, else of the peer there.

    None where the newcomer's own network, address and peer would have no less than that.
    """
    for part in (_network_of, _prefix_of, _peer_of):
        victim = _youngest(places, newcomer, part)
        if victim is not None:
            return victim
        places = [each for each in places if part(each) == part(newcomer)]
    return None


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


def _network_of(place: FramePlace) -> str:
    return network_of(place.prefix)


def _prefix_of(place: FramePlace) -> str:
    return place.prefix


def _peer_of(place: FramePlace) -> str:
    return place.peer
