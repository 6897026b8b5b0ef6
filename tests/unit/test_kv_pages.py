"""The arena: who owns which page, and that nothing is lost or owned twice."""

from __future__ import annotations

import platform
import random

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.model.blocks import kv_pages
from node.model.blocks.kv_pages import PAGE_TOKENS, BlockShape, CannotCut, PagePool, SpanCache
from tensor_codec.errors import LocalProtocolError
from tensor_codec.limits import MIB

SHAPE = BlockShape(2, 3, 1, 4)


class NoState:
    """What stands for the states of a convolution.  orders: that its rows were given; positions: of each."""

    def __init__(self) -> None:
        self.orders: list[list[int]] = []
        self.positions: list[int] = []

    def begin(self, position: int, tokens: int) -> None:
        raise AssertionError("no step is computed here")

    def go_back(self, position: int) -> None:
        self.positions.append(position)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.orders.append(beam_idx.tolist())


def arena_of(tokens: int, max_length: int = 2048) -> PagePool:
    return PagePool(5, (SHAPE, None, SHAPE), tokens, max_length)


def test_stores_have_the_shapes_of_their_blocks_and_one_page_more_for_nobody():
    pool = arena_of(100)
    assert pool.pages == 7
    assert pool.free_tokens == 7 * PAGE_TOKENS
    assert pool.keys[0].shape == (8 * PAGE_TOKENS, 2, 3)
    assert pool.values[2].shape == (8 * PAGE_TOKENS, 1, 4)
    assert pool.keys[1].numel() == 0
    assert not any(store.any() for store in (*pool.keys, *pool.values))
    assert pool.nbytes == 2 * 8 * PAGE_TOKENS * SHAPE.values * 4


def test_two_hundred_sessions_opened_for_2048_that_use_40_fit_into_16384():
    pool = arena_of(16_384)
    caches = [pool.open(1, 2048) for _ in range(200)]
    for cache in caches:
        cache.reserve(40)
    assert pool.free_tokens == 16_384 - 200 * 48
    assert sum(cache.nbytes for cache in caches) == 200 * 48 * 2 * SHAPE.values * 4


def test_a_row_that_is_alone_owns_pages_that_lie_side_by_side():
    pool = arena_of(1024)
    cache = pool.open(1, 1024)
    for length in range(1, 400):
        cache.reserve(length)
    slots = pool.slots(cache.rows, 399)[0]
    assert (slots == range(slots[0], slots[0] + 399)).all()


def test_a_second_row_begins_where_both_can_grow():
    pool = arena_of(1024)
    one, two = pool.open(1, 512), pool.open(1, 512)
    for length in range(16, 400, 16):
        one.reserve(length)
        two.reserve(length)
    for cache in (one, two):
        slots = pool.slots(cache.rows, 384)[0]
        assert (slots == range(slots[0], slots[0] + 384)).all()


