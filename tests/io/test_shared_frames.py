"""Steps of many sessions share frames, and each session fares as if it were alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import torch
import trio

from client.session.session import Session
from node.serving.sessions.inbox import Arrived
from node.serving.sessions.worker import HopWorker
from routing.names import PeerId
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import PeerGone
from tensor_codec.header import pack_header, split_message
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed, read_message
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    Opened,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    encode_close,
    encode_relink,
    encode_resume,
)
from tensor_codec.messages.steps import encode_gather, encode_results, encode_steps, read_results
from tests.fakes_serving import (
    CLIENT,
    HIDDEN,
    FakeNode,
    FakeStream,
    RawClient,
    World,
    some_hidden,
    swarm,
    whole_model,
)

CLIENTS = 5
GATHER = b"gathered"
CONTRACT = Contract(bytes(16), 0, 4, 1, 64, HIDDEN, "fp32", 64)


def watch(world: World) -> dict[tuple[PeerId, PeerId], list[str]]:
    """The messages on push streams from now on: their kinds, and how many steps they have."""
    seen: dict[tuple[PeerId, PeerId], list[str]] = {}
    dial = world.dial

    async def watched(me: PeerId, to: PeerId, protocol: str) -> FakeStream:
        stream = await dial(me, to, protocol)
        if protocol == PUSH_PROTOCOL:
            send, send_now = stream.send, stream.send_now
            kinds = seen.setdefault((me, to), [])

            def note(parts: Sequence[bytes]) -> None:
                header = split_message(b"".join(parts))[0]
                kinds.append(header._fields["k"] + str(header._fields.get("c", "")))

            async def sent(frame, seconds=None):
                note(frame)
                await send(frame, seconds)

            def sent_now(frame):
                done = send_now(frame)
                if done:
                    note(frame)
                return done

            stream.send, stream.send_now = sent, sent_now
        return stream

    world.dial = watched
    return seen


async def steps_at_one_moment(sessions: Sequence[Session], position: int) -> list[torch.Tensor]:
    """One position of each session, submitted together."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(sessions)

    async def one(index: int) -> None:
        hidden = some_hidden(8, seed=index)[:, position : position + 1]
        answer = await sessions[index].step(hidden)
        assert answer is not None
        found[index] = answer

    async with trio.open_nursery() as nursery:
        for index in range(len(sessions)):
            nursery.start_soon(one, index)
    return found


async def sessions_of(world: World, *boundaries: int, count: int = CLIENTS) -> list[Session]:
    """Sessions along one chain, each with three positions, computed one after the other."""
    chain = world.add_chain(*boundaries)
    sessions = [await world.open(chain) for _ in range(count)]
    for index, session in enumerate(sessions):
        await session.step(some_hidden(8, seed=index)[:, :3])
    for node in world.nodes.values():
        node.compute.seconds = 0.1
    return sessions


async def test_tokens_of_many_sessions_go_from_hop_to_hop_in_one_frame(autojump_clock):
    async with swarm() as world:
        seen = watch(world)
        sessions = await sessions_of(world, 0, 3, 6, 8)
        for kinds in seen.values():
            kinds.clear()
        for position in (3, 4, 5):
            found = await steps_at_one_moment(sessions, position)
            for index, answer in enumerate(found):
                right = whole_model(some_hidden(8, seed=index)[:, : position + 1], 0, 8)
                assert torch.equal(answer, right[:, -1:])
        second, third = (seen[PeerId(a), PeerId(b)] for a, b in (("hop0", "hop1"), ("hop1", "hop2")))
        # the first batch begins with the first step, and those that came meanwhile make the second
        assert second.count(f"steps{CLIENTS - 1}") + second.count(f"steps{CLIENTS}") == 3, second
        assert third == second
        for session in sessions:
            session.close()
        assert all(node.faults == {} for node in world.nodes.values())


async def test_an_older_hop_gets_each_step_by_itself(autojump_clock):
    async with swarm() as world:
        seen = watch(world)
        world.old.add(PeerId("hop1"))
        sessions = await sessions_of(world, 0, 3, 8)
        found = await steps_at_one_moment(sessions, 3)
        for index, answer in enumerate(found):
            assert torch.equal(answer, whole_model(some_hidden(8, seed=index)[:, :4], 0, 8)[:, -1:])
        assert set(seen[PeerId("hop0"), PeerId("hop1")]) == {"step"}
        for session in sessions:
            session.close()


