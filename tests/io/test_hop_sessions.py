"""Sessions at one hop, at their edges: the peers that may feed and end them, and steps never begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from node.serving.sessions.hop_session import HopSession, KeptOutputs, SessionRoute
from node.serving.sessions.inbox import Inbox
from node.serving.sessions.push import MAX_BULK_STREAMS, Outlet, PushLink, PushLinks
from node.serving.sessions.state import ServerSession
from node.serving.sessions.step_room import StepRoom
from routing.names import PeerId
from tensor_codec.codecs import encode_hidden
from tensor_codec.errors import PeerGone, Refused
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import Opened, Relink, Result, Step, encode_close, encode_step
from tests.fakes_serving import CLIENT, HIDDEN, FakeCache, RawClient, some_hidden, swarm

BEFORE = PeerId("before")


def some_step(
    number: int, position: int, tokens: int = 1, *, session: bytes = bytes(16), epoch: int = 0
) -> Step:
    body = bytes(encode_hidden(some_hidden(256)[:, position : position + tokens], "fp32"))
    return Step(session, number, position, "all", body, epoch=epoch)


async def end(client: RawClient) -> None:
    await client.stream.send(encode_close())
    await client.stream.aclose()


class Sent:
    """Takes frames, and gives none."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.prefix = ""
        self.limit = self.speed = 0
        self.judge: Callable[[bytes, int], Refused | None] | None = None
        self.closed = self.relayed = self.has_better_way = self.batches = False

    async def send(self, frame: object, seconds: float | None = None) -> None:
        await trio.lowlevel.checkpoint()

    def send_now(self, frame: object) -> bool:
        return False

    async def receive(self, seconds: float | None = None, taker: object = None) -> None:
        await trio.sleep_forever()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.closed = True

    reset = aclose


async def open_sent(peer: PeerId) -> Sent:
    return Sent(peer)


# Steps of older routes, and of others


async def test_a_part_of_a_replay_that_waited_for_space_while_the_route_changed_is_forgotten(autojump_clock):
    contract = Contract(bytes(16), 0, 4, 1, 64, HIDDEN, "fp32", 2048)
    hop = HopSession(
        contract=contract,
        stream=Sent(CLIENT),
        state=ServerSession(64),
        cache=FakeCache(1, 64),
        outlet=Outlet(PushLinks(open_sent), 60.0),
        inbox=Inbox(2, held=False, room=StepRoom(Limits()).of_session(CLIENT, "")),
        route=SessionRoute(0, BEFORE, None, relay=False),
        kept=KeptOutputs("fp32"),
    )
    for number in range(2):
        hop.put(some_step(number, number), BEFORE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hop.put_when_it_fits, some_step(2, 2), BEFORE)
        await trio.testing.wait_all_tasks_blocked()
        assert len(hop.inbox) == 2
        hop.relink(Relink(1, predecessor=BEFORE))
    assert len(hop.inbox) == 0
    hop.put(some_step(0, 0, epoch=1), BEFORE)
    assert len(hop.inbox) == 1


async def test_a_step_of_the_client_itself_where_another_hop_sends_them_ends_the_session(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        client, _ = await RawClient.open(world, "a", predecessor=BEFORE)
        await client.stream.send(encode_step(some_step(0, 0)))
        told = await client.receive(world)
        assert isinstance(told, Failed)
        assert told.code == "protocol"
        assert await client.receive(world) is None
        assert node.span.steps == []
        await client.stream.aclose()


async def test_a_peer_that_knows_a_sessions_id_cannot_end_it(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4)
        first, _ = await RawClient.open(world, "a")
        thief, answer = await RawClient.open(world, "a", "thief", epoch=5)
        assert isinstance(answer, Opened), "a session of its own, under the same id"
        await end(thief)
        await trio.testing.wait_all_tasks_blocked()
        await first.stream.send(encode_step(some_step(0, 0)))
        assert isinstance(await first.receive(world), Result)
        assert node.faults == {}
        await end(first)


# Limits


async def test_a_session_of_exactly_as_many_tokens_as_are_allowed_is_taken(autojump_clock):
    async with swarm(Limits(max_session_tokens=64)) as world:
        world.add("a", 0, 4)
        client, answer = await RawClient.open(world, "a", max_length=64)
        assert isinstance(answer, Opened)
        await end(client)
        client, answer = await RawClient.open(world, "a", max_length=65, session=b"x" * 16)
        assert isinstance(answer, Failed)
        assert answer.code == "cache_full"
        await client.stream.aclose()


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_step_that_waits_is_not_begun_where_its_client_has_gone(leaves: bool, autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, seconds=3)
        one, _ = await RawClient.open(world, "a", session=b"1" * 16, max_length=256)
        two, _ = await RawClient.open(world, "a", "another", session=b"2" * 16, max_length=256)
        await one.stream.send(encode_step(some_step(0, 0, 200, session=b"1" * 16)))
        await trio.sleep(0.1)
        await two.stream.send(encode_step(some_step(0, 0, 201, session=b"2" * 16)))
        await trio.sleep(1.0)
        if leaves:
            await two.stream.aclose()
        await trio.sleep(20.0)
        assert [tokens for _, tokens, *_ in node.span.steps] == [200] + [201] * (not leaves)
        await end(one)
        if not leaves:
            await end(two)


async def test_a_step_that_waited_too_long_is_refused_to_its_client_and_not_begun(autojump_clock):
    async with swarm(Limits(step_wait_seconds=2.5)) as world:
        node = world.add("a", 0, 4, seconds=2)
        node.listener.engine._clock = trio.current_time
        one, _ = await RawClient.open(world, "a", session=b"1" * 16, max_length=256)
        two, _ = await RawClient.open(world, "a", "another", session=b"2" * 16, max_length=256)
        await one.stream.send(encode_step(some_step(0, 0, 200, session=b"1" * 16)))
        await trio.sleep(0.1)
        await two.stream.send(encode_step(some_step(0, 0, 200, session=b"2" * 16)))
        told = await two.receive(world)
        assert isinstance(told, Failed)
        assert (told.code, told.retry_after_seconds) == ("too_many", 1.0)
        assert isinstance(await one.receive(world), Result)
        assert len(node.span.steps) == 1
        await end(one)
        await two.stream.aclose()


# Leaving


async def test_a_drain_waits_for_a_step_that_takes_longer_than_a_silent_session_may(autojump_clock):
    limits = Limits()
    async with swarm(limits) as world:
        node = world.add("a", 0, 4, seconds=limits.drain_idle_seconds + 3)
        client, _ = await RawClient.open(world, "a")
        await client.stream.send(encode_step(some_step(0, 0)))
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.listener.drain)
            told = await client.receive(world)
            assert isinstance(told, Failed)
            assert told.code == "leaving"
            assert isinstance(await client.receive(world), Result)
            await end(client)


