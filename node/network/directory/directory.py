"""The swarm as this node knows it, and this node as the swarm knows it.  Start with `open_directory`.

Four parts work under a `Directory`: `LiveView` holds the records, `Neighbours` exchanges them over
streams, `Announcer` signs and repeats the record of this node, `Asker` pings.  A Kademlia table
(`Discovery`) runs next to these parts: it finds servers of a model that no neighbour knows.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from node.config import ConfigError
from node.network.addresses import bootstrap_peers
from node.network.directory.announcer import Announcer, AnnouncerHost
from node.network.directory.discovery import FIND_SECONDS, Discovery, Finder
from node.network.directory.kademlia.kademlia import Kademlia, KademliaHost, Knowledge, open_kademlia
from node.network.directory.live_view import LiveView
from node.network.directory.neighbours import PROTOCOL, ExchangeHost, Neighbours
from node.network.directory.pings import PING_SECONDS, Asker, PingHost, worth_monitoring, worth_watching
from node.network.directory.visits import meet, visit_strangers
from node.network.reachability.own_reach import OwnReach
from node.runtime.nurseries import background_nursery
from routing.names import PeerId
from routing.view.answers import FRESH_SECONDS
from routing.view.exchange import FRAME_BYTES
from routing.view.records import Record, Role, check_address
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault
from tensor_codec.limits import Limits

if TYPE_CHECKING:
    from node.network.streams import FramedStream
    from node.network.transport.identity import Identity

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """How a node takes part in a swarm.

    swarm: its id; records of another one are refused.
    bootstrap: multiaddrs with /p2p/ID of peers of the swarm; empty for the first peer.
    role: "client" reads the Kademlia table, the others also hold a part of it.
    patience_seconds: the time for which silent bootstrap peers are dialled again.
    required: raise ConfigError where no bootstrap peer can be reached; otherwise go on, and keep trying.
    kademlia: False for no table at all.
    relayed_bytes: that this node has carried for others, for its record.
    watch: ping servers periodically, and mark silent ones in the view; None: a client does.
    """

    swarm: str
    bootstrap: tuple[str, ...] = ()
    role: Role = "client"
    limits: Limits = field(default_factory=Limits)
    required: bool = True
    patience_seconds: float = 0.0
    kademlia: bool = True
    watch: bool | None = None
    relayed_bytes: Callable[[], int] = lambda: 0

    @property
    def watches(self) -> bool:
        """Whether servers are pinged periodically."""
        return self.role == "client" if self.watch is None else self.watch


class DirectoryHost(AnnouncerHost, ExchangeHost, KademliaHost, PingHost, Protocol):
    """The part of `node.network.host.Host` that a directory needs."""

    def handle(
        self,
        protocol: str,
        handler: Callable[[FramedStream], Awaitable[None]],
        *,
        max_frame_bytes: int | None = None,
    ) -> None:
        """Answer inbound streams of a protocol."""

    def configure_peers(self, multiaddrs: Iterable[str]) -> None:
        """The operator has named these addresses."""


class Directory:
    """The view of the swarm, and the record of this node.  Made by `open_directory`.

    table: the Kademlia table, for other keys than those of servers; None without one.
    pings: who answers, and at which distance.
    set_seen: see `LiveView.set_seen`.
    meet: exchange records with a peer that is said to listen somewhere: see `visits.meet`.
    """

    def __init__(
        self,
        host: DirectoryHost,
        identity: Identity,
        config: DirectoryConfig,
        nursery: trio.Nursery,
        finder: Finder | None,
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self.peer_id = host.peer_id
        self.table = finder if isinstance(finder, Kademlia) else None
        self._host = host
        self._rng = rng
        bootstrap = bootstrap_peers(config.bootstrap)
        host.configure_peers(address for addresses in bootstrap.values() for address in addresses)
        silent = self._silent if config.watches else None
        self._live = LiveView(config.swarm, config.limits.max_records, bootstrap, silent)
        self.set_seen = self._live.set_seen
        self._neighbours = Neighbours(
            host,
            self._live,
            bootstrap=bootstrap,
            limits=config.limits,
            own_record=lambda record, told_by: self._announcer.overtaken(record),
            rng=rng,
        )
        self.meet = partial(meet, self._neighbours, self._live.view)
        self.pings = Asker(
            host,
            nursery,
            addresses=self._live.addresses,
            changed=self._live.mark_silent,
            dial_seconds=config.limits.dial_seconds,
        )
        self._discovery = Discovery(self.peer_id, self._live, self._neighbours, finder, rng)
        self._announcer = Announcer(
            host, identity, config.limits, self._live, self._neighbours, self.pings, wall_clock
        )
        self._announcer.relayed_bytes = config.relayed_bytes

    # --- the view ---------------------------------------------------------------------------------

    def view(self) -> SwarmView:
        """The swarm as known now.  A value: it does not change, ask again for a newer one.

        A client's view marks the servers that do not answer.
        """
        return self._live.view()

    @property
    def last_view(self) -> SwarmView:
        """The view of the last look; some of its records may have ended since.  For any thread."""
        return self._live.last

    async def changed(self, since: SwarmView | None = None) -> None:
        """See `LiveView.changed`."""
        await self._live.changed(since)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """See `LiveView.addresses`."""
        return self._live.addresses(peer)

    def is_vouched(self, peer: PeerId) -> bool:
        """Whether this node has met that peer, or passes its record on: see `routing.view.newcomers`."""
        return self._neighbours.is_vouched(peer)

    def neighbours(self) -> frozenset[PeerId]:
        """The peers with which records are exchanged now."""
        return self._neighbours.peers

    async def find_peers(self, revision: str, seconds: float = FIND_SECONDS) -> tuple[Record, ...]:
        """See `Discovery.find_peers`."""
        return await self._discovery.find_peers(revision, seconds)

    # --- our own record ---------------------------------------------------------------------------

    async def announce(self, record: Record) -> None:
        """See `Announcer.announce`."""
        await self._announcer.announce(record)

    async def leave(self) -> None:
        """See `Announcer.leave`."""
        await self._announcer.leave()

    def set_reach(self, reach: OwnReach) -> None:
        """How others reach this node: for its record, and for the view's neighbours next door."""
        self.set_seen([reach.seen] if reach.seen else [])
        self._announcer.set_reach(reach)

    # --- pings ------------------------------------------------------------------------------------

    def rtts(self, seconds: float = FRESH_SECONDS) -> dict[PeerId, float]:
        """The round-trip times, in seconds, of peers that have answered within the last `seconds`."""
        return self.pings.answers.rtts(trio.current_time(), seconds)

    def late(self) -> frozenset[PeerId]:
        """Peers with a ping under way and no answer at once: see `routing.view.answers`."""
        return self.pings.answers.late(trio.current_time())

    def unknown(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """The peers among these that have neither answered nor been found silent."""
        return self.pings.answers.unknown(peers, trio.current_time())

    async def answers(self, peer: PeerId, seconds: float = PING_SECONDS) -> bool:
        """Whether that peer answers a new ping within `seconds`."""
        with trio.move_on_after(seconds):
            try:
                await self._host.ping(peer, self.addresses(peer))
            except PeerFault as fault:
                log.debug("no answer from %s: %s", peer, fault)
                return False
            return True
        return False

    async def measure(
        self,
        peers: Collection[PeerId],
        seconds: float = PING_SECONDS,
        enough: Callable[[Mapping[PeerId, float]], bool] | None = None,
    ) -> dict[PeerId, float]:
        """The round-trip times of the answering peers among these: see `Asker.measure`."""
        return await self.pings.measure(peers, seconds, enough)

    # --- tasks ------------------------------------------------------------------------------------

    async def run(self, nursery: trio.Nursery, config: DirectoryConfig) -> None:
        """Join the swarm, then start the tasks that keep the view true.  Raises ConfigError."""
        self._host.handle(PROTOCOL, self._neighbours.serve, max_frame_bytes=FRAME_BYTES)
        await self._neighbours.join(
            nursery, required=config.required, patience_seconds=config.patience_seconds
        )
        for task in (
            self._neighbours.heal,
            self._live.expire_on_time,
            self._announcer.repeat,
            self._announcer.follow_addresses,
            self._announcer.measure_adjacent,
        ):
            nursery.start_soon(task)
        nursery.start_soon(self._neighbours.keep, nursery)
        bootstrap = bootstrap_peers(config.bootstrap)
        nursery.start_soon(visit_strangers, self._neighbours, bootstrap, self._rng)
        if config.watches:  # after the first view, so that silent servers are known when a chain is chosen
            watched = partial(worth_watching, self.peer_id, self._live.view)
            monitored = partial(worth_monitoring, self.peer_id, self._live.view)
            nursery.start_soon(self.pings.watch, watched, self._rng, monitored)
        nursery.start_soon(self._discovery.run, lambda: self._announcer.served_revision)

    def _silent(self) -> frozenset[PeerId]:
        return self.pings.answers.silent()

    def close(self) -> None:
        """Take no more streams, and end the streams that peers opened."""
        self._neighbours.close()


@asynccontextmanager
async def open_directory(
    host: DirectoryHost,
    identity: Identity,
    config: DirectoryConfig,
    *,
    finder: Finder | None = None,
    rng: random.Random | None = None,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Directory]:
    """Take part in a swarm until the end of the block.

    When the block begins, one bootstrap peer has sent its whole view.
    finder: instead of a Kademlia table of our own.  Raises ConfigError.
    """
    bootstrap_peers(config.bootstrap)
    for address in host.addresses:
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigError(f"no peer could dial an address that we announce: {error}") from None
    async with AsyncExitStack() as stack:
        rng = rng or random.Random()
        if finder is None and config.kademlia:
            ways_in = bootstrap_peers(config.bootstrap)
            knowledge = Knowledge(
                config.swarm,
                ways_in,
                addresses=lambda peer: directory.addresses(peer),
                own=lambda: directory._announcer.addresses,
                is_dialled=lambda: directory._announcer.is_dialled,
            )
            serves = config.role != "client"
            table = open_kademlia(host, knowledge, config.limits, rng, serves=serves)
            finder = await stack.enter_async_context(table)
        nursery = await stack.enter_async_context(background_nursery())
        directory = Directory(host, identity, config, nursery, finder, rng, wall_clock)
        stack.callback(directory.close)
        await directory.run(nursery, config)
        yield directory
