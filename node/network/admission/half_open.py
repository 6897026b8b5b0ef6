"""The handshakes under way: few places, of which silence and floods keep nobody out.

A newcomer always gets a place.  Where all are in use, the address that holds most gives one up: a handshake
without a word before one that has begun, the oldest first.  An honest handshake takes milliseconds, and its
first bytes come with the connection, so it is done before it is the oldest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from node.network.admission.shares import Shares


@dataclass(eq=False, slots=True)
class Handshake:
    """One handshake.  prefix: of its address.  give_up: ends it.  spoke: its first bytes have begun it."""

    prefix: str
    give_up: Callable[[], object]
    spoke: bool = False
    number: int = field(default_factory=count().__next__)  # in order of time


class HalfOpen:
    """The handshakes under way.

    Promises, checked by tests/unit/test_half_open.py:
      * there are never more than `most`;
      * no handshake makes way for one of an address that holds as many places or more, unless that address
        is its own.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._count = 0
        self._by_prefix: dict[str, dict[Handshake, None]] = {}  # the oldest first
        self._shares = Shares()

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def begin(self, handshake: Handshake) -> Handshake | None:
        """Take a place; the handshake that has to give up its own for it, which counts no more."""
        self._shares.add(handshake.prefix, "")
        loser = self._loser() if self._count >= self.most else None
        if loser is not None:
            self.end(loser)
        self._by_prefix.setdefault(handshake.prefix, {})[handshake] = None
        self._count += 1
        return loser

    def end(self, handshake: Handshake) -> None:
        """Give the place back.  Twice does no harm."""
        others = self._by_prefix.get(handshake.prefix, {})
        if handshake not in others:
            return
        del others[handshake]
        if not others:
            del self._by_prefix[handshake.prefix]
        self._count -= 1
        self._shares.add(handshake.prefix, "", -1)

    def _loser(self) -> Handshake:
        """Of the largest holders, with the newcomer counted among them, the oldest; silence first."""
        ranks = {prefix: self._shares.rank(prefix, "") for prefix in self._by_prefix}
        most = max(ranks.values())
        largest = [each for prefix, held in self._by_prefix.items() if ranks[prefix] == most for each in held]
        return min(largest, key=lambda each: (each.spoke, each.number))
