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

from node.model.blocks.device.staging import numbers_on
from node.model.blocks.kv_pages import BlockShape, PagePool, RowStates


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


class ArenaRun(_FullAttention):
    """The rows of one run of blocks: `tokens` new positions after `seen` old ones of the longest row."""

    def __init__(
        self,
        pool: PagePool,
        rows: NDArray[np.int64],
        write: NDArray[np.int64],
        length: int,
        states: dict[int, RowStates] | None = None,
        given: NDArray[np.int64] | None = None,
    ) -> None:
        """write: slots of the new positions, [rows, tokens].  length: positions to read.

        states: of convolutions, by block; made here where they are missing.
        given: other numbers that are wanted on the device: one copy brings them all.
        """
        self.pool = pool
        self.rows = len(rows)
        self.length = length
        self.tokens: int = write.shape[1]
        slots = pool.slots(rows, length)
        first = int(slots[0, 0])
        together = len(rows) == 1 and int(slots[0, -1]) == first + length - 1
        self._first = first if together and bool((np.diff(slots[0]) == 1).all()) else None
        more = () if self._first is not None else (slots.reshape(-1),)
        given = np.zeros((0, 0), np.int64) if given is None else given
        self._write, self.given, *read = numbers_on(pool.device, write.reshape(-1), given, *more)
        self._read = read[0] if read else None
        layers: list[Any] = [None] * (pool.start + len(pool.shapes))
        for index, shape in enumerate(pool.shapes):
            if shape is None and states is not None:
                block = pool.start + index
                layers[block] = states.setdefault(block, LinearAttentionLayer())
        super().__init__(layers=layers)

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
        store.index_copy_(0, self._write, new.transpose(1, 2).reshape(-1, *store.shape[1:]).to(store.dtype))
        if self._first is not None:
            return store.narrow(0, self._first, self.length).transpose(0, 1).unsqueeze(0)
        assert self._read is not None
        gathered = store.index_select(0, self._read)
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
