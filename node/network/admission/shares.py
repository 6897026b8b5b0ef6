"""The share of a network, of an address in it, and of a peer at that address.

An id costs nothing, an IPv6 address nearly nothing, a network something.  The largest holder is therefore the
network that holds most; in it, the address that holds most; there, the peer that holds most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from node.network.prefixes import network_of

Key = TypeVar("Key")


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
