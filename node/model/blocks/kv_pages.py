"""The keys and values of all sessions of a span, in pages: memory follows the most that was in use at a time.

Each block has one store of keys and one of values, [tokens, heads, head_dim], made once at start.  On a CPU
each has memory of its own; on other devices stores of one shape are parts of one tensor (`StoreBlocks`).
A row of a session owns pages of 16 positions, in any order; a list of each row names the page of each of
its positions (the idea of PagedAttention, arXiv:2309.06180).  A page is never moved: a session that grows
takes another page, and going back sets a number.  A page takes memory once it has been written to, and keeps
it: rows get pages from the beginning of the stores, where others were before (`_window`).  A span that takes
other blocks changes the list of stores alone: a page is the same for every block.  Sliding-window blocks keep
all positions too: positions outside the window are masked, and going back needs no snapshot.

The last page of every store belongs to no row.  A batch reads from it, masked, the positions after the end
of its shorter rows.  It holds zeros, or the writes of a CUDA graph's padding rows.
`node.serving.cache_budget` decides how many pages a session may take; a missing page is a bug here.

A convolution's state (lfm2) is not positional and stays with its session.  It holds only the last tokens, so
its cache can be cut to nothing and to no other length.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from node.model.blocks.device.staging import numbers_on
from node.model.blocks.device.stores import Store, StoreBlocks
from tensor_codec.errors import LocalProtocolError, Refused
from tensor_codec.memory import forget, set_aside

PAGE_TOKENS = 16
SPARE_SHARE = 0.5  # of the owned pages: with 1.0 rows lie in half as many pieces, in a quarter more memory
LEAST_WINDOW = 64  # pages
COPIED_BYTES = 8 << 20  # at a time: the copy on its way takes memory beside the stores


class CannotCut(Refused):
    """The model keeps a state that cannot go back to an earlier position."""

    code = "cannot_cut"


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Heads and head_dim of the keys and of the values that one block caches for a position."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def values(self) -> int:
        """Numbers for each position."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim


class KeysAndValues(Protocol):
    """A block's part of a prefix, [virtual tokens, heads * head_dim] each."""

    @property
    def keys(self) -> Tensor:
        """As they lie in the cache, without rotary angles."""

    @property
    def values(self) -> Tensor:
        """See `keys`."""


class Prefix(Protocol):
    """The part of `node.model.adapters.prefix.SpanPrefix` that a cache needs."""

    @property
    def virtual_tokens(self) -> int:
        """Positions in front of the text."""

    @property
    def blocks(self) -> Mapping[int, KeysAndValues]:
        """By the blocks' numbers in the model."""


class RowStates(Protocol):
    """A convolution's states of a session's rows, as the library keeps them."""

    def begin(self, position: int, tokens: int) -> None:
        """A step comes, the next one or the last one again."""

    def go_back(self, position: int) -> None:
        """Undo the last step where it began at this position."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row beam_idx[i]."""


