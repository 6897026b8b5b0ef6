"""The places of connections that peers open: the newcomer that gets one, and the connection that gives way.

A quarter of the places is kept for peers known good.  Where the others are in use, a newcomer takes the place
of the connection that is without a stream longest, of the largest holder first.  A connection in use makes
way only for a newcomer with a smaller share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.network.admission.shares import Rank, Shares

REST_SECONDS = 1.0  # without a stream, until a connection makes way for a peer with no smaller share


class Muxer(Protocol):
    """The part of a connection's muxer that counts its streams."""

    @property
    def streams(self) -> int:
        """The open ones, of both sides."""


class Held(Protocol):
    """The part of `Connection` that these decisions need."""

    @property
    def core(self) -> Muxer:
        """Its muxer."""


@dataclass(eq=False, slots=True)
class Place:
    """The place of one inbound connection.

    good: its peer is known good.  used_at and idle_at: when it was last seen with and without a stream.
    """

    connection: Held
    peer: str
    prefix: str
    since: float
    used_at: float
    idle_at: float
    good: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it carries no stream now."""
        return not self.connection.core.streams


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A peer that asks for a place.  most: places that its address may have, None for any number."""

    peer: str
    prefix: str
    good: bool
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """The answer to a newcomer: admitted, perhaps in the place of another connection."""

    admitted: bool
    instead_of: Place | None = None


class Places:
    """Decides over inbound connections.  total: all places.  kept: of these, for peers known good."""

    def __init__(self, total: int, kept: int) -> None:
        self.total = total
        self.kept = kept

    def room(self, newcomer: Newcomer, held: Sequence[Place], now: float, *, full: bool = False) -> Room:
        """Whether a newcomer is admitted, and at whose expense.

        full: no further place is left for another reason than `total`.
        """
        unproven = [place for place in held if not place.good]
        own = [place for place in unproven if place.prefix == newcomer.prefix]
        if not newcomer.good and newcomer.most is not None and len(own) >= newcomer.most:
            return self._instead(_longest_idle(own, now))
        full = full or len(held) >= self.total
        if not full and (newcomer.good or len(unproven) < self.total - self.kept):
            return Room(admitted=True)
        good = [place for place in held if place.good]
        candidates = list(unproven)
        if newcomer.good or len(good) > self.kept:
            candidates += good
        return self._instead(loser(newcomer, candidates, held, now))

    @staticmethod
    def _instead(place: Place | None) -> Room:
        return Room(admitted=place is not None, instead_of=place)


def loser(newcomer: Newcomer, candidates: Sequence[Place], held: Sequence[Place], now: float) -> Place | None:
    """The place among the candidates that goes to a newcomer; None where it has no better claim.

    held: all places, which make up the shares.
    Peers known good give way last.  Among the others, and then among them: first the connection that is
    longest without a stream, of a holder with as large a share as the newcomer's or of the newcomer's own
    address; then any connection of a holder with a larger share.
    """
    shares = Shares([(newcomer.prefix, newcomer.peer), *((place.prefix, place.peer) for place in held)])
    own = shares.rank(newcomer.prefix, newcomer.peer)
    for good in (False, True):
        group = [place for place in candidates if place.good is good]
        rested = [
            place
            for place in group
            if place.is_idle
            and now - place.used_at >= REST_SECONDS
            and (place.prefix == newcomer.prefix or _rank(shares, place) >= own)
        ]
        if rested:
            return min(_largest(rested, shares), key=lambda place: place.used_at)
        larger = [place for place in group if place.prefix != newcomer.prefix and _rank(shares, place) > own]
        if larger:
            return min(_largest(larger, shares), key=lambda place: (not place.is_idle, place.since))
    return None


def _rank(shares: Shares, place: Place) -> Rank:
    return shares.rank(place.prefix, place.peer)


def _largest(places: Iterable[Place], shares: Shares) -> list[Place]:
    held = list(places)
    most = max(_rank(shares, place)[:2] for place in held)
    return [place for place in held if _rank(shares, place)[:2] == most]


def _longest_idle(places: Iterable[Place], now: float) -> Place | None:
    idle = (place for place in places if place.is_idle and now - place.used_at >= REST_SECONDS)
    return min(idle, key=lambda place: place.used_at, default=None)
