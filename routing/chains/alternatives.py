"""Several chains, to show a swarm's redundancy; and the constraints on a chain.

A session keeps no second chain ready.  When a hop has failed, the session searches for that hop's blocks
alone, in the view of that moment.  The search takes little of the time: of 150 ms from the fault to the next
answer on one machine it took 0.3.  Among 300 servers it takes 3 to 9 ms, among 1500 40 to 90; dialling a
server that is 100 ms away takes 400.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex

from routing.blocks import Blocks, merged
from routing.chains.hops import Chain
from routing.names import PeerId, public_key_of
from routing.view.records import Record
from tensor_codec.messages.contract import MAX_CACHE_TOKENS
from tensor_codec.span_spec import DTYPES, QUANTIZE

USED_ALREADY = 1e9  # cost factor of a peer of an earlier chain: any other peer is better
USED_TWICE = 1e3  # one more factor on that


@dataclass(frozen=True, slots=True)
class Constraints:
    """The peers that a chain may be made of.  None: any.

    allowed, blocked: peers.  dtypes, quantize: of the peers' computing, and of their matrices.
    adapter: an adapter that each peer must keep for all, by its name, with or without `#` and digits of its
    id, or by its id.  cache_tokens: the minimum of free cache when a peer is
    chosen.  step_tokens: the minimum that a peer takes in one step.  most_hops: the maximum of hops.
    prompts: whether each peer must take deep prompts.  lora: the rank of an adapter that each must take from
    its client, 0 for none.

    Nothing lifts a constraint: where no chain meets all of them, there is no chain.
    """

    allowed: Collection[PeerId] | None = None
    blocked: Collection[PeerId] = ()
    dtypes: Collection[str] | None = None
    quantize: Collection[str] | None = None
    adapter: str | None = None
    cache_tokens: int = 0
    step_tokens: int = 0
    most_hops: int | None = None
    prompts: bool = False
    lora: int = 0

    def admits(self, span: Record) -> bool:
        """Whether this peer may be used."""
        return (
            span.peer not in self.blocked
            and (self.allowed is None or span.peer in self.allowed)
            and (self.dtypes is None or span.dtype in self.dtypes)
            and (self.quantize is None or span.quantize in self.quantize)
            and (self.adapter is None or has_adapter(span, self.adapter))
            and span.lora >= self.lora
            and span.cache_tokens >= self.cache_tokens
            and span.step_tokens >= self.step_tokens
            and (span.prompts or not self.prompts)
        )

    def check(self) -> None:
        """Raise ValueError where no swarm could meet these, or where a value is of a wrong kind."""
        _check_peers("allowed", self.allowed)
        _check_peers("blocked", self.blocked)
        if both := sorted({*(self.allowed or ())} & {*self.blocked}):
            raise ValueError(f"allowed and blocked both name {', '.join(both)}: a peer can be in one of them")
        _check_choice("dtypes", self.dtypes, DTYPES)
        _check_choice("quantize", self.quantize, QUANTIZE)
        whole = (
            ("cache_tokens", self.cache_tokens), ("step_tokens", self.step_tokens), ("lora", self.lora)
        )  # fmt: skip
        for name, tokens in whole:
            if not _is_whole(tokens) or tokens < 0:
                raise ValueError(f"{name} is {tokens!r}, a whole number of at least 0 is needed")
        if self.most_hops is not None and not (_is_whole(self.most_hops) and self.most_hops >= 1):
            raise ValueError(f"most_hops is {self.most_hops!r}, a whole number of at least 1 is needed")
        if not isinstance(self.prompts, bool):
            raise ValueError(f"prompts is {self.prompts!r}, True or False is needed")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise ValueError(f"adapter is {self.adapter!r}, a name is needed")


def _is_whole(value: Any) -> bool:  # Any: to be checked
    """Whether it is a whole number, of numpy too."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def _check_peers(name: str, peers: Any) -> None:  # Any: to be checked
    if peers is None:
        return
    if isinstance(peers, str):  # a collection too, of letters
        raise ValueError(f"{name} is the text {peers!r}, a collection of peer ids is needed")
    if not isinstance(peers, Collection):
        raise ValueError(f"{name} is {peers!r}, a collection of peer ids is needed")
    if name == "allowed" and not peers:
        raise ValueError("allowed names no peer: leave it out (None) to allow all of them")
    for peer in peers:
        try:
            public_key_of(peer)
        except (ValueError, TypeError, AttributeError):  # no text at all
            raise ValueError(f"{name} holds {peer!r}, which is no peer id (12D3KooW...)") from None


