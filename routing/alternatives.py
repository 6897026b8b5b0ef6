"""Several chains, for whoever must have a second one ready; and which peers a chain may be made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from routing.chain import Chain
from routing.names import PeerId
from routing.records import Record

USED_ALREADY = 1e9  # times its cost: any other way is better


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a peer must be to be used.  None: anything.

    allowed, blocked: peers.  dtypes, quantize: what it computes in.  adapter: one that it has.
    cache_tokens: free at the least.
    """

    allowed: Collection[PeerId] | None = None
    blocked: Collection[PeerId] = ()
    dtypes: Collection[str] | None = None
    quantize: Collection[str] | None = None
    adapter: str | None = None
    cache_tokens: int = 0

    def admits(self, span: Record) -> bool:
        """Whether this peer may be used."""
        return (
            span.peer not in self.blocked
            and (self.allowed is None or span.peer in self.allowed)
            and (self.dtypes is None or span.dtype in self.dtypes)
            and (self.quantize is None or span.quantize in self.quantize)
            and (self.adapter is None or self.adapter in span.adapters)
            and span.cache_tokens >= self.cache_tokens
        )


def suitable(spans: Sequence[Record], constraints: Constraints) -> list[Record]:
    """The peers that may be used, in the order given."""
    return [span for span in spans if constraints.admits(span)]


class Search(Protocol):
    """`routing.chain.cheapest_chain`, with everything given but `lean`."""

    def __call__(self, *, lean: Mapping[PeerId, float]) -> Chain:
        """Raises NoChain."""


def best_chains(search: Search, most: int, lean: Mapping[PeerId, float] | None = None) -> list[Chain]:
    """Up to so many different chains, the best first; later ones share as little as they can.

    Each is the cheapest of those that spend the least time at peers of earlier ones: it has none of
    them, where others hold the same blocks.  Raises NoChain where there is not even one.
    O(most * one search).
    """
    chains: list[Chain] = []
    factors = dict(lean or {})
    for _ in range(most):
        chain = search(lean=factors)
        if any(chain.hops == earlier.hops for earlier in chains):
            break
        fresh = {hop.peer for hop in chain.hops} - {hop.peer for each in chains for hop in each.hops}
        factors |= {peer: factors.get(peer, 1.0) * USED_ALREADY for peer in fresh}
        chains.append(chain)
    return chains
