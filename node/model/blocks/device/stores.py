"""Stores of keys and values on a device: stores of one shape are parts of one tensor.

So a page is emptied, or copied, in all blocks by one kernel.  A span that takes other blocks gives their
stores the places of those that it gave up, and needs another tensor only for more of them; stores in the
last tensor move into places that become free, so that its memory goes back as early as it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Store = tuple[int, str]  # a block's number in the model, and "keys" or "values"
Shape = tuple[int, ...]  # of a store: [slots, heads, head_dim]


@dataclass(slots=True)
class _Tensor:
    """places: by store; a place without a store is free."""

    whole: Tensor
    places: list[Store | None]


@dataclass(slots=True)
class StoreBlocks:
    """The stores of a page pool by their names, on one device."""

    dtype: torch.dtype
    device: torch.device
    _tensors: dict[Shape, list[_Tensor]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, each [stores, slots, heads, head_dim]; none without values."""
        return [each.whole for same in self._tensors.values() for each in same]

    def hold(self, wanted: Mapping[Store, Shape]) -> dict[Store, Tensor]:
        """Have these stores and no others; those that were here keep their values, fresh ones are zero.

        Raises torch.OutOfMemoryError; nothing is changed then.
        """
        plan = {
            shape: [
                _Tensor(each.whole, [_kept(store, shape, wanted) for store in each.places]) for each in same
            ]
            for shape, same in self._tensors.items()
        }
        here = {store for same in plan.values() for each in same for store in each.places}
        fresh: dict[Shape, list[Store]] = {}
        for store, shape in wanted.items():
            if store not in here and all(shape):
                fresh.setdefault(shape, []).append(store)
        emptied: list[Tensor] = []
        for shape, waiting in fresh.items():
            same = plan.setdefault(shape, [])
            emptied += _places(same, waiting)
            if waiting:
                same.append(_Tensor(self._empty((len(waiting), *shape)), [*waiting]))
        for place in emptied:  # only now: everything has been found
            place.zero_()
        for same in plan.values():
            _settle(same)
        self._tensors = {shape: same for shape, same in plan.items() if same}
        found = {
            store: each.whole[place]
            for same in self._tensors.values()
            for each in same
            for place, store in enumerate(each.places)
        }
        return {store: found[store] if all(shape) else self._empty(shape) for store, shape in wanted.items()}

    def _empty(self, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _kept(store: Store | None, shape: Shape, wanted: Mapping[Store, Shape]) -> Store | None:
    return store if store is not None and wanted.get(store) == shape else None


def _places(same: list[_Tensor], waiting: list[Store]) -> list[Tensor]:
    """Give stores that wait the free places of these tensors: the places' memory."""
    taken = []
    for each in same:
        for place, store in enumerate(each.places):
            if store is None and waiting:
                each.places[place] = waiting.pop(0)
                taken.append(each.whole[place])
    return taken


def _settle(same: list[_Tensor]) -> None:
    """Move stores of the last tensors into free places of the first ones; drop tensors without a store."""
    while True:
        same[:] = [each for each in same if any(store is not None for store in each.places)]
        free = [
            (each, place) for each in same[:-1] for place, store in enumerate(each.places) if store is None
        ]
        last = [place for place, store in enumerate(same[-1].places) if store is not None] if same else []
        if len(free) < len(last) or not last or len(same) < 2:
            return
        for (target, place), source in zip(free, last, strict=False):
            target.whole[place].copy_(same[-1].whole[source])
            target.places[place] = same[-1].places[source]
            same[-1].places[source] = None
