"""Keeps the reservations of a node behind NAT: acts on what `ReservationPlan` decides."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from node.network.relaying.circuits import reason_of
from node.network.relaying.messages import (
    HOP_PROTOCOL,
    Status,
    decode_hop_answer,
    encode_reserve,
    read_delimited,
)
from node.network.relaying.observed import ask_observed
from node.network.relaying.own_reservations import Candidate, ReservationPlan
from node.network.transport.connection import Connection
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, SlowPeer
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks: a lost relay is replaced within five


@dataclass(slots=True)
class Keeper:
    """The reservations of one node.

    connect: makes sure of a direct connection, from the port that this node listens on.  Raises PeerFault.
    chosen: relays that the operator has named; they are asked whether or not relays are wanted.
    candidates: the peers that relay, as far as known.
    wanted: whether this node needs relays now.
    is_from_own_port: whether a connection leaves from the port that this node listens on: what a relay sees
        of another one says nothing of that port.
    on_change: called with the relays to be announced, when they have changed.
    """

    limits: Limits
    connect: Callable[[PeerId, Sequence[str]], Awaitable[Connection]]
    chosen: Sequence[Candidate] = ()
    candidates: Callable[[], Sequence[Candidate]] = tuple
    wanted: Callable[[], bool] = lambda: False
    on_change: Callable[[tuple[PeerId, ...]], None] = lambda _: None
    is_from_own_port: Callable[[Connection], bool] = lambda _: True
    wall_clock: Callable[[], float] = time.time
    plan: ReservationPlan = field(default_factory=ReservationPlan)
    _over: dict[PeerId, Connection] = field(default_factory=dict)
    _told: tuple[PeerId, ...] = ()
    _news: trio.Event = field(default_factory=trio.Event)

    def is_reserved_at(self, peer: PeerId) -> bool:
        """Whether this peer relays to us, or is about to."""
        return peer in self.plan.held or peer in self._over

    async def run(self) -> None:
        """Look every second, and when it is told to, until cancelled."""
        while True:
            await self.look()
            with trio.move_on_after(LOOK_SECONDS):
                await self._news.wait()
            self._news = trio.Event()

    def look_soon(self) -> None:
        """What is wanted has changed, or who relays: look now."""
        self._news.set()

    async def look(self) -> None:
        """Ask for what is due, all at once."""
        for peer, connection in list(self._over.items()):
            if connection.closed.is_set():
                self._forget(peer)
        wanted = self.wanted()
        candidates = [*(self.candidates() if wanted else ()), *self.chosen]
        if not wanted:
            chosen = {each.peer for each in self.chosen}
            for peer in [each for each in self.plan.relays if each not in chosen]:
                self._forget(peer)
        async with trio.open_nursery() as nursery:
            for candidate in self.plan.due(candidates, trio.current_time()):
                nursery.start_soon(self._reserve, candidate)
        if self.plan.relays != self._told:
            self._told = self.plan.relays
            self.on_change(self._told)

    def _forget(self, peer: PeerId) -> None:
        self._over.pop(peer, None)
        self.plan.lost(peer)

    async def _reserve(self, candidate: Candidate) -> None:
        peer = candidate.peer
        try:
            with trio.move_on_after(self.limits.circuit_open_seconds + self.limits.dial_seconds) as scope:
                connection = await self.connect(peer, candidate.addresses)
                self._over[peer] = connection
                seconds = await self._ask(connection)
                seen_at = None
                if self.is_from_own_port(connection):
                    seen_at = await ask_observed(connection, self.limits.negotiation_seconds)
                self.plan.granted(candidate, seconds, trio.current_time(), seen_at)
            if scope.cancelled_caught:
                raise SlowPeer("no answer to the question for a reservation")
        except PeerFault as fault:
            logger.debug("no reservation at %s: %s", peer, fault)
            self.plan.refused(peer, trio.current_time())
            if peer not in self.plan.held:
                self._over.pop(peer, None)

    async def _ask(self, connection: Connection) -> float:
        """The seconds that a relay grants.  Raises PeerGone where it refuses."""
        stream = connection.open()
        try:
            stream.propose(HOP_PROTOCOL)
            await stream.send_all(encode_reserve())
            most = self.limits.max_relay_message_bytes
            answer = decode_hop_answer(await read_delimited(stream.receive_some, most))
        finally:
            await stream.aclose()
        if answer.status != Status.OK:
            raise PeerGone(f"relay {connection.peer} refuses: {reason_of(answer.status)}")
        limits = self.limits
        if answer.is_limited:
            logger.debug("relay %s ends circuits after a while: they serve for a direct way", connection.peer)
        if answer.expires_at is None:
            return limits.reservation_seconds
        # a relay whose clock is wrong is asked again now and then, not at once and not never
        seconds = answer.expires_at - self.wall_clock()
        return min(max(seconds, limits.circuit_idle_seconds), 2 * limits.reservation_seconds)
