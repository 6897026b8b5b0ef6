"""Knows the swarm: holds the view, and exchanges records with a few neighbours to keep it true.

Each node keeps long-lived `/raceme/records/1` streams to a few peers, bootstrap peers first.  When
one opens, both sides say what they know (a digest) and send what the other lacks; from then on each
record that is news to a node goes on to all its neighbours at once.  Every few seconds a digest goes
to one neighbour at random, which heals whatever was lost.  What a record means and when it ends is
decided in `routing.view.view`; here are only the streams, the clock and the tasks.

The Kademlia table (`node.network.directory.kademlia`) runs beside this and never before it: it finds peers of
a model of which no neighbour knows.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from node.config import ConfigError
from node.network.addresses import bootstrap_peers
from node.network.directory.neighbour import Neighbour, Retry, TokenBucket
from node.network.directory.pings import PING_SECONDS, Asker
from node.runtime.nurseries import background_nursery
from routing.chains.load_sharing import rendezvous
from routing.names import PeerId, peer_id_of
from routing.view.answers import FRESH_SECONDS
from routing.view.exchange import Digest, Records, decode
from routing.view.records import (
    MAX_RTTS,
    NOBODY,
    Record,
    RecordError,
    Role,
    check_address,
    fit_record,
    sign_record,
    signer,
    verify_record,
)
from routing.view.view import Arrival, SwarmView, expire, likely_adjacent, merge
from tensor_codec.errors import NotAMember, PeerFault, PeerGone
from tensor_codec.limits import Limits

if TYPE_CHECKING:
    from node.network.host import Host
    from node.network.streams import FramedStream
    from node.network.transport.identity import Identity

PROTOCOL = "/raceme/records/1"

NEIGHBOURS = 3  # streams that we open; about as many again are opened to us
BOOTSTRAP_NEIGHBOURS = 2  # of these to bootstrap peers, where they can be reached
KEEP_SECONDS = 1.0  # between looks at whether a neighbour is missing
HEAL_SECONDS = 5.0  # a digest to a random neighbour
JOIN_PAUSE_SECONDS = 0.25  # between two dials to one, for whoever is patient
JOIN_SECONDS = 3.0  # beyond the dialling, until a bootstrap peer has answered
FIND_SECONDS = 5.0
DISCOVER_SECONDS = 60.0  # between looks into the Kademlia table
LEAVE_SECONDS = 2.0
CLOSE_SECONDS = 0.5
EXPIRY_SECONDS = 1.0  # a record that ended is noticed so much later, at the latest
FAULTS_BEFORE_DROP = 3
DIGEST_ENTRY_COST = 0.01  # of a record's
ASKS_PER_SECOND, ASKS_BURST = 1.0, 5.0  # the answer to a digest can be a whole view
RETRIES_KEPT = 1024  # peers that could not be reached
BUDGETS_KEPT = 1024  # peers whose budgets are remembered
ADDRESSES_SECONDS = 30.0  # between looks at our own addresses, and sooner where neighbours are lost
ADDRESSES_PAUSE_SECONDS = 1.0  # the least time between two
OVERTAKEN_SECONDS = 1.0  # two processes with one identity do not chase each other faster than this
WATCHED = 16  # servers that a client asks again and again, besides those that it wants to use
RTT_SAID_SECONDS = 600.0  # an older measurement is better than none in a record
RTT_TRUE_ENOUGH = 1.5  # times longer or shorter
RTT_NOISE_SECONDS = 0.005
DIALS_AT_ONCE = 8  # by the directory; `Host` holds the same bound for all

log = logging.getLogger(__name__)


class Finder(Protocol):
    """What the directory wants of a Kademlia table.  Neither method raises for the network's sake."""

    async def provide(self, revision: str) -> None:
        """Write into the table that we serve this model revision."""

    async def find(self, revision: str) -> Mapping[PeerId, tuple[str, ...]]:
        """Who is written there, with the addresses where they listen."""


