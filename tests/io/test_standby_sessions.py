"""Sessions with warm standbys: a death costs no replay, and the tokens are the right ones in all cases."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from client.generation.conversation import Conversation
from client.session.standby import keeping
from node.serving.sessions.moving import standby
from routing.names import PeerId
from tests.fakes_serving import World, best, conversation_of, generated, swarm

BLOCKS = 9
PROMPT = [3, 1, 4, 1, 5]
SECONDS = 0.5  # of a step at each hop: a standby follows in between


def replicas(world: World, names: tuple[str, ...] = ("Aa", "Bb", "Cc"), **served: Any) -> World:
    """Nodes for each third of the model; those in capitals come first."""
    for index, peers in enumerate(names):
        for name in peers:
            world.add(name, 3 * index, 3 * index + 3, seconds=SECONDS, **served)
    return world


def with_standbys(world: World) -> Conversation:
    """A client whose sessions have standbys."""
    return conversation_of(world, standby=True)


async def later(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    await trio.sleep(seconds)
    await act()


def positions_at(world: World, peer: str) -> list[tuple[int, int]]:
    return [one[:2] for one in world.nodes[PeerId(peer)].span.steps]


@pytest.mark.parametrize("victim", "ABC")
async def test_a_standby_takes_over_with_the_positions_that_it_has(victim, autojump_clock):
    async with swarm() as world:
        replicas(world)
        conversation, tokens = with_standbys(world), list(PROMPT)
        for index in range(8):
            if index == 5:
                await trio.sleep(3)
                await world.kill(victim)
            tokens.append(await conversation.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 8, BLOCKS)
        seen = positions_at(world, victim.lower())
        assert seen[0][0] == 0
        assert [position for position, _ in seen] == sorted(position for position, _ in seen)
        replayed = [event for event in conversation.trace.events if event.kind == "replayed"]
        assert replayed == [], "the standby had everything"
        conversation.close()


@pytest.mark.parametrize(
    "victims", ["A", "a", "Aa", "B", "b", "Bb", "C", "Cc", "Ab", "aB", "ABC", "abc", "BbC"]
)
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("when", [0.0, 0.3, 0.8, 1.3])
async def test_hops_and_standbys_may_die_at_any_moment(victims, at, when, autojump_clock):
    async with swarm() as world:
        replicas(world, ("Aax", "Bby", "Ccz"))
        conversation, tokens = with_standbys(world), list(PROMPT)

        async def kill():
            for victim in victims:
                await world.kill(victim)

        async with trio.open_nursery() as nursery:
            for index in range(7):
                if index == at:
                    nursery.start_soon(later, when, kill)
                tokens.append(await conversation.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 7, BLOCKS)
        conversation.close()


@pytest.mark.parametrize("victim", "ABC")
@pytest.mark.parametrize("wait", [0.0, 0.06, 1.0])
@pytest.mark.parametrize("late", [True, False])
async def test_positions_that_were_replaced_count_no_more_at_a_standby(
    victim, wait, late, monkeypatch, autojump_clock
):
    async with swarm() as world:
        replicas(world)
        conversation, tokens = with_standbys(world), list(PROMPT)
        for _ in range(5):
            tokens.append(await conversation.logits_after(tokens, best))
        await trio.sleep(3)
        if late:  # nobody looks for what is to be sent to standbys from now on
            monkeypatch.setattr(standby, "LOOK_SECONDS", 60.0)
            monkeypatch.setattr(keeping, "FEED_SECONDS", 60.0)
            await trio.sleep(1)
        other = [*PROMPT[:3], 2, 7]  # goes back: the standby has other positions from there on
        again = [*other, await conversation.logits_after(other, best)]
        await trio.sleep(wait)
        await world.kill(victim)
        for _ in range(3):
            again.append(await conversation.logits_after(again, best))
        assert again[len(other) :] == generated(other, 4, BLOCKS)
        conversation.close()
        await trio.sleep(60)


async def test_after_a_death_another_standby_is_found(autojump_clock):
    async with swarm() as world:
        replicas(world, ("A", "Bby", "C"))
        conversation, tokens = with_standbys(world), list(PROMPT)
        for victim in ("B", "b", None):
            for _ in range(3):
                tokens.append(await conversation.logits_after(tokens, best))
            await trio.sleep(5)
            if victim is not None:
                await world.kill(victim)
        assert tokens[len(PROMPT) :] == generated(PROMPT, 9, BLOCKS)
        replayed = [event for event in conversation.trace.events if event.kind == "replayed"]
        assert replayed == []
        conversation.close()


async def test_a_standby_that_refuses_or_is_not_there_does_no_harm(autojump_clock):
    async with swarm() as world:
        replicas(world, ("Aa", "B", "Cc"))
        await world.kill("a")
        conversation, tokens = with_standbys(world), list(PROMPT)
        for _ in range(4):
            tokens.append(await conversation.logits_after(tokens, best))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 4, BLOCKS)
        conversation.close()


async def test_all_of_it_ends_with_the_session(autojump_clock):
    async with swarm() as world:
        replicas(world)
        conversation, tokens = with_standbys(world), list(PROMPT)
        for _ in range(3):
            tokens.append(await conversation.logits_after(tokens, best))
        await trio.sleep(1)
        conversation.close()
        await trio.sleep(5)
        world.assert_idle()


@pytest.mark.parametrize("after", [0.0, 0.01, 0.1, 0.2])
async def test_a_session_that_is_closed_while_standbys_are_opened_leaves_nothing(after, autojump_clock):
    async with swarm() as world:
        replicas(world)
        session = await world.open(standby=True)
        await trio.sleep(after)
        session.close()
        await trio.sleep(5)
        world.assert_idle()
