"""Adapters of a few numbers, and a node's adapters in memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from node.serving.adapters.desk import AdapterDesk, open_desk
from tensor_codec.adapters import AdapterContent, AdapterManifest, LoraSite
from tensor_codec.limits import MIB, Limits
from tests.fakes_serving import HIDDEN

SITES = ("q_proj", "v_proj")


def shapes(start: int, stop: int) -> dict[int, dict[str, tuple[int, int]]]:
    """(in, out) of the linears of blocks [start, stop), as a server of a model without prefixes has them."""
    return {block: dict.fromkeys(SITES, (HIDDEN, HIDDEN)) for block in range(start, stop)}


def content(
    rank: int = 1,
    *,
    blocks: int = 6,
    seed: int = 0,
    names: Sequence[str] = SITES[:1],
    empty: Sequence[int] = (),
    revision: str = "r",
    values: Sequence[float] | None = None,
) -> AdapterContent:
    """An adapter of `rank` at linears of these names, but for blocks that are `empty`, in fp32.

    values: of every block's blob; None: whole numbers that follow from `seed`.
    """
    sites = tuple(LoraSite(name, rank, 1.0) for name in names)
    table = tuple(() if block in empty else sites for block in range(blocks))
    blobs = []
    for block, own in enumerate(table):
        count = sum(site.rank * 2 * HIDDEN for site in own)
        numbers = values or [float((seed + 7 * block + at) % 11 - 5) for at in range(count)]
        blobs.append(struct.pack(f"<{count}f", *numbers[:count]))
    return AdapterContent(AdapterManifest(revision, "fp32", table), tuple(blobs))


def prefix(virtual_tokens: int = 2, *, blocks: int = 6, seed: int = 0) -> AdapterContent:
    """A prefix of whole numbers in fp32; a key has HIDDEN values."""
    count = 2 * virtual_tokens * HIDDEN
    blobs = (
        struct.pack(f"<{count}f", *((seed + 5 * block + at) % 7 for at in range(count)))
        for block in range(blocks)
    )
    return AdapterContent(
        AdapterManifest("r", "fp32", ((),) * blocks, "prefix", virtual_tokens), tuple(blobs)
    )


def a_desk(
    limits: Limits | None = None, *, blocks: int = 6, capacity: int = MIB, sum_capacity: int = MIB
) -> AdapterDesk:
    """The adapters of a node that serves a model of so many blocks."""
    return open_desk(limits or Limits(), blocks, "cpu", capacity, sum_capacity)
