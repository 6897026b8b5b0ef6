"""The events that `ClientSession` takes, and the actions that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from client.session.hop_state import HopState
from client.session.steps import Pending
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.errors import Draining, PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import Here, Result, Step

if TYPE_CHECKING:
    from client.session.trace import Kind

# --- events ---


@dataclass(frozen=True, slots=True)
class Answered:
    """A hop has sent a Result."""

    hop: HopState
    result: Result


@dataclass(frozen=True, slots=True)
class Reported:
    """A hop reports a fault of its own or of a neighbour."""

    hop: HopState
    failed: Failed


@dataclass(frozen=True, slots=True)
class Located:
    """A hop reports its progress."""

    hop: HopState
    here: Here


@dataclass(frozen=True, slots=True)
class Lost:
    """A hop's stream is broken, or carried something else than an answer.  blame: the peer is at fault."""

    hop: HopState
    error: PeerFault | Refused
    blame: bool = True


@dataclass(frozen=True, slots=True)
class Late:
    """The moment `StepWatch.look_at` of a step has come."""

    pending: Pending


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The time for answers of hops that were asked in a replay is over."""

    hops: Sequence[HopState]
    seconds: float


@dataclass(frozen=True, slots=True)
class StepsGivenUp:
    """The pending steps will not be collected."""


@dataclass(frozen=True, slots=True)
class Moving:
    """Leave working hops, if others can take over."""

    why: str


@dataclass(frozen=True, slots=True)
class Reordering:
    """From now on steps reorder the session's rows."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is over."""


Event = Answered | Reported | Located | Lost | Late | Unanswered | StepsGivenUp | Moving | Reordering | Closed

# --- actions ---


@dataclass(frozen=True, slots=True)
class Send:
    """Send a step to the first hop.  bulk: over streams of its own from hop to hop."""

    pending: Pending
    hop: HopState
    bulk: bool


@dataclass(frozen=True, slots=True)
class Carry:
    """Send a hop the output of the hop before it, which cannot send it itself."""

    hop: HopState
    step: Step


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a hop for its progress."""

    hop: HopState


@dataclass(frozen=True, slots=True)
class Deliver:
    """The answer to a step is there: wake its collector."""

    pending: Pending


@dataclass(frozen=True, slots=True)
class Repair:
    """The route is broken: the waiting collector repairs it."""

    why: str


@dataclass(frozen=True, slots=True)
class Move:
    """Leave the avoided hops while they work, if there are others."""

    why: str


@dataclass(frozen=True, slots=True)
class StopSwitching:
    """Cancel the agreement under way with the hops: it has become useless."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Close the stream to a hop."""

    hop: HopState


@dataclass(frozen=True, slots=True)
class Blame:
    """A peer was wrong, slow or gone: avoid it for a while, in other sessions too.  share: of a fault."""

    peer: PeerId
    error: PeerFault
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Postpone:
    """Ask other peers for `seconds`; None: for the usual time."""

    peer: PeerId
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Observe:
    """A decode step of one row took `total` seconds along these hops.  held: seconds at each of them."""

    hops: Sequence[Hop]
    held: Sequence[float]
    total: float


@dataclass(frozen=True, slots=True)
class ObserveSpeeds:
    """A step came to these hops, the first one from the client, at `speeds`: see `Result`."""

    hops: Sequence[Hop]
    speeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Note:
    """An entry for the session's trace."""

    kind: Kind
    data: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON


def fault_note(peer: PeerId, error: PeerFault | Refused, text: str | None = None) -> Note:
    """The trace's entry of a fault.  text: for people; None: the error's own.

    why: gone, slow, bad, draining or refused.
    """
    match error:
        case Draining():
            why = "draining"
        case Refused():
            why = "refused"
        case SlowPeer():
            why = "slow"
        case PeerGone():
            why = "gone"
        case _:
            why = "bad"
    return Note("fault", {"peer": peer, "error": str(error) if text is None else text, "why": why})


Action = (
    Send
    | Carry
    | Ask
    | Deliver
    | Repair
    | Move
    | StopSwitching
    | Leave
    | Blame
    | Postpone
    | Observe
    | ObserveSpeeds
    | Note
)
