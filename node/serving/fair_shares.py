"""Which holder gives way where something is used up: shares by network prefix first, then by peer.  Pure.

Peer ids cost nothing, addresses do.  So the prefixes that use a resource have equal shares of it.  A prefix
that holds more than its share gives way to one that holds less, and then only: a prefix that is alone, as
on one machine or behind one NAT, may hold everything, and nothing is taken from anybody while there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Holder(Protocol):
    """Something that holds a part: a session.  yields: it was told to give way, and is about to end."""

    @property
    def prefix(self) -> str:
        """Of its peer's address; "" where unknown: it never gives way, and nobody gives way to it."""

    @property
    def peer(self) -> str:
        """Its owner."""

    @property
    def weight(self) -> int:
        """The size of its part."""

    @property
    def yields(self) -> bool:
        """See above."""


H = TypeVar("H", bound=Holder)


def who_yields(holders: Iterable[H], prefix: str, capacity: int) -> H | None:
    """The holder that gives way to a peer of this prefix; None where none has to.

    The youngest one of the largest peer of the largest prefix.  holders: the oldest first.  capacity: of all.
    """
    if not prefix:
        return None
    named = [each for each in holders if each.prefix and each.weight and not each.yields]
    parts = Counter[str]({prefix: 0})
    for each in named:
        parts[each.prefix] += each.weight
    share = capacity / len(parts)
    largest, part = max(parts.items(), key=lambda item: item[1])
    if part <= share or parts[prefix] >= share:
        return None
    peers = Counter[str]()
    for each in named:
        if each.prefix == largest:
            peers[each.peer] += each.weight
    owner = max(reversed(peers), key=peers.__getitem__)
    return next(each for each in reversed(named) if (each.prefix, each.peer) == (largest, owner))
