"""Everything about adapters that a node has once, for all spans that it serves one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from node.model.adapters.blobs import read_block
from node.model.adapters.low_rank import SpanAdapter
from node.runtime.compute_thread import Runner
from node.serving.adapters.store import AdapterStore, Block
from node.serving.adapters.sums import GradientSums, Shape, Shapes
from node.serving.adapters.uploads import Uploads
from tensor_codec.adapters import AdapterManifest, LoraSite
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits

EXPIRE_SECONDS = 5.0  # between two looks for what nobody has used for long


class ReadBlock(Protocol):
    """`node.model.adapters.blobs.read_block` for a device: what a blob adds to a block."""

    def __call__(self, sites: Sequence[LoraSite], shapes: Shape, dtype: str, blob: Buffer, /) -> Block:
        """Runs in the torch thread.  Raises MessageError: a wrong size, values not finite or too large."""


@dataclass(frozen=True, slots=True)
class OwnAdapter:
    """An adapter that the operator keeps for everybody.

    name: at most 28 characters.  id: of the content.  blobs: of every block of the model.
    """

    name: str
    id: str
    manifest: AdapterManifest
    blobs: Sequence[Buffer] = field(repr=False)


@dataclass(frozen=True, slots=True)
class AdapterDesk:
    """A node's adapters, and the sums of their gradients.

    blocks: of the model.  read: of a blob.  own: the operator's.
    """

    store: AdapterStore
    uploads: Uploads
    sums: GradientSums
    blocks: int
    read: ReadBlock
    own: tuple[OwnAdapter, ...] = ()

    async def load_own(self, blocks: Sequence[int], shapes: Shapes, compute: Runner) -> None:
        """Have the operator's adapters for these blocks.  Raises MessageError."""
        for each in self.own:
            for block in self.store.own_missing(each.id, blocks):
                sites, dtype = each.manifest.blocks[block], each.manifest.dtype
                blob = each.blobs[block]
                kept = await compute.run(self.read, sites, shapes[block], dtype, blob)
                self.store.put(each.id, block, kept)

    async def expire(self) -> None:
        """Forget what was not used for long, until cancelled."""
        while True:
            await trio.sleep(EXPIRE_SECONDS)
            self.store.claims.expire(trio.current_time())
            self.sums.expire(trio.current_time())


def open_desk(
    limits: Limits, blocks: int, device: str, capacity: int, sum_capacity: int, own: Sequence[OwnAdapter] = ()
) -> AdapterDesk:
    """The adapters of a node that serves a model of so many blocks.

    capacity, sum_capacity: bytes for guests' adapters, and for the sums of their gradients.
    """
    store = AdapterStore(limits, capacity, SpanAdapter)
    for each in own:
        store.keep(each.name, each.id, each.manifest)
    read = partial(_read_on, device)
    return AdapterDesk(store, Uploads(limits), GradientSums(limits, sum_capacity), blocks, read, tuple(own))


def _read_on(device: str, sites: Sequence[LoraSite], shapes: Shape, dtype: str, blob: Buffer) -> Block:
    return read_block(sites, shapes, dtype, blob, device)
