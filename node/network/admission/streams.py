"""The peer that gives up a stream where the node's places for streams are all in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.network.admission.shares import Rank, Shares


@dataclass(frozen=True, slots=True)
class User:
    """A peer with its open streams.  good: it is known good.

    own_share: the operator has given it a share of its own, within which it is.
    """

    peer: str
    prefix: str
    streams: int
    good: bool = False
    own_share: bool = False


def gives_way(newcomer: User, users: Sequence[User]) -> User | None:
    """The peer that gives up a stream for one of the newcomer's; None where nobody has a larger share.

    newcomer: with its streams before.  users: all, with the newcomer among them if it has streams.
    A peer known good gives way only where no other has a larger share.  A peer with a share of its own never
    gives way within it, and the largest of the others makes room for it.
    """
    shares = Shares([] if newcomer.own_share else [(newcomer.prefix, newcomer.peer)])
    users = [user for user in users if not user.own_share]
    for user in users:
        shares.add(user.prefix, user.peer, user.streams)
    own = Rank(0, 0, 0) if newcomer.own_share else shares.rank(newcomer.prefix, newcomer.peer)
    for good in (False, True):
        larger = [
            user
            for user in users
            if user.good is good
            and user.streams
            and user.peer != newcomer.peer
            and shares.rank(user.prefix, user.peer) > own
        ]
        if larger:
            return max(larger, key=lambda user: shares.rank(user.prefix, user.peer))
    return None
