"""The entry point of a serving node: what is admitted, what is refused, and that nothing lingers after it."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
import trio.testing

from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.limits import KIB, Limits
from tensor_codec.messages.contract import MAX_HOPS, Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    Here,
    Open,
    Opened,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    encode_close,
    encode_open,
    encode_relink,
    encode_resume,
    encode_step,
    encode_where,
    owner_tag,
)
from tensor_codec.span_spec import SpanSpec
from tests.fakes_serving import CLIENT, HIDDEN, RawClient, World, some_hidden, swarm, until, whole_model

LIMITS = Limits()
ROW = HIDDEN * 4
CONTRACT = Contract(bytes(16), 0, 1, 1, 64, HIDDEN, "fp32", 2048)


def step(number: int, position: int, tokens: int = 1, *, session: bytes = bytes(16), reply="all", **other):
    body = other.pop("body", None)
    if body is None:
        body = bytes(encode_hidden(some_hidden(64)[:, position : position + tokens], "fp32"))
    return encode_step(Step(session, number, position, reply, body, **other))


def values(result: object) -> torch.Tensor:
    assert isinstance(result, Result)
    return decode_hidden(result.body, CONTRACT)


def expected(stop: int, tokens: int, start: int = 0) -> torch.Tensor:
    """What blocks [start, stop) make of the first positions of `some_hidden(64)`."""
    return whole_model(some_hidden(64)[:, :tokens], start, stop)


async def end(client: RawClient) -> None:
    with suppress(PeerGone):  # where the hop was first
        await client.stream.send(encode_close())
    await client.stream.aclose()


# What is asked for, and refused.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another revision": ({"revision": "other"}, "wrong_revision"),
    "another dtype": ({"dtype": "bfloat16"}, "wrong_revision"),
    "blocks before the span": ({"start": 1, "stop": 4}, "wrong_revision"),
    "blocks behind the span": ({"start": 4, "stop": 7}, "wrong_revision"),
    "blocks of another span": ({"start": 10, "stop": 12}, "wrong_revision"),
    "an adapter": ({"adapter": "a"}, "wrong_revision"),
    "more tokens than a session may have": ({"max_length": 4001}, "cache_full"),
    "more tokens in rows": ({"max_length": 1001, "batch": 4}, "cache_full"),
    "rows of which no position fits into a frame": ({"max_length": 1, "batch": 4000}, "refused"),
    "more positions than the model has": ({"max_length": 4097}, "refused"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_a_session_that_asks_for_what_is_not_served_is_refused_with_its_reason(what, autojump_clock):
    changes, code = REFUSED[what]
    async with swarm(Limits(max_session_tokens=4000, max_frame_bytes=64 * KIB)) as world:
        node = world.add("a", 2, 6)
        client, answer = await RawClient.open(world, "a", **changes)
        assert isinstance(answer, Failed)
        assert answer.code == code
        assert await client.stream.receive() is None
        await client.stream.aclose()
        assert node.faults == {}, "a refusal is nobody's fault"


@pytest.mark.parametrize(("start", "stop"), [(2, 6), (2, 3), (3, 5), (5, 6)])
async def test_any_part_of_the_span_is_served(start, stop, autojump_clock):
    async with swarm() as world:
        node = world.add("a", 2, 6)
        client, answer = await RawClient.open(world, "a", start=start, stop=stop)
        assert answer == Opened(push=False)
        await client.stream.send(step(0, 0, 5))
        assert torch.equal(values(await client.receive(world)), expected(stop, 5, start))
        assert node.span.steps == [(0, 5, start, stop)]
        await end(client)


async def test_a_peer_has_so_many_sessions_and_no_more_and_others_have_theirs(autojump_clock):
    limits = Limits(max_sessions_per_peer=3)
    async with swarm(limits) as world:
        world.add("a", 0, 4)
        clients = []
        for number in range(3):
            client, answer = await RawClient.open(world, "a", session=bytes([number]) * 16)
            assert isinstance(answer, Opened)
            clients.append(client)
        client, answer = await RawClient.open(world, "a", session=b"x" * 16)
        assert isinstance(answer, Failed)
        assert answer.code == "too_many"
        assert answer.retry_after_seconds
        clients.append(client)
        other, answer = await RawClient.open(world, "a", "someone else", session=b"y" * 16)
        assert isinstance(answer, Opened)
        await end(clients[0])
        await trio.sleep(1)
        late, answer = await RawClient.open(world, "a", session=b"z" * 16)
        assert isinstance(answer, Opened), "a place that was given back is a place"
        for one in (*clients[1:], other, late):
            await end(one)


async def test_a_peer_with_a_share_of_its_own_has_more_sessions_than_others(autojump_clock):
    limits = Limits(max_sessions_per_peer=1, max_streams=10, peer_shares=(("gateway", 0.5),))
    async with swarm(limits) as world:
        world.add("a", 0, 4)
        clients = []
        for peer, most in (("gateway", 5), ("somebody", 1)):
            for number in range(most):
                session = (3 * peer.encode())[:15] + bytes([number])
                client, answer = await RawClient.open(world, "a", peer, session=session)
                assert isinstance(answer, Opened)
                clients.append(client)
            refused, answer = await RawClient.open(world, "a", peer, session=b"x" * 16)
            assert isinstance(answer, Failed)
            assert f"{most} sessions of yours are open" in answer.message
            clients.append(refused)
        for one in clients:
            await end(one)


async def test_a_session_for_which_there_is_no_cache_is_refused_before_anything_is_made(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, tokens=64)
        first, answer = await RawClient.open(world, "a", max_length=64)
        assert isinstance(answer, Opened)
        began = trio.current_time()
        second, answer = await RawClient.open(world, "a", "another", session=b"x" * 16, max_length=64)
        assert isinstance(answer, Failed)
        assert (answer.code, answer.retry_after_seconds) == ("cache_full", 2.0)
        assert trio.current_time() - began == world.limits.cache_wait_seconds
        assert node.budget.free_tokens == 64, "no step has come, and nothing is promised"
        third, answer = await RawClient.open(world, "a", session=b"y" * 16, max_length=65)
        assert isinstance(answer, Failed)
        assert (answer.code, answer.retry_after_seconds) == ("cache_full", None)
        await third.stream.aclose()
        await end(first)
        await second.stream.aclose()


async def test_four_ids_of_one_address_cannot_keep_another_out_of_the_cache(autojump_clock):
    crowd, home = "198.51.100.1/32", "192.0.2.1/32"
    async with swarm() as world:
        node = world.add("a", 0, 4, tokens=256)
        for name, prefix in (*((f"id {number}", crowd) for number in range(4)), (CLIENT, home)):
            world.prefixes[PeerId(name)] = prefix
        greedy = []
        for number in range(4):
            session = bytes([number]) * 16
            client, _ = await RawClient.open(world, "a", f"id {number}", session=session)
            await client.stream.send(step(0, 0, 64, session=session))
            assert isinstance(await client.receive(world), Result)
            greedy.append(client)
        one_more, told = await RawClient.open(world, "a", "id 0", session=b"m" * 16)
        assert isinstance(told, Failed)
        assert told.code == "cache_full"
        began = trio.current_time()
        honest, answer = await RawClient.open(world, "a")
        assert isinstance(answer, Opened)
        assert trio.current_time() - began == pytest.approx(LIMITS.cache_wait_seconds / 2)
        await honest.stream.send(step(0, 0, 64))
        assert isinstance(await honest.receive(world), Result)
        told = await greedy[3].receive(world)
        assert isinstance(told, Failed)
        assert (told.code, told.retry_after_seconds) == ("cache_full", 2.0)
        for number, client in enumerate(greedy[:3]):
            await client.stream.send(step(1, 63, session=bytes([number]) * 16))
            assert isinstance(await client.receive(world), Result), "the others go on"
        assert node.faults == {}
        for client in (*greedy, one_more, honest):
            await end(client)


async def test_a_step_for_which_there_is_no_page_is_refused_and_the_session_goes_on_later(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, tokens=48)
        old, _ = await RawClient.open(world, "a", max_length=32)
        young, _ = await RawClient.open(world, "a", "another", session=b"x" * 16, max_length=32)
        await young.stream.send(step(0, 0, 16, session=b"x" * 16))
        assert isinstance(await young.receive(world), Result)
        await young.stream.send(step(1, 16, session=b"x" * 16))  # the older one may still need the rest
        told = await young.receive(world)
        assert isinstance(told, Failed)
        assert (told.code, told.step) == ("cache_full", 1)
        await old.stream.send(step(0, 0, 32))
        assert isinstance(await old.receive(world), Result), "the oldest always goes on"
        await end(old)
        await young.stream.send(step(1, 16, session=b"x" * 16))
        assert isinstance(await young.receive(world), Result), "nothing of it was lost"
        assert node.budget.held_tokens("another") == 32
        await end(young)
        await trio.testing.wait_all_tasks_blocked()
        node.assert_idle()


async def test_a_session_that_its_client_opens_twice_is_refused_and_the_first_one_goes_on(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        first, _ = await RawClient.open(world, "a")
        second, told = await RawClient.open(world, "a")
        assert isinstance(told, Failed)
        assert (told.code, told.retry_after_seconds) == ("too_many", 1.0)
        assert await second.receive(world) is None, "the stream is closed, not reset"
        await second.stream.aclose()
        assert node.faults == {}
        await first.stream.send(step(0, 0))
        assert torch.equal(values(await first.receive(world)), expected(4, 1))
        await end(first)


async def test_a_peer_that_opens_an_id_that_it_has_heard_of_takes_nothing_from_its_owner(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, tokens=10**6)
        thief, answer = await RawClient.open(world, "a", "thief")
        assert isinstance(answer, Opened)
        owner, answer = await RawClient.open(world, "a")
        assert isinstance(answer, Opened), "the id is the owner's own, whoever else uses it"
        for client, tokens in ((owner, 3), (thief, 5)):
            await client.stream.send(step(0, 0, tokens))
            assert torch.equal(values(await client.receive(world)), expected(4, tokens))
        await end(thief)
        await trio.testing.wait_all_tasks_blocked()
        await owner.stream.send(step(1, 3))
        assert isinstance(await owner.receive(world), Result)
        await end(owner)
        assert node.faults == {}


async def test_of_two_sessions_with_one_id_and_one_hop_before_each_gets_its_own_steps(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        thief, _ = await RawClient.open(world, "a", "thief", predecessor="before")
        owner, _ = await RawClient.open(world, "a", predecessor="before")
        pusher = await world.dial(PeerId("before"), PeerId("a"), PUSH_PROTOCOL)
        await pusher.send(step(0, 0, 3, owner=owner_tag(CLIENT)))
        assert torch.equal(values(await owner.receive(world)), expected(4, 3))
        await pusher.send(step(0, 0, 2, owner=owner_tag("thief")))
        assert torch.equal(values(await thief.receive(world)), expected(4, 2))
        await end(thief)
        await trio.testing.wait_all_tasks_blocked()
        await pusher.send(step(1, 3))  # as a hop of an earlier version sends it
        assert isinstance(await owner.receive(world), Result)
        await end(owner)
        await pusher.aclose()
        assert node.faults == {}


# Messages without work.


async def test_a_client_that_asks_where_without_end_is_at_fault_and_one_that_asks_often_is_not(
    autojump_clock,
):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        for _ in range(60):
            await client.stream.send(encode_where())
            assert isinstance(await client.receive(world), Here)
            await trio.sleep(0.1)
        told: object = None
        asked = 0
        while asked < 200 and (not asked or isinstance(told, Here)):
            asked += 1
            with suppress(PeerGone):
                await client.stream.send(encode_where())
            told = await client.receive(world)
        assert asked - 1 <= 1.2 * LIMITS.where_per_second * LIMITS.frame_burst_seconds
        assert isinstance(told, Failed)
        assert told.code == "protocol"
        assert node.faults == {"client RemoteProtocolError": 1}
        await client.stream.aclose()


async def test_a_client_that_changes_the_route_without_end_is_at_fault(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        for epoch in range(1, 100):
            with suppress(PeerGone):
                await client.stream.send(encode_relink(Relink(epoch)))
            told = await client.receive(world)
            if not isinstance(told, Relinked):
                break
        assert epoch <= 1.2 * LIMITS.relinks_per_second * LIMITS.frame_burst_seconds + 1
        assert isinstance(told, Failed)
        assert told.code == "protocol"
        assert node.faults == {"client RemoteProtocolError": 1}
        await client.stream.aclose()


@pytest.mark.parametrize("what", ["unknown", "old route", "of another feeder"])
async def test_steps_that_no_session_wants_cost_their_pusher_its_stream(what, autojump_clock):
    async with swarm() as world, fed_session(world) as (client, pusher, node):
        if what == "old route":
            await client.stream.send(encode_relink(Relink(5, predecessor="before")))
            assert isinstance(await client.receive(world), Relinked)
        elif what == "of another feeder":
            pusher = await world.dial(PeerId("other"), PeerId("a"), PUSH_PROTOCOL)
        session = b"gone" * 4 if what == "unknown" else bytes(16)
        sent = 0
        with suppress(PeerGone):
            for sent in range(10_000):
                await pusher.send(step(0, 0, session=session))
                if not sent % 10:
                    await trio.testing.wait_all_tasks_blocked()
        many = LIMITS.frame_rate_peers_per_prefix  # clients send through one hop
        assert sent <= 1.1 * many * LIMITS.idle_steps_per_second * LIMITS.frame_burst_seconds
        assert node.faults[f"{'other' if what == 'of another feeder' else 'before'} RemoteProtocolError"] == 1
        await pusher.aclose()
        if what != "old route":
            fresh = await world.dial(PeerId("before"), PeerId("a"), PUSH_PROTOCOL)
            await fresh.send(step(0, 0, 3))
            assert torch.equal(values(await client.receive(world)), expected(4, 3))
            await fresh.aclose()


async def test_a_step_repeated_without_end_is_the_clients_fault(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        told: object = None
        sent = 0
        while sent < 10_000 and (not sent or isinstance(told, Result)):
            sent += 1
            await client.stream.send(step(0, 0))
            told = await client.receive(world)
        assert sent - 1 <= 1.25 * LIMITS.idle_steps_per_second * LIMITS.frame_burst_seconds
        assert isinstance(told, Failed)
        assert told.code == "protocol"
        assert len(node.span.steps) == 1
        await client.stream.aclose()


async def test_steps_that_were_on_their_way_when_a_session_ended_are_nobodys_fault(autojump_clock):
    async with (
        swarm(Limits(idle_steps_per_second=0.1)) as world,
        fed_session(world) as (client, pusher, node),
    ):
        await pusher.send(step(0, 0, 3))
        assert isinstance(await client.receive(world), Result)
        await end(client)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(1, 20):
            await pusher.send(step(number, number + 2))
            await trio.testing.wait_all_tasks_blocked()
        assert node.faults == {}
        await trio.sleep(61)
        again = await world.dial(PeerId("before"), PeerId("a"), "/raceme/push/1")
        with suppress(PeerGone):
            for number in range(20, 40):
                await again.send(step(number, number + 2))
                await trio.testing.wait_all_tasks_blocked()
        await again.aclose()
        # of a push stream without steps, and of steps that come later than any step travels
        assert node.faults == {"before PeerGone": 1, "before RemoteProtocolError": 1}


@pytest.mark.parametrize("frame", [b"", b"garbage", b"\x00\x00", bytes(5000), b"\xff" * 100])
async def test_garbage_instead_of_an_open_is_the_clients_fault(frame, autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        stream = await world.dial(CLIENT, PeerId("a"), "/raceme/session/1")
        await stream.send(frame)
        with pytest.raises(PeerGone, match="reset"):
            await stream.receive(30.0)
        await stream.aclose()
        assert node.faults == {"client MessageError": 1}


async def test_silence_instead_of_an_open_ends_at_its_deadline(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        stream = await world.dial(CLIENT, PeerId("a"), "/raceme/session/1")
        began = trio.current_time()
        with pytest.raises(PeerGone, match="reset"):
            await stream.receive(30.0)
        assert trio.current_time() - began == pytest.approx(LIMITS.frame_start_seconds)
        await stream.aclose()
        assert node.faults == {"client SlowPeer": 1}


# Steps.


async def test_steps_are_computed_in_order_and_each_answer_says_which_positions_it_holds(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0, 3))
        await client.stream.send(step(1, 3, 4, reply="last"))
        await client.stream.send(step(2, 7, 2, reply="none"))
        first, second, third = [await client.receive(world) for _ in range(3)]
        whole = expected(4, 9)
        assert (first.step, first.position, second.step, second.position) == (0, 0, 1, 6)
        assert (third.step, third.position, len(third.body)) == (2, 9, 0)
        assert torch.equal(values(first), whole[:, :3])
        assert torch.equal(values(second), whole[:, 6:7])
        assert [len(answer.timings) for answer in (first, second, third)] == [1, 1, 1]
        await end(client)


async def test_a_step_sent_again_is_answered_from_memory(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        for _ in range(3):
            await client.stream.send(step(0, 0, 3))
            assert torch.equal(values(await client.receive(world)), expected(4, 3))
        assert node.span.steps == [(0, 3, 0, 4)]
        await end(client)


async def test_a_lower_position_cuts_the_cache_and_the_answers_are_those_of_the_new_beginning(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        other = some_hidden(64, seed=9)
        for number, (position, tokens, source) in enumerate(
            [(0, 8, some_hidden(64)), (5, 2, other), (7, 3, other), (0, 4, other)]
        ):
            body = bytes(encode_hidden(source[:, position : position + tokens], "fp32"))
            await client.stream.send(step(number, position, body=body))
            answer = values(await client.receive(world))
        assert torch.equal(answer, whole_model(other[:, :4], 0, 4))
        assert [one[:2] for one in node.span.steps] == [(0, 8), (5, 2), (7, 3), (0, 4)]
        await end(client)


async def test_a_model_that_cannot_go_back_says_so(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 4, can_cut=False)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0, 3))
        await client.receive(world)
        await client.stream.send(step(1, 1, 1))
        told = await client.receive(world)
        assert (told.code, told.step) == ("protocol", None)
        await client.stream.aclose()


BROKEN = {
    "a hole": (step(1, 5, 1), "protocol"),
    "too many positions": (step(1, 3, 1, body=bytes(62 * ROW)), "message"),
    "an old step": (step(0, 3, 1), "protocol"),
    "a body that is half a row": (step(1, 3, body=bytes(ROW // 2)), "message"),
    "no body": (step(1, 3, body=b""), "message"),
    "another session": (step(1, 3, session=b"x" * 16), "message"),
    "NaN": (step(1, 3, body=bytes(ROW - 4) + b"\x00\x00\xc0\x7f"), "bad_values"),
    "infinity": (step(1, 3, body=bytes(ROW - 4) + b"\x00\x00\x80\xff"), "bad_values"),
    "garbage": (b"\x01garbage", "message"),
    "nothing": (b"", "message"),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_step_that_may_not_come_ends_the_session_and_touches_nothing(what, autojump_clock):
    frame, code = BROKEN[what]
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0, 3))
        await client.receive(world)
        cache: Any = next(iter(node.listener._sessions.all())).cache
        before = {block: given.clone() for block, given in cache.given.items()}
        await client.stream.send(frame)
        told = await client.receive(world)
        assert isinstance(told, Failed)
        assert told.code == code
        assert await client.receive(world) is None
        assert sum(node.faults.values()) == 1
        assert next(iter(node.faults)).startswith("client ")
        assert cache.length == 3
        assert all(torch.equal(cache.given[block], given) for block, given in before.items())
        await client.stream.aclose()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x01"])
async def test_a_frame_of_hostile_length_ends_the_session_at_its_prefix(data, autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send_bytes(data)
        told = await client.receive(world)
        assert told.code == "message"
        assert node.faults == {"client FrameError": 1}
        await client.stream.aclose()


async def test_values_that_the_span_itself_made_wrong_are_nobody_elses_fault(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        node.span.poison = lambda hidden: hidden * math.nan
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0, 3))
        told = await client.receive(world)
        assert (told.code, told.peer) == ("bad_values", None)
        assert node.faults == {}
        await client.stream.aclose()


async def test_so_many_steps_may_wait_and_one_more_ends_the_session(autojump_clock):
    limits = Limits(max_steps_in_flight=3)
    async with swarm(limits) as world:
        world.add("a", 0, 4, seconds=1)
        client, _ = await RawClient.open(world, "a")
        for number in range(4):  # one in the works, three in the inbox
            await client.stream.send(step(number, number))
            await trio.testing.wait_all_tasks_blocked()
        for number in range(4):
            assert (await client.receive(world)).step == number
        for number in range(4, 9):
            await client.stream.send(step(number, number))
            await trio.testing.wait_all_tasks_blocked()
        told = await client.receive(world)
        assert isinstance(told, Failed)
        assert told.code == "protocol"
        await client.stream.aclose()


async def test_a_full_queue_refuses_a_step_and_says_when_to_come_back(autojump_clock):
    limits = Limits(max_waiting_steps_per_peer=2)
    async with swarm(limits) as world:
        node = world.add("a", 0, 4, seconds=1)
        clients = []
        for number in range(3):
            client, _ = await RawClient.open(world, "a", session=bytes([number]) * 16)
            await client.stream.send(step(0, 0, session=bytes([number]) * 16))
            await trio.testing.wait_all_tasks_blocked()
            clients.append(client)
        answers = [await client.receive(world) for client in clients]
        assert [type(answer) for answer in answers] == [Result, Result, Failed]
        assert (answers[2].code, answers[2].retry_after_seconds) == ("too_many", 1.0)
        assert node.faults == {}
        for client in clients:
            await client.stream.aclose()


async def test_a_full_queue_of_one_peer_leaves_room_for_others(autojump_clock):
    limits = Limits(max_waiting_steps_per_peer=1, max_waiting_steps=2)
    async with swarm(limits) as world:
        world.add("a", 0, 4, seconds=1)
        answers = {}
        clients = {}
        for number, name in enumerate(["one", "one", "two", "three"]):
            session = bytes([number]) * 16
            clients[number], _ = await RawClient.open(world, "a", name, session=session)
            await clients[number].stream.send(step(0, 0, session=session))
            await trio.testing.wait_all_tasks_blocked()
        for number, client in clients.items():
            answers[number] = type(await client.receive(world))
            await client.stream.aclose()
        assert answers == {0: Result, 1: Failed, 2: Result, 3: Failed}


# Time.


async def test_a_session_without_a_first_step_ends_exactly_at_its_limit(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        began = trio.current_time()
        told = await client.receive(world)
        assert told.code == "ended"
        assert trio.current_time() - began == pytest.approx(LIMITS.session_first_step_seconds)
        assert await client.receive(world) is None
        assert node.listener.session_count == 0
        await client.stream.aclose()


async def test_an_idle_session_ends_exactly_at_its_limit(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        for number in range(3):
            await trio.sleep(9)
            await client.stream.send(step(number, number))
            await client.receive(world)
        began = trio.current_time()
        await trio.sleep(LIMITS.session_idle_seconds - 1)
        await client.stream.send(step(3, 3))
        assert isinstance(await client.receive(world), Result)
        told = await client.receive(world)
        assert told.code == "ended"
        assert "idle for 60" in told.message
        assert trio.current_time() - began == pytest.approx(2 * LIMITS.session_idle_seconds - 1)
        await client.stream.aclose()


async def test_a_session_that_is_never_idle_ends_exactly_at_the_end_of_its_life(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        began, number = trio.current_time(), 0
        while True:
            await client.stream.send(step(number, number % 50))
            answer = await client.receive(world)
            if isinstance(answer, Failed):
                break
            number += 1
            with trio.move_on_after(50):
                answer = await client.receive(world)
                break
        assert answer.code == "ended"
        life = LIMITS.session_life_seconds + 64 * LIMITS.session_position_seconds  # opened for 64 positions
        assert f"older than {life:g} s" in answer.message
        assert trio.current_time() - began == pytest.approx(life)
        await client.stream.aclose()


async def test_a_client_that_does_not_read_its_answers_is_dropped_at_the_limit(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        began = trio.current_time()
        for number in range(20):  # the stream holds 16
            try:
                await client.stream.send(step(number, number))
            except PeerGone:  # the hop has given up
                break
            await trio.testing.wait_all_tasks_blocked()
        await until(lambda: not node.listener.session_count)
        taken = trio.current_time() - began
        assert LIMITS.reply_taken_seconds <= taken <= LIMITS.reply_taken_seconds + 2
        assert node.faults == {"client SlowPeer": 1}
        await client.stream.aclose()


# Going away.


@pytest.mark.parametrize("how", ["close", "end", "reset"])
@pytest.mark.parametrize("when", ["before a step", "in a step", "with steps waiting", "after a step"])
async def test_a_client_that_goes_away_frees_everything_at_once(how, when, autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, seconds=3)
        client, _ = await RawClient.open(world, "a")
        if when != "before a step":
            await client.stream.send(step(0, 0))
        if when == "after a step":
            await client.receive(world)
        if when == "with steps waiting":
            for number in range(1, 5):
                await client.stream.send(step(number, number))
        await trio.testing.wait_all_tasks_blocked()
        if how == "close":
            await end(client)
        elif how == "end":
            await client.stream.aclose()
        else:
            await client.stream.reset()
        await trio.sleep(0.01)
        node.assert_idle()
        assert node.faults == {}


async def test_a_client_that_goes_away_while_the_hop_dials_frees_everything_within_the_dial(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)

        async def dial_into_nothing(peer):
            await trio.sleep(LIMITS.dial_seconds)
            raise SlowPeer("no answer")

        node.listener.pushed.links.open_stream = dial_into_nothing
        stream = await world.dial(CLIENT, PeerId("a"), "/raceme/session/1")
        opened = Open(bytes(16), SpanSpec("m", "r", Blocks(0, 4), "float32"), 1, 64, "fp32", successor="b")
        await stream.send(encode_open(opened))
        await trio.testing.wait_all_tasks_blocked()
        assert node.listener.session_count == 1
        await stream.reset()
        await trio.sleep(LIMITS.dial_seconds + 0.1)
        node.assert_idle()


async def test_a_node_that_drains_finishes_the_steps_in_flight_and_takes_no_new_session(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, seconds=1)
        busy, _ = await RawClient.open(world, "a", session=b"b" * 16)
        idle, _ = await RawClient.open(world, "a", session=b"i" * 16)
        for number in range(3):
            await busy.stream.send(step(number, number, session=b"b" * 16))
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.listener.drain)
            await trio.testing.wait_all_tasks_blocked()
            late, answer = await RawClient.open(world, "a", session=b"l" * 16)
            assert isinstance(answer, Failed)
            assert answer.code == "draining"
            for client in (busy, idle):
                assert (await client.receive(world)).code == "leaving"
            for number in range(3):
                assert (await busy.receive(world)).step == number
            for client in (busy, idle):
                told = await client.receive(world)
                assert (told.code, told.message) == ("ended", "this node is leaving the swarm")
                assert await client.receive(world) is None
        assert 3.0 + LIMITS.drain_idle_seconds <= trio.current_time() <= 4.0 + LIMITS.drain_idle_seconds
        assert node.listener.session_count == 0
        for client in (busy, idle, late):
            await client.stream.aclose()


async def test_draining_ends_by_its_limit_whatever_the_steps_take(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, seconds=1000)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0))
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await node.listener.drain()
        assert trio.current_time() - began <= LIMITS.drain_seconds + 1
        assert [(await client.receive(world)).code for _ in range(2)] == ["leaving", "ended"]
        await client.stream.aclose()


async def test_draining_an_idle_node_takes_no_time_twice(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.listener.drain)
            nursery.start_soon(node.listener.drain)
        assert trio.current_time() == pytest.approx(0.0)


# Pushes.


@asynccontextmanager
async def fed_session(world: World, **changes):
    """A session at "a" that "before" feeds: the client, the pusher's stream, the node."""
    node = world.add("a", 0, 4)
    client, answer = await RawClient.open(world, "a", predecessor="before", **changes)
    assert isinstance(answer, Opened)
    pusher = await world.dial(PeerId("before"), PeerId("a"), PUSH_PROTOCOL)
    yield client, pusher, node
    await client.stream.aclose()
    await pusher.aclose()


