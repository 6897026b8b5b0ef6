"""Places for downloads of shared adapters, and their pace: what others take costs sessions no time.  Pure.

All places may be taken by one network prefix while nobody else wants one.  A peer of another prefix then gets
the place of the newest download of the prefix that has most, as with uploads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from node.network.admission.shares import places_of_most
from node.network.prefixes import is_local
from tensor_codec.errors import TooManyStreams
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

AGAIN_SECONDS = 2.0  # another download has ended by then, or a question has waited
MAX_BUCKETS = 1024  # of peers and of prefixes; a bucket that is full again needs no entry


@dataclass(slots=True, eq=False)
class Download:
    """One download under way.  end: ends it for one of another prefix; then `yields`."""

    peer: str
    prefix: str
    end: Callable[[], None]
    yields: bool = False


@dataclass(slots=True)
class Downloads:
    """The downloads of a node.  Times are the caller's clock, in seconds.

    Promises, checked by tests/unit/test_downloads.py:
      * downloads never exceed the places of all and of a peer;
      * a prefix that has most gives a place up for one that has fewer;
      * bytes keep to the rate of all, and those of a public address to its share;
      * a peer with a share of its own has so much of places and rate, and stands beside the prefixes.
    """

    limits: Limits
    _under_way: list[Download] = field(default_factory=list)
    _questions: dict[str, TokenBucket] = field(default_factory=dict)
    _prefixes: dict[str, TokenBucket] = field(default_factory=dict)
    _all: TokenBucket | None = None

    @property
    def count(self) -> int:
        """Downloads under way."""
        return len(self._under_way)

    def asked(self, peer: str, now: float) -> float:
        """Count a question of a peer; the seconds until it is answered.

        Raises TooManyStreams where the wait is longer than AGAIN_SECONDS.
        """
        rate, burst = self.limits.adapter_offers_per_second, self.limits.adapter_offers_burst
        bucket = _bucket(self._questions, peer, rate, burst, now)
        wait = (1 - bucket.level_at(now)) / rate
        if wait > AGAIN_SECONDS:
            raise TooManyStreams(f"more than {rate:g} questions for adapters a second, {burst} at once", wait)
        return bucket.take(1, now)

    def begin(self, peer: str, prefix: str, end: Callable[[], None]) -> Download:
        """A place for a download, until `finish`.  Raises TooManyStreams."""
        limits, prefix = self.limits, self.limits.prefix_of(peer, prefix)
        mine = sum(each.peer == peer for each in self._under_way)
        if mine >= limits.part_of(peer, limits.max_adapter_downloads, limits.max_adapter_downloads_per_peer):
            raise TooManyStreams(f"{mine} downloads of yours are under way", AGAIN_SECONDS)
        if sum(not each.yields for each in self._under_way) >= limits.max_adapter_downloads:
            has_share = limits.own_share(peer) is not None
            if not (of_most := places_of_most(self._under_way, prefix, own_share=has_share)):
                raise TooManyStreams(f"{self.count} downloads are under way here", AGAIN_SECONDS)
            of_most[0].yields = True
            of_most[0].end()
        download = Download(peer, prefix, end)
        self._under_way.append(download)
        return download

    def finish(self, download: Download) -> None:
        """Its place is free."""
        self._under_way.remove(download)

    def pause(self, prefix: str, size: int, now: float, peer: str = "") -> float:
        """Count bytes that go out; the seconds until they may.  peer: the one that takes them."""
        limits = self.limits
        rate, burst = limits.adapter_seed_bytes_per_second, limits.adapter_seed_burst_bytes
        if self._all is None:
            self._all = TokenBucket.full(rate, burst, now)
        wait = self._all.take(size, now)
        if (own := limits.own_share(peer)) is not None:
            party, share = peer, own
        elif is_local(prefix):
            return wait
        else:
            party, share = prefix, limits.adapter_seed_share_per_prefix
        return max(wait, _bucket(self._prefixes, party, rate * share, burst * share, now).take(size, now))


def _bucket(buckets: dict[str, TokenBucket], key: str, rate: float, burst: float, now: float) -> TokenBucket:
    """The bucket of a key.  Full ones make room for a new one, then the oldest."""
    if key not in buckets and len(buckets) >= MAX_BUCKETS:
        for name in [name for name, bucket in buckets.items() if bucket.level_at(now) >= burst]:
            del buckets[name]
        while len(buckets) >= MAX_BUCKETS:
            del buckets[next(iter(buckets))]
    return buckets.setdefault(key, TokenBucket.full(rate, burst, now))
