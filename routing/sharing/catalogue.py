"""What is known of shared adapters: cards of many seeders as one list, and the adapter that a name means.

A name belongs to the author of a card and not to the swarm: two authors may use one name, and anybody may
sign a card for an adapter of another author.  So a name alone is good only while one adapter has it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from routing.names import PeerId
from routing.sharing.cards import Card
from tensor_codec.errors import MessageError

MAX_SHOWN = 8  # candidates in an error
_HEX = re.compile("[0-9a-f]{1,64}")


@dataclass(frozen=True, slots=True)
class SignedCard:
    """A card and its bytes with the signature."""

    card: Card
    wire: bytes


@dataclass(frozen=True, slots=True)
class Listed:
    """A shared adapter.  seeders: the peers that have said that they give it, in their order."""

    signed: SignedCard
    seeders: tuple[PeerId, ...] = ()

    @property
    def card(self) -> Card:
        """What its author says."""
        return self.signed.card


def listed(pages: Mapping[PeerId, Iterable[SignedCard]]) -> list[Listed]:
    """One entry for every adapter and author, by name and id.  pages: the cards that each peer gives.

    Of several cards of one author for one adapter the one that most peers give counts, then the first by its
    bytes.
    """
    cards: dict[tuple[str, PeerId], Counter[SignedCard]] = defaultdict(Counter)
    seeders: dict[str, dict[PeerId, None]] = defaultdict(dict)
    for peer, given in pages.items():
        for each in given:
            cards[each.card.id, each.card.author][each] += 1
            seeders[each.card.id][peer] = None
    found = []
    for (adapter, _), counts in cards.items():
        best = min(counts, key=lambda each: (-counts[each], each.wire))
        found.append(Listed(best, tuple(sorted(seeders[adapter]))))
    return sorted(found, key=lambda each: (each.card.name, each.card.id, each.card.author))


def parse_name(text: str) -> tuple[str, str]:
    """The name and the digits of "name", "name#digits" and "#digits"; either may be empty.

    Raises ValueError.
    """
    name, mark, digits = text.partition("#")
    digits = digits.lower()
    if (mark and not _HEX.fullmatch(digits)) or not (name or digits):
        raise ValueError(f"{text!r:.80} is no adapter: NAME or NAME#DIGITS of its id is allowed")
    return name, digits


def chosen(found: Iterable[Listed], wanted: str, author: str | None = None) -> Listed:
    """The one adapter that "name", "name#digits" or "#digits" means.

    author: a peer id, where several have signed cards.  Raises LookupError that lists the candidates.
    """
    name, digits = parse_name(wanted)
    fits = [
        each
        for each in found
        if (not name or each.card.name == name)
        and each.card.id.startswith(digits)
        and author in (None, each.card.author)
    ]
    if not fits:
        by = f" by {author}" if author is not None else ""
        raise LookupError(f"no adapter {wanted}{by} is shared in this swarm now")
    if len(fits) > 1:
        shown = [f"{each.card.full_name} by {each.card.author}" for each in fits[:MAX_SHOWN]]
        more = f" and {len(fits) - MAX_SHOWN} more" if len(fits) > MAX_SHOWN else ""
        hint = "--author" if len({each.card.id for each in fits}) == 1 else "NAME#DIGITS"
        raise LookupError(
            f"{wanted} names {len(fits)} adapters, say which by {hint}: {', '.join(shown)}{more}"
        )
    return fits[0]


def last_id(cards: Iterable[Card], after: str) -> str:
    """The id that the next page begins behind.  cards: of one page, which begins behind `after`.

    Raises MessageError unless ids grow, so that a seeder cannot give the same ones for ever.
    """
    for card in cards:
        if card.id <= after:
            raise MessageError(f"card {card.id[:16]} comes behind {after[:16]}: ids grow from page to page")
        after = card.id
    return after
