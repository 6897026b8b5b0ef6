"""The speed of each link, as frames that came over it show, and the steps that are worth packing there.

A hop times the pieces in which a long message comes (`node.network.transport.noise`), and says the speed with
the step's answer.  One client remembers the speeds of its own sessions.  They are averaged as times per byte:
what waited in a buffer seems to have come faster than the line, and weighs little then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from routing.names import PeerId

NEWEST = 0.3  # weight of the newest frame, once there are others
MAX_LINKS = 4096  # that a client remembers: of 64 hops each, 64 chains

NEAR_SECONDS = 0.002  # a round trip that no local network exceeds
FAR_BYTES_PER_SECOND = (
    12.5e6  # of a link that nobody has timed yet and that leaves the local network: 100 Mbit/s
)
# To encode and decode one value: 50 us for a row of 4096 on one core of a server (2024).
PACK_SECONDS_PER_VALUE = 12e-9
# Of a step, at both ends of a link, whatever its size: 0.4 ms to encode a row and 0.1 ms to decode it, right
# after a step was computed.
PACK_SECONDS_PER_STEP = 0.0005
LEAST_GAIN_SECONDS = 0.0005  # of a step: less is lost among the other delays of a link


@dataclass(slots=True)
class LinkSpeeds:
    """Bytes per second from one peer to another, by what one client has been told."""

    _seconds_per_byte: OrderedDict[tuple[PeerId, PeerId], float] = field(default_factory=OrderedDict)

    def learn(self, peers: Sequence[PeerId], speeds: Sequence[int]) -> None:
        """The speeds of the links between each two neighbours of `peers`; 0: not timed."""
        for one, two, speed in zip(peers, peers[1:], speeds, strict=False):
            if speed <= 0:
                continue
            seconds, known = 1 / speed, self._seconds_per_byte.pop((one, two), None)
            self._seconds_per_byte[one, two] = (
                seconds if known is None else known + NEWEST * (seconds - known)
            )
            if len(self._seconds_per_byte) > MAX_LINKS:
                self._seconds_per_byte.popitem(last=False)

    def of(self, one: PeerId, two: PeerId) -> float:
        """Bytes per second; 0.0: no frame was timed."""
        seconds = self._seconds_per_byte.get((one, two))
        return 0.0 if seconds is None else 1 / seconds


def least_rows(exact: int, packed: int, values: int, bytes_per_second: float, round_trip: float) -> int:
    """The least rows of a step for which int8o saves LEAST_GAIN_SECONDS over a link; 0: it never pays.

    exact, packed: bytes of a row of `values` values, in the codec that loses nothing and in int8o.
    bytes_per_second: of the link; 0.0: unknown.  Then a link with a round trip below NEAR_SECONDS is taken to
    be faster than any computing, and another to have FAR_BYTES_PER_SECOND.
    O(1).
    """
    if not bytes_per_second:
        if round_trip < NEAR_SECONDS:
            return 0
        bytes_per_second = FAR_BYTES_PER_SECOND
    gain = (exact - packed) / bytes_per_second - values * PACK_SECONDS_PER_VALUE
    return max(1, -int(-(LEAST_GAIN_SECONDS + PACK_SECONDS_PER_STEP) // gain)) if gain > 0 else 0
