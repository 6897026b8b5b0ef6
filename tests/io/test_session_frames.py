"""Frames of sessions: how long they may be, what is known before their bytes come, and room for steps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from node.network.budgets.large_frames import SMALL_FRAME
from node.network.streams import FramedStream
from node.serving.sessions.frame_rates import FrameBudget, FrameRates
from node.serving.sessions.push_reader import read_pushes
from node.serving.sessions.step_room import SMALL_STEP, StepRoom
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import encode_hidden
from tensor_codec.errors import FrameError, MessageError, PeerFault, PeerGone, TooManyStreams
from tensor_codec.frame import encode_frame
from tensor_codec.limits import MIB, Limits
from tensor_codec.messages.contract import HEADER_BYTES, Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    Open,
    Opened,
    Result,
    Step,
    decode_open_reply,
    encode_open,
    encode_step,
)
from tensor_codec.span_spec import SpanSpec
from tests.fakes import memory_framed_pair
from tests.fakes_serving import CLIENT, HIDDEN, FakeNode, RawClient, World, some_hidden, swarm

BEFORE = PeerId("before")
LIMITS = Limits()
LONG = 4000  # positions of prompts that are more than a small frame
CONTRACT = Contract(bytes(16), 0, 4, 1, 64, HIDDEN, "fp32", 2048)


def some_step(
    number: int, position: int, session: bytes = bytes(16), body: bytes | None = None
) -> list[bytes]:
    hidden = some_hidden(64)[:, position : position + 1]
    step = Step(session, number, position, "all", body or encode_hidden(hidden, "fp32"))
    return [bytes(part) for part in encode_step(step)]


def an_open(**changes: int | bytes) -> Open:
    spec = SpanSpec("m", "r", Blocks(0, 4), "float32")
    return replace(Open(bytes(16), spec, 1, LONG, "fp32"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [0, 1])
async def test_a_message_of_a_session_is_no_longer_than_its_longest_step(more: int, autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        assert CONTRACT.frame_bytes == HEADER_BYTES + 64 * 4 * HIDDEN
        await client.stream.send_bytes((CONTRACT.frame_bytes + more).to_bytes(4, "big"))
        await trio.testing.wait_all_tasks_blocked()
        assert bool(node.faults) == bool(more)
        await client.stream.aclose()


@asynccontextmanager
async def served(world: World, node: FakeNode) -> AsyncIterator[tuple[FramedStream, list[PeerFault]]]:
    """A client's framed stream to a listener; the faults of the listener's end."""
    ours, theirs = memory_framed_pair(peers=(CLIENT, node.peer))
    faults: list[PeerFault] = []

    async def serve() -> None:
        try:
            await node.listener.serve_session(theirs)
        except PeerFault as fault:
            faults.append(fault)
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield ours, faults
        await ours.aclose()


async def test_an_open_is_no_longer_than_its_header_and_the_prompts_of_a_peer(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        size = HEADER_BYTES + LIMITS.max_prompt_bytes_per_peer
        for announced, reason in ((LIMITS.max_frame_bytes + 1, FrameError), (size + 1, FrameError)):
            async with served(world, node) as (stream, faults):
                await stream._stream.send_all(announced.to_bytes(4, "big"))
                await trio.testing.wait_all_tasks_blocked()
                assert [type(fault) for fault in faults] == [reason]


async def test_prompts_that_do_not_fit_their_open_are_refused_before_they_come(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        wire = encode_frame(encode_open(an_open(prompts=LONG, body=bytes(4 * LONG * HIDDEN * 8))))
        assert len(wire) > SMALL_FRAME
        async with served(world, node) as (stream, faults):
            await stream._stream.send_all(wire[: HEADER_BYTES + 4])
            await trio.testing.wait_all_tasks_blocked()
            assert [type(fault) for fault in faults] == [MessageError]


async def test_prompts_without_room_pass_by_and_their_client_is_told(autojump_clock):
    size = 4 * LONG * HIDDEN * 4
    async with swarm(Limits(max_prompt_bytes=size - 1)) as world:
        node = world.add("a", 0, 4)
        async with served(world, node) as (stream, faults):
            await stream.send(encode_open(an_open(prompts=LONG, body=bytes(size))))
            frame = await stream.receive(5.0)
            assert frame is not None
            answer = decode_open_reply(frame)
            assert isinstance(answer, Failed)
            assert answer.code == "cache_full"
            assert faults == []


# Pushed steps


@asynccontextmanager
async def pushed(world: World, node: FakeNode) -> AsyncIterator[tuple[FramedStream, list[PeerFault]]]:
    """A push stream to a listener; the faults of the listener's end."""
    ours, theirs = memory_framed_pair(peers=(BEFORE, node.peer), protocol=PUSH_PROTOCOL)
    faults: list[PeerFault] = []

    async def serve() -> None:
        limits = Limits(idle_steps_per_second=0.25, frame_rate_peers_per_prefix=1)
        budget = FrameBudget(FrameRates(limits), lambda _: 0)
        try:
            await read_pushes(theirs, (node.listener.pushed,), budget)
        except PeerFault as fault:
            faults.append(fault)
        await theirs.reset()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield ours, faults
        await ours.aclose()
        nursery.cancel_scope.cancel()


