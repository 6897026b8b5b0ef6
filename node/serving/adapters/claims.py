"""Peers' claims to adapters that they have brought, within a budget: whose makes room for whose.  Pure.

A peer with a share of its own (`Limits.peer_shares`) stands beside the prefixes: up to its share none of its
claims makes room for another peer's, and the prefix that holds most makes room for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from node.network.prefixes import is_local
from node.serving.fair_shares import counted, party_of
from tensor_codec.errors import Refused, TooManyStreams
from tensor_codec.limits import Limits

AGAIN_SECONDS = 5.0  # a session must end first


@dataclass(slots=True, eq=False)
class Claim:
    """A peer's claim to an adapter.

    blocks: that the peer has brought, and their bytes.  coming: bytes of uploads.  pins: uses and uploads.
    used_at: on the caller's clock.  overhead: bytes of what is kept besides the blocks.
    """

    peer: str
    prefix: str
    adapter: str
    used_at: float
    blocks: dict[int, int] = field(default_factory=dict)
    coming: int = 0
    pins: int = 0
    overhead: int = 0

    @property
    def size(self) -> int:
        """Bytes that count for the peer, whoever else has brought the same."""
        return self.overhead + self.coming + sum(self.blocks.values())

    @property
    def is_free(self) -> bool:
        """Whether nothing uses it now."""
        return not self.pins


class Claims:
    """Claims of at most `capacity` bytes.  forgotten: called with each claim that is given up."""

    def __init__(self, limits: Limits, capacity: int, forgotten: Callable[[Claim], None]) -> None:
        self.limits = limits
        self.capacity = capacity
        self._forgotten = forgotten
        self._own_shares = limits.own_shares
        self._claims: dict[tuple[str, str], Claim] = {}

    @property
    def used(self) -> int:
        """Bytes of all claims."""
        return sum(claim.size for claim in self._claims.values())

    def room_of(self, peer: str) -> int:
        """Bytes that the claims of a peer may have."""
        return int(self.capacity * self.limits.share_of(peer, self.limits.adapter_share_per_peer))

    def get(self, peer: str, adapter: str) -> Claim | None:
        """A peer's claim; None without one."""
        return self._claims.get((peer, adapter))

    def of(self, adapter: str) -> list[Claim]:
        """All peers' claims to an adapter."""
        return [claim for claim in self._claims.values() if claim.adapter == adapter]

    def reserve(
        self, peer: str, prefix: str, adapter: str, size: int, now: float, overhead: int = 0
    ) -> Claim:
        """Set `size` bytes aside for what a peer is about to bring.  Raises Refused, TooManyStreams.

        overhead: bytes more of a claim that is new.
        Claims without a use make room, those that were not used for longest first: the peer's own where it
        has its share, then those of the prefix that holds most, with these bytes.  A prefix that holds less
        than the peer's makes no room for it, but for a peer with a share of its own every prefix does.
        """
        self.expire(now)
        prefix = self.limits.prefix_of(peer, prefix)
        new = Claim(peer, prefix, adapter, now, overhead=overhead)
        claim = self._claims.get((peer, adapter), new)
        more = size + (overhead if claim is new else 0)
        if more > (room := self.room_of(peer)):
            raise Refused(f"an adapter of {more} bytes for these blocks, {room} are allowed here")
        self._make_room(peer, prefix, adapter, more)
        self._claims[peer, adapter] = claim
        claim.coming += size
        claim.pins += 1
        claim.used_at = now
        return claim

    def forget(self, claim: Claim) -> None:
        """Give a claim up."""
        del self._claims[claim.peer, claim.adapter]
        self._forgotten(claim)

    def expire(self, now: float) -> None:
        """Give up what was not used for `adapter_idle_seconds`."""
        old = now - self.limits.adapter_idle_seconds
        for claim in [claim for claim in self._claims.values() if claim.is_free and claim.used_at < old]:
            self.forget(claim)

    def _make_room(self, peer: str, prefix: str, adapter: str, size: int) -> None:
        """Give claims up until `size` more bytes of a peer fit everywhere.  Raises TooManyStreams."""
        limits, most = self.limits, self.room_of(peer)
        self._shrink("of yours", lambda claim: claim.peer == peer, most - size, adapter)
        count = limits.number_of(peer, limits.max_adapters_per_peer, limits.adapter_share_per_peer)
        count -= (peer, adapter) not in self._claims
        while len(mine := self._where(lambda claim: claim.peer == peer)) > count:
            if not self._drop_oldest(mine, adapter):
                raise TooManyStreams(f"{len(mine)} adapters of yours are in use, the limit", AGAIN_SECONDS)
        if not is_local(prefix):
            share = int(self.capacity * limits.adapter_share_per_prefix)
            self._shrink("of your network", lambda claim: claim.prefix == prefix, share - size, adapter)
        while self.used + size > self.capacity:
            if not any(self._drop_oldest(claims, adapter) for claims in self._giving(peer, prefix, size)):
                raise TooManyStreams(
                    f"no room for an adapter of {size} bytes: {self.used} of {self.capacity} are used",
                    AGAIN_SECONDS,
                )

    def _giving(self, peer: str, prefix: str, size: int) -> list[list[Claim]]:
        """The claims of each prefix that holds no less than this one with `size` more, the largest first.

        Those of a peer with a share of its own, within which it is, make room for it alone, and the last.
        """
        own = self._own_shares
        asks = party_of(peer, prefix, own)
        parts = Counter({asks: size})
        for claim in self._claims.values():
            parts[party_of(claim.peer, claim.prefix, own)] += claim.size
        count = {party: counted(party, part, self.capacity, own) for party, part in parts.items()}
        names = [name for name in parts if name == asks or (count[name] and count[name] >= count[asks])]
        names.sort(key=lambda name: -count[name])
        claims = self._claims.values()
        return [
            [claim for claim in claims if party_of(claim.peer, claim.prefix, own) == name] for name in names
        ]

    def _where(self, wanted: Callable[[Claim], bool]) -> list[Claim]:
        return [claim for claim in self._claims.values() if wanted(claim)]

    def _shrink(self, whose: str, wanted: Callable[[Claim], bool], most: int, but: str) -> None:
        """Give up the oldest of these until they have `most` bytes.  Raises TooManyStreams."""
        while (used := sum(claim.size for claim in self._where(wanted))) > most:
            if not self._drop_oldest(self._where(wanted), but):
                raise TooManyStreams(
                    f"adapters {whose} have {used} bytes here, in use, that is the limit", AGAIN_SECONDS
                )

    def _drop_oldest(self, claims: Sequence[Claim], but: str) -> bool:
        """Give up the claim that was not used for longest; False where all are in use.  but: stays."""
        free = [claim for claim in claims if claim.is_free and claim.adapter != but]
        if free:
            self.forget(min(free, key=lambda claim: claim.used_at))
        return bool(free)
