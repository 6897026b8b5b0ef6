"""What a client has measured of peers, beside what they claim: its own figures win, and they age.

A record says how fast a peer is and how many steps wait there.  Neither is checked by anybody, so for a
client that has used the peer

* its own figure counts as it is when it is new.  With every HALF_SECONDS it counts half as much beside the
  claim (they are weighted as logarithms): who was slow once, under load, is tried again some minutes later.
* a claimed queue makes a peer slower than was measured, if that, and its absence makes it no faster.
* a peer that was DOUBTED times slower than it claims to be, its queue reckoned in, is not believed for its
  other claims either: they count as so many times slower too, and that for DOUBTED_HALF_SECONDS.

How long each hop had a step is said by the hops (`Result.timings`); how long all of it took the client
knows itself.  What is missing between the two is laid to those that say they are the fastest (`admitted`):
whoever is honest, and in company of a liar for a while, is measured again in other company.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from routing.names import PeerId
from routing.view.records import MIN_RATE_SECONDS, Record
from routing.view.view import believed_rates

NEWEST = 0.2  # what the newest step counts in a figure that is new itself
HALF_SECONDS = 120.0
DOUBTED = 3.0
DOUBTED_HALF_SECONDS = 600.0
HALVES_KEPT = 6  # then a figure is forgotten
UNEXPLAINED = 0.25  # of a step, for which nobody is suspected
LOCAL_SECONDS = 0.005  # of a step that are this process's own


@dataclass(frozen=True, slots=True)
class Seen:
    """A peer as it was measured: seconds per block, waits included; `ratio` times what it claimed; when."""

    seconds: float
    ratio: float
    at: float

    @property
    def doubted(self) -> bool:
        """Whether its claims are false."""
        return self.ratio > DOUBTED

    @property
    def half_seconds(self) -> float:
        """How soon it counts half as much."""
        return DOUBTED_HALF_SECONDS if self.doubted else HALF_SECONDS

    def weight(self, now: float) -> float:
        """What it counts beside a claim: 1 when it is new, 0 in the end."""
        return math.exp2(-max(0.0, now - self.at) / self.half_seconds)


@dataclass(slots=True)
class Measured:
    """The figures of one client.  Times are the caller's clock, in seconds.

    decode: of one step through a block.  prefill: of one token of many through a block.
    """

    decode: dict[PeerId, Seen] = field(default_factory=dict)
    prefill: dict[PeerId, Seen] = field(default_factory=dict)

    def learn(
        self, peer: PeerId, seconds: float, claims: Record | None, now: float, *, prefill: bool = False
    ) -> None:
        """A step has taken so long.  claims: what the peer says of itself; None where it has just left."""
        seconds = max(seconds, MIN_RATE_SECONDS)  # as logarithms: never 0
        kind = self.prefill if prefill else self.decode
        known = kind.get(peer)
        if known is None:
            self._forget(now)
        keep = 0.0 if known is None else (1 - NEWEST) * known.weight(now)
        seconds += keep * ((known.seconds if known else seconds) - seconds)
        ratio = 1.0 if known is None else known.ratio
        if claims is not None:
            claimed = claims.prefill_seconds_per_token if prefill else claims.seconds_per_block
            ratio = seconds / (claimed * (1 + claims.queue)) if claimed else 1.0
        kind[peer] = Seen(seconds, ratio, now)

    def rates(self, spans: Sequence[Record], now: float, positions: int = 1) -> dict[PeerId, float]:
        """Seconds per block, waits included, of those of these peers of whom something is known.

        positions: computed at once; more than one go at the rate of a prefill.
        For the others `believed_rates` says what their claims are worth.  O(spans).
        """
        own, other, times = self.decode, self.prefill, 1
        if positions > 1:
            own, other, times = self.prefill, self.decode, positions
        capped, rates = believed_rates(spans, positions=positions), dict[PeerId, float]()
        for span in spans:
            seen, elsewhere = own.get(span.peer), other.get(span.peer)
            doubt = seen or elsewhere
            if doubt is None or (seen is None and not doubt.doubted):
                continue
            claim = span.seconds_per_block if times == 1 else times * span.prefill_seconds_per_token
            if doubt.doubted:
                claim *= doubt.ratio ** doubt.weight(now)
            claim = max(claim, capped[span.peer])
            aged = claim
            if seen is not None:
                weight = seen.weight(now)
                aged = (times * seen.seconds) ** weight * capped[span.peer] ** (1 - weight)
            rates[span.peer] = max(aged, min(aged, claim) * (1 + span.queue))
        return rates

    def _forget(self, now: float) -> None:
        for kind in (self.decode, self.prefill):
            for peer in [p for p, seen in kind.items() if now - seen.at > HALVES_KEPT * seen.half_seconds]:
                del kind[peer]


def admitted(held: Sequence[float], blocks: Sequence[int], total: float, network: float) -> Sequence[float]:
    """How long each hop had a step, in seconds, what they did not admit included.

    held: as the hops say.  blocks: that each computed.  total: of the step, as the client saw it.
    network: that it should have spent between them; twice that is not suspicious.
    Time beyond is that of the hops which say they are the fastest, block by block: as much of it as makes
    them as slow as the next one, and so on.
    """
    missing = total - sum(held) - 2 * network - LOCAL_SECONDS
    if len(held) != len(blocks) or missing <= UNEXPLAINED * total:
        return held
    fastest_first = sorted(range(len(held)), key=lambda index: held[index] / blocks[index])
    level = among = 0.0
    for index in fastest_first:
        if among and level <= held[index] / blocks[index]:
            break
        missing, among = missing + held[index], among + blocks[index]
        level = missing / among
    return [max(seconds, level * count) for seconds, count in zip(held, blocks, strict=True)]
