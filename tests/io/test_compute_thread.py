"""The torch thread, seen from trio: callers get control back, functions run one by one."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import trio
import trio.testing

from node.runtime.compute_thread import open_compute_thread


async def test_a_function_runs_in_the_thread_and_its_result_comes_back():
    async with open_compute_thread("torch-test") as compute:
        assert await compute.run(lambda a, b: (a + b, threading.current_thread().name), 2, 3) == (
            5,
            "torch-test",
        )


async def test_all_functions_run_in_one_thread():
    async with open_compute_thread() as compute:
        threads = {await compute.run(threading.get_ident) for _ in range(20)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyError("k"), SystemExit(3)], ids=repr)
async def test_an_exception_comes_through_and_the_thread_goes_on(error):
    def fail():
        raise error

    async with open_compute_thread() as compute:
        with pytest.raises(type(error)) as caught:
            await compute.run(fail)
        assert caught.value is error
        assert await compute.run(lambda: "alive") == "alive"


async def test_functions_run_one_after_another_in_the_order_of_the_calls():
    seen, running = [], []

    def work(number):
        running.append(number)
        assert running == [number]
        seen.append(number)
        running.clear()

    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        gate = threading.Event()
        nursery.start_soon(compute.run, gate.wait, 10)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(10):
            nursery.start_soon(compute.run, work, number)
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert seen == list(range(10))


async def test_the_event_loop_goes_on_while_a_function_computes():
    gate = threading.Event()
    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        nursery.start_soon(compute.run, gate.wait, 10)
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        gate.set()


async def test_a_cancelled_caller_gets_control_at_once_and_its_result_is_dropped():
    gate, done = threading.Event(), []

    def work():
        gate.wait(10)
        done.append(1)

    async with open_compute_thread() as compute:
        with trio.move_on_after(0.01) as scope:
            await compute.run(work)
        assert scope.cancelled_caught
        assert done == []  # it is still in the thread
        gate.set()
        assert await compute.run(lambda: "next") == "next"
        assert done == [1]


async def test_a_function_whose_caller_is_cancelled_while_it_waits_is_not_run():
    gate, ran = threading.Event(), []
    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        nursery.start_soon(compute.run, gate.wait, 10)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            nursery.start_soon(_cancel_when_blocked, scope)
            await compute.run(ran.append, "not wanted")
        assert scope.cancelled_caught
        gate.set()
        await compute.run(ran.append, "wanted")
    assert ran == ["wanted"]


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


async def test_a_caller_that_is_cancelled_already_runs_nothing():
    ran = []
    async with open_compute_thread() as compute:
        with trio.CancelScope() as scope:
            scope.cancel()
            await compute.run(ran.append, 1)
        await compute.run(lambda: None)
    assert scope.cancelled_caught
    assert ran == []


async def test_the_thread_is_gone_at_the_exit_and_what_still_ran_is_finished():
    gate, done = threading.Event(), []

    def work():
        gate.wait(10)
        done.append(threading.current_thread())

    async with open_compute_thread() as compute:
        with trio.move_on_after(0.01):
            await compute.run(work)
        gate.set()
    assert len(done) == 1
    assert not done[0].is_alive()


async def test_the_thread_is_gone_when_the_block_raises_or_is_cancelled():
    async def raises():
        async with open_compute_thread("torch-raises") as compute:
            await compute.run(lambda: None)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await raises()
    with trio.move_on_after(0.01) as scope:
        async with open_compute_thread("torch-cancelled"):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not {thread.name for thread in threading.enumerate()} & {"torch-raises", "torch-cancelled"}


class Big:
    """Something that can be seen to be gone."""


async def test_an_idle_thread_keeps_nothing_of_the_last_function_alive():
    async with open_compute_thread() as compute:
        given, answered = Big(), await compute.run(Big)
        await compute.run(id, given)
        gone = weakref.ref(given), weakref.ref(answered)
        del given, answered
        with trio.fail_after(5):
            while any(ref() is not None for ref in gone):
                await trio.sleep(0.001)  # the thread may be about to let go
                gc.collect()


@pytest.mark.parametrize(("interrupted", "seconds"), [(True, 1), (False, 30)])
async def test_whoever_is_interrupted_does_not_wait_for_a_long_load(
    interrupted: bool, seconds: int, autojump_clock: trio.testing.MockClock
):
    begun, loaded = threading.Event(), threading.Event()

    def load() -> None:
        begun.set()
        loaded.wait()

    began = trio.current_time()
    try:
        with trio.CancelScope() as everything:
            async with open_compute_thread() as compute, trio.open_nursery() as nursery:
                nursery.start_soon(compute.run, load)
                await trio.to_thread.run_sync(begun.wait)
                (everything if interrupted else nursery.cancel_scope).cancel()
        assert trio.current_time() - began == pytest.approx(seconds)
    finally:
        loaded.set()


async def test_the_thread_is_idle_once_nothing_runs_or_waits_in_it_even_after_a_cancellation():
    async with open_compute_thread() as compute:
        assert compute.is_idle
        gate = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compute.run, gate.wait, 10)
            nursery.start_soon(compute.run, gate.wait, 10)
            await trio.testing.wait_all_tasks_blocked()
            assert not compute.is_idle
            nursery.cancel_scope.cancel()
        assert not compute.is_idle  # one is still running, and nobody waits for it
        gate.set()
        await compute.run(int)
        assert compute.is_idle
