"""What happens to a session, and what its core wants done: the events and the actions of `ClientSession`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from client.session.hop_state import HopState
from client.session.steps import Pending
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.errors import PeerFault, Refused
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
    """A hop says that something went wrong, there or with a neighbour."""

    hop: HopState
    failed: Failed


@dataclass(frozen=True, slots=True)
class Located:
    """A hop says how far it is."""

    hop: HopState
    here: Here


@dataclass(frozen=True, slots=True)
class Lost:
    """A hop's stream is broken, or what came over it is no answer.  blame: the peer is at fault."""

    hop: HopState
    error: PeerFault | Refused
    blame: bool = True


@dataclass(frozen=True, slots=True)
class Late:
    """The moment `StepWatch.look_at` of a step has come."""

    pending: Pending


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Hops that were asked in a replay have had their time to answer."""

    hops: Sequence[HopState]
    seconds: float


@dataclass(frozen=True, slots=True)
class StepsGivenUp:
    """Nobody will collect the pending steps."""


@dataclass(frozen=True, slots=True)
class Moving:
    """Hops that work are to be left, where others can take over."""

    why: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is over."""


Event = Answered | Reported | Located | Lost | Late | Unanswered | StepsGivenUp | Moving | Closed

# --- actions ---


@dataclass(frozen=True, slots=True)
class Send:
    """Send a step to the first hop.  bulk: over streams of its own from hop to hop."""

    pending: Pending
    hop: HopState
    bulk: bool


@dataclass(frozen=True, slots=True)
class Carry:
    """Send a hop what the hop before it made and cannot send itself."""

    hop: HopState
    step: Step


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a hop how far it is."""

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
    """Leave the hops that are avoided, if there are others, while they work."""

    why: str


@dataclass(frozen=True, slots=True)
class StopSwitching:
    """What is being agreed on with the hops has become useless."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Close the stream to a hop."""

    hop: HopState


@dataclass(frozen=True, slots=True)
class Blame:
    """A peer was wrong, slow or gone: avoid it for a while, in other sessions too."""

    peer: PeerId
    error: PeerFault


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
class Note:
    """Something for the session's trace."""

    kind: Kind
    data: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON


Action = (
    Send | Carry | Ask | Deliver | Repair | Move | StopSwitching | Leave | Blame | Postpone | Observe | Note
)
