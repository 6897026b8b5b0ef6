"""Says which decode steps are computed at once, in the event loop's thread: pure, without a clock.

The way of a step into the torch thread and back costs two switches of threads and three rounds of the event
loop: 0.3 ms, as much as a block or two of a small model.  The loop answers nobody while it computes, so a
step is computed in it only where it is short, and where nobody else's step would share its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LONGEST_SECONDS = 0.010  # of a step: the loop is to answer within 20 ms
# After a step: a step that comes sooner was there before the loop has answered anybody.  A client's next one
# takes longer, because it depends on the answer.
LOOP_SECONDS = 0.0005
APART_SECONDS = 0.25  # steps of two sessions that are so far apart seldom share a batch


@dataclass(slots=True)
class LoneSteps:
    """The session that decoded last, and when.  Times are seconds on the caller's clock.

    Promises, checked by tests/unit/test_lone_steps.py:
      * a step is alone where the one before it was of its own session, or long ago;
      * steps of sessions that decode in turn are never alone, so that they share batches;
      * of steps that came together only the first is alone: the loop has its time between two.
    """

    _session: bytes = b""
    _at: float = -math.inf
    _computed_at: float = -math.inf

    def is_alone(self, session: bytes, now: float) -> bool:
        """Count a step of this session, computed wherever it is; whether others' steps are far from it."""
        alone = session == self._session or now - self._at > APART_SECONDS
        self._session, self._at = session, now
        return alone and now - self._computed_at > LOOP_SECONDS

    def computed(self, now: float) -> None:
        """A step was computed in the loop's thread until now."""
        self._computed_at = now


def is_short(seconds_per_block: float, blocks: int) -> bool:
    """Whether a step of one row may hold the event loop.  seconds_per_block: of such a step."""
    return seconds_per_block * blocks <= LONGEST_SECONDS
