"""The contacts of a Kademlia table: peers that have answered over a connection, by distance from this node.

A bucket holds the peers whose ids share one more bit with ours than those of the bucket before; it keeps old
contacts that answer rather than take new ones (Maymounkov and Mazieres, 2002).  A public network has few
places in a bucket and in the table, so that ids ground out on one machine do not fill either.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from node.network.directory.kademlia.contact import KEY_BITS, NEAREST, Contact, distance
from routing.names import PeerId, peer_id_bytes

OLD_SECONDS = 900.0  # without an answer; then a new contact may take the place


@dataclass(slots=True)
class Table:
    """At most NEAREST contacts a bucket.  Times are the caller's clock, in seconds.

    per_network: contacts of one public network in the whole table; a bucket takes a quarter of them.
    """

    me: PeerId
    per_network: int
    _buckets: dict[int, dict[PeerId, tuple[Contact, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def __contains__(self, peer: PeerId) -> bool:
        """Whether the peer is a contact."""
        return peer != self.me and peer in self._buckets.get(self._bucket(peer), {})

    def __len__(self) -> int:
        """The number of contacts."""
        return sum(map(len, self._buckets.values()))

    def answered(self, contact: Contact, now: float) -> bool:
        """A peer has answered; whether it is a contact now."""
        if contact.peer == self.me or not contact.addresses:
            return False
        number = self._bucket(contact.peer)
        bucket = self._buckets[number]
        if contact.peer not in bucket:
            if not self._has_room(contact, bucket):
                return False
            if len(bucket) >= NEAREST:
                oldest = min(bucket, key=lambda peer: bucket[peer][1])
                if bucket[oldest][1] > now - OLD_SECONDS:
                    return False
                del bucket[oldest]
        bucket[contact.peer] = contact, now
        return True

    def failed(self, peer: PeerId) -> None:
        """A peer gave no answer: it is a contact no more."""
        if peer != self.me:
            self._buckets[self._bucket(peer)].pop(peer, None)

    def nearest(self, key: bytes, most: int = NEAREST) -> list[Contact]:
        """The contacts nearest to a key."""
        contacts = [contact for bucket in self._buckets.values() for contact, _ in bucket.values()]
        return sorted(contacts, key=lambda contact: distance(contact.peer, key))[:most]

    def _has_room(self, contact: Contact, bucket: dict[PeerId, tuple[Contact, float]]) -> bool:
        """Whether the contact's public network has a place left in its bucket and in the table."""
        if not contact.network:
            return True
        here = sum(other.network == contact.network for other, _ in bucket.values())
        networks = Counter(other.network for each in self._buckets.values() for other, _ in each.values())
        return here < max(1, self.per_network // 4) and networks[contact.network] < self.per_network

    def _bucket(self, peer: PeerId) -> int:
        """The number of leading bits that the peer's place shares with ours."""
        return KEY_BITS - distance(peer, peer_id_bytes(self.me)).bit_length()
