"""The bridge between asyncio and trio: a fake swarm in the trio thread, both event loops around it."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
import uvloop

from client.api import SwarmLike
from client.bridges import trio_thread
from client.bridges.asyncio_swarm import open_bridge
from client.bridges.trio_thread import TOKENS_AHEAD
from client.connect import connect
from node.config import ConfigError
from routing.chains.search import NoChain
from tensor_codec.errors import CacheFull, PeerGone, SlowPeer
from tests.fakes_bridges import CONFIG, SOON, FakeSwarm, hidden, opener


@asynccontextmanager
async def bridged(swarm: FakeSwarm) -> AsyncIterator[SwarmLike]:
    async with open_bridge(CONFIG, opener(swarm)) as handle:
        yield handle


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Every test collects what is left of it; what was imported before need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request) -> Callable[[Callable[[], Awaitable]], object]:
    """Run an asyncio function; afterwards there is no task, no thread and no complaint of the loop."""
    runner = {"asyncio": asyncio.run, "uvloop": uvloop.run}[request.param]
    complaints: list[dict] = []

    async def main(function):
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(SOON):
            result = await function()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    def run_it(function):
        before = set(threading.enumerate())
        result = runner(main(function))
        gc.collect()
        assert set(threading.enumerate()) <= before
        assert not complaints
        return result

    return run_it


async def take(swarm: SwarmLike, prompt: str, count: int = 5) -> list[str]:
    return [str(token) async for token in swarm.generate(prompt, max_new_tokens=count)]


def at_least(fake: FakeSwarm, made: int) -> bool:
    return fake.made >= made


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for the other thread."""
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110  the other thread sets no asyncio.Event
            await asyncio.sleep(0.001)


def test_tokens_come_in_order(run):
    async def main():
        async with bridged(FakeSwarm()) as swarm:
            return await take(swarm, "t", 100)

    assert run(main) == [f"t{index}" for index in range(100)]


def test_many_generations_run_at_once(run):
    async def main():
        async with bridged(FakeSwarm()) as swarm:
            return await asyncio.gather(*(take(swarm, f"{number}-", 30) for number in range(20)))

    assert run(main) == [[f"{number}-{index}" for index in range(30)] for number in range(20)]


def test_a_slow_consumer_holds_the_generation_back(run):
    async def main():
        fake, got = FakeSwarm(), []
        async with bridged(fake) as swarm:
            async for token in swarm.generate("t", max_new_tokens=3 * TOKENS_AHEAD):
                got.append(token)
                ahead = min(len(got) + TOKENS_AHEAD, 3 * TOKENS_AHEAD)
                await eventually(partial(at_least, fake, ahead))
                assert fake.made <= len(got) + TOKENS_AHEAD
        return len(got)

    assert run(main) == 3 * TOKENS_AHEAD


