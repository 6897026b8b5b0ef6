"""A client's session along a chain of hops, over streams in memory: right numbers, or the right error."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import trio
import trio.testing

from node.runtime.faults import Faults
from routing.chains.search import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.errors import (
    BadResult,
    CacheFull,
    Draining,
    FrameError,
    MessageError,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
    TooManyStreams,
    WrongRevision,
)
from tensor_codec.limits import Limits
from tensor_codec.messages.session import SESSION_PROTOCOL, Opened, Result, encode_opened, encode_result
from tests.fakes import memory_framed_pair
from tests.fakes_serving import (
    HIDDEN,
    World,
    serve_push,
    some_hidden,
    swarm,
    whole_model,
)

BLOCKS = 8
CHAINS = {1: (0, 8), 2: (0, 3, 8), 3: (0, 3, 4, 8), 4: (0, 1, 3, 4, 8)}
relay_or_push = pytest.mark.parametrize("relay", [False, True], ids=["push", "relay"])


def cut_ways(world: World, chain: Chain) -> None:
    """No hop reaches the next one."""
    for hop, following in zip(chain.hops, chain.hops[1:], strict=False):
        world.unreachable.add((hop.peer, following.peer))


@relay_or_push
@pytest.mark.parametrize("hops", CHAINS)
async def test_a_chain_gives_what_the_whole_model_gives(hops, relay, autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(*CHAINS[hops])
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        assert session.relay == (relay and hops > 1)
        hidden = some_hidden(12)
        expected = whole_model(hidden, 0, BLOCKS)
        assert torch.equal(await session.step(hidden[:, :5]), expected[:, :5])
        assert torch.equal(await session.step(hidden[:, 5:6]), expected[:, 5:6])
        assert torch.equal(await session.step(hidden[:, 6:9], reply="last"), expected[:, 8:9])
        assert await session.step(hidden[:, 9:11], reply="none") is None
        assert torch.equal(await session.step(hidden[:, 11:]), expected[:, 11:])
        assert session.length == 12
        for node in world.nodes.values():
            assert [one[:2] for one in node.span.steps] == [(0, 5), (5, 1), (6, 3), (9, 2), (11, 1)]
        assert session.times is not None
        assert len(session.times.hops) == hops
        await session.aclose()
        assert all(not node.faults or relay for node in world.nodes.values()), (
            "in relay mode each hop has noted that the next one is out of reach"
        )


@relay_or_push
async def test_a_chain_may_use_parts_of_spans_and_compute_a_part_of_the_model(relay, autojump_clock):
    async with swarm() as world:
        world.add("a", 0, 6)
        world.add("b", 2, 8)
        chain = Chain((Hop(PeerId("a"), 1, 4), Hop(PeerId("b"), 4, 7)), 0.0)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        assert torch.equal(await session.step(some_hidden(5)), whole_model(some_hidden(5), 1, 7))
        await session.aclose()


@pytest.mark.parametrize("batch", [1, 3])
async def test_rows_of_a_batch_stay_apart(batch, autojump_clock):
    async with swarm() as world:
        session = await world.open(world.add_chain(0, 3, 8), batch=batch)
        hidden = some_hidden(6, batch)
        found = torch.cat([await session.step(hidden[:, :4]), await session.step(hidden[:, 4:])], dim=1)
        for row in range(batch):
            assert torch.equal(found[row], whole_model(hidden[row : row + 1], 0, 8)[0])
        await session.aclose()


async def test_one_hop_of_two_that_is_reached_is_not_pushed_to_when_another_is_out_of_reach(autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 2, 4, 8)
        world.unreachable.add((PeerId("hop1"), PeerId("hop2")))
        session = await world.open(chain)
        assert session.relay
        assert torch.equal(await session.step(some_hidden(5)), whole_model(some_hidden(5), 0, 8))
        await session.aclose()


@relay_or_push
async def test_going_back_to_a_lower_position_gives_what_a_new_session_would(relay, autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 3, 8)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        first, other = some_hidden(10), some_hidden(10, seed=5)
        await session.step(first)
        for position in (7, 3, 0):
            mixed = torch.cat([first[:, :position], other[:, position : position + 3]], dim=1)
            found = await session.step(other[:, position : position + 3], position)
            assert torch.equal(found, whole_model(mixed, 0, 8)[:, position:])
            assert session.length == position + 3
            first = mixed
        await session.aclose()


async def test_steps_submitted_together_are_worked_on_by_all_hops_at_once(autojump_clock):
    async with swarm() as world:
        session = await world.open(world.add_chain(0, 2, 4, 8, seconds=1))
        hidden = some_hidden(6)
        expected, answers = whole_model(hidden, 0, 8), []
        began = trio.current_time()
        pending = [
            await session.submit(session.encode(hidden[:, at : at + 1]), at, 1, "all") for at in range(6)
        ]
        for one in pending:
            answers.append(session.decode(await session.collect(one)))
        assert torch.equal(torch.cat(answers, dim=1), expected)
        assert trio.current_time() - began == pytest.approx(3 + 5)  # 18 one after another
        await session.aclose()


@relay_or_push
async def test_a_session_holds_max_length_positions_and_not_one_more(relay, autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 3, 8)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain, max_length=10)
        hidden = some_hidden(11)
        await session.step(hidden[:, :9])
        assert torch.equal(await session.step(hidden[:, 9:10]), whole_model(hidden[:, :10], 0, 8)[:, 9:])
        with pytest.raises(ValueError, match="10 in all are allowed"):
            await session.step(hidden[:, 10:])
        assert torch.equal(await session.step(hidden[:, 9:10], 9), whole_model(hidden[:, :10], 0, 8)[:, 9:])
        await session.aclose()


REFUSALS: dict[str, tuple[dict[str, Any], type[Refused]]] = {
    "revision": ({"revision": "other"}, WrongRevision),
    "length": ({"max_length": 8193}, Refused),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_a_refusal_that_stands_until_the_deadline_comes_out_and_frees_the_others(what, autojump_clock):
    terms, kind = REFUSALS[what]
    async with swarm() as world:
        chain = world.add_chain(0, 3, 8)
        with pytest.raises(kind) as refused:
            await world.open(chain, **terms, give_up_seconds=5.0)
        assert type(refused.value) is kind
        assert refused.value.peer in ("hop0", "hop1")
        assert trio.current_time() == pytest.approx(5.0)


async def test_a_hop_that_computes_in_another_dtype_than_it_says_refuses_and_is_replaced(autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 3, 8)
        liar = world.nodes[PeerId("hop1")].listener
        liar.admission.spec = replace(liar.admission.spec, dtype="bfloat16")
        record = world.record
        world.record = lambda node: replace(record(node), dtype="float32")
        world.add("other", 3, 8)
        session = await world.open(chain)
        assert [hop.peer for hop in session.chain.hops] == ["hop0", "other"]
        await session.aclose()


async def test_blocks_that_a_hop_does_not_serve_are_refused_by_it_and_it_is_left_alone(autojump_clock):
    async with swarm() as world:
        world.add_chain(0, 3, 8)
        chain = Chain((Hop(PeerId("hop0"), 0, 4), Hop(PeerId("hop1"), 4, 8)), 0.0)
        session = await world.open(chain)
        assert [fault.data["peer"] for fault in session.trace.of("fault")] == ["hop0"]
        assert session.chain.hops == (Hop(PeerId("hop0"), 0, 3), Hop(PeerId("hop1"), 3, 8))
        await session.aclose()


async def test_a_full_cache_and_a_full_house_and_a_leaving_node_say_so(autojump_clock):
    async with swarm(Limits(max_sessions_per_peer=1)) as world:
        chain = world.add_chain(0, 8)
        listener = world.nodes[PeerId("hop0")].listener
        first = await world.open(chain)
        with pytest.raises(TooManyStreams) as refused:
            await world.open(chain, give_up_seconds=3.0)
        assert refused.value.retry_after_seconds == 5.0
        listener.budget.tokens = 64
        with pytest.raises(CacheFull) as full:
            await world.open(chain, client=PeerId("another"), give_up_seconds=3.0)
        assert full.value.retry_after_seconds == 2.0
        await first.aclose()
        await listener.drain()
        with pytest.raises(Draining) as draining:
            await world.open(chain, give_up_seconds=3.0)
        assert draining.value.peer == "hop0"


@pytest.mark.parametrize("dead", [0, 1, 2])
async def test_blocks_of_a_hop_that_cannot_be_dialled_are_named_and_the_others_are_freed(
    dead, autojump_clock
):
    async with swarm() as world:
        chain = world.add_chain(0, 2, 4, 8)
        await world.kill(f"hop{dead}")
        with pytest.raises(NoChain, match=f"hop{dead} cannot be reached") as none:
            await world.open(chain, give_up_seconds=5.0)
        assert none.value.missing == (tuple(world.nodes[PeerId(f"hop{dead}")].blocks),)
        assert trio.current_time() == pytest.approx(5.0)


@relay_or_push
@pytest.mark.parametrize("dead", [0, 1, 2])
@pytest.mark.parametrize("when", ["between steps", "in a step"])
async def test_a_hop_that_dies_without_a_replica_is_named_with_its_blocks_by_the_deadline(
    dead, when, relay, autojump_clock
):
    """Fault 2; the session goes on when the hop comes back."""
    async with swarm() as world:
        chain = world.add_chain(0, 2, 4, 8, seconds=1)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        hidden = some_hidden(4)
        await session.step(hidden[:, :3])
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            if when == "between steps":
                await world.kill(f"hop{dead}")
            else:
                nursery.start_soon(_later, dead + 0.5, world.kill, f"hop{dead}")
            with pytest.raises(NoChain, match=f"hop{dead}") as none:
                await session.step(hidden[:, 3:], seconds=20)
        assert none.value.missing == (tuple(world.nodes[PeerId(f"hop{dead}")].blocks),)
        assert trio.current_time() == pytest.approx(began + 20)
        world.revive(f"hop{dead}")
        assert session.length == 3
        assert torch.equal(await session.step(hidden[:, 3:]), whole_model(hidden, 0, 8)[:, 3:])
        await session.aclose()


async def test_when_the_way_between_two_hops_breaks_the_client_carries_what_goes_there(autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 2, 4, 8)
        session = await world.open(chain)
        hidden = some_hidden(5)
        await session.step(hidden[:, :3])
        world.unreachable.add((PeerId("hop1"), PeerId("hop2")))
        for stream in world.nodes[PeerId("hop2")].streams:
            if stream.peer == "hop1":
                await stream.reset()
        for at in (3, 4):
            found = await session.step(hidden[:, at : at + 1])
            assert torch.equal(found, whole_model(hidden, 0, 8)[:, at : at + 1])
        assert session.relay
        assert session.chain.hops == chain.hops
        assert [event.data for event in session.trace.of("relayed")] == [{"sender": "hop1", "peer": "hop2"}]
        assert [fault.data for fault in session.trace.of("fault")] == []
        steps = [one[:2] for one in world.nodes[PeerId("hop2")].span.steps]
        assert steps == [(0, 3), (3, 1), (4, 1)], "nothing was computed twice"
        await session.aclose()


async def _later(seconds, function, *args):
    await trio.sleep(seconds)
    await function(*args)


@relay_or_push
async def test_a_step_that_never_gets_on_ends_at_the_deadline(relay, autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 2, 8, seconds=1)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        world.nodes[PeerId("hop1")].compute.seconds = 1000
        began = trio.current_time()
        with pytest.raises(SlowPeer, match="by the caller's deadline"):
            await session.step(some_hidden(1), seconds=7)
        assert trio.current_time() == pytest.approx(began + 7)
        assert list(session.trace.of("fault")) == [], "it said that it is busy"
        await session.aclose()


@relay_or_push
@pytest.mark.parametrize("silent", [0, 1])
async def test_a_hop_that_says_nothing_is_replaced_after_its_deadline(silent, relay, autojump_clock):
    """Fault 4: a frozen server; with a replica, nobody else computes anything twice."""
    async with swarm() as world:
        chain = world.add_chain(0, 2, 8)
        for index, hop in enumerate(chain.hops):
            world.add(f"replica{index}", hop.start, hop.stop)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        hidden = some_hidden(5)
        await session.step(hidden[:, :4])
        world.freeze(f"hop{silent}")
        began = trio.current_time()
        assert torch.equal(await session.step(hidden[:, 4:]), whole_model(hidden, 0, 8)[:, 4:])
        assert trio.current_time() - began == pytest.approx(1.0, abs=0.2)
        (fault,) = session.trace.of("fault")
        assert fault.data["peer"] == f"hop{silent}"
        assert session.chain.hops[silent].peer == f"replica{silent}"
        assert sum(one[1] for one in world.nodes[PeerId(f"hop{1 - silent}")].span.steps) <= 5 + 1
        world.thaw(f"hop{silent}")
        assert torch.equal(await session.step(hidden[:, 4:], 4), whole_model(hidden, 0, 8)[:, 4:])
        await session.aclose()


async def test_a_session_left_idle_is_opened_again_where_it_was_and_nobody_is_blamed(autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 3, 8)
        routes = world.routes()
        session = await world.open(chain, routes=routes)
        hidden = some_hidden(2)
        await session.step(hidden[:, :1])
        await trio.sleep(61)
        began = trio.current_time()
        assert torch.equal(await session.step(hidden[:, 1:]), whole_model(hidden, 0, 8)[:, 1:])
        assert trio.current_time() - began < 0.1
        assert routes.blame.avoided(trio.current_time()) == frozenset()
        await session.aclose()


@relay_or_push
@pytest.mark.parametrize("culprit", [0, 1, 2])
async def test_a_hop_that_computes_nan_is_named_and_no_other(culprit, relay, autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 2, 4, 8)
        if relay:
            cut_ways(world, chain)
        session = await world.open(chain)
        world.nodes[PeerId(f"hop{culprit}")].span.poison = lambda hidden: hidden / 0
        with pytest.raises(NoChain, match="NaN"):
            await session.step(some_hidden(2) + 1, seconds=3)
        assert {fault.data["peer"] for fault in session.trace.of("fault")} == {f"hop{culprit}"}
        await session.aclose()


async def test_nan_does_not_leave_the_client(autojump_clock):
    async with swarm() as world:
        session = await world.open(world.add_chain(0, 8))
        with pytest.raises(BadResult, match="computed"):
            await session.step(some_hidden(1) * math.nan)
        assert torch.equal(await session.step(some_hidden(1)), whole_model(some_hidden(1), 0, 8))
        await session.aclose()


# A hop that lies: it takes the session and answers each step with what the test says.
LIES = {
    "NaN": (lambda step: encode_result(Result(step, 0, b"\x00\x00\xc0\x7f" * HIDDEN)), BadResult),
    "too few positions": (lambda step: encode_result(Result(step, 1, b"")), MessageError),
    "too many positions": (lambda step: encode_result(Result(step, 0, bytes(8 * HIDDEN))), MessageError),
    "half a row": (lambda step: encode_result(Result(step, 0, bytes(2 * HIDDEN))), MessageError),
    "another position": (lambda step: encode_result(Result(step, 1, bytes(4 * HIDDEN))), MessageError),
    "garbage": (lambda step: b"\x00\x01garbage", MessageError),
    "nothing": (lambda step: b"", MessageError),
    "a second opened": (lambda step: encode_opened(Opened(False)), MessageError),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_hop_that_lies_is_named(lie, autojump_clock):
    answer, kind = LIES[lie]

    class Liar:
        async def serve_session(self, stream):
            await stream.receive()
            await stream.send(encode_opened(Opened(push=False)))
            await stream.receive()
            await stream.send(answer(0))
            await trio.sleep(1)

    async with swarm() as world:
        chain = world.add_chain(0, 8)
        liar: Any = Liar()
        honest, world.nodes[PeerId("hop0")].listener = world.nodes[PeerId("hop0")].listener, liar
        liar_record = world.record
        world.record = lambda node: liar_record(replace(node, listener=honest))
        session = await world.open(chain)
        with pytest.raises((kind, NoChain)) as caught:
            await session.step(some_hidden(1), seconds=0.4)
        fault = caught.value.after if isinstance(caught.value, NoChain) else caught.value
        assert fault is None or type(fault) is kind
        names = [fault.data for fault in session.trace.of("fault")]
        assert names[0]["peer"] == "hop0"
        assert names[0]["error"].startswith(kind.__name__)
        await session.aclose()
        world.nodes[PeerId("hop0")].listener = honest


OPENING_LIES = {
    "closes": (lambda stream: stream.aclose(), RemoteProtocolError),
    "resets": (lambda stream: stream.reset(), PeerGone),
    "says garbage": (lambda stream: stream.send(b"garbage"), MessageError),
    "says nothing": (lambda stream: stream.receive(60), SlowPeer),
    "announces too much": (lambda stream: stream.send_bytes(b"\xff" * 4), FrameError),
    "answers before": (lambda stream: stream.send(encode_result(Result(0, 0, b""))), MessageError),
}


@pytest.mark.parametrize("lie", OPENING_LIES)
async def test_a_hop_that_opens_wrongly_is_named_and_the_others_are_freed(lie, autojump_clock):
    act, kind = OPENING_LIES[lie]

    class Liar:
        faults = Faults()

        async def serve_session(self, stream):
            await stream.receive()
            await act(stream)
            await trio.sleep(1)

        @property
        def pushed(self):
            return self

        def feeds(self, peer, *, gathers=False):
            return False

        async def take_push(self, frame, peer):
            raise AssertionError("nothing is pushed to it")

    async with swarm() as world:
        chain = world.add_chain(0, 3, 8)
        liar: Any = Liar()
        honest, world.nodes[PeerId("hop1")].listener = world.nodes[PeerId("hop1")].listener, liar
        real_record = world.record
        world.record = lambda node: real_record(
            replace(node, listener=honest) if node.peer == "hop1" else node
        )
        with pytest.raises(NoChain) as caught:
            await world.open(chain, give_up_seconds=14)
        assert isinstance(caught.value, NoChain)
        assert isinstance(caught.value.after, kind)
        assert caught.value.after.peer == "hop1"
        await trio.sleep(60)
        world.nodes[PeerId("hop1")].listener = honest


async def test_an_answer_to_a_step_that_nobody_waits_for_is_dropped(autojump_clock):
    async with swarm() as world:
        session = await world.open(world.add_chain(0, 8, seconds=2))
        with trio.move_on_after(1):
            await session.step(some_hidden(3))
        found = await session.step(some_hidden(2, seed=1), 0)
        assert torch.equal(found, whole_model(some_hidden(2, seed=1), 0, 8))
        await session.aclose()


async def test_everyone_who_waits_is_told_when_the_session_is_closed(autojump_clock):
    async with swarm() as world:
        session = await world.open(world.add_chain(0, 3, 8, seconds=100))
        failures = []

        async def wait(position):
            try:
                await session.collect(
                    await session.submit(session.encode(some_hidden(1)), position, 1, "all")
                )
            except PeerGone as gone:
                failures.append(str(gone))

        async with trio.open_nursery() as nursery:
            for position in range(3):
                nursery.start_soon(wait, position)
                await trio.testing.wait_all_tasks_blocked()
            session.close()
        assert failures == ["the session was closed"] * 3
        await session.aclose()


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the k-th step of one task."""

    def __init__(self, task: trio.lowlevel.Task, k: int, scope: trio.CancelScope) -> None:
        self.task, self.left, self.scope = task, k, scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            if self.left == 0:
                self.scope.cancel()
            self.left -= 1


