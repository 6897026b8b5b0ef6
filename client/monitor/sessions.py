"""The live sessions of a client, for programs that show them: read from chains and traces.  Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from client.session.core import FEW_TOKENS, State
from client.session.trace import Event, Trace
from routing.chains.hops import Hop
from routing.names import PeerId

RATE_STEPS = 32  # the last ones, of which the rate is the mean
LOOKED_AT = 256  # events, from the newest back: a listing costs as much for a session of any age

SessionState = Literal["opening", "sound", "recovering"]
_STATES: Mapping[State, SessionState] = {State.OPENING: "opening", State.SOUND: "sound"}


class HopTimes(NamedTuple):
    """One hop of a session, and its part in the last step, in seconds; None before the first step.

    start, stop: the blocks [start, stop) that the hop computes.  held: from the step's arrival at the hop to
    its departure; computed: the part of it in which the hop computed.
    """

    peer: PeerId
    start: int
    stop: int
    held: float | None
    computed: float | None


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One live session.

    id: of this process, for its pages and logs.  length: positions in the hops' caches.
    tokens_per_second: of the last RATE_STEPS steps that decoded, guesses besides or not; 0 before them.
    recoveries: changes of the route after the opening.
    """

    id: str
    state: SessionState
    hops: tuple[HopTimes, ...]
    length: int
    tokens_per_second: float
    recoveries: int


def session_status(name: str, state: State, hops: Iterable[Hop], length: int, trace: Trace) -> SessionStatus:
    """The status of a session by its trace.  O(LOOKED_AT)."""
    newest = list(itertools.islice(reversed(trace.events), LOOKED_AT))
    steps = [event for event in newest if event.kind == "step"]
    last = hop_times(hops, steps[0].data if steps else None)
    return SessionStatus(
        name,
        _STATES.get(state, "recovering"),
        last,
        length,
        tokens_per_second([event for event in steps if _decodes(event.data)][:RATE_STEPS]),
        trace.counts["rerouted"],
    )


def hop_times(hops: Iterable[Hop], step: Mapping[str, Any] | None) -> tuple[HopTimes, ...]:  # Any: JSON
    """The hops with their times in a step, where the step went along as many hops."""
    hops = tuple(hops)
    times: list[tuple[float | None, float | None]] = [(None, None)] * len(hops)
    if step is not None and len(step["hops"]) == len(hops):
        times = [(held, computed) for held, computed in step["hops"]]
    return tuple(
        HopTimes(hop.peer, hop.start, hop.stop, *each) for hop, each in zip(hops, times, strict=True)
    )


def tokens_per_second(newest: list[Event]) -> float:
    """The rate of tokens by the positions of these steps, the newest first; 0 of fewer than two."""
    if len(newest) < 2 or newest[0].at <= newest[-1].at:
        return 0.0
    tokens: int = newest[0].data["position"] - newest[-1].data["position"]
    return max(0, tokens) / (newest[0].at - newest[-1].at)


def _decodes(step: Mapping[str, Any]) -> bool:  # Any: JSON
    """Whether a step computed the next token, and guesses at most besides."""
    return bool(step["position"] and step["tokens"] <= FEW_TOKENS)
