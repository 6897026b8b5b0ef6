"""Room for the steps that wait at a node's sessions or are computed, in bytes.

A step up to SMALL_STEP needs none: sessions and their steps in flight are few enough.  Larger ones share the
room by network prefix and peer of the sessions' clients, as frames that arrive do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from node.network.budgets.large_frames import FramePlace, LargeFrames
from routing.names import PeerId
from tensor_codec.errors import TooManyStreams
from tensor_codec.limits import KIB, Limits

SMALL_STEP = 32 * KIB  # with 512 streams, and 8 steps in flight on each: 128 MiB
RETRY_SECONDS = 1.0


def no_room() -> TooManyStreams:
    """The refusal of a session whose steps have no room."""
    return TooManyStreams("too many long steps wait here", RETRY_SECONDS)


@dataclass(slots=True)
class StepRoom:
    """The room of all sessions of a node, or of a span."""

    limits: Limits
    _frames: LargeFrames = field(init=False)

    def __post_init__(self) -> None:
        most = self.limits.max_large_steps * self.limits.max_frame_bytes
        self._frames = LargeFrames(most, most, self.limits.own_shares)

    @property
    def bytes(self) -> int:
        """Bytes of all steps that have a place."""
        return self._frames.bytes

    def of_session(self, peer: PeerId, prefix: str) -> SessionRoom:
        """The places of one session.  peer, prefix: of its client."""
        return SessionRoom(self._frames, peer, prefix)


@dataclass(slots=True)
class SessionRoom:
    """The places of one session's steps.

    evicted: called when a place was lost to a client that has less: the session has to end.
    """

    frames: LargeFrames
    peer: PeerId
    prefix: str
    evicted: Callable[[], None] = lambda: None
    _places: set[FramePlace] = field(default_factory=set)  # those too that are waited for
    _waiters: set[trio.Event] = field(default_factory=set)

    def add(self, size: int) -> FramePlace:
        """A place for a step above SMALL_STEP, to be given back by `remove`.

        Raises TooManyStreams where there is no room now.
        """
        granted = trio.Event()
        place = self._ask(size, granted)
        if not granted.is_set():
            self.remove(place)
            raise no_room()
        return place

    async def wait(self, size: int) -> FramePlace:
        """As `add`, but waits for room, until `close` at the latest."""
        granted = trio.Event()
        place = self._ask(size, granted)
        self._waiters.add(granted)
        try:
            await granted.wait()
        except trio.Cancelled:
            self.remove(place)
            raise
        finally:
            self._waiters.discard(granted)
        return place

    def remove(self, place: FramePlace | None) -> None:
        """Give a place back."""
        if place is not None:
            self._places.discard(place)
            self.frames.leave(place)

    def close(self) -> None:
        """Give all places back, and let nobody wait any more."""
        for place in list(self._places):
            self.remove(place)
        for waiter in self._waiters:
            waiter.set()

    def _ask(self, size: int, granted: trio.Event) -> FramePlace:
        place = FramePlace(object(), self.peer, self.prefix, size, granted.set, self._evict)
        self._places.add(place)
        self.frames.ask(place)
        return place

    def _evict(self) -> None:
        self.evicted()
