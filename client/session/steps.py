"""Steps of a session that are on their way, and where the time of one went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import trio

from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import StepRange
from tensor_codec.messages.session import Result


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of one step went, in seconds.

    hops: for each hop in the chain's order, how long it held the step and how long it computed.
    """

    total: float
    hops: tuple[tuple[float, float], ...]

    @property
    def network(self) -> float:
        """The part in which no hop held the step: the wire, and this process."""
        return self.total - sum(held for held, _ in self.hops)


@dataclass(slots=True, eq=False)
class Pending:
    """A step on its way.

    timings: of the hops behind which the client has carried it on.
    On trio's clock: since: when it was sent, or last looked after and found well; look_at: when somebody
    should look; moved_at: when it was last seen to get on, by what the hops said (`progress`).
    """

    step: int
    what: StepRange
    body: Buffer
    bulk: bool
    began: float = field(default_factory=trio.current_time)
    result: Result | None = None
    timings: tuple[tuple[int, int], ...] = ()
    since: float = 0.0
    look_at: float = math.inf
    asked: bool = False
    given_up: bool = False
    moved_at: float = 0.0
    progress: tuple[object, ...] = ()
    refilled_at: float = -math.inf  # when a replay before it was last seen to get on
