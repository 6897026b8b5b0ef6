"""A relay's accounts: the peers that it relays to, and the circuits that it carries.

Decides and counts; opens, sends and times nothing.  The rules are circuit relay v2's, with shares by address.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from node.network.prefixes import is_local
from node.network.relaying.messages import Status
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

MAX_PREFIXES = 1024  # whose rates are kept


@dataclass(eq=False, slots=True)
class Circuit:
    """A circuit under way.  prefix: of its source's address.  carried_bytes: of both ways."""

    source: str
    target: str
    prefix: str = ""
    carried_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Reservation:
    prefix: str
    ends_at: float


class RelayTable:
    """The reservations and the circuits of one relay.

    Promises, checked by tests/unit/test_relay_table.py:
      * a peer has one reservation, whatever it asks; a refresh never fails for want of room;
      * no cap of `Limits` on reservations and circuits is exceeded, and ended ones count no more;
      * a public address cannot take all circuits of a target, nor have a target meet it without end;
      * no circuit begins without a reservation of its target that is valid now.

    most: reservations.  is_connected: whether a peer has a direct connection now; a reservation ends without.
    """

    def __init__(self, limits: Limits, most: int, is_connected: Callable[[str], bool]) -> None:
        self.carried_bytes = 0  # by all circuits that there have been
        self._limits = limits
        self._most = most
        self._is_connected = is_connected
        self._reserved: dict[str, _Reservation] = {}
        self._circuits: dict[Circuit, None] = {}
        self._openings: OrderedDict[str, TokenBucket] = OrderedDict()  # by prefix

    def __contains__(self, peer: object) -> bool:
        """Whether the peer had a reservation at the last look."""
        return peer in self._reserved

    def __len__(self) -> int:
        """The number of reservations."""
        return len(self._reserved)

    def __iter__(self) -> Iterator[Circuit]:
        """The circuits under way; a copy."""
        return iter(list(self._circuits))

    def reserve(self, peer: str, prefix: str, now: float) -> Status:
        """A peer asks for a reservation, or for longer.  prefix: of its address."""
        self._forget_ended(now)
        if not self._is_connected(peer):
            return Status.PERMISSION_DENIED
        if peer not in self._reserved:
            alike = sum(each.prefix == prefix for each in self._reserved.values())
            crowded = not is_local(prefix) and alike >= self._limits.max_reservations_per_prefix
            if crowded or len(self._reserved) >= self._most:
                return Status.RESERVATION_REFUSED
        self._reserved[peer] = _Reservation(prefix, now + self._limits.reservation_seconds)
        return Status.OK

    def begin(self, source: str, target: str, now: float, prefix: str = "") -> Circuit | Status:
        """A peer asks for a circuit: the circuit, to be given to `end`, or the reason against it.

        prefix: of its address.  Peers of one public address share circuits, and those to each target.
        """
        self._forget_ended(now)
        if source == target:
            return Status.PERMISSION_DENIED
        if target not in self._reserved:
            return Status.NO_RESERVATION
        limits = self._limits
        if (
            len(self._circuits) >= limits.max_circuits
            or Counter(each.source for each in self._circuits)[source] >= limits.max_circuits_from_peer
            or Counter(each.target for each in self._circuits)[target] >= limits.max_circuits_to_peer
            or not (is_local(prefix) or self._has_share(prefix, target, now))
        ):
            return Status.RESOURCE_LIMIT_EXCEEDED
        circuit = Circuit(source, target, prefix)
        self._circuits[circuit] = None
        return circuit

    def carried(self, circuit: Circuit, size: int) -> None:
        """Count bytes of a circuit."""
        circuit.carried_bytes += size
        self.carried_bytes += size

    def end(self, circuit: Circuit) -> None:
        """Count a circuit no more.  Twice does no harm."""
        self._circuits.pop(circuit, None)

    def _has_share(self, prefix: str, target: str, now: float) -> bool:
        """Whether a public address may have one more circuit to this target; counts it for the rate."""
        limits = self._limits
        targets = [each.target for each in self._circuits if each.prefix == prefix]
        if len(targets) >= limits.max_circuits_from_prefix:
            return False
        if targets.count(target) >= limits.max_circuits_from_peer:
            return False
        rate, burst = limits.circuits_per_prefix_per_second, limits.circuits_per_prefix_burst
        bucket = self._openings.setdefault(prefix, TokenBucket.full(rate, burst, now))
        self._openings.move_to_end(prefix)
        while len(self._openings) > MAX_PREFIXES:
            self._openings.popitem(last=False)
        return bucket.try_take(1, now)

    def _forget_ended(self, now: float) -> None:
        for peer, reservation in list(self._reserved.items()):
            if reservation.ends_at <= now or not self._is_connected(peer):
                del self._reserved[peer]
