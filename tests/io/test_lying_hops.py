"""Hops that lie: about a neighbour, about their progress, about their speed.  The client finds them out."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import trio

from client.session.repair.watchdog import MAX_HOP_SECONDS
from node.serving.sessions.worker import HopWorker
from routing.chains.hops import NoChain
from routing.names import PeerId
from tensor_codec.errors import PeerFault
from tests.fakes_lies import LyingNode, Say, blames, ends, grows
from tests.fakes_serving import World, continued, conversation_of, generated, hops_of, swarm

PROMPT = [3, 1, 4, 1, 5]
BLOCKS = 6


def replicas(world: World, liar: str, say: Say, seconds: float = 0.1) -> LyingNode:
    """Two nodes for each half of the model, those in capitals chosen first; one of them lies."""
    for name in "Aa":
        world.add(name, 0, 3, seconds=seconds)
    for name in "Bb":
        world.add(name, 3, 6, seconds=seconds)
    lying = LyingNode(say)
    world.nodes[PeerId(liar)].liar = lying
    return lying


async def generation(world: World, count: int = 4, **how: Any) -> tuple[list[int], float, World, Any]:
    """So many tokens: they, the seconds that they took, and the conversation."""
    routes = world.routes()
    conversation = conversation_of(world, routes, **how)
    began = trio.current_time()
    found = await continued(conversation, PROMPT, count)
    seconds = trio.current_time() - began
    return found, seconds, world, (conversation, routes)


@pytest.mark.parametrize(
    ("liar", "say", "most_opened"),
    [
        ("A", blames("B"), 1),  # of the hop behind, which sends it nothing
        ("B", blames("A"), 1),
        ("B", blames("nobody"), 1),
        ("A", blames("B", "cannot_push"), 1),
        ("A", ends, 3),
        ("B", ends, 3),
    ],
    ids=["next", "previous", "stranger", "cannot push", "first ends", "last ends"],
)
async def test_a_hop_that_reports_what_is_not_so_is_left_and_no_call_spins(
    liar, say, most_opened, autojump_clock
):
    async with swarm() as world:
        lying = replicas(world, liar, say)
        found, seconds, _, (conversation, routes) = await generation(world)
        assert found == generated(PROMPT, 4, BLOCKS)
        assert liar.lower() in hops_of(conversation)
        assert lying.opened <= most_opened
        assert seconds < 4 * 0.3 + 3.0
        assert PeerId(liar) in routes.blame._faults
        conversation.close()


async def test_a_hop_that_reports_honest_ones_is_blamed_in_full_at_its_second_report(autojump_clock):
    """It is chosen again after its first time is over."""
    async with swarm() as world:
        lying = replicas(world, "B", blames("A"))
        _, _, _, (conversation, routes) = await generation(world, 1)
        assert routes.blame._faults == {PeerId("A"): 0.5, PeerId("B"): 0.5}
        conversation.close()
        await trio.sleep(11.0)
        world.nodes[PeerId("B")].liar = LyingNode(blames("a"))
        routes.blame.fault(PeerId("A"), trio.current_time())
        session = conversation_of(world, routes)
        assert await continued(session, PROMPT, 2) == generated(PROMPT, 2, BLOCKS)
        assert hops_of(session) == "a b"
        assert routes.blame._faults[PeerId("B")] == 1.5
        assert PeerId("a") not in routes.blame._faults
        session.close()
    assert lying.opened == 1


@pytest.mark.parametrize("say", [blames("A"), ends], ids=["reports", "ends"])
async def test_where_only_a_liar_is_left_its_sessions_are_opened_a_few_times_a_second(say, autojump_clock):
    async with swarm() as world:
        world.add("A", 0, 3)
        world.add("B", 3, 6)
        world.nodes[PeerId("B")].liar = lying = LyingNode(say)
        conversation = conversation_of(world, give_up_seconds=10.0)
        with pytest.raises((NoChain, PeerFault)):
            await continued(conversation, PROMPT, 1)
        assert trio.current_time() <= 11.0
        assert lying.opened <= 25
        conversation.close()


@pytest.mark.parametrize(
    "say", [grows(1), grows(1, waiting=0), grows(-1), grows(7)], ids=["drip", "idle", "less", "jumps"]
)
@pytest.mark.parametrize("liar", ["A", "B"])
async def test_a_hop_that_always_says_that_it_gets_on_is_left_within_seconds(liar, say, autojump_clock):
    async with swarm() as world:
        replicas(world, liar, say)
        found, seconds, _, (conversation, routes) = await generation(world, 3)
        assert found == generated(PROMPT, 3, BLOCKS)
        assert seconds <= MAX_HOP_SECONDS + 5
        assert liar.lower() in hops_of(conversation)
        assert PeerId(liar) in routes.blame.avoided(trio.current_time())
        conversation.close()


async def test_a_hop_that_says_that_it_has_passed_on_every_step_is_left_after_its_second_neighbour(
    autojump_clock,
):
    async with swarm() as world:
        replicas(world, "A", grows(1, waiting=0, done=True))
        found, seconds, _, (conversation, routes) = await generation(world, 3)
        assert found == generated(PROMPT, 3, BLOCKS)
        assert hops_of(conversation) == "a b"
        assert seconds <= 12
        assert routes.blame._faults[PeerId("A")] == 1.0
        conversation.close()


async def _without_times(worker: Any, original: Any, arrived: Any, what: Any, answer: Any) -> None:
    """The server named z passes answers on as if they had taken no time."""
    if worker.engine.span.start == 0 and worker.engine.span.stop == 6:
        arrived, answer = replace(arrived, at=trio.current_time()), replace(answer, compute_micros=0)
    await original(worker, arrived, what, answer)


@pytest.mark.parametrize("hides", [False, True], ids=["says its times", "hides its times"])
async def test_a_server_that_claims_to_be_quicker_than_it_is_is_left_after_a_few_steps(
    hides, autojump_clock, monkeypatch
):
    if hides:
        monkeypatch.setattr(HopWorker, "_pass_on", partialmethod(_without_times, HopWorker._pass_on))
    async with swarm() as world:
        for name, start in (("a", 0), ("b", 3)):
            world.add(name, start, start + 3, seconds=0.05)
        world.add("z", 0, 6, seconds=2.0)
        honest = world.record

        def claims(node: Any) -> Any:
            record = honest(node)
            return record if node.peer != "z" else replace(record, seconds_per_block=1e-7)

        world.record = claims
        conversation = conversation_of(world)
        tokens = list(PROMPT)
        chains = []
        for _ in range(12):
            tokens += await continued(conversation, tokens, 1)
            chains.append(hops_of(conversation))
        assert tokens[len(PROMPT) :] == generated(PROMPT, 12, BLOCKS)
        assert chains[0] == "z", "it gets the first steps"
        assert chains.index("a b") <= 6
        conversation.close()
