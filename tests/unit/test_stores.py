"""Stores of a page pool on a device: which memory they share, and what a move does to it."""

from __future__ import annotations

import random

import pytest
import torch

from node.model.blocks import kv_pages
from node.model.blocks.device import stores
from node.model.blocks.device.stores import StoreBlocks
from node.model.blocks.kv_pages import PAGE_TOKENS, BlockShape, PagePool
from tests.meta_device import DEVICE, Counted

SHAPE = 32, 2, 4


def wanted(start: int, stop: int) -> dict[stores.Store, stores.Shape]:
    return {(block, kind): SHAPE for block in range(start, stop) for kind in ("keys", "values")}


def marked(held: dict[stores.Store, torch.Tensor]) -> None:
    for (block, kind), store in held.items():
        store.fill_(100 * block + (kind == "values"))


def assert_marked(held: dict[stores.Store, torch.Tensor], blocks: range) -> None:
    for block in blocks:
        for kind in ("keys", "values"):
            assert (held[block, kind] == 100 * block + (kind == "values")).all()


def test_a_span_has_one_tensor_and_each_store_is_a_part_of_it():
    own = StoreBlocks(torch.float32, torch.device("cpu"))
    held = own.hold(wanted(3, 7))
    (whole,) = own.tensors
    assert whole.shape == (8, *SHAPE)
    assert len({store.data_ptr() for store in held.values()}) == 8
    assert all(store.untyped_storage().data_ptr() == whole.data_ptr() for store in held.values())
    assert all(store.is_contiguous() for store in held.values())


def test_blocks_that_stay_keep_their_values_and_others_get_the_places_of_those_that_go():
    own = StoreBlocks(torch.float32, torch.device("cpu"))
    held = own.hold(wanted(0, 8))
    marked(held)
    held = own.hold(wanted(2, 10))
    assert len(own.tensors) == 1
    assert_marked(held, range(2, 8))
    assert not any(held[block, "keys"].any() or held[block, "values"].any() for block in (8, 9))


def test_a_move_block_by_block_takes_no_more_memory_in_the_end():
    own = StoreBlocks(torch.float32, torch.device("cpu"))
    marked(own.hold(wanted(0, 8)))
    both = own.hold(wanted(0, 10))
    marked(both)
    assert [len(each) for each in own.tensors] == [16, 4]
    held = own.hold(wanted(2, 10))
    assert [len(each) for each in own.tensors] == [16]
    assert_marked(held, range(2, 10))


def test_moves_at_random_lose_nothing():
    generator = random.Random(1)
    own, start, stop = StoreBlocks(torch.float32, torch.device("cpu")), 0, 4
    marked(own.hold(wanted(start, stop)))
    for _ in range(60):
        new = generator.randrange(0, 12)
        size = generator.randrange(1, 8)
        held = own.hold(wanted(new, new + size))
        assert_marked(held, range(max(start, new), min(stop, new + size)))
        assert len({store.data_ptr() for store in held.values()}) == 2 * size
        assert sum(len(each) for each in own.tensors) >= 2 * size
        marked(held)
        start, stop = new, new + size


def test_a_move_without_memory_changes_nothing(monkeypatch):
    own = StoreBlocks(torch.float32, torch.device("cpu"))
    marked(own.hold(wanted(0, 4)))
    held = own.hold(wanted(0, 4))

    def none(self: StoreBlocks, shape: stores.Shape) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(StoreBlocks, "_empty", none)
        with pytest.raises(torch.OutOfMemoryError):
            own.hold(wanted(2, 9))
    assert_marked(held, range(4))
    assert_marked(own.hold(wanted(0, 4)), range(4))


def test_shapes_that_differ_have_tensors_of_their_own_and_a_block_without_attention_has_none():
    pool = PagePool(5, (BlockShape(2, 3, 1, 4), None, BlockShape(2, 3, 1, 4)), 100, 2048, device=DEVICE)
    assert sorted(tuple(each.shape) for each in pool._stores) == [
        (2, 8 * PAGE_TOKENS, 1, 4),
        (2, 8 * PAGE_TOKENS, 2, 3),
    ]
    assert pool.keys[0].shape == (8 * PAGE_TOKENS, 2, 3)
    assert pool.values[2].shape == (8 * PAGE_TOKENS, 1, 4)
    assert pool.keys[1].numel() == 0
    assert pool.nbytes == 2 * 8 * PAGE_TOKENS * BlockShape(2, 3, 1, 4).values * 4


def test_pages_are_emptied_by_one_launch_for_all_blocks():
    shape = BlockShape(2, 4, 2, 4)
    pool = PagePool(0, (shape,) * 32, 4096, 2048, device=DEVICE)
    cache = pool.open(1, 2048)
    with Counted() as counted:
        cache.reserve(256)
    assert counted.launched == {"zero_": 1}
    with Counted() as counted:
        cache.reserve(257)
    assert counted.launched == {"zero_": 1}
    assert (counted.to_device, counted.waits) == (0, [])


def test_rows_are_copied_by_two_launches_for_all_blocks_and_one_copy(monkeypatch):
    monkeypatch.setattr(kv_pages, "COPIED_BYTES", 1 << 30)
    shape = BlockShape(2, 4, 2, 4)
    pool = PagePool(0, (shape,) * 32, 4096, 2048, device=DEVICE)
    cache = pool.open(3, 512)
    cache.reserve(100)
    cache.length = 100
    with Counted() as counted:
        cache.select([0, 0, 2])
    assert counted.launched == {"index_select": 1, "index_copy_": 1}
    assert (counted.to_device, counted.waits) == (1, [])
