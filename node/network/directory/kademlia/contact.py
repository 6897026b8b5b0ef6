"""A peer in a Kademlia table, and the distance between peers and keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from routing.names import PeerId, peer_id_bytes
from routing.view.networks import network_of

NEAREST = 20  # peers that hold a key, contacts of a bucket: `k` of Kademlia
KEY_BITS = 256


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and the multiaddrs where it listens, without /p2p."""

    peer: PeerId
    addresses: tuple[str, ...] = ()

    @property
    def network(self) -> str:
        """See `routing.view.networks.network_of`."""
        return network_of(self.addresses)


def distance(peer: PeerId, key: bytes) -> int:
    """XOR of the two places in the key space; libp2p hashes ids and keys alike."""
    return _place(peer_id_bytes(peer)) ^ _place(key)


@lru_cache(maxsize=16_384)
def _place(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest(), "big")