def test_sessions_that_follow_each_other_touch_no_more_pages_than_one_and_a_half_times_the_most_in_use():
    pool, touched, most = arena_of(65_536, 1024), set(), 0
    generator = random.Random(1)
    caches: list[tuple[SpanCache, int]] = []
    for _ in range(20_000):
        if len(caches) < 16:
            caches.append((pool.open(1, 1024), generator.randint(1, 900)))
        cache, wanted = caches.pop(generator.randrange(len(caches)))
        if cache.length >= wanted:
            cache.close()
            continue
        cache.length += 16
        cache.reserve(cache.length)
        touched |= set(pool.table(cache.rows, cache.pages).ravel().tolist())
        most = max(most, pool.pages - pool.free_tokens // PAGE_TOKENS)
        caches.append((cache, wanted))
    assert len(touched) <= max(touched) + 1 <= 1.5 * most + 1 < pool.pages / 3


def test_one_session_after_the_other_takes_the_same_pages_again():
    pool, touched = arena_of(65_536, 1024), set()
    for _ in range(1000):
        cache = pool.open(1, 1024)
        cache.reserve(900)
        touched |= set(pool.table(cache.rows, cache.pages).ravel().tolist())
        cache.close()
    assert touched == set(range(57))


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(platform.system() != "Linux", reason="only there memory can be given back")
def test_memory_of_pages_without_an_owner_goes_back_to_the_system_and_the_others_keep_their_values():
    shape = BlockShape(8, 64, 8, 64)
    pool = PagePool(0, (shape, shape), 65_536, 16_384)
    kept, ended = pool.open(1, 16_384), pool.open(1, 16_384)
    kept.reserve(16)
    ended.reserve(8192)  # 64 MiB
    pool.keys[1][pool.slots(kept.rows, 16)[0]] = 7.0
    before = resident()
    ended.close()
    pool.give_back_memory()
    assert before - resident() > 60 * MIB
    assert bool((pool.keys[1][pool.slots(kept.rows, 16)[0]] == 7.0).all())
    again = pool.open(1, 16_384)
    again.reserve(8192)
    assert not bool(pool.keys[1][pool.slots(again.rows, 8192)[0]].any())
    assert resident() > before - 10 * MIB


def test_what_lies_behind_a_rows_end_in_a_longer_batch_is_nobodys_zeros():
    pool = arena_of(256)
    short, long = pool.open(1, 128), pool.open(1, 128)
    short.reserve(3)
    long.reserve(40)
    rows = torch.tensor([int(short.rows[0]), int(long.rows[0])]).numpy()
    slots = pool.slots(rows, 40)
    assert (slots[0, 16:] >= pool.pages * PAGE_TOKENS).all()
    assert (slots[1] < pool.pages * PAGE_TOKENS).all()


def test_more_pages_than_there_are_is_our_bug_and_changes_nothing():
    pool = arena_of(64)
    cache = pool.open(2, 128)
    cache.reserve(16)
    with pytest.raises(LocalProtocolError, match="4 pages of the pool are needed, 32 tokens are free"):
        cache.reserve(48)
    assert (pool.free_tokens, cache.pages) == (32, 1)
    with pytest.raises(LocalProtocolError):
        cache.reserve(129)


def test_a_cut_gives_whole_pages_back_and_a_length_that_was_not_reached_is_refused():
    pool = arena_of(256)
    cache = pool.open(1, 256)
    cache.reserve(100)
    cache.length = 100
    cache.cut(33)
    assert (cache.length, cache.pages, pool.free_tokens) == (33, 3, 256 - 48)
    for length in (34, -1):
        with pytest.raises(ValueError, match=f"cannot cut a cache of 33 tokens to {length}"):
            cache.cut(length)
    cache.states[6] = NoState()
    with pytest.raises(CannotCut, match="from 33 to 5"):
        cache.cut(5)
    cache.cut(0)
    assert (cache.states, pool.free_tokens) == ({}, 256)


@given(st.integers(1, 500), st.integers(1, 40))
def test_every_position_of_every_row_has_a_place_of_its_own(length, batch):
    pool = arena_of(batch * 512)
    cache = pool.open(batch, 512)
    cache.reserve(length)
    slots = pool.slots(cache.rows, length)
    assert len(set(slots.ravel().tolist())) == batch * length
    for position in (0, length // 2, length - 1):
        places = pool.slots_of(cache.rows, torch.full((batch,), position).numpy())
        assert (places == slots[:, position]).all()


class Sessions(RuleBasedStateMachine):
    """Sessions that come, grow, are cut and go, beside plain counting."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = arena_of(640, 256)
        self.caches: list[SpanCache] = []

    @rule(batch=st.integers(1, 5))
    def open(self, batch: int) -> None:
        self.caches.append(self.pool.open(batch, 256))

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), length=st.integers(1, 256))
    def grow(self, data, length: int) -> None:
        cache = data.draw(st.sampled_from(range(len(self.caches))).map(self.caches.__getitem__))
        more = (-(-length // PAGE_TOKENS) - cache.pages) * cache.batch
        if more * PAGE_TOKENS > self.pool.free_tokens:
            with pytest.raises(LocalProtocolError):
                cache.reserve(length)
        else:
            cache.reserve(length)
            cache.length = max(cache.length, length)

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def cut(self, data) -> None:
        cache = data.draw(st.sampled_from(range(len(self.caches))).map(self.caches.__getitem__))
        cache.cut(data.draw(st.integers(0, cache.length)))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def close(self, data) -> None:
        self.caches.pop(data.draw(st.integers(0, len(self.caches) - 1))).close()

    @invariant()
    def no_page_has_two_owners_and_none_is_lost(self) -> None:
        owned = [
            page
            for cache in self.caches
            for page in self.pool.table(cache.rows, cache.pages).ravel().tolist()
        ]
        assert len(owned) == len(set(owned))
        assert self.pool.nobodys_page not in owned
        assert self.pool.free_tokens == (self.pool.pages - len(owned)) * PAGE_TOKENS
        rows = [row for cache in self.caches for row in cache.rows.tolist()]
        assert len(rows) == len(set(rows))

    def teardown(self) -> None:
        for cache in self.caches:
            cache.close()
            cache.close()
        assert self.pool.free_tokens == self.pool.pages * PAGE_TOKENS
        assert not any(len(pages) for pages in self.pool._pages)


TestSessions = Sessions.TestCase


def test_the_rows_of_a_closed_cache_are_used_again():
    pool = arena_of(64)
    held = pool.open(2, 16)
    rows = set(held.rows.tolist())
    for _ in range(100):
        cache = pool.open(3, 16)
        rows |= set(cache.rows.tolist())
        cache.close()
    assert len(rows) == 5
    held.close()
    assert len(rows | set(pool.open(5, 16).rows.tolist())) == 5


def test_a_page_that_held_nan_is_zero_for_its_next_owner():
    pool = arena_of(32)
    one = pool.open(1, 32)
    one.reserve(32)
    for store in (*pool.keys, *pool.values):
        store[: 2 * PAGE_TOKENS].fill_(float("nan"))
    one.close()
    two = pool.open(1, 32)
    two.reserve(3)
    slots = pool.slots(two.rows, PAGE_TOKENS)[0]
    assert not any(store[slots].any() for store in (*pool.keys, *pool.values))


# Rows that change their order

BATCHES = st.integers(1, 6)


def filled(batch: int, length: int, seed: int = 0) -> SpanCache:
    """A cache of random keys and values, between other sessions' pages, with states of a convolution."""
    pool = arena_of((batch + 2) * 512)
    other = pool.open(1, 512)
    cache = pool.open(batch, 512)
    for reached in range(1, length + 1, 16):
        cache.reserve(reached)
        other.reserve(reached)
    cache.reserve(length)
    generator = torch.Generator().manual_seed(seed)
    for store in (*pool.keys, *pool.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    cache.length = length
    cache.states[6] = NoState()
    return cache


def contents(cache: SpanCache) -> list[torch.Tensor]:
    """What each block holds of each row: [batch, length, heads, head_dim]."""
    slots = torch.from_numpy(cache.pool.slots(cache.rows, cache.length))
    return [store[slots] for store in (*cache.pool.keys, *cache.pool.values) if store.numel()]


@given(st.integers(1, 100), BATCHES, st.data())
def test_rows_become_the_rows_that_an_order_names(length, batch, data):
    cache = filled(batch, length)
    pool, own = cache.pool, set(cache.rows.tolist())
    for _ in range(2):
        order = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        expected = [each.index_select(0, torch.tensor(order)) for each in contents(cache)]
        stores = [store.clone() for store in (*pool.keys, *pool.values)]
        pages = pool.table(cache.rows, cache.pages)
        cache.select(order)
        assert all(map(torch.equal, contents(cache), expected))
        assert set(cache.rows.tolist()) == own
        foreign = [page for page in range(pool.pages + 1) if page not in pages]
        slots = [page * PAGE_TOKENS + at for page in foreign for at in range(PAGE_TOKENS)]
        now = (*pool.keys, *pool.values)
        assert all(
            torch.equal(store[slots], old[slots])
            for store, old in zip(now, stores, strict=True)
            if store.numel()
        )
        state = cache.states[6]
        assert isinstance(state, NoState)
        assert (state.orders[-1], state.positions[-1]) == (order, length)


@given(st.permutations(range(5)), st.integers(0, 60))
def test_a_permutation_of_rows_copies_no_page(order, length):
    cache = filled(5, length)
    stores = [store.clone() for store in (*cache.pool.keys, *cache.pool.values)]
    expected = [each.index_select(0, torch.tensor(order)) for each in contents(cache)]
    cache.select(order)
    assert all(map(torch.equal, (*cache.pool.keys, *cache.pool.values), stores))
    assert all(map(torch.equal, contents(cache), expected))


def test_rows_that_are_copied_keep_the_number_of_pages_and_grow_apart():
    cache = filled(3, 40)
    free = cache.pool.free_tokens
    cache.select([2, 2, 2])
    assert cache.pool.free_tokens == free
    cache.reserve(48)
    slots = cache.pool.slots(cache.rows, 48)
    assert len(set(slots.ravel().tolist())) == 3 * 48
    cache.states.clear()
    cache.cut(10)
    cache.close()
    assert cache.pool.free_tokens == 5 * 512 - 3 * PAGE_TOKENS, "but the other session's"


@pytest.mark.parametrize("copied_bytes", [1, 3 * PAGE_TOKENS * 2 * 3 * 4, 8 << 20])  # a page, three, all
def test_pages_are_copied_in_parts_where_their_copy_takes_memory(copied_bytes, monkeypatch):
    monkeypatch.setattr(kv_pages, "COPIED_BYTES", copied_bytes)
    monkeypatch.setattr(kv_pages, "copy_runs", kv_pages.copy_indexed)
    cache = filled(4, 100)
    expected = [each.index_select(0, torch.tensor([1, 1, 1, 0])) for each in contents(cache)]
    cache.select([1, 1, 1, 0])
    assert all(map(torch.equal, contents(cache), expected))
