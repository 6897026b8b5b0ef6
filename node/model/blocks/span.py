"""A run of blocks as the library computes them: its own base model, trimmed.

The base class is built without memory (on the meta device) from the full config, so that every block equals
its block of the whole model.  Then only the span's blocks are kept, and only their tensors are read.  The
library's forward still makes masks, rotary embeddings and alibi.  Embedding and head are taken out:
embeddings are never called, because hidden states are given; norms and projections let hidden states
through; learned positions add zero.  Some families scale or normalise their input before the first block
(granite, bloom).  So the first block of a run is wrapped, and always takes the received hidden states.

A session may use a part of a span.  Each part is a view: a shallow copy of the model with fewer blocks and
a matching config, made at its first use.

A span does not change, but another one may have some of its blocks: `Span.part` and `Span.joined` make a
span out of loaded blocks, and blocks without a span are freed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from node.config import ConfigError
from node.model.adapters.hooks import adapted
from node.model.adapters.low_rank import Group, Groups, SpanAdapter, groups_of, part_of
from node.model.adapters.sites import numbered_blocks, shapes_of
from node.model.blocks.device.staging import Stage, on_device
from node.model.blocks.forward_backward import with_prompt
from node.model.blocks.fused import FusedSpan, decode_row, fuse, is_compiled
from node.model.blocks.kv_pages import PAGE_TOKENS, BlockShape, PagePool, SpanCache, tensor_bytes
from node.model.blocks.ragged import ragged_mask, ragged_parts
from node.model.blocks.rope import check_rope, stretched
from node.model.blocks.rotary import Lengths, by_length, rotary_by_length
from node.model.checkpoint.architecture import Architecture, architecture_of
from node.model.checkpoint.folder import CONFIG_FILE, ModelFolder
from node.model.checkpoint.info import TRANSPOSED, UNSAID_POSITIONS
from node.model.checkpoint.packed import PACKING_KEYS, packing_of, unpacked
from node.model.checkpoint.progress import Progress, silent
from node.model.checkpoint.tensors import block_tensors, check_blocks, check_loaded, load_tensors
from node.model.llama.config import LlamaConfig, config_of
from node.model.llama.loading import load_own
from node.model.llama.modules import LlamaForCausalLM, LlamaModel
from node.model.weights.panels.order import STRIPES
from node.model.weights.quantize import (
    Experts,
    Kind,
    Matrix,
    Packing,
    await_matrices,
    cache_dtype_for,
    fill,
    has_bfloat16,
    misplaced,
    packing_for,
    plan_on_device,
    take_matrices,
)
from tensor_codec import span_spec
from tensor_codec.errors import LocalProtocolError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from node.model.parallel.group import Ranks

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in span_spec.DTYPES}


# The errors of the library where values of a config do not fit together.
_UNLOADABLE = (
    RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError,
    AssertionError, OverflowError, ImportError,
)  # fmt: skip
_KINDS: dict[torch.dtype | None, Kind] = {torch.int8: "int8", STRIPES: "int8", torch.bfloat16: "bfloat16"}


class LibraryConfig(Protocol):
    """The attributes of the library's config classes that we use."""

    num_hidden_layers: int
    hidden_size: int


