"""The provider entries that a node holds for others: which peer serves a key, and until when."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from node.network.directory.kademlia.contact import NEAREST, Contact
from routing.names import PeerId

EXPIRY_SECONDS = 1.0  # between looks for entries that have ended


@dataclass(slots=True)
class _Entry:
    contact: Contact
    added: float
    renewed: float


@dataclass(slots=True)
class Providers:
    """Entries by key and peer.  Times are the caller's clock, in seconds.

    A peer adds itself alone and renews its entry every minute.  A key that is full makes room for a peer that
    is known from elsewhere, else for a peer of a less crowded public network.  The peer that gives way is one
    that is not known, of the most crowded network, added last: peers that have renewed theirs for long stay.

    is_known: whether the peer has a record in the view, which its own signature made.
    most, per_key, per_peer: entries in all, of a key, of a peer.
    per_network: entries of a key in one public network.
    life_seconds: of an entry that is not renewed.
    """

    most: int
    per_key: int
    per_peer: int
    per_network: int
    life_seconds: float
    is_known: Callable[[PeerId], bool] = lambda _: False
    _keys: dict[bytes, dict[PeerId, _Entry]] = field(default_factory=dict)
    _expired_at: float = -math.inf

    def add(self, key: bytes, contact: Contact, now: float) -> bool:
        """Add or renew an entry; whether it is held now."""
        self._expire(now)
        entries = self._keys.get(key, {})
        if (known := entries.get(contact.peer)) is not None:
            known.contact, known.renewed = contact, now
            return True
        if sum(contact.peer in each for each in self._keys.values()) >= self.per_peer:
            return False
        networks = Counter(entry.contact.network for entry in entries.values())
        if contact.network and networks[contact.network] >= self.per_network:
            return False
        if len(entries) >= self.per_key and not self._make_room(entries, networks, contact):
            return False
        if self.size >= self.most and not self._drop_from_largest(len(entries)):
            return False
        self._keys.setdefault(key, entries)[contact.peer] = _Entry(contact, now, now)
        return True

    def of(self, key: bytes, now: float, rng: random.Random, most: int = NEAREST) -> list[Contact]:
        """The providers of a key: known ones first, and some drawn at random where there are more."""
        self._expire(now)
        contacts = [entry.contact for entry in self._keys.get(key, {}).values()]
        rng.shuffle(contacts)
        return sorted(contacts, key=lambda contact: not self.is_known(contact.peer))[:most]

    @property
    def size(self) -> int:
        """The number of entries."""
        return sum(map(len, self._keys.values()))

    def _make_room(self, entries: dict[PeerId, _Entry], networks: Counter[str], newcomer: Contact) -> bool:
        free = [peer for peer in entries if not self.is_known(peer)]
        if not free:
            return False
        loser = max(free, key=lambda peer: (networks[entries[peer].contact.network], entries[peer].added))
        crowd = networks[entries[loser].contact.network]
        if not self.is_known(newcomer.peer) and crowd <= networks[newcomer.network] + 1:
            return False
        del entries[loser]
        return True

    def _drop_from_largest(self, size: int) -> bool:
        """Make room for an entry of a key with that many others."""
        largest = max(self._keys.values(), key=len)
        if len(largest) <= size + 1:
            return False
        del largest[max(largest, key=lambda peer: largest[peer].added)]
        return True

    def _expire(self, now: float) -> None:
        if now < self._expired_at + EXPIRY_SECONDS:
            return
        self._expired_at, last = now, now - self.life_seconds
        for key in list(self._keys):
            entries = {peer: each for peer, each in self._keys[key].items() if each.renewed > last}
            if entries:
                self._keys[key] = entries
            else:
                del self._keys[key]
