"""Distances between peers: as announced, else estimated over peers that both ends have measured.

No peer measures all pairs.  Where neither of two peers announced the other, each common neighbour gives an
upper bound: the way over it.  The shortest way is the estimate, as in the triangulation of IDMaps (Francis
et al., 2001) and its forerunners (Hotz, 1994).  The bound is tight when a common neighbour is close to either
end, for instance in the same house.  The lower bound, |one leg - other leg|, is seldom tight and not used: an
estimate that is too long costs a detour, and one that is too short would reward false claims.

The client is a common neighbour too, and no peer can falsify the client's distances.  The client's distance
to a peer that it has not measured is estimated in the same way.  A peer behind a relay is an exception: only
the peers that relay for it lead to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from routing.names import PeerId
from routing.view.records import NOBODY, Record

DEFAULT_RTT_SECONDS = 0.1  # between peers without a known distance: a pair on one continent
REBUILD_SHARE = 0.25  # of all peers: where more have changed, estimating all anew is quicker
CLIENT = NOBODY  # the name under which the client's own distances are kept

Seconds = NDArray[np.float64]


class Distances:
    """Round trips between peers, kept from view to view: only changes are worked out again.

    default: seconds between peers without a common neighbour.
    seconds: by `rows`; infinite from a peer to itself.  Read-only, and valid until the next update.

    The distances follow from the records of the last `update` alone, not from earlier ones.
    Memory: 16 bytes for each pair of peers.
    """

    def __init__(self, default: float = DEFAULT_RTT_SECONDS) -> None:
        self.default = default
        self.seconds: Seconds = np.empty((0, 0))
        self._announced: Seconds = np.empty((0, 0))  # infinite where nothing was announced
        self._records: dict[PeerId, Record] = {}
        self._row: dict[PeerId, int] = {}
        self._peers: list[PeerId] = []  # by row
        self._free: list[int] = []
        self.update(())

    def update(self, spans: Sequence[Record], client_rtt: Mapping[PeerId, float] | None = None) -> None:
        """Replace the peers by these.  Cheap where most records are the same objects as before.

        client_rtt: seconds from the client to a peer and back, for measured peers.
        With n peers that announce k others each, one new record costs O(k * n * k), all O(n * k**2).
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
        self._announced[again, :] = self._announced[:, again] = np.inf
        self._records = new
        self._leave(gone)
        joined = self._join(changed)
        own = [(peer, other) for peer in changed for other in new[peer].rtt]
        of_joined = [(p, other) for p, span in new.items() if joined for other in span.rtt if other in joined]
        self._enter((*stale, *own, *of_joined))
        self._estimate(affected | self._about([self._row[peer] for peer in changed]))
        self._lead_over_relays()

    def between(self, one: PeerId, other: PeerId) -> float:
        """The round trip between two peers."""
        if one not in self._row or other not in self._row:
            return self.default
        return float(self.seconds[self._row[one], self._row[other]])

    def rows(self, peers: Sequence[PeerId]) -> NDArray[np.intp]:
        """The rows of these peers in `seconds`."""
        return np.array([self._row[peer] for peer in peers], dtype=np.intp)

    def _known(self, peer: PeerId) -> list[int]:
        known: list[int] = np.flatnonzero(self._announced[self._row[peer]] < np.inf).tolist()
        return known

    def _about(self, rows: Sequence[int]) -> set[int]:
        """The rows of these peers and of all peers with an announced distance to one of them."""
        return (
            {*rows, *np.flatnonzero((self._announced[rows] < np.inf).any(axis=0)).tolist()} if rows else set()
        )

    def _leave(self, peers: Iterable[PeerId]) -> None:
        for peer in peers:
            row = self._row.pop(peer)
            self._peers[row] = NOBODY
            self._free.append(row)

    def _join(self, peers: Iterable[PeerId]) -> set[PeerId]:
        """Give a row to each peer without one; return these peers."""
        joined = [peer for peer in peers if peer not in self._row]
        if len(joined) > len(self._free):
            size = len(self._announced)
            more = max(len(joined) - len(self._free), size // 4)
            self._announced = np.pad(self._announced, (0, more), constant_values=np.inf)
            self.seconds = np.pad(self.seconds, (0, more), constant_values=self.default)
            self._peers += [NOBODY] * more
            self._free = [*reversed(range(size, size + more)), *self._free]
        for peer in joined:
            row = self._row[peer] = self._free.pop()
            self._peers[row] = peer
        return set(joined)

    def _enter(self, pairs: Iterable[tuple[PeerId, PeerId]]) -> None:
        """Enter the announced distances of these pairs.

        Where the two peers differ the longer one counts: no peer can make itself near alone.
        """
        for one, other in pairs:
            if one == other or one not in self._row or other not in self._row:
                continue
            row, column = self._row[one], self._row[other]
            there, back = self._records[one].rtt.get(other), self._records[other].rtt.get(one)
            if there is not None or back is not None:
                self._announced[row, column] = self._announced[column, row] = max(there or 0.0, back or 0.0)

    def _estimate(self, rows: set[int]) -> None:
        """Work out all distances of these rows again."""
        if len(rows) > REBUILD_SHARE * len(self._announced):
            self._estimate_all()
            return
        for row in sorted(rows):
            announced = self._announced[row]
            known = np.flatnonzero(announced < np.inf)
            ways = (self._announced[known] + announced[known, None]).min(axis=0, initial=np.inf)
            self.seconds[row, :] = self.seconds[:, row] = self._known_or_estimated(announced, ways)
            self.seconds[row, row] = np.inf

    def _estimate_all(self) -> None:
        """Work out all distances, each common neighbour at a time."""
        ways = np.full(self._announced.shape, np.inf)
        for announced in self._announced:
            known = np.flatnonzero(announced < np.inf)
            across, legs = np.ix_(known, known), announced[known]
            ways[across] = np.minimum(ways[across], legs[:, None] + legs)
        self.seconds = self._known_or_estimated(self._announced, ways)
        np.fill_diagonal(self.seconds, np.inf)

    def _lead_over_relays(self) -> None:
        """Estimate the distances of relayed peers anew: the way to them is the way over a relay of theirs.

        Another common neighbour may be nearer to both, and its connection to a relayed peer is of no use to
        anybody else.
        """
        relayed = {
            self._row[peer]: [self._row[relay] for relay in record.relays if relay in self._row]
            for peer, record in self._records.items()
            if record.reach == "relayed"
        }
        if not relayed:
            return
        ways = np.full(self._announced.shape, np.inf)
        for row, relays in relayed.items():
            legs = self._announced[row, relays]
            ways[row] = (self._announced[relays] + legs[:, None]).min(axis=0, initial=np.inf)
        for row in relayed:
            over = np.minimum(ways[row], ways[:, row])  # either end's relays, where both are relayed
            self.seconds[row, :] = self.seconds[:, row] = self._known_or_estimated(self._announced[row], over)
            self.seconds[row, row] = np.inf

    def _known_or_estimated(self, announced: Seconds, ways: Seconds) -> Seconds:
        return np.where(announced < np.inf, announced, np.where(ways < np.inf, ways, self.default))
