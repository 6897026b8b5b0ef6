"""The places of a full view: which peer gives up its place for a new one.

Peer ids cost nothing, so one neighbour can tell of any number of peers.  A peer that this node has been
connected to keeps its place.  The others count by the neighbour that told of them, and below that by the
network of their addresses: a new peer takes a place of the neighbour with the most, from its most crowded
network.  So a neighbour with fewer than its share always finds room for its peers, and a flood displaces
itself alone.  Half of the places are for peers that trusted neighbours (those of our own configuration) told
of: any number of strangers displaces none of these.  The places of a view that is not full are not shared out
at all: the peers of one house, or of one machine, have one network and many neighbours in common.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Container, Mapping

from routing.names import PeerId
from routing.view.entry import Entry
from routing.view.networks import network_of


class Places:
    """The places of peers that were never met, in one full view.  O(view) to make, O(log view) to use.

    trusted: the neighbours of our own configuration.  kept: places for the peers that they told of.
    """

    def __init__(
        self,
        entries: Mapping[PeerId, Entry],
        met: Container[PeerId],
        trusted: Container[PeerId] = (),
        kept: int = 0,
    ) -> None:
        self._met = met
        self._trusted = trusted
        self._kept = kept
        self._by_source: dict[PeerId, _Networks] = defaultdict(_Networks)
        for peer, entry in entries.items():
            if peer not in met:
                self._by_source[entry.source].add(peer, entry)

    def make_room(self, newcomer: Entry) -> PeerId | None:
        """The peer whose place the newcomer takes; None where the newcomer gets none."""
        holders = {source for source, networks in self._by_source.items() if networks.count}
        trusted = {source for source in holders if source in self._trusted}
        in_use = sum(self._by_source[source].count for source in trusted)
        is_met, is_trusted = newcomer.record.peer in self._met, newcomer.source in self._trusted
        if holders != trusted and in_use + is_trusted <= self._kept:
            holders -= trusted
        crowded = max(holders, key=lambda each: (self._by_source[each].count, each), default=None)
        if crowded is None:
            return None
        most = self._by_source[crowded]
        if is_met:
            return most.pop()
        own = self._by_source[newcomer.source]
        has_claim = is_trusted and crowded not in trusted and in_use < self._kept
        if own is most:
            if own.size_of(newcomer) + 1 >= own.largest():
                return None
        elif own.count + 1 > most.count and not has_claim:
            return None
        evicted = most.pop()
        own.add(newcomer.record.peer, newcomer)
        return evicted


class _Networks:
    """The peers that one neighbour told of, by network."""

    def __init__(self) -> None:
        self.count = 0
        self._peers: dict[str, list[PeerId]] = {}
        self._sizes: list[tuple[int, str]] = []  # a heap of (-size, network); some of its sizes are over

    def add(self, peer: PeerId, entry: Entry) -> None:
        network = network_of(entry.record.addresses)
        peers = self._peers.setdefault(network, [])
        peers.append(peer)
        self.count += 1
        heapq.heappush(self._sizes, (-len(peers), network))

    def size_of(self, entry: Entry) -> int:
        """The number of peers in this one's network."""
        return len(self._peers.get(network_of(entry.record.addresses), ()))

    def largest(self) -> int:
        """The number of peers in the most crowded network."""
        return len(self._peers[self._fullest()])

    def pop(self) -> PeerId:
        """Take out a peer of the most crowded network, the one heard of last."""
        network = self._fullest()
        peer = self._peers[network].pop()
        self.count -= 1
        heapq.heappush(self._sizes, (-len(self._peers[network]), network))
        return peer

    def _fullest(self) -> str:
        while -self._sizes[0][0] != len(self._peers[self._sizes[0][1]]):
            heapq.heappop(self._sizes)
        return self._sizes[0][1]
