"""Our own code for blocks of the llama family, where it is known to equal the library's.

llama, mistral, qwen2, qwen3 and smollm3 share one block: norm, attention with rotary positions and
grouped key heads, norm, gated MLP.  They differ in biases, in a norm on queries and keys, in windows,
and in blocks without rotary positions; `FusedBlock` holds these differences.  Queries, keys and values
come out of one matrix, and so do gate and up.

A block is computed in two ways.  `step` takes positions of one session (prefill) with torch's attention.
`decode` takes one position of many rows of different lengths.  In float32 on the CPU everything before
attention is one compiled call, and everything after it another.  A `decode` whose products no threads share
is one compiled call for all blocks.  On other devices `node.model.blocks.device.steps` computes both.

`fuse` answers None for a block that is not known to be equal, and the library computes it.  Reasons are
other activations, rotary angles that depend on the length, and layers that cannot be merged.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from node.model.adapters.low_rank import Groups
from node.model.adapters.products import QKV, Products
from node.model.blocks.device.steps import DeviceSteps
from node.model.blocks.fused_block import (
    FusedBlock,
    Heads,
    LoneRow,
    Tables,
    decode_attention,
    decode_kernels,
    kept_in,
    place_of,
    prefill_attention,
)
from node.model.blocks.kv_pages import PagePool
from node.model.checkpoint.architecture import Architecture
from node.model.weights.arena import WeightArena, arena_bytes
from node.model.weights.plans import Plan
from node.model.weights.quantize import (
    Join,
    PackedLinear,
    matrices_of,
    measured_plan,
    merge_linears,
    move_weights,
    ordered,
)

_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})  # angles that depend on the position alone
# Before and after attention; whether several threads compute.
Halves = tuple[Callable[..., None], Callable[..., None], bool]
_NO_UPDATES = np.zeros(0, np.int64)
_FIRST_ANGLES = 1024  # positions; doubled for a longer session


def fuse(
    model: nn.Module, architecture: Architecture, blocks: Sequence[nn.Module], start: int
) -> FusedSpan | None:
    """The span's blocks, from block `start` on, for `FusedSpan`; None where the library must compute them.

    The library's layers still work: they share the memory of the merged layers.
    """
    config = cast(Any, model).config
    rotary = getattr(model, "rotary_emb", None)
    plain = getattr(config, "hidden_act", None) == "silu" and not getattr(
        config, "gradient_checkpointing", False
    )
    if not architecture.fused or not plain or getattr(rotary, "rope_type", None) not in _FIXED_ROTARY:
        return None
    matrices = [matrix for block in blocks for matrix in matrices_of(block)]
    join = ordered(WeightArena(arena_bytes(matrices)).joined, matrices)
    fused = []
    for number, block in enumerate(blocks):
        one = _fuse_block(block, config, start + number, join)
        if one is None:
            return None
        fused.append(one)
    return FusedSpan(fused, start, cast(nn.Module, rotary), config)


def _fuse_block(
    block: Any, config: Any, number: int, join: Join
) -> FusedBlock | None:  # Any: the library's block and config
    attention, mlp = block.self_attn, block.mlp
    qkv = merge_linears([attention.q_proj, attention.k_proj, attention.v_proj], join)
    if qkv is None:
        return None
    # In the order in which a step reads them.
    move_weights(attention.o_proj, join)
    gate_up = merge_linears([mlp.gate_proj, mlp.up_proj], join)
    if gate_up is None:
        return None
    move_weights(mlp.down_proj, join)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is not None and types[number] != "sliding_attention":
        window = None
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return FusedBlock(
        norm=block.input_layernorm.weight.detach(),
        qkv=qkv,
        out=attention.o_proj,
        mlp_norm=block.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        down=mlp.down_proj,
        query_norm=None if query_norm is None else query_norm.weight.detach(),
        key_norm=None if key_norm is None else key_norm.weight.detach(),
        rotary=bool(getattr(attention, "use_rope", True)),
        window=window or 0,
        scale=float(attention.scaling),
        eps=float(block.input_layernorm.variance_epsilon),
    )


@dataclass(frozen=True, slots=True)
class _Where:
    """The places of a step's positions, common to all blocks of the step.

    write: slots of the new positions.  read: slots of the new and all earlier positions.  Both are flat.
    position: the first new one.  masks: by window.  angles: cos and sin of the new positions.
    groups: rows with an adapter.  table: each row's pages, where our own attention reads them; nothing else
    needs `read` and `masks` then, which are empty.
    """

    pool: PagePool
    write: Tensor
    read: Tensor
    position: int
    masks: dict[int, Tensor | None]
    angles: tuple[Tensor, Tensor]
    groups: Groups
    table: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """The arguments of a decode step's compiled code that all blocks share; see `decode_kernels.run`.

    positions: of each row, their slots, cos and sin.
    """

    hidden: NDArray[np.float32]
    qkv: NDArray[np.float32]
    attended: NDArray[np.float32]
    positions: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
    rows_at: NDArray[np.int64]
    updates: int
    table: NDArray[np.int64] | None = None


class _Ways(NamedTuple):
    """What measured fastest for a span's steps on this machine, where the kernels compute.

    many_rows: from how many rows on products go over panels.  float_plan: of layers in float32 without a plan
    of their own.  own_attention: whether a chunk of a prompt attends by our own kernel.
    """

    many_rows: float = math.inf
    float_plan: Plan | None = None
    own_attention: bool = False


class FusedSpan:
    """Runs of fused blocks over a page pool.  Made by `fuse`, `part` and `joined`."""

    def __init__(
        self,
        blocks: Sequence[FusedBlock],
        start: int,
        rotary: nn.Module,
        config: Any,  # the library's
    ) -> None:
        self.blocks = tuple(blocks)
        self.start = start
        self.heads = int(config.num_attention_heads)
        self.key_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        # Outputs of the product for queries, keys and values.
        heads = Heads(self.heads, self.key_heads, self.head_dim)
        self._widths = heads.widths
        self._rotary = rotary
        self._angles: tuple[Tensor, Tensor] | None = None
        self._tables: Tables | None = None
        self._lone: list[LoneRow] = []  # one for each thread that has computed a row alone
        kept = {kept_in(linear) for block in blocks for linear in block.matrices}
        # The dtype that the compiled kernels read, if all matrices have one dtype.
        self.kept = kept.pop() if len(kept) == 1 else None
        self._config = config
        self.steps = DeviceSteps(self.blocks, start, heads, rotary)
        # None on a CPU, where compiled code, or else torch's, computes each step.
        self.on_device = None if self.steps.device.type == "cpu" else self.steps
        self._ways = _ways(self.blocks, self.kept if self.on_device is None else None, self.head_dim)

    def part(self, start: int, stop: int) -> FusedSpan:
        """A run of the blocks [start, stop) alone."""
        return FusedSpan(self._run(start, stop), start, self._rotary, self._config)

    def joined(self, spans: Sequence[FusedSpan]) -> FusedSpan:
        """One run of all blocks of these runs, which follow each other; this run may be among them."""
        blocks = [block for span in spans for block in span.blocks]
        return FusedSpan(blocks, spans[0].start, self._rotary, self._config)

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
        """Compute positions of one session: hidden [batch, tokens, hidden_size], the first at `position`.

        groups: the rows of the batch with an adapter.
        """
        if self.on_device is not None:
            return self.on_device.step(hidden, pool, rows, position, start, stop, groups)
        batch, tokens, _ = hidden.shape
        if tokens == 1 and self._compiled(hidden):
            lengths = np.full(batch, position)
            return self.decode(hidden[:, 0], pool, rows, lengths, start, stop, groups)[:, None]
        where = _where_of(self, hidden, pool, rows, position, start, stop, groups)
        if not self._compiled(hidden) or not self._compiled_for(batch * tokens):
            for index, block in self._numbered(start, stop, pool):
                hidden = self._torch_block(index, block, hidden, where)
            return hidden
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        updates = self._updates(groups, tokens)
        with self._halves() as halves:
            for index, block in self._numbered(start, stop, pool):
                self._compiled_block(halves, index, block, hidden, where, updates)
        return hidden

    def _torch_block(self, index: int, block: FusedBlock, hidden: Tensor, where: _Where) -> Tensor:
        low = Products(where.groups, where.pool.start + index, len(hidden))
        q, k, v = self._query_key_value(block, hidden, *where.angles, low)
        keys, values = where.pool.keys[index], where.pool.values[index]
        keys.index_copy_(0, where.write, k.reshape(-1, *keys.shape[1:]).to(keys.dtype))
        values.index_copy_(0, where.write, v.reshape(-1, *values.shape[1:]).to(values.dtype))
        return self._after(block, hidden, self._attended(index, block, q, k, v, where), low)

    def _compiled_block(
        self,
        halves: Halves,
        index: int,
        block: FusedBlock,
        hidden: Tensor,
        where: _Where,
        updates: NDArray[np.int64],
    ) -> None:
        """`step` in place, compiled; attention too where the step has a table of pages."""
        before, after, together = halves
        batch, tokens, width = hidden.shape
        it = block.compiled_for_many if batch * tokens >= self._ways.many_rows else block.compiled
        low = _address(updates), where.pool.start + index
        residual = hidden.view(batch * tokens, width).numpy()
        qkv = torch.empty(batch, tokens, (self.heads + 2 * self.key_heads) * self.head_dim)
        cos, sin = (angles[:, 0].numpy() for angles in where.angles)
        places, place = np.tile(np.arange(tokens), batch), place_of(where.pool, index)
        before(
            it.qkv, it.norm, block.eps, residual, qkv.view(batch * tokens, -1).numpy(), self.heads, place,
            places, where.write.numpy(), cos, sin, block.rotary, it.query_norm, it.key_norm, *low,
        )  # fmt: skip
        if where.table is None:
            attended = self._attended(index, block, *self._split(qkv), where).reshape(batch * tokens, -1)
            attended = attended.contiguous()
        else:
            attended = torch.empty(batch * tokens, self.heads * self.head_dim)
            keys, values, *sizes, item = place.tolist()
            prefill_attention().attend_for(where.pool.dtype, together=together)(
                qkv.data_ptr(), qkv.shape[-1], batch, tokens, sizes[0], self.heads // sizes[0], sizes[1],
                keys, values, item, where.table.ctypes.data, where.table.shape[1], where.position,
                where.pool.page_tokens, block.scale_bits, block.window, attended.data_ptr(),
            )  # fmt: skip
        after(
            it.out, it.mlp_norm, block.eps, it.gate_up, it.down, it.inner, attended.numpy(), residual, *low,
        )  # fmt: skip

    def _attended(
        self, index: int, block: FusedBlock, q: Tensor, k: Tensor, v: Tensor, where: _Where
    ) -> Tensor:
        """Attention of new positions over new and earlier positions: [batch, tokens, heads * head_dim]."""
        if where.position:
            k, v = (
                store.index_select(0, where.read).view(len(q), -1, *store.shape[1:]).to(q.dtype)
                for store in (where.pool.keys[index], where.pool.values[index])
            )
        mask = where.masks[block.window]
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and q.shape[1] > 1,
            scale=block.scale,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).flatten(2)

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
        """Compute one position of each row, hidden [rows, hidden_size], after its `lengths` positions.

        groups: the rows with an adapter.
        """
        if self.on_device is not None:
            return self.on_device.decode(hidden, pool, rows, lengths, start, stop, groups)
        if self._compiled(hidden):
            hidden = hidden.clone(memory_format=torch.contiguous_format)
            self.decode_rows(hidden.numpy(), pool, rows, lengths, start, stop, groups)
            return hidden
        longest = int(lengths.max()) + 1
        self._angles_for(longest)
        slots = pool.slots_of(rows, lengths)
        places, write, read = map(_tensor, (lengths, slots, pool.slots(rows, longest)))
        return self._decode_torch(hidden, pool, places, write, read, (start, stop), groups)

    def _decode_torch(
        self,
        hidden: Tensor,
        pool: PagePool,
        places: Tensor,
        write: Tensor,
        read: Tensor,
        run: tuple[int, int],
        groups: Groups = (),
    ) -> Tensor:
        """`decode` on a CPU in torch's own operations.

        places: positions before each row.  write: [rows] slots.  read: [rows, longest] slots.
        """
        rows, longest = read.shape
        assert self._angles is not None
        cos, sin = (table[places][:, None, None] for table in self._angles)
        seen = torch.arange(longest, device=hidden.device)
        hidden = hidden[:, None]  # [rows, 1, hidden_size]
        for index, block in self._numbered(*run, pool):
            low = Products(groups, pool.start + index, rows)
            q, k, v = self._query_key_value(block, hidden, cos, sin, low)
            keys, values = pool.keys[index], pool.values[index]
            keys.index_copy_(0, write, k[:, 0].to(keys.dtype))
            values.index_copy_(0, write, v[:, 0].to(values.dtype))
            visible = seen <= places[:, None]
            if block.window:
                visible = visible & (seen > places[:, None] - block.window)
            k, v = (
                store.index_select(0, read.reshape(-1)).view(rows, longest, *store.shape[1:]).transpose(1, 2)
                for store in (keys, values)
            )
            k, v = k.to(q.dtype), v.to(q.dtype)
            # The queries of one key head take the axis of positions, so no key is repeated.
            grouped = q.view(rows, self.key_heads, -1, self.head_dim)
            attended = functional.scaled_dot_product_attention(
                grouped, k, v, attn_mask=visible[:, None, None], scale=block.scale
            )
            hidden = self._after(block, hidden, attended.reshape(rows, 1, -1), low)
        return hidden[:, 0]

    def decode_rows(
        self,
        hidden: NDArray[np.float32],
        pool: PagePool,
        numbers: NDArray[np.int64],
        lengths: NDArray[np.int64],
        start: int,
        stop: int,
        groups: Groups = (),
    ) -> None:
        """`decode` in place and in compiled code, where that can be used: float32 [rows, hidden_size].

        One thread computes all blocks in one call; several in three calls a block.
        """
        found = decode_attention()
        assert found is not None
        cos, sin = (angles.numpy() for angles in self._angles_for(int(lengths.max()) + 1))
        table = pool.table(numbers, -(-(int(lengths.max()) + 1) // pool.page_tokens))
        updates, seen, rows = self._updates(groups), lengths + 1, len(hidden)
        step = _Step(
            hidden=hidden,
            qkv=np.empty((rows, sum(self._widths)), np.float32),
            attended=np.empty((rows, self.heads * self.head_dim), np.float32),
            positions=(lengths, pool.slots_of(numbers, lengths), cos, sin),
            rows_at=np.array(
                [table.ctypes.data, table.shape[1], seen.ctypes.data, pool.page_tokens], np.int64
            ),
            updates=_address(updates),
        )
        if _is_divided(self, rows):
            _by_halves(self, step, pool, start, stop)
            return
        kept, kernels = self.kept, decode_kernels()
        assert kernels is not None
        assert kept is not None
        tables = self._tables = self._tables or Tables(self.blocks)
        run = slice(start - self.start, stop - self.start)
        kernels.run()(
            kept.itemsize, tables.blocks[run], tables.epsilons[run], hidden, step.qkv, step.attended,
            self.heads, tables.places(pool)[start - pool.start : stop - pool.start], *step.positions,
            found.attention(pool.dtype, self.head_dim).address, step.rows_at, step.updates, start,
        )  # fmt: skip

    def _updates(self, groups: Groups, tokens: int = 1) -> NDArray[np.int64]:
        """What the kernels add in a step with these groups, rows of `tokens` positions; empty for nothing."""
        if not groups:
            return _NO_UPDATES
        from node.model.weights import low_rank_kernel as kernel

        found = decode_kernels()
        assert found is not None
        numbers = kernel.head(len(groups))
        for each in groups:
            table = each.adapter.table_at(found.SITES, kernel)
            numbers += [table, each.first * tokens, each.last * tokens]
        return np.array(numbers, np.int64)

    @contextmanager
    def _halves(self) -> Iterator[Halves]:
        """A block before and after attention as compiled code, for as many threads as torch has."""
        found, kept, threads = decode_kernels(), self.kept, torch.get_num_threads()
        assert found is not None
        assert kept is not None
        with found.kernels.team(threads) as together:
            before, after = found.halves(kept, together=together)
            given = (0, kept.itemsize, threads if together else None)
            yield partial(before, *given), partial(after, *given), together

    def _query_key_value(
        self, block: FusedBlock, hidden: Tensor, cos: Tensor, sin: Tensor, low: Products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, tokens, heads, head_dim] each, normed and rotated."""
        normed = _rms_norm(hidden, block.norm, block.eps)
        q, k, v = self._split(low.product(block.qkv, normed, QKV, self._widths))
        if block.query_norm is not None and block.key_norm is not None:
            q, k = _rms_norm(q, block.query_norm, block.eps), _rms_norm(k, block.key_norm, block.eps)
        if block.rotary:
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        return q, k, v

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = torch.split(qkv, self._widths, -1)
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)
        return q, k, v

    def _after(self, block: FusedBlock, hidden: Tensor, attended: Tensor, low: Products) -> Tensor:
        """The part of the block after attention."""
        hidden = hidden + low.product(block.out, attended, ("o_proj",))
        normed = _rms_norm(hidden, block.mlp_norm, block.eps)
        gate, up = low.product(block.gate_up, normed, ("gate_proj", "up_proj")).chunk(2, -1)
        return hidden + low.product(block.down, functional.silu(gate) * up, ("down_proj",))

    def _numbered(self, start: int, stop: int, pool: PagePool) -> list[tuple[int, FusedBlock]]:
        """The blocks of a run with their numbers in the page pool."""
        return list(enumerate(self._run(start, stop), start - pool.start))

    def _run(self, start: int, stop: int) -> tuple[FusedBlock, ...]:
        return self.blocks[start - self.start : stop - self.start]

    def _compiled(self, hidden: Tensor) -> bool:
        """Whether the kernels may be used."""
        if self.head_dim % 2:
            return False
        usable = self.kept is not None and hidden.dtype == torch.float32 and hidden.device.type == "cpu"
        return usable and decode_kernels() is not None

    def _compiled_for(self, rows: int) -> bool:
        """Whether products of this number of rows are fastest in the kernels."""
        matrices = (matrix for block in self.blocks for matrix in block.matrices)
        plans = (each.plan if isinstance(each, PackedLinear) else self._ways.float_plan for each in matrices)
        return all(plan is not None and plan.way(rows) == "compiled" for plan in plans)

    def _angles_for(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [at least length, head_dim], by the library's own module."""
        like = self.blocks[0].norm
        if self._angles is None or len(self._angles[0]) < length:
            most = max(_FIRST_ANGLES, 1 << (length - 1).bit_length())
            positions = torch.arange(most, device=like.device)[None]
            cos, sin = self._rotary(like[:0], positions)
            self._angles = cos[0].contiguous(), sin[0].contiguous()
        return self._angles


def decode_row(
    span: FusedSpan,
    hidden: NDArray[np.float32],
    pool: PagePool,
    row: int,
    position: int,
    run: tuple[int, int],
) -> None:
    """`FusedSpan.decode_rows` of one row without an adapter, with equal bits.

    hidden: float32 [1, hidden_size], in place.  row: its number in the pool.  position: the new one's.
    run: the first block, and the one after the last.
    """
    tables = span._tables
    if tables is None or _is_divided(span, 1):
        span.decode_rows(hidden, pool, np.array([row]), np.array([position]), *run)
        return
    places = tables.places(pool)
    try:
        lone = span._lone.pop()
    except IndexError:
        lone = None
    if lone is None or not lone.fits(pool, places, run, position):
        lone = _new_lone_row(span, tables, pool, run, position)
    lone.compute(hidden, pool.pages_of(row), position)
    span._lone.append(lone)


def _new_lone_row(
    span: FusedSpan, tables: Tables, pool: PagePool, run: tuple[int, int], position: int
) -> LoneRow:
    kept, kernels, found = span.kept, decode_kernels(), decode_attention()
    assert kept is not None
    assert kernels is not None
    assert found is not None
    cos, sin = (angles.numpy() for angles in span._angles_for(position + 1))
    of_run = slice(run[0] - span.start, run[1] - span.start)
    return LoneRow(
        kernel=kernels.run(),
        before=(kept.itemsize, tables.blocks[of_run], tables.epsilons[of_run]),
        scratch=(
            np.empty((1, sum(span._widths)), np.float32),
            np.empty((1, span.heads * span.head_dim), np.float32),
        ),
        heads=span.heads,
        pool=weakref.ref(pool),
        places=tables.places(pool),
        run=run,
        angles=(cos, sin),
        attend=found.attention(pool.dtype, span.head_dim).address,
    )


def _is_divided(span: FusedSpan, rows: int) -> bool:
    """Whether a product of this number of rows is divided among threads."""
    threads = torch.get_num_threads()
    if threads < 2:
        return False
    found = decode_kernels()
    assert found is not None
    sizes = (cast(Tensor, matrix.weight).shape for matrix in span.blocks[0].matrices)
    return any(found.kernels.slices_for(rows * outs * k, outs, threads) > 1 for outs, k in sizes)


def _by_halves(span: FusedSpan, step: _Step, pool: PagePool, start: int, stop: int) -> None:
    """`FusedSpan.decode_rows` in three compiled calls a block: before attention, attention, after it."""
    found = decode_attention()
    assert found is not None
    attend, rows = found.attend_for(pool.dtype, span.head_dim), len(step.hidden)
    sizes = span.key_heads, span.heads // span.key_heads, span.head_dim
    q, to, rows_at = step.qkv.ctypes.data, step.attended.ctypes.data, step.rows_at.tolist()
    with span._halves() as (before, after, _):
        for index, block in span._numbered(start, stop, pool):
            it, place, low = block.compiled, place_of(pool, index), (step.updates, pool.start + index)
            before(
                it.qkv, it.norm, block.eps, step.hidden, step.qkv, span.heads, place, *step.positions,
                block.rotary, it.query_norm, it.key_norm, *low,
            )  # fmt: skip
            attend(
                q, step.qkv.shape[1], rows, *sizes, *place[:2].tolist(), *rows_at, block.scale_bits,
                block.window, to,
            )  # fmt: skip
            after(
                it.out, it.mlp_norm, block.eps, it.gate_up, it.down, it.inner, step.attended, step.hidden,
                *low,
            )  # fmt: skip


def _ways(blocks: Sequence[FusedBlock], kept: torch.dtype | None, head_dim: int) -> _Ways:
    """kept: the dtype of all matrices, None where the kernels do not compute."""
    if kept is None or decode_kernels() is None:
        return _Ways()
    from node.model.weights.panels import panel_kernels
    from node.model.weights.precompile import compile_for

    if not head_dim % 2:
        compile_for(kept, head_dim, torch.get_num_threads())
    plan, attention = None, prefill_attention()
    if kept == torch.float32:
        linears = cast("tuple[nn.Linear, ...]", blocks[0].matrices)
        plan = measured_plan(max(linears, key=lambda each: each.weight.numel()), torch.float32)
    if torch.get_num_threads() > 1:
        for dtype in (torch.float32, torch.bfloat16):  # compiled or read now, and not within a step
            attention.attend_for(dtype, together=True)
    return _Ways(panel_kernels.least_rows(kept), plan, attention.is_chosen(head_dim))


def is_compiled(span: FusedSpan) -> bool:
    """Whether `decode` of float32 rows is our own kernels' alone."""
    return span.kept is not None and span.on_device is None and decode_kernels() is not None


def _where_of(
    span: FusedSpan,
    hidden: Tensor,
    pool: PagePool,
    rows: NDArray[np.int64],
    position: int,
    start: int,
    stop: int,
    groups: Groups,
) -> _Where:
    """The places of the positions of `FusedSpan.step`."""
    batch, tokens, _ = hidden.shape
    length = position + tokens
    positions = np.broadcast_to(np.arange(position, length), (batch, tokens))
    write = _tensor(pool.slots_of(rows[:, None], positions)).view(-1)
    cos, sin = (angles[position:length, None] for angles in span._angles_for(length))
    if span._ways.own_attention and span._compiled(hidden) and span._compiled_for(batch * tokens):
        table = pool.table(rows, -(-length // pool.page_tokens))
        return _Where(pool, write, write, position, {}, (cos, sin), groups, table)
    read = _tensor(pool.slots(rows, length)).view(-1)
    masks = {block.window: _mask(position, tokens, block.window, hidden) for block in span._run(start, stop)}
    return _Where(pool, write, read, position, masks, (cos, sin), groups)


def _address(updates: NDArray[np.int64]) -> int:
    return int(updates.ctypes.data) if updates.size else 0


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm as the library computes it: in float32, rounded to x's dtype before the weight is applied."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) in the arrangement of llama: halves, not neighbours."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def _mask(position: int, tokens: int, window: int, like: Tensor) -> Tensor | None:
    """The mask of `position + tokens` positions for each of the last `tokens`; None: causal."""
    length = position + tokens
    if not position and not 0 < window < length:
        return None
    keys = torch.arange(length, device=like.device)
    queries = keys[position:, None]
    visible = keys <= queries
    return visible & (keys > queries - window) if window else visible


def _tensor(numbers: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers))
