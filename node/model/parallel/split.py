"""A span whose blocks lie on several devices of one machine, one after the other.

The memory of the devices adds up, and peers see one server: one record, one hop.  Each device has the blocks
of one or more runs, as an ordinary `Span` each.  Hidden states cross once from a run to the next one.  Keys
and values stay with their blocks: every device has a page pool of its own, and a session has rows in all of
them.  (vLLM and others call it pipeline parallelism; here one step is at one device at a time.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from node.model.adapters.low_rank import SpanAdapter
from node.model.blocks.kv_pages import BlockShape, KeysAndValues, PagePool, Prefix, SpanCache
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.progress import Progress, silent
from tensor_codec.errors import LocalProtocolError

Run = tuple[int, int]


ELSEWHERE = BlockShape(0, 0, 0, 0)  # in the pool of one device: of a block that lies on another one


class PlacedShapes(tuple[BlockShape | None, ...]):
    """The shapes of blocks' caches, and `places`: the number of each block's device."""

    places: tuple[int, ...] = ()

    def at(self, place: int) -> list[BlockShape | None]:
        """The shapes of the blocks at one device; those of the others take no memory there."""
        both = zip(self, self.places, strict=True)
        return [shape if own == place else ELSEWHERE for shape, own in both]


def placed(shapes: Sequence[BlockShape | None], places: Sequence[int]) -> PlacedShapes:
    """The shapes with the places of their blocks."""
    found = PlacedShapes(shapes)
    found.places = tuple(places)
    return found


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Within the context kernels are launched on this device: Triton's and graphs go to the thread's own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, slots=True)
class Part:
    """A run of blocks on one device.  place: the device's number."""

    place: int
    span: Span


class SplitCache:
    """One session's rows in the page pools of all devices: the same pages of positions in each of them.

    caches: one for each device.  length: as in `SpanCache`.
    """

    def __init__(self, caches: Sequence[SpanCache]) -> None:
        self.caches = tuple(caches)
        self.length = 0

    def at(self, place: int) -> SpanCache:
        """The rows at one device, with the session's length."""
        own = self.caches[place]
        own.length = self.length
        return own

    @property
    def batch(self) -> int:
        """Rows."""
        return self.caches[0].batch

    @property
    def max_length(self) -> int:
        """Most positions of a row."""
        return self.caches[0].max_length

    @property
    def virtual_tokens(self) -> int:
        """Of a prefix, in the first places of every row."""
        return self.caches[0].virtual_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that the session owns now."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def can_cut(self) -> bool:
        """Whether the cache can go back to any earlier length."""
        return all(cache.can_cut for cache in self.caches)

    def reserve(self, length: int) -> None:
        """See `SpanCache.reserve`."""
        for place in range(len(self.caches)):
            self.at(place).reserve(length)

    def cut(self, length: int) -> None:
        """See `SpanCache.cut`."""
        for place in range(len(self.caches)):
            self.at(place).cut(length)
        self.length = length

    def begin_with(self, prefix: Prefix) -> None:
        """See `SpanCache.begin_with`: each device keeps its blocks' part of the prefix."""
        for place, cache in enumerate(self.caches):
            own = {
                block: values for block, values in prefix.blocks.items()
                if _place_in(cache.pool, block)
            }  # fmt: skip
            self.at(place).begin_with(_PartOfPrefix(prefix.virtual_tokens, own))

    def select(self, order: Sequence[int]) -> None:
        """See `SpanCache.select`."""
        for place in range(len(self.caches)):
            self.at(place).select(order)

    def close(self) -> None:
        """Give everything back."""
        for place in range(len(self.caches)):
            self.at(place).close()


def _place_in(pool: PagePool, block: int) -> bool:
    index = block - pool.start
    return 0 <= index < len(pool.shapes) and pool.shapes[index] not in (None, ELSEWHERE)


@dataclass(frozen=True, slots=True)
class _PartOfPrefix:
    virtual_tokens: int
    blocks: Mapping[int, KeysAndValues]


