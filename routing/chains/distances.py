"""How far peers are from each other: as they announced it, else estimated from those whom both know.

Nobody measures all pairs.  Where neither of two peers announced the other, every peer to which both
announced a distance gives a bound: the way over it.  The shortest such way is the estimate, as in the
triangulation of IDMaps (Francis et al., 2001) and its forerunners (Hotz, 1994): the bound from above is
close as soon as one of those between is close to either of the two, which a peer in the same house is.
The bound from below, |one leg - other leg|, is close only seldom and is not used: an estimate that is
too far costs a detour, one that is too near makes false claims worth while.

The client is one more of those whom two peers may both know, and the one whose distances nobody can
make up; its own distance to a peer that it has not measured is estimated in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from routing.names import PeerId
from routing.view.records import NOBODY, Record

DEFAULT_RTT_SECONDS = 0.1  # between peers of whom nothing is known: a pair on one continent
FEW = 0.25  # of all peers: for so many it is quicker to begin anew
CLIENT = NOBODY  # the name under which the client's own distances are kept

Seconds = NDArray[np.float64]


class Distances:
    """Round trips between peers, kept from view to view: only what changed is worked out again.

    default: where nobody is known to both.
    seconds: by `rows`; infinite from a peer to itself.  To be read only, until the next update.

    Two calls of `update` that end with the same records give the same distances, whatever was there
    before.  Memory: 16 bytes for each pair of peers.
    """

    def __init__(self, default: float = DEFAULT_RTT_SECONDS) -> None:
        self.default = default
        self.seconds: Seconds = np.empty((0, 0))
        self._told: Seconds = np.empty((0, 0))  # what was announced, infinite elsewhere
        self._records: dict[PeerId, Record] = {}
        self._row: dict[PeerId, int] = {}
        self._peers: list[PeerId] = []  # by row
        self._free: list[int] = []
        self.update(())

    def update(self, spans: Sequence[Record], client_rtt: Mapping[PeerId, float] | None = None) -> None:
        """From now on these are the peers.  Cheap where most records are the very ones given before.

        client_rtt: seconds from the client to a peer and back, where it has measured.
        Of n peers that know k others each, a new record costs O(k * n * k), all of them O(n * k**2).
        """
        new = {span.peer: span for span in spans}
        old = self._records
        new[CLIENT] = Record(peer=CLIENT, rtt=client_rtt or {})
        if CLIENT in old and old[CLIENT].rtt == new[CLIENT].rtt:
            new[CLIENT] = old[CLIENT]
        changed = [peer for peer, span in new.items() if old.get(peer) is not span]
        gone = [peer for peer in old if peer not in new]
        if not changed and not gone:
            return
        again = [self._row[peer] for peer in (*changed, *gone) if peer in self._row]
        affected = self._about(again)
        stale = [
            (peer, self._peers[row]) for peer in changed if peer in self._row for row in self._known(peer)
        ]
        self._told[again, :] = self._told[:, again] = np.inf
        self._records = new
        self._leave(gone)
        joined = self._join(changed)
        told = [(peer, other) for peer in changed for other in new[peer].rtt]
        heard = [(p, other) for p, span in new.items() if joined for other in span.rtt if other in joined]
        self._tell((*stale, *told, *heard))
        self._estimate(affected | self._about([self._row[peer] for peer in changed]))

    def between(self, one: PeerId, other: PeerId) -> float:
        """The round trip between two peers."""
        if one not in self._row or other not in self._row:
            return self.default
        return float(self.seconds[self._row[one], self._row[other]])

    def rows(self, peers: Sequence[PeerId]) -> NDArray[np.intp]:
        """Where these peers are in `seconds`."""
        return np.array([self._row[peer] for peer in peers], dtype=np.intp)

    def _known(self, peer: PeerId) -> list[int]:
        known: list[int] = np.flatnonzero(self._told[self._row[peer]] < np.inf).tolist()
        return known

    def _about(self, rows: Sequence[int]) -> set[int]:
        """These peers and all those that know one of them."""
        return {*rows, *np.flatnonzero((self._told[rows] < np.inf).any(axis=0)).tolist()} if rows else set()

    def _leave(self, peers: Iterable[PeerId]) -> None:
        for peer in peers:
            row = self._row.pop(peer)
            self._peers[row] = NOBODY
            self._free.append(row)

    def _join(self, peers: Iterable[PeerId]) -> set[PeerId]:
        """Give a row to those that have none yet; return them."""
        joined = [peer for peer in peers if peer not in self._row]
        if len(joined) > len(self._free):
            size = len(self._told)
            more = max(len(joined) - len(self._free), size // 4)
            self._told = np.pad(self._told, (0, more), constant_values=np.inf)
            self.seconds = np.pad(self.seconds, (0, more), constant_values=self.default)
            self._peers += [NOBODY] * more
            self._free = [*reversed(range(size, size + more)), *self._free]
        for peer in joined:
            row = self._row[peer] = self._free.pop()
            self._peers[row] = peer
        return set(joined)

    def _tell(self, pairs: Iterable[tuple[PeerId, PeerId]]) -> None:
        """Enter what each of two peers says.  Where they say different things the longer counts: no peer
        can make itself near alone."""
        for one, other in pairs:
            if one == other or one not in self._row or other not in self._row:
                continue
            row, column = self._row[one], self._row[other]
            there, back = self._records[one].rtt.get(other), self._records[other].rtt.get(one)
            if there is not None or back is not None:
                self._told[row, column] = self._told[column, row] = max(there or 0.0, back or 0.0)

    def _estimate(self, rows: set[int]) -> None:
        """Work out again all distances of these peers."""
        if len(rows) > FEW * len(self._told):
            self._estimate_all()
            return
        for row in sorted(rows):
            told = self._told[row]
            known = np.flatnonzero(told < np.inf)
            ways = (self._told[known] + told[known, None]).min(axis=0, initial=np.inf)
            self.seconds[row, :] = self.seconds[:, row] = self._known_or_estimated(told, ways)
            self.seconds[row, row] = np.inf

    def _estimate_all(self) -> None:
        """The same for all, from the side of those who know two of them."""
        ways = np.full(self._told.shape, np.inf)
        for told in self._told:
            known = np.flatnonzero(told < np.inf)
            across, legs = np.ix_(known, known), told[known]
            ways[across] = np.minimum(ways[across], legs[:, None] + legs)
        self.seconds = self._known_or_estimated(self._told, ways)
        np.fill_diagonal(self.seconds, np.inf)

    def _known_or_estimated(self, told: Seconds, ways: Seconds) -> Seconds:
        return np.where(told < np.inf, told, np.where(ways < np.inf, ways, self.default))
