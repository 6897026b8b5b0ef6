"""This node's own record: signed, announced periodically, and kept true when the machine changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import trio

from node.network.directory.live_view import LiveView
from node.network.directory.neighbours import Neighbours
from node.network.directory.pings import Asker
from node.network.reachability.own_reach import OwnReach
from routing.names import PeerId
from routing.view.answers import FRESH_SECONDS
from routing.view.records import MAX_RTTS, Record, fit_record, sign_record
from routing.view.view import Arrival, likely_adjacent
from tensor_codec.limits import Limits

if TYPE_CHECKING:
    from node.network.transport.identity import Identity

LEAVE_SECONDS = 2.0
ADDRESSES_SECONDS = 30.0  # between looks at our own addresses; the loss of a neighbour brings one sooner
ADDRESSES_PAUSE_SECONDS = 1.0  # the least time between two looks
OVERTAKEN_SECONDS = 1.0  # two processes with one identity do not chase each other faster than this
ADJACENT_PAUSE_SECONDS = 1.0  # between looks at servers that may be next to this one in a chain
RTT_SAID_SECONDS = 600.0  # an older measurement is better than none in a record
RTT_TRUE_ENOUGH = 1.5  # factor, up or down
RTT_NOISE_SECONDS = 0.005

log = logging.getLogger(__name__)


class AnnouncerHost(Protocol):
    """The part of `node.network.host.Host` that a record needs."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs at which this node can be dialled, without /p2p, as last read."""

    def read_addresses(self) -> bool:
        """Read the machine's interfaces again; whether the addresses have changed."""


