"""One block of the llama family in our own code: its vectors, its linear layers, its numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from node.model.blocks.kv_pages import PagePool
from node.model.weights.quantize import PackedLinear, kernels

_NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Heads:
    """Of the queries, and of the keys and values."""

    heads: int
    key_heads: int
    head_dim: int

    @property
    def widths(self) -> list[int]:
        """Outputs of the product for queries, keys and values."""
        return [count * self.head_dim for count in (self.heads, self.key_heads, self.key_heads)]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A block as the kernels take it: numpy views of its vectors, addresses of its matrices.

    query_norm, key_norm: empty where the model has none.  inner: outputs of the gate.
    """

    norm: NDArray[np.float32]
    mlp_norm: NDArray[np.float32]
    query_norm: NDArray[np.float32]
    key_norm: NDArray[np.float32]
    qkv: NDArray[np.int64]
    out: NDArray[np.int64]
    gate_up: NDArray[np.int64]
    down: NDArray[np.int64]
    inner: int


@dataclass(frozen=True)
class FusedBlock:
    """One block.  Norms' weights are vectors, the others are linear layers.

    query_norm, key_norm: [head_dim] each, or None.  window: positions that attention sees, 0 for all.
    """

    norm: Tensor
    qkv: nn.Module
    out: nn.Module
    mlp_norm: Tensor
    gate_up: nn.Module
    down: nn.Module
    query_norm: Tensor | None
    key_norm: Tensor | None
    rotary: bool
    window: int
    scale: float
    eps: float

    @property
    def matrices(self) -> tuple[nn.Module, ...]:
        """The linear layers of the block."""
        return self.qkv, self.out, self.gate_up, self.down

    @cached_property
    def scale_bits(self) -> int:
        """The scale as compiled attention takes it: the bits of a float32."""
        return int(np.float32(self.scale).view(np.int32))

    @cached_property
    def compiled(self) -> Compiled:
        """The block for the kernels.  The layers' tensors must keep their addresses from now on."""
        return self._compiled_with([_addresses(matrix) for matrix in self.matrices])

    @cached_property
    def compiled_for_many(self) -> Compiled:
        """`compiled` with products over panels, for steps of many rows: `panel_kernels.least_rows`."""
        from node.model.weights.panels import panel_kernels

        found = [_addresses(matrix) for matrix in self.matrices]
        for matrix, addresses in zip(self.matrices, found, strict=True):
            weight = cast(Tensor, matrix.weight)
            if panel_kernels.takes(weight):
                addresses[3] = panel_kernels.product_of(weight.dtype).address
        return self._compiled_with(found)

    def _compiled_with(self, addresses: list[NDArray[np.int64]]) -> Compiled:
        qkv, out, gate_up, down = addresses
        return Compiled(
            norm=self.norm.numpy(),
            mlp_norm=self.mlp_norm.numpy(),
            query_norm=_NOTHING if self.query_norm is None else self.query_norm.numpy(),
            key_norm=_NOTHING if self.key_norm is None else self.key_norm.numpy(),
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            inner=cast(Tensor, self.gate_up.weight).shape[0] // 2,
        )


def place_of(pool: PagePool, index: int) -> NDArray[np.int64]:
    """A block's stores on a CPU as compiled code takes them, by the block's number in the pool.

    The addresses of keys and values, heads and head_dim, bytes of a number.
    """
    keys = pool.keys[index]
    _, heads, head_dim = keys.shape
    addresses = keys.data_ptr(), pool.values[index].data_ptr()
    return np.array((*addresses, heads, head_dim, keys.element_size()), np.int64)


class Tables:
    """Blocks and their stores as `decode_kernels.run` takes them.

    blocks: int64 [blocks, COLUMNS].  epsilons: float32 [blocks].
    """

    def __init__(self, blocks: Sequence[FusedBlock]) -> None:
        self.blocks = table_of(blocks)
        self.epsilons = np.array([block.eps for block in blocks], np.float32)
        self._ends: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        self._places = np.empty((0, 5), np.int64)

    def places(self, pool: PagePool) -> NDArray[np.int64]:
        """`place_of` all blocks of the pool, int64 [blocks, 5]; made anew where the pool has other stores."""
        # The stores between two that are still there are still there too (`PagePool.hold`).
        first, last = pool.keys[0], pool.keys[-1]
        if (
            self._ends is None
            or self._ends[0]() is not first
            or self._ends[1]() is not last
            or len(self._places) != len(pool.keys)
        ):
            self._places = np.stack([place_of(pool, index) for index in range(len(pool.keys))])
            self._ends = weakref.ref(first), weakref.ref(last)
        return self._places


# A row alone: its position, the position's slot, positions to read, and `rows_at` of `decode_kernels.run`.
_POSITION, _SLOT, _SEEN, _PAGES_AT, _PAGES, _SEEN_AT, _PAGE_TOKENS, _WORDS = range(8)