# What a previous hop may send to one that it feeds.


class Fed:
    """Sessions at "a", blocks 0:4, that "before" feeds; each has two positions."""

    def __init__(self, node: FakeNode, clients: list[RawClient], pusher: FakeStream) -> None:
        self.node = node
        self.clients = clients
        self.pusher = pusher

    def step(self, index: int, number: int = 1, position: int = 2, **changes: object) -> Step:
        body = bytes(encode_hidden(some_hidden(8, seed=index)[:, position : position + 1], "fp32"))
        step = Step(bytes([index]) * 16, number, position, "last", body, ((1, 2),))
        return replace(step, **changes)  # type: ignore[arg-type]

    async def right(self, world: World, index: int, tokens: int = 3) -> None:
        """The client of a session has the right answer to its last step."""
        result = await self.clients[index].receive(world)
        assert isinstance(result, Result), result
        found = decode_hidden(result.body, CONTRACT)
        assert torch.equal(found, whole_model(some_hidden(8, seed=index)[:, :tokens], 0, 4)[:, -1:])


@asynccontextmanager
async def fed(world: World, count: int = 3) -> AsyncIterator[Fed]:
    node = world.add("a", 0, 4)
    pusher = await world.dial(PeerId("before"), PeerId("a"), PUSH_PROTOCOL)
    clients = []
    for index in range(count):
        session = bytes([index]) * 16
        client, answer = await RawClient.open(
            world, "a", predecessor="before", session=session, gather=GATHER
        )
        assert isinstance(answer, Opened)
        clients.append(client)
        body = bytes(encode_hidden(some_hidden(8, seed=index)[:, :2], "fp32"))
        await pusher.send(encode_steps([Step(session, 0, 0, "last", body)]))
        await client.receive(world)
    yield Fed(node, clients, pusher)
    for client in clients:
        await client.stream.aclose()
    await pusher.aclose()


async def test_steps_of_one_frame_are_computed_in_one_batch(autojump_clock):
    async with swarm() as world, fed(world) as at:
        at.node.span.batches.clear()
        await at.pusher.send(encode_steps([at.step(index) for index in range(3)]))
        for index in range(3):
            await at.right(world, index)
        assert [len(batch) for batch in at.node.span.batches] == [3]
        assert at.node.faults == {}


async def test_steps_of_several_positions_and_cuts_need_no_task_either(autojump_clock, monkeypatch):
    worked: list[int] = []
    one_by_one = HopWorker._step

    async def counted(worker: HopWorker, arrived: Arrived) -> None:
        worked.append(arrived.step.step)
        await one_by_one(worker, arrived)

    async with swarm() as world, fed(world) as at:
        monkeypatch.setattr(HopWorker, "_step", counted)
        at.node.span.batches.clear()
        wrong = bytes(encode_hidden(some_hidden(3, seed=9), "fp32"))
        await at.pusher.send(encode_steps([at.step(0), at.step(1, body=wrong), at.step(2)]))
        await at.right(world, 0)
        await at.clients[1].receive(world)
        await at.right(world, 2)
        assert [len(batch) for batch in at.node.span.batches] == [3]
        # Two of these three drafts were wrong: the next step begins below the cache's length.
        await at.pusher.send(encode_steps([at.step(0, 2, 3), at.step(1, 2, 2), at.step(2, 2, 3)]))
        for index, tokens in ((0, 4), (1, 3), (2, 4)):
            await at.right(world, index, tokens)
        assert [len(batch) for batch in at.node.span.batches] == [3, 3]
        assert worked == []
        assert at.node.faults == {}


async def test_a_step_of_more_positions_than_a_batch_takes_is_for_its_session_s_task(autojump_clock):
    async with swarm() as world, fed(world) as at:
        most = at.node.listener.engine.batcher.policy.decode_tokens
        body = bytes(encode_hidden(some_hidden(most + 3, seed=0)[:, 2:], "fp32"))
        await at.pusher.send(encode_steps([at.step(0, body=body), at.step(1)]))
        result = await at.clients[0].receive(world)
        assert isinstance(result, Result)
        whole = whole_model(some_hidden(most + 3, seed=0), 0, 4)[:, -1:]
        assert torch.equal(decode_hidden(result.body, CONTRACT), whole)
        await at.right(world, 1)


