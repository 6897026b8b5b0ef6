"""The relays of a node behind NAT: where it asks for a reservation, and when again.

Decides; dials and asks nothing.  Two relays and a bootstrap node, at different addresses where there are
such, so that one of them may end while a session lasts.  Where no others relay it is two bootstrap nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from node.network.addresses import Address
from node.network.prefixes import address_prefix
from routing.names import PeerId

RELAYS = 2
BOOTSTRAP_RELAYS = 1
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 300.0  # after a refusal; a full relay stays so for minutes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that relays.

    addresses: multiaddrs.  rtt_seconds: None where unknown.  is_bootstrap: it computes nothing, and stays.
    is_chosen: by the operator, who named it.
    """

    peer: PeerId
    addresses: tuple[str, ...]
    rtt_seconds: float | None = None
    is_bootstrap: bool = False
    is_chosen: bool = False

    @property
    def prefixes(self) -> frozenset[str]:
        """Of its addresses."""
        return frozenset(filter(None, (address_prefix(each.split("/")[2]) for each in self.addresses)))


@dataclass(frozen=True, slots=True)
class Held:
    """A reservation.

    refresh_at, ends_at: on the caller's clock.  seen_at: the address at which the relay sees this node.
    """

    refresh_at: float
    ends_at: float
    prefixes: frozenset[str] = frozenset()
    is_bootstrap: bool = False
    seen_at: Address | None = None


@dataclass(slots=True)
class _Pause:
    until: float
    seconds: float


@dataclass(slots=True)
class ReservationPlan:
    """The reservations of one node.  Times are the caller's clock, in seconds.

    Promises, checked by tests/unit/test_own_reservations.py:
      * at most RELAYS + BOOTSTRAP_RELAYS reservations, and those named by the operator;
      * a reservation is asked for again when half of its time is over;
      * a lost relay is replaced at the next look, by another one where there is one;
      * a relay that refused is left alone for a pause that doubles.
    """

    held: dict[PeerId, Held] = field(default_factory=dict)
    _pauses: dict[PeerId, _Pause] = field(default_factory=dict)

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """To be announced: the oldest first."""
        return tuple(self.held)

    @property
    def seen_at(self) -> tuple[Address, ...]:
        """The addresses at which relays see this node, each once."""
        return tuple(dict.fromkeys(each.seen_at for each in self.held.values() if each.seen_at is not None))

    @property
    def is_symmetric(self) -> bool:
        """Whether relays see one IP address of this node with different ports: no punch works then."""
        return len({each.host for each in self.seen_at}) < len(self.seen_at)

    def due(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        """The relays to ask now: held ones whose half is over, and new ones for empty places."""
        known = {each.peer: each for each in candidates}
        for peer in [each for each, held in self.held.items() if held.ends_at <= now]:
            self.lost(peer)
        again = [known[peer] for peer, held in self.held.items() if held.refresh_at <= now and peer in known]
        free = [each for each in known.values() if each.peer not in self.held and self._may_ask(each, now)]
        asked = [each for each in free if each.is_chosen]
        bootstrap = sum(held.is_bootstrap for held in self.held.values())
        others = len(self.held) - bootstrap
        new = [each for each in free if not each.is_chosen and not each.is_bootstrap]
        new = self._nearest_apart(new, min(RELAYS, RELAYS + BOOTSTRAP_RELAYS - bootstrap) - others)
        others += len(new)
        spare = [each for each in free if not each.is_chosen and each.is_bootstrap]
        # two relays where there are only bootstrap nodes
        new += self._nearest_apart(spare, max(BOOTSTRAP_RELAYS, RELAYS - others) - bootstrap)
        return again + asked + new

    def granted(self, candidate: Candidate, seconds: float, now: float, seen_at: Address | None) -> None:
        """A relay has said yes, for so many seconds."""
        self._pauses.pop(candidate.peer, None)
        self.held[candidate.peer] = Held(
            now + seconds / 2, now + seconds, candidate.prefixes, candidate.is_bootstrap, seen_at
        )

    def refused(self, peer: PeerId, now: float) -> None:
        """A relay has said no, or nothing.  A reservation that was there counts until its end."""
        before = self._pauses.get(peer)
        seconds = min(LONGEST_PAUSE_SECONDS, 2 * before.seconds if before else FIRST_PAUSE_SECONDS)
        self._pauses[peer] = _Pause(now + seconds, seconds)
        if (held := self.held.get(peer)) is not None:
            later = min(held.ends_at, now + seconds)
            self.held[peer] = Held(later, held.ends_at, held.prefixes, held.is_bootstrap, held.seen_at)

    def lost(self, peer: PeerId) -> None:
        """The connection to a relay has ended, and the reservation with it."""
        self.held.pop(peer, None)

    def _may_ask(self, candidate: Candidate, now: float) -> bool:
        pause = self._pauses.get(candidate.peer)
        return pause is None or pause.until <= now

    def _nearest_apart(self, candidates: Sequence[Candidate], most: int) -> list[Candidate]:
        """The nearest first; those at an address of a relay that is taken come last."""
        taken = frozenset[str]().union(*(held.prefixes for held in self.held.values()))
        chosen: list[Candidate] = []
        left = list(candidates)
        while left and len(chosen) < most:
            best = min(left, key=lambda each: (bool(each.prefixes & taken), *_nearness(each)))
            left.remove(best)
            chosen.append(best)
            taken |= best.prefixes
        return chosen


def _nearness(candidate: Candidate) -> tuple[bool, float, str]:
    return candidate.rtt_seconds is None, candidate.rtt_seconds or 0.0, candidate.peer
