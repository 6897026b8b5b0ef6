"""A lookup along disjoint paths, as S/Kademlia has it (Baumgart and Mies, 2007).

Each path walks towards a key from starting peers of its own, and no peer is asked by two paths.  A liar can
only mislead the path that asked it.  The first starting peers are those that this node knows from elsewhere
(its own configuration, connections), one for each path, so a newcomer whose table is poisoned has honest
answers before it follows anybody's hints.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from node.network.directory.kademlia.contact import NEAREST, Contact, distance
from routing.names import PeerId

PATHS = 3
MOST_ASKED = 16  # by one path
PER_NETWORK = 2  # hints of one answer in one public network, and peers there that one path asks


@dataclass(slots=True)
class Path:
    """One of the disjoint walks: peers to ask in any case, then the nearest that are known.

    networks: how many peers were asked in each public network, without the first peers.
    """

    first: deque[Contact] = field(default_factory=deque)
    candidates: dict[PeerId, Contact] = field(default_factory=dict)
    asked: int = 0
    networks: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Lookup:
    """Which peers to ask next.  Asks nobody itself.

    first: peers that are asked in any case, the most trusted first.  then: other starting peers.
    heard: the peers that answered, nearest first.
    """

    me: PeerId
    key: bytes
    first: Sequence[Contact]
    then: Sequence[Contact] = ()
    paths: int = PATHS
    _paths: list[Path] = field(init=False)
    _taken: set[PeerId] = field(init=False)
    _answered: dict[PeerId, Contact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._paths = [Path() for _ in range(self.paths)]
        self._taken = {self.me}
        firsts = {contact.peer: contact for contact in self.first}
        for number, contact in enumerate(firsts.values()):
            self._paths[number % self.paths].first.append(contact)
        others = {contact.peer: contact for contact in self.then if contact.peer not in firsts}
        for number, contact in enumerate(others.values()):
            self._paths[number % self.paths].candidates[contact.peer] = contact

    @property
    def heard(self) -> list[Contact]:
        """The peers that answered, nearest to the key first."""
        return sorted(self._answered.values(), key=lambda contact: distance(contact.peer, self.key))

    def has_first(self, number: int) -> bool:
        """Whether path `number` has peers left that it asks in any case."""
        return bool(self._paths[number].first)

    def next(self, number: int) -> Contact | None:
        """The peer that path `number` asks now; None at its end for the moment: hints may still come."""
        path = self._paths[number]
        while path.first:
            contact = path.first.popleft()
            if contact.peer not in self._taken:
                return self._ask(path, contact)
        if path.asked >= MOST_ASKED:
            return None
        free = self._free(path)
        if not free:
            return None
        nearest = min(free, key=lambda contact: distance(contact.peer, self.key))
        path.networks[nearest.network] += 1
        return self._ask(path, nearest)

    def answered(self, number: int, contact: Contact, closer: Sequence[Contact]) -> None:
        """A peer that path `number` asked gave these hints."""
        self._answered[contact.peer] = contact
        path, networks = self._paths[number], Counter[str]()
        for hint in closer[:NEAREST]:
            networks[hint.network] += 1
            if hint.addresses and (not hint.network or networks[hint.network] <= PER_NETWORK):
                path.candidates.setdefault(hint.peer, hint)
        nearest = sorted(self._free(path), key=lambda each: distance(each.peer, self.key))[: 2 * NEAREST]
        path.candidates = {each.peer: each for each in nearest}

    def _free(self, path: Path) -> list[Contact]:
        """The candidates that this path may ask."""
        return [
            contact
            for peer, contact in path.candidates.items()
            if peer not in self._taken
            and (not contact.network or path.networks[contact.network] < PER_NETWORK)
        ]

    def _ask(self, path: Path, contact: Contact) -> Contact:
        self._taken.add(contact.peer)
        path.asked += 1
        return contact
