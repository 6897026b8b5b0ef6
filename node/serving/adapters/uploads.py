"""Places for uploads of adapters, and their pace: what guests send costs others no place and no time.  Pure.

All places may be taken by one network prefix while nobody else wants one.  A peer of another prefix then gets
the place of the newest upload of the prefix that has most.  A peer with a share of its own
(`Limits.peer_shares`) stands beside the prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from node.network.admission.shares import places_of_most
from tensor_codec.errors import TooManyStreams
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

AGAIN_SECONDS = 2.0  # another upload has ended by then, or an offer has waited
MAX_BUCKETS = 1024  # of peers; a bucket that is full again needs no entry


@dataclass(slots=True, eq=False)
class Upload:
    """One upload under way.  yields: it ends for one of another prefix, by its scope."""

    peer: str
    prefix: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    yields: bool = False


@dataclass(slots=True)
class Uploads:
    """The uploads of a node.  Times are the caller's clock, in seconds."""

    limits: Limits
    _under_way: list[Upload] = field(default_factory=list)
    _offers: dict[str, TokenBucket] = field(default_factory=dict)
    _bytes: TokenBucket | None = None
    _beside_steps: TokenBucket | None = None

    @property
    def count(self) -> int:
        """Uploads under way."""
        return len(self._under_way)

    def offered(self, peer: str, now: float) -> float:
        """Count an offer of a peer; the seconds until it is answered.

        A training has an adapter with every step, so a fast one is slowed and is no fault.  Raises
        TooManyStreams where the wait is longer than AGAIN_SECONDS: the peer offers on many streams at once.
        """
        rate, burst = self.limits.adapter_offers_per_second, self.limits.adapter_offers_burst
        if len(self._offers) >= MAX_BUCKETS:
            self._offers = {
                name: bucket for name, bucket in self._offers.items() if bucket.level_at(now) < burst
            }
            while len(self._offers) >= MAX_BUCKETS:
                del self._offers[next(iter(self._offers))]
        bucket = self._offers.setdefault(peer, TokenBucket.full(rate, burst, now))
        wait = (1 - bucket.level_at(now)) / rate
        if wait > AGAIN_SECONDS:
            raise TooManyStreams(f"more than {rate:g} offers of adapters a second, {burst} at once", wait)
        return bucket.take(1, now)

    def begin(self, peer: str, prefix: str) -> Upload:
        """A place for an upload, until `end`.  Raises TooManyStreams."""
        limits, prefix = self.limits, self.limits.prefix_of(peer, prefix)
        mine = sum(each.peer == peer for each in self._under_way)
        if mine >= limits.part_of(peer, limits.max_adapter_uploads, limits.max_adapter_uploads_per_peer):
            raise TooManyStreams(f"{mine} adapters of yours are on their way", AGAIN_SECONDS)
        if sum(not each.yields for each in self._under_way) >= limits.max_adapter_uploads:
            has_share = limits.own_share(peer) is not None
            if not (of_most := places_of_most(self._under_way, prefix, own_share=has_share)):
                raise TooManyStreams(f"{self.count} adapters are on their way here", AGAIN_SECONDS)
            of_most[0].yields = True
            of_most[0].scope.cancel()
        upload = Upload(peer, prefix)
        self._under_way.append(upload)
        return upload

    def end(self, upload: Upload) -> None:
        """Its place is free."""
        self._under_way.remove(upload)

    def pause(self, size: int, now: float, *, beside_steps: bool = False) -> float:
        """Count bytes that have come; the seconds until more is read.

        beside_steps: clients of other prefixes decode meanwhile, so the bytes have a lower rate.
        """
        limits = self.limits
        if self._bytes is None or self._beside_steps is None:
            self._bytes = TokenBucket.full(
                limits.adapter_upload_bytes_per_second, limits.adapter_upload_burst_bytes, now
            )
            self._beside_steps = TokenBucket.full(
                limits.adapter_upload_bytes_per_second_beside_steps,
                limits.adapter_upload_burst_bytes_beside_steps,
                now,
            )
        wait = self._bytes.take(size, now)
        return max(wait, self._beside_steps.take(size, now)) if beside_steps else wait
