"""Steps of fused blocks on a GPU: ten kernels a block, one copy in, one out, and nobody waits in between.

A block is norm, product, rotary angles with the write of keys and values, attention over the pages in place,
product; norm, product, the gate, product.  The addition of a product to the hidden states is a part of the
norm after it.  The kernels and what replaces them are in `node.model.cuda.ops`.

A decode step reads lengths and pages from the device, so its launches depend on its number of rows alone,
and they are replayed as a CUDA graph (`node.model.blocks.graphs`).  Rows with an adapter are computed
without one: a graph has no place for an adapter's addresses.  So are products of LLM.int8(), which wait for
the device to know their outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from node.model.adapters.low_rank import Groups
from node.model.adapters.products import QKV, Products
from node.model.blocks.device.causal import attended
from node.model.blocks.device.staging import (
    FIRST_PAGES,
    NOBODY,
    Inputs,
    Layout,
    Rows,
    Stage,
    bucket,
    chunk_on,
    from_stage,
    to_device,
)
from node.model.blocks.fused_block import FusedBlock, Heads
from node.model.blocks.graphs import MAX_ROWS, ROWS, Capture, DecodeGraphs
from node.model.blocks.kv_pages import PagePool
from node.model.cuda import ops

MOST_FIRST_ANGLES = 1 << 16  # positions: 32 MiB with heads of 128 in 16 bits; doubled for a longer session


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Positions of one session's rows, on the device.

    places, slots: int32 [batch * tokens].  read: slots of all positions so far, int32 [batch * length];
    None where they are neighbours, from `first` on.
    """

    batch: int
    length: int
    places: Tensor
    slots: Tensor
    first: int
    read: Tensor | None

    def all_of(self, store: Tensor) -> Tensor:
        """The keys or values of all positions: [batch, length, heads, head_dim]."""
        if self.read is None:
            return store.narrow(0, self.first, self.length).unsqueeze(0)
        return store.index_select(0, self.read).view(self.batch, self.length, *store.shape[1:])


