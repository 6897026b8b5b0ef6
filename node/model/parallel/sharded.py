"""A span that several ranks compute together, as rank 0 sees it: a `Span` whose steps all ranks take.

Every call is told to the other ranks first (`node.model.parallel.team`), then this rank computes its own
shard of it.  Rows of a session are made at the other ranks with their first step; what happens to them
in between is told with the next message.  Pages are given out by every rank for itself, by the same
rules and in the same order.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from node.config import ConfigError
from node.model.adapters.low_rank import SpanAdapter
from node.model.blocks.forward_backward import through
from node.model.blocks.kv_pages import BlockShape, PagePool, Prefix, SpanCache
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.progress import Progress, silent
from node.model.checkpoint.tensors import block_tensors
from node.model.parallel import commands
from node.model.parallel.commands import folder_message
from node.model.parallel.team import LOAD_SECONDS, RECORD_SECONDS, Team
from tensor_codec.errors import LocalProtocolError


class ShardedCache:
    """One session's rows at all ranks.  own: this rank's.  length: as in `SpanCache`."""

    def __init__(self, own: SpanCache, pool: ShardedPool, team: Team) -> None:
        self.own = own
        self._pool = pool  # lives as long as its rows do
        self._team = team
        self._number = team.number()
        self._known = False  # to the other ranks

    @property
    def length(self) -> int:
        """Positions that every block has computed."""
        return self.own.length

    @length.setter
    def length(self, length: int) -> None:
        self.own.length = length

    @property
    def batch(self) -> int:
        """Rows."""
        return self.own.batch

    @property
    def max_length(self) -> int:
        """Most positions of a row."""
        return self.own.max_length

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that the session owns now, at this rank."""
        return self.own.nbytes

    @property
    def can_cut(self) -> bool:
        """Whether the cache can go back to any earlier length."""
        return self.own.can_cut

    def described(self) -> list[int]:
        """The rows as a message has them.  From now on the other ranks know them."""
        self._known = True
        return [self._number, self._pool.number, self.batch, self.max_length, self.length]

    def reserve(self, length: int) -> None:
        """See `SpanCache.reserve`; the other ranks do so with the step."""
        self.own.reserve(length)

    def cut(self, length: int) -> None:
        """See `SpanCache.cut`."""
        before = self.described() if self._known else None
        self.own.cut(length)
        if before is not None:
            self._team.later(commands.CUT, cache=before, to=length)

    def select(self, order: Sequence[int]) -> None:
        """See `SpanCache.select`."""
        self.own.select(order)
        if self._known:
            self._team.later(commands.ORDER, cache=self.described(), rows=list(map(int, order)))

    def begin_with(self, prefix: Prefix) -> None:
        """Raises LocalProtocolError: no adapter is taken where several ranks compute."""
        raise LocalProtocolError("a prefix in a cache of several ranks")

    def close(self) -> None:
        """Give everything back."""
        if self._known and not self.own.closed:
            self._team.later(commands.CLOSE, cache=self._number)
        self.own.close()