class Directory:
    """The swarm as this node knows it, and this node as the swarm knows it.  See `open_directory`."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        *,
        swarm: str,
        limits: Limits,
        nursery: trio.Nursery,
        bootstrap: Mapping[PeerId, tuple[str, ...]],
        finder: Finder | None,
        marks_silent: bool,
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self.peer_id = host.peer_id
        self._host = host
        self._identity = identity
        self._swarm = swarm
        self._limits = limits
        self._bootstrap = bootstrap
        self._finder = finder
        self._rng = rng
        self._wall_clock = wall_clock
        self._open = True
        self._view = self._shown = SwarmView(swarm, limits.max_records)
        self._marks_silent = marks_silent
        self._news = trio.Event()
        self._neighbours: list[Neighbour] = []
        self._neighbour_lost = trio.Event()
        self._dialling: set[PeerId] = set()
        self._turned_away: set[PeerId] = set()  # members of another swarm than ours
        self._retries: dict[PeerId, Retry] = {}
        self._budgets: OrderedDict[PeerId, tuple[TokenBucket, TokenBucket]] = OrderedDict()
        self._said: Record | None = None  # what is repeated until we leave
        self._seq = 0
        self._overtaken_at = -OVERTAKEN_SECONDS
        self._asker = Asker(
            host,
            nursery,
            addresses=self.addresses,
            changed=self._mark_silent,
            dial_seconds=limits.dial_seconds,
        )

    # --- what others read -------------------------------------------------------------------------

    def view(self) -> SwarmView:
        """The swarm as known now.  A value: it does not change, ask again for a newer one.

        Of a client it says who does not answer.
        """
        self._replace_view(expire(self._view, trio.current_time()))
        return self._shown

    @property
    def last_view(self) -> SwarmView:
        """The view of the last look, some of whose records may have ended since.  For any thread."""
        return self._shown

    async def changed(self, since: SwarmView | None = None) -> None:
        """Return as soon as the view is no longer `since`, or by default no longer what it is now.

        Where nothing changes this waits for ever: the caller brings the deadline.
        """
        since = self.view() if since is None else since
        await trio.lowlevel.checkpoint()
        while self.view() is since:
            await self._news.wait()

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where to dial that peer: by its own record, else by our configuration; empty if unknown."""
        record = self.view().get(peer)
        return record.addresses if record and record.addresses else self._bootstrap.get(peer, ())

    def neighbours(self) -> frozenset[PeerId]:
        """The peers with which records are exchanged now."""
        return frozenset(neighbour.peer for neighbour in self._neighbours)

    # --- what we say of ourselves -----------------------------------------------------------------

    async def announce(self, record: Record) -> None:
        """Say this of ourselves: now, and again every `announce_seconds` until `leave`.

        Filled in here: peer, addresses, swarm, seq, ttl_seconds, and the round-trip times measured.
        Returns when it is on its way.  Raises ValueError for what no peer would accept.
        """
        await trio.lowlevel.checkpoint()
        self._say(record)
        self._said = record

    async def leave(self) -> None:
        """Say that we are gone and wait until the neighbours have been told, 2 s at the most."""
        await trio.lowlevel.checkpoint()
        if self._said is None:
            return
        said, self._said = self._said, None
        self._say(replace(said, state="offline"))
        with trio.move_on_after(LEAVE_SECONDS):
            for neighbour in list(self._neighbours):
                await neighbour.flushed()

    def _say(self, record: Record) -> None:
        # The wall clock only makes a restart higher than what came before: nobody compares it.
        self._seq = max(self._seq + 1, int(self._wall_clock() * 1e6))
        record = replace(
            record,
            peer=self.peer_id,
            addresses=tuple(self._host.addresses),
            swarm=self._swarm,
            rtt={**self._rtts_to_servers(), **record.rtt},
            seq=self._seq,
            ttl_seconds=self._limits.record_ttl_seconds,
        )
        record = fit_record(record, self._limits)
        wire = sign_record(record, self._identity.private_key)
        self._take_in([Arrival(record, wire)], source=None)

    def _rtts_to_servers(self) -> dict[PeerId, float]:
        known, view = self.rtts(RTT_SAID_SECONDS), self.view()
        records = {peer: view.get(peer) for peer in known}
        return {peer: known[peer] for peer, record in records.items() if record and record.role == "serve"}

    # --- who answers, and how far they are ---------------------------------------------------------

    def rtts(self, seconds: float = FRESH_SECONDS) -> dict[PeerId, float]:
        """The round-trip times, in seconds, of those that have answered within so many."""
        return self._asker.answers.rtts(trio.current_time(), seconds)

    def late(self) -> frozenset[PeerId]:
        """Peers that are being asked and have not answered at once: see `routing.view.answers`."""
        return self._asker.answers.late(trio.current_time())

    def unknown(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """Those of these peers that have neither answered nor been found silent."""
        return self._asker.answers.unknown(peers, trio.current_time())

    async def answers(self, peer: PeerId, seconds: float = PING_SECONDS) -> bool:
        """Whether that peer answers a ping now, within so many seconds, whatever was measured before."""
        if not (addresses := self.addresses(peer)):
            await trio.lowlevel.checkpoint()
            return False
        with trio.move_on_after(seconds):
            try:
                await self._host.ping(peer, addresses)
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
        """The round-trip times of those of these peers that answer: see `Asker.measure`."""
        return await self._asker.measure(peers, seconds, enough)

    async def watch_servers(self) -> None:
        """Know of the servers that matter to us whether they are there, before their records end."""
        await self._asker.watch(self._worth_watching, self._rng)

    def _worth_watching(self, wanted: Collection[PeerId]) -> list[PeerId]:
        """Those that somebody asked for, and a few more; others for each who looks, where there are many."""
        servers = [r.peer for r in self.view().records() if r.role == "serve" and r.addresses]
        more = WATCHED - sum(peer in wanted for peer in servers)
        others = [peer for peer in servers if peer not in wanted and peer != self.peer_id]
        return [peer for peer in servers if peer in wanted] + rendezvous(self.peer_id, others, max(0, more))

    # --- finding peers ----------------------------------------------------------------------------

    async def find_peers(self, revision: str, seconds: float = FIND_SECONDS) -> tuple[Record, ...]:
        """The online servers of a model revision, after a look into the Kademlia table.

        Peers found there are asked for their view.  Without a table, or where it does not answer in
        time, what the neighbours told us is all there is.
        """
        if self._finder is not None:
            with trio.move_on_after(seconds):
                found = await self._finder.find(revision)
                view = self.view()
                unknown = [
                    p for p in found if p != self.peer_id and view.get(p) is None and self._may_dial(p)
                ]
                async with trio.open_nursery() as nursery:
                    for peer in self._rng.sample(unknown, min(DIALS_AT_ONCE, len(unknown))):
                        nursery.start_soon(self._ask_once, peer, found[peer])
        return self.view().spans(revision)

    async def _ask_once(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Exchange records with a peer until we have its view."""
        answered = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._converse, peer, addresses, answered)
            await answered.wait()
            nursery.cancel_scope.cancel()

    # --- streams ----------------------------------------------------------------------------------

    async def serve(self, stream: FramedStream) -> None:
        """Exchange records on a stream that a peer opened.  Raises PeerFault, for the host to count."""
        if not self._open:
            return
        for older in [n for n in self._neighbours if n.peer == stream.peer and not n.ours]:
            older.scope.cancel()  # the peer came again, so the old one leads nowhere
        await self._exchange(Neighbour(stream, ours=False))

    async def _converse(
        self, peer: PeerId, addresses: Sequence[str], answered: trio.Event | None = None
    ) -> str:
        """Dial a peer and exchange records for as long as it goes.  Returns why it ended.

        answered: set when the peer has sent us all that it knew, or when that will not happen.
        The one place that catches a fault of a peer that we dialled.
        """
        answered = trio.Event() if answered is None else answered
        self._dialling.add(peer)
        try:
            stream = await self._host.open_stream(
                peer, addresses, PROTOCOL, seconds=self._limits.dial_seconds
            )
        except PeerFault as fault:
            self._dial_later(peer)
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
                self._host.charge(peer, fault)
            await stream.reset()
        finally:
            self._dial_later(peer)
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

        self._neighbours.append(neighbour)
        try:
            with neighbour.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run, partial(neighbour.send_forever, self.view))
                    nursery.start_soon(run, partial(self._receive_forever, neighbour))
        finally:
            self._neighbours.remove(neighbour)
            self._neighbour_lost.set()
        if faults:
            raise faults[0]

    async def _receive_forever(self, neighbour: Neighbour) -> None:
        """Take in whatever the other side says until it ends its stream.  Raises PeerFault.

        A peer that says more than its budget allows is read more slowly: its own stream fills up.
        """
        records, asks = self._budget(neighbour.peer)
        while (frame := await neighbour.stream.receive()) is not None:
            match decode(frame):
                case Records(items):
                    await trio.sleep(records.take(len(items), trio.current_time()))
                    self._receive_records(neighbour, items)
                case Digest() as part:
                    await trio.sleep(records.take(len(part.seqs) * DIGEST_ENTRY_COST, trio.current_time()))
                    await trio.sleep(asks.take(part.last, trio.current_time()))
                    self._receive_digest(neighbour, part)

    def _budget(self, peer: PeerId) -> tuple[TokenBucket, TokenBucket]:
        """What that peer may still send; remembered for a while, so that a new stream is no new budget."""
        if peer not in self._budgets:
            now, limits = trio.current_time(), self._limits
            records = TokenBucket.full(limits.records_per_peer_per_second, limits.records_per_peer_burst, now)
            self._budgets[peer] = records, TokenBucket.full(ASKS_PER_SECOND, ASKS_BURST, now)
        self._budgets.move_to_end(peer)
        while len(self._budgets) > BUDGETS_KEPT:
            self._budgets.popitem(last=False)
        return self._budgets[peer]

    def _receive_digest(self, neighbour: Neighbour, part: Digest) -> None:
        theirs = neighbour.hear_digest(part, 2 * self._limits.max_records)
        if theirs is None:
            return
        view, now = self.view(), trio.current_time()
        for arrival in view.missing(theirs, now, asker=neighbour.peer):
            if arrival.record.peer in view.entries:
                neighbour.owe([arrival.record.peer])
            else:
                neighbour.prove(arrival)
        if part.ask:
            neighbour.say_digest(ask=False)
        else:
            neighbour.greeted.set()
            self._retries.pop(neighbour.peer, None)

    def _receive_records(self, neighbour: Neighbour, items: Sequence[tuple[bytes, float]]) -> None:
        """Verify and take in; a few bad records are only counted.  Raises RecordError after those."""
        view, arrivals = self.view(), []
        for wire, age in items:
            known = view.entries.get(_claimed_peer(wire))
            if known is not None and known.wire == wire:
                continue  # from several neighbours we hear the same: that costs no signature
            try:
                record = verify_record(wire, swarm=self._swarm, limits=self._limits)
            except RecordError as error:
                neighbour.faults += 1
                if neighbour.faults >= FAULTS_BEFORE_DROP:
                    raise
                self._host.charge(neighbour.peer, error)
                continue
            if record.peer == self.peer_id:
                self._hear_of_ourselves(record)
            elif known is not None and record.seq < known.record.seq:
                neighbour.owe([record.peer])  # they do not know the newer one
            else:
                arrivals.append(Arrival(record, wire, age))
        self._take_in(arrivals, source=neighbour.peer)

    def _hear_of_ourselves(self, record: Record) -> None:
        """Our own record with a higher seq: our clock went back, or somebody uses our key.  Go past it."""
        if record.seq <= self._seq:
            return
        self._seq = record.seq
        now = trio.current_time()
        if self._said is not None and now >= self._overtaken_at + OVERTAKEN_SECONDS:
            self._overtaken_at = now
            log.warning("others know a newer record of us: our clock went back, or our key is used twice")
            self._say(self._said)

    def _take_in(self, arrivals: Sequence[Arrival], source: PeerId | None) -> None:
        """Merge, and pass on what was news to everybody but who told us."""
        view, changed = merge(self._view, arrivals, trio.current_time())
        self._replace_view(view)
        for neighbour in {neighbour.peer: neighbour for neighbour in self._neighbours}.values():
            if neighbour.peer != source:
                neighbour.owe(peer for peer in changed if peer != neighbour.peer)

    def _replace_view(self, view: SwarmView) -> None:
        if view is not self._view:
            self._view = view
            self._show()

    def _mark_silent(self) -> None:
        """Somebody has fallen silent, or answers again."""
        if self._marks_silent and self._silent() != self._shown.silent:
            self._show()

    def _silent(self) -> frozenset[PeerId]:
        return self._asker.answers.silent() & self._view.entries.keys()

    def _show(self) -> None:
        silent = self._silent() if self._marks_silent else frozenset()
        self._shown = replace(self._view, silent=silent) if silent else self._view
        self._news.set()
        self._news = trio.Event()

    # --- tasks ------------------------------------------------------------------------------------

    async def join(self, nursery: trio.Nursery, *, required: bool, patience_seconds: float) -> None:
        """Dial the bootstrap peers; return when one has told us all it knows.

        patience_seconds: dial again for so long those that do not answer: they may be starting too.
        Raises ConfigError where none can be reached and `required`.
        """
        reached: list[PeerId] = []
        why: dict[PeerId, str] = {}
        peers = {peer: addresses for peer, addresses in self._bootstrap.items() if peer != self.peer_id}
        seconds = self._limits.dial_seconds + JOIN_SECONDS

        async def converse(peer: PeerId, answered: trio.Event) -> None:
            why[peer] = await self._converse(peer, peers[peer], answered)

        async def enter(peer: PeerId) -> None:
            while True:
                answered = trio.Event()
                nursery.start_soon(converse, peer, answered)
                await answered.wait()
                if peer in self.neighbours():
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

    async def keep_neighbours(self, nursery: trio.Nursery) -> None:
        """See to it that there are a few neighbours."""
        while True:
            for peer in self._to_dial():
                self._dialling.add(peer)
                nursery.start_soon(self._converse, peer, self._dial_addresses(peer))
            await trio.sleep(KEEP_SECONDS * self._rng.uniform(0.5, 1.0))

    def _to_dial(self) -> list[PeerId]:
        linked = self.neighbours() | self._dialling | {self.peer_id}
        ways_in_missing = BOOTSTRAP_NEIGHBOURS - len(linked & self._bootstrap.keys())
        missing = NEIGHBOURS - len(self._dialling) - sum(neighbour.ours for neighbour in self._neighbours)
        if missing <= 0 and (ways_in_missing <= 0 or self._bootstrap.keys() <= linked):
            return []
        view = self.view()
        ways_in = sorted(peer for peer in self._bootstrap.keys() - linked if self._may_dial(peer))
        chosen = self._rng.sample(ways_in, max(0, min(ways_in_missing, len(ways_in))))
        servers = {r.peer for r in view.records() if r.role != "client" and r.addresses}
        if len(linked) == 1 and not servers - {self.peer_id}:
            servers = {peer for peer, ended in view.ended.items() if ended.record.addresses}  # once known
        others = sorted(p for p in servers - linked if self._may_dial(p) and p not in chosen)
        return chosen + self._rng.sample(others, max(0, min(missing - len(chosen), len(others))))

    def _may_dial(self, peer: PeerId) -> bool:
        retry = self._retries.get(peer)
        return retry is None or trio.current_time() >= retry.not_before

    def _dial_later(self, peer: PeerId) -> None:
        now = trio.current_time()
        self._retries.setdefault(peer, Retry()).failed(now, self._rng)
        if len(self._retries) > RETRIES_KEPT:
            self._retries = {p: retry for p, retry in self._retries.items() if retry.not_before > now}

    def _dial_addresses(self, peer: PeerId) -> tuple[str, ...]:
        ended = self._view.ended.get(peer)
        return self.addresses(peer) or (ended.record.addresses if ended else ())

    async def heal(self) -> None:
        """Compare views with one neighbour after the other, at random."""
        while True:
            await trio.sleep(HEAL_SECONDS * self._rng.uniform(0.8, 1.2))
            if self._neighbours:
                self._rng.choice(self._neighbours).say_digest(ask=True)

    async def repeat(self) -> None:
        """Announce again what was announced, before its TTL passes."""
        while True:
            await trio.sleep(self._limits.announce_seconds)
            if self._said is not None:
                self._say(self._said)

    async def follow_addresses(self) -> None:
        """Announce our addresses anew when the machine has others: it is looked at now and then."""
        while True:
            with trio.move_on_after(ADDRESSES_SECONDS):
                await self._neighbour_lost.wait()
            self._neighbour_lost = trio.Event()
            if self._host.read_addresses():
                log.info("our addresses are now %s", ", ".join(self._host.addresses) or "none")
                self._retries.clear()  # another network: who could not be reached may be now
                if self._said is not None:
                    self._say(self._said)
            await trio.sleep(ADDRESSES_PAUSE_SECONDS)

    async def expire_on_time(self) -> None:
        """Wake those who wait for a change when a record ends."""
        while True:
            due = self.view().next_expiry - trio.current_time()
            await trio.sleep(min(max(due, 0.01), EXPIRY_SECONDS))

    async def measure_adjacent(self) -> None:
        """Know the distance to the peers that may come before or behind us in a chain, and say it."""
        while True:
            view, said = self.view(), self._said
            if said is not None and said.role == "serve" and (own := view.get(self.peer_id)) is not None:
                adjacent = [record.peer for record in likely_adjacent(view, own, MAX_RTTS)]
                measured = await self.measure(adjacent)
                if self._said is not None and _is_news(measured, own.rtt):
                    self._say(self._said)
            await trio.sleep(KEEP_SECONDS)
            with trio.move_on_after(FRESH_SECONDS):
                await self.changed(view)

    async def discover(self, finder: Finder) -> None:
        """Write our model into the Kademlia table, and look there for peers that nobody told us of."""
        while True:
            view, said = self.view(), self._said
            if said is not None and said.role == "serve":
                await finder.provide(said.revision)
                await self.find_peers(said.revision)
                await trio.sleep(DISCOVER_SECONDS * self._rng.uniform(0.8, 1.2))
            else:
                await self.changed(view)

    def close(self) -> None:
        """Take no more streams, and end those that peers opened."""
        self._open = False
        for neighbour in self._neighbours:
            neighbour.scope.cancel()


def _is_news(measured: Mapping[PeerId, float], said: Mapping[PeerId, float]) -> bool:
    """Whether who believes what we said of our distances would be far wrong.

    Those measured at a busy start are several times too long.
    """
    if measured.keys() - said.keys():
        return True
    lower, higher = 1 / RTT_TRUE_ENOUGH, RTT_TRUE_ENOUGH
    return any(
        not lower <= seconds / max(said[peer], 1e-6) <= higher
        and abs(seconds - said[peer]) > RTT_NOISE_SECONDS
        for peer, seconds in measured.items()
    )


def _what_happened(peer: PeerId, addresses: Sequence[str], why: str | None, seconds: float) -> str:
    if why is None:
        why = f"no answer within {seconds:g} s"
    why = why.removeprefix(f"{peer} cannot be reached: ").removeprefix(f"{addresses[0]}: ")
    return f"{addresses[0]}/p2p/{peer}: {why}"


def _claimed_peer(wire: bytes) -> PeerId:
    key = signer(wire)
    return peer_id_of(key) if key else NOBODY


@asynccontextmanager
async def open_directory(
    host: Host,
    identity: Identity,
    *,
    swarm: str,
    limits: Limits | None = None,
    bootstrap: Sequence[str] = (),
    role: Role = "client",
    required: bool = True,
    patience_seconds: float = 0.0,
    finder: Finder | None = None,
    kademlia: bool = True,
    watch: bool | None = None,
    rng: random.Random | None = None,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Directory]:
    """Take part in a swarm for as long as the block lasts.

    When the block begins, one bootstrap peer has told all it knows.

    swarm: its id; records of another one are refused.
    bootstrap: multiaddrs with /p2p/ID of peers of the swarm; empty for the first one.
    role: "client" reads the Kademlia table, the others also hold a part of it.
    patience_seconds: how long to dial bootstrap peers again that do not answer yet.
    required: raise ConfigError where no bootstrap peer can be reached; otherwise go on, and keep trying.
    finder: instead of a Kademlia table of our own; kademlia=False: none at all.
    watch: ask servers again and again, and mark in the view who does not answer; None: a client does.
    """
    limits = limits or Limits()
    peers = bootstrap_peers(bootstrap)
    for address in host.addresses:
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigError(f"no peer could dial an address that we announce: {error}") from None
    async with AsyncExitStack() as stack:
        if finder is None and kademlia:
            from node.network.directory.kademlia import open_kademlia  # libp2p takes a second to import

            table = open_kademlia(host, swarm=swarm, serves=role != "client")
            finder = await stack.enter_async_context(table)
        watch = role == "client" if watch is None else watch
        nursery = await stack.enter_async_context(background_nursery())
        directory = Directory(
            host,
            identity,
            swarm=swarm,
            limits=limits,
            nursery=nursery,
            bootstrap=peers,
            finder=finder,
            marks_silent=watch,
            rng=rng or random.Random(),
            wall_clock=wall_clock,
        )
        host.handle(PROTOCOL, directory.serve)
        stack.callback(directory.close)
        await directory.join(nursery, required=required, patience_seconds=patience_seconds)
        for task in (
            directory.heal,
            directory.repeat,
            directory.follow_addresses,
            directory.expire_on_time,
            directory.measure_adjacent,
        ):
            nursery.start_soon(task)
        nursery.start_soon(directory.keep_neighbours, nursery)
        if watch:  # now that there is a view: whoever is silent is known as such when a chain is chosen
            nursery.start_soon(directory.watch_servers)
        if finder is not None:
            nursery.start_soon(directory.discover, finder)
        yield directory
