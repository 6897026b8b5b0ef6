"""A client's own measurements of peers: they win over the peers' claims, and they age.

A record claims a peer's speed and queue.  No peer checks claims, so for a client that has used the peer

* a new measurement replaces the claim.  Its weight against the claim halves every HALF_SECONDS (both weighted
  as logarithms): a peer that was slow once, under load, is tried again some minutes later.
* a claimed queue can make a peer slower than measured; a missing queue makes it no faster.
* a peer DOUBTED times slower than claimed, its queue included, is doubted: its other claims count as that
  many times slower too, with a weight that halves every DOUBTED_HALF_SECONDS.

The hops say how long each had a step (`Result.timings`); the client knows how long the whole step took.  The
unexplained rest is charged to the hops that claim to be the fastest (`admitted`): an honest peer wrongly
charged for a liar's delay recovers in its next chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from routing.chains.link_speeds import LinkSpeeds
from routing.names import PeerId
from routing.view.records import MIN_RATE_SECONDS, Record
from routing.view.view import believed_rates

NEWEST = 0.2  # weight of the newest step in a figure that is new itself
HALF_SECONDS = 120.0
DOUBTED = 3.0
DOUBTED_HALF_SECONDS = 600.0
HALVES_KEPT = 6  # half-lives after which a figure is forgotten
UNEXPLAINED = 0.25  # of a step's time: a smaller unexplained rest is charged to no peer
LOCAL_SECONDS = 0.005  # of a step, spent in the client's own process


@dataclass(frozen=True, slots=True)
class Seen:
    """A measurement of a peer.

    seconds: per block, queueing included.  ratio: the measurement over the claim.  at: its time.
    """

    seconds: float
    ratio: float
    at: float

    @property
    def doubted(self) -> bool:
        """Whether the peer's claims count as false."""
        return self.ratio > DOUBTED

    @property
    def half_seconds(self) -> float:
        """The half-life of its weight."""
        return DOUBTED_HALF_SECONDS if self.doubted else HALF_SECONDS

    def weight(self, now: float) -> float:
        """Its weight against a claim: 1 when new, towards 0 later."""
        return math.exp2(-max(0.0, now - self.at) / self.half_seconds)


@dataclass(slots=True)
class Measured:
    """The figures of one client.  Times are the caller's clock, in seconds.

    decode: one step through one block.  prefill: one token of many through one block.  speeds: of links.
    """

    decode: dict[PeerId, Seen] = field(default_factory=dict)
    prefill: dict[PeerId, Seen] = field(default_factory=dict)
    speeds: LinkSpeeds = field(default_factory=LinkSpeeds)

    def learn(
        self, peer: PeerId, seconds: float, claims: Record | None, now: float, *, prefill: bool = False
    ) -> None:
        """Take in the time of a step, per block.  claims: the peer's record; None where it has just left."""
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
        """Seconds per block, queueing included, of the measured peers among these.

        positions: computed at once; more than one go at the rate of a prefill.
        Peers without a measurement are left to `believed_rates`.  O(spans).
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
    """Seconds that each hop had a step, with unexplained time added.

    held: seconds, as the hops say.  blocks: that each hop computed.  total: of the step, as the client saw
    it.
    network: expected seconds between the hops; twice as much is not suspicious.
    Time beyond that is charged to the fastest hops per block: first until the fastest one is as slow as the
    next, then to both, and so on.
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
