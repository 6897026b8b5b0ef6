"""The share of a network, of an address in it, and of a peer at that address.

An id costs nothing, an IPv6 address nearly nothing, a network something.  The largest holder is therefore the
network that holds most; in it, the address that holds most; there, the peer that holds most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from node.network.prefixes import network_of

Key = TypeVar("Key")


class Place(Protocol):
    """A place among few.  yields: it was told to give way, and is about to end."""

    @property
    def prefix(self) -> str:
        """Of its peer's address; "" where unknown, or with a share of its own: it never gives way."""

    @property
    def yields(self) -> bool:
        """See above."""


P = TypeVar("P", bound=Place)


def places_of_most(held: Sequence[P], prefix: str, *, own_share: bool = False) -> list[P]:
    """The places of which one goes to a newcomer where all are taken, the newest first; none: it gets none.

    They are those of the prefix that has most, if that has more than the newcomer's would have with it.
    held: the oldest first.  prefix: of the newcomer; "" where unknown: nobody gives way to it.
    own_share: the newcomer is within a share of its own, so any prefix gives way to it.
    """
    named = [each for each in held if each.prefix and not each.yields]
    counts = Counter(each.prefix for each in named)
    most = max(counts.values(), default=0)
    if not own_share and (not prefix or counts[prefix] + 1 >= most):
        return []
    return [each for each in reversed(named) if counts[each.prefix] == most]


class Rank(NamedTuple):
    """Places of a holder's network, of its address, and its own.  The greatest rank gives way first."""

    network: int
    address: int
    peer: int


class Shares:
    """Places held by peers, each with the prefix of its address."""

    def __init__(self, holders: Iterable[tuple[str, str]] = ()) -> None:
        """holders: an address prefix and a peer for each place."""
        self._networks: Counter[str] = Counter()
        self._addresses: Counter[str] = Counter()
        self._peers: Counter[tuple[str, str]] = Counter()
        for prefix, peer in holders:
            self.add(prefix, peer)

    def add(self, prefix: str, peer: str, places: int = 1) -> None:
        """Count places of a peer; a negative number gives them back."""
        _add(self._networks, network_of(prefix), places)
        _add(self._addresses, prefix, places)
        _add(self._peers, (prefix, peer), places)

    def rank(self, prefix: str, peer: str) -> Rank:
        """The places of a peer at an address, and of those around it."""
        return Rank(self._networks[network_of(prefix)], self._addresses[prefix], self._peers[prefix, peer])


def _add(counts: Counter[Key], key: Key, places: int) -> None:
    counts[key] += places
    if not counts[key]:
        del counts[key]
