"""The simulated network behaves as TCP and a muxer, as far as the code above them can tell."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from node.network.streams import FramedStream
from routing.names import PeerId
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.limits import Limits
from tests.sim.network import MIN_DELAY, Network
from tests.sim.plan import NodePlan, Plan

A, B = PeerId("a"), PeerId("b")
PLAN = Plan(
    seed=0,
    blocks=1,
    nodes=tuple(NodePlan(name, 0, 1, 0, 0.0, (0.0, 0.0), 0.0) for name in (A, B)),
    clients=(),
    faults=(),
    loss=0.0,
    jitter=0.0,
    bytes_per_second=1e6,
    max_step_tokens=1,
    window=2048,
)


class Somebody:
    """Keeps the streams that come in."""

    alive = True
    vanished = False

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.streams: list[FramedStream] = []

    def accept(self, end) -> None:
        self.streams.append(FramedStream(end, end.peer, end.protocol, self.limits))


@asynccontextmanager
async def pair(plan: Plan = PLAN) -> AsyncIterator[tuple[Network, FramedStream, FramedStream]]:
    """A stream from a to b: its near end and its far end."""
    network = Network(plan, Limits(), random.Random(0))
    for name in (A, B):
        network.participants[name] = Somebody(Limits())
    near = await network.open_stream(A, B, "p", 5.0)
    somebody = network.participants[B]
    assert isinstance(somebody, Somebody)
    yield network, near, somebody.streams[0]


async def since(began: float, stream: FramedStream) -> tuple[bytes, float]:
    """The next frame, and its time."""
    frame = await stream.receive()
    return bytes(frame), trio.current_time() - began


async def test_a_frame_takes_its_size_at_the_bandwidth_and_the_delay(autojump_clock):
    async with pair() as (_, near, far):
        began = trio.current_time()
        await near.send(bytes(996))
        assert (await since(began, far))[1] == pytest.approx(0.001 + MIN_DELAY, abs=1e-5)


async def test_frames_keep_their_order_whatever_the_jitter(autojump_clock):
    async with pair(replace(PLAN, jitter=1.0, loss=0.3, window=10**6)) as (_, near, far):
        for number in range(50):
            await near.send(bytes([number]))
        assert [bytes(await far.receive()) for _ in range(50)] == [bytes([n]) for n in range(50)]


async def test_silence_holds_frames_back_and_tells_nobody(autojump_clock):
    async with pair() as (network, near, far):
        began = trio.current_time()
        network.silence(A, B, 5.0)
        await near.send(b"late")
        assert await since(began, far) == (b"late", 5.0)


async def test_what_is_sent_into_a_long_silence_breaks_the_connection_after_ten_seconds(autojump_clock):
    async with pair() as (network, near, far):
        began = trio.current_time()
        network.silence(A, B, 15.0)
        await near.send(b"lost")
        with pytest.raises(PeerGone):
            await near.receive()
        assert trio.current_time() - began == 10.0
        with pytest.raises(PeerGone):
            await far.receive()
        assert trio.current_time() - began == pytest.approx(15.0, abs=0.1)


async def test_a_host_that_vanishes_is_noticed_after_twenty_seconds(autojump_clock):
    async with pair() as (network, _near, far):
        began = trio.current_time()
        network.participants[A].vanished = True
        network.gone(A, vanished=True)
        with pytest.raises(PeerGone):
            await far.receive()
        assert trio.current_time() - began == 20.0


async def test_a_process_that_ends_is_noticed_at_once(autojump_clock):
    async with pair() as (network, _near, far):
        began = trio.current_time()
        network.gone(A, vanished=False)
        with pytest.raises(PeerGone):
            await far.receive()
        assert trio.current_time() - began == pytest.approx(MIN_DELAY)


async def test_a_frozen_process_gets_everything_when_it_goes_on(autojump_clock):
    async with pair() as (network, near, far):
        began = trio.current_time()
        network.freeze(B, 30.0)
        await near.send(b"one")
        await near.send(b"two")
        assert await since(began, far) == (b"one", 30.0)
        assert await since(began, far) == (b"two", 30.0)


async def test_a_peer_that_does_not_read_is_slow(autojump_clock):
    async with pair() as (_, near, far):
        began = trio.current_time()
        for _ in range(3):
            await near.send(bytes(1000))
        with pytest.raises(SlowPeer):
            await near.send(bytes(1000))
        assert trio.current_time() - began == pytest.approx(10.0, abs=0.1)
        assert len([await far.receive() for _ in range(3)]) == 3
        with pytest.raises(PeerGone):  # a frame was cut
            await far.receive()


async def test_an_end_is_heard_after_what_was_sent_before(autojump_clock):
    async with pair() as (_, near, far):
        await near.send(b"last")
        await near.aclose()
        assert bytes(await far.receive()) == b"last"
        assert await far.receive() is None
        await far.send(b"to nobody")
        await trio.sleep(1)
        with pytest.raises(PeerGone):
            await far.send(b"again")


@pytest.mark.parametrize(("blocked", "seconds"), [("silent", 5.0), ("ended", 0.002), ("unreachable", 0.002)])
async def test_whom_nobody_reaches_cannot_be_dialled(blocked, seconds, autojump_clock):
    async with pair() as (network, _near, _far):
        network.cut(A, B)
        if blocked == "silent":
            network.silence(B, A, 100.0)
        elif blocked == "ended":
            network.participants[B].alive = False
        else:
            network.way(A, B).unreachable_until = 100.0
        began = trio.current_time()
        with pytest.raises((PeerGone, SlowPeer)):
            await network.open_stream(A, B, "p", 5.0)
        assert trio.current_time() - began == pytest.approx(seconds)
