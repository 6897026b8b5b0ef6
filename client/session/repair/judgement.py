"""Who is at fault when a hop reports a fault: itself, a neighbour, or either of the two.  Pure.

A hop that reports its neighbour may lie, and so may the neighbour.  The first report blames each of the two
with half a fault, and the two are not neighbours again.  A hop that has reported another peer before, or
that names a peer which it was never told of, is at fault alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client.session.hop_state import HopState
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, Refused, RemoteProtocolError
from tensor_codec.messages.fields import Failed

HALF = 0.5  # of a fault, for each of two peers of which one is at fault
# A hop says this of what it was sent.  Not "bad_values": the client looks for these in what it carries.
_WRONG_INPUT = frozenset({"protocol", "message"})


@dataclass(frozen=True, slots=True)
class Loss:
    """A hop to give up.  share: of a fault, 0 without blame."""

    hop: HopState
    error: PeerFault | Refused
    share: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """losses: hops to give up.  unreachable: the first cannot push to the second.

    distrusted: the second got a wrong input from the first, by its own word.
    """

    losses: Sequence[Loss] = ()
    unreachable: tuple[PeerId, PeerId] | None = None
    distrusted: tuple[PeerId, PeerId] | None = None


def judge(
    hop: HopState, failed: Failed, hops: Sequence[HopState], accuse: Callable[[PeerId, PeerId], bool]
) -> Verdict:
    """The verdict on a hop's report.

    hops: of the route.  accuse: notes that the first peer reports the second; whether the first has reported
    another one before.
    """
    me, error = hop.hop.peer, failed.error()
    peer = PeerId(failed.peer) if failed.peer is not None else me
    pushing = failed.code == "cannot_push"
    if peer == me and failed.code in _WRONG_INPUT and (sender := _carried_from(hop, hops)) is not None:
        peer = sender  # the client passed on what that one had sent
    elif peer == me:
        return Verdict([Loss(hop, error, 0.0 if failed.code == "ended" else 1.0)])
    elif not hop.may_name(peer, successor=pushing):
        lie = RemoteProtocolError(f"{me} reports {peer}, which is not next to it: {error}")
        return Verdict([Loss(hop, lie, 1.0)])
    named = [each for each in hops if each.hop.peer == peer and each.alive]
    if named and accuse(me, peer):
        lie = RemoteProtocolError(f"{me} reports {peer}, after another peer: {error}")
        return Verdict([Loss(hop, lie, 1.0)])
    if pushing:  # a broken connection is nobody's fault; later events show whether `peer` lives
        return Verdict(unreachable=(me, peer))
    share = HALF if named else 0.0
    ended = PeerGone(f"{me} ended the session for what {peer} did")
    return Verdict([*(Loss(each, error, HALF) for each in named), Loss(hop, ended, share)], None, (peer, me))


def _carried_from(hop: HopState, hops: Sequence[HopState]) -> PeerId | None:
    """The hop whose outputs the client carries to this one."""
    index = hops.index(hop) if hop in hops else 0
    return hops[index - 1].hop.peer if index and hops[index - 1].relay else None
