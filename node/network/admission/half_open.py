"""The handshakes under way: few places, of which silence and floods keep nobody out.

A newcomer always gets a place.  Where all are in use, the address that holds most gives one up: a handshake
without a word before one that has begun, the oldest first.  An honest handshake takes milliseconds, and its
first bytes come with the connection, so it is done before it is the oldest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from node.network.admission.shares import Shares


@dataclass(eq=False, slots=True)
class Handshake:
    """One handshake.  prefix: of its address.  give_up: ends it.  spoke: its first bytes have come."""

    prefix: str
    give_up: Callable[[], object]
    spoke: bool = False


class HalfOpen:
    """The handshakes under way.

    Promises, checked by tests/unit/test_half_open.py:
      * there are never more than `most`;
      * no handshake makes way for one of an address that holds as many places or more, unless that address
        is its own.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._handshakes: dict[Handshake, None] = {}  # the oldest first

    def __len__(self) -> int:
        """How many there are."""
        return len(self._handshakes)

    def begin(self, handshake: Handshake) -> Handshake | None:
        """Take a place; the handshake that has to give up its own for it, which counts no more."""
        loser = self._loser(handshake) if len(self._handshakes) >= self.most else None
        if loser is not None:
            del self._handshakes[loser]
        self._handshakes[handshake] = None
        return loser

    def end(self, handshake: Handshake) -> None:
        """Give the place back.  Twice does no harm."""
        self._handshakes.pop(handshake, None)

    def _loser(self, newcomer: Handshake) -> Handshake:
        shares = Shares((each.prefix, "") for each in [*self._handshakes, newcomer])
        # max and min take the first, the oldest, of several
        most = max(shares.rank(each.prefix, "") for each in self._handshakes)
        largest = [each for each in self._handshakes if shares.rank(each.prefix, "") == most]
        return min(largest, key=lambda each: each.spoke)
