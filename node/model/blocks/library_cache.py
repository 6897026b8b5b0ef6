"""The page pool as the library's attention reads it: a `Cache` for the time of one run.

The library calls `update` from each attention layer with the new keys and values, and computes with the
answer.  The pages are gathered into [rows, heads, length, head_dim]; a session whose pages are neighbours
is read in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from node.model.blocks.device.staging import Stage
from node.model.blocks.kv_pages import BlockShape, PagePool, RowStates, SpanCache
from tensor_codec.errors import LocalProtocolError


class _FullAttention(Cache):  # type: ignore[misc]  # the library's class is not typed
    """The properties that the library asks of each of our caches, for any kind of block."""

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops positions outside its window."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """Masks are made as for full attention."""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """No layer is without a cache."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        """The shape of the rows changes with every step."""
        return False


class ConvolutionState(LinearAttentionLayer):  # type: ignore[misc]  # the library's class is not typed
    """A convolution's state of a session's rows.

    On a device a step may find no memory in the middle and be computed again, so there the state before the
    last step is kept next to the newest one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reached: int | None = None
        self._before: tuple[int, Tensor | None] | None = None

    def begin(self, position: int, tokens: int) -> None:
        """A step of `tokens` positions from `position` on comes: the next one, or the last one again.

        Raises LocalProtocolError for any other step.
        """
        self.go_back(position)
        if self._reached not in (None, position):
            raise LocalProtocolError(f"a step at {position}, a convolution's state is at {self._reached}")
        own: Tensor | None = self.conv_states[0]
        self._before, self._reached = (position, own), position + tokens
        # The library writes into the tensor that it finds.
        self._set(None if own is None else own.clone())

    def go_back(self, position: int) -> None:
        """Undo the last step, if it began at `position` and was not the last but one."""
        if self._before is not None and self._before[0] == position != self._reached:
            self._reached = position
            self._set(self._before[1])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `RowStates`."""
        self._before = None
        super().reorder_cache(beam_idx)

    def _set(self, state: Tensor | None) -> None:
        self.conv_states[0] = state
        self.is_conv_states_initialized[0] = self.has_previous_state[0] = state is not None


class ArenaRun(_FullAttention):
    """The rows of one run of blocks: `tokens` new positions after `seen` old ones of the longest row.

    Its numbers are parts of a stage: nothing is read before they were sent.
    """

    def __init__(
        self,
        stage: Stage,
        pool: PagePool,
        rows: NDArray[np.int64],
        write: NDArray[np.int64],
        length: int,
        given: NDArray[np.int64],
        states: Mapping[int, RowStates] | None = None,
    ) -> None:
        """write: slots of the new positions, [rows, tokens].  length: positions to read.

        given: other numbers that are wanted on the device.
        states: of convolutions, by block (see `states_of`).
        """
        self.pool = pool
        self.rows = len(rows)
        self.length = length
        self.tokens: int = write.shape[1]
        slots = pool.slots(rows, length)
        first = int(slots[0, 0])
        together = len(rows) == 1 and int(slots[0, -1]) == first + length - 1
        self._first = first if together and bool((np.diff(slots[0]) == 1).all()) else None
        self._stage = stage
        self._write = stage.add(write.reshape(-1))
        self._given = stage.add(given)
        self._read = stage.add(slots.reshape(-1)) if self._first is None else -1
        layers: list[Any] = [None] * (pool.start + len(pool.shapes))
        for block, state in (states or {}).items():
            layers[block] = state
        super().__init__(layers=layers)

    @property
    def given(self) -> Tensor:
        """The other numbers, on the device."""
        return self._stage[self._given]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one block's new positions; all positions so far, [rows, heads, length, head_dim]."""
        index = layer_idx - self.pool.start
        return (
            self._write_and_read(self.pool.keys[index], key_states),
            self._write_and_read(self.pool.values[index], value_states),
        )

    def _write_and_read(self, store: Tensor, new: Tensor) -> Tensor:
        # [rows, heads, tokens, head_dim] -> [rows * tokens, heads, head_dim]
        written = self._stage[self._write]
        store.index_copy_(0, written, new.transpose(1, 2).reshape(-1, *store.shape[1:]).to(store.dtype))
        if self._first is not None:
            return store.narrow(0, self._first, self.length).to(new.dtype).transpose(0, 1).unsqueeze(0)
        gathered = store.index_select(0, self._stage[self._read]).to(new.dtype)
        return gathered.view(self.rows, self.length, *store.shape[1:]).transpose(1, 2)

    # The library's questions to a cache.  All blocks have seen the same tokens, so the answers do not
    # depend on the layer, and a span without any attention layer can answer too.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this step."""
        return self.length - self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(rows that attention sees, position of the first)."""
        return self.length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most positions of a row."""
        return int(self.pool.max_length)


def states_of(cache: SpanCache, run: tuple[int, int], position: int, tokens: int) -> dict[int, RowStates]:
    """The states of a session's convolutions in the blocks [start, stop) of a run, for a step; new ones too.

    position: in the cache's pages.
    """
    pool, found = cache.pool, {}
    for block in range(*run):
        if pool.shapes[block - pool.start] is None:
            state = cache.states.get(block)
            if state is None:
                state = cache.states[block] = ConvolutionState()
            if cache.keeps_last_states:
                state.begin(position, tokens)
            found[block] = state
    return found


class AfterPrefix(_FullAttention):
    """Keys and values in front of whole rows, for a pass with gradients: nothing is kept of the rows.

    pairs: of each block of the run the keys and the values, [tokens, heads * head_dim] each, for all rows.
    """

    def __init__(self, pairs: Mapping[int, tuple[Tensor, Tensor]], tokens: int) -> None:
        self._pairs = pairs
        self._tokens = tokens
        super().__init__(layers=[LinearAttentionLayer() for _ in range(max(pairs) + 1)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The prefix and then the rows, [rows, heads, tokens and the rows' tokens, head_dim]."""
        keys, values = self._pairs[layer_idx]
        return self._before(keys, key_states), self._before(values, value_states)

    def _before(self, own: Tensor, new: Tensor) -> Tensor:
        rows, heads, _, size = new.shape
        wide = own.to(new.device, new.dtype).view(-1, heads, size).transpose(0, 1)
        return torch.cat([wide.expand(rows, -1, -1, -1), new], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the rows."""
        return self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(positions that attention sees, position of the first)."""
        return self._tokens + query_length, 0


class ShapeProbe(_FullAttention):
    """Keeps nothing and notes the shapes that each block would cache in a run of one token."""

    def __init__(self, blocks: int) -> None:
        self.shapes: dict[int, BlockShape] = {}
        super().__init__(layers=[LinearAttentionLayer() for _ in range(blocks)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Note the shapes."""
        self.shapes[layer_idx] = BlockShape(
            key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3]
        )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing came before."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Only the new token."""
        return query_length, 0
