"""Rates of arrival by prefix: of sockets, of handshakes, which cost a hundred times as much, and of streams.

A rate bites softly where places are plenty.  Where places are scarce a public address brings one connection a
second, as in go-libp2p.  Loopback and private networks hold many honest peers at one address: for them only
the rates hold that bound the work of a flood.
"""

from __future__ import annotations

from node.network.prefixes import is_local, network_of
from tensor_codec.limits import Limits

MAX_NAMES = 4096  # of one rate
NETWORK_ADDRESSES = 4  # a network has the rates of four addresses
SUSPECT_COST = 8  # an arrival at a suspect prefix counts for so many
LOCAL_COST = 0.2  # a handshake from loopback or a private network: a swarm may start on one machine
_ROUNDING = 1e-6  # seconds


class NamedRates:
    """At most `burst` at once and `per_second` in the long run, for each of many names.

    The state of a name is the time at which its burst is whole again (the generic cell rate algorithm).  A
    name whose burst is whole needs no state.
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._seconds = 1 / per_second
        self._burst = burst / per_second
        self._whole_at: dict[str, float] = {}

    def __len__(self) -> int:
        """The number of names with a state."""
        return len(self._whole_at)

    def has(self, name: str, now: float, cost: float = 1.0) -> bool:
        """Whether that many may come now."""
        whole_at = max(self._whole_at.get(name, now), now) + cost * self._seconds
        return whole_at - now <= self._burst + _ROUNDING

    def wait(self, name: str, now: float) -> float:
        """Seconds until the name has not had more than its burst any more."""
        return max(0.0, self._whole_at.get(name, now) - now - self._burst)

    def take(self, name: str, now: float, cost: float = 1.0) -> None:
        """Count what has come."""
        if len(self._whole_at) >= MAX_NAMES and name not in self._whole_at:
            late = sorted(self._whole_at.items(), key=lambda item: item[1])[MAX_NAMES // 2 :]
            self._whole_at = {each: at for each, at in late if at > now}
        self._whole_at[name] = max(self._whole_at.get(name, now), now) + cost * self._seconds


class _Rate:
    """One rate for addresses, and that of their networks."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._addresses = NamedRates(per_second, burst)
        self._networks = NamedRates(NETWORK_ADDRESSES * per_second, NETWORK_ADDRESSES * burst)

    def may(self, prefix: str, now: float, cost: float = 1.0) -> bool:
        network = network_of(prefix)
        return self._addresses.has(prefix, now, cost) and self._networks.has(network, now, cost)

    def take(self, prefix: str, now: float, cost: float = 1.0) -> None:
        self._addresses.take(prefix, now, cost)
        self._networks.take(network_of(prefix), now, cost)


class Arrivals:
    """Whether a prefix may bring one more socket, begin one more handshake, and open one more stream."""

    def __init__(self, limits: Limits) -> None:
        self._sockets = _Rate(limits.sockets_per_prefix_per_second, limits.sockets_per_prefix_burst)
        self._handshakes = _Rate(limits.handshakes_per_prefix_per_second, limits.handshakes_per_prefix_burst)
        self._scarce = _Rate(limits.scarce_connections_per_second, limits.scarce_connections_burst)
        self._streams = _Rate(limits.streams_per_prefix_per_second, limits.streams_per_prefix_burst)
        self._of_peers = NamedRates(limits.streams_per_peer_per_second, limits.streams_per_peer_burst)

    def socket(self, prefix: str, now: float, *, scarce: bool, suspect: bool) -> bool:
        """Count an accepted socket; False: close it at once.

        scarce: few places are left.  suspect: several ids of this prefix were banned.
        """
        cost = SUSPECT_COST if suspect else 1
        strict = (scarce or suspect) and not is_local(prefix)
        if not self._sockets.may(prefix, now) or (strict and not self._scarce.may(prefix, now, cost)):
            return False
        self._sockets.take(prefix, now)
        if strict:
            self._scarce.take(prefix, now, cost)
        return True

    def handshake(self, prefix: str, now: float) -> bool:
        """Count a handshake that begins; False: it has to wait."""
        cost = LOCAL_COST if is_local(prefix) else 1.0
        if not self._handshakes.may(prefix, now, cost):
            return False
        self._handshakes.take(prefix, now, cost)
        return True

    def stream(self, peer: str, prefix: str, now: float) -> bool:
        """Count a stream that a peer opens; False: reset it.

        A few are the peer's own: others at its address cannot use them up.  Those beyond are the prefix's.
        """
        if self._of_peers.has(peer, now):
            self._of_peers.take(peer, now)
        elif not prefix or self._streams.may(prefix, now):
            self._streams.take(prefix, now)
        else:
            return False
        return True
