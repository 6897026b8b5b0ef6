"""Sessions leave a circuit for a direct connection and come back: no token is lost or computed twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import trio
import trio.testing

from routing.names import PeerId
from tensor_codec.errors import CacheFull, PeerGone
from tensor_codec.limits import Limits
from tensor_codec.messages.attach import Attach, decode_attach_reply, encode_attach
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import PUSH_PROTOCOL, SESSION_PROTOCOL, encode_open
from tests.fakes_serving import (
    CLIENT,
    FakeStream,
    RawClient,
    World,
    continued,
    conversation_of,
    generated,
    hops_of,
    some_hidden,
    stream_pair,
    swarm,
    until,
    whole_model,
)

PROMPT = [3, 1, 4, 1, 5]
HOPS = [PeerId(f"hop{index}") for index in range(3)]


def homes(world: World, *, seconds: float = 0.0) -> None:
    """Three hops behind NAT: the client reaches them through relays."""
    world.relayed = {(CLIENT, hop) for hop in HOPS}
    world.add_chain(0, 3, 6, 9, seconds=seconds)


def streams_to(world: World, hop: PeerId) -> list[FakeStream]:
    """The client's session streams to a hop, the oldest first."""
    return [each for each in world.client_streams if each.peer == hop and each.protocol == SESSION_PROTOCOL]


def computed(world: World) -> dict[PeerId, list[int]]:
    """The positions that each hop has computed, in order."""
    return {
        peer: [position + i for position, tokens, _, _ in node.span.steps for i in range(tokens)]
        for peer, node in world.nodes.items()
    }


def assert_once(world: World, positions: int) -> None:
    """Every hop has computed every position, once, and nobody is at fault."""
    assert computed(world) == {name: list(range(positions)) for name in world.nodes}
    assert not sum((node.faults for node in world.nodes.values()), Counter())


async def test_a_session_moves_over_to_the_direct_connections_and_goes_on_where_it_was(
    autojump_clock: trio.testing.MockClock,
):
    async with swarm() as world:
        homes(world)
        conversation = conversation_of(world)
        tokens = await continued(conversation, PROMPT, 4)
        assert [[each.relayed for each in streams_to(world, hop)] for hop in HOPS] == [[True]] * 3
        world.relayed.clear()
        tokens += await continued(conversation, PROMPT + tokens, 4)
        assert tokens == generated(PROMPT, 8, 9)
        for hop in HOPS:
            before, now = streams_to(world, hop)
            assert (before.relayed, before.pipe.reset) == (True, True)
            assert (now.relayed, now.closed) == (False, False)
        assert hops_of(conversation) == "hop0 hop1 hop2"
        assert_once(world, len(PROMPT) + 7)
        conversation.close()


async def test_one_hop_moves_alone(autojump_clock: trio.testing.MockClock):
    async with swarm() as world:
        homes(world)
        conversation = conversation_of(world)
        tokens = await continued(conversation, PROMPT, 2)
        world.relayed.discard((CLIENT, HOPS[1]))
        tokens += await continued(conversation, PROMPT + tokens, 2)
        assert tokens == generated(PROMPT, 4, 9)
        assert [len(streams_to(world, hop)) for hop in HOPS] == [1, 2, 1]
        assert_once(world, len(PROMPT) + 3)
        conversation.close()


@pytest.mark.parametrize("moved", [True, False])
async def test_a_way_that_dies_is_replaced_by_a_circuit_and_nothing_is_computed_again(
    autojump_clock: trio.testing.MockClock, moved: bool
):
    async with swarm() as world:
        homes(world)
        conversation = conversation_of(world)
        tokens = await continued(conversation, PROMPT, 2)
        relayed = set(world.relayed)
        if moved:
            world.relayed.clear()
            tokens += await continued(conversation, PROMPT + tokens, 2)
        world.relayed = relayed
        for hop in HOPS:
            await streams_to(world, hop)[-1].reset()
        await trio.sleep(Limits().session_detached_seconds / 2)
        tokens += await continued(conversation, PROMPT + tokens, 2)
        assert tokens == generated(PROMPT, len(tokens), 9)
        assert [[each.relayed for each in streams_to(world, hop)][-1] for hop in HOPS] == [True] * 3
        assert hops_of(conversation) == "hop0 hop1 hop2"
        assert_once(world, len(PROMPT) + len(tokens) - 1)
        conversation.close()


