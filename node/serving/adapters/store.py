"""The adapters that a node holds, by peer and id.  Pure.

A guest's adapter is known by its peer and its id: a peer can use what it has brought itself, and cannot find
out what others have.  Inside equal ids share their memory.  An adapter of the operator is everybody's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from node.serving.adapters.claims import AGAIN_SECONDS, Claim, Claims
from tensor_codec.adapters import AdapterManifest, is_adapter_id
from tensor_codec.blocks import Blocks
from tensor_codec.errors import NoAdapter, WrongRevision
from tensor_codec.limits import KIB, Limits

SHORT_ID = 16  # hexadecimal digits of an id in a record
MAX_HOPS = 8  # of an adapter that are kept made: chains divide a server's blocks in few ways
# Of a claim and an adapter's entry without its sites; so much that a look at all claims takes no time.
CLAIM_BYTES = 16 * KIB
SITE_BYTES = 2048  # of a site, in the manifest and in hops' tables, and of two tensors without their values

# Any: what the torch thread makes of a block's blob, and of all blocks of a hop (`node.model.adapters`)
Block = Any
HopAdapter = Any


@dataclass(slots=True, eq=False)
class _Content:
    """One adapter.  blocks: what it adds to each block.  hops: made of these blocks already.

    name: of the operator's own; "" for a guest's.
    """

    manifest: AdapterManifest
    name: str = ""
    blocks: dict[int, Block] = field(default_factory=dict)
    hops: dict[Blocks, HopAdapter] = field(default_factory=dict)


def manifest_bytes(manifest: AdapterManifest) -> int:
    """Bytes kept of a manifest, and of what is made for each of its sites: an estimate from above."""
    blocks = len(manifest.blocks)
    return CLAIM_BYTES + SITE_BYTES * sum(len(manifest.parts(block)) for block in range(blocks)) + 8 * blocks


class AdapterStore:
    """Adapters within a budget.  Times are the caller's clock, in seconds.

    capacity: bytes for all guests.  make: from an id and its blocks, what a span computes with.

    Promises, checked by tests/unit/test_adapter_store.py:
      * what guests hold, with what is on its way, never exceeds the capacity, nor a peer's or prefix's share;
      * an adapter in use stays; others make room, the oldest of the prefix that holds most first;
      * a peer is told nothing about adapters that other guests have brought;
      * of an adapter at most MAX_HOPS runs of blocks are kept made.
    """

    def __init__(
        self, limits: Limits, capacity: int, make: Callable[[str, Mapping[int, Block]], HopAdapter]
    ) -> None:
        self.claims = Claims(limits, capacity, self._forgotten)
        self._make = make
        self._contents: dict[str, _Content] = {}
        self._own: dict[str, str] = {}  # id by name

    # --- the operator's own ---

    def keep(self, name: str, adapter: str, manifest: AdapterManifest) -> None:
        """Hold an adapter for everybody, without an end."""
        self._own[name] = adapter
        self._contents[adapter] = _Content(manifest, name)

    def put(self, adapter: str, block: int, kept: Block) -> None:
        """What an adapter of the operator adds to a block."""
        content = self._contents[adapter]
        content.blocks[block] = kept
        content.hops.clear()

    def own_missing(self, adapter: str, blocks: Iterable[int]) -> list[int]:
        """The blocks of the operator's adapter that were not put yet."""
        return [block for block in blocks if block not in self._contents[adapter].blocks]

    def forget_other_blocks(self, blocks: Blocks) -> None:
        """Keep of the operator's adapters only what belongs to these blocks."""
        for adapter in self._own.values():
            content = self._contents[adapter]
            content.blocks = {
                block: kept for block, kept in content.blocks.items() if block in range(*blocks)
            }
            content.hops.clear()

    @property
    def announced(self) -> tuple[str, ...]:
        """The operator's adapters as a record names them: name#16 digits of the id."""
        return tuple(f"{name}#{adapter[:SHORT_ID]}" for name, adapter in self._own.items())

    # --- guests ---

    def missing(self, peer: str, adapter: str, blocks: Iterable[int]) -> list[int]:
        """The blocks of an adapter that this peer must bring before it can use them."""
        if self._is_own(adapter):
            return []
        claim = self.claims.get(peer, adapter)
        return [block for block in blocks if claim is None or block not in claim.blocks]

    def reserve(
        self,
        peer: str,
        prefix: str,
        adapter: str,
        manifest: AdapterManifest,
        size: int,
        now: float,
        overhead: int = 0,
    ) -> None:
        """Set `size` bytes aside for blobs that a peer is about to bring: see `Claims.reserve`.

        overhead: see `manifest_bytes`.  To be followed by `release`.  Raises Refused, TooManyStreams.
        """
        self.claims.reserve(peer, prefix, adapter, size, now, overhead)
        self._contents.setdefault(adapter, _Content(manifest))

    def add(self, peer: str, adapter: str, block: int, kept: Block, size: int) -> None:
        """A block's blob has come and is sound; its bytes were reserved."""
        claim = self._claim(peer, adapter)
        claim.coming -= size
        claim.blocks[block] = size
        self._contents[adapter].blocks.setdefault(block, kept)

    def release(self, peer: str, adapter: str, size: int, now: float) -> None:
        """An upload has ended, of which `size` reserved bytes have not come."""
        claim = self._claim(peer, adapter)
        claim.coming -= size
        claim.pins -= 1
        claim.used_at = now
        if claim.is_free and not claim.blocks:
            self.claims.forget(claim)

    def drop(self, peer: str, adapter: str) -> None:
        """A peer has no more use for an adapter; it stays while sessions use it."""
        claim = self.claims.get(peer, adapter)
        if claim is not None and claim.is_free:
            self.claims.forget(claim)

    @contextmanager
    def using(
        self, peer: str, adapter: str, blocks: Blocks, clock: Callable[[], float]
    ) -> Iterator[HopAdapter]:
        """What a span computes with for a session or a request of this peer; it stays within the context.

        adapter: an id, or the name of an adapter of the operator (with or without `#` and 16 digits).
        Raises NoAdapter (an id that the peer has not brought for all these blocks), WrongRevision (a name).
        """
        found, content = self._found(peer, adapter, blocks)
        hop = self._hop(found, content, blocks)
        if content.name:
            yield hop
            return
        claim = self._claim(peer, found)
        claim.pins += 1
        try:
            yield hop
        finally:
            claim.pins -= 1
            claim.used_at = clock()

    def _hop(self, adapter: str, content: _Content, blocks: Blocks) -> HopAdapter:
        """One object for all sessions and requests of a run: rows with it are one group of a batch."""
        hop = content.hops.pop(blocks, None)
        if hop is None:
            hop = self._make(adapter, {block: content.blocks[block] for block in range(*blocks)})
        content.hops[blocks] = hop  # the last one that was used stands last
        while len(content.hops) > MAX_HOPS:
            del content.hops[next(iter(content.hops))]
        return hop

    def manifest(self, peer: str, adapter: str, blocks: Blocks) -> tuple[str, AdapterManifest]:
        """The id and the manifest of an adapter that this peer may use.  Raises as `using`."""
        found, content = self._found(peer, adapter, blocks)
        return found, content.manifest

    def _found(self, peer: str, adapter: str, blocks: Blocks) -> tuple[str, _Content]:
        for name, own in self._own.items():
            if adapter in (name, own, f"{name}#{own[:SHORT_ID]}"):
                if not self.own_missing(own, range(*blocks)):
                    return own, self._contents[own]
                raise WrongRevision(f"adapter {name} is not loaded for blocks {blocks}", AGAIN_SECONDS)
        if not is_adapter_id(adapter):
            served = ", ".join(self._own) or "none"
            raise WrongRevision(f"adapter {adapter} was asked for, {served} is served here")
        if self.missing(peer, adapter, range(*blocks)):
            raise NoAdapter(f"adapter {adapter[:SHORT_ID]}... is not held here for blocks {blocks}: offer it")
        return adapter, self._contents[adapter]

    def _is_own(self, adapter: str) -> bool:
        content = self._contents.get(adapter)
        return content is not None and bool(content.name)

    def _claim(self, peer: str, adapter: str) -> Claim:
        claim = self.claims.get(peer, adapter)
        assert claim is not None, "a claim that is in use stays"
        return claim

    def _forgotten(self, claim: Claim) -> None:
        """Free the memory that no other claim to the same adapter needs."""
        content = self._contents.get(claim.adapter)
        if content is None or content.name:
            return
        others = self.claims.of(claim.adapter)
        if not others:
            del self._contents[claim.adapter]
            return
        kept = set(itertools.chain.from_iterable(each.blocks for each in others))
        content.blocks = {block: found for block, found in content.blocks.items() if block in kept}
        content.hops = {run: hop for run, hop in content.hops.items() if kept.issuperset(range(*run))}
