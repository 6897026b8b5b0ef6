"""Which new peers are passed on to the neighbours, and when.

A signature proves that a record is its peer's own, not that the peer is there: keys cost nothing.  So a peer
that this node has been connected to is passed on at once, and the other new peers wait in a lane, one for
each neighbour (or for each host, where several neighbours share one).  Each lane lets a few of them pass per
second, drawn at random.  A flood therefore crosses one node at the rate of its lane, while the record of an
honest newcomer, which connects to its neighbours, reaches all peers around it at once.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from routing.names import PeerId
from tensor_codec.token_bucket import TokenBucket

MAX_LANES = 1024


@dataclass(slots=True)
class _Lane:
    bucket: TokenBucket
    waiting: list[PeerId] = field(default_factory=list)


@dataclass(slots=True)
class Newcomers:
    """The peers whose first record has not been passed on yet.

    rate, burst: of a lane, in peers.  rng: draws the next of a lane.
    Memory: a view's peers at most, since `release` drops the others; MAX_LANES lanes.
    """

    rate: float
    burst: int
    rng: random.Random
    _lanes: OrderedDict[str, _Lane] = field(default_factory=OrderedDict)
    _waiting: dict[PeerId, None] = field(default_factory=dict)

    @property
    def waiting(self) -> Collection[PeerId]:
        """The peers that are not passed on yet."""
        return self._waiting.keys()

    def arrive(self, peers: Iterable[PeerId], lane: str, now: float) -> list[PeerId]:
        """New peers that were never met; returns those to pass on at once.  The others wait."""
        passed = []
        for peer in peers:
            if peer in self._waiting:
                continue
            own = self._lane(lane, now)
            if own.bucket.try_take(1, now):
                passed.append(peer)
            else:
                own.waiting.append(peer)
                self._waiting[peer] = None
        return passed

    def release(
        self, is_met: Callable[[PeerId], bool], known: Collection[PeerId], now: float
    ) -> list[PeerId]:
        """The waiting peers to pass on now: those met since, and a few of each lane.

        known: the peers of the view; the others are forgotten.
        """
        if not self._waiting:
            return []
        passed = [peer for peer in self._waiting if peer in known and is_met(peer)]
        gone = {*passed, *(peer for peer in self._waiting if peer not in known)}
        for lane in self._lanes.values():
            lane.waiting = [peer for peer in lane.waiting if peer not in gone]
            while lane.waiting and lane.bucket.try_take(1, now):
                place = self.rng.randrange(len(lane.waiting))
                lane.waiting[place], lane.waiting[-1] = lane.waiting[-1], lane.waiting[place]
                passed.append(lane.waiting.pop())
        for peer in gone.union(passed):
            del self._waiting[peer]
        return passed

    def _lane(self, name: str, now: float) -> _Lane:
        if name not in self._lanes:
            idle = next((each for each, lane in self._lanes.items() if not lane.waiting), None)
            if len(self._lanes) >= MAX_LANES and idle is not None:
                del self._lanes[idle]
            self._lanes[name] = _Lane(TokenBucket.full(self.rate, self.burst, now))
        self._lanes.move_to_end(name)
        return self._lanes[name]
