"""Everything about adapters that a node has once, for all spans that it serves one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from node.model.adapters.blobs import read_block, span_adapter
from node.network.sharing.seeder import Seeder
from node.network.sharing.seeds import Seed, Seeds
from node.runtime.compute_thread import Runner
from node.serving.adapters.store import AdapterStore, Block
from node.serving.adapters.sums import GradientSums, Shape, Shapes
from node.serving.adapters.uploads import Uploads
from routing.sharing.cards import verify_card
from tensor_codec.adapters import AdapterManifest, LoraSite
from tensor_codec.errors import MessageError
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
    card: signed by its author, where there is one; else the node signs one.
    """

    name: str
    id: str
    manifest: AdapterManifest
    blobs: Sequence[Buffer] = field(repr=False)
    card: bytes = b""


@dataclass(frozen=True, slots=True)
class AdapterDesk:
    """A node's adapters, and the sums of their gradients.

    blocks: of the model.  read: of a blob.  own: the operator's.  seeder: gives the operator's to others.
    """

    store: AdapterStore
    uploads: Uploads
    sums: GradientSums
    blocks: int
    read: ReadBlock
    seeder: Seeder
    own: tuple[OwnAdapter, ...] = ()

    async def load_own(self, blocks: Sequence[int], shapes: Shapes, compute: Runner) -> None:
        """Have the operator's adapters for these blocks.  Raises MessageError."""
        for each in self.own:
            if each.manifest.kind == "prefix":  # a client must know where its text begins
                raise MessageError(
                    f"{each.name} is a prefix: clients bring theirs, only lora is kept for all"
                )
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
    limits: Limits,
    blocks: int,
    device: str,
    capacity: int,
    sum_capacity: int,
    own: Sequence[OwnAdapter] = (),
    sign: Callable[[OwnAdapter], bytes] | None = None,
) -> AdapterDesk:
    """The adapters of a node that serves a model of so many blocks.

    capacity, sum_capacity: bytes for guests' adapters, and for the sums of their gradients.
    sign: a card for an adapter without one; None: the operator's adapters are given to nobody.
    """
    store = AdapterStore(limits, capacity, span_adapter)
    for each in own:
        store.keep(each.name, each.id, each.manifest)
    seeds = [] if sign is None else [_seed(each, sign, limits) for each in own]
    return AdapterDesk(
        store,
        Uploads(limits),
        GradientSums(limits, sum_capacity),
        blocks,
        partial(_read_on, device),
        Seeder(Seeds(seeds), limits),
        tuple(own),
    )


def _seed(own: OwnAdapter, sign: Callable[[OwnAdapter], bytes], limits: Limits) -> Seed:
    is_own = bool(own.card) and verify_card(own.card, limits).id == own.id
    wire = own.card if is_own else sign(own)
    return Seed.of(verify_card(wire, limits), wire, own.manifest, own.blobs)


def _read_on(device: str, sites: Sequence[LoraSite], shapes: Shape, dtype: str, blob: Buffer) -> Block:
    return read_block(sites, shapes, dtype, blob, device)
