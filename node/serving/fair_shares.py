"""Which holder gives way where something is used up: shares by network prefix first, then by peer.  Pure.

Peer ids cost nothing, addresses do.  So the prefixes that use a resource have equal shares of it.  A prefix
that holds more than its share gives way to one that holds less, and then only: a prefix that is alone, as
on one machine or behind one NAT, may hold everything, and nothing is taken from anybody while there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar


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


def who_yields(
    holders: Iterable[H],
    prefix: str,
    capacity: int,
    peer: str = "",
    own_shares: Mapping[str, float] = MappingProxyType({}),
) -> H | None:
    """The holder that gives way to a peer of this prefix; None where none has to.

    The youngest one of the largest peer of the largest prefix.  holders: the oldest first.  capacity: of all.
    own_shares: peers with a part of the capacity of their own, and that part: each of them stands beside the
    prefixes, which have equal parts of the rest.  peer: the asking one, where it may be one of these.
    """
    asks = _Party.of(peer, prefix, own_shares)
    if not asks.name:
        return None
    named = [
        (party, each)
        for each in holders
        if each.weight and not each.yields and (party := _Party.of(each.peer, each.prefix, own_shares)).name
    ]
    parts = Counter[_Party]({asks: 0})
    for party, each in named:
        parts[party] += each.weight
    equal = _equal_part(parts, capacity)
    over = {
        party: part - (equal if party.share is None else party.share * capacity)
        for party, part in parts.items()
    }
    largest = max(over, key=over.__getitem__)
    if over[largest] <= 0 or over[asks] >= 0:
        return None
    peers = Counter[str]()
    for party, each in named:
        if party == largest:
            peers[each.peer] += each.weight
    owner = max(reversed(peers), key=peers.__getitem__)
    return next(each for party, each in reversed(named) if party == largest and each.peer == owner)


def party_of(peer: str, prefix: str, own_shares: Mapping[str, float]) -> str:
    """Whose parts those of a peer are counted with: its prefix's, or its own where it has its own share."""
    return peer if peer in own_shares else prefix


def counted(party: str, part: float, capacity: float, own_shares: Mapping[str, float]) -> float:
    """What counts of a party's part: all of a prefix's, of a peer with its own share what exceeds that share.

    So where the one that holds most gives way to one that holds less, nobody within its own share does.
    """
    return max(0.0, part - own_shares[party] * capacity) if party in own_shares else part


class _Party(NamedTuple):
    """A prefix, or a peer with a share of its own."""

    name: str
    share: float | None = None

    @classmethod
    def of(cls, peer: str, prefix: str, own_shares: Mapping[str, float]) -> _Party:
        share = own_shares.get(peer)
        return cls(prefix) if share is None else cls(peer, share)


def _equal_part(parties: Collection[_Party], capacity: int) -> float:
    """Of each prefix: an equal part of what the parties with a share of their own leave, if they use it."""
    own = sum(party.share for party in parties if party.share is not None)
    others = sum(party.share is None for party in parties)
    return capacity * max(0.0, 1.0 - own) / others if others else 0.0
