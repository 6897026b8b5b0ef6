"""A swarm without async: a fake swarm in the trio thread, callers of every kind around it."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

import client
from client.api import SyncSwarm
from client.bridges import trio_thread
from client.bridges.sync import CLOSE_SECONDS, open_sync
from client.bridges.trio_thread import TOKENS_AHEAD
from node.config import ConfigError
from routing.chains.hops import NoChain
from tensor_codec.errors import CacheFull, PeerGone
from tests.fakes_bridges import CONFIG, SOON, FakeSwarm, hidden, opener

ROOT = Path(__file__).resolve().parents[2]


def joined(fake: FakeSwarm) -> SyncSwarm:
    return open_sync(CONFIG, opener(fake))


def take(swarm: SyncSwarm, prompt: str, count: int = 5) -> list[str]:
    return [str(token) for token in swarm.generate(prompt, max_new_tokens=count)]


def at_least(fake: FakeSwarm, made: int) -> bool:
    return fake.made >= made


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for the other thread."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {thread.name for thread in set(threading.enumerate()) - before} <= set()


def test_a_script_has_the_tokens_in_order():
    with joined(FakeSwarm()) as swarm:
        assert take(swarm, "t", 100) == [f"t{index}" for index in range(100)]


def test_every_call_blocks_until_it_has_its_answer():
    fake = FakeSwarm()
    with joined(fake) as swarm:
        assert swarm.forward(hidden(1), start=2, stop=5) == ("forward", 1, 2, 5)
        assert swarm.backward(hidden(1), hidden(7), start=2) == ("backward", 1, 7, 2, None)
        output, kept = swarm.forward_kept(hidden(1), stop=5, prompts=hidden(3))
        assert (output, kept) == (("forward", 1, 0, 5), ("kept", 1, 3))
        assert (swarm.config, swarm.info, swarm.local_model) == (CONFIG, "info", "local model")
        assert swarm.view() is fake.seen
        with swarm.session() as session:
            assert fake.sessions == 1
            assert session.step(hidden(3)) == 6
            assert session.step(hidden(1), position=2, reply="last") == 2
            assert (session.length, session.chain, session.times) == (3, "chain", None)
        assert fake.sessions == 0


def test_a_session_without_a_with_may_be_closed_by_any_thread_and_by_a_finalizer():
    fake = FakeSwarm()
    with joined(fake) as swarm:
        sessions = [swarm.open_session(start=number) for number in range(3)]
        assert (sessions[2].chain, sessions[2].prefill(hidden(3)), sessions[2].length) == ("2:None", 6, 3)
        sessions[0].close()
        thread = threading.Thread(target=sessions[1].close)
        thread.start()
        thread.join(SOON)
        cast(Any, swarm)._portal.soon(weakref.finalize(fake, sessions[2].close))  # in trio's own thread
        for each in fake.opened:
            eventually(each.closed.is_set)
        with pytest.raises(ValueError, match="too long"):
            swarm.open_session(max_length=4096)
        assert swarm.peer_info("somebody") == ("info", "somebody")
    sessions[0].close()  # too late, and harmless


def test_ctrl_c_at_the_opening_of_a_session_leaves_none_open():
    fake = FakeSwarm(opening=trio.Event())
    with joined(fake) as swarm:
        interrupt = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            swarm.open_session()
        interrupt.join()
        assert fake.opened == []


def test_a_session_that_came_up_as_its_caller_left_is_closed(monkeypatch):
    fake = FakeSwarm()
    with joined(fake) as swarm:

        def interrupted(call: Any, news: threading.Event) -> None:
            eventually(lambda: call.over)
            raise KeyboardInterrupt

        monkeypatch.setattr("client.bridges.sync._wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swarm.open_session()
        eventually(fake.opened[0].closed.is_set)


def test_the_view_is_waited_for():
    fake = FakeSwarm()
    with joined(fake) as swarm:
        seen = swarm.view()
        later = threading.Timer(0.05, lambda: cast(Any, swarm)._portal.soon(fake.change))
        later.start()
        swarm.changed(seen)
        assert swarm.view() is fake.seen is not seen
        later.join()


def test_a_conversation_goes_through_generate_and_is_closed_in_trio():
    with joined(FakeSwarm()) as swarm:
        talk = swarm.conversation(100)
        inner = cast(Any, talk)._target
        assert len(list(swarm.generate("t", max_new_tokens=3, conversation=talk))) == 3
        assert (inner.tokens, inner.max_length) == ([0, 1, 2], 100)
        talk.close()
        eventually(inner.closed.is_set)


def test_errors_arrive_as_what_they_are():
    with joined(FakeSwarm()) as swarm:
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            swarm.generate("t", max_new_tokens=0)  # at the call, before the first token
        refused = swarm.generate("refuse")
        assert [next(refused), next(refused)] == ["refuse0", "refuse1"]
        with pytest.raises(CacheFull) as refusal:
            next(refused)
        assert refusal.value.retry_after_seconds == 3.0
        with pytest.raises(NoChain):
            swarm.route()
        with pytest.raises(ValueError, match="too long"), swarm.session(max_length=4096):
            pass
        with pytest.raises(PeerGone), swarm.session() as session:
            session.step(hidden(-1))


def test_an_error_of_the_opening_comes_out_of_the_call():
    @asynccontextmanager
    async def refuse(config):
        await trio.lowlevel.checkpoint()
        raise ConfigError("no such model")
        yield

    with pytest.raises(ConfigError, match="no such model"):
        open_sync(CONFIG, refuse)
    with pytest.raises(ConfigError, match="at least one node"):
        client.connect_sync(peers=[])


def test_a_slow_consumer_holds_the_generation_back():
    fake, got = FakeSwarm(), 0
    with joined(fake) as swarm:
        for _ in swarm.generate("t", max_new_tokens=3 * TOKENS_AHEAD):
            got += 1
            ahead = min(got + TOKENS_AHEAD, 3 * TOKENS_AHEAD)
            eventually(partial(at_least, fake, ahead))
            assert fake.made <= got + TOKENS_AHEAD
    assert got == 3 * TOKENS_AHEAD


def test_a_loop_that_is_left_early_gives_its_session_back():
    fake = FakeSwarm()
    with joined(fake) as swarm:
        for token in swarm.generate("t", max_new_tokens=1000):
            assert token == "t0"
            break
        assert fake.generating == 0, "the generator was dropped with the loop"
        tokens = swarm.generate("t", max_new_tokens=1000)
        next(tokens)
        assert fake.generating == 1
        tokens.close()
        assert fake.generating == 0
        swarm.generate("t")  # never begun
    assert fake.made <= 2 * (1 + TOKENS_AHEAD)


@pytest.mark.parametrize("where", ["another thread", "trio's thread"])
def test_a_generator_may_be_dropped_by_any_thread(where):
    fake = FakeSwarm()
    with joined(fake) as swarm:
        held = [swarm.generate("hang")]
        assert next(held[0]) == "hang0"
        dropped = threading.Event()

        def drop() -> None:
            held.clear()
            dropped.set()

        if where == "trio's thread":
            cast(Any, swarm)._portal.soon(drop)
        else:
            thread = threading.Thread(target=drop)
            thread.start()
            thread.join(SOON)
        assert dropped.wait(CLOSE_SECONDS / 2), "whoever drops it must not wait for trio"
        eventually(lambda: fake.generating == 0)
        assert take(swarm, "next", 2) == ["next0", "next1"]


def test_many_threads_use_one_swarm_at_a_time():
    found: dict[int, list[str]] = {}
    with joined(FakeSwarm()) as swarm:

        def one(number: int) -> None:
            found[number] = take(swarm, f"{number}-", 20)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
    assert found == {number: [f"{number}-{index}" for index in range(20)] for number in range(10)}


def test_a_running_event_loop_s_thread_may_block_in_it_as_a_notebook_does():
    async def cell() -> list[str]:
        with joined(FakeSwarm()) as swarm:
            found: Any = swarm.forward(hidden(1))
            return [*take(swarm, "t", 3), found[0]]

    expected = ["t0", "t1", "t2", "forward"]
    assert asyncio.run(cell()) == expected
    assert trio.run(cell) == expected


def test_a_cell_opens_the_swarm_and_a_later_one_closes_it():
    fake = FakeSwarm()
    swarm = joined(fake)
    assert take(swarm, "t", 1) == ["t0"]
    swarm.close()
    assert not fake.open
    swarm.close()  # again, and harmless
    with pytest.raises(RuntimeError, match="left"):
        swarm.route()
    with pytest.raises(RuntimeError, match="left"):
        take(swarm, "t")


@pytest.mark.parametrize("wait", ["hang", "changed"])
def test_ctrl_c_ends_a_wait_and_what_it_waited_for(wait):
    fake = FakeSwarm()
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    with joined(fake) as swarm:
        interrupt = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            take(swarm, "hang") if wait == "hang" else swarm.changed(swarm.view())
        interrupt.join()
        assert fake.generating == 0, "at once, not some time later"
        assert take(swarm, "next", 2) == ["next0", "next1"]


def test_ctrl_c_ends_the_opening():
    closed = threading.Event()

    @asynccontextmanager
    async def never(config):
        try:
            await trio.sleep_forever()
        finally:
            closed.set()
        yield

    interrupt = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        open_sync(CONFIG, never)
    interrupt.join()
    assert closed.is_set()


def test_leaving_ends_what_other_threads_have_under_way():
    fake, raised = FakeSwarm(), []
    swarm = joined(fake)

    def use() -> None:
        try:
            take(swarm, "hang")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    eventually(lambda: fake.made == 2)
    swarm.close()
    thread.join(SOON)
    assert "left" in raised[0]
    assert fake.generating == 0


def test_a_call_in_the_swarm_s_own_thread_is_refused_where_it_would_wait_for_ever():
    refused = []
    with joined(FakeSwarm()) as swarm:

        def call() -> None:
            try:
                swarm.route()
            except RuntimeError as error:
                refused.append(str(error))

        cast(Any, swarm)._portal.soon(call)
        eventually(lambda: bool(refused))
    assert "own thread" in refused[0]


def test_leaving_takes_a_bounded_time(monkeypatch, caplog):
    monkeypatch.setattr(trio_thread, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(trio_thread, "END_SECONDS", 0.05)
    stuck = threading.Event()

    @asynccontextmanager
    async def deaf(config):
        try:
            yield FakeSwarm()
        finally:
            stuck.wait(SOON)

    with caplog.at_level(logging.WARNING, "raceme"), open_sync(CONFIG, deaf):
        pass
    stuck.set()
    assert "does not end" in caplog.text
    eventually(lambda: not any(thread.name == "raceme-trio" for thread in threading.enumerate()))


def test_a_program_that_never_leaves_ends_all_the_same():
    # Registered before the swarm is joined: the last to be registered is called first.
    code = """
import atexit
from client.bridges.sync import CLOSE_SECONDS, open_sync
from tests.fakes_bridges import CONFIG, FakeSwarm, opener
fake = FakeSwarm()
atexit.register(lambda: print("open" if fake.open else "closed"))
swarm = open_sync(CONFIG, opener(fake))
tokens = swarm.generate("hang")
print(next(tokens))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "hang0\nclosed\n", "")


def test_handles_show_what_they_stand_for_and_their_methods_explain_themselves():
    with joined(FakeSwarm()) as swarm:
        assert "FakeSwarm" in repr(swarm)
        assert {"generate", "forward", "close"} <= set(dir(swarm))
        assert "Swarm.generate" in (type(swarm).generate.__doc__ or "")
