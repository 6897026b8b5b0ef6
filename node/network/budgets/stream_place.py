"""The place of a stream's large frame, which arrives or is in hand: the waiting shell of `LargeFrames`."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import trio

from node.network.budgets.large_frames import FramePlace, LargeFrames
from tensor_codec.errors import PeerGone


class StreamPlace:
    """At most one place at a time.

    connection, peer, prefix: of the stream.  evicted: called when the place is lost to another peer's frame.
    """

    __slots__ = ("_connection", "_evicted", "_frames", "_peer", "_place", "_prefix")

    def __init__(
        self, frames: LargeFrames, connection: Hashable, peer: str, prefix: str, evicted: Callable[[], None]
    ) -> None:
        self._frames = frames
        self._connection = connection
        self._peer = peer
        self._prefix = prefix
        self._evicted = evicted
        self._place: FramePlace | None = None

    async def begin(self, size: int, seconds: float) -> None:
        """Wait for a place for a frame of which more than a window is to be read.

        Raises PeerGone where there was none within `seconds`.  Returns when the stream ends: no more than a
        window is there to be read then.
        """
        self.end()
        granted = trio.Event()
        place = FramePlace(self._connection, self._peer, self._prefix, size, granted.set, self._evicted)
        self._place = place
        self._frames.ask(place)
        with trio.move_on_after(seconds) as scope:
            try:
                await granted.wait()
            except trio.Cancelled:
                self.end()
                raise
        if scope.cancelled_caught:
            raise PeerGone(f"no room for a frame of {size} bytes within {seconds:.3g} s")

    def arrived(self) -> None:
        """The frame is whole, and keeps its place while it is in hand."""
        if self._place is not None:
            self._frames.arrived(self._place)

    def end(self) -> None:
        """Give the place back, if there is one."""
        place, self._place = self._place, None
        if place is not None:
            self._frames.leave(place)
            place.granted()  # a reader that still waits for it wakes up, and finds it gone