async def test_a_pushed_step_is_answered_to_the_client(autojump_clock):
    async with swarm() as world, fed_session(world) as (client, pusher, node):
        await pusher.send(step(0, 0, 3, timings=((5, 4),)))
        answer = await client.receive(world)
        assert torch.equal(values(answer), expected(4, 3))
        assert answer.timings[0] == (5, 4)
        assert len(answer.timings) == 2
        assert node.faults == {}


async def test_a_push_from_another_peer_is_blamed_and_not_applied(autojump_clock):
    async with swarm() as world, fed_session(world) as (client, pusher, node):
        thief = await world.dial(PeerId("thief"), PeerId("a"), PUSH_PROTOCOL)
        await thief.send(step(0, 0, 3))
        await trio.sleep(1)
        await thief.aclose()
        assert node.faults == {"thief MessageError": 1}
        assert node.span.steps == []
        await pusher.send(step(0, 0, 3))
        assert torch.equal(values(await client.receive(world)), expected(4, 3))


async def test_a_push_into_a_session_that_only_its_client_feeds_is_blamed(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a")
        thief = await world.dial(PeerId("thief"), PeerId("a"), PUSH_PROTOCOL)
        await thief.send(step(0, 0, 3))
        await trio.sleep(1)
        assert node.faults == {"thief MessageError": 1}
        assert node.span.steps == []
        await thief.aclose()
        await end(client)


async def test_a_client_that_opens_its_hops_differently_breaks_no_stream_that_others_use(autojump_clock):
    """Its hop pushes, in good faith, into a session that only the client itself feeds."""
    async with swarm() as world, pushing_pair(world) as (client, behind):
        hostile = [await RawClient.open(world, peer, "hostile", session=b"h" * 16, **how)
                   for peer, how in (("b", {"batch": 3}), ("a", {"successor": "b"}))]  # fmt: skip
        (stream,) = [one for one in world.nodes[PeerId("b")].streams if one.protocol == PUSH_PROTOCOL]
        await hostile[1][0].stream.send(step(0, 0, session=b"h" * 16))
        await client.stream.send(step(0, 0, 5))
        assert torch.equal(values(await behind.receive(world)), expected(4, 5))
        assert not stream.closed
        for one, _ in hostile:
            await end(one)


async def test_a_push_into_a_session_that_is_over_is_dropped_and_the_stream_goes_on(autojump_clock):
    async with swarm() as world, fed_session(world) as (client, pusher, node):
        await pusher.send(step(0, 0, 3, session=b"gone" * 4))
        await pusher.send(step(0, 0, 3))
        assert torch.equal(values(await client.receive(world)), expected(4, 3))
        assert node.faults == {}


@pytest.mark.parametrize("frame", [b"", b"garbage", b"\x00\x01\x80", encode_close()[0]])
async def test_garbage_on_a_push_stream_is_the_pushers_fault(frame, autojump_clock):
    async with swarm() as world, fed_session(world) as (_, pusher, node):
        await pusher.send(frame)
        with pytest.raises(PeerGone, match="reset"):
            await pusher.receive(30.0)
        assert node.faults == {"before MessageError": 1}


@pytest.mark.parametrize("body", [b"", bytes(ROW // 2), bytes(65 * ROW)])
async def test_a_push_against_its_contract_ends_its_session_alone_and_names_who_sent_it(body, autojump_clock):
    async with swarm() as world, fed_session(world) as (client, pusher, node):
        second, _ = await RawClient.open(world, "a", predecessor="before", session=b"2" * 16)
        await pusher.send(step(0, 0, body=body))
        told = await client.receive(world)
        assert (told.code, told.peer) == ("message", "before")
        assert node.faults == {"before MessageError": 1}
        # Its client may have opened the two hops differently: no reason to break other sessions.
        await pusher.send(step(0, 0, 3, session=b"2" * 16))
        assert torch.equal(values(await second.receive(world)), expected(4, 3))
        await end(second)


@pytest.mark.parametrize("faults_of", ["before", "client"])
async def test_a_client_is_banned_for_its_faults_and_a_hop_for_none_that_its_client_can_have_caused(
    faults_of: str, autojump_clock
):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        pusher = await world.dial(PeerId("before"), PeerId("a"), PUSH_PROTOCOL)
        for number in range(4):
            banned = {CLIENT} if faults_of == "client" and number > 2 else set()
            assert node.listener.faults.banned().keys() == banned
            session = bytes([number]) * 16
            before = "before" if faults_of == "before" else None
            client, _ = await RawClient.open(world, "a", predecessor=before, session=session)
            await (pusher if before else client.stream).send(step(0, 0, body=b"", session=session))
            assert (await client.receive(world)).code == "message"
            await end(client)
        await pusher.aclose()


async def test_values_that_are_not_finite_from_the_hop_before_are_its_fault_and_the_client_is_told(
    autojump_clock,
):
    async with swarm() as world, fed_session(world) as (client, pusher, node):
        await pusher.send(step(0, 0, 1, body=bytes(ROW - 4) + b"\x00\x00\xc0\x7f"))
        told = await client.receive(world)
        assert (told.code, told.peer) == ("bad_values", "before")
        assert node.faults == {"before BadResult": 1}
        assert node.span.steps == []


async def test_a_client_that_does_not_read_is_at_fault_and_not_the_hop_before(autojump_clock):
    async with swarm() as world, fed_session(world) as (_, pusher, node):
        for number in range(18):
            await pusher.send(step(number, number))
            await trio.testing.wait_all_tasks_blocked()
        await until(lambda: not node.listener.session_count)
        assert node.faults == {"client SlowPeer": 1}


async def test_timings_of_as_many_hops_as_there_may_be_can_be_passed_on(autojump_clock):
    full = tuple((n, n) for n in range(MAX_HOPS))
    async with swarm() as world:
        world.add("a", 0, 2)
        last = world.add("b", 2, 4)
        behind, _ = await RawClient.open(world, "b", predecessor="a")
        client, answer = await RawClient.open(world, "a", successor="b")
        assert answer == Opened(push=True)
        await client.stream.send(step(0, 0, 2, timings=full))
        answer = await behind.receive(world)
        assert torch.equal(values(answer), expected(4, 2))
        assert len(answer.timings) == MAX_HOPS
        assert last.faults == {}
        await end(client)
        await end(behind)


# Pushing on.


async def test_a_hop_that_cannot_reach_the_next_one_says_so_when_it_opens(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 2)
        client, answer = await RawClient.open(world, "a", successor="nobody")
        assert answer == Opened(push=False)
        assert node.faults == {"nobody PeerGone": 1}
        await client.stream.send(step(0, 0, 2))
        told = await client.receive(world)
        assert (told.code, told.peer, told.step) == ("cannot_push", "nobody", 0)
        await client.stream.send(encode_relink(Relink(1, relay=True)))
        assert await client.receive(world) == Relinked(1, push=False, length=2, kept=0, step=0)
        await client.stream.send(encode_resume(Resume(1, 2)))
        await client.stream.send(step(0, 0, 2, epoch=1))  # a retry: the client carries its answer on
        assert torch.equal(values(await client.receive(world)), expected(2, 2))
        await end(client)


async def test_a_hop_waits_two_seconds_for_a_next_one_that_does_not_answer(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 2)

        async def dial_into_nothing(peer):
            await trio.sleep_forever()

        node.listener.pushed.links.open_stream = dial_into_nothing
        began = trio.current_time()
        client, answer = await RawClient.open(world, "a", successor="b")
        assert answer == Opened(push=False)
        assert trio.current_time() - began == pytest.approx(LIMITS.successor_seconds, abs=0.1)
        await end(client)


async def test_a_hop_says_how_far_it_is_while_it_computes(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 2, seconds=10)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(encode_where())
        assert await client.receive(world) == Here(0, 0)
        for number in range(3):
            await client.stream.send(step(number, number))
        await trio.sleep(11)
        await client.stream.send(encode_where())
        assert isinstance(await client.receive(world), Result)
        assert await client.receive(world) == Here(1, 2, 0)
        await end(client)


async def test_a_held_session_computes_nothing_before_it_is_resumed(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 2)
        client, _ = await RawClient.open(world, "a", held=True, epoch=3)
        await client.stream.send(step(0, 0, 2, epoch=3))
        await trio.sleep(5)
        assert node.span.steps == []
        await client.stream.send(encode_resume(Resume(3, 0)))
        assert torch.equal(values(await client.receive(world)), expected(2, 2))
        await end(client)


@asynccontextmanager
async def pushing_pair(world: World):
    """A client with a session at "a", which pushes to "b"; both nodes are there."""
    world.add("a", 0, 2)
    world.add("b", 2, 4)
    behind, _ = await RawClient.open(world, "b", predecessor="a")
    client, _ = await RawClient.open(world, "a", successor="b")
    yield client, behind
    await end(client)
    await end(behind)


async def test_what_was_sent_to_a_hop_is_sent_to_the_one_that_replaces_it(autojump_clock):
    async with swarm() as world, pushing_pair(world) as (client, behind):
        await client.stream.send(step(0, 0, 5))
        await behind.receive(world)
        for number in (1, 2):
            await client.stream.send(step(number, 4 + number))
            await behind.receive(world)
        other = world.add("c", 2, 4)
        instead, _ = await RawClient.open(world, "c", predecessor="a", held=True, epoch=1)
        await client.stream.send(encode_relink(Relink(1, successor="c")))
        assert await client.receive(world) == Relinked(1, push=True, length=7, kept=0, step=2)
        await instead.stream.send(encode_resume(Resume(1, 0)))
        await client.stream.send(encode_resume(Resume(1, 7, has=0, stop=7)))
        await client.stream.send(step(3, 7, epoch=1, bulk=True))
        assert torch.equal(values(await instead.receive(world)), expected(4, 8)[:, 7:])
        assert [one[:2] for one in other.span.steps] == [(0, 7), (7, 1)]
        await end(instead)


async def test_steps_of_an_older_route_are_forgotten_even_from_the_same_peer(autojump_clock):
    async with swarm() as world, pushing_pair(world) as (client, behind):
        await behind.stream.send(encode_relink(Relink(5, predecessor="a")))
        assert await behind.receive(world) == Relinked(5, push=False, length=0, kept=0)
        await behind.stream.send(encode_resume(Resume(5, 0)))
        await client.stream.send(step(0, 0, 2))  # the hop before has not been told: it pushes in epoch 0
        await trio.sleep(1)
        node = world.nodes[PeerId("b")]
        assert node.span.steps == []
        assert node.faults == {}


async def test_a_route_that_goes_back_in_time_ends_the_session(autojump_clock):
    async with swarm() as world, pushing_pair(world) as (client, _):
        await client.stream.send(encode_relink(Relink(2, successor="b")))
        await client.receive(world)
        await client.stream.send(encode_relink(Relink(2, successor="b")))
        told = await client.receive(world)
        assert (told.code, told.message) == ("protocol", "epoch 2 after 2")


@pytest.mark.parametrize("order", [Resume(1, 6), Resume(1, 3, has=0, stop=4), Resume(1, 5, has=6, stop=5)])
async def test_a_resume_that_asks_for_what_is_not_there_ends_the_session(order, autojump_clock):
    async with swarm() as world, pushing_pair(world) as (client, behind):
        await client.stream.send(step(0, 0, 5))
        await behind.receive(world)
        await client.stream.send(encode_relink(Relink(1, successor="b")))
        await client.receive(world)
        await client.stream.send(encode_resume(order))
        if order.has > order.stop:  # nothing to be sent again
            await client.stream.send(step(1, 5, epoch=1))
            assert world.nodes[PeerId("a")].faults == {}
        else:
            assert (await client.receive(world)).code in ("protocol", "message")


@pytest.mark.parametrize("reply", ["last", "none"])
async def test_a_hop_that_becomes_the_last_one_keeps_no_journal_any_more(reply, autojump_clock):
    """The answer then holds less than the step, and would not fit: the node must not stumble over it."""
    async with swarm() as world, pushing_pair(world) as (client, behind):
        await client.stream.send(step(0, 0, 2))
        await behind.receive(world)
        await client.stream.send(encode_relink(Relink(1)))
        await client.receive(world)
        await client.stream.send(encode_resume(Resume(1, 2)))
        await client.stream.send(step(1, 2, 5, epoch=1, reply=reply))
        answer = await client.receive(world)
        assert len(answer.body) == {"last": ROW, "none": 0}[reply]
        await client.stream.send(encode_relink(Relink(2, relay=True)))
        assert await client.receive(world) == Relinked(2, push=False, length=7, kept=7, step=1)


async def test_what_a_hop_said_it_has_is_there_until_it_was_asked_for(autojump_clock):
    """However much others write meanwhile."""
    async with swarm() as world, pushing_pair(world) as (client, behind):
        world.nodes[PeerId("a")].listener.journals.tokens = 60
        await client.stream.send(step(0, 0, 55))
        await behind.receive(world)
        await client.stream.send(encode_relink(Relink(1, relay=True)))
        assert (await client.receive(world)).kept == 0
        other, _ = await RawClient.open(world, "a", session=b"o" * 16, relay=True)
        await other.stream.send(step(0, 0, 50, session=b"o" * 16))
        await other.receive(world)
        await client.stream.send(encode_resume(Resume(1, 55, has=0, stop=55)))
        again = await client.receive(world)
        assert again.replay
        assert torch.equal(decode_hidden(again.body, CONTRACT), expected(2, 55))
        await other.stream.send(step(1, 50, session=b"o" * 16))
        await other.receive(world)
        await end(other)


@pytest.mark.parametrize("batch", [1, 2])
async def test_a_replay_is_passed_on_from_where_it_is_wanted_whatever_the_journal_holds(
    batch, autojump_clock
):
    async with swarm() as world:
        node = world.add("a", 0, 2)
        node.listener.journals.tokens = 0
        client, _ = await RawClient.open(world, "a", relay=True, held=True, batch=batch)
        await client.stream.send(encode_resume(Resume(0, 0, has=3)))
        hidden = some_hidden(5, batch)
        body = bytes(encode_hidden(hidden, "fp32"))
        await client.stream.send(step(0, 0, reply="replay", body=body))
        result = await client.receive(world)
        assert result.position == 3
        found = decode_hidden(result.body, replace(CONTRACT, batch=batch))
        assert torch.equal(found, whole_model(hidden, 0, 2)[:, 3:])
        await end(client)


async def test_a_replacement_that_is_relinked_in_the_middle_of_a_long_step_answers_at_once(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 4, seconds=100)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0, 9))
        await trio.sleep(1)
        await client.stream.send(encode_relink(Relink(1)))
        assert await client.receive(world) == Relinked(1, push=False, length=0, kept=0)
        world.nodes[PeerId("a")].compute.seconds = 0
        await client.stream.send(encode_resume(Resume(1, 0)))
        await client.stream.send(step(0, 0, 9, epoch=1))
        assert torch.equal(values(await client.receive(world)), expected(4, 9))
        await end(client)


async def test_a_part_of_a_replay_that_is_too_long_holds_its_sender_back_and_nobody_else(autojump_clock):
    async with swarm(Limits(max_steps_in_flight=2)) as world, fed_session(world) as (client, push, node):
        node.compute.seconds = 1
        for position in range(10):
            await push.send(step(0, position, reply="replay", bulk=True))
        await push.send(step(1, 10, bulk=True))
        assert torch.equal(values(await client.receive(world)), expected(4, 11)[:, 10:])
        assert node.faults == {}


async def test_a_client_that_comes_back_to_a_hop_finds_its_old_session_gone(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        old, _ = await RawClient.open(world, "a")
        await old.stream.send(step(0, 0, 3))
        await old.receive(world)
        new, answer = await RawClient.open(world, "a", epoch=1)
        assert answer == Opened(push=False)
        assert await old.receive(world) is None
        assert node.listener.session_count == 1
        await end(new)
        await old.stream.aclose()


async def test_a_client_that_comes_back_while_its_first_attempt_waits_for_room_is_answered(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, tokens=64)
        holder, _ = await RawClient.open(world, "a", "another", session=b"x" * 16)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(RawClient.open, world, "a")
            await trio.sleep(1)
            new, answer = await RawClient.open(world, "a", epoch=1)
            assert isinstance(answer, Failed)
            assert answer.code == "cache_full"
            nursery.cancel_scope.cancel()
        assert node.faults == {}
        await end(holder)
        await new.stream.aclose()
        for stream in world.client_streams:
            await stream.aclose()


async def test_orders_do_not_pile_up(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, seconds=5)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(step(0, 0, 3))
        await client.stream.send(encode_relink(Relink(1)))
        await client.stream.send(encode_resume(Resume(1, 0)))
        await client.receive(world)
        await client.stream.send(encode_resume(Resume(1, 0)))
        assert (await client.receive(world)).code == "protocol"
        await end(client)
        assert node.faults.total() == 1


async def test_a_next_hop_that_dies_is_named_to_the_client(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 2)
        world.add("b", 2, 4)
        behind, _ = await RawClient.open(world, "b", predecessor="a")
        client, _ = await RawClient.open(world, "a", successor="b")
        await world.kill("b")
        await client.stream.send(step(0, 0, 2))
        told = await client.receive(world)
        assert (told.code, told.peer, told.step) == ("cannot_push", "b", 0)
        assert node.faults == {"b PeerGone": 1}
        await end(client)
        await behind.stream.aclose()


async def test_a_push_stream_that_broke_is_opened_again_and_nothing_is_lost_or_applied_twice(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 2)
        last = world.add("b", 2, 4)
        behind, _ = await RawClient.open(world, "b", predecessor="a")
        client, _ = await RawClient.open(world, "a", successor="b")
        for number in range(3):
            await client.stream.send(step(number, number))
            assert torch.equal(values(await behind.receive(world)), expected(4, number + 1)[:, number:])
            pushed = next(s for s in node.streams if s.protocol == PUSH_PROTOCOL and not s.closed)
            await pushed.other.reset()
            await trio.testing.wait_all_tasks_blocked()
        assert [one[0] for one in last.span.steps] == [0, 1, 2]
        await end(client)
        await end(behind)


async def test_sessions_to_the_same_next_hop_share_one_stream_that_ends_with_the_last_of_them(autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 2)
        world.add("b", 2, 4)
        clients = []
        for number in range(3):
            client, _ = await RawClient.open(world, "a", successor="b", session=bytes([number]) * 16)
            clients.append(client)
        assert [pair for pair in world.dialled if pair == ("a", "b")] == [("a", "b")]
        for client in clients:
            assert len([s for s in world.nodes[PeerId("b")].streams if not s.closed]) == 1
            await end(client)
            await trio.sleep(0.1)
        assert [s for s in world.nodes[PeerId("b")].streams if not s.closed] == []
