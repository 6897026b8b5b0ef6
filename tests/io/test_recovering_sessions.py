"""Sessions that outlive their hops: the right tokens, no work done twice, and nothing left behind."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import torch
import trio
import trio.testing

from client.session.inputs import PREFILL_TOKENS
from client.session.route import CHOICES
from routing.chains.alternatives import Constraints
from routing.chains.hops import NoChain
from routing.names import PeerId
from tensor_codec.limits import Limits
from tests.fakes_serving import (
    World,
    best,
    continued,
    conversation_of,
    generated,
    hops_of,
    some_hidden,
    swarm,
    whole_model,
)

BLOCKS = 9
PROMPT = [3, 1, 4, 1, 5]


def replicas(world: World, seconds: float = 0.0, **served: Any) -> World:
    """Two nodes for each third of the model; those in capitals come first."""
    for names, start in (("Aa", 0), ("Bb", 3), ("Cc", 6)):
        for name in names:
            world.add(name, start, start + 3, seconds=seconds, **served)
    return world


async def later(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    await trio.sleep(seconds)
    await act()


def steps_of(world: World, peer: str) -> list[tuple[int, int]]:
    return [one[:2] for one in world.nodes[PeerId(peer)].span.steps]


@pytest.mark.parametrize("victims", ["A", "B", "C", "AB", "BC", "AC", "ABC"])
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("when", [0.0, 0.5, 1.5, 2.5])
async def test_any_set_of_hops_may_die_at_any_moment(victims, at, when, autojump_clock):
    async with swarm() as world:
        routes = replicas(world, seconds=1).routes()
        conversation, tokens = conversation_of(world, routes), list(PROMPT)

        async def kill():
            for victim in victims:
                await world.kill(victim)

        async with trio.open_nursery() as nursery:
            for index in range(5):
                if index == at:
                    nursery.start_soon(later, when, kill)
                tokens.append(await conversation.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 5, BLOCKS)
        assert routes.blame.avoided(trio.current_time()) <= {PeerId(victim) for victim in victims}
        for survivor in set("ABC") - set(victims):
            positions = [position for position, _ in steps_of(world, survivor)]
            assert len(positions) <= 5 + 1, "its cache stayed, and at most one step was computed again"
        conversation.close()


@pytest.mark.parametrize("victims", ["A", "B", "C", "AC", "BC", "ABC"])
@pytest.mark.parametrize("when", [0.5, 2.5, 4.5, 6.5])
async def test_hops_may_die_in_the_middle_of_a_long_prompt(victims, when, autojump_clock):
    async with swarm() as world:
        replicas(world, seconds=1)
        prompt = [index % 26 for index in range(3 * PREFILL_TOKENS)]
        conversation = conversation_of(world, max_length=1000)

        async def kill():
            for victim in victims:
                await world.kill(victim)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, when, kill)
            assert await continued(conversation, prompt, 3) == generated(prompt, 3, BLOCKS)
        conversation.close()


async def test_a_hop_dies_while_the_one_that_replaces_another_is_being_filled(autojump_clock):
    async with swarm() as world:
        replicas(world, seconds=1)
        world.add("bb", 3, 6, seconds=1)
        conversation = conversation_of(world, max_length=1000)
        prompt = [index % 26 for index in range(600)]
        found = await continued(conversation, prompt, 2)
        await world.kill("B")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 1.5, lambda: world.kill("b"))
            nursery.start_soon(later, 2.0, lambda: world.kill("A"))
            found += await continued(conversation, prompt + found, 2)
        assert found == generated(prompt, 4, BLOCKS)
        assert hops_of(conversation) == "a bb C"
        conversation.close()


async def test_the_hop_before_replays_and_neither_client_nor_others_do_anything_twice(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world))
        found = await continued(conversation, PROMPT, 4)
        await world.kill("B")
        await trio.testing.wait_all_tasks_blocked()  # the client has seen it before it sends another step
        found += await continued(conversation, PROMPT + found, 4)
        assert found == generated(PROMPT, 8, BLOCKS)
        assert hops_of(conversation) == "A b C"
        embedded = cast(Any, conversation.local_model).embedded
        assert embedded == [5] + [1] * 7, "the client embedded nothing again"
        assert steps_of(world, "A") == steps_of(world, "C") == [(0, 5), *((at, 1) for at in range(5, 12))]
        (replay,) = conversation.trace.of("replayed")
        assert (replay.data["sender"], replay.data["peer"]) == ("A", "b")
        assert sum(tokens for _, tokens in steps_of(world, "b")) == 12
        conversation.close()


async def test_a_server_that_comes_back_empty_with_its_identity_is_used_again(autojump_clock):
    """Faults 8 and 33."""
    async with swarm() as world:
        for name, start in (("A", 0), ("B", 3), ("C", 6)):
            world.add(name, start, start + 3)
        conversation = conversation_of(world)
        found = await continued(conversation, PROMPT, 3)
        await world.kill("B")
        async with trio.open_nursery() as nursery:

            async def revive():
                world.revive("B")

            nursery.start_soon(later, 5.0, revive)
            found += await continued(conversation, PROMPT + found, 3)
        assert found == generated(PROMPT, 6, BLOCKS)
        assert 5.0 <= trio.current_time() < 6.5
        assert steps_of(world, "A") == [(0, 5), *((at, 1) for at in range(5, 10))]
        conversation.close()


@pytest.mark.parametrize("leaver", ["A", "B", "C"])
async def test_a_server_that_leaves_is_left_between_two_tokens(leaver, autojump_clock):
    """Fault 32."""
    async with swarm() as world:
        routes = replicas(world, seconds=1).routes()
        conversation, tokens = conversation_of(world, routes), list(PROMPT)
        async with trio.open_nursery() as nursery:
            for index in range(6):
                if index == 2:
                    nursery.start_soon(later, 1.2, world.nodes[PeerId(leaver)].listener.drain)
                tokens.append(await conversation.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 6, BLOCKS)
        assert list(conversation.trace.of("fault")) == []
        (moved,) = conversation.trace.of("rerouted")
        assert moved.data["why"] == "draining"
        assert moved.data["opened"] == [leaver.lower()]
        assert routes.blame.avoided(trio.current_time()) == frozenset()
        conversation.close()


async def test_the_last_server_of_its_blocks_serves_until_it_is_gone(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 6, seconds=1)
        world.add("B", 6, 9, seconds=1)
        conversation, tokens = conversation_of(world), list(PROMPT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 2.5, world.nodes[PeerId("B")].listener.drain)
            for _ in range(4):
                tokens.append(await conversation.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 4, BLOCKS)
        conversation.close()


@pytest.mark.parametrize("times", [10, 100])
async def test_a_server_that_has_become_slow_is_left_within_three_steps(times, autojump_clock):
    """Fault 5."""
    async with swarm() as world:
        conversation = conversation_of(replicas(world, seconds=0.01))
        found = await continued(conversation, PROMPT, 8)
        world.nodes[PeerId("B")].compute.seconds *= times
        found += await continued(conversation, PROMPT + found, 4)
        assert found == generated(PROMPT, 12, BLOCKS)
        assert hops_of(conversation) == "A b C"
        assert len([position for position, _ in steps_of(world, "B") if position >= 12]) <= 3
        assert [event.data["why"] for event in conversation.trace.of("rerouted")] == ["slow"]
        assert list(conversation.trace.of("fault")) == []
        conversation.close()


async def test_a_swarm_that_is_as_slow_everywhere_is_not_wandered_about_in(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world, seconds=0.01))
        found = await continued(conversation, PROMPT, 8)
        for node in world.nodes.values():
            node.compute.seconds = 0.1
        assert found + await continued(conversation, PROMPT + found, 8) == generated(PROMPT, 16, BLOCKS)
        assert conversation.recoveries == 0
        conversation.close()


async def test_a_journal_that_was_too_small_only_costs_a_longer_replay(autojump_clock):
    async with swarm() as world:
        replicas(world)
        for name in "ABC":
            world.nodes[PeerId(name)].listener.journals.tokens = 80
        conversation = conversation_of(world, max_length=300)
        prompt = [index % 26 for index in range(200)]
        found = await continued(conversation, prompt, 2)
        await world.kill("C")
        found += await continued(conversation, prompt + found, 2)
        assert found == generated(prompt, 4, BLOCKS)
        senders = {event.data["sender"] for event in conversation.trace.of("replayed")}
        assert "client" in senders, "what B had dropped it computed again, and so did A for it"
        conversation.close()


@pytest.mark.parametrize("victim", ["A", "B", "C"])
async def test_a_model_that_cannot_go_back_recovers_and_goes_back_all_the_same(victim, autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world, can_cut=False))
        found = await continued(conversation, PROMPT, 3)
        await world.kill(victim)
        found += await continued(conversation, PROMPT + found, 3)
        assert found == generated(PROMPT, 6, BLOCKS)
        other = [*PROMPT, *found[:2], 7]
        assert await continued(conversation, other, 2) == generated(other, 2, BLOCKS)
        conversation.close()


@pytest.mark.parametrize("apart", [[("A", "B")], [("B", "C")], [("A", "B"), ("B", "C")]])
async def test_hops_that_cannot_reach_each_other_recover_through_the_client(apart, autojump_clock):
    async with swarm() as world:
        replicas(world)
        for one, two in apart:
            for name in (one, one.lower()):
                for other in (two, two.lower()):
                    world.unreachable.add((PeerId(name), PeerId(other)))
        conversation = conversation_of(world, max_length=400)
        prompt = [index % 26 for index in range(300)]
        found = await continued(conversation, prompt, 3)
        assert conversation.session is not None
        assert conversation.session.relay
        for victim in "BAC":
            await world.kill(victim)
            found += await continued(conversation, prompt + found, 2)
        assert found == generated(prompt, 9, BLOCKS)
        conversation.close()


async def test_a_hop_without_room_for_another_page_is_replaced_and_nothing_is_lost(autojump_clock):
    async with swarm() as world:
        routes = replicas(world).routes()
        budget = world.nodes[PeerId("B")].budget
        conversation = conversation_of(world, routes)
        found = await continued(conversation, PROMPT, 2)
        budget.tokens = 16  # of which the session holds a page
        found += await continued(conversation, PROMPT + found, 14)
        assert found == generated(PROMPT, 16, BLOCKS)
        assert hops_of(conversation) == "A b C"
        assert routes.blame._faults == {}
        conversation.close()
        await trio.sleep(1)
        budget.tokens = 10**6


async def test_a_hop_without_room_and_without_a_replica_is_waited_for(autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 9)
        budget = world.nodes[PeerId("A")].budget
        conversation = conversation_of(world)
        found = await continued(conversation, PROMPT, 2)
        budget.tokens = 16
        async with trio.open_nursery() as nursery:

            async def more():
                budget.tokens = 10**6

            nursery.start_soon(later, 9.0, more)
            found += await continued(conversation, PROMPT + found, 14)
        assert found == generated(PROMPT, 16, BLOCKS)
        assert 9.0 <= trio.current_time() < 15.0
        assert len(steps_of(world, "A")) == 16, "nothing was computed twice"
        conversation.close()


async def test_a_late_answer_of_a_hop_that_was_frozen_is_not_applied(autojump_clock):
    """Fault 4."""
    async with swarm(Limits(session_idle_seconds=300.0)) as world:
        conversation = conversation_of(replicas(world))
        found = await continued(conversation, PROMPT, 3)
        world.freeze("B")
        found += await continued(conversation, PROMPT + found, 3)
        assert hops_of(conversation) == "A b C"
        world.thaw("B")
        await trio.sleep(1)
        found += await continued(conversation, PROMPT + found, 3)
        assert found == generated(PROMPT, 9, BLOCKS)
        assert steps_of(world, "C") == [(0, 5), *((at, 1) for at in range(5, 13))]
        assert world.nodes[PeerId("C")].faults == {}
        conversation.close()


async def test_all_hops_frozen_at_once_are_all_replaced(autojump_clock):
    async with swarm() as world:
        conversation = conversation_of(replicas(world))
        found = await continued(conversation, PROMPT, 2)
        for name in "ABC":
            world.freeze(name)
        found += await continued(conversation, PROMPT + found, 2)
        assert found == generated(PROMPT, 4, BLOCKS)
        assert trio.current_time() < 2.0
        for name in "ABC":
            world.thaw(name)
        conversation.close()


async def test_rows_of_a_batch_are_replayed_each_in_its_place(autojump_clock):
    async with swarm() as world:
        session = await replicas(world).open(batch=3)
        hidden = some_hidden(9, batch=3)
        expected = whole_model(hidden[:1], 0, BLOCKS)
        await session.step(hidden[:, :5])
        await session.step(hidden[:, 5:6])
        for victim in "ABC":
            await world.kill(victim)
        found = await session.step(hidden[:, 6:])
        for row in range(3):
            expected = whole_model(hidden[row : row + 1], 0, BLOCKS)[0, 6:]
            assert torch.equal(found[row], expected)
        await session.aclose()


async def test_the_trace_tells_what_happened_in_order(autojump_clock, tmp_path):
    async with swarm() as world:
        conversation = conversation_of(replicas(world))
        found = await continued(conversation, PROMPT, 2)
        await world.kill("B")
        await continued(conversation, PROMPT + found, 2)
        conversation.close()
        kinds = [event.kind for event in conversation.trace.events]
        assert kinds == [
            *("opened", "step", "step", "fault", "rerouted", "replayed", "recovered", "step", "step", "ended")
        ]
        conversation.trace.write(tmp_path / "trace")
        lines = (tmp_path / "trace").read_text().splitlines()
        assert len(lines) == len(kinds)


# Constraints


async def test_a_repair_never_uses_a_blocked_peer_not_even_in_desperation(autojump_clock):
    async with swarm() as world:
        replicas(world, seconds=1)
        routes = world.routes(constraints=Constraints(blocked={PeerId("b")}))
        conversation = conversation_of(world, routes, give_up_seconds=20)
        found = await continued(conversation, PROMPT, 2)
        await world.kill("B")
        with pytest.raises(
            NoChain, match=r"blocks 3:6 .*; constraints leave out 1 peer that serves some"
        ) as none:
            await continued(conversation, PROMPT + found, 1)
        assert none.value.constrained == 1
        assert PeerId("b") not in {peer for _, peer in world.dialled}
        world.revive("B")
        found += await continued(conversation, PROMPT + found, 2)
        assert found == generated(PROMPT, 4, BLOCKS)
        assert hops_of(conversation) == "A B C"
        conversation.close()


async def test_all_choices_keep_to_the_allowed_peers(autojump_clock):
    async with swarm() as world:
        replicas(world)
        allowed = {PeerId(name) for name in "aBbc"}
        routes = world.routes(constraints=Constraints(allowed=allowed))
        conversation = conversation_of(world, routes)
        found = await continued(conversation, PROMPT, 2)
        assert hops_of(conversation) == "a B c"
        await world.kill("B")
        found += await continued(conversation, PROMPT + found, 2)
        assert hops_of(conversation) == "a b c"
        assert found == generated(PROMPT, 4, BLOCKS)
        many = routes.choose_for_throughput(0, BLOCKS, positions=64, waiting={})
        assert {hop.peer for hop in many.hops} <= allowed
        conversation.close()


async def test_a_repair_makes_no_chain_longer_than_allowed(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 3), ("B", 3, 9), ("c", 3, 6), ("d", 6, 9), ("e", 0, 9)):
            world.add(name, start, stop, seconds=3 if name == "e" else 0)
        conversation = conversation_of(world, world.routes(constraints=Constraints(most_hops=2)))
        found = await continued(conversation, PROMPT, 2)
        assert hops_of(conversation) == "A B"
        await world.kill("B")
        found += await continued(conversation, PROMPT + found, 2)
        assert hops_of(conversation) == "A e", "it is slow, but c and d would make three"
        assert found == generated(PROMPT, 4, BLOCKS)
        conversation.close()


async def test_where_every_repair_would_be_too_long_another_chain_is_taken(autojump_clock):
    async with swarm() as world:
        for name, start, stop in (("A", 0, 3), ("B", 3, 9), ("c", 3, 6), ("d", 6, 9), ("e", 0, 6)):
            world.add(name, start, stop)
        conversation = conversation_of(world, world.routes(constraints=Constraints(most_hops=2)))
        found = await continued(conversation, PROMPT, 2)
        assert hops_of(conversation) == "A B"
        await world.kill("B")
        found += await continued(conversation, PROMPT + found, 2)
        assert hops_of(conversation) == "e d"
        assert found == generated(PROMPT, 4, BLOCKS)
        conversation.close()


async def test_no_chain_says_that_it_would_be_too_long(autojump_clock):
    async with swarm() as world:
        replicas(world)
        with pytest.raises(NoChain, match="blocks 0:9 of 9 take more than 2 hops"):
            world.routes(constraints=Constraints(most_hops=2)).choose()


def is_busy(world: World, *names: str, queue: float = 9.0) -> None:
    """These nodes' steps wait so long now, which nobody else has heard of yet."""
    for name in names:
        now, waits = time.perf_counter(), world.nodes[PeerId(name)].listener.engine.waits
        waits.observe(waited=1000 * queue, computed=1000.0, steps=1000, now=now)


