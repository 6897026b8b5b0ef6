"""Attackers of tests/hostile beside honest newcomers at one host on loopback: the kinds, briefly.

`python -m tests.hostile` runs them at length against whole nodes, and measures.
"""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from node.network.host import open_host
from tensor_codec.messages.session import PUSH_PROTOCOL
from tests.hostile.attacks import ATTACKS
from tests.hostile.stage import Stage, new_identity, target_of

SOURCE = "127.0.0.66"
NEWCOMERS = 3
# Of each the time to take effect: no promise is about it.
ATTACK_SECONDS, PATIENCE_SECONDS = 0.5, 20.0


async def take_frames(stream):
    """A handler of pushed steps that waits for what never comes."""
    while await stream.receive() is not None:
        pass


@asynccontextmanager
async def listening():
    """A host, and the attacker's stage in front of it."""
    async with open_host(identity=new_identity(), listen=["/ip4/127.0.0.1/tcp/0"]) as host:
        host.handle(PUSH_PROTOCOL, take_frames)
        target = target_of(f"{host.addresses[0]}/p2p/{host.peer_id}")
        yield host, Stage((target,), (SOURCE,), 600.0, told=False)


@asynccontextmanager
async def attacked(name: str, seconds: float = ATTACK_SECONDS):
    """A host under an attack that has begun; what the attacker counts."""
    async with listening() as (host, stage), trio.open_nursery() as nursery:
        nursery.start_soon(ATTACKS[name].run, stage)
        await trio.sleep(seconds)
        yield host, stage
        nursery.cancel_scope.cancel()


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def newcomer_is_let_in(host) -> bool:
    async with open_host(identity=new_identity(), listen=[]) as newcomer:
        await newcomer.ping(host.peer_id, host.addresses, seconds=PATIENCE_SECONDS)
        return host.peer_id in newcomer.connected()


@pytest.mark.parametrize(
    "name",
    [
        "idle_connections",
        "half_handshakes",
        "byte_a_second",
        "connection_flood",
        "stream_hold",
        "giant_frames",
        "giant_first_frames",
        "header_bombs",
        "stream_flood",
        "open_and_reset",
        "window_violation",
        "ping_flood",
        "pong_flood",
        "stray_bytes",
        "control_flood",
        "id_churn",
    ],
)
async def test_newcomers_are_let_in_beside_an_attacker(name: str):
    async with attacked(name) as (host, stage):
        with trio.fail_after(NEWCOMERS * PATIENCE_SECONDS):
            for _ in range(NEWCOMERS):
                assert await newcomer_is_let_in(host)
            while not stage.got:  # noqa: ASYNC110  the attacker may not have begun on a busy machine
                await trio.sleep(0.05)


@pytest.mark.parametrize(
    "name",
    [
        "stream_flood",
        "open_and_reset",
        "window_violation",
        "ping_flood",
        "pong_flood",
        "stray_bytes",
        "control_flood",
    ],
)
async def test_an_attacker_that_breaks_a_rule_of_the_muxer_is_turned_away(name: str):
    async with attacked(name, 0.0) as (_, stage):
        with trio.fail_after(PATIENCE_SECONDS):
            while not any(key.startswith("turned away") for key in stage.got):  # noqa: ASYNC110
                await trio.sleep(0.05)


@pytest.mark.parametrize(
    "name",
    ["idle_connections", "byte_a_second", "stream_hold", "giant_frames", "header_bombs", "open_and_reset"],
)
async def test_of_an_attacker_that_has_gone_nothing_is_left(name: str):
    async with listening() as (host, stage):
        await newcomer_is_let_in(host)
        before = tasks()
        with trio.move_on_after(ATTACK_SECONDS):
            await ATTACKS[name].run(stage)
        with trio.fail_after(PATIENCE_SECONDS):
            while tasks() > before or len(host.connections):  # noqa: ASYNC110
                await trio.sleep(0.05)
