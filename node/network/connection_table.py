"""The connections of one node, and their places: for each peer, each address, and all.

Decides and counts; opens, closes and awaits nothing.  `node.network.admission` has the rules.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from node.network.admission.half_open import HalfOpen
from node.network.admission.places import Newcomer, Place, Places
from node.network.admission.rates import Arrivals
from node.network.admission.streams import User, gives_way
from node.network.prefixes import is_local
from node.network.transport.connection import Connection, MuxedStream
from node.runtime.faults import Faults
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tensor_codec.limits import Limits

PROVEN_SECONDS = 120.0  # of a connection that was always in use: its peer is known good


class NoPlaceLeft(PeerGone):
    """This node itself allows no further connection: the error says nothing about the peer."""


@dataclass(frozen=True, slots=True)
class StreamRoom:
    """The answer to a new stream: admitted, perhaps in the place of another stream, which is reset."""

    admitted: bool
    instead_of: MuxedStream | None = None


class ConnectionTable:
    """Every connection of a node, by peer.

    Promises, checked by tests/io/test_host.py and tests/unit/test_connection_table.py:
      * no cap of `Limits` on connections is exceeded, and a connection that ended counts no more;
      * a banned peer gets no connection until its ban ends.

    faults: knows the banned peers, the suspect addresses and the peers known good.
    members_only: every connected peer has proved the swarm key, and is known good.
    handshakes: under way.  arrivals: of sockets and streams, by prefix.
    """

    def __init__(self, limits: Limits, faults: Faults, *, members_only: bool = False) -> None:
        self.accepting = True  # see `node.runtime.watermarks`
        self.reserved: Container[str] = ()  # peers that this node relays to: their connections stay
        self.handshakes = HalfOpen(limits.max_unauthenticated_connections)
        self.arrivals = Arrivals(limits)
        self._limits = limits
        self._faults = faults
        self._members_only = members_only
        self._by_peer: dict[PeerId, list[Connection]] = {}
        self._inbound: dict[Connection, Place] = {}
        total = limits.max_inbound_connections
        self._places = Places(total, int(total * limits.known_good_connection_share))

    def __len__(self) -> int:
        """How many connections there are."""
        return sum(map(len, self._by_peer.values()))

    def __iter__(self) -> Iterator[Connection]:
        """Every connection; a copy, so that connections may end meanwhile."""
        return iter([each for of_peer in self._by_peer.values() for each in of_peer])

    def of(self, peer: PeerId) -> Sequence[Connection]:
        """The connections to one peer; a copy."""
        return list(self._by_peer.get(peer, ()))

    def live(self, peer: PeerId, *, direct: bool = False) -> Connection | None:
        """A connection to the peer on which streams can be opened; one without a relay where there is one.

        direct: none with a relay.
        """
        relayed = None
        for each in self._by_peer.get(peer, ()):
            if each.is_established:
                if each.relayed_by is None:
                    return each
                relayed = relayed or each
        return None if direct else relayed

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""
        return {peer for peer in self._by_peer if self.live(peer) is not None}

    def prefix_of(self, peer: str) -> str:
        """The prefix of a connected peer's address; "" where unknown."""
        return next((each.prefix for each in self._by_peer.get(PeerId(peer), ())), "")

    # --- arrivals ---

    def may_accept(self, prefix: str, now: float) -> bool:
        """Count a fresh inbound socket; False: close it at once."""
        if not self.accepting:
            return False
        scarce = self._is_scarce or 2 * len(self.handshakes) >= self.handshakes.most
        return self.arrivals.socket(prefix, now, scarce=scarce, suspect=self._faults.is_suspect(prefix))

    @property
    def _is_scarce(self) -> bool:
        return 2 * len(self._inbound) >= self._places.total or len(self) >= self._limits.max_connections

    # --- caps and bans ---

    def raise_if_full(self) -> None:
        """Raises NoPlaceLeft when all connections that the limits allow are in use."""
        most = self._limits.max_connections
        if len(self) >= most:
            raise NoPlaceLeft(f"all {most} connections that this node allows are in use")

    def raise_if_banned(self, peer: PeerId) -> None:
        """Raises PeerGone until the end of the peer's ban."""
        if (seconds := self._faults.banned_seconds(peer)) > 0:
            raise PeerGone(f"{peer} broke the rules, and is let in again in {seconds:.0f} s")

    def check(self, peer: PeerId, *, relayed: bool = False) -> None:
        """Raises PeerGone when a ban or the peer's cap forbids one more connection to this peer.

        relayed: by a relay; such connections have a cap of their own.
        """
        self.raise_if_banned(peer)
        limits = self._limits
        most = limits.max_circuits_per_peer if relayed else limits.max_connections_per_peer
        alike = [each for each in self._by_peer.get(peer, ()) if (each.relayed_by is not None) is relayed]
        if len(alike) >= most:
            raise PeerGone(f"{peer} has {most} {'circuits' if relayed else 'connections'} already")

    def make_room(self, peer: PeerId, prefix: str, now: float) -> Connection | None:
        """For an inbound connection: the connection that has to end for it.  Raises NoPlaceLeft."""
        for place in self._inbound.values():
            place.good = self._is_good(place.peer)
        newcomer = Newcomer(peer, prefix, self._is_good(peer), self._most_of(prefix))
        full = len(self) >= self._limits.max_connections
        room = self._places.room(newcomer, list(self._inbound.values()), now, full=full)
        if not room.admitted:
            raise NoPlaceLeft(f"all {self._places.total} places that this node has for peers are in use")
        if room.instead_of is None:
            return None
        return next(each for each, place in self._inbound.items() if place is room.instead_of)

    def _is_good(self, peer: str) -> bool:
        return self._members_only or self._faults.is_good(peer)

    def _most_of(self, prefix: str) -> int | None:
        """Places of an address for peers not known good; None for any number."""
        if is_local(prefix):
            return None
        if self._faults.is_suspect(prefix):
            return self._limits.suspect_connections_per_prefix
        return self._limits.max_connections_per_prefix if self._is_scarce else None

    def unused(self, now: float) -> list[Connection]:
        """Note the connections in use; those that peers opened and left without a stream for too long."""
        for connection, place in self._inbound.items():
            if connection.core.streams:
                place.used_at = now
                if now - place.idle_at >= PROVEN_SECONDS:
                    self._faults.worked(place.peer)
            else:
                place.idle_at = now
        last = now - self._limits.idle_connection_seconds
        return [
            each
            for each, place in self._inbound.items()
            if place.used_at <= last and not self._is_good(place.peer) and place.peer not in self.reserved
        ]

    # --- streams ---

    def room_for(self, stream: MuxedStream, now: float) -> StreamRoom:
        """Whether the rate of its prefix and the caps of its peer and of this node allow one more stream."""
        own = stream.connection
        if (place := self._inbound.get(own)) is not None:
            place.used_at = now
        of_peer = self._streams_of(self._by_peer.get(own.peer, [own]))
        in_time = self.arrivals.stream(own.peer, own.prefix, now)
        if not in_time or of_peer >= self._limits.streams_of(own.peer):
            return StreamRoom(admitted=False)
        if sum(map(self._streams_of, self._by_peer.values())) < self._limits.max_streams:
            return StreamRoom(admitted=True)
        named = self._limits.own_shares
        users = [
            User(peer, held[0].prefix, self._streams_of(held), self._is_good(peer), peer in named)
            for peer, held in self._by_peer.items()
        ]
        newcomer = User(own.peer, own.prefix, of_peer, own_share=own.peer in named)
        loser = gives_way(newcomer, users)
        if loser is None:
            return StreamRoom(admitted=False)
        theirs = [each for one in self._by_peer[PeerId(loser.peer)] for each in one.served_streams()]
        return StreamRoom(True, max(theirs, key=lambda each: (each.is_waiting, each.state.id)))

    @staticmethod
    def _streams_of(connections: Sequence[Connection]) -> int:
        return sum(len(each.served_streams()) for each in connections)

    # --- coming and going ---

    def add(self, connection: Connection, now: float) -> None:
        """Count a connection from now on."""
        self._by_peer.setdefault(connection.peer, []).append(connection)
        if not connection.is_initiator:
            self._inbound[connection] = Place(
                connection, connection.peer, connection.prefix, since=now, used_at=now, idle_at=now
            )

    def remove(self, connection: Connection) -> None:
        """Count a connection no more.  Twice does no harm."""
        self._inbound.pop(connection, None)
        others = [each for each in self._by_peer.get(connection.peer, ()) if each is not connection]
        if others:
            self._by_peer[connection.peer] = others
        else:
            self._by_peer.pop(connection.peer, None)
