"""Shared adapters of a few numbers, and streams to their seeders."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from client.sharing.catalogue import Sharing
from node.network.sharing.seeder import Seeder
from node.network.sharing.seeds import Seed, Seeds
from node.network.transport.identity import Identity, identity_of
from routing.names import PeerId
from routing.sharing.cards import Card, card_of, sign_card, verify_card
from routing.sharing.catalogue import Listed, SignedCard
from routing.view.view import SwarmView
from tensor_codec.adapters import AdapterContent, AdapterManifest, blob_bytes
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tests.adapter_fixtures import SITES
from tests.fakes_serving import HIDDEN, FakeStream, stream_pair

LIMITS = Limits()
AUTHOR = identity_of(bytes(31) + b"\1")
ME = PeerId("me")
Serve = Callable[[FakeStream], Awaitable[None]]


def sizes_of(manifest: AdapterManifest) -> list[int]:
    """Bytes of every blob, by the shapes of the small model."""
    shapes = dict.fromkeys(SITES, (HIDDEN, HIDDEN))
    return [blob_bytes(sites, shapes, manifest.dtype) for sites in manifest.blocks]


def signed(
    own: AdapterContent, name: str = "story", author: Identity = AUTHOR, **changes: object
) -> SignedCard:
    """A card of this content.  changes: fields of Card."""
    card: Card = card_of(own.manifest, own.id, own.nbytes, name=name, licence="MIT", model="m")
    wire = sign_card(replace(card, **changes), author.private_key, LIMITS)  # type: ignore[arg-type]
    return SignedCard(verify_card(wire, LIMITS), wire)


def seed(own: AdapterContent, name: str = "story", author: Identity = AUTHOR) -> Seed:
    """This content with a card."""
    made = signed(own, name, author)
    return Seed.of(made.card, made.wire, own.manifest, own.blobs)


def seeder(*owns: AdapterContent, limits: Limits = LIMITS) -> Seeder:
    """A seeder of these adapters."""
    return Seeder(Seeds([seed(own, f"a{number}") for number, own in enumerate(owns)]), limits)


@dataclass
class Peers:
    """Seeders by their ids, honest or not, in the place of a host and of a Kademlia table."""

    nursery: trio.Nursery
    limits: Limits = LIMITS
    serving: dict[PeerId, Serve] = field(default_factory=dict)
    faults: list[tuple[PeerId, PeerFault]] = field(default_factory=list)
    opened: list[PeerId] = field(default_factory=list)

    def add(self, name: str, serve: Serve) -> PeerId:
        """One more."""
        self.serving[PeerId(name)] = serve
        return PeerId(name)

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> FakeStream:
        """A stream to a peer, served by its function."""
        assert protocol == ADAPTER_PROTOCOL
        self.opened.append(peer)
        await trio.sleep(0.01)
        if peer not in self.serving:
            raise PeerGone(f"{peer} is not there")
        ours, theirs = stream_pair(ME, peer, ADAPTER_PROTOCOL, self.limits)
        theirs.prefix = ""
        self.nursery.start_soon(self._serve, peer, theirs)
        return ours

    async def _serve(self, peer: PeerId, stream: FakeStream) -> None:
        try:
            await self.serving[peer](stream)
            await stream.aclose()
        except PeerFault as fault:
            self.faults.append((peer, fault))
            await stream.reset()

    async def provide_key(self, key: bytes) -> None:
        """Everybody is found anyway."""

    async def find_key(self, key: bytes, seconds: float) -> dict[PeerId, tuple[str, ...]]:
        """All."""
        await trio.sleep(0.01)
        return dict.fromkeys(self.serving, ("/ip4/10.0.0.1/tcp/1",))

    @property
    def sharing(self) -> Sharing:
        """A client's side."""
        return Sharing(self, ME, "public", self, lambda: SwarmView("public"), self.limits)


@asynccontextmanager
async def peers(limits: Limits = LIMITS) -> AsyncIterator[Peers]:
    """No seeder yet."""
    async with trio.open_nursery() as nursery:
        yield Peers(nursery, limits)
        nursery.cancel_scope.cancel()


def wanted(own: AdapterContent, *seeders: PeerId) -> Listed:
    """An adapter as a catalogue has it."""
    return Listed(signed(own), seeders)
