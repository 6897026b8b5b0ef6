"""Weights lie one after the other in one mapping, and memory goes back as tensors end."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from node.model.weights.arena import HUGE_BYTES, LINE_BYTES, WeightArena, arena_bytes

ROWS = HUGE_BYTES // 1024


def filled(rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1024] of small whole numbers."""
    return (torch.arange(rows * 1024) % 100).to(dtype).view(rows, 1024)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_tensors_are_copied_one_after_the_other(dtype: torch.dtype) -> None:
    parts = [filled(ROWS, dtype), filled(3, dtype), filled(5, dtype)]
    arena = WeightArena(arena_bytes(parts))
    one, two = arena.joined(parts[:2]), arena.joined(parts[2:])
    assert torch.equal(one, torch.cat(parts[:2]))
    assert torch.equal(two, parts[2])
    assert one.data_ptr() % HUGE_BYTES == 0
    assert two.data_ptr() == one.data_ptr() + one.nbytes


def test_a_matrix_begins_with_a_cache_line() -> None:
    parts = [torch.ones(HUGE_BYTES + 7, 1, dtype=torch.int8), torch.ones(3, 5)]
    arena = WeightArena(arena_bytes(parts))
    assert [arena.joined([part]).data_ptr() % LINE_BYTES for part in parts] == [0, 0]


def test_memory_goes_back_as_the_last_view_of_a_tensor_ends() -> None:
    parts = [filled(ROWS, torch.int8), filled(ROWS, torch.int8)]
    arena = WeightArena(arena_bytes(parts))
    first, second = arena.joined(parts[:1]), arena.joined(parts[1:])
    view = first[7]
    begin = arena._at - 2 * HUGE_BYTES
    del first
    assert arena._memory[begin + 1 : begin + 4] == bytes([1, 2, 3])
    del view
    # Pages that were given back read as zeros.
    assert arena._memory[begin : begin + HUGE_BYTES] == bytes(HUGE_BYTES)
    assert torch.equal(second, parts[1])


def test_a_tensor_outlives_its_arena() -> None:
    part = filled(ROWS, torch.float32)
    kept = WeightArena(part.nbytes).joined([part])
    assert torch.equal(kept, part)


def test_what_does_not_fit_lies_in_torch_s_own_memory() -> None:
    part = filled(2 * ROWS, torch.int8)
    arena = WeightArena(HUGE_BYTES)
    assert torch.equal(arena.joined([part]), part)
    assert arena.joined([part[:ROWS]]).data_ptr() % HUGE_BYTES == 0, "its room is still there"


def test_without_a_mapping_all_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> mmap.mmap:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("node.model.weights.arena.mmap.mmap", refused)
    part = filled(ROWS, torch.int8)
    assert torch.equal(WeightArena(part.nbytes).joined([part]), part)
