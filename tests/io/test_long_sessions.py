"""A session of more than thirty thousand tokens, through the real client and the real doors of servers."""

from __future__ import annotations

import pytest
import trio

from client.session.session import LONG_PART
from routing.chains.hops import NoChain
from routing.names import PeerId
from tensor_codec.errors import CacheFull, SlowPeer
from tensor_codec.limits import Limits
from tests.fakes_serving import HIDDEN, World, continued, conversation_of, generated, hops_of, swarm

LENGTH = 33_000
PROMPT = [index * index % 26 for index in range(LENGTH - 232)]
TOKENS = 40_000  # of a server's cache
BLOCKS = 6


def servers(world: World, *names: str, seconds: float = 0.0) -> World:
    """Of the first half of the blocks those in capitals, of the second half the others."""
    for name in names:
        start = 0 if name.isupper() else 3
        world.add(name, start, start + 3, seconds=seconds, tokens=TOKENS, max_position=TOKENS)
    return world


async def test_thirty_two_thousand_tokens_go_through_and_what_they_take_is_counted(autojump_clock):
    async with swarm() as world:
        servers(world, "A", "a")
        conversation = conversation_of(world, max_length=LENGTH)
        assert await continued(conversation, PROMPT, 3) == generated(PROMPT, 3, BLOCKS)
        used = len(PROMPT) + 2
        for node in world.nodes.values():
            assert node.budget.tokens - node.budget.free_tokens == -(-used // 16) * 16
        # The first hop keeps what it sent on, the client what it sent: every position once, and no more.
        assert world.nodes[PeerId("A")].listener.journals.held == used
        assert conversation.session is not None
        journal = conversation.session._journal
        assert (journal.tokens, journal.row_bytes) == (used, 4 * HIDDEN)
        conversation.close()


async def test_a_server_that_dies_in_a_long_session_is_replaced_and_filled_again(autojump_clock):
    async with swarm() as world:
        servers(world, "A", "a", "b")
        conversation = conversation_of(world, max_length=LENGTH)
        found = await continued(conversation, PROMPT, 2)
        died = hops_of(conversation).split()[1]
        await world.kill(died)
        found += await continued(conversation, PROMPT + found, 2)
        assert found == generated(PROMPT, 4, BLOCKS)
        assert hops_of(conversation) == f"A {'b' if died == 'a' else 'a'}"
        assert conversation.recoveries == 1
        conversation.close()


async def test_a_long_prompt_that_gets_on_has_more_time_than_one_token(autojump_clock):
    async with swarm() as world:
        servers(world, "A", "a", seconds=1.0)
        conversation = conversation_of(world, max_length=LENGTH, give_up_seconds=20.0)
        prompt = PROMPT[: 10 * LONG_PART]
        began = trio.current_time()
        assert await continued(conversation, prompt, 1) == generated(prompt, 1, BLOCKS)
        assert trio.current_time() - began > 20.0
        conversation.close()


async def test_a_replay_that_gets_on_has_more_time_than_one_token(autojump_clock):
    async with swarm() as world:
        servers(world, "A", "a", "b", seconds=1.0)
        conversation = conversation_of(world, max_length=LENGTH, give_up_seconds=20.0)
        prompt = PROMPT[: 10 * LONG_PART]
        found = await continued(conversation, prompt, 1)
        await world.kill(hops_of(conversation).split()[1])
        began = trio.current_time()
        found += await continued(conversation, prompt + found, 1)
        assert found == generated(prompt, 2, BLOCKS)
        assert trio.current_time() - began > 20.0
        conversation.close()


async def test_a_long_session_that_does_not_get_on_is_given_up_as_soon_as_a_short_one(autojump_clock):
    async with swarm() as world:
        servers(world, "A", "a")
        conversation = conversation_of(world, max_length=LENGTH, give_up_seconds=20.0)
        found = await continued(conversation, PROMPT[: 10 * LONG_PART], 1)
        await world.kill("a")
        began = trio.current_time()
        with pytest.raises((NoChain, SlowPeer)):
            await continued(conversation, PROMPT[: 10 * LONG_PART] + found, 1)
        assert trio.current_time() - began <= 21.0
        conversation.close()


async def test_a_session_longer_than_what_servers_take_is_told_what_they_do(autojump_clock):
    async with swarm(Limits(max_session_tokens=LENGTH - 20)) as world:
        servers(world, "A", "a")
        conversation = conversation_of(world, max_length=LENGTH, give_up_seconds=5.0)
        with pytest.raises(
            (NoChain, CacheFull), match=rf"{LENGTH} tokens was asked for, .* take 32992 at most"
        ):
            await continued(conversation, PROMPT, 1)