class Announcer:
    """Signs and repeats the record of this node until `leave`.

    announced: the record as the node gave it; None before the first and after `leave`.
    relayed_bytes: carried for others so far.
    """

    def __init__(
        self,
        host: AnnouncerHost,
        identity: Identity,
        limits: Limits,
        live: LiveView,
        neighbours: Neighbours,
        asker: Asker,
        wall_clock: Callable[[], float],
    ) -> None:
        self.announced: Record | None = None
        self.relayed_bytes: Callable[[], int] = lambda: 0
        self._host = host
        self._identity = identity
        self._limits = limits
        self._live = live
        self._neighbours = neighbours
        self._asker = asker
        self._wall_clock = wall_clock
        self._reach: OwnReach | None = None  # not asked
        self._seq = 0
        self._overtaken_at = -OVERTAKEN_SECONDS

    @property
    def served_revision(self) -> str | None:
        """The model revision that this node serves."""
        announced = self.announced
        return announced.revision if announced is not None and announced.role == "serve" else None

    @property
    def is_dialled(self) -> bool:
        """Whether others dial this node at its addresses, as far as is known."""
        return self._reach is None or self._reach.reach in ("public", "unknown")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those that are announced: the verified ones, where they are known."""
        return self._host.addresses if self._reach is None else self._reach.addresses

    async def announce(self, record: Record) -> None:
        """Announce this record: now, and again every `announce_seconds` until `leave`.

        Filled in here: peer, addresses, swarm, seq, ttl_seconds, and the round-trip times measured.
        Returns when it is on its way.  Raises ValueError for a record that no peer would accept.
        """
        await trio.lowlevel.checkpoint()
        self._publish(record)
        self.announced = record

    def set_reach(self, reach: OwnReach) -> None:
        """How others reach this node, as far as is known; announced at once where the node is announced."""
        self._reach = reach
        if self.announced is not None:
            self._publish(self.announced)

    async def leave(self) -> None:
        """Announce that this node is gone, and wait until the neighbours have it: at most 2 s."""
        await trio.lowlevel.checkpoint()
        if self.announced is None:
            return
        announced, self.announced = self.announced, None
        self._publish(replace(announced, state="offline"))
        with trio.move_on_after(LEAVE_SECONDS):
            await self._neighbours.flushed()

    def _publish(self, record: Record) -> None:
        # The wall clock only makes seq rise over restarts: nobody compares clocks.
        self._seq = max(self._seq + 1, int(self._wall_clock() * 1e6))
        record = replace(
            record,
            peer=self._host.peer_id,
            addresses=tuple(self._host.addresses),
            swarm=self._live.swarm,
            rtt={**self._rtts_to_servers(), **record.rtt},
            seq=self._seq,
            ttl_seconds=self._limits.record_ttl_seconds,
        )
        if (reach := self._reach) is not None and reach.helps:
            record = replace(record, relayed_bytes=self.relayed_bytes())
        record = fit_record(_with_reach(record, reach), self._limits)
        wire = sign_record(record, self._identity.private_key)
        self._neighbours.pass_on(self._live.merge([Arrival(record, wire)]), None)

    def _rtts_to_servers(self) -> dict[PeerId, float]:
        known, view = self._asker.answers.rtts(trio.current_time(), RTT_SAID_SECONDS), self._live.view()
        records = {peer: view.get(peer) for peer in known}
        return {peer: known[peer] for peer, record in records.items() if record and record.role == "serve"}

    def overtaken(self, record: Record) -> None:
        """A peer has a record of ours with a higher seq: our clock went back, or our key is used twice.

        The next record goes past it.
        """
        if record.seq <= self._seq:
            return
        self._seq = record.seq
        now = trio.current_time()
        if self.announced is not None and now >= self._overtaken_at + OVERTAKEN_SECONDS:
            self._overtaken_at = now
            log.warning("others know a newer record of us: our clock went back, or our key is used twice")
            self._publish(self.announced)

    async def repeat(self) -> None:
        """Repeat the announced record before its TTL passes."""
        while True:
            await trio.sleep(self._limits.announce_seconds)
            if self.announced is not None:
                self._publish(self.announced)

    async def follow_addresses(self) -> None:
        """Look at the machine's addresses periodically, and announce changed addresses."""
        while True:
            with trio.move_on_after(ADDRESSES_SECONDS):
                await self._neighbours.one_is_lost()
            if self._host.read_addresses():
                log.info("our addresses are now %s", ", ".join(self._host.addresses) or "none")
                self._neighbours.retries.clear()
                if self.announced is not None:
                    self._publish(self.announced)
            await trio.sleep(ADDRESSES_PAUSE_SECONDS)

    async def measure_adjacent(self) -> None:
        """Measure and announce the distance to peers that may come before or after us in a chain."""
        while True:
            view, announced = self._live.view(), self.announced
            if (
                announced is not None
                and announced.role == "serve"
                and (own := view.get(self._host.peer_id)) is not None
            ):
                adjacent = [record.peer for record in likely_adjacent(view, own, MAX_RTTS)]
                measured = await self._asker.measure(adjacent)
                if self.announced is not None and _is_news(measured, own.rtt):
                    self._publish(self.announced)
            await trio.sleep(ADJACENT_PAUSE_SECONDS)
            with trio.move_on_after(FRESH_SECONDS):
                await self._live.changed(view)


def _with_reach(record: Record, reach: OwnReach | None) -> Record:
    """The record with what is known of the node's reach.

    A server that nobody can dial says that it is still joining: clients of older versions leave it alone.
    """
    if reach is None:
        return record
    away = record.state == "online" and record.role == "serve" and not reach.is_there
    return replace(
        record,
        state="joining" if away else record.state,
        addresses=reach.addresses,
        reach=reach.reach,
        relays=reach.relays,
        through=reach.through,
        lan=reach.lan,
        seen=reach.seen,
        helps=reach.helps,
        relay_mbit=reach.relay_mbit,
        unreached=reach.unreached,
    )


def _is_news(measured: Mapping[PeerId, float], said: Mapping[PeerId, float]) -> bool:
    """Whether the announced distances differ from the measured ones by a large factor.

    Distances that were measured at a busy start are several times too long.
    """
    if measured.keys() - said.keys():
        return True
    lower, higher = 1 / RTT_TRUE_ENOUGH, RTT_TRUE_ENOUGH
    return any(
        not lower <= seconds / max(said[peer], 1e-6) <= higher
        and abs(seconds - said[peer]) > RTT_NOISE_SECONDS
        for peer, seconds in measured.items()
    )