@pytest.mark.parametrize("at", range(3))
async def test_a_way_that_dies_in_the_middle_of_a_step_costs_no_token(
    autojump_clock: trio.testing.MockClock, at: int
):
    async with swarm() as world:
        homes(world, seconds=0.1)
        conversation = conversation_of(world)
        tokens = await continued(conversation, PROMPT, 2)

        async def cut() -> None:
            await trio.sleep(0.15)  # the second hop computes
            await streams_to(world, HOPS[at])[-1].reset()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            tokens += await continued(conversation, PROMPT + tokens, 3)
        assert tokens == generated(PROMPT, 5, 9)
        assert [len(streams_to(world, hop)) for hop in HOPS] == [1 + (at == index) for index in range(3)]
        assert hops_of(conversation) == "hop0 hop1 hop2"
        assert_once(world, len(PROMPT) + 4)
        conversation.close()


async def test_a_session_of_a_hop_that_has_forgotten_it_is_repaired(autojump_clock: trio.testing.MockClock):
    async with swarm() as world:
        homes(world)
        conversation = conversation_of(world)
        tokens = await continued(conversation, PROMPT, 2)
        await world.kill("hop1")
        world.revive("hop1")
        tokens += await continued(conversation, PROMPT + tokens, 2)
        assert tokens == generated(PROMPT, 4, 9)
        conversation.close()


async def test_a_hop_waits_session_detached_seconds_for_the_client_of_a_circuit(
    autojump_clock: trio.testing.MockClock,
):
    async with swarm(Limits(session_first_step_seconds=100.0)) as world:
        homes(world)
        client, _ = await RawClient.open(world, "hop0")
        await client.stream.reset()
        await trio.sleep(Limits().session_detached_seconds - 1)
        assert world.nodes[HOPS[0]].listener.session_count == 1
        await trio.sleep(2)
        assert world.nodes[HOPS[0]].listener.session_count == 0


async def test_a_session_without_a_relay_ends_with_its_stream(autojump_clock: trio.testing.MockClock):
    async with swarm() as world:
        world.add_chain(0, 3)
        client, _ = await RawClient.open(world, "hop0")
        await client.stream.reset()
        await trio.sleep(0.1)
        assert world.nodes[HOPS[0]].listener.session_count == 0


async def attach(world: World, name: str, session: bytes) -> tuple[FakeStream, Failed | None]:
    """What the first hop answers to a peer that wants to go on with a session."""
    stream = await world.dial(PeerId(name), HOPS[0], SESSION_PROTOCOL)
    await stream.send(encode_attach(Attach(session)))
    frame = await stream.receive(10.0)
    assert frame is not None
    return stream, decode_attach_reply(frame)


async def test_nobody_goes_on_with_the_session_of_another_peer(autojump_clock: trio.testing.MockClock):
    async with swarm() as world:
        homes(world)
        client, _ = await RawClient.open(world, "hop0")
        for name, session in (("thief", client.opened.session), (CLIENT, b"x" * 16)):
            stream, failed = await attach(world, name, session)
            assert failed is not None
            assert failed.code == "ended"
            await stream.aclose()
        assert world.nodes[HOPS[0]].listener.session_count == 1
        await client.stream.aclose()


