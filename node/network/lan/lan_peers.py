"""The announced peers of a local network: when each is met, and when again.  Pure: the time is passed in.

An announcement may come once, at a moment when its peer does not answer yet or knows nothing to tell: two
nodes that start at one moment hear each other before either has a record.  So a peer is met again and again,
ever more rarely, until its record is known.  Later it is looked for once a minute: a network that was in two
parts is one again, and the swarm with it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from node.network.directory.visits import Meeting
from node.network.lan.announcement import LanPeer, read_announcement
from routing.names import PeerId
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

AGAIN_SECONDS = 60.0  # the longest pause before a peer is looked for again
SOON_SECONDS, SOON_TRIES = 0.5, 8  # for a peer that answers and has no record yet: it is starting
KEEP_SECONDS = 4500.0  # the life of a TXT record (RFC 6762, section 10): a peer that is there repeats it


@dataclass(slots=True)
class _Heard:
    """One peer.  tries: meetings in a row that gave no record.  told: its first record was reported."""

    found: LanPeer
    at: float
    due: float
    tries: int = 0
    under_way: bool = False
    told: bool = False


class LanPeers:
    """Whom to meet, at a bounded rate.

    Promises, checked by tests/unit/test_lan_peers.py:
      * a peer is met at once, then after pauses that grow to AGAIN_SECONDS, whatever it announces;
      * with other addresses it is met at once;
      * `max_lan_peers` are remembered, those heard of last, until KEEP_SECONDS after their last announcement;
      * meetings keep to `lan_dials_per_second`, and newly heard peers come first: a flood of invented ids
        costs its own rate of dials.
    """

    def __init__(self, own: PeerId, swarm: str, limits: Limits, now: float) -> None:
        self._own = own
        self._swarm = swarm
        self._limits = limits
        self._rate = TokenBucket.full(limits.lan_dials_per_second, limits.lan_dials_burst, now)
        self._heard: OrderedDict[PeerId, _Heard] = OrderedDict()

    def hear(self, text: bytes, now: float) -> None:
        """Take a TXT record; anything but the announcement of another peer of the swarm is ignored."""
        found = read_announcement(text, self._swarm, self._limits)
        if found is None or found.peer == self._own:
            return
        heard = self._heard.get(found.peer)
        if heard is None or heard.found != found:
            told = heard is not None and heard.told
            under_way = heard is not None and heard.under_way
            heard = self._heard[found.peer] = _Heard(found, now, now, under_way=under_way, told=told)
        heard.at = now
        self._heard.move_to_end(found.peer)
        while len(self._heard) > self._limits.max_lan_peers:
            self._heard.popitem(last=False)

    def due(self, now: float) -> list[PeerId]:
        """The peers to look for now, those with the fewest tries first."""
        for peer in [peer for peer, heard in self._heard.items() if now - heard.at >= KEEP_SECONDS]:
            del self._heard[peer]
        due = [heard for heard in self._heard.values() if heard.due <= now and not heard.under_way]
        return [heard.found.peer for heard in sorted(due, key=lambda heard: (heard.tries, heard.due))]

    def begin(self, peer: PeerId, now: float) -> LanPeer | None:
        """The addresses for a meeting with a due peer, to be answered with `met`; None where none is left."""
        if not self._rate.try_take(1, now):
            return None
        heard = self._heard[peer]
        heard.under_way = True
        return heard.found

    def met(self, peer: PeerId, outcome: Meeting, now: float) -> LanPeer | None:
        """A meeting is over, or the peer's record came by itself; the peer where that is its first record."""
        heard = self._heard.get(peer)
        if heard is None:
            return None
        heard.under_way = False
        heard.tries = 0 if outcome == "known" else heard.tries + 1
        heard.due = now + _pause(outcome, heard.tries)
        if outcome != "known" or heard.told:
            return None
        heard.told = True
        return heard.found

    def seconds_left(self, now: float) -> float:
        """Until the next peer is due; infinite without one."""
        times = [heard.due for heard in self._heard.values() if not heard.under_way]
        left = max(0.0, min(times, default=math.inf) - now)
        return left or 1.0 / self._limits.lan_dials_per_second  # due, and without a dial left


def _pause(outcome: Meeting, tries: int) -> float:
    if outcome == "known":
        return AGAIN_SECONDS
    if outcome == "starting":
        if tries <= SOON_TRIES:
            return SOON_SECONDS
        tries -= SOON_TRIES
    return min(AGAIN_SECONDS, 2.0 ** min(tries - 1, 16))
