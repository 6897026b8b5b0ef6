"""Sessions wait for pages of the cache: until some are free, and never longer than is allowed."""

from __future__ import annotations

import pytest
import trio

from node.serving.cache_budget import FREE_AGAIN_SECONDS, CacheAdmission, CacheBudget
from tensor_codec.errors import CacheFull

WAIT = 10.0


def full() -> CacheAdmission:
    """One session holds every page."""
    admission = CacheAdmission(CacheBudget(160, 1.0), WAIT)
    admission.budget.admit(b"a", "one", 1, 160)
    admission.budget.grow(b"a", 160)
    return admission


async def test_what_is_free_is_taken_at_once(autojump_clock):
    admission = CacheAdmission(CacheBudget(160, 1.0), WAIT)
    await admission.admit(b"a", "one", 2, 80)
    await admission.grow(b"a", 33)
    assert (trio.current_time(), admission.budget.held_tokens("one")) == (0.0, 96)


async def test_a_session_waits_until_another_is_cut(autojump_clock):
    admission, times = CacheAdmission(CacheBudget(160, 1.0), WAIT), []
    for session, length, held in ((b"a", 80, 80), (b"b", 80, 48), (b"c", 32, 32)):
        await admission.admit(session, session.decode(), 1, length)
        await admission.grow(session, held)

    async def wants() -> None:
        await admission.grow(b"b", 64)
        times.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wants)
        await trio.sleep(3.0)
        admission.shrink(b"c", 17)  # no page is free after it: the wait goes on
        await trio.sleep(1.0)
        assert times == []
        admission.shrink(b"c", 16)
    assert times == [4.0]
    assert [admission.budget.held_tokens(peer) for peer in "abc"] == [80, 64, 16]


async def test_a_newcomer_waits_until_another_session_ends(autojump_clock):
    admission = full()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(admission.admit, b"b", "two", 1, 16)
        await trio.sleep(4.0)
        admission.release(b"a")
    assert trio.current_time() == 4.0
    await admission.grow(b"b", 16)


async def test_no_wait_is_longer_than_allowed_and_its_end_is_a_refusal(autojump_clock):
    admission = full()
    with pytest.raises(CacheFull) as refusal:
        await admission.admit(b"b", "two", 1, 16)
    assert trio.current_time() == WAIT
    assert refusal.value.retry_after_seconds == FREE_AGAIN_SECONDS


async def test_pages_that_will_never_be_free_are_refused_at_once(autojump_clock):
    admission = full()
    with pytest.raises(CacheFull) as refusal:
        await admission.admit(b"b", "two", 1, 161)
    assert (trio.current_time(), refusal.value.retry_after_seconds) == (0.0, None)


async def test_all_waiting_sessions_look_again_and_wait_on_where_nothing_is_left(autojump_clock):
    admission, done = full(), []

    async def wants(session: bytes, length: int) -> None:
        await admission.admit(session, session.decode(), 1, length)
        await admission.grow(session, length)
        done.append(session)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wants, b"b", 160)
        await trio.sleep(1.0)
        nursery.start_soon(wants, b"c", 160)
        await trio.sleep(1.0)
        admission.release(b"a")
        await trio.sleep(1.0)
        assert len(done) == 1
        admission.release(done[0])
    assert sorted(done) == [b"b", b"c"]


async def test_a_session_of_the_address_that_has_most_gives_way_after_half_of_the_wait(autojump_clock):
    budget, ended = CacheBudget(160, 1.0), []

    def end(session: object) -> None:
        ended.append((session, trio.current_time()))
        nursery.start_soon(release, session)

    async def release(session: object) -> None:
        await trio.sleep(0.1)
        admission.release(session)

    admission = CacheAdmission(budget, WAIT, end)
    for session in (b"a", b"b"):
        await admission.admit(session, session.decode(), 1, 80, "198.51.100.1/32")
        await admission.grow(session, 80)
    async with trio.open_nursery() as nursery:
        await admission.admit(b"c", "c", 1, 32, "192.0.2.1/32")
        await admission.grow(b"c", 32)
    assert ended == [(b"b", WAIT / 2)]
    assert trio.current_time() == pytest.approx(WAIT / 2 + 0.1)
