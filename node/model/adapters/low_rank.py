"""The values of an adapter for a span's blocks, as they are kept: low-rank matrices of linears.

A linear with low-rank matrices answers `W x + scale * B (A x)` (LoRA, arXiv:2106.09685).  The compiled blocks
read B in tiles (see node/model/weights/low_rank_kernel.py).  It is kept once: in tiles from the first
compiled step on, else as it came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tensor_codec.errors import LocalProtocolError

TILE = 16  # outputs in a tile of B, at most: lanes of a vector


class LowRank:
    """Low-rank matrices of one linear: a [rank, in] and b [out, rank] of one float dtype, and a scale.

    Both may be leaves of autograd.
    """

    __slots__ = ("_b", "_tiles", "a", "outs", "scale")

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or a.dtype != b.dtype:
            raise ValueError(
                f"A [rank, in] and B [out, rank] are needed, not {a.dtype} {tuple(a.shape)}"
                f" and {b.dtype} {tuple(b.shape)}"
            )
        self.a = a
        self.scale = float(scale)
        self.outs = len(b)
        self._b: Tensor | None = b
        self._tiles: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def b(self) -> Tensor:
        """B [out, rank]; a copy once it lies in tiles."""
        b, tiles = self._b, self._tiles
        if b is not None:
            return b
        assert tiles is not None
        return tiles.transpose(1, 2).reshape(-1, self.rank)[: self.outs]

    @property
    def values(self) -> int:
        """Numbers in A and B."""
        return self.rank * (self.a.shape[1] + self.outs)

    @property
    def nbytes(self) -> int:
        """Bytes of both, with B in tiles: the most that they take."""
        return self.a.nbytes + -(-self.outs // TILE) * TILE * self.rank * self.a.element_size()

    def in_tiles(self, lanes: int) -> Tensor:
        """B as [tiles, rank, lanes], filled up with zeros; from now on it is kept so alone."""
        if self._tiles is None:
            assert self._b is not None
            outs = -(-self.outs // lanes) * lanes
            wide = functional.pad(self._b.detach(), (0, 0, 0, outs - self.outs))
            self._tiles = wide.view(-1, lanes, self.rank).transpose(1, 2).contiguous()
            self._b = None
        return self._tiles

    def added(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """scale * B (A x) for x [..., in]: [..., out] in `dtype`.

        Computed in the wider dtype of x and the values, in the order of peft's Linear.
        """
        if self.a.device != x.device:
            self._move(x.device)
        wide = torch.promote_types(x.dtype, self.a.dtype)
        low = functional.linear(x.to(wide), self.a.to(wide))
        return (functional.linear(low, self.b.to(wide)) * self.scale).to(dtype)

    def _move(self, device: torch.device) -> None:
        """Keep the values on another device from now on, and there alone: once, and not for each step."""
        with torch.inference_mode(False):  # a backward may be what uses them next
            self.a, self._b, self._tiles = self.a.to(device), self.b.to(device), None


BlockAdapter = Mapping[str, LowRank]
# Of each block and site: the gradients of A and B, float32.
AdapterGradients = Mapping[int, Mapping[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True, eq=False)
class SpanAdapter:
    """An adapter for a run of blocks.

    id: of the whole adapter.  blocks: of each block of the run, by its number in the model, what it adds to
    linears by their names (`node.model.adapters.sites`); an empty mapping for none.
    """

    id: str
    blocks: Mapping[int, BlockAdapter]
    _tables: dict[tuple[str, ...], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(low.nbytes for block in self.blocks.values() for low in block.values())

    @property
    def rank(self) -> int:
        """The largest rank; 0 without any site."""
        return max((low.rank for block in self.blocks.values() for low in block.values()), default=0)

    @property
    def kept_bytes(self) -> int:
        """The most bytes that a backward keeps of a position for the products in one block.

        In float32 the input of each linear, which frozen weights alone do not need, and A times it.
        """
        return 4 * max(
            (sum(low.rank + low.a.shape[1] for low in block.values()) for block in self.blocks.values()),
            default=0,
        )

    @property
    def virtual_tokens(self) -> int:
        """Positions in front of the text: those of a prefix."""
        return 0

    def pairs(self, block: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What is trained in a block: A and B by the names of their linears."""
        return {name: (low.a, low.b) for name, low in self.blocks[block].items()}

    def values(self, start: int, stop: int) -> int:
        """Numbers in the matrices of blocks [start, stop).  Raises LocalProtocolError for a missing block."""
        self.check(start, stop)
        return sum(low.values for block in range(start, stop) for low in self.blocks[block].values())

    def check(self, start: int, stop: int) -> None:
        """Raise LocalProtocolError unless the adapter is here for all blocks of a run."""
        for block in range(start, stop):
            if block not in self.blocks:
                here = f"{min(self.blocks)}:{max(self.blocks) + 1}" if self.blocks else "none"
                raise LocalProtocolError(f"adapter {self.id:.16} is here for blocks {here}, not for {block}")

    def table_at(self, sites: Sequence[str], kernel: Any) -> int:
        """The address of the kernels' table at block 0, which is read for the blocks of the adapter alone.

        sites: names of linears in the order of the table.  kernel: node/model/weights/low_rank_kernel.py.
        The table lives as long as the adapter.
        """
        key = tuple(sites)
        table = self._tables.get(key)
        first = min(self.blocks, default=0)
        if table is None:
            table = np.zeros((max(self.blocks, default=-1) + 1 - first, len(key), kernel.ENTRY), np.int64)
            for block, matrices in self.blocks.items():
                for site, name in enumerate(key):
                    if (low := matrices.get(name)) is not None:
                        table[block - first, site] = _entry(low, kernel.LANES)
            self._tables[key] = table
        return int(table.ctypes.data - first * len(key) * kernel.ENTRY * table.itemsize)


