"""The turns of a connection: so many frames of all its streams, then every other task runs first."""

from __future__ import annotations

import trio

FRAMES_PER_TURN = 16  # of about 50 us each: under a millisecond


class Turns:
    """Counts the frames that the streams of one connection hand out without a pause.

    A stream that finds the turn used up waits for the next one, and the streams of a connection wait in line.
    So a peer gets one turn in each round of trio's scheduler, however many streams it has.

    frames: handed out in this turn; a reader adds to it, and calls `next` at FRAMES_PER_TURN.
    """

    __slots__ = ("_line", "frames")

    def __init__(self) -> None:
        self.frames = 0
        self._line = trio.StrictFIFOLock()

    async def next(self) -> None:
        """Let every other task run, and begin a new turn."""
        async with self._line:
            if self.frames >= FRAMES_PER_TURN:
                await trio.lowlevel.checkpoint()
                self.frames = 0
