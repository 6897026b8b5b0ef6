"""Trust in peers: their faults, the bans for them, and their good work.  One account for a whole node.

A ban is for what a peer does of its own accord.  A fault that a bad network, a third peer or another version
can cause is counted and bans nobody.  A ban holds for the peer's id, which costs its owner nothing; so where
several ids of one address are banned, the address is suspect: it gets few places and a slow rate, as
`node.network.admission` says.  An address is never banned: honest peers may be behind it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from node.runtime.bans import BanRule, Bans
from tensor_codec.errors import PeerFault
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)

MAX_COUNTED = 4096  # pairs of a peer and a kind
MAX_GOOD = 4096  # peers that did good work; those of long ago are forgotten
GOOD_SECONDS = 3600.0


class Faults:
    """What is known of the conduct of peers.

    A peer is known by its id, or by its address where it proved no id.  Memory is bounded: at MAX_COUNTED
    pairs the rarer half is dropped, so that made-up peer ids cannot fill it.

    clock: seconds that do not go back.  prefix_of: of a connected peer's address, "" where unknown.
    on_ban: called with each peer that is banned.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        prefix_of: Callable[[str], str] = lambda _: "",
        on_ban: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._limits = limits = limits or Limits()
        self._clock = clock
        self._prefix_of = prefix_of
        self._on_ban = on_ban
        self._counts: Counter[tuple[str, str]] = Counter()
        self._prefix_counts: Counter[tuple[str, str]] = Counter()
        self._kinds: Counter[str] = (
            Counter()
        )  # of all peers; never forgotten, there are few classes of errors
        window, longest = limits.fault_window_seconds, limits.longest_ban_seconds
        self._peers = Bans(BanRule(limits.faults_before_ban, window, limits.ban_seconds, longest))
        self._prefixes = Bans(BanRule(limits.bans_before_suspect, window, limits.suspect_seconds, longest))
        self._good: OrderedDict[str, float] = OrderedDict()  # when it last worked

    def add(self, peer: str, fault: PeerFault, *, bans: bool = True) -> None:
        """Count one fault of this peer; `faults_before_ban` of them within the window ban it.

        bans: False where another peer, or another version, can have caused it.
        """
        kind, prefix = type(fault).__name__, self._prefix_of(peer)
        _count(self._counts, (peer, kind))
        self._kinds[kind] += 1
        if prefix:
            _count(self._prefix_counts, (prefix, kind))
        if not bans or fault.may_be_the_network:
            return
        now = self._clock()
        at_least = self._limits.grave_fault_ban_seconds if fault.is_grave else None
        seconds = self._peers.fault(peer, now, at_least=at_least)
        if seconds:
            logger.info("%s is banned for %g s: %s: %s", peer, seconds, kind, fault)
            self._good.pop(peer, None)
            if prefix and self._prefixes.fault(prefix, now):
                logger.info("%s is suspect: several of its peers are banned", prefix)
            self._on_ban(peer)

    def worked(self, peer: str) -> None:
        """This peer did, or let us do, useful work: it is known good for an hour."""
        if not self.banned_seconds(peer):
            self._good[peer] = self._clock()
            self._good.move_to_end(peer)
            if len(self._good) > MAX_GOOD:
                self._good.popitem(last=False)

    def is_good(self, peer: str) -> bool:
        """Whether this peer did useful work within the last hour, and was not banned since."""
        worked_at = self._good.get(peer)
        return worked_at is not None and self._clock() - worked_at <= GOOD_SECONDS

    def banned_seconds(self, peer: str) -> float:
        """Until the end of this peer's ban; 0 without one."""
        return self._peers.seconds_left(peer, self._clock())

    def is_suspect(self, prefix: str) -> bool:
        """Whether several peers of this prefix were banned within a short time."""
        return self._prefixes.seconds_left(prefix, self._clock()) > 0

    def banned(self) -> dict[str, float]:
        """The banned peers, each with the seconds until the end of its ban."""
        return self._peers.banned(self._clock())

    def count(self, peer: str, kind: type[PeerFault]) -> int:
        """The number of faults of this kind by this peer."""
        return self._counts[peer, kind.__name__]

    def counts(self) -> dict[tuple[str, str], int]:
        """Every count, by peer and kind; a copy."""
        return dict(self._counts)

    def kinds(self) -> dict[str, int]:
        """The faults of all peers together since the start, by kind; a copy."""
        return dict(self._kinds)

    def prefix_counts(self) -> dict[tuple[str, str], int]:
        """Every count, by the prefix of connected peers and kind; a copy."""
        return dict(self._prefix_counts)


def _count(counts: Counter[tuple[str, str]], key: tuple[str, str]) -> None:
    if key not in counts and len(counts) >= MAX_COUNTED:
        for rare, _ in counts.most_common()[MAX_COUNTED // 2 :]:
            del counts[rare]
    counts[key] += 1
