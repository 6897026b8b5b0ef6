"""The keys and values of one session: full length in every block, cut by setting a number.

The library calls `update` from each attention layer.  Sliding-window layers keep everything too:
what is outside the window is masked by the library, and going back needs no snapshot.  The
buffers double as the session grows, up to its maximum, so memory follows use.

A convolution's state (lfm2) holds only the last tokens, so a cache with one cannot be cut except
to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from tensor_codec.errors import Refused

_FIRST_TOKENS = 64  # rows of the first buffer: 96 KiB a block in SmolLM2-135M


class CannotCut(Refused):
    """The model keeps a state that cannot go back to an earlier position."""

    code = "cannot_cut"


class _Rows:
    """One block's keys and values, [batch, heads, capacity, head_dim] each; the two may differ."""

    __slots__ = ("keys", "values")

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, length: int, max_length: int) -> tuple[Tensor, Tensor]:
        """Put new rows at `length`; views of all rows up to their end."""
        end = length + keys.shape[-2]
        if self.keys is None or self.values is None or end > self.keys.shape[-2]:
            capacity = min(max_length, max(end, 2 * length, _FIRST_TOKENS))
            self.keys = _grown(self.keys, keys, length, capacity)
            self.values = _grown(self.values, values, length, capacity)
        self.keys.narrow(-2, length, end - length).copy_(keys)
        self.values.narrow(-2, length, end - length).copy_(values)
        return self.keys.narrow(-2, 0, end), self.values.narrow(-2, 0, end)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (self.keys, self.values) if rows is not None)


def _grown(old: Tensor | None, like: Tensor, length: int, capacity: int) -> Tensor:
    """A buffer for `capacity` rows like these that begins with the first `length` of the old one."""
    new = like.new_empty((*like.shape[:-2], capacity, like.shape[-1]))
    if old is not None and length:
        new.narrow(-2, 0, length).copy_(old.narrow(-2, 0, length))
    return new


class SpanCache(Cache):  # type: ignore[misc]  # the library's class is not typed
    """One session's cache in a span, indexed by the model's own block numbers.

    length: tokens of the session that every block of its run has seen.  Writing a step does not
    move it: `Span.forward` does, once the whole step is computed, so a step that failed left
    no trace in keys and values.  A convolution's state may have moved: such a session must begin again.
    """

    def __init__(self, start: int, convolutions: Sequence[bool], batch: int, max_length: int) -> None:
        """convolutions: for each block of the span, from `start`, whether it keeps a convolution's state."""
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self._first = start
        self._convolutions = tuple(convolutions)
        super().__init__(layers=[None] * start + self._empty())

    def _empty(self) -> list[Any]:  # Any: the library's layer, or ours
        return [LinearAttentionLayer() if convolution else _Rows() for convolution in self._convolutions]

    @property
    def can_cut(self) -> bool:
        """Whether the cache can go back to any earlier length."""
        return not any(self._convolutions)

    def cut(self, length: int) -> None:
        """Forget what comes at and after position `length`.

        Raises CannotCut, and ValueError for a length that was not reached.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        if length == self.length:
            return
        if not self.can_cut:
            if length:
                raise CannotCut(f"a convolution's state cannot go back from {self.length} to {length}")
            self.layers[self._first :] = self._empty()
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now."""
        total = 0
        for layer in self.layers[self._first :]:
            if isinstance(layer, _Rows):
                total += layer.nbytes
            else:
                total += sum(state.nbytes for state in layer.conv_states.values() if state is not None)
        return total

    # What the library asks of a cache.  All blocks have seen the same tokens, so the answers do not
    # depend on the layer, and a span without any attention layer can answer too.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one block's new rows; all its rows so far."""
        rows: _Rows = self.layers[layer_idx]
        return rows.write(key_states, value_states, self.length, self.max_length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this step."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(rows that attention sees, position of the first)."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens that the session may have."""
        return self.max_length

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops what left its window."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """Masks are made as for full attention."""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer keeps something."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        """The rows change their shape with every step."""
        return False


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