def test_cancelling_in_mid_token_ends_the_generation_on_the_other_side(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            task = asyncio.create_task(take(swarm, "hang"))
            await eventually(lambda: fake.made == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert fake.generating == 0  # at once, not some time later
            return await take(swarm, "next", 2)

    assert run(main) == ["next0", "next1"]


def test_a_deadline_of_the_caller_ends_the_generation(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await take(swarm, "hang")
            assert fake.generating == 0

    run(main)


def test_leaving_the_loop_early_ends_the_generation(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            async with aclosing(swarm.generate("t", max_new_tokens=1000)) as tokens:
                async for token in tokens:
                    assert token == "t0"
                    break
            assert fake.generating == 0
            assert fake.made <= 1 + TOKENS_AHEAD

    run(main)


def test_a_generator_that_is_dropped_is_closed_by_the_event_loop(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            async for _ in swarm.generate("t", max_new_tokens=1000):
                break
            gc.collect()
            await eventually(lambda: fake.generating == 0)

    run(main)


def test_a_generator_that_is_never_used_leaves_nothing_behind(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            swarm.generate("t")
        assert fake.generating == fake.made == 0

    run(main)


def test_errors_arrive_as_what_they_are(run):
    async def main():
        async with bridged(FakeSwarm()) as swarm:
            with pytest.raises(ValueError, match="max_new_tokens is 0"):
                swarm.generate("t", max_new_tokens=0)  # at the call, as in trio
            refused = swarm.generate("refuse")
            assert [await anext(refused), await anext(refused)] == ["refuse0", "refuse1"]
            with pytest.raises(CacheFull) as refusal:
                await anext(refused)
            assert refusal.value.retry_after_seconds == 3.0
            with pytest.raises(NoChain):
                await swarm.route()
            with pytest.raises(ValueError, match="too long"):
                async with swarm.session(max_length=4096):
                    pass
            with pytest.raises(PeerGone):
                async with swarm.session() as session:
                    await session.step(hidden(-1))

    run(main)


def test_an_error_of_the_opening_comes_out_of_the_entry(run):
    @asynccontextmanager
    async def refuse(config):
        await trio.lowlevel.checkpoint()
        raise ConfigError("no such model")
        yield

    async def main():
        with pytest.raises(ConfigError, match="no such model"):
            async with open_bridge(CONFIG, refuse):
                pass

    run(main)


def test_connect_takes_the_bridge_under_asyncio(run):
    async def main():
        with pytest.raises(ConfigError, match="at least one node"):
            async with connect(peers=[]):
                pass

    run(main)


def test_an_error_of_the_body_comes_out_as_it_is(run):
    async def main():
        fake = FakeSwarm()
        with pytest.raises(SlowPeer):
            async with bridged(fake):
                raise SlowPeer("mine")
        assert not fake.open

    run(main)


def test_a_session_steps_and_is_closed(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            async with swarm.session() as session:
                assert fake.sessions == 1
                assert await session.step(hidden(3)) == 6
                assert await session.step(hidden(1), position=2, reply="last") == 2
                assert (session.length, session.chain, session.times) == (3, "chain", None)
            assert fake.sessions == 0

    run(main)


def test_a_session_without_a_with_is_opened_stepped_and_closed_at_once(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            session = await swarm.open_session(max_length=9, start=3, stop=5)
            assert (session.chain, await session.prefill(hidden(3)), session.length) == ("3:5", 6, 3)
            session.close()
            await eventually(fake.opened[0].closed.is_set)
            other = await swarm.open_session()
            finalizer = weakref.finalize(fake, other.close)
            await asyncio.to_thread(finalizer)
            await eventually(fake.opened[1].closed.is_set)
            with pytest.raises(ValueError, match="too long"):
                await swarm.open_session(max_length=4096)
            assert await swarm.peer_info("somebody") == ("info", "somebody")
        session.close()  # too late, and harmless

    run(main)


def test_a_session_whose_caller_has_gone_when_it_is_open_is_closed(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            task = asyncio.create_task(cast(Any, swarm.open_session()))
            await asyncio.sleep(0)
            while not fake.opened:  # the loop stands still: nobody takes the session
                time.sleep(0.001)  # noqa: ASYNC251
            time.sleep(0.05)  # noqa: ASYNC251
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(fake.opened[0].closed.is_set)

    run(main)


def test_a_session_that_comes_up_after_its_caller_was_cancelled_twice_is_closed(run):
    async def main():
        fake = FakeSwarm(opening=trio.Event(), stubborn=True)
        async with bridged(fake) as swarm:
            task = asyncio.create_task(cast(Any, swarm.open_session()))
            await asyncio.sleep(0.01)
            for _ in range(2):  # the second one ends the wait for the end of the call
                task.cancel()
                await asyncio.sleep(0.01)
            with pytest.raises(asyncio.CancelledError):
                await task
            cast(Any, swarm)._portal.soon(fake.opening.set)
            await eventually(lambda: bool(fake.opened))
            await eventually(fake.opened[0].closed.is_set)

    run(main)


def test_forward_and_backward_cross_with_what_they_are_given(run):
    async def main():
        async with bridged(FakeSwarm()) as swarm:
            assert await swarm.forward(hidden(1)) == ("forward", 1, 0, None)
            assert await swarm.forward(hidden(1), start=2, stop=5) == ("forward", 1, 2, 5)
            assert await swarm.backward(hidden(1), hidden(7), start=2) == ("backward", 1, 7, 2, None)
            output, kept = await swarm.forward_kept(hidden(1), stop=5, prompts=hidden(3))
            assert (output, kept) == (("forward", 1, 0, 5), ("kept", 1, 3))
            with pytest.raises(PeerGone):
                await swarm.forward(hidden(-1))

    run(main)


def test_a_cancelled_task_closes_its_session(run):
    async def main():
        fake = FakeSwarm()

        async def use(swarm):
            async with swarm.session():
                await asyncio.sleep(SOON)

        async with bridged(fake) as swarm:
            task = asyncio.create_task(use(swarm))
            await eventually(lambda: fake.sessions == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert fake.sessions == 0

    run(main)


def test_a_conversation_goes_through_generate_and_is_closed_in_trio(run):
    async def main():
        async with bridged(FakeSwarm()) as swarm:
            talk = swarm.conversation(100)
            inner = cast(Any, talk)._target
            async for _ in swarm.generate("t", max_new_tokens=3, conversation=talk):
                pass
            assert (inner.tokens, inner.max_length) == ([0, 1, 2], 100)
            talk.close()
            await eventually(inner.closed.is_set)
        talk.close()  # too late, and harmless

    run(main)


def test_the_view_follows_the_swarm(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            seen = swarm.view()
            assert seen is fake.seen
            changed = asyncio.create_task(swarm.changed(seen))
            await take(swarm, "t")
            assert not changed.done()
            cast(Any, swarm)._portal.soon(fake.change)
            await changed
            assert swarm.view() is fake.seen is not seen
            cast(Any, swarm)._portal.soon(fake.change)
            await eventually(lambda: swarm.view() is fake.seen)
            assert (swarm.config, swarm.info, swarm.local_model) == (CONFIG, "info", "local model")

    run(main)


def test_two_bridges_one_after_the_other_and_two_at_once(run):
    async def main():
        for prompt in "ab":
            async with bridged(FakeSwarm()) as swarm:
                assert await take(swarm, prompt, 1) == [f"{prompt}0"]
        async with bridged(FakeSwarm()) as one, bridged(FakeSwarm()) as other:
            return await asyncio.gather(take(one, "c", 1), take(other, "d", 1))

    assert run(main) == [["c0"], ["d0"]]


def test_leaving_ends_what_other_tasks_have_under_way(run):
    async def main():
        fake = FakeSwarm()
        async with bridged(fake) as swarm:
            task = asyncio.create_task(take(swarm, "hang"))
            await eventually(lambda: fake.made == 2)
        assert fake.generating == 0
        assert not fake.open
        with pytest.raises(RuntimeError, match="left"):
            await task
        with pytest.raises(RuntimeError, match="left"):
            await swarm.route()
        with pytest.raises(RuntimeError, match="left"):
            await take(swarm, "t")

    run(main)


def test_cancelling_the_opening_ends_the_thread(run):
    async def main():
        opening = threading.Event()
        closed = threading.Event()

        @asynccontextmanager
        async def never(config):
            opening.set()
            try:
                await trio.sleep_forever()
            finally:
                closed.set()
            yield

        async def enter():
            async with open_bridge(CONFIG, never):
                pass

        task = asyncio.create_task(enter())
        await eventually(opening.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    run(main)


def test_cancelling_before_the_thread_has_begun_ends_it_as_well(run):
    async def main():
        for _ in range(20):
            task = asyncio.create_task(anext(aiter_of(FakeSwarm())))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def aiter_of(fake):
        async with bridged(fake) as swarm:
            yield swarm

    run(main)


def test_cancelling_the_body_leaves_the_swarm(run):
    async def main():
        fake = FakeSwarm()

        async def use():
            async with bridged(fake) as swarm:
                await take(swarm, "hang")

        task = asyncio.create_task(use())
        await eventually(lambda: fake.made == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not fake.open

    run(main)


def test_a_bug_on_the_trio_side_ends_the_calls_and_comes_out_on_leaving(run):
    async def crash():
        raise KeyError("a bug")

    async def main():
        fake = FakeSwarm()

        async def use():
            async with bridged(fake) as swarm:
                task = asyncio.create_task(take(swarm, "hang"))
                await eventually(lambda: fake.made == 2)
                cast(Any, swarm)._portal.soon(lambda: fake.nursery.start_soon(crash))
                with pytest.raises(RuntimeError, match="failed"):
                    await task

        with pytest.raises(ExceptionGroup) as crashed:
            await use()
        assert crashed.group_contains(KeyError)

    run(main)


def test_leaving_takes_a_bounded_time(run, monkeypatch):
    monkeypatch.setattr(trio_thread, "LEAVE_SECONDS", 0.1)

    @asynccontextmanager
    async def reluctant(config):
        try:
            yield FakeSwarm()
        finally:
            await trio.sleep_forever()

    async def main():
        began = time.monotonic()
        async with open_bridge(CONFIG, reluctant):
            pass
        return time.monotonic() - began

    assert 0.1 <= run(main) < SOON / 2


def test_a_thread_that_does_not_end_is_left_behind(monkeypatch, caplog):
    monkeypatch.setattr(trio_thread, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(trio_thread, "END_SECONDS", 0.05)
    stuck = threading.Event()

    @asynccontextmanager
    async def deaf(config):
        try:
            yield FakeSwarm()
        finally:
            stuck.wait(SOON)

    async def main():
        async with open_bridge(CONFIG, deaf):
            pass

    with caplog.at_level(logging.WARNING, "raceme"):
        asyncio.run(main())
    stuck.set()
    assert "does not end" in caplog.text
    for thread in threading.enumerate():
        if thread.name == "raceme-trio":
            thread.join(SOON)
            assert not thread.is_alive()


def test_a_loop_that_is_closed_without_leaving_ends_the_thread():
    fake, loop = FakeSwarm(), asyncio.new_event_loop()
    entered = bridged(fake)

    async def begin():
        swarm = await entered.__aenter__()
        cast(Any, swarm)._portal._start(partial(trio.sleep, 0.05), asyncio.Event())
        return cast(Any, swarm)._portal._thread

    thread = loop.run_until_complete(begin())
    loop.close()
    thread._thread.join(SOON)
    assert not thread._thread.is_alive()
    assert not fake.open


def test_a_handle_may_not_be_used_from_another_event_loop():
    def elsewhere(swarm):
        with pytest.raises(RuntimeError, match="another event loop"):
            asyncio.run(swarm.route())

    async def main():
        async with bridged(FakeSwarm()) as swarm:
            await asyncio.to_thread(elsewhere, swarm)

    asyncio.run(main())
