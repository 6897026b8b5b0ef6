"""The view of a server in `benchmarks swarm`: announcements, and their age."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from functools import cached_property
from typing import TypeVar

from benchmarks.swarm.models import ANNOUNCE_SECONDS, PARTED_SECONDS, TTL_SECONDS, VIEW_SECONDS
from routing.names import PeerId
from routing.placement.rebalance import holders
from routing.placement.throughput import Holder
from routing.view.records import Record

T = TypeVar("T")


class Snapshot:
    """The announcements of one moment, and the results worked out from them once for all viewers."""

    def __init__(self, records: tuple[Record, ...]) -> None:
        self.records = records
        self._worked_out: dict[object, object] = {}

    @cached_property
    def held(self) -> list[Holder]:
        """The records as the input of the rules."""
        return holders(self.records)

    def once(self, key: object, work: Callable[[], T]) -> T:
        """The result of the first `work` under this key."""
        if key not in self._worked_out:
            self._worked_out[key] = work()
        return self._worked_out[key]  # type: ignore[return-value]  # of this key it is a T

    @cached_property
    def peers(self) -> frozenset[PeerId]:
        """All peers."""
        return frozenset(record.peer for record in self.records)

    @cached_property
    def online(self) -> frozenset[PeerId]:
        """The servers that serve the announced blocks."""
        return frozenset(record.peer for record in self.records if record.state == "online")

    def without(self, lost: frozenset[PeerId]) -> Snapshot:
        """The snapshot without these peers, which count as lost."""
        lost &= self.peers
        if not lost:
            return self
        return self.once(lost, lambda: Snapshot(tuple(r for r in self.records if r.peer not in lost)))

    def of(self, peers: Collection[str], inside: bool, old: Snapshot | None) -> Snapshot:
        """The view of the peers inside (or outside): their own records of now, and the others of `old`."""
        now = [record for record in self.records if (record.peer in peers) == inside]
        then = [] if old is None else [r for r in old.records if (r.peer in peers) != inside]
        return Snapshot((*now, *then))


class News:
    """The announcements at each whole second of the last VIEW_SECONDS."""

    def __init__(self) -> None:
        self._records: dict[PeerId, Record] = {}
        self._past: deque[tuple[int, Snapshot]] = deque()  # the announcements until that second
        self._current: Snapshot | None = None
        self._cut: frozenset[str] = frozenset()
        self._cut_at = 0.0
        self._before_cut = Snapshot(())

    def announce(self, now: float, peer: PeerId, record: Record | None) -> None:
        """A new record of a peer; None: its record has ended."""
        if not self._past or int(now) > self._past[-1][0]:
            self._past.append((int(now), self.fresh()))
            while self._past[0][0] < now - VIEW_SECONDS - 1:
                self._past.popleft()
        if record is None:
            self._records.pop(peer, None)
        else:
            self._records[peer] = record
        self._current = None

    def fresh(self) -> Snapshot:
        """The announcements of now."""
        if self._current is None:
            self._current = Snapshot(tuple(self._records.values()))
        return self._current

    def cut(self, now: float, peers: frozenset[str]) -> None:
        """Cut these peers off from the others for the next ten minutes."""
        self._cut, self._cut_at, self._before_cut = peers, now, self.fresh()

    def parted(self, now: float, one: str, other: str) -> bool:
        """Whether these two are cut off from each other."""
        cut = self._cut and self._cut_at <= now < self._cut_at + PARTED_SECONDS
        return bool(cut) and (one in self._cut) != (other in self._cut)

    def seen(self, now: float, age: float, peer: str) -> Snapshot:
        """The view of a peer whose last news of the others is `age` seconds old."""
        second = int(now - age)
        snapshot = next((s for until, s in self._past if second <= until), None) or self.fresh()
        if not self._cut or not self._cut_at < second < self._cut_at + PARTED_SECONDS:
            return snapshot
        known = second < self._cut_at + TTL_SECONDS - ANNOUNCE_SECONDS / 2  # their records have not ended yet
        inside = peer in self._cut
        old = self._before_cut if known else None
        return snapshot.once((inside, known), lambda: snapshot.of(self._cut, inside, old))