async def test_a_session_goes_on_where_there_is_no_room_for_another_one(
    autojump_clock: trio.testing.MockClock,
):
    async with swarm() as world:
        homes(world)
        client, _ = await RawClient.open(world, "hop0")
        listener = world.nodes[HOPS[0]].listener
        full = CacheFull("no room", 1.0)
        going_on = encode_attach(Attach(client.opened.session))
        for question, answer in ((going_on, None), (encode_open(client.opened), "cache_full")):
            ours, theirs = stream_pair(CLIENT, HOPS[0], SESSION_PROTOCOL, world.limits)
            world.nursery.start_soon(listener.serve_session, theirs, full)
            await ours.send(question)
            frame = await ours.receive(10.0)
            assert frame is not None
            failed = decode_attach_reply(frame)
            assert (None if failed is None else failed.code) == answer
            await ours.aclose()
        await until(lambda: listener.session_count == 0)
        await client.stream.aclose()


async def test_the_last_stream_of_many_has_the_session(autojump_clock: trio.testing.MockClock):
    async with swarm() as world:
        homes(world)
        client, _ = await RawClient.open(world, "hop0")
        streams = [client.stream]
        for _ in range(5):
            stream, failed = await attach(world, CLIENT, client.opened.session)
            assert failed is None
            streams.append(stream)
        # the session's own, and that of the present stream
        await until(lambda: len(world.nodes[HOPS[0]].handlers) == 2)
        await until(lambda: [each.pipe.reset for each in streams] == [True] * 5 + [False])
        for each in streams:
            await each.aclose()
        await until(lambda: world.nodes[HOPS[0]].listener.session_count == 0)


async def test_a_direct_way_that_refuses_leaves_the_session_on_its_circuit(
    autojump_clock: trio.testing.MockClock,
):
    async with swarm() as world:
        homes(world)
        conversation = conversation_of(world)
        tokens = await continued(conversation, PROMPT, 2)
        world.relayed.clear()
        world.unreachable = {(CLIENT, hop) for hop in HOPS}
        tokens += await continued(conversation, PROMPT + tokens, 20)
        assert tokens == generated(PROMPT, 22, 9)
        assert [[each.relayed for each in streams_to(world, hop)] for hop in HOPS] == [[True]] * 3
        assert len([to for _, to in world.dialled if to == HOPS[0]]) < 20, "it tries for ever"
        assert_once(world, len(PROMPT) + 21)
        conversation.close()


async def test_a_push_stream_moves_over_after_the_next_hop_has_read_it(
    autojump_clock: trio.testing.MockClock,
):
    async with swarm() as world:
        world.relayed = {(HOPS[0], HOPS[1])}
        world.add_chain(0, 3, 6, seconds=0.01)
        session = await world.open(max_length=256)
        hidden = some_hidden(60)
        outputs = [await session.step(hidden[:, :10])]
        pending = []
        for position in range(10, 60):
            if position == 13:
                world.relayed.clear()
            body = session.encode(hidden[:, position : position + 1])
            pending.append(await session.submit(body, position, 1, "all"))
            if len(pending) == 4:
                outputs.append(session.decode(await session.collect(pending.pop(0))))
        outputs += [session.decode(await session.collect(each)) for each in pending]
        assert torch.equal(torch.cat(outputs, dim=1), whole_model(hidden, 0, 6))
        pushes = [each for each in world.nodes[HOPS[0]].streams if each.protocol == PUSH_PROTOCOL]
        assert [(each.relayed, each.closed) for each in pushes] == [(True, True), (False, False)]
        assert_once(world, 60)
        await session.aclose()


async def test_the_end_of_a_detached_session_leaves_nothing(autojump_clock: trio.testing.MockClock):
    async with swarm() as world:
        homes(world)
        session = await world.open()
        for hop in HOPS:
            await streams_to(world, hop)[0].reset()
        await trio.sleep(0.1)
        session.close()
        with trio.fail_after(2):
            await session.aclose()
        with pytest.raises(PeerGone):
            await session.step(some_hidden(1))
        await trio.sleep(Limits().session_detached_seconds + 1)
