"""The connections of one node, their caps, and the banned peers.

Decides and counts; opens, closes and awaits nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from node.network.transport.connection import Connection, MuxedStream
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tensor_codec.limits import Limits

BAN_SECONDS = 60.0  # for a peer that floods us or ignores windows


class NoPlaceLeft(PeerGone):
    """This node itself allows no further connection: the error says nothing about the peer."""


class ConnectionTable:
    """Every connection of a node, by peer.

    Promises, checked by tests/io/test_host.py:
      * no cap of `Limits` on connections is exceeded, and a connection that ended counts no more;
      * a banned peer gets no connection for BAN_SECONDS, and one afterwards.
    """

    def __init__(self, limits: Limits) -> None:
        self.accepting = True  # see `node.runtime.watermarks`
        self._limits = limits
        self._by_peer: dict[PeerId, list[Connection]] = {}
        self._banned_until: dict[PeerId, float] = {}
        self._handshakes = 0  # inbound, not authenticated yet

    def __len__(self) -> int:
        """How many connections there are."""
        return sum(map(len, self._by_peer.values()))

    def __iter__(self) -> Iterator[Connection]:
        """Every connection; a copy, so that connections may end meanwhile."""
        return iter([each for of_peer in self._by_peer.values() for each in of_peer])

    def of(self, peer: PeerId) -> Sequence[Connection]:
        """The connections to one peer; a copy."""
        return list(self._by_peer.get(peer, ()))

    def live(self, peer: PeerId) -> Connection | None:
        """A connection to the peer on which streams can be opened."""
        return next((each for each in self._by_peer.get(peer, ()) if each.is_established), None)

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""
        return {peer for peer in self._by_peer if self.live(peer) is not None}

    # --- caps and bans ---

    @contextlib.contextmanager
    def handshake(self) -> Iterator[None]:
        """Counts one inbound handshake while the block runs."""
        self._handshakes += 1
        try:
            yield
        finally:
            self._handshakes -= 1

    def may_accept(self) -> bool:
        """Whether a fresh inbound socket may begin its handshake."""
        return (
            self.accepting
            and self._handshakes < self._limits.max_unauthenticated_connections
            and sum(not each.is_initiator for each in self) < self._limits.max_inbound_connections
            and len(self) < self._limits.max_connections
        )

    def raise_if_full(self) -> None:
        """Raises NoPlaceLeft when all connections that the limits allow are in use."""
        most = self._limits.max_connections
        if len(self) >= most:
            raise NoPlaceLeft(f"all {most} connections that this node allows are in use")

    def check(self, peer: PeerId, now: float) -> None:
        """Raises PeerGone when a ban or a cap forbids one more connection to this peer."""
        if self._banned_until.get(peer, -1.0) > now:
            raise PeerGone(f"{peer} broke the rules a short time ago and is not let in")
        if len(self._by_peer.get(peer, ())) >= self._limits.max_connections_per_peer:
            raise PeerGone(f"{peer} has {self._limits.max_connections_per_peer} connections already")
        self.raise_if_full()

    def may_serve(self, stream: MuxedStream) -> bool:
        """Whether the caps on inbound streams, of its peer and of this node, allow one more stream."""
        own = stream.connection
        of_peer = sum(each.inbound_streams for each in self._by_peer.get(own.peer, [own]))
        of_node = sum(each.inbound_streams for each in self)
        return of_peer < self._limits.max_streams_per_peer and of_node < self._limits.max_streams

    def ban(self, peer: PeerId, now: float) -> None:
        """Let the peer have no new connection for BAN_SECONDS."""
        self._banned_until = {each: end for each, end in self._banned_until.items() if end > now}
        self._banned_until[peer] = now + BAN_SECONDS

    # --- coming and going ---

    def add(self, connection: Connection) -> None:
        """Count a connection from now on."""
        self._by_peer.setdefault(connection.peer, []).append(connection)

    def remove(self, connection: Connection) -> None:
        """Count a connection no more.  Twice does no harm."""
        others = [each for each in self._by_peer.get(connection.peer, ()) if each is not connection]
        if others:
            self._by_peer[connection.peer] = others
        else:
            self._by_peer.pop(connection.peer, None)
