"""Asks the swarm for shared adapters: who gives some, and their cards.

Seeders are found by the Kademlia table, and by the records of servers that keep adapters for everybody.
Nothing that one of them says is believed: a card is its author's by its signature, and content is known by
its id.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.network.directory.kademlia.kademlia import adapter_key, catalogue_key
from node.network.sharing.announcing import KeyTable
from routing.names import PeerId
from routing.sharing.cards import verify_card
from routing.sharing.catalogue import Listed, SignedCard, last_id, listed
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.sharing import AskCards, decode_page, encode_question

log = logging.getLogger("raceme")

FIND_SECONDS = 5.0  # for a look into the Kademlia table
CARDS_SECONDS = 10.0  # for all pages of one seeder, a connection included
ANSWER_SECONDS = 5.0  # for one answer
ASKED_AT_ONCE = 8
MAX_REVISIONS = 8  # anybody may announce another one


class SharedStream(Protocol):
    """The part of `node.network.streams.FramedStream` that questions need."""

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """See `FramedStream.send`."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """See `FramedStream.receive`."""

    async def aclose(self) -> None:
        """See `FramedStream.aclose`."""

    async def reset(self) -> None:
        """See `FramedStream.reset`."""


class SharingHost(Protocol):
    """The part of `node.network.host.Host` that is needed to ask seeders."""

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> SharedStream:
        """See `Host.open_stream`."""


@dataclass(slots=True)
class Sharing:
    """A swarm's shared adapters, seen from a client.

    peer_id: our own.  swarm: its id.  table: None for no Kademlia table.  view: of the swarm.
    """

    host: SharingHost
    peer_id: PeerId
    swarm: str
    table: KeyTable | None
    view: Callable[[], SwarmView]
    limits: Limits
    _addresses: dict[PeerId, tuple[str, ...]] = field(default_factory=dict)

    def revisions(self) -> list[str]:
        """The revisions of models that the swarm serves, at most MAX_REVISIONS, those of most servers."""
        counts = Counter(record.revision for record in self.view().records() if record.role == "serve")
        return sorted(counts, key=lambda each: (-counts[each], each))[:MAX_REVISIONS]

    async def catalogue(self, revision: str) -> list[Listed]:
        """The adapters that are shared for a model's revision, by name.

        Peers that do not answer, or give what is no card, are left out.
        """
        found = await self._find(catalogue_key(self.swarm, revision)) | self._keepers(revision)
        pages: dict[PeerId, list[SignedCard]] = {}
        turns = trio.CapacityLimiter(ASKED_AT_ONCE)

        async def ask(peer: PeerId) -> None:
            async with turns:
                pages[peer] = await self._cards_of(peer, revision)

        async with trio.open_nursery() as nursery:
            for peer in list(found)[: self.limits.max_adapter_seeders]:
                nursery.start_soon(ask, peer)
        return listed(pages)

    async def seeders(self, one: Listed) -> list[PeerId]:
        """The peers that may give an adapter, those that have said so first."""
        found = await self._find(adapter_key(self.swarm, one.card.id))
        return list(dict.fromkeys([*one.seeders, *found]))[: self.limits.max_adapter_seeders]

    @asynccontextmanager
    async def stream(self, peer: PeerId) -> AsyncIterator[SharedStream]:
        """A stream to a peer of `catalogue` or `seeders`.  Raises PeerFault."""
        addresses, seconds = self._addresses.get(peer, ()), self.limits.dial_seconds
        stream = await self.host.open_stream(peer, addresses, ADAPTER_PROTOCOL, seconds=seconds)
        try:
            yield stream
        except BaseException:
            await stream.reset()
            raise
        await stream.aclose()

    async def _find(self, key: bytes) -> dict[PeerId, tuple[str, ...]]:
        found: Mapping[PeerId, tuple[str, ...]] = {}
        if self.table is not None:
            found = await self.table.find_key(key, FIND_SECONDS)
        return self._known({peer: found[peer] for peer in found if peer != self.peer_id})

    def _keepers(self, revision: str) -> dict[PeerId, tuple[str, ...]]:
        """Servers that announce adapters of their operators."""
        records = (record for record in self.view().records() if record.revision == revision)
        return self._known({each.peer: each.addresses for each in records if each.adapters})

    def _known(self, found: dict[PeerId, tuple[str, ...]]) -> dict[PeerId, tuple[str, ...]]:
        self._addresses |= found
        return found

    async def _cards_of(self, peer: PeerId, revision: str) -> list[SignedCard]:
        found: list[SignedCard] = []
        with trio.move_on_after(CARDS_SECONDS):
            try:
                async with self.stream(peer) as stream:
                    await ask_cards(stream, revision, self.limits, found)
            except (PeerFault, Refused) as error:
                log.debug("cards of %s: %s", peer, error)
        return found


async def ask_cards(stream: SharedStream, revision: str, limits: Limits, found: list[SignedCard]) -> None:
    """Add a seeder's cards for a revision to `found`, page by page, at most `max_adapter_cards_per_seeder`.

    Raises PeerFault, Refused; what was found before it counts.
    """
    after, has_more = "", True
    while has_more and len(found) < limits.max_adapter_cards_per_seeder:
        await stream.send(encode_question(AskCards(revision, after)))
        page = decode_page(await answer_of(stream, ANSWER_SECONDS), limits)
        if isinstance(page, Failed):
            raise page.error()
        cards = [SignedCard(verify_card(wire, limits), wire) for wire in page.cards]
        after, has_more = last_id((each.card for each in cards), after), page.has_more
        room = limits.max_adapter_cards_per_seeder - len(found)
        found += [each for each in cards if each.card.revision == revision][:room]
        if not any(each.card.revision == revision for each in cards):
            return


async def answer_of(stream: SharedStream, seconds: float) -> Buffer:
    """The next frame.  Raises SlowPeer after `seconds`, PeerGone at the end of the stream."""
    with trio.move_on_after(seconds):
        frame = await stream.receive()
        if frame is None:
            raise PeerGone(f"{stream.peer} closed the stream instead of answering")
        return frame
    raise SlowPeer(f"no answer from {stream.peer} within {seconds:g} s")