async def test_a_step_that_its_session_does_not_allow_fails_alone_and_its_sender_is_blamed(autojump_clock):
    async with swarm() as world, fed(world) as at:
        wrong = at.step(1, body=b"12345")
        await at.pusher.send(encode_steps([at.step(0), wrong, at.step(2)]))
        told = await at.clients[1].receive(world)
        assert isinstance(told, Failed)
        assert (told.code, told.peer) == ("message", "before")
        await at.right(world, 0)
        await at.right(world, 2)
        assert at.node.faults == {"before MessageError": 1}
        await at.pusher.send(encode_steps([at.step(0, 2, 3)]))
        await at.right(world, 0, 4)


async def test_a_step_with_infinity_fails_alone(autojump_clock):
    async with swarm() as world, fed(world) as at:
        bad = bytes(encode_hidden(torch.zeros(1, 1, 4), "fp32")[:-4]) + b"\0\0\x80\x7f"
        await at.pusher.send(encode_steps([at.step(0), at.step(1, body=bad), at.step(2)]))
        told = await at.clients[1].receive(world)
        assert isinstance(told, Failed)
        assert (told.code, told.peer) == ("bad_values", "before")
        await at.right(world, 0)
        await at.right(world, 2)


async def test_steps_of_ended_sessions_older_routes_and_strangers_fail_alone(autojump_clock):
    async with swarm() as world, fed(world) as at:
        await at.clients[0].stream.send(encode_close())
        await trio.sleep(1)
        frame = [at.step(0), at.step(1, epoch=7), at.step(2), at.step(2, session=b"?" * 16)]
        await at.pusher.send(encode_steps(frame))
        await at.right(world, 2)
        await at.pusher.send(encode_steps([at.step(1)]))
        await at.right(world, 1)
        assert at.node.faults == {}


async def test_a_thief_s_steps_are_blamed_and_not_applied(autojump_clock):
    async with swarm() as world, fed(world) as at:
        thief = await world.dial(PeerId("thief"), PeerId("a"), PUSH_PROTOCOL)
        await thief.send(encode_steps([at.step(index) for index in range(3)]))
        await trio.sleep(1)
        assert at.node.faults == {"thief MessageError": 3}
        await thief.aclose()
        await at.pusher.send(encode_steps([at.step(0)]))
        await at.right(world, 0)


async def test_a_step_that_comes_again_is_answered_from_memory_and_the_others_are_computed(autojump_clock):
    async with swarm() as world, fed(world) as at:
        await at.pusher.send(encode_steps([at.step(0)]))
        await at.right(world, 0)
        computed = len(at.node.span.steps)
        await at.pusher.send(encode_steps([at.step(0), at.step(1)]))
        await at.right(world, 0)
        await at.right(world, 1)
        assert len(at.node.span.steps) == computed + 1


async def test_a_frame_with_more_than_its_records_resets_the_stream(autojump_clock):
    async with swarm() as world, fed(world) as at:
        bad = await world.dial(PeerId("before"), PeerId("a"), PUSH_PROTOCOL)
        await bad.send([*encode_steps([at.step(0)]), b"x"])
        with suppress(PeerGone):
            assert await bad.receive(10) is None
        assert at.node.faults == {"before MessageError": 1}
        await bad.aclose()


async def test_steps_for_nobody_count_as_idle_ones(autojump_clock):
    limits = Limits(idle_steps_per_second=1, frame_rate_peers_per_prefix=1)
    async with swarm(limits) as world, fed(world) as at:
        await at.pusher.send(encode_steps([at.step(0, session=b"?" * 16)] * 60))
        await trio.sleep(1)
        assert at.node.faults == {"before RemoteProtocolError": 1}


# A route that changes while a step is under way without its session's task.


async def test_a_relink_interrupts_a_step_and_the_session_goes_on(autojump_clock):
    async with swarm() as world, fed(world) as at:
        at.node.compute.seconds = 5
        await at.pusher.send(encode_steps([at.step(index) for index in range(3)]))
        await trio.sleep(1)
        await at.clients[1].stream.send(encode_relink(Relink(1, "before")))
        answer: object = await at.clients[1].receive(world)
        assert isinstance(answer, Relinked)
        assert (answer.length, answer.step) == (2, 0)
        await at.clients[1].stream.send(encode_resume(Resume(1, 2)))
        await at.pusher.send(encode_steps([at.step(1, epoch=1)]))
        for index in range(3):
            await at.right(world, index)
        assert at.node.faults == {}


