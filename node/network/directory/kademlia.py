"""Finds peers of a model in py-libp2p's Kademlia table, and nothing else.

The table holds no records: each peer sends its own record, with its signature.  The table only names peers
to ask.  The traps of py-libp2p 0.8 that are avoided:

* values have no expiry of ours and no merge, so only provider entries are used;
* `find_providers` answers from its own cache for two days: lookups go through a store of their own,
  emptied before each;
* it repeats peers and passes any address on: both are cleaned here;
* one protocol name serves all swarms: the id of the swarm is part of the key;
* ten ADD_PROVIDER per ten seconds and peer are taken: a node writes one key, rarely.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.peer.peerinfo import PeerInfo
from libp2p.tools.anyio_service import background_trio_service

from node.runtime.nurseries import background_nursery
from routing.names import PeerId, public_key_of
from routing.view.records import MAX_ADDRESSES, check_address

PROVIDE_SECONDS = 10.0
MAX_PROVIDERS = 20  # providers that a lookup waits for; the table keeps no more per key
_SHA256_MULTIHASH = bytes([0x12, 0x20])

log = logging.getLogger(__name__)


def provider_key(swarm: str, revision: str) -> bytes:
    """The key under which servers of a model revision are found: a SHA-256 multihash."""
    text = "\0".join(("raceme-providers-1", swarm, revision))
    return _SHA256_MULTIHASH + hashlib.sha256(text.encode()).digest()


class KademliaHost(Protocol):
    """The part of `node.network.host.Host` that a Kademlia table needs."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    @property
    def raw(self) -> Any:  # Any: py-libp2p has no types
        """py-libp2p's host."""


class Kademlia:
    """The Kademlia table of one host, for the directory.  See `open_kademlia`."""

    def __init__(self, host: KademliaHost, dht: KadDHT, swarm: str) -> None:
        self._host = host
        self._dht = dht
        self._swarm = swarm

    async def provide(self, revision: str) -> None:
        """Write into the table that this node serves a model revision; takes 10 s at the most."""
        with trio.move_on_after(PROVIDE_SECONDS):
            await self._meet_connected()
            if not await self._dht.provider_store.provide(provider_key(self._swarm, revision)):
                log.debug("no peer took our entry into the Kademlia table")

    async def find(self, revision: str) -> Mapping[PeerId, tuple[str, ...]]:
        """The servers in the table, with addresses; the caller sets the deadline."""
        await self._meet_connected()
        key = provider_key(self._swarm, revision)
        fresh = ProviderStore(self._host.raw, self._dht.peer_routing)
        found = await fresh.find_providers(key, MAX_PROVIDERS)
        peers: dict[PeerId, tuple[str, ...]] = {}
        for info in [*self._dht.provider_store.get_providers(key), *found]:
            peer, addresses = _read(info)
            if peer is not None and peer != self._host.peer_id:
                together = dict.fromkeys([*peers.get(peer, ()), *addresses])
                peers[peer] = tuple(together)[:MAX_ADDRESSES]
        return peers

    async def _meet_connected(self) -> None:
        """Put our connected peers into the table: Kademlia starts from them."""
        for peer in self._host.raw.get_connected_peers():
            await self._dht.add_peer(peer)


def _read(info: PeerInfo) -> tuple[PeerId | None, list[str]]:
    """A peer and its TCP addresses from a table entry; None for an id that we cannot check."""
    peer = PeerId(info.peer_id.to_base58())
    try:
        public_key_of(peer)
    except ValueError:
        return None, []
    addresses = []
    for text in (str(address).partition("/p2p/")[0] for address in info.addrs):
        try:
            check_address(text)
        except ValueError:
            continue
        addresses.append(text)
    return peer, addresses


@asynccontextmanager
async def open_kademlia(host: KademliaHost, *, swarm: str, serves: bool) -> AsyncIterator[Kademlia]:
    """A Kademlia table, run until the end of the block.

    serves: hold a part of it and answer others; False for clients, which only ask.
    """
    dht = KadDHT(host.raw, DHTMode.SERVER if serves else DHTMode.CLIENT)

    async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with background_trio_service(dht):
            task_status.started()
            await trio.sleep_forever()

    # In a task of its own: the service's nursery would put the caller's exceptions into groups, and
    # its stop waits for its tasks without a bound.  Cancelled, it does not wait.
    async with background_nursery() as nursery:
        await nursery.start(run)
        yield Kademlia(host, dht, swarm)