@dataclass(eq=False)
class DeviceSteps:
    """The steps of the blocks from `start` on.

    device, dtype: of the blocks' vectors and of hidden states.  new_capture: see `DecodeGraphs`; None: graphs
    of CUDA where the device has them.
    """

    blocks: Sequence[FusedBlock]
    start: int
    heads: Heads
    rotary: nn.Module
    new_capture: Callable[[], Capture] | None = None
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    _hidden_size: int = field(init=False)
    _waits: bool = field(init=False)  # whether a product's launches depend on values
    _angles: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _graphs: WeakKeyDictionary[PagePool, DecodeGraphs] = field(default_factory=WeakKeyDictionary, init=False)

    def __post_init__(self) -> None:
        norm = self.blocks[0].norm
        self.device, self.dtype, self._hidden_size = norm.device, norm.dtype, len(norm)
        self._waits = any(_waits(matrix) for block in self.blocks for matrix in block.matrices)

    @property
    def records(self) -> bool:
        """Whether decode steps become graphs."""
        return not self._waits and (self.device.type == "cuda" or self.new_capture is not None)

    def record(self, pool: PagePool, most_rows: int = MAX_ROWS) -> None:
        """Record the graphs of all blocks, the largest first, so that no session waits for them."""
        if not self.records:
            return
        run = self.start, self.start + len(self.blocks)
        self._angles_for(min(pool.max_length, MOST_FIRST_ANGLES))
        with self._here():
            for rows in sorted(ROWS, reverse=True):
                if rows <= most_rows:
                    layout = self._layout(rows, 1)
                    step = partial(self._decode, pool=pool, run=run, groups=())
                    blank = torch.empty(0, self._hidden_size)
                    fill = partial(self._fill, NOBODY, layout, blank, pool)
                    self._graphs_over(pool).record(run, layout, step, fill)

    def decode(
        self,
        hidden: Tensor,
        pool: PagePool,
        rows: NDArray[np.int64],
        lengths: NDArray[np.int64],
        start: int,
        stop: int,
        groups: Groups = (),
    ) -> Tensor:
        """See `FusedSpan.decode`.  hidden: on the CPU or on the device, in any float dtype."""
        numbers, layout = self._numbers(pool, rows, lengths, groups)
        fill = partial(self._fill, numbers, layout, hidden, pool)
        with self._here():
            if self._is_recorded(len(lengths), groups):
                return self._by_graph(pool, (start, stop), layout, fill)[: len(lengths)]
            content = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device)
            fill(content)
            return self._decode(layout.inputs(content), pool, (start, stop), groups)

    def planned(
        self,
        stage: Stage,
        pool: PagePool,
        rows: NDArray[np.int64],
        lengths: NDArray[np.int64],
        start: int,
        stop: int,
        groups: Groups = (),
    ) -> Callable[[Tensor], Tensor]:
        """`decode` in two parts: its numbers are added to a stage, and the answer computes when they came."""
        numbers, layout = self._numbers(pool, rows, lengths, groups)
        part = stage.add_bytes(
            layout.numbers_bytes,
            lambda content: numbers.fill(content, layout, pool.nobodys_page, pool.page_tokens),
        )

        def compute(hidden: Tensor) -> Tensor:
            with self._here():
                if self._is_recorded(len(lengths), groups):
                    fill = partial(from_stage, stage[part], layout, hidden)
                    return self._by_graph(pool, (start, stop), layout, fill)[: len(lengths)]
                inputs = Inputs(hidden, *layout.numbers(stage[part]))
                return self._decode(inputs, pool, (start, stop), groups)

        return compute

    def _numbers(
        self, pool: PagePool, rows: NDArray[np.int64], lengths: NDArray[np.int64], groups: Groups
    ) -> tuple[Rows, Layout]:
        longest, count = int(lengths.max()) + 1, len(lengths)
        self._angles_for(max(longest, min(pool.max_length, MOST_FIRST_ANGLES)))
        table = pool.table(rows, -(-longest // pool.page_tokens))
        wide = bucket(count) if self._is_recorded(count, groups) else count
        return Rows(lengths, pool.slots_of(rows, lengths), table), self._layout(wide, table.shape[1])

    def _is_recorded(self, rows: int, groups: Groups) -> bool:
        return self.records and rows <= MAX_ROWS and not groups

    def _by_graph(
        self, pool: PagePool, run: tuple[int, int], layout: Layout, fill: Callable[[Tensor], None]
    ) -> Tensor:
        step = partial(self._decode, pool=pool, run=run, groups=())
        return self._graphs_over(pool).run(run, layout, step, fill)

    def step(
        self,
        hidden: Tensor,
        pool: PagePool,
        rows: NDArray[np.int64],
        position: int,
        start: int,
        stop: int,
        groups: Groups = (),
    ) -> Tensor:
        """See `FusedSpan.step`.  hidden: on the CPU or on the device, in any float dtype."""
        batch, tokens, _ = hidden.shape
        if tokens == 1:
            lengths = np.full(batch, position)
            return self.decode(hidden[:, 0], pool, rows, lengths, start, stop, groups)[:, None]
        self._angles_for(max(position + tokens, min(pool.max_length, MOST_FIRST_ANGLES)))
        with self._here():
            hidden, chunk = self._chunk(hidden, pool, rows, position)
            hidden, addend = hidden.view(batch * tokens, -1), None
            for number, block in self._run(start, stop):
                hidden, addend = self._block(
                    number, block, (hidden, addend), Products(groups, number, batch), pool, chunk
                )
            assert addend is not None
            return (hidden + addend).view(batch, tokens, -1)

    def _chunk(
        self, hidden: Tensor, pool: PagePool, rows: NDArray[np.int64], position: int
    ) -> tuple[Tensor, _Chunk]:
        """Hidden states and places of a prefill's positions on the device, by one copy."""
        batch, tokens, _ = hidden.shape
        length = position + tokens
        read = pool.slots(rows, length)
        places = np.tile(np.arange(position, length), batch)
        write = np.ascontiguousarray(read[:, position:]).ravel()
        first = int(read[0, 0])
        together = batch == 1 and bool((np.diff(read[0]) == 1).all())
        more = () if together else (read.ravel(),)
        moved, numbers = chunk_on(self.device, self.dtype, hidden, places, write, *more)
        return moved, _Chunk(batch, length, numbers[0], numbers[1], first, None if together else numbers[2])

    def _decode(self, inputs: Inputs, pool: PagePool, run: tuple[int, int], groups: Groups) -> Tensor:
        """One position of each row: fixed shapes and no word to the host, so a graph can record it."""
        hidden, addend = inputs.hidden, None
        for number, block in self._run(*run):
            low = Products(groups, number, len(hidden))
            hidden, addend = self._block(number, block, (hidden, addend), low, pool, inputs)
        return hidden if addend is None else hidden + addend

    def _block(
        self,
        number: int,
        block: FusedBlock,
        given: tuple[Tensor, Tensor | None],
        low: Products,
        pool: PagePool,
        where: Inputs | _Chunk,
    ) -> tuple[Tensor, Tensor]:
        """One block: its input and its output are a sum of two, [rows, hidden_size] each."""
        heads, eps = self.heads, block.eps
        keys, values = pool.keys[number - pool.start], pool.values[number - pool.start]
        cos, sin = cast("tuple[Tensor, Tensor]", self._angles)
        hidden, normed = ops.add_norm(*given, block.norm, eps)
        q = ops.rope_and_write(
            low.product(block.qkv, normed, QKV, heads.widths), heads.heads, heads.key_heads, cos, sin,
            where.places, where.slots, keys, values, block.query_norm, block.key_norm, eps, block.rotary,
        )  # fmt: skip
        if isinstance(where, Inputs):
            seen = ops.paged_attention(
                q, keys, values, where.pages, where.lengths, block.scale, block.window, pool.page_tokens
            )
        else:
            q = q.view(where.batch, -1, heads.heads, heads.head_dim)
            seen = attended(q, where.all_of(keys), where.all_of(values), block.scale, block.window)
            seen = seen.reshape(len(hidden), -1)
        hidden, normed = ops.add_norm(hidden, low.product(block.out, seen, ("o_proj",)), block.mlp_norm, eps)
        gated = ops.silu_mul(low.product(block.gate_up, normed, ("gate_proj", "up_proj")))
        return hidden, low.product(block.down, gated, ("down_proj",))

    def _layout(self, rows: int, pages: int) -> Layout:
        return Layout(rows, bucket(pages, FIRST_PAGES), self._hidden_size, self.dtype)

    def _fill(self, rows: Rows, layout: Layout, hidden: Tensor, pool: PagePool, content: Tensor) -> None:
        to_device(rows, layout, hidden, content, pool.nobodys_page, pool.page_tokens)

    def _run(self, start: int, stop: int) -> Iterator[tuple[int, FusedBlock]]:
        """The blocks of a run with their numbers in the model."""
        return enumerate(self.blocks[start - self.start : stop - self.start], start)

    def _graphs_over(self, pool: PagePool) -> DecodeGraphs:
        graphs = self._graphs.get(pool)
        if graphs is None:
            graphs = self._graphs[pool] = DecodeGraphs(self.device, self.new_capture)
        return graphs

    def _angles_for(self, length: int) -> None:
        """cos and sin [at least length, head_dim], by the library's own module."""
        if self._angles is None or len(self._angles[0]) < length:
            positions = torch.arange(bucket(length), device=self.device)[None]
            like = torch.empty(0, self._hidden_size, dtype=self.dtype, device=self.device)
            cos, sin = self.rotary(like, positions)
            self._angles = cos[0].contiguous(), sin[0].contiguous()
            for graphs in self._graphs.values():  # they read the old ones
                graphs.clear()

    def _here(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device of CUDA."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _waits(matrix: nn.Module) -> bool:
    """Whether a product reads on the host what it launches: LLM.int8() looks for outliers (bitsandbytes)."""
    layers: list[Any] = [each for each in matrix.modules() if type(each).__name__ == "Linear8bitLt"]
    return any(layer.state.threshold > 0 for layer in layers)
