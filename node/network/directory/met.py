"""The peers that this node has been connected to, in either direction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from routing.names import PeerId

MAX_MET = 4096  # those met last are remembered


class Met:
    """A set of peers that forgets the ones met longest ago.

    A peer that was met exists and holds its key; a peer of a record alone may be made up.
    """

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, None] = OrderedDict()

    def __contains__(self, peer: object) -> bool:
        """Whether this node has been connected to that peer."""
        return peer in self._peers

    def add(self, peers: Iterable[PeerId]) -> None:
        """These peers are connected now."""
        for peer in peers:
            self._peers[peer] = None
            self._peers.move_to_end(peer)
        while len(self._peers) > MAX_MET:
            self._peers.popitem(last=False)