async def test_a_new_session_chooses_again_where_hops_are_busier_than_was_known(autojump_clock):
    async with swarm() as world:
        routes = replicas(world, seconds=0.01).routes()
        is_busy(world, "A", "C")
        conversation = conversation_of(world, routes)
        assert await continued(conversation, PROMPT, 4) == generated(PROMPT, 4, BLOCKS)
        assert hops_of(conversation) == "a B c"
        assert not steps_of(world, "A")
        assert not steps_of(world, "C")
        assert conversation.recoveries == 0
        assert not routes.blame.avoided(trio.current_time())
        conversation.close()


async def test_where_everybody_is_busy_a_session_does_not_look_for_ever(autojump_clock):
    async with swarm() as world:
        routes = replicas(world, seconds=0.01).routes()
        for name in "xyz":
            world.add(f"A{name}", 0, 3, seconds=0.01)
        for queue, name in enumerate(("A", "Ax", "Ay", "Az", "a"), 5):
            is_busy(world, name, queue=20.0 - queue)
        conversation = conversation_of(world, routes)
        assert await continued(conversation, PROMPT, 4) == generated(PROMPT, 4, BLOCKS)
        assert len({peer for _, peer in world.dialled if peer.startswith(("A", "a"))}) == CHOICES
        conversation.close()


async def test_a_queue_that_was_known_makes_no_session_choose_again(autojump_clock):
    async with swarm() as world:
        routes = replicas(world, seconds=0.01).routes()
        is_busy(world, *"AaBbCc")
        for name in "AaBbCc":
            assert routes.report_queue(PeerId(name), 9.0)
            assert not routes.report_queue(PeerId(name), 9.5)
        conversation = conversation_of(world, routes)
        assert await continued(conversation, PROMPT, 2) == generated(PROMPT, 2, BLOCKS)
        assert len(world.client_streams) == 3
        conversation.close()