class Span:
    """The blocks [start, stop) of a model, ready to compute.  Made by `load_span`, `part` and `joined`.

    dtype: of the hidden states inside.  shapes: of each block's cache, None for a convolution.
    in_any_thread: whether a decode step may be computed outside the torch thread, where that one is idle.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        start: int,
        stop: int,
        made: tuple[FusedSpan | None, tuple[BlockShape | None, ...]] | None = None,
    ) -> None:
        """model: the trimmed base model, with the config of the whole model.

        made: our own code and the shapes, taken from other spans of these blocks.
        """
        self.start = start
        self.stop = stop
        self.architecture = architecture
        self.model = model
        self.config = cast(LibraryConfig, model.config)
        parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        self.dtype = parameter.dtype
        self.device = parameter.device
        self.hidden_size = self.config.hidden_size
        self._views: dict[tuple[int, int], tuple[nn.Module, _Entry]] = {}
        self._rotary = rotary_by_length(model, architecture)
        if made is None:
            self._fused = fuse(model, architecture, _blocks(model, architecture), start)
            self.shapes = _probed(self)
        else:
            self._fused, self.shapes = made
        fused = self._fused if self.dtype == torch.float32 else None
        # Our own kernels are at home in no thread; torch keeps workers for every thread that multiplies.
        self.in_any_thread = fused is not None and is_compiled(fused)
        # Of keys and values, where nobody chooses another one.
        kept = None if self._fused is None else self._fused.kept
        packing = Packing(_KINDS.get(kept, "plain"), self.dtype)
        self.cache_dtype = cache_dtype_for("auto", packing, self.device.type, fused=self._fused is not None)
        found = [shapes_of(block) for block in _blocks(model, architecture)]
        # Numbers in the matrices of a block, on the average: what an adapter's are compared with.
        self.block_values = sum(ins * outs for block in found for ins, outs in block.values()) / len(found)

    @property
    def can_cut(self) -> bool:
        """Whether a session's cache can go back to any earlier position."""
        return None not in self.shapes

    @property
    def repeats(self) -> bool:
        """Whether a step that failed in the middle may be computed again with the same caches."""
        return self.can_cut or self.device.type != "cpu"

    @property
    def fused(self) -> bool:
        """Whether blocks run through our own code (see node/model/blocks/fused.py) and not the library's.

        Then `decode` takes several positions of a session.
        """
        return self._fused is not None

    @property
    def max_length(self) -> int:
        """The number of positions that a session may have."""
        positions = int(getattr(self.config, "max_position_embeddings", None) or UNSAID_POSITIONS)
        return stretched({"rope_parameters": getattr(self.config, "rope_parameters", None)}, positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return tensor_bytes(self.model)

    def part(self, start: int, stop: int) -> Span:
        """A span of the blocks [start, stop) of this span: it holds these blocks' weights alone."""
        self._run_of(start, stop)
        first, last = start - self.start, stop - self.start
        blocks = _blocks(self.model, self.architecture)[first:last]
        fused = None if self._fused is None else self._fused.part(start, stop)
        return self._of(blocks, start, (fused, self.shapes[first:last]))

    def joined(self, others: Sequence[Span]) -> Span:
        """One span of the blocks of this span and of `others`, loaded alike: nothing is copied.

        Raises LocalProtocolError unless each span begins where another span ends.
        """
        spans = sorted((self, *others), key=lambda span: span.start)
        for one, two in pairwise(spans):
            alike = (one.architecture, one.dtype, one.device) == (two.architecture, two.dtype, two.device)
            if one.stop != two.start or not alike:
                raise LocalProtocolError(
                    f"blocks {one.start}:{one.stop} in {one.dtype} on {one.device} and"
                    f" {two.start}:{two.stop} in {two.dtype} on {two.device} do not make one span"
                )
        blocks = [block for span in spans for block in _blocks(span.model, span.architecture)]
        fused = [span._fused for span in spans if span._fused is not None]
        whole = self._fused.joined(fused) if self._fused and len(fused) == len(spans) else None
        shapes = tuple(shape for span in spans for shape in span.shapes)
        return self._of(blocks, spans[0].start, (whole, shapes))

    def _of(
        self,
        blocks: list[nn.Module],
        start: int,
        made: tuple[FusedSpan | None, tuple[BlockShape | None, ...]],
    ) -> Span:
        model = _holding(self.model, self.architecture, blocks, cast(Any, self.model).config)
        return Span(model, self.architecture, start, start + len(blocks), made)

    def new_arena(
        self, tokens: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> PagePool:
        """A page pool for the keys and values of `tokens` positions, in rows of up to `max_length`.

        dtype: of keys and values, float32 or bfloat16 on a CPU; None for `cache_dtype`.
        """
        return PagePool(
            self.start,
            self.shapes,
            tokens,
            max_length or self.max_length,
            dtype=dtype or self.cache_dtype,
            device=self.device,
        )

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> SpanCache:
        """An empty cache of `batch` rows in a page pool of its own; it takes memory as it fills.

        dtype: see `new_arena`.
        """
        row = -(-max_length // PAGE_TOKENS) * PAGE_TOKENS
        return self.new_arena(batch * row, max_length, dtype).open(batch, max_length)

    @torch.inference_mode()
    def forward(
        self,
        hidden: Tensor,
        cache: SpanCache,
        position: int,
        start: int | None = None,
        stop: int | None = None,
        *,
        rope_length: int = 0,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
    ) -> Tensor:
        """Compute a step of one session: [batch, tokens, hidden_size] -> the same shape, in `dtype`.

        position: of the first token; it continues the cache, which the caller has cut before.
        start, stop: the run of blocks, the whole span where None; fixed for all of a cache's life.
        rope_length: where angles depend on the length, each position takes the angles of a sequence of this
        length, or of a sequence that ends with the position, whichever is longer (see
        node/model/blocks/rope.py).
        prompts: [blocks of the run, n, hidden_size]: each block adds its own to its input at the positions
        below n, in every row.
        adapter: of the session, for all blocks of the run.
        """
        start, stop = self._run_of(start, stop)
        groups: Groups = ()
        if adapter is not None:
            adapter.check(start, stop)
            groups = (Group(adapter, 0, len(hidden)),)
        tokens = hidden.shape[1]
        if position != cache.length or position + tokens > cache.max_length:
            raise LocalProtocolError(
                f"{tokens} tokens at {position} do not continue a cache of {cache.length}/{cache.max_length}"
            )
        cache.reserve(position + tokens)
        if prompts is None or position >= prompts.shape[1]:
            hidden = _prefill(self, hidden, cache, position, start, stop, rope_length, groups)
        else:
            hidden = on_device(hidden, self.device, self.dtype)
            here = prompts[:, position : position + tokens].to(self.device, self.dtype)
            for block, prompt in zip(range(start, stop), here, strict=True):
                hidden = with_prompt(hidden, prompt)
                hidden = _prefill(self, hidden, cache, position, block, block + 1, rope_length, groups)
        cache.length = position + tokens
        return hidden

    @torch.inference_mode()
    def decode(
        self,
        hidden: Tensor,
        rows: Sequence[SpanCache],
        start: int,
        stop: int,
        *,
        rope_lengths: Sequence[int] | None = None,
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """Compute the next positions of each row of several sessions: [positions, hidden_size], and so back.

        rows: the sessions' caches, all of one page pool, in the order of their rows in `hidden`.  Each
        cache has reserved its new positions; the caller then moves the length.
        rope_lengths: of each session, as in `forward`; None: 0.
        adapters: of each session; None: nowhere.  Sessions of one adapter stand next to each other.
        tokens: positions of each session, where the span is `fused`; None: one each.  Of a session the
        positions of its first row come first.  Each sees those before it: the keys and values of all of them
        are in the pages before attention begins.  So every position is a row of its own for the kernels, and
        has the bits that it has alone.
        """
        if self._fused is not None:
            start, stop = self._run_of(start, stop)
            numbers, lengths, groups = _numbers_of(rows, start, stop, adapters, tokens)
            hidden = _moved(self, hidden)
            return self._fused.decode(hidden, rows[0].pool, numbers, lengths, start, stop, groups)
        stage = Stage(self.device, self.dtype)
        compute = self.planned(
            stage, rows, start, stop, rope_lengths=rope_lengths, adapters=adapters, tokens=tokens
        )
        return compute(stage.send(hidden))

    def decode_row(self, values: NDArray[np.float32], cache: SpanCache, start: int, stop: int) -> None:
        """`decode` of a session of one row, in place and with equal bits: float32 [hidden_size].

        Only where the span computes in any thread.
        """
        assert self._fused is not None
        position = cache.virtual_tokens + cache.length
        run = self._run_of(start, stop)
        decode_row(self._fused, values[None], cache.pool, int(cache.rows[0]), position, run)

    def new_stage(self) -> Stage | None:
        """A stage for several calls of `planned` that one copy serves; None where nothing is copied."""
        return None if self.device.type == "cpu" else Stage(self.device, self.dtype)

    def planned(
        self,
        stage: Stage,
        rows: Sequence[SpanCache],
        start: int,
        stop: int,
        *,
        rope_lengths: Sequence[int] | None = None,
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """`decode` in two parts: what it needs on the device is added to a stage, and the answer computes.

        The answer takes hidden states that lie on the device in `dtype`, after the stage was sent.
        """
        if tokens is not None and not self.fused:
            raise LocalProtocolError("several positions of a session in a step of the library's blocks")
        start, stop = self._run_of(start, stop)
        numbers, lengths, groups = _numbers_of(rows, start, stop, adapters, tokens)
        pool = rows[0].pool
        if self._fused is not None:
            assert self._fused.on_device is not None
            run = self._fused.on_device.planned(stage, pool, numbers, lengths, start, stop, groups)
            return torch.inference_mode()(run)
        wholes = lengths + 1
        if rope_lengths is not None:
            wholes = np.maximum(wholes, np.repeat(rope_lengths, [cache.batch for cache in rows]))
        if self.architecture.merge == "never" or bool((lengths == lengths[0]).all()):
            return _turns(self, stage, rows, wholes, (start, stop), groups)
        parts = [(0, len(lengths))] if self.device.type == "cpu" else ragged_parts(lengths)
        turns = []
        for first, last in parts:
            here, own = slice(first, last), part_of(groups, first, last)
            ragged = _ragged(
                self, stage, pool, numbers[here], lengths[here], wholes[here], (start, stop), own
            )
            turns.append((first, last, ragged))
        return _one_by_one(turns)

    def _library(
        self,
        hidden: Tensor,
        cache: Cache,
        positions: Tensor,
        mask: object,
        start: int,
        stop: int,
        lengths: Lengths | None = None,
    ) -> Tensor:
        """The library's forward over a run of blocks, hidden [rows, tokens, hidden_size].

        positions: int64 [rows or 1, tokens], on the span's device.  lengths: see `RotaryByLength`.
        """
        model, entry = self._view(start, stop)
        entry.given = hidden
        if self._rotary is not None:
            self._rotary.lengths = lengths
        try:
            answer = model(
                inputs_embeds=hidden,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions,
                use_cache=True,
            )
        finally:
            entry.given = None
            if self._rotary is not None:
                self._rotary.lengths = None
        return cast(Tensor, answer.last_hidden_state)

    def record(self, pool: PagePool) -> None:
        """Record the graphs of decode steps over `pool`, where a device has them: seconds, at a node's start.

        Runs in the torch thread.
        """
        if self._fused is not None and self._fused.on_device is not None:
            self._fused.on_device.record(pool)

    def _run_of(self, start: int | None, stop: int | None) -> tuple[int, int]:
        start, stop = self.start if start is None else start, self.stop if stop is None else stop
        if not self.start <= start < stop <= self.stop:
            raise LocalProtocolError(f"blocks {start}:{stop} are not within {self.start}:{self.stop}")
        return start, stop

    def _view(self, start: int, stop: int) -> tuple[nn.Module, _Entry]:
        """The model that runs these blocks, and where the hidden states go in."""
        if (start, stop) not in self._views:
            self._run_of(start, stop)
            blocks = _blocks(self.model, self.architecture)[start - self.start : stop - self.start]
            entry = _Entry(blocks[0])
            model = with_blocks(self.model, self.architecture, [entry, *blocks[1:]], start, stop)
            self._views[start, stop] = model, entry
        return self._views[start, stop]


def _prefill(
    span: Span,
    hidden: Tensor,
    cache: SpanCache,
    position: int,
    start: int,
    stop: int,
    rope_length: int,
    groups: Groups,
) -> Tensor:
    """`forward` through a run of blocks, without a change of the cache's length."""
    position += cache.virtual_tokens
    if span._fused is not None:
        hidden = _moved(span, hidden)
        return span._fused.step(hidden, cache.pool, cache.rows, position, start, stop, groups)
    from node.model.blocks.library_cache import ArenaRun, states_of

    tokens = hidden.shape[1]
    positions = np.broadcast_to(np.arange(position, position + tokens), (cache.batch, tokens))
    write = cache.pool.slots_of(cache.rows[:, None], positions)
    where = positions[:1].copy()
    states = states_of(cache, (start, stop), position, tokens)
    stage = Stage(span.device, span.dtype)
    run = ArenaRun(stage, cache.pool, cache.rows, write, position + tokens, where, states)
    lengths = _lengths(span, stage, np.maximum(where + 1, rope_length))
    hidden = stage.send(hidden)
    with adapted(numbered_blocks(span, start, stop) if groups else {}, groups, len(hidden)):
        return span._library(hidden, run, run.given, None, start, stop, lengths)


@torch.inference_mode()
def _probed(span: Span) -> tuple[BlockShape | None, ...]:
    """The shapes that each block caches, which a run of one token through the library's blocks shows."""
    if isinstance(config := span.config, LlamaConfig):
        return (BlockShape(*(config.num_key_value_heads, config.head_dim) * 2),) * (span.stop - span.start)
    from node.model.blocks.library_cache import ShapeProbe

    probe = ShapeProbe(span.stop)
    hidden = torch.zeros(1, 1, span.hidden_size, dtype=span.dtype, device=span.device)
    where = torch.zeros(1, 1, dtype=torch.long, device=span.device)
    span._library(hidden, probe, where, None, span.start, span.stop)
    return tuple(probe.shapes.get(block) for block in range(span.start, span.stop))


def _numbers_of(
    rows: Sequence[SpanCache],
    start: int,
    stop: int,
    adapters: Sequence[SpanAdapter | None] | None,
    tokens: Sequence[int] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], Groups]:
    """The rows of several sessions in their pool, the positions in their pages, and the adapters' groups.

    A row of several new positions is there as often, each time one position further.
    Raises LocalProtocolError for an adapter without one of the blocks.
    """
    numbers = np.concatenate([cache.rows for cache in rows])
    reached = [cache.virtual_tokens + cache.length for cache in rows]
    counts = [cache.batch for cache in rows]
    lengths = np.repeat(reached, counts)
    if tokens is not None:
        each = np.repeat(tokens, counts)
        numbers, lengths = np.repeat(numbers, each), np.repeat(lengths, each)
        lengths += np.arange(len(lengths)) - np.repeat(np.cumsum(each) - each, each)
        counts = [count * own for count, own in zip(counts, tokens, strict=True)]
    groups: Groups = ()
    if adapters is not None:
        groups = groups_of(adapters, counts)
        for group in groups:
            group.adapter.check(start, stop)
    return numbers, lengths, groups


def _ragged(
    span: Span,
    stage: Stage,
    pool: PagePool,
    numbers: NDArray[np.int64],
    lengths: NDArray[np.int64],
    wholes: NDArray[np.int64],
    blocks: tuple[int, int],
    groups: Groups,
) -> Callable[[Tensor], Tensor]:
    """The library's step of rows of several lengths, masked behind the end of each."""
    from node.model.blocks.library_cache import ArenaRun

    write = pool.slots_of(numbers, lengths)[:, None]
    longest = int(lengths.max()) + 1
    run = ArenaRun(stage, pool, numbers, write, longest, lengths[:, None])
    angles = _lengths(span, stage, wholes[:, None])

    def compute(hidden: Tensor) -> Tensor:
        mask = ragged_mask(span.architecture.merge, span.config, span.dtype, run.given[:, 0], longest)
        with adapted(numbered_blocks(span, *blocks) if groups else {}, groups, len(hidden)):
            return span._library(hidden[:, None], run, run.given, mask, *blocks, angles)[:, 0]

    return compute


def _turns(
    span: Span,
    stage: Stage,
    rows: Sequence[SpanCache],
    wholes: NDArray[np.int64],
    run: tuple[int, int],
    groups: Groups,
) -> Callable[[Tensor], Tensor]:
    """Rows of equal length together, the others one session after the other.

    wholes: the length whose angles each row takes, [rows].
    """
    reached = {cache.virtual_tokens + cache.length for cache in rows}
    together = len(reached) == 1 and not any(cache.states for cache in rows) and span.can_cut
    turns, first = [], 0
    for turn in [tuple(rows)] if together else [(cache,) for cache in rows]:
        last = first + sum(cache.batch for cache in turn)
        own = part_of(groups, first, last)
        turns.append((first, last, _turn(span, stage, turn, wholes[first:last, None], run, own)))
        first = last
    return _one_by_one(turns)


def _turn(
    span: Span,
    stage: Stage,
    turn: Sequence[SpanCache],
    wholes: NDArray[np.int64],
    run: tuple[int, int],
    groups: Groups,
) -> Callable[[Tensor], Tensor]:
    """The library's step of rows of one length.  wholes: as in `_turns`, [rows, 1]."""
    from node.model.blocks.library_cache import ArenaRun, states_of

    numbers = np.concatenate([cache.rows for cache in turn])
    length = turn[0].virtual_tokens + turn[0].length
    write = turn[0].pool.slots_of(numbers, np.full(len(numbers), length))[:, None]
    where = np.full((1 if span._rotary is None else len(numbers), 1), length)
    states = {} if span.can_cut else states_of(turn[0], run, length, 1)
    cached = ArenaRun(stage, turn[0].pool, numbers, write, length + 1, where, states)
    angles = _lengths(span, stage, wholes)

    def compute(hidden: Tensor) -> Tensor:
        blocks = numbered_blocks(span, *run) if groups else {}
        with adapted(blocks, groups, len(hidden)):
            return span._library(hidden[:, None], cached, cached.given, None, *run, angles)[:, 0]

    return compute


def _lengths(span: Span, stage: Stage, lengths: NDArray[np.int64]) -> Lengths | None:
    return None if span._rotary is None else span._rotary.planned(stage, lengths)


def _one_by_one(turns: Sequence[tuple[int, int, Callable[[Tensor], Tensor]]]) -> Callable[[Tensor], Tensor]:
    """Several computations, each of some rows [first, last), as one."""

    @torch.inference_mode()
    def compute(hidden: Tensor) -> Tensor:
        answers = [turn(hidden[first:last]) for first, last, turn in turns]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    return compute


def _moved(span: Span, hidden: Tensor) -> Tensor:
    """Hidden states in the span's dtype on its device; left alone where a step moves them itself."""
    if span._fused is not None and span._fused.on_device is not None:
        return hidden
    return on_device(hidden, span.device, span.dtype)


class _Entry(nn.Module):
    """The first block of a run: computes on `given` and ignores its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.given: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        assert self.given is not None
        return self.block(self.given, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # Any: an attribute that the library looks up on a block
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class _NoPosition(nn.Module):
    """Replaces learned positions, which the client has added: adds nothing."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        # On the device of the positions: the library would copy it there, and wait.
        device = next((each.device for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        return torch.zeros((), device=device)


def load_span(
    folder: ModelFolder,
    start: int,
    stop: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str = "none",
    progress: Progress = silent,
    group: Ranks | None = None,
) -> Span:
    """Read the blocks [start, stop) of a model.  Raises ConfigError that names the fault.

    quantize: "none", "int8" or "nf4"; a folder that was prepared in int8 is read as it is.  dtype: of
    tensors that are not quantised.  A CPU without bfloat16 arithmetic keeps matrices in bfloat16 and
    computes in float32, so `Span.dtype` may differ (see `packing_for`). On the CPU, weights whose file has
    `dtype` stay mapped from the file, but for the matrices of fused blocks.
    group: the ranks that compute each block together, of which this process has a part; None: all of it.
    """
    device = torch.device(device)
    wanted = folder.quantize if quantize == "none" else quantize
    packing = packing_for(wanted, dtype, device.type, bfloat16=has_bfloat16())
    what = f"blocks {start}:{stop}"
    architecture = architecture_of(folder.config.get("model_type"))
    # bitsandbytes' layers are made ready by a first run, and ranks divide the library's modules.
    own = group is None and packing.kind in ("plain", "int8", "bfloat16")
    base, config = class_and_config(architecture, architecture.base, folder, own=own)
    shard = None if group is None else group.shard_of(config)
    check_blocks(start, stop, config.num_hidden_layers)
    packed = packing_of(folder)
    tensors = load_tensors(folder, block_tensors(folder, start, stop), progress)
    tensors = unpacked(tensors, packed, folder.config, dtype)
    matrices: dict[str, Matrix | Experts] = {}
    if packing.kind != "plain":
        transposed = architecture.model_type in TRANSPOSED
        matrices = take_matrices(
            tensors, packing.kind, transposed=transposed, what=f"{folder.path}: {what}", progress=progress,
            shard=shard,
        )  # fmt: skip
    if shard is not None:
        tensors, config = shard.of_tensors(tensors), shard.trimmed(config)

    def trim(model: nn.Module) -> None:
        container = model.get_submodule(architecture.container)
        kept = _blocks(model, architecture)[start:stop]
        setattr(container, architecture.blocks, nn.ModuleList(kept))
        for name in architecture.ends:
            if getattr(container, name) is not None:
                setattr(container, name, _NoPosition() if name in architecture.positions else nn.Identity())
        await_matrices(model, matrices)

    model = load_trimmed(base, trim, config, tensors, folder, what, packing.dtype)
    by_length(model, architecture)
    homeless, wrong = misplaced(model, matrices)
    check_loaded(folder, what, missing=(), unexpected=homeless, mismatched=wrong)
    model = model.to(device)
    fill(model, matrices, packing, device)
    if group is not None:
        for block in _blocks(model, architecture):
            group.divide(block)
    try:
        span = Span(model, architecture, start, stop)
    except torch.OutOfMemoryError:
        raise
    except _UNLOADABLE as error:  # a run of one token shows sizes that do not fit together
        raise ConfigError(f"{folder.path}: {what} cannot be computed: {_one_line(error)}") from error
    if device.type != "cpu":
        plan_on_device(_layers(span), packing.dtype)
    return span


def _layers(span: Span) -> Iterator[nn.Module]:
    """The layers that compute a span's steps."""
    fused = span._fused
    parts = [span.model] if fused is None else [each for block in fused.blocks for each in block.matrices]
    for part in parts:
        yield from part.modules()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    named = text if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"
    return named if len(named) <= 200 else named[:197] + "..."


def class_and_config(
    architecture: Architecture, name: str, folder: ModelFolder, *, own: bool = True
) -> tuple[type[nn.Module], LibraryConfig]:
    """The class of this name, ours where there is one and it is wanted, and the folder's config for it.

    Raises ConfigError for a config that the library's class refuses.
    """
    config = config_of(folder.config) if own else None
    if config is not None and (ours := _OWN.get(name)) is not None:
        return ours, config
    library = library_class(architecture, name)
    return library, library_config(library, folder)


_OWN = {
    f"{family}{part.removeprefix('Llama')}": cast("type[nn.Module]", whole)
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
    for part, whole in (("LlamaModel", LlamaModel), ("LlamaForCausalLM", LlamaForCausalLM))
}


def library_class(architecture: Architecture, name: str) -> type[nn.Module]:
    """A class of the library; imports only the module of the class."""
    module = import_module(f"transformers.models.{architecture.module}.modeling_{architecture.module}")
    return cast("type[nn.Module]", getattr(module, name))


def library_config(base: type[nn.Module], folder: ModelFolder) -> LibraryConfig:
    """The folder's config as the library's class.  Raises ConfigError for values that the class refuses."""
    from huggingface_hub.errors import StrictDataclassError

    config_class = cast(Any, base).config_class
    check_rope(folder.config, folder.path / CONFIG_FILE)
    try:
        plain = {key: value for key, value in folder.config.items() if key not in PACKING_KEYS}
        with _quiet_library():  # `check_rope` has refused the settings whose warnings matter
            return cast(LibraryConfig, config_class.from_dict(plain))
    except (*_UNLOADABLE, StrictDataclassError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{folder.path / CONFIG_FILE} is not a config of {base.__name__}: {what}") from None


def load_trimmed(
    whole: type[nn.Module],
    trim: Any,  # Callable[[nn.Module], None]; Any because it becomes part of a class
    config: LibraryConfig,
    tensors: dict[str, Tensor],
    folder: ModelFolder,
    what: str,
    dtype: torch.dtype,
) -> nn.Module:
    """A model of this class that `trim` has cut down, filled with these tensors.

    whole: the library's class, or ours.  Raises ConfigError unless each tensor finds its place, with its
    shape, and none is missing.
    """
    if issubclass(whole, LlamaModel | LlamaForCausalLM):
        model = load_own(whole, cast(LlamaConfig, config), trim, tensors, dtype)
        if model is not None:
            return model.requires_grad_(False).eval()
        architecture = architecture_of(folder.config.get("model_type"))
        name = architecture.base if issubclass(whole, LlamaModel) else architecture.whole
        whole, config = class_and_config(architecture, name, folder, own=False)

    def __init__(self: nn.Module, config: LibraryConfig) -> None:
        whole.__init__(self, config)
        trim(self)

    # Under the library's own name: the library finds conversions of checkpoints by module and class.
    trimmed = type(whole.__name__, (whole,), {"__init__": __init__, "__module__": whole.__module__})
    with _quiet_library():
        try:
            model, info = cast(Any, trimmed).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # recognised and refused below, with the tensor's name
            )
        except _UNLOADABLE as error:
            raise ConfigError(f"{folder.path}: {what} cannot be loaded: {_one_line(error)}") from error
    check_loaded(
        folder,
        what,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        mismatched=info["mismatched_keys"],
    )
    if info.get("error_msgs"):
        first = " ".join(str(info["error_msgs"][0]).split())
        raise ConfigError(f"{folder.path}: {what} cannot be loaded: {first}")
    return cast(nn.Module, model.requires_grad_(False).eval())


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the library's bars and reports off the terminal: faults are raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def with_blocks(
    model: nn.Module, architecture: Architecture, blocks: list[nn.Module], start: int, stop: int
) -> nn.Module:
    """A shallow copy of a base model that runs `blocks`, with the config of the run [start, stop).

    All other modules are shared with the original.
    """
    return _holding(model, architecture, blocks, sliced_config(cast(Any, model).config, start, stop))


def _holding(model: nn.Module, architecture: Architecture, blocks: list[nn.Module], config: Any) -> nn.Module:
    """A shallow copy with this config.  Any: the library's config."""
    view = _shallow(model)
    cast(Any, view).config = config
    container = view
    if architecture.container:
        container = _shallow(model.get_submodule(architecture.container))
        cast(Any, container).config = config
        setattr(view, architecture.container, container)
    setattr(container, architecture.blocks, nn.ModuleList(blocks))
    return view


def sliced_config(config: Any, start: int, stop: int) -> Any:  # Any: the library's config
    """The config of a run of blocks: each list with one item per block is cut to the items of the run."""
    blocks = config.num_hidden_layers
    view = copy.copy(config)
    # Past the class's setters, which would refuse the state between two of these assignments.
    values = view.__dict__
    for name, value in list(values.items()):
        if isinstance(value, list | tuple) and len(value) == blocks:
            values[name] = value[start:stop]
    values[(config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")] = stop - start
    return view


def _blocks(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The blocks of a base model, in order."""
    return architecture.blocks_of(model)


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares submodules and parameters, with a list of submodules of its own."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view