async def test_a_session_that_ends_while_its_step_is_computed_leaves_nothing(autojump_clock):
    async with swarm() as world, fed(world) as at:
        at.node.compute.seconds = 5
        await at.pusher.send(encode_steps([at.step(index) for index in range(3)]))
        await trio.sleep(1)
        await at.clients[1].stream.send(encode_close())
        await at.right(world, 0)
        await at.right(world, 2)
        assert at.node.listener.session_count == 2


async def test_an_idle_session_is_not_ended_while_it_has_steps_without_its_task(autojump_clock):
    limits = Limits(session_idle_seconds=30)
    async with swarm(limits) as world, fed(world, 1) as at:
        for number in range(1, 5):
            await trio.sleep(20)
            await at.pusher.send(encode_steps([at.step(0, number, 1 + number)]))
            await at.right(world, 0, 2 + number)
        await trio.sleep(29)
        assert at.node.listener.session_count == 1
        await trio.sleep(2)
        assert at.node.listener.session_count == 0


# Results of many sessions of one client.


async def test_results_go_back_on_the_stream_of_a_client_that_gathers_them(autojump_clock):
    async with swarm() as world, fed(world) as at:
        gathered = await world.dial(CLIENT, PeerId("a"), PUSH_PROTOCOL)
        await gathered.send(encode_gather(GATHER))
        await trio.sleep(1)
        await at.pusher.send(encode_steps([at.step(index) for index in range(3)]))
        frame = await gathered.receive(10)
        assert frame is not None
        results = read_results(read_message(frame, frozenset({"results"})), 64)
        assert [session[0] for session, _ in results] == [0, 1, 2]
        for index, (_, result) in enumerate(results):
            found = decode_hidden(result.body, CONTRACT)
            assert torch.equal(found, whole_model(some_hidden(8, seed=index)[:, :3], 0, 4)[:, -1:])
            assert len(result.timings) == 2
        await at.pusher.send(encode_steps([at.step(0, 2, 3)]))
        await at.right(world, 0, 4)  # one alone comes on its own stream
        await gathered.aclose()
        await trio.sleep(1)
        await at.pusher.send(encode_steps([at.step(index, 2, 3) for index in (1, 2)]))
        await at.right(world, 1, 4)
        await at.right(world, 2, 4)


async def test_a_stream_that_gathers_results_stays_as_long_as_its_client_has_sessions(autojump_clock):
    async with swarm() as world, fed(world, 1):
        gathered = await world.dial(CLIENT, PeerId("a"), PUSH_PROTOCOL)
        await gathered.send(encode_gather(GATHER))
        stranger = await world.dial(PeerId("stranger"), PeerId("a"), PUSH_PROTOCOL)
        await stranger.send(encode_gather(GATHER))
        await trio.sleep(25)
        assert not gathered.other.closed
        assert stranger.other.closed
        await gathered.aclose()
        await stranger.aclose()


async def test_a_stream_asks_for_results_once(autojump_clock):
    async with swarm() as world, fed(world, 1) as at:
        stream = await world.dial(CLIENT, PeerId("a"), PUSH_PROTOCOL)
        await stream.send(encode_gather(GATHER))
        await stream.send(encode_gather(GATHER))
        await trio.sleep(1)
        assert at.node.faults == {f"{CLIENT} RemoteProtocolError": 1}
        other = await world.dial(CLIENT, PeerId("a"), PUSH_PROTOCOL)
        await other.send([pack_header({"k": "gather", "i": GATHER}), b"x"])
        await trio.sleep(1)
        assert at.node.faults[f"{CLIENT} MessageError"] == 1
        await stream.aclose()
        await other.aclose()


async def test_a_client_that_does_not_read_its_gathered_results_gets_them_on_each_stream(autojump_clock):
    async with swarm() as world, fed(world) as at:
        gathered = await world.dial(CLIENT, PeerId("a"), PUSH_PROTOCOL)
        await gathered.send(encode_gather(GATHER))
        await trio.sleep(1)
        full = gathered.other
        while full.send_now(b"x"):
            pass
        await at.pusher.send(encode_steps([at.step(index) for index in range(3)]))
        for index in range(3):
            await at.right(world, index)
        await gathered.aclose()


# The sessions of one client.


async def sessions_of_one_client(world: World, *boundaries: int) -> list[Session]:
    """Sessions along one chain that share a client's view, each with three positions."""
    chain, routes = world.add_chain(*boundaries), world.routes()
    sessions = [await world.open(chain, routes=routes) for _ in range(CLIENTS)]
    for index, session in enumerate(sessions):
        await session.step(some_hidden(8, seed=index)[:, :3])
    for node in world.nodes.values():
        node.compute.seconds = 0.1
    return sessions