class SplitPool:
    """The page pools of all devices; each has stores for the blocks that lie there."""

    def __init__(self, pools: Sequence[PagePool]) -> None:
        self.pools = tuple(pools)
        self.page_tokens = self.pools[0].page_tokens
        self.max_length = self.pools[0].max_length

    @property
    def free_tokens(self) -> int:
        """Positions in pages without an owner, at each device."""
        return min(pool.free_tokens for pool in self.pools)

    @property
    def nbytes(self) -> int:
        """Bytes of all stores."""
        return sum(pool.nbytes for pool in self.pools)

    def open(self, batch: int, max_length: int) -> SplitCache:
        """See `PagePool.open`."""
        return SplitCache([pool.open(batch, max_length) for pool in self.pools])

    def hold(self, start: int, shapes: Sequence[BlockShape | None]) -> None:
        """See `PagePool.hold`.  shapes: of a `SplitSpan`, which say where the blocks lie."""
        for place, pool in enumerate(self.pools):
            pool.hold(start, cast(PlacedShapes, shapes).at(place))

    def give_back_memory(self) -> None:
        """See `PagePool.give_back_memory`."""
        for pool in self.pools:
            pool.give_back_memory()


class SplitSpan(Span):
    """The blocks [start, stop) of a model on several devices.  Made by `load_split`, `part` and `joined`.

    parts: runs of blocks, in order, each on one device; neighbours on one device are one run.
    devices: of the node; a part's place is an index of it.  device: of the first block, where hidden states
    enter.
    """

    def __init__(self, parts: Sequence[Part], devices: Sequence[torch.device]) -> None:
        self.parts = _merged(parts)
        self.devices = tuple(devices)
        first = self.parts[0].span
        blocks = [block for part in self.parts for block in first.architecture.blocks_of(part.span.model)]
        both = [(shape, part.place) for part in self.parts for shape in part.span.shapes]
        shapes = placed([shape for shape, _ in both], [place for _, place in both])
        whole = first._of(blocks, first.start, (None, shapes))
        super().__init__(whole.model, first.architecture, whole.start, whole.stop, (None, shapes))
        self.cache_dtype = first.cache_dtype

    @property
    def block_devices(self) -> dict[int, torch.device]:
        """The device of each block."""
        return {
            block: part.span.device for part in self.parts for block in range(part.span.start, part.span.stop)
        }

    @property
    def fused(self) -> bool:
        """Whether all blocks run through our own code."""
        return all(part.span.fused for part in self.parts)

    def part(self, start: int, stop: int) -> SplitSpan:
        """A span of the blocks [start, stop) of this span; each stays where it is."""
        self._run_of(start, stop)
        return SplitSpan(
            [Part(part.place, part.span.part(*run)) for part, run in self._runs(start, stop)], self.devices
        )

    def joined(self, others: Sequence[Span]) -> SplitSpan:
        """One span of the blocks of this span and of `others`, loaded alike: nothing is copied.

        Raises LocalProtocolError unless each span begins where another span ends.
        """
        parts = [part for span in (self, *others) for part in cast(SplitSpan, span).parts]
        parts.sort(key=lambda part: part.span.start)
        for one, two in pairwise(parts):
            if one.span.stop != two.span.start:
                raise LocalProtocolError(
                    f"blocks {one.span.start}:{one.span.stop} and {two.span.start}:{two.span.stop}"
                    " do not make one span"
                )
        return SplitSpan(parts, self.devices)

    def new_arena(  # type: ignore[override]
        self, tokens: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> SplitPool:
        """Page pools for the keys and values of `tokens` positions, one on each device."""
        shapes, most = cast(PlacedShapes, self.shapes), max_length or self.max_length
        kept = dtype or self.cache_dtype
        return SplitPool(
            [
                PagePool(self.start, shapes.at(place), tokens, most, dtype=kept, device=device)
                for place, device in enumerate(self.devices)
            ]
        )  # fmt: skip

    def record(self, pool: SplitPool) -> None:  # type: ignore[override]
        """See `Span.record`: each device over its own pool."""
        for part in self.parts:
            with launching_on(part.span.device):
                part.span.record(pool.pools[part.place])

    def new_cache(  # type: ignore[override]
        self, batch: int, max_length: int, dtype: torch.dtype | None = None
    ) -> SplitCache:
        """See `Span.new_cache`."""
        return cast(SplitCache, super().new_cache(batch, max_length, dtype))

    @torch.inference_mode()
    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        cache: SplitCache,
        position: int,
        start: int | None = None,
        stop: int | None = None,
        *,
        rope_length: int = 0,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
    ) -> Tensor:
        """See `Span.forward`: the answer is on the device of the last block of the run."""
        start, stop = self._run_of(start, stop)
        if position != cache.length:
            raise LocalProtocolError(f"a step at {position} does not continue a cache of {cache.length}")
        tokens = hidden.shape[1]
        for part, (first, last) in self._runs(start, stop):
            own = None if prompts is None else prompts[first - start : last - start]
            with launching_on(part.span.device):
                hidden = part.span.forward(
                    hidden, cache.at(part.place), position, first, last,
                    rope_length=rope_length, prompts=own, adapter=adapter,
                )  # fmt: skip
        cache.length = position + tokens
        return hidden

    @torch.inference_mode()
    def decode(  # type: ignore[override]
        self,
        hidden: Tensor,
        rows: Sequence[SplitCache],
        start: int,
        stop: int,
        *,
        rope_lengths: Sequence[int] | None = None,
        adapters: Sequence[SpanAdapter | None] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Span.decode`: the answer is on the device of the last block of the run."""
        start, stop = self._run_of(start, stop)
        for part, (first, last) in self._runs(start, stop):
            own = [cache.at(part.place) for cache in rows]
            with launching_on(part.span.device):
                hidden = part.span.decode(
                    hidden, own, first, last,
                    rope_lengths=rope_lengths, adapters=adapters, tokens=tokens,
                )  # fmt: skip
        return hidden

    def new_stage(self) -> None:
        """None: each part copies what it needs."""

    def _runs(self, start: int, stop: int) -> Iterator[tuple[Part, Run]]:
        """The parts that blocks [start, stop) lie in, each with its blocks of these."""
        for part in self.parts:
            first, last = max(start, part.span.start), min(stop, part.span.stop)
            if first < last:
                yield part, (first, last)

    def _view(self, start: int, stop: int) -> tuple[Any, Any]:
        """See `Span._view`: the answer is on the device of the last block.  Any: a function in place of the
        library's model, where there are several devices.
        """
        runs = list(self._runs(start, stop))
        if all(part.span.device == self.device for part in self.parts) and len(runs) == 1:
            return runs[0][0].span._view(start, stop)
        views = [(part.span._view(*run), part.span.device) for part, run in runs]

        def run_all(*, inputs_embeds: Tensor, position_ids: Tensor, **named: Any) -> Any:
            hidden = inputs_embeds
            for (model, entry), device in views:
                hidden = entry.given = hidden.to(device)
                try:
                    with launching_on(device):
                        answer = model(inputs_embeds=hidden, position_ids=position_ids.to(device), **named)
                finally:
                    entry.given = None
                hidden = answer.last_hidden_state
            return SimpleNamespace(last_hidden_state=hidden)

        return run_all, views[0][0][1] if len(views) == 1 else SimpleNamespace(given=None)


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, neighbours at one device made one."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].place == part.place:
            found[-1] = Part(part.place, found[-1].span.joined([part.span]))
        else:
            found.append(part)
    return tuple(found)


def load_split(
    folder: ModelFolder,
    start: int,
    places: Sequence[int],
    devices: Sequence[torch.device],
    *,
    dtype: torch.dtype = torch.float32,
    quantize: str = "none",
    progress: Progress = silent,
) -> SplitSpan:
    """Read the blocks from `start` on, each to its place.  Raises as `load_span`.

    places: of each block, an index of `devices`.
    """
    parts: list[Part] = []
    first = 0
    for index in range(1, len(places) + 1):
        if index == len(places) or places[index] != places[first]:
            device = devices[places[first]]
            with launching_on(device):
                span = load_span(
                    folder, start + first, start + index, dtype=dtype, device=device, quantize=quantize,
                    progress=progress,
                )  # fmt: skip
            parts.append(Part(places[first], span))
            first = index
    return SplitSpan(parts, devices)
