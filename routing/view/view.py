"""A peer's view of the swarm: a fold of records over time, on frozen values.

    view = merge(view, [Arrival(record, wire)], now).view

`now` is the caller's monotonic clock, in seconds; no other clock matters.  The record with the highest `seq`
of a peer counts.  It lives for its TTL from our receipt, `life_seconds` at most, less the age that the sender
states: ages add up along the way, so gossip in circles cannot keep a dead peer alive.  The view remembers the
`seq` of an expired record for a while, so a false age gains one life at most.  A peer that left keeps its
last record (state offline) as a tombstone, for the same reason.

A view has places for `max_records` peers.  While there are free places every server gets one.  A full view
shares its places out: see `routing.view.places`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from operator import attrgetter
from typing import NamedTuple

from routing.names import ModelId, PeerId, Revision, public_key_of
from routing.view.entry import Arrival, Entry
from routing.view.places import Places
from routing.view.records import MAX_TTL_SECONDS, Record, State
from tensor_codec.limits import Limits

# How long an expired record is remembered.  A peer whose clock went back announces a lower seq: it is shown
# its own older record (see `missing`), or waits this long.
REMEMBER_SECONDS = MAX_TTL_SECONDS
# A peer's claim counts up to four times the median's speed; more counts only when measured.
MAX_CLAIMED_SPEED = 4.0
__all__ = ["Arrival", "Entry", "SwarmView", "believed_rates", "expire", "likely_adjacent", "merge"]
RELAYED_BYTES_PER_SECOND = 6.25e6  # 50 Mbit/s: the rate of a relay where its operator has chosen no other
ONLINE: frozenset[State] = frozenset({"online"})
ONLINE_SOON: frozenset[State] = frozenset({"joining", "online"})


@dataclass(frozen=True, slots=True)
class SwarmView:
    """Everything known of a swarm at one moment; `merge` and `expire` return new ones.

    max_records: of peers.  life_seconds: of a record, at most, whatever its peer says.
    entries: the live records by peer, tombstones included.
    ended: expired records, remembered so that gossip cannot bring them back; at most max_records.
    next_expiry: no entry expires before this time.
    silent: peers that do not answer this peer; the view keeps their records and counts no span of theirs.
    seen: the IP addresses under which others see this peer: peers with one of them are in its house.
    """

    swarm: str
    max_records: int = 10_000
    entries: Mapping[PeerId, Entry] = field(default_factory=dict)
    ended: Mapping[PeerId, Entry] = field(default_factory=dict)
    next_expiry: float = field(default=math.inf, compare=False)
    silent: frozenset[PeerId] = frozenset()
    seen: frozenset[str] = frozenset()
    life_seconds: float = Limits().record_life_seconds

    def get(self, peer: PeerId) -> Record | None:
        """The record of that peer, or None where it is unknown or has left."""
        entry = self.entries.get(peer)
        return None if entry is None or entry.record.state == "offline" else entry.record

    def reaches(self, record: Record) -> bool:
        """Whether this peer may dial that one: not where nobody else could, unless it is next door."""
        return record.reach != "none" or (bool(record.lan) and record.seen in self.seen)

    def is_dialled(self, record: Record) -> bool:
        """Whether there is a way to that peer: an address, or a relay."""
        return bool(self.dialled_at(record) or record.every_relay)

    def dialled_at(self, record: Record) -> tuple[str, ...]:
        """The addresses at which this peer dials that one: private ones only where both are in one house."""
        return record.addresses + record.lan if record.seen in self.seen else record.addresses

    def relayed_rate(self, record: Record) -> float:
        """Bytes per second through the relays of a peer: of the fastest, as they say; infinite without one.

        A relay shares its rate among its circuits, so nobody gets more than RELAYED_BYTES_PER_SECOND.
        """
        if record.reach != "relayed":
            return math.inf
        relays = [relay for peer in record.relays if (relay := self.get(peer)) is not None]
        said = [relay.relay_mbit * 125_000.0 for relay in relays if relay.relay_mbit]
        return min(max(said, default=math.inf), RELAYED_BYTES_PER_SECOND)

    def records(self) -> tuple[Record, ...]:
        """The records of all peers that have not left, in the order of their ids."""
        present = (entry.record for entry in self.entries.values() if entry.record.state != "offline")
        return tuple(sorted(present, key=_by_peer))

    def spans(
        self,
        revision: str,
        blocks: int | None = None,
        states: Collection[State] = ONLINE,
        *,
        silent: bool = False,
    ) -> tuple[Record, ...]:
        """The serving peers of one model revision, in the order of their ids.

        A revision is a hash of the model's content; the name next to it is for people, and may differ.

        blocks: of the whole model, where the caller knows it; peers that claim another number are left out.
        states: ONLINE for new sessions; ONLINE_SOON when a new node chooses its blocks.
        silent: whether silent peers are included, and peers that nobody reaches.
        """
        found = [
            entry.record
            for peer, entry in self.entries.items()
            if entry.record.role == "serve"
            and entry.record.state in states
            and entry.record.revision == revision
            and blocks in (None, entry.record.blocks)
            and (silent or (peer not in self.silent and self.reaches(entry.record)))
        ]
        return tuple(sorted(found, key=_by_peer))

    def models(self) -> tuple[ModelKey, ...]:
        """The models that online peers serve."""
        served = (r for r in self.records() if r.role == "serve" and r.state == "online")
        return tuple(sorted({ModelKey(ModelId(r.model), Revision(r.revision), r.blocks) for r in served}))

    def digest(self) -> dict[bytes, int]:
        """The highest seq known of each peer, by public key: older records need not be sent here.

        Expired records are included, so that no peer sends them again.
        """
        known = {**self.ended, **self.entries}
        return {public_key_of(peer): entry.record.seq for peer, entry in known.items()}

    def held(self, peers: Iterable[PeerId], now: float) -> list[Arrival]:
        """The live records of these peers, each with its age."""
        found = [self.entries[peer] for peer in peers if peer in self.entries]
        return [_pass_on(entry, now) for entry in found if now < entry.expires]

    def missing(
        self,
        digest: Mapping[bytes, int],
        now: float,
        asker: PeerId | None = None,
        withheld: Container[PeerId] = (),
    ) -> list[Arrival]:
        """The records that the sender of this digest lacks, each with its age.

        asker: the sender.  Its own last record is included even if expired: a peer whose clock went back
            learns which seq it must exceed.
        withheld: peers whose records are not passed on yet.
        """
        held = [e for peer, e in self.entries.items() if now < e.expires and peer not in withheld]
        if asker is not None and asker in self.ended:
            held.append(self.ended[asker])
        return [
            _pass_on(entry, now)
            for entry in held
            if entry.record.seq > digest.get(public_key_of(entry.record.peer), -1)
        ]


_by_peer = attrgetter("peer")


def _pass_on(entry: Entry, now: float) -> Arrival:
    return Arrival(entry.record, entry.wire, max(0.0, now - entry.sent))


class ModelKey(NamedTuple):
    """One revision of a model, and how many blocks its peers say that it has."""

    model: ModelId
    revision: Revision
    blocks: int


class Merged(NamedTuple):
    """The view after a merge, and the peers with new records."""

    view: SwarmView
    changed: tuple[PeerId, ...]


def merge(
    view: SwarmView,
    arrivals: Iterable[Arrival],
    now: float,
    met: Container[PeerId] = (),
    trusted: Container[PeerId] = (),
) -> Merged:
    """Take in verified records of this swarm.

    Dropped are records of another swarm or of clients, records whose seq is no higher than the known one
    (expired ones included), records whose life has passed, and records of new peers for which a full view
    has no place.  met: peers that this node has been connected to; they keep their places.
    trusted: neighbours of our own configuration; the peers that they tell of have half of the places.
    The order of arrivals does not matter unless the view is full.  O(view + arrivals).
    """
    view = expire(view, now)
    entries, ended = dict(view.entries), dict(view.ended)
    changed: dict[PeerId, None] = {}  # a set that keeps its order
    places: Places | None = None
    for arrival in arrivals:
        record, source = arrival.record, arrival.source
        entry = Entry(record, arrival.wire, now - arrival.age, source, view.life_seconds)
        known = entries.get(record.peer)
        latest = known or ended.get(record.peer)
        if record.swarm != view.swarm or record.role == "client" or entry.expires <= now:
            continue
        if latest is not None and record.seq <= latest.record.seq:
            continue
        if known is not None:
            if source not in trusted or known.source in trusted:
                entry = replace(entry, source=known.source)  # a renewal gives no second place
        elif len(entries) >= view.max_records:
            places = places or Places(entries, met, trusted, view.max_records // 2)
            if (evicted := places.make_room(entry)) is None:
                continue
            del entries[evicted]
            changed.pop(evicted, None)
        entries[record.peer] = entry
        ended.pop(record.peer, None)
        changed[record.peer] = None
    if not changed:
        return Merged(view, ())
    next_expiry = min(view.next_expiry, *(entries[peer].expires for peer in changed))
    merged = replace(view, entries=entries, ended=ended, next_expiry=next_expiry, silent=frozenset())
    return Merged(merged, tuple(changed))


def expire(view: SwarmView, now: float) -> SwarmView:
    """The view without the records whose TTL has passed; the view itself if there are none."""
    if now < view.next_expiry:
        return view
    live = {peer: entry for peer, entry in view.entries.items() if now < entry.expires}
    gone = {peer: entry for peer, entry in view.entries.items() if peer not in live}
    next_expiry = min((entry.expires for entry in live.values()), default=math.inf)
    remembered = {p: e for p, e in {**view.ended, **gone}.items() if now < e.expires + REMEMBER_SECONDS}
    if len(remembered) > view.max_records:
        latest = sorted(remembered.items(), key=lambda item: item[1].expires)[-view.max_records :]
        remembered = dict(latest)
    return replace(view, entries=live, ended=remembered, next_expiry=next_expiry, silent=frozenset())


def believed_rates(
    spans: Sequence[Record], measured: Mapping[PeerId, float] | None = None, positions: int = 1
) -> dict[PeerId, float]:
    """Seconds per block of each peer: as measured, else as claimed, but at most four times as fast as the
    median claim: a false claim draws no more than its share.

    positions: computed at once; more than one go at the rate of a prefill, in `measured` too.
    """
    measured = measured or {}
    if not spans:
        return {}
    claims = {s.peer: s.seconds_per_block for s in spans}
    if positions > 1:
        claims = {s.peer: positions * s.prefill_seconds_per_token for s in spans}
    fastest = statistics.median(claims.values()) / MAX_CLAIMED_SPEED
    return {peer: measured.get(peer, max(claim, fastest)) for peer, claim in claims.items()}


def likely_adjacent(view: SwarmView, record: Record, most: int) -> tuple[Record, ...]:
    """Up to `most` peers that may be neighbours of this one in a chain, successors and predecessors by turns.

    Peers that hold its next block, or the block before its first one, come first.  A hop may begin and end
    anywhere in its span.  So a peer that reaches further is a candidate, and so is a peer that could compute
    the first or the last part of the span in its place.  A moving peer counts at its new blocks.
    """
    spans = map(_moved, view.spans(record.revision, record.blocks, ONLINE_SOON))
    others = [s for s in spans if s.peer != record.peer]
    start, stop = _moved(record).start, _moved(record).stop
    after = [s for s in others if s.start <= stop < s.stop]
    after += [s for s in others if start < s.start < stop == s.stop]
    before = [s for s in others if s.start < start <= s.stop]
    before += [s for s in others if start == s.start < s.stop < stop]
    in_turn = (s for pair in zip_longest(after, before) for s in pair if s is not None)
    return tuple({s.peer: s for s in in_turn}.values())[:most]


def _moved(record: Record) -> Record:
    """The record as it is after the move that it announces."""
    if not record.moves:
        return record
    return replace(record, start=record.next_start, stop=record.next_stop, next_start=0, next_stop=0)