def are_right(found: Sequence[torch.Tensor], tokens: int) -> bool:
    right = [whole_model(some_hidden(8, seed=index)[:, :tokens], 0, 8)[:, -1:] for index in range(len(found))]
    return all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


async def test_a_client_s_steps_of_one_moment_share_a_frame_and_so_do_their_results(autojump_clock):
    async with swarm() as world:
        seen = watch(world)
        sessions = await sessions_of_one_client(world, 0, 3, 6, 8)
        there, back = seen[CLIENT, PeerId("hop0")], seen[CLIENT, PeerId("hop2")]
        del there[:]
        streams = [stream for stream in world.client_streams if stream.protocol == PUSH_PROTOCOL]
        (results,) = [stream.other for stream in streams if stream.peer == "hop2"]
        sent: list[object] = []
        send_now = results.send_now

        def counted(frame):
            sent.append(frame)
            return send_now(frame)

        results.send_now = counted
        for position in (3, 4):
            assert are_right(await steps_at_one_moment(sessions, position), position + 1)
        assert there == [f"steps{CLIENTS}"] * 2
        assert back == ["gather"]
        assert (CLIENT, PeerId("hop1")) not in seen
        assert len(sent) == 2
        assert [len(batch) for batch in world.nodes[PeerId("hop2")].span.batches[-2:]] == [CLIENTS] * 2
        for session in sessions:
            session.close()
        assert all(node.faults == {} for node in world.nodes.values())


async def test_a_client_shares_no_stream_with_a_peer_that_takes_none(autojump_clock):
    async with swarm() as world:
        seen = watch(world)
        world.old |= {PeerId("hop0"), PeerId("hop1")}
        sessions = await sessions_of_one_client(world, 0, 3, 8)
        assert are_right(await steps_at_one_moment(sessions, 3), 4)
        assert not [pair for pair in seen if pair[0] == CLIENT]
        for session in sessions:
            session.close()


async def test_one_session_of_a_client_shares_no_stream(autojump_clock):
    async with swarm() as world:
        seen = watch(world)
        session = await world.open(world.add_chain(0, 3, 8))
        await session.step(some_hidden(8)[:, :3])
        assert not [pair for pair in seen if pair[0] == CLIENT]
        session.close()


async def test_sessions_go_on_when_a_shared_stream_breaks_under_their_steps(autojump_clock):
    async with swarm() as world:
        sessions = await sessions_of_one_client(world, 0, 3, 8)
        shared = [stream for stream in world.client_streams if stream.protocol == PUSH_PROTOCOL]
        assert {stream.peer for stream in shared} == {"hop0", "hop1"}
        async with trio.open_nursery() as nursery:

            async def break_it() -> None:
                await trio.sleep(0.05)
                for stream in shared:
                    await stream.other.reset()

            nursery.start_soon(break_it)
            assert are_right(await steps_at_one_moment(sessions, 3), 4)
        assert are_right(await steps_at_one_moment(sessions, 4), 5)
        for session in sessions:
            session.close()


async def test_a_wrong_result_on_a_shared_stream_is_a_fault_of_its_session_s_hop_alone(autojump_clock):
    async with swarm() as world:
        sessions = await sessions_of_one_client(world, 0, 8)
        (shared,) = [stream for stream in world.client_streams if stream.protocol == PUSH_PROTOCOL]
        wrong = Result(1, 3, b"12345")
        shared.other.send_now(encode_results([(sessions[1].route.contract.session, wrong)]))
        world.add("spare", 0, 8)
        assert are_right(await steps_at_one_moment(sessions, 3), 4)
        assert [session.trace.counts["fault"] for session in sessions] == [0, 1, 0, 0, 0]
        for session in sessions:
            session.close()


async def test_a_session_that_leaves_takes_nothing_from_those_that_stay(autojump_clock):
    async with swarm() as world:
        sessions = await sessions_of_one_client(world, 0, 8)
        sessions.pop().close()
        assert are_right(await steps_at_one_moment(sessions, 3), 4)
        while len(sessions) > 1:
            sessions.pop().close()
        assert are_right(await steps_at_one_moment(sessions, 4), 5)
        sessions.pop().close()
        await trio.sleep(1)
        assert [stream for stream in world.client_streams if not stream.closed] == []
