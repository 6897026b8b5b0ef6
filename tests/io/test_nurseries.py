"""Nurseries for what lives as long as a block."""

import os
import signal
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel
import trio.testing

from node.runtime.nurseries import background_nursery, run


async def test_the_tasks_end_with_the_block():
    ended = []

    async def background():
        try:
            await trio.sleep_forever()
        finally:
            ended.append(1)

    async with background_nursery() as nursery:
        nursery.start_soon(background)
        nursery.start_soon(background)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
    assert ended == [1, 1]


async def test_an_exception_of_the_block_comes_out_as_it_is():
    error = KeyError("mine")

    async def block():
        async with background_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise error

    with pytest.raises(KeyError) as caught:
        await block()
    assert caught.value is error


async def test_an_exception_of_the_block_comes_through_contexts_built_on_one():
    @asynccontextmanager
    async def opened():
        async with background_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            yield nursery

    with pytest.raises(KeyError, match="mine"):
        async with opened(), opened():
            raise KeyError("mine")


async def test_an_exception_of_a_task_cancels_the_block_and_comes_out_in_a_group():
    async def fails():
        raise ValueError("a bug")

    async def block():
        async with background_nursery() as nursery:
            nursery.start_soon(fails)
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        await block()
    assert caught.group_contains(ValueError, match="a bug")


async def test_a_cancelled_block_is_cancelled_and_nothing_else():
    with trio.move_on_after(0.01) as scope:
        async with background_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_leaving_the_block_early_from_a_loop_ends_the_tasks():
    ended = []

    async def background():
        try:
            await trio.sleep_forever()
        finally:
            ended.append(1)

    for _ in range(3):
        async with background_nursery() as nursery:
            nursery.start_soon(background)
            await trio.testing.wait_all_tasks_blocked()
            continue
    assert ended == [1, 1, 1]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ([KeyError("a")], KeyError),
        ([KeyError("a"), KeyError("b")], KeyError),
        ([KeyboardInterrupt(), KeyError("a")], KeyboardInterrupt),
        ([KeyError("a"), OSError("b")], BaseExceptionGroup),
    ],
)
def test_a_command_ends_with_its_error_and_not_with_a_group_of_one(raised, expected):
    async def fail(error):
        raise error

    async def main():
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            for nursery, error in zip((outer, inner), raised, strict=False):
                nursery.start_soon(fail, error)

    with pytest.raises(expected):
        run(main)


def test_ctrl_c_ends_the_command_whatever_its_tasks_do_with_errors():
    async def swallows_everything():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await trio.lowlevel.checkpoint()
        except KeyboardInterrupt:
            pass
        await trio.sleep_forever()

    async def main():
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swallows_everything)

    with pytest.raises(KeyboardInterrupt):
        run(main)
