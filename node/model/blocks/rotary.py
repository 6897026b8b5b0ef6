"""The library's rotary embedding, given the length of the sequence of each position."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from node.model.blocks.device.staging import Stage
from node.model.blocks.rope import LengthRope, length_rope
from node.model.checkpoint.architecture import Architecture

Angles = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths whose angles the positions of a call take.

    parts: each length with the places of its positions, among all of the call, as a part of a stage; None
    where it has all of them.
    """

    stage: Stage
    parts: tuple[tuple[int, int | None], ...]


class RotaryByLength(nn.Module):
    """Replaces the library's module.

    lengths: of the positions of the next call (see `planned`); None: each call holds whole sequences from
    their first position on, as in the library.
    """

    def __init__(self, library: nn.Module, rope: LengthRope) -> None:
        super().__init__()
        self.library = library
        self.rope = rope
        self.lengths: Lengths | None = None

    def planned(self, stage: Stage, lengths: NDArray[np.int64]) -> Lengths:
        """The lengths of a call, int [rows or 1, tokens], one for each of its positions."""
        first: dict[tuple[int, ...], int] = {}
        groups = np.empty(lengths.shape, np.int64)
        for length in np.unique(lengths):
            group = first.setdefault(self.rope.factors(int(length)), int(length))
            groups[lengths == length] = group
        if len(first) == 1:
            return Lengths(stage, ((int(groups.flat[0]), None),))
        parts = [(length, stage.add(np.flatnonzero(groups == length))) for length in first.values()]
        return Lengths(stage, tuple(parts))

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Angles:
        """The answer of the library's module for `position_ids`, int [rows or 1, tokens]."""
        if self.lengths is None:
            return cast(Angles, self._fresh()(x, position_ids, *args, **kwargs))
        answer: list[Tensor] | None = None
        single = False
        for length, part in self.lengths.parts:
            if part is None:
                return self._of_length(length, x, position_ids, *args, **kwargs)
            places = self.lengths.stage[part]
            own = position_ids.reshape(-1).index_select(0, places)[None]
            found = self._of_length(length, x, own, *args, **kwargs)
            single = isinstance(found, Tensor)
            tensors = (found,) if isinstance(found, Tensor) else found
            if answer is None:
                answer = [one.new_empty(*position_ids.shape, one.shape[-1]) for one in tensors]
            for whole, one in zip(answer, tensors, strict=True):
                whole.view(-1, one.shape[-1]).index_copy_(0, places, one[0])
        assert answer is not None
        return answer[0] if single else tuple(answer)

    def _of_length(self, length: int, x: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Angles:
        """The angles of positions of one length, which the library takes from the last position of a call."""
        last = positions.new_full((len(positions), 1), length - 1)
        answer = self._fresh()(x, torch.cat((positions, last), 1), *args, **kwargs)
        if isinstance(answer, Tensor):
            return answer[:, :-1]
        return tuple(one[:, :-1] for one in answer)

    def _fresh(self) -> nn.Module:
        """The library's module in its first state: the module changes its state with each call."""
        fresh = copy.copy(self.library)
        fresh._buffers = {
            name: None if one is None else one.clone() for name, one in self.library._buffers.items()
        }
        return fresh


def by_length(model: nn.Module, architecture: Architecture) -> None:
    """Replace a base model's rotary module by a `RotaryByLength`, if its angles depend on the length."""
    rope = length_rope(cast(Any, model).config)
    container = model.get_submodule(architecture.container)
    rotary = getattr(container, "rotary_emb", None)
    if rope is not None and isinstance(rotary, nn.Module):
        container.rotary_emb = RotaryByLength(rotary, rope)


def rotary_by_length(model: nn.Module, architecture: Architecture) -> RotaryByLength | None:
    """The module that `by_length` has put there."""
    found = getattr(model.get_submodule(architecture.container), "rotary_emb", None)
    return found if isinstance(found, RotaryByLength) else None
