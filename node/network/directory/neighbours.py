"""The streams of record exchange: the choice of peers, and the exchange itself.

A node keeps a few streams of its own, bootstrap peers first, and takes streams that peers open.  On a new
stream both sides send a digest and then the records that the other side lacks.  After that, a node sends
each new record to all its neighbours at once.  Every few seconds a digest goes to one neighbour at random,
which repairs losses (anti-entropy, as in Demers et al., 1987).  Neighbours are drawn by network, so that many
ids in one network are few neighbours.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from node.config import ConfigError
from node.network.dialling.backoff import DialPaused
from node.network.directory.intake import ChargingHost, Intake
from node.network.directory.live_view import LiveView
from node.network.directory.met import Met
from node.network.directory.neighbour import Neighbour, Retries
from routing.names import PeerId
from routing.view.exchange import Digest, Records, decode
from routing.view.networks import draw
from routing.view.records import Record
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, RemoteProtocolError
from tensor_codec.limits import Limits

if TYPE_CHECKING:
    from node.network.streams import FramedStream

PROTOCOL = "/raceme/records/1"

NEIGHBOURS = 3  # streams that we open; peers open about as many to us
BOOTSTRAP_NEIGHBOURS = 2  # of these, to bootstrap peers that can be reached
KEEP_SECONDS = 1.0  # between looks at whether a neighbour is missing
HEAL_SECONDS = 5.0  # a digest to a random neighbour
JOIN_PAUSE_SECONDS = 0.25  # between two dials to one bootstrap peer, which may still be starting
JOIN_SECONDS = 3.0  # beyond the dialling, until a bootstrap peer has answered
CLOSE_SECONDS = 0.5
FLUSH_SECONDS = 1.0
DIGEST_ENTRY_COST = 0.01  # of a record's
DIALS_AT_ONCE = 8  # of peers that a Kademlia table has named; `Host` holds the same bound

log = logging.getLogger(__name__)


class ExchangeHost(ChargingHost, Protocol):
    """The part of `node.network.host.Host` that an exchange of records needs."""

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> FramedStream:
        """A new stream; seconds: for the connection.  Raises PeerFault."""

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""


class Neighbours:
    """The peers with which records are exchanged, and the tasks that keep the exchange going.

    view: takes records in and gives answers.
    own_record: called with a peer's record of us that we did not announce, and that peer.
    met: the peers that this node has been connected to.
    """

    def __init__(
        self,
        host: ExchangeHost,
        view: LiveView,
        *,
        bootstrap: Mapping[PeerId, tuple[str, ...]],
        limits: Limits,
        own_record: Callable[[Record, PeerId], None],
        rng: random.Random,
    ) -> None:
        self._host = host
        self._view = view
        self._bootstrap = bootstrap
        self._limits = limits
        self._rng = rng
        self._open = True
        self._neighbours: list[Neighbour] = []
        self.retries = Retries(rng)
        self._lost = trio.Event()
        self._dialling: set[PeerId] = set()
        self._turned_away: set[PeerId] = set()  # members of another swarm
        self.met = Met()
        self.met.add([host.peer_id])
        self._intake = Intake(
            host, view, limits, trusted=bootstrap, met=self.met, own_record=own_record, rng=rng
        )

    @property
    def peers(self) -> frozenset[PeerId]:
        """The peers with which records are exchanged now."""
        return frozenset(neighbour.peer for neighbour in self._neighbours)

    def is_vouched(self, peer: PeerId) -> bool:
        """Whether that peer was met, or its record is passed on."""
        return peer in self.met or peer not in self._intake.withheld

    def pass_on(self, peers: Iterable[PeerId], source: PeerId | None) -> None:
        """Send the records of these peers to all neighbours except their source."""
        changed = list(peers)
        for neighbour in {neighbour.peer: neighbour for neighbour in self._neighbours}.values():
            if neighbour.peer != source:
                neighbour.owe(peer for peer in changed if peer != neighbour.peer)

    async def flushed(self) -> None:
        """Wait until nothing is owed to any neighbour."""
        for neighbour in list(self._neighbours):
            await neighbour.flushed()

    async def one_is_lost(self) -> None:
        """Return when a stream has ended since the last call."""
        await self._lost.wait()
        self._lost = trio.Event()

    async def ask_once(self, peer: PeerId, addresses: Sequence[str] = ()) -> bool:
        """Exchange records with a peer until we have its view, and it has ours; whether it answered.

        addresses: by default those of its record, or of our configuration.
        """
        answered, addresses = trio.Event(), addresses or self._dial_addresses(peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._converse, peer, addresses, answered)
            await answered.wait()
            there = [each for each in self._neighbours if each.greeted is answered]
            with trio.move_on_after(FLUSH_SECONDS):
                for neighbour in there:
                    await neighbour.flushed()
            nursery.cancel_scope.cancel()
        return bool(there)

    async def serve(self, stream: FramedStream) -> None:
        """Exchange records on a stream that a peer opened.  Raises PeerFault, for the host to count."""
        if not self._open:
            return
        for older in [n for n in self._neighbours if n.peer == stream.peer and not n.ours]:
            older.scope.cancel()  # the peer opened a new stream, so the old one is dead
        await self._exchange(Neighbour(stream, ours=False))

    async def _converse(
        self, peer: PeerId, addresses: Sequence[str], answered: trio.Event | None = None
    ) -> str:
        """Dial a peer and exchange records until the exchange ends.  Returns the reason of the end.

        answered: set when the peer has sent its whole view, or never will.
        The one place that catches faults of a peer that we dialled.
        """
        answered = trio.Event() if answered is None else answered
        self._dialling.add(peer)
        try:
            stream = await self._host.open_stream(
                peer, addresses, PROTOCOL, seconds=self._limits.dial_seconds
            )
        except PeerFault as fault:
            if not isinstance(fault, DialPaused):
                self.retries.failed(peer)
            if isinstance(fault, NotAMember):
                self._turned_away.add(peer)
            answered.set()
            return str(fault)
        finally:
            self._dialling.discard(peer)
        neighbour = Neighbour(stream, ours=True)
        neighbour.greeted = answered
        neighbour.say_digest(ask=True)
        why = "it ended the exchange"
        try:
            await self._exchange(neighbour)
        except PeerFault as fault:
            why = str(fault)
            if not isinstance(fault, PeerGone):
                # a peer that has just started does not speak our protocol yet
                self._host.charge(peer, fault, bans=not isinstance(fault, RemoteProtocolError))
            await stream.reset()
        finally:
            self.retries.failed(peer)
            answered.set()
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await stream.aclose()
        return why

    async def _exchange(self, neighbour: Neighbour) -> None:
        """Send and receive until either side ends it.  Raises PeerFault."""
        faults: list[PeerFault] = []

        async def run(job: Callable[[], Awaitable[None]]) -> None:
            try:
                await job()
            except PeerFault as fault:
                faults.append(fault)
            nursery.cancel_scope.cancel()

        self.met.add([neighbour.peer])
        self._neighbours.append(neighbour)
        try:
            with neighbour.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        run, partial(neighbour.send_forever, self._view.view, self._host.peer_id)
                    )
                    nursery.start_soon(run, partial(self._receive_forever, neighbour))
        finally:
            self._neighbours.remove(neighbour)
            self._lost.set()
        if faults:
            raise faults[0]

    async def _receive_forever(self, neighbour: Neighbour) -> None:
        """Take in the other side's frames until it ends its stream.  Raises PeerFault."""
        budget = self._intake.budget_of(neighbour)
        while (frame := await neighbour.next_frame(self._limits)) is not None:
            match decode(frame):
                case Records(items):
                    self.pass_on(await self._intake.take(neighbour, items), neighbour.peer)
                case Digest() as part:
                    cost = len(part.seqs) * DIGEST_ENTRY_COST
                    await trio.sleep(budget.records_due(cost, trio.current_time()))
                    await trio.sleep(budget.asks.take(part.last, trio.current_time()))
                    self._receive_digest(neighbour, part)

    def _receive_digest(self, neighbour: Neighbour, part: Digest) -> None:
        theirs = neighbour.hear_digest(part, 2 * self._limits.max_records)
        if theirs is None:
            return
        view, now = self._view.view(), trio.current_time()
        for arrival in view.missing(theirs, now, neighbour.peer, self._intake.withheld):
            if arrival.record.peer in view.entries:
                neighbour.owe([arrival.record.peer])
            else:
                neighbour.prove(arrival)
        if part.ask:
            neighbour.say_digest(ask=False)
        else:
            neighbour.greeted.set()
            self.retries.forget(neighbour.peer)

    async def join(self, nursery: trio.Nursery, *, required: bool, patience_seconds: float) -> None:
        """Dial the bootstrap peers; return when one has sent its whole view.

        patience_seconds: for this time, dial again peers that do not answer: they may be starting too.
        Raises ConfigError where none can be reached and `required`.
        """
        reached: list[PeerId] = []
        why: dict[PeerId, str] = {}
        peers = {peer: addresses for peer, addresses in self._bootstrap.items() if peer != self._host.peer_id}
        seconds = self._limits.dial_seconds + JOIN_SECONDS

        async def converse(peer: PeerId, answered: trio.Event) -> None:
            why[peer] = await self._converse(peer, peers[peer], answered)

        async def enter(peer: PeerId) -> None:
            while True:
                answered = trio.Event()
                nursery.start_soon(converse, peer, answered)
                await answered.wait()
                if peer in self.peers:
                    reached.append(peer)
                    entering.cancel_scope.cancel()  # one is enough to begin with
                if trio.current_time() >= patient_until or peer in self._turned_away:
                    return
                await trio.sleep(JOIN_PAUSE_SECONDS)

        patient_until = trio.current_time() + patience_seconds
        with trio.move_on_after(seconds + patience_seconds):
            async with trio.open_nursery() as entering:
                for peer in peers:
                    entering.start_soon(enter, peer)
        if peers and required and not reached:
            reasons = [_what_happened(peer, peers[peer], why.get(peer), seconds) for peer in peers]
            raise ConfigError(f"none of {len(peers)} peers could be reached: " + "; ".join(reasons))

    async def keep(self, nursery: trio.Nursery) -> None:
        """Keep up the number of neighbours, and pass on the new peers whose turn it is."""
        while True:
            self.met.add([*self._host.connected(), self._host.peer_id])
            self.pass_on(self._intake.release(), None)
            for peer in self._to_dial():
                self._dialling.add(peer)
                nursery.start_soon(self._converse, peer, self._dial_addresses(peer))
            await trio.sleep(KEEP_SECONDS * self._rng.uniform(0.5, 1.0))

    def _to_dial(self) -> list[PeerId]:
        linked = self.peers | self._dialling | {self._host.peer_id}
        ways_in_missing = BOOTSTRAP_NEIGHBOURS - len(linked & self._bootstrap.keys())
        missing = NEIGHBOURS - len(self._dialling) - sum(neighbour.ours for neighbour in self._neighbours)
        if missing <= 0 and (ways_in_missing <= 0 or self._bootstrap.keys() <= linked):
            return []
        ways_in = sorted(peer for peer in self._bootstrap.keys() - linked if self.retries.may_dial(peer))
        chosen = self._rng.sample(ways_in, max(0, min(ways_in_missing, len(ways_in))))
        return chosen + self.draw(linked.union(chosen), max(0, missing - len(chosen)))

    def strangers(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """Those among these peers that are no neighbours, nor about to be, and may be."""
        linked = self.peers | self._dialling | self._turned_away | {self._host.peer_id}
        return [peer for peer in peers if peer not in linked]

    def draw(self, but_for: Container[PeerId], most: int) -> list[PeerId]:
        """Servers that may be dialled, by chance: a network first, then a server in it."""
        view = self._view.view()
        servers = {r.peer: r.addresses for r in view.records() if r.role != "client" and r.addresses}
        if not self.peers and not self._dialling and not servers.keys() - {self._host.peer_id}:
            once = (entry.record for entry in view.ended.values())
            servers = {record.peer: record.addresses for record in once if record.addresses}
        others = {p: at for p, at in servers.items() if p not in but_for and self.retries.may_dial(p)}
        return draw(others, most, self._rng)

    def _dial_addresses(self, peer: PeerId) -> tuple[str, ...]:
        ended = self._view.view().ended.get(peer)
        return self._view.addresses(peer) or (ended.record.addresses if ended else ())

    async def heal(self) -> None:
        """Compare views with one random neighbour after another."""
        while True:
            await trio.sleep(HEAL_SECONDS * self._rng.uniform(0.8, 1.2))
            if self._neighbours:
                self._rng.choice(self._neighbours).say_digest(ask=True)

    def close(self) -> None:
        """Take no more streams, and end the streams that peers opened."""
        self._open = False
        for neighbour in self._neighbours:
            neighbour.scope.cancel()


def _what_happened(peer: PeerId, addresses: Sequence[str], why: str | None, seconds: float) -> str:
    if why is None:
        why = f"no answer within {seconds:g} s"
    why = why.removeprefix(f"{peer} cannot be reached: ").removeprefix(f"{addresses[0]}: ")
    return f"{addresses[0]}/p2p/{peer}: {why}"