@relay_or_push
async def test_a_client_cancelled_at_any_await_leaves_nothing_behind_and_the_next_session_works(
    relay, autojump_clock
):
    """P6, for every k: the client's task is cancelled before it runs for the k-th time."""
    async with swarm() as world:
        chain = world.add_chain(0, 3, 8, seconds=0.01)
        if relay:
            cut_ways(world, chain)
        hidden = some_hidden(6)

        async def generation(done):
            session = await world.open(chain, max_length=16)
            try:
                await session.step(hidden[:, :4])
                done.append(await session.step(hidden[:, 4:]))
            finally:
                session.close()

        for k in range(200):
            done, scope = [], trio.CancelScope()
            instrument = CancelAt(trio.lowlevel.current_task(), k, scope)
            trio.lowlevel.add_instrument(instrument)
            with scope:
                await generation(done)
            trio.lowlevel.remove_instrument(instrument)
            await trio.sleep(5)
            world.assert_idle()
            if done:
                break
        assert 5 < k < 199, "the loop has come to the end of a generation"
        assert torch.equal(done[0], whole_model(hidden, 0, 8)[:, 4:])


async def test_the_same_over_the_networks_own_framed_streams(autojump_clock):
    """What the fakes of this file stand for: real FramedStreams, over byte streams in memory."""
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        chain = world.add_chain(0, 3, 8)

        async def dial(me, to, protocol):
            ours, theirs = memory_framed_pair(protocol=protocol, peers=(me, to))
            listener = world.nodes[to].listener
            serve = (
                listener.serve_session
                if protocol == SESSION_PROTOCOL
                else partial(serve_push, listener, frames=world.frames)
            )

            async def handle():
                await serve(theirs)
                await theirs.aclose()

            nursery.start_soon(handle)
            return ours

        world.dial = dial
        session = await world.open(chain)
        assert not session.relay
        hidden = some_hidden(9)
        found = [await session.step(hidden[:, at : at + 3]) for at in range(0, 9, 3)]
        assert torch.equal(torch.cat(found, dim=1), whole_model(hidden, 0, 8))
        await session.aclose()
        await trio.sleep(1)
        assert [node.listener.session_count for node in world.nodes.values()] == [0, 0]
        assert [node.faults for node in world.nodes.values()] == [{}, {}]
        nursery.cancel_scope.cancel()


async def test_opening_goes_on_with_nothing_when_it_is_cancelled_while_a_hop_dials(autojump_clock):
    async with swarm() as world:
        chain = world.add_chain(0, 8)

        async def never(me, to, protocol):
            await trio.sleep_forever()

        world.dial = never
        with trio.move_on_after(3) as scope:
            await world.open(chain)
        assert scope.cancelled_caught
        assert world.client_streams == []