class ShardedPool:
    """The page pools of all ranks.  own: this rank's, with its key heads."""

    def __init__(self, own: PagePool, team: Team, number: int) -> None:
        self.own = own
        self.page_tokens = own.page_tokens
        self.number = number
        self._team = team
        weakref.finalize(self, team.later, commands.FORGET, kind="pool", number=number)

    @property
    def free_tokens(self) -> int:
        """Positions in pages without an owner."""
        return self.own.free_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the stores at this rank."""
        return self.own.nbytes

    def open(self, batch: int, max_length: int) -> ShardedCache:
        """See `PagePool.open`."""
        return ShardedCache(self.own.open(batch, max_length), self, self._team)

    def hold(self, start: int, shapes: Sequence[BlockShape | None]) -> None:
        """See `PagePool.hold`."""
        self.own.hold(start, shapes)
        self._team.later(commands.HOLD, pool=self.number, run=[start, start + len(shapes)])

    def give_back_memory(self) -> None:
        """See `PagePool.give_back_memory`: of this rank."""
        self.own.give_back_memory()


class ShardedSpan(Span):
    """The blocks [start, stop) of a model, a shard of each at every rank.  Made by `load_sharded`, `part` and
    `joined`.

    own: this rank's shards.
    """

    def __init__(self, own: Span, team: Team, number: int) -> None:
        self.own = own
        self.team = team
        self.number = number
        super().__init__(own.model, own.architecture, own.start, own.stop, (own._fused, own.shapes))
        self.in_any_thread = False  # the ranks follow the torch thread
        weakref.finalize(self, team.later, commands.FORGET, kind="span", number=number)

    def part(self, start: int, stop: int) -> ShardedSpan:
        """See `Span.part`."""
        own, number = self.own.part(start, stop), self.team.number()
        self.team.tell(commands.PART, span=number, of=self.number, run=[start, stop])
        return ShardedSpan(own, self.team, number)

    def joined(self, others: Sequence[Span]) -> ShardedSpan:
        """See `Span.joined`.  others: of the same ranks."""
        spans = [self, *(cast(ShardedSpan, other) for other in others)]
        own, number = self.own.joined([span.own for span in spans[1:]]), self.team.number()
        self.team.tell(commands.JOIN, span=number, of=[span.number for span in spans])
        return ShardedSpan(own, self.team, number)

    def new_arena(  # type: ignore[override]
        self, tokens: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> ShardedPool:
        """Page pools for the keys and values of `tokens` positions, one at each rank."""
        own, number = self.own.new_arena(tokens, max_length, dtype), self.team.number()
        self.team.tell(
            commands.ARENA, pool=number, span=self.number, tokens=tokens, max_length=own.max_length,
            dtype=str(own.dtype).removeprefix("torch."),
        )  # fmt: skip
        return ShardedPool(own, self.team, number)

    def record(self, pool: ShardedPool) -> None:  # type: ignore[override]
        """See `Span.record`: all ranks record, as sums over them are in the graphs.  Raises SpanLost."""
        self.team.tell(commands.RECORD, span=self.number, pool=pool.number)
        with self.team.in_step(RECORD_SECONDS):
            self.own.record(pool.own)

    def new_cache(  # type: ignore[override]
        self, batch: int, max_length: int, dtype: torch.dtype | None = None
    ) -> ShardedCache:
        """See `Span.new_cache`."""
        return cast(ShardedCache, super().new_cache(batch, max_length, dtype))

    @torch.inference_mode()
    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        cache: ShardedCache,
        position: int,
        start: int | None = None,
        stop: int | None = None,
        *,
        rope_length: int = 0,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
    ) -> Tensor:
        """See `Span.forward`; without adapters.  Raises SpanLost."""
        start, stop = self._run_of(start, stop)
        tokens = hidden.shape[1]
        if adapter is not None or position != cache.length or position + tokens > cache.max_length:
            raise LocalProtocolError(
                f"{tokens} tokens at {position} do not continue a cache of {cache.length}/{cache.max_length}"
                f" without an adapter"
            )
        hidden = self._given(hidden)
        if prompts is not None:
            prompts = self._given(prompts)
        self.team.tell(
            commands.FORWARD, span=self.number, run=[start, stop], cache=cache.described(),
            shape=list(hidden.shape), prompts=None if prompts is None else list(prompts.shape),
            rope=rope_length,
        )  # fmt: skip
        with self.team.in_step():
            self.team.give(hidden)
            if prompts is not None:
                self.team.give(prompts)
            return self.own.forward(
                hidden, cache.own, position, start, stop, rope_length=rope_length, prompts=prompts
            )

    @torch.inference_mode()
    def decode(  # type: ignore[override]
        self,
        hidden: Tensor,
        rows: Sequence[ShardedCache],
        start: int,
        stop: int,
        *,
        rope_lengths: Sequence[int] | None = None,
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Span.decode`; without adapters.  Raises SpanLost."""
        start, stop = self._run_of(start, stop)
        if adapters is not None and any(each is not None for each in adapters):
            raise LocalProtocolError("an adapter in a step of several ranks")
        hidden = self._given(hidden)
        self.team.tell(
            commands.DECODE, span=self.number, run=[start, stop], shape=list(hidden.shape),
            caches=[cache.described() for cache in rows],
            ropes=None if rope_lengths is None else list(rope_lengths),
            tokens=None if tokens is None else list(tokens),
        )  # fmt: skip
        with self.team.in_step():
            self.team.give(hidden)
            return self.own.decode(
                hidden, [cache.own for cache in rows], start, stop, rope_lengths=rope_lengths, tokens=tokens
            )

    def new_stage(self) -> None:
        """None: each part copies what it needs."""

    def _given(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.device, self.dtype).contiguous()

    def _view(self, start: int, stop: int) -> tuple[Any, Any]:
        """See `Span._view`.  Any: a function in place of the library's model, which all ranks compute."""
        _, entry = self.own._view(start, stop)

        def run(*, inputs_embeds: Tensor, **named: object) -> Any:
            if torch.is_grad_enabled() and inputs_embeds.requires_grad:
                answer = _Apart.apply(inputs_embeds, self, start, stop)  # type: ignore[no-untyped-call]
            else:
                answer = self._apart(inputs_embeds, start, stop, None)
            return SimpleNamespace(last_hidden_state=answer)

        return run, entry

    def _apart(self, hidden: Tensor, start: int, stop: int, graph: int | None) -> Tensor:
        """Blocks on whole rows, at all ranks.  graph: a number under which the other ranks keep theirs."""
        hidden = hidden.contiguous()
        self.team.tell(
            commands.APART, span=self.number, run=[start, stop], shape=list(hidden.shape), graph=graph
        )
        with self.team.in_step():
            self.team.give(hidden.detach())
            return through(self.own, hidden, start, stop)