def _entry(low: LowRank, lanes: int) -> tuple[int, int, int, int, int]:
    if not low.a.is_contiguous() or low.a.dtype not in (torch.float32, torch.bfloat16) or not low.a.is_cpu:
        raise ValueError(f"contiguous float32 or bfloat16 values on the CPU are needed, not {low.a.dtype}")
    scale = int(np.float32(low.scale).view(np.int32))
    return low.a.data_ptr(), low.in_tiles(lanes).data_ptr(), low.rank, scale, low.a.element_size()


@dataclass(frozen=True, slots=True)
class Group:
    """Rows [first, last) of a batch with one adapter."""

    adapter: SpanAdapter
    first: int
    last: int


Groups = tuple[Group, ...]  # in the order of their rows; other rows have no adapter


def groups_of(adapters: Sequence[SpanAdapter | None], rows: Sequence[int]) -> Groups:
    """The groups of a batch.  adapters, rows: of each session, in the order of the batch's rows."""
    groups: list[Group] = []
    first = 0
    for adapter, count in zip(adapters, rows, strict=True):
        last = first + count
        if groups and groups[-1].adapter is adapter and groups[-1].last == first:
            groups[-1] = Group(groups[-1].adapter, groups[-1].first, last)
        elif adapter is not None:
            groups.append(Group(adapter, first, last))
        first = last
    return tuple(groups)


def part_of(groups: Groups, first: int, last: int) -> Groups:
    """The groups of the rows [first, last), counted from the first of them."""
    return tuple(
        Group(each.adapter, max(each.first, first) - first, min(each.last, last) - first)
        for each in groups
        if each.first < last and first < each.last
    )


def parts_of(groups: Groups, block: int, name: str) -> list[tuple[LowRank, int, int]]:
    """The matrices that groups add to one linear of a block, with their rows [first, last)."""
    found = ((each.adapter.blocks[block].get(name), each.first, each.last) for each in groups)
    return [(low, first, last) for low, first, last in found if low is not None]