class PagePool:
    """The stores of a span, and the owner of each page.  Used by one thread, but for `open`."""

    def __init__(
        self,
        start: int,
        shapes: Sequence[BlockShape | None],
        tokens: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        """shapes: of each block from `start` on, None for one without attention.

        tokens: positions of all rows together, rounded up to pages.  max_length: of one row.
        """
        self.page_tokens = page_tokens
        self.pages = -(-tokens // page_tokens)
        self.max_length = max_length
        self.device = torch.device(device)
        self.start = start
        self.shapes: tuple[BlockShape | None, ...] = ()
        self._blocks = StoreBlocks(dtype, self.device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._opening = threading.Lock()
        self.hold(start, shapes)
        self._free = np.ones(self.pages, bool)
        self._free_pages = self.pages
        self._free_rows: list[int] = []
        self._pages: list[NDArray[np.int64]] = []  # of each row, as many as it has needed, or `nobodys_page`

    def hold(self, start: int, shapes: Sequence[BlockShape | None]) -> None:
        """Have stores for these blocks from now on; blocks that had stores before keep them.

        Sessions that use no other blocks go on undisturbed.
        """
        if self.device.type != "cpu":
            return self._hold_on_device(start, shapes)
        both = zip(self.keys, self.values, strict=True)
        known = {self.start + index: stores for index, stores in enumerate(both)}
        slots = (self.pages + 1) * self.page_tokens
        stores = [
            known.get(block) or tuple(_zeros((slots, *each), self.dtype) for each in _heads(shape))
            for block, shape in enumerate(shapes, start)
        ]
        self.start, self.shapes = start, tuple(shapes)
        self.keys, self.values = [keys for keys, _ in stores], [values for _, values in stores]
        self._stores = [store for store in (*self.keys, *self.values) if store.numel()]
        return None

    def _hold_on_device(self, start: int, shapes: Sequence[BlockShape | None]) -> None:
        slots = (self.pages + 1) * self.page_tokens
        wanted: dict[Store, tuple[int, ...]] = {}
        for block, shape in enumerate(shapes, start):
            key, value = _heads(shape)
            wanted[block, "keys"], wanted[block, "values"] = (slots, *key), (slots, *value)
        found = self._blocks.hold(wanted)
        self.start, self.shapes = start, tuple(shapes)
        blocks = range(start, start + len(shapes))
        self.keys = [found[block, "keys"] for block in blocks]
        self.values = [found[block, "values"] for block in blocks]
        self._stores = self._blocks.tensors

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._blocks.dtype

    @property
    def nobodys_page(self) -> int:
        """The page that belongs to no row: the last one of every store."""
        return self.pages

    @property
    def free_tokens(self) -> int:
        """Positions in pages without an owner."""
        return self._free_pages * self.page_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the stores when all of them are in use."""
        return sum(store.nbytes for store in self._stores)

    def open(self, batch: int, max_length: int) -> SpanCache:
        """A cache for `batch` rows of up to `max_length` positions; it owns no page yet."""
        if max_length > self.max_length:
            raise LocalProtocolError(f"a cache of {max_length} positions, rows have {self.max_length}")
        with self._opening:
            while len(self._free_rows) < batch:
                self._free_rows.append(len(self._pages))
                self._pages.append(np.empty(0, np.int64))
            rows_taken = np.array([self._free_rows.pop() for _ in range(batch)], dtype=np.int64)
        return SpanCache(self, rows_taken, max_length, keeps_last_states=self.device.type != "cpu")

    def table(self, rows: NDArray[np.int64], pages: int) -> NDArray[np.int64]:
        """The first pages of these rows, `nobodys_page` where a row has fewer: [rows, pages]."""
        table = np.full((len(rows), pages), self.nobodys_page, np.int64)
        for index, row in enumerate(rows.tolist()):
            owned = self._pages[row][:pages]
            table[index, : len(owned)] = owned
        return table

    def pages_of(self, row: int) -> NDArray[np.int64]:
        """The pages of a row, in order; after them `nobodys_page`, any number of times."""
        return self._pages[row]

    def slots(self, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Where the positions [0, length) of these rows lie in the stores: [rows, length]."""
        pages = self.table(rows, -(-length // self.page_tokens))
        within = np.arange(self.page_tokens)
        slots = pages[:, :, None] * self.page_tokens + within
        return slots.reshape(len(rows), -1)[:, :length]

    def slots_of(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where some positions of each row lie: positions [rows] or [rows, positions], owned by the row."""
        wanted = positions // self.page_tokens
        pages = np.array([self._pages[row][wanted[i]] for i, row in enumerate(rows.ravel().tolist())])
        return pages * self.page_tokens + positions % self.page_tokens

    def take(self, row: int, first: int, count: int) -> None:
        """Give `row` pages for its page numbers first ... first + count - 1.

        Neighbours where they are free, so that a row that is alone can be read without a copy.
        """
        if count > self._free_pages:
            raise LocalProtocolError(f"{count} pages of the pool are needed, {self._free_pages} are free")
        with self._opening:
            self._take(row, first, count)

    def _take(self, row: int, first: int, count: int) -> None:
        pages = self._pages[row]
        if first + count > len(pages):  # by doubling: a row takes a page at a time
            grown = np.full(max(first + count, 2 * len(pages)), self.nobodys_page, np.int64)
            grown[: len(pages)] = pages
            self._pages[row] = pages = grown
        near = int(pages[first - 1]) + 1 if first else self.pages
        begin = near
        for index in range(first, first + count):
            if near >= self._window or not self._free[near]:
                self._clear(begin, near)
                begin = near = _roomiest(self._free[: self._window])
            pages[index] = near
            self._free[near] = False
            self._free_pages -= 1
            near += 1
        self._clear(begin, near)

    def _clear(self, first: int, last: int) -> None:
        """Zero the pages [first, last), one call for each store.

        Another session may have left NaN there, and a masked NaN is still NaN.
        """
        if first < last:
            begin, count = first * self.page_tokens, (last - first) * self.page_tokens
            for store in self._stores:
                store.narrow(-3, begin, count).zero_()

    def give_back(self, row: int, first: int, count: int) -> None:
        """Take the pages first ... first + count - 1 of `row` away."""
        with self._opening:
            pages = self._pages[row][first : first + count]
            self._free[pages] = True
            self._free_pages += len(pages)
            pages[:] = self.nobodys_page
            if not first:
                self._pages[row] = np.empty(0, np.int64)

    def give_back_memory(self) -> None:
        """Give the memory of pages without an owner back to the system, where it can take it: from a CPU.

        Runs in the torch thread, which alone takes pages.
        """
        if self.device.type != "cpu":
            return
        for start, stop in _runs(self._free):
            for store in self._stores:
                give_back(store[start * self.page_tokens : stop * self.page_tokens])

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy the pages `sources`, [n], to the pages `targets`, [n], none of which is a source."""
        copy = copy_runs if self.device.type == "cpu" else copy_indexed
        for store in self._stores:
            copy(store.view(*store.shape[:-3], -1, self.page_tokens, *store.shape[-2:]), sources, targets)

    def close_rows(self, rows: NDArray[np.int64]) -> None:
        """Let rows without pages be used again."""
        with self._opening:
            self._free_rows += rows.tolist()

    @property
    def _window(self) -> int:
        """The pages [0, window) are given out: all owned pages would fit into it, and one page more."""
        owned = self.pages - self._free_pages + 1
        return min(self.pages, max(LEAST_WINDOW, owned + int(SPARE_SHARE * owned)))


@dataclass(slots=True)
class SpanCache:
    """One session's rows in a page pool.

    rows: their numbers in the pool's table, [batch].  length: positions that every block of the session's run
    has computed.  The caller moves it after the whole step, so a failed step leaves no trace in it.  A
    convolution's state may have moved by then: on a device it goes back when the step comes again, on a CPU
    its session must begin again.
    virtual_tokens: of a prefix, in the first places of every row.  Lengths and positions do not count them.
    """

    pool: PagePool
    rows: NDArray[np.int64]
    max_length: int
    length: int = 0
    pages: int = 0  # of each row
    states: dict[int, RowStates] = field(default_factory=dict)  # of convolutions, by block
    closed: bool = False
    virtual_tokens: int = 0
    keeps_last_states: bool = False  # of convolutions, so that a step can come again

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that the session owns now."""
        slots = self.pages * self.pool.page_tokens * self.batch
        item = self.pool.keys[0].element_size()
        return slots * item * sum(shape.values for shape in self.pool.shapes if shape)

    @property
    def can_cut(self) -> bool:
        """Whether the cache can go back to any earlier length."""
        return not self.states

    def reserve(self, length: int) -> None:
        """Own pages for the positions [0, length) of every row."""
        if self.closed or length > self.max_length:
            raise LocalProtocolError(f"{length} positions in a cache of {self.max_length}")
        more = -(-(self.virtual_tokens + length) // self.pool.page_tokens) - self.pages
        if more > 0:
            if more * self.batch * self.pool.page_tokens > self.pool.free_tokens:
                raise LocalProtocolError(
                    f"{more * self.batch} pages of the pool are needed,"
                    f" {self.pool.free_tokens} tokens are free"
                )
            for row in self.rows:
                self.pool.take(int(row), self.pages, more)
            self.pages += more

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on, and give back the pages after it.

        Raises CannotCut, and ValueError for a length that was not reached.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        if self.states and length < self.length:
            if length:
                raise CannotCut(f"a convolution's state cannot go back from {self.length} to {length}")
            self.states.clear()
        self.length = length
        self._keep(self._filled)

    def begin_with(self, prefix: Prefix) -> None:
        """Put a prefix into the first places of every row of an empty cache, and own the pages for it.

        prefix: for the blocks of the session's run.  Runs in the torch thread.
        """
        if self.length or self.virtual_tokens:
            raise LocalProtocolError(f"a prefix in a cache of {self.length} tokens")
        count = self.virtual_tokens = prefix.virtual_tokens
        self.reserve(0)
        (rows,) = numbers_on(self.pool.device, self.pool.slots(self.rows, count))
        for block, own in prefix.blocks.items():
            index = block - self.pool.start
            for store, given in ((self.pool.keys[index], own.keys), (self.pool.values[index], own.values)):
                wide = given.detach().to(store.device, store.dtype).view(count, *store.shape[1:])
                for slots in rows:
                    store.index_copy_(0, slots, wide)

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes the former row order[i], over all positions.  order: [batch], each below batch.

        A row that is named goes to its place without a copy.  Named again, it is copied into the pages of a
        row that is not named: the number of pages stays the same.
        """
        named = np.array(order, np.int64)
        first = np.zeros(self.batch, bool)  # whether a place takes its row itself
        first[np.unique(named, return_index=True)[1]] = True
        rows = self.rows[named]
        rows[~first] = np.delete(self.rows, named)
        filled = self._filled
        if filled and not first.all():
            sources, targets = self.rows[named[~first]], rows[~first]
            self.pool.copy(*(self.pool.table(each, filled).ravel() for each in (sources, targets)))
        self.rows = rows
        if self.states:
            (index,) = numbers_on(self.pool.device, named)
            for state in self.states.values():
                state.go_back(self.virtual_tokens + self.length)  # a step may have failed
                state.reorder_cache(index)

    def close(self) -> None:
        """Give everything back."""
        if not self.closed:
            self._keep(0)
            self.pool.close_rows(self.rows)
            self.states.clear()
            self.closed = True

    @property
    def _filled(self) -> int:
        """Pages of each row that the length takes."""
        return -(-(self.virtual_tokens + self.length) // self.pool.page_tokens)

    def _keep(self, pages: int) -> None:
        if pages < self.pages:
            for row in self.rows:
                self.pool.give_back(int(row), pages, self.pages - pages)
            self.pages = pages


def _runs(chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The runs of neighbours that are True, as [start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def give_back(slots: Tensor) -> None:
    """Give the memory of these neighbouring slots of a store on a CPU back: they read as zeros afterwards."""
    forget(slots.data_ptr(), slots.nbytes)


def copy_runs(pages: Tensor, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
    """Copy pages run by run of neighbours, without memory beside them: the way of a CPU.

    pages: [..., pages, positions, heads, head_dim].
    """
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    for first, last in pairwise([0, *breaks.tolist(), len(sources)]):
        given, taken, size = int(sources[first]), int(targets[first]), last - first
        pages.narrow(-4, taken, size).copy_(pages.narrow(-4, given, size))


def copy_indexed(pages: Tensor, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
    """Copy pages with few kernels, up to COPIED_BYTES at a time: the way of a GPU."""
    at_once = max(1, COPIED_BYTES // pages.select(-4, 0).nbytes)
    both = numbers_on(pages.device, sources, targets)
    for given, taken in zip(*(torch.split(each, at_once) for each in both), strict=True):
        pages.index_copy_(-4, taken, pages.index_select(-4, given))


def _heads(shape: BlockShape | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and head_dim of keys and of values; none for a block without attention."""
    if shape is None:
        return (0, 0), (0, 0)
    return (shape.key_heads, shape.key_dim), (shape.value_heads, shape.value_dim)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory only once they are written to, where the system can do that."""
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    if not size:
        return torch.zeros(shape, dtype=dtype)
    pages = set_aside(size)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _roomiest(free: NDArray[np.bool_]) -> int:
    """A page in the longest run of free pages within the window.

    The run's first page, or its middle one after another row's last page, so that both rows can grow.
    """
    start, stop = max(_runs(free), key=lambda run: run[1] - run[0])
    return start if start == 0 or stop - start < 4 else (start + stop) // 2
