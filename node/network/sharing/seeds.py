"""The adapters that a node gives to others.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from routing.sharing.cards import Card
from tensor_codec.adapters import AdapterManifest, blob_digest
from tensor_codec.errors import Refused
from tensor_codec.frame import Buffer
from tensor_codec.messages.sharing import CardsPage


@dataclass(frozen=True, slots=True)
class Seed:
    """One adapter with its card.

    wire: the card as it travels.  blobs: of every block of the model.  digests: SHA-256 of each.
    """

    card: Card
    wire: bytes
    manifest: AdapterManifest
    blobs: Sequence[Buffer] = field(repr=False)
    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, card: Card, wire: bytes, manifest: AdapterManifest, blobs: Sequence[Buffer]) -> Seed:
        """A seed with the hashes of its blobs."""
        return cls(card, wire, manifest, blobs, tuple(map(blob_digest, blobs)))


class Seeds:
    """The seeds of a node, by their ids; of two with one id the first counts."""

    def __init__(self, seeds: Iterable[Seed] = ()) -> None:
        found: dict[str, Seed] = {}
        for seed in seeds:
            found.setdefault(seed.card.id, seed)
        self._seeds = dict(sorted(found.items()))

    def __len__(self) -> int:
        """The number of adapters."""
        return len(self._seeds)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all."""
        return tuple(self._seeds)

    @property
    def revisions(self) -> tuple[str, ...]:
        """The revisions of models that there is an adapter for."""
        return tuple(dict.fromkeys(seed.card.revision for seed in self._seeds.values()))

    def page(self, revision: str, after: str, most: int) -> CardsPage:
        """Up to `most` cards of adapters for a revision, those behind the id `after`."""
        cards = [
            seed.wire
            for seed in self._seeds.values()
            if seed.card.revision == revision and seed.card.id > after
        ]
        return CardsPage(tuple(cards[:most]), len(cards) > most)

    def get(self, adapter: str) -> Seed:
        """An adapter by its id.  Raises Refused."""
        if (found := self._seeds.get(adapter)) is None:
            raise Refused(f"adapter {adapter[:16]}... is not given here")
        return found