async def test_a_large_step_that_no_session_wants_passes_by_and_the_stream_goes_on(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a", predecessor=BEFORE)
        async with pushed(world, node) as (stream, faults):
            await stream.send(some_step(0, 0, session=b"x" * 16, body=bytes(MIB)))
            await stream.send(some_step(0, 0))
            assert isinstance(await client.receive(world), Result)
            await stream.send(some_step(0, 0, session=b"x" * 16, body=bytes(MIB)))
            await trio.testing.wait_all_tasks_blocked()
            assert [str(fault)[:9] for fault in faults] == ["idle step"]  # counted as other steps for nobody
        await client.stream.aclose()


async def test_a_step_longer_than_its_session_has_ends_that_session_at_its_header(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a", predecessor=BEFORE)
        async with pushed(world, node) as (stream, faults):
            wire = encode_frame(some_step(0, 0, body=bytes(MIB)))
            await stream._stream.send_all(wire[: HEADER_BYTES + 4])
            told = await client.receive(world)
            assert isinstance(told, Failed)
            assert (told.code, told.peer) == ("message", BEFORE)
            assert faults == []
        await client.stream.aclose()


async def test_a_push_stream_of_a_peer_that_feeds_no_session_ends_after_ten_seconds(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        async with pushed(world, node) as (_, faults):
            await trio.sleep(LIMITS.session_first_step_seconds - 0.1)
            assert faults == []
            await trio.sleep(0.2)
            assert [type(fault) for fault in faults] == [PeerGone]


async def test_a_push_stream_stays_for_its_sessions_and_no_longer_than_one_may_be_idle(autojump_clock):
    limits = Limits(session_first_step_seconds=10.0, session_idle_seconds=30.0)
    async with swarm(limits) as world:
        node = world.add("a", 0, 4)
        client, answer = await RawClient.open(world, "a", predecessor=BEFORE)
        assert isinstance(answer, Opened)
        async with pushed(world, node) as (stream, faults):
            for number in range(8):
                await trio.sleep(9.0)
                await stream.send(some_step(number, number))
                assert isinstance(await client.receive(world), Result)
            async with pushed(world, node) as (_, idle):
                for number in range(8, 16):
                    await trio.sleep(9.0)
                    await stream.send(some_step(number, number))
                    assert isinstance(await client.receive(world), Result)
                # the idle time of the limits of `pushed`, in whole looks
                assert [type(fault) for fault in idle] == [PeerGone]
            assert faults == []
        await client.stream.aclose()


# Room for steps


def test_steps_have_room_up_to_the_bound_and_the_place_is_given_back():
    room = StepRoom(Limits(max_large_steps=1))
    session = room.of_session(CLIENT, "")
    places = [session.add(8 * MIB) for _ in range(2)]
    with pytest.raises(TooManyStreams):
        session.add(SMALL_STEP + 1)
    session.remove(places[0])
    session.remove(places[0])
    assert room.bytes == 8 * MIB
    session.add(8 * MIB)
    session.close()
    assert room.bytes == 0


def test_a_client_that_has_less_takes_the_room_of_one_that_has_more():
    room = StepRoom(Limits(max_large_steps=1))
    greedy, honest = room.of_session(PeerId("greedy"), "192.0.2.1/32"), room.of_session(CLIENT, "")
    ended: list[str] = []
    greedy.evicted = lambda: ended.append("greedy")
    for _ in range(4):
        greedy.add(4 * MIB)
    honest.add(4 * MIB)
    assert ended == ["greedy"]


async def test_a_part_of_a_prompt_waits_for_room_and_the_end_of_its_session_ends_the_wait(autojump_clock):
    room = StepRoom(Limits(max_large_steps=1))
    one, other = room.of_session(CLIENT, ""), room.of_session(CLIENT, "")
    place = one.add(16 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.wait, MIB)
        await trio.testing.wait_all_tasks_blocked()
        one.remove(place)
    assert room.bytes == MIB
    place = one.add(15 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.wait, MIB)
        await trio.testing.wait_all_tasks_blocked()
        other.close()
    assert room.bytes == 15 * MIB