async def test_a_session_that_waited_for_pages_while_the_drain_began_is_refused(autojump_clock):
    async with swarm() as world:
        node = world.add("a", 0, 4, tokens=64)
        holder, _ = await RawClient.open(world, "a", "another", session=b"x" * 16)
        await holder.stream.send(encode_step(some_step(0, 0, 60, session=b"x" * 16)))
        assert isinstance(await holder.receive(world), Result)
        answers: list[object] = []

        async def newcomer() -> None:
            client, answer = await RawClient.open(world, "a")
            answers.append(answer)
            await client.stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(newcomer)
            await trio.sleep(0.5)
            nursery.start_soon(node.listener.drain)
            await trio.sleep(0.5)
            assert answers == []
            await end(holder)  # its pages are free now
        (answer,) = answers
        assert isinstance(answer, Failed)
        assert answer.code == "draining"


# Streams to the next hop


async def test_bulk_streams_that_could_not_be_opened_take_nobodys_place(autojump_clock):
    dead = True
    opened: list[Sent] = []

    async def open_stream(peer: PeerId) -> Sent:
        await trio.lowlevel.checkpoint()
        if dead:
            raise PeerGone(f"{peer} is gone")
        opened.append(Sent(peer))
        return opened[-1]

    link = PushLink(PeerId("next"), open_stream)
    for _ in range(2 * MAX_BULK_STREAMS):
        await trio.sleep(1.0)  # opens are limited by the second as well
        with pytest.raises(PeerGone):
            await link.open_bulk()
    dead = False
    streams = []
    for _ in range(MAX_BULK_STREAMS):
        await trio.sleep(1.0)
        streams.append(await link.open_bulk())
    assert streams == opened
    await trio.sleep(1.0)
    assert await link.open_bulk() is None, "as many are open as may be"
    await close_all(link, opened)


async def close_all(link: PushLink, streams: Sequence[Sent]) -> None:
    for stream in streams:
        await link.close_bulk(stream)
        assert stream.closed
    assert await link.open_bulk() is not None


# --- dials that a client asks for -------------------------------------------------------------------


async def test_a_client_may_name_eight_new_hops_at_once_and_one_a_second_then(autojump_clock):
    dialled = []

    async def open_stream(peer):
        dialled.append(peer)
        raise PeerGone("nobody there")

    links = PushLinks(open_stream)
    greedy, other = Outlet(links, 60.0, "greedy"), Outlet(links, 60.0, "other")
    for number in range(100):
        with pytest.raises(PeerGone):
            await greedy.connect(PeerId(f"hop {number}"))
    assert len(dialled) == 8
    with pytest.raises(PeerGone, match="nobody there"):
        await other.connect(PeerId("hop"))
    for _ in range(100):
        await trio.sleep(0.1)
        with pytest.raises(PeerGone):
            await greedy.connect(PeerId("hop"))
    assert 8 + 1 + 9 <= len(dialled) <= 8 + 1 + 11


async def test_a_link_that_is_there_costs_no_dial(autojump_clock):
    links = PushLinks(open_sent)
    outlets = [Outlet(links, 60.0, "client") for _ in range(50)]
    for outlet in outlets:
        await outlet.connect(PeerId("hop"))
    for outlet in outlets:
        await outlet.aclose()