@dataclass(slots=True)
class LoneRow:
    """Decode steps of one row through the blocks `run`, by one thread at a time.

    The arguments of the compiled code stay from token to token.  A pass over the weights leaves neither code
    nor data in the processor's nearer caches: each small array, view or tensor that Python makes around it
    then costs what dozens cost in a loop.  So a step writes three numbers and makes one call.
    kernel: `decode_kernels.run()`.  before: its arguments before `hidden`.  scratch: for queries, keys and
    values, and for what attention answers.  heads: of queries.  places: see `Tables.places`.  angles: cos and
    sin, float32 [positions, head_dim].  attend: the address of attention.
    """

    kernel: Callable[..., None]
    before: tuple[Any, ...]
    scratch: tuple[NDArray[np.float32], NDArray[np.float32]]
    heads: int
    pool: weakref.ref[PagePool]
    places: NDArray[np.int64]
    run: tuple[int, int]
    angles: tuple[NDArray[np.float32], NDArray[np.float32]]
    attend: int
    _after: tuple[Any, ...] = field(init=False)
    _words: NDArray[np.int64] = field(init=False)
    _pages: NDArray[np.int64] | None = None  # of the last row

    def __post_init__(self) -> None:
        pool = self.pool()
        assert pool is not None
        words = self._words = np.zeros(_WORDS, np.int64)
        words[_SEEN_AT], words[_PAGE_TOKENS] = words[_SEEN:].ctypes.data, pool.page_tokens
        start, stop = self.run
        stores = self.places[start - pool.start : stop - pool.start]
        position, slot, rows_at = words[_POSITION:_SLOT], words[_SLOT:_SEEN], words[_PAGES_AT:]
        self._after = (
            *self.scratch, self.heads, stores, position, slot, *self.angles, self.attend, rows_at, 0, start
        )  # fmt: skip

    def fits(self, pool: PagePool, places: NDArray[np.int64], run: tuple[int, int], position: int) -> bool:
        """Whether a step at this position may be computed with these arguments."""
        return (
            self.pool() is pool
            and self.places is places
            and self.run == run
            and position < len(self.angles[0])
        )

    def compute(self, hidden: NDArray[np.float32], pages: NDArray[np.int64], position: int) -> None:
        """The step in place.

        hidden: float32 [1, hidden_size].  pages: of the row, in order.  position: the new one's, of which the
        row owns the page.
        """
        words = self._words
        if pages is not self._pages:
            self._pages = pages
            words[_PAGES_AT], words[_PAGES] = pages.ctypes.data, len(pages)
        page, place = divmod(position, int(words[_PAGE_TOKENS]))
        words[_POSITION] = position
        words[_SLOT] = pages[page] * words[_PAGE_TOKENS] + place
        words[_SEEN] = position + 1
        self.kernel(*self.before, hidden, *self._after)


def table_of(blocks: Sequence[FusedBlock]) -> NDArray[np.int64]:
    """The blocks as `decode_kernels.run` takes them, int64 [blocks, COLUMNS]."""
    found = decode_kernels()
    assert found is not None
    table = np.zeros((len(blocks), found.COLUMNS), np.int64)
    for row, block in zip(table, blocks, strict=True):
        it = block.compiled
        matrices = (
            (found.QKV, it.qkv),
            (found.OUT, it.out),
            (found.GATE_UP, it.gate_up),
            (found.DOWN, it.down),
        )
        for place, matrix in matrices:
            row[place : place + len(matrix)] = matrix
        row[found.NORM], row[found.MLP_NORM] = it.norm.ctypes.data, it.mlp_norm.ctypes.data
        if it.query_norm.size and it.key_norm.size:
            row[found.QUERY_NORM], row[found.KEY_NORM] = it.query_norm.ctypes.data, it.key_norm.ctypes.data
        row[found.INNER], row[found.ROTARY] = it.inner, block.rotary
        row[found.SCALE], row[found.WINDOW] = block.scale_bits, block.window
    return table


def kept_in(linear: nn.Module) -> torch.dtype | None:
    """The dtype of a layer's weights, where the kernels can read them as they lie."""
    if not isinstance(linear, PackedLinear) and type(linear) is not nn.Linear:
        return None
    weight, bias = linear.weight, cast("Tensor | None", linear.bias)
    sound = weight.is_contiguous() and (isinstance(linear, PackedLinear) or weight.dtype == torch.float32)
    sound = sound and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
    return weight.dtype if sound else None


def _addresses(linear: nn.Module) -> NDArray[np.int64]:
    found = decode_kernels()
    assert found is not None
    scale = linear.scale if isinstance(linear, PackedLinear) else None
    return cast("NDArray[np.int64]", found.addresses_of(linear.weight, scale, linear.bias))


def decode_kernels() -> ModuleType | None:
    """node/model/weights/decode_kernels.py; None where numba cannot be imported."""
    if kernels() is None:
        return None
    from node.model.weights import decode_kernels

    return decode_kernels


def decode_attention() -> ModuleType | None:
    """node/model/attention/decode.py; None where numba cannot be imported."""
    if kernels() is None:
        return None
    from node.model.attention import decode

    return decode


def prefill_attention() -> ModuleType:
    """node/model/attention/prefill.py.  Raises ImportError where numba cannot be imported."""
    from node.model.attention import prefill

    return prefill