class _Kept:
    """Stands for a graph at the other ranks: they forget theirs when this value is gone."""

    def __init__(self, team: Team) -> None:
        self.number = team.number()
        weakref.finalize(self, team.later, commands.FORGET, kind="graph", number=self.number)


class _Apart(torch.autograd.Function):
    """Blocks on whole rows as one operation of autograd, whose graphs lie at the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, span: ShardedSpan, start: int, stop: int) -> Tensor:
        """Keeps the graph of this rank's shards."""
        ctx.span, ctx.kept = span, _Kept(span.team)
        with torch.enable_grad():
            ctx.leaf = hidden.detach().requires_grad_()
            ctx.output = span._apart(ctx.leaf, start, stop, ctx.kept.number)
        return cast(Tensor, ctx.output.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the hidden states, equal at all ranks."""
        team = ctx.span.team
        gradient = gradients[0].contiguous()
        team.tell(commands.BACK, graph=ctx.kept.number)
        with team.in_step():
            team.give(gradient)
            (found,) = torch.autograd.grad(ctx.output, ctx.leaf, gradient)
        ctx.output = ctx.leaf = None
        return found, None, None, None


def load_sharded(
    team: Team,
    folder: ModelFolder,
    start: int,
    stop: int,
    *,
    dtype: torch.dtype = torch.float32,
    quantize: str = "none",
    progress: Progress = silent,
) -> ShardedSpan:
    """Read the blocks [start, stop), each rank its shards.  Raises as `load_span`, and SpanLost."""
    folder.need({folder.tensors[name].file for name in block_tensors(folder, start, stop)}, progress)
    number = team.number()
    team.tell(
        commands.LOAD, span=number, folder=folder_message(folder, start, stop), run=[start, stop],
        dtype=str(dtype).removeprefix("torch."), quantize=quantize,
    )  # fmt: skip
    fault: Exception | None = None
    own: Span | None = None
    try:
        with team.group.alone():
            own = load_span(
                folder, start, stop, dtype=dtype, device=team.group.device, quantize=quantize,
                progress=progress, group=team.group,
            )  # fmt: skip
    except (ConfigError, OSError, MemoryError, RuntimeError) as error:
        fault = error
    for rank, answer in enumerate(team.answers(LOAD_SECONDS), 1):
        if "why" in answer and fault is None:
            kinds = {"memory": MemoryError, "config": ConfigError}
            fault = kinds.get(answer["kind"], RuntimeError)(f"rank {rank}: {answer['why']}")
    if fault is not None or own is None:
        team.later(commands.FORGET, kind="span", number=number)
        raise fault or LocalProtocolError("nothing was loaded")
    return ShardedSpan(own, team, number)
