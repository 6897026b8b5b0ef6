"""Keeps the entries in the Kademlia table by which the adapters of this node are found."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import trio

from node.network.directory.discovery import DISCOVER_SECONDS
from node.network.directory.kademlia.kademlia import adapter_key, catalogue_key
from node.network.sharing.seeds import Seeds
from routing.names import PeerId

MAX_ADAPTER_KEYS = 4  # others find further adapters by the cards; a peer has few keys


class KeyTable(Protocol):
    """A Kademlia table.  Neither method raises errors of the network."""

    async def provide_key(self, key: bytes) -> None:
        """Write into the table that this node provides a key."""

    async def find_key(self, key: bytes, seconds: float) -> Mapping[PeerId, tuple[str, ...]]:
        """The peers that the table names within `seconds`, the best first, with their addresses."""


def keys_of(seeds: Seeds, swarm: str) -> list[bytes]:
    """The keys that a seeder provides, the most important first: cards of its revisions, then adapters."""
    adapters = [adapter_key(swarm, each) for each in seeds.ids[:MAX_ADAPTER_KEYS]]
    return [*(catalogue_key(swarm, each) for each in seeds.revisions), *adapters]


async def keep_announced(table: KeyTable, keys: Sequence[bytes], rng: random.Random) -> None:
    """Write the keys into the table again and again, until cancelled."""
    while True:
        for key in keys:
            await table.provide_key(key)
        await trio.sleep(DISCOVER_SECONDS * rng.uniform(0.8, 1.2))