def _check_choice(name: str, chosen: Any, known: Collection[str]) -> None:  # Any: to be checked
    if chosen is None:
        return
    if not isinstance(chosen, Collection):
        raise ValueError(f"{name} is {chosen!r}, a collection of {', '.join(known)} is allowed")
    wrong = [chosen] if isinstance(chosen, str) else [each for each in chosen if each not in known]
    if wrong or not chosen:
        found = f"{wrong[0]!r}" if wrong else "nothing"
        raise ValueError(f"{name} holds {found}, a collection of {', '.join(known)} is allowed")


def has_adapter(span: Record, adapter: str) -> bool:
    """Whether a peer announces an adapter of this name, name#digits, or id."""
    for announced in span.adapters:
        name, _, digits = announced.partition("#")
        if adapter in (announced, name) or (digits and len(adapter) == 64 and adapter.startswith(digits)):
            return True
    return False


def suitable(spans: Sequence[Record], constraints: Constraints) -> list[Record]:
    """The peers that may be used, in the order given."""
    if constraints == Constraints():
        return list(spans)
    return [span for span in spans if constraints.admits(span)]


def longest_session(spans: Sequence[Record], run: Blocks) -> int | None:
    """Tokens of the longest session that some chain over a run takes, by its servers' records.

    None: some block has no server, or a chain's servers announce no length.  O(servers * log(servers)).
    """
    covered: list[Blocks] = []
    longest = sorted(spans, key=lambda span: (-(span.session_tokens or MAX_CACHE_TOKENS + 1), span.start))
    for span in longest:
        covered = merged([*covered, run.overlap((span.start, span.stop))])
        if covered == [run]:
            return span.session_tokens or None
    return None


class Search(Protocol):
    """`routing.chains.search.cheapest_chain`, with all arguments given but `cost_factors`."""

    def __call__(self, *, cost_factors: Mapping[PeerId, float]) -> Chain:
        """Raises NoChain."""


def best_chains(search: Search, most: int, cost_factors: Mapping[PeerId, float] | None = None) -> list[Chain]:
    """Up to `most` different chains, the best first; later chains share as few blocks as possible.

    Each chain avoids the peers of earlier chains wherever others hold the same blocks.  Where the search
    finds an earlier chain again, it is repeated without one and another of that chain's peers.
    Raises NoChain where no chain exists.  O(most * hops of a chain * one search).
    """
    chains: list[Chain] = []
    factors = dict(cost_factors or {})
    while len(chains) < most:
        best = search(cost_factors=factors)
        options = [best]
        if best in chains:
            without = ({hop.peer: factors[hop.peer] * USED_TWICE} for hop in best.hops)
            options = [search(cost_factors=factors | one) for one in without]
        used = {hop.peer for chain in chains for hop in chain.hops}
        fresh = [chain for chain in options if chain not in chains]
        if not fresh:
            break
        chain = min(fresh, key=lambda chain: (_blocks_at(chain, used), chain.expected_seconds))
        new = {hop.peer for hop in chain.hops} - used
        factors |= {peer: factors.get(peer, 1.0) * USED_ALREADY for peer in new}
        chains.append(chain)
    return chains


def _blocks_at(chain: Chain, peers: Collection[PeerId]) -> int:
    return sum(hop.stop - hop.start for hop in chain.hops if hop.peer in peers)
