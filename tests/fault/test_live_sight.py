"""A page's sight of real processes: a fault before the next token, silence, and a server that joins.

The client runs under asyncio, as a gateway's does.  The times are those that a page promises; the waits are
generous, and the order of events is what is asserted first.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import client
from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from client.gateway.monitor import Monitor, RequestWatch
from routing.chains.alternatives import Constraints
from routing.names import PeerId
from tests.forked import Forked

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
GENEROUS_SECONDS = 60.0
SILENT_SECONDS = 20.0  # from kill -9 until a page shows it: two seconds, and many on a busy machine
# Of a server that stands still, from its last answer on: 5 s as `node.network.directory.pings` has it, and as
# many for a machine with other work, on which the process that asks has to wait too.
STANDING_SECONDS = 10.0
TOKENS = 24
KILLED_AT = 8


@pytest.fixture
def servers(tiny_llama: Path) -> Iterator[LocalSwarm]:
    """Three hops, and a spare for the one in the middle."""
    with local_swarm([str(tiny_llama), *FLAGS], environment={"OMP_NUM_THREADS": "1"}, spawn=Forked) as swarm:
        swarm.start_spans([(0, 2), (2, 4), (4, 6), (2, 4)])
        yield swarm


def node_of(servers: LocalSwarm, peer: str) -> NodeProcess:
    return next(node for node in servers.nodes if node.facts["peer_id"] == peer)


class Page:
    """What a listener to /api/events has read, and when."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        listener = monitor.feed.listen()
        assert listener is not None
        self._listener = listener
        self.events: list[tuple[float, str, dict[str, Any]]] = []

    async def read(self) -> None:
        while True:
            while (entry := self._listener.take(time.monotonic())) is not None:
                data = json.loads(entry.frame.decode().split("data: ", 1)[1])
                self.events.append((time.monotonic(), entry.kind, data))
            await self._monitor.news()

    async def until(self, found: Callable[[str, dict[str, Any]], bool]) -> tuple[float, dict[str, Any]]:
        async with asyncio.timeout(GENEROUS_SECONDS):
            while True:
                for at, kind, data in self.events:
                    if found(kind, data):
                        return at, data
                await asyncio.sleep(0.01)


async def hear(swarm: Any, heard: list[tuple[str, str]]) -> None:
    async with aclosing(swarm.events()) as events:
        async for event in events:
            heard.append((event.kind, event.what))


def whats(page: Page) -> list[str]:
    return [data["what"] for _, kind, data in page.events if kind == "session"]


async def generate(swarm: Any, watch: RequestWatch, page: Page, killed: Callable[[str], None]) -> list[int]:
    """The tokens; the second hop of the route is killed in the midst of them."""
    tokens: list[int] = []
    with watch:
        watch.began()
        generated = swarm.generate("the sea", max_new_tokens=TOKENS, do_sample=False, trace=watch.trace())
        async with aclosing(generated) as items:
            async for token in items:
                facts = watch.token()
                tokens.append(token.id)
                if len(tokens) == KILLED_AT:
                    (session,) = await swarm.sessions()
                    assert [hop.peer for hop in session.hops] == [hop[0] for hop in facts["hops"]]
                    assert session.state == "sound"
                    killed(facts["hops"][1][0])
                if "fault" in [event["kind"] for event in facts["events"]]:
                    await asyncio.sleep(0)  # what was published before has been read now
                    page.events.append((time.monotonic(), "token", {}))
                await asyncio.sleep(0.02)  # so that tokens do not run ahead
    return tokens


def test_a_page_sees_a_fault_before_the_next_token_the_silent_server_and_the_new_one(
    servers: LocalSwarm, tiny_llama: Path
) -> None:
    victims: list[tuple[str, float]] = []

    def killed(peer: str) -> None:
        victims.append((peer, time.monotonic()))
        node_of(servers, peer).kill()

    async def main() -> None:
        async with client.connect(str(tiny_llama), peers=servers.peers, monitor=True, threads=1) as swarm:
            generated = swarm.generate("the sea", max_new_tokens=TOKENS, do_sample=False)
            expected = [token.id async for token in generated]
            monitor = Monitor(swarm)
            async with monitor.running():
                page = Page(monitor)
                heard: list[tuple[str, str]] = []
                reading = [asyncio.create_task(each) for each in (page.read(), hear(swarm, heard))]
                try:
                    watch = monitor.request("chatcmpl-1", "chat", "tiny", TOKENS)
                    assert await generate(swarm, watch, page, killed) == expected
                    check_order(page)
                    await check_silence(monitor, page, *victims[0])
                    assert not await swarm.answers(victims[0][0])
                    liveness = await swarm.liveness()
                    assert liveness[PeerId(victims[0][0])].answers == "silent"
                    assert (await swarm.rtts()).keys() == liveness.keys() - {victims[0][0]}
                    assert await swarm.sessions() == []
                    await check_newcomer(servers, page)
                    of_session = [what for kind, what in heard if kind == "session"]
                    assert of_session[0] == "opened"
                    assert of_session.index("fault") < of_session.index("recovered")
                    assert of_session[-1] == "ended"
                    assert [what for kind, what in heard if kind == "peer"] == ["silent", "joined"]
                finally:
                    for task in reading:
                        task.cancel()
                    await asyncio.gather(*reading, return_exceptions=True)

    asyncio.run(main())


def check_order(page: Page) -> None:
    told = whats(page)
    assert told.index("fault") < told.index("rerouted") < told.index("recovered")
    kinds = [data.get("what", kind) for _, kind, data in page.events]
    assert kinds.index("fault") < kinds.index("token")


async def check_silence(monitor: Monitor, page: Page, victim: str, at: float) -> None:
    seen, silent = await page.until(lambda kind, data: kind == "peer" and data["what"] == "silent")
    assert silent["peer"] == victim
    assert seen - at < SILENT_SECONDS
    found = await monitor.description(0.0)
    peer = next(each for each in found["peers"] if each["peer"] == victim)
    assert (peer["state"], peer["answers"]) == ("unreachable", "silent")
    assert found["models"][0]["unreachable"] == [victim]
    assert found["models"][0]["complete"]


async def check_newcomer(servers: LocalSwarm, page: Page) -> None:
    newcomer = servers.start("--blocks", "2:4", peers=servers.peers)
    _, joined = await page.until(lambda kind, data: kind == "peer" and data["what"] == "joined")
    await asyncio.to_thread(newcomer.wait_online)
    assert joined["peer"] == newcomer.facts["peer_id"]
    assert joined["blocks"] == [2, 4]


def test_a_server_that_stands_still_is_silent_though_its_connection_lasts_and_answers_again_when_it_goes_on(
    servers: LocalSwarm, tiny_llama: Path
) -> None:
    async def main() -> None:
        async with client.connect(str(tiny_llama), peers=servers.peers, monitor=True, threads=1) as swarm:
            monitor = Monitor(swarm)
            async with monitor.running():
                page = Page(monitor)
                reading = asyncio.create_task(page.read())
                try:
                    await all_answer(swarm)
                    expected = await generated(swarm)
                    for _ in range(2):  # it may happen again
                        page.events.clear()
                        await check_still(servers, swarm, page, expected)
                finally:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(main())


async def all_answer(swarm: Any) -> None:
    async with asyncio.timeout(GENEROUS_SECONDS):
        while True:
            if {each.answers for each in (await swarm.liveness()).values()} == {"yes"}:
                return
            await asyncio.sleep(0.05)


async def generated(swarm: Any) -> tuple[list[int], list[str]]:
    """The tokens of a text, and the peers of its chain."""
    conversation = swarm.conversation(64)
    tokens = [
        token.id
        async for token in swarm.generate(
            "the sea", max_new_tokens=4, do_sample=False, conversation=conversation
        )
    ]
    peers = route_of(conversation)
    conversation.close()
    return tokens, peers


def route_of(conversation: Any) -> list[str]:
    """The peers of the chain that its session was opened along."""
    opened = next(event for event in conversation.trace.events if event.kind == "opened")
    return [hop["peer"] for hop in opened.data["hops"]]


async def check_still(
    servers: LocalSwarm, swarm: Any, page: Page, expected: tuple[list[int], list[str]]
) -> None:
    """Stop the middle of the chain, which has a copy, and let it go on."""
    victim = expected[1][1]
    node = node_of(servers, victim)
    node.freeze()
    try:
        await page.until(lambda kind, data: kind == "peer" and data["what"] == "silent")
        found = (await swarm.liveness())[PeerId(victim)]
        assert found.answers == "silent"
        assert found.silent_seconds is not None
        assert found.silent_seconds < STANDING_SECONDS
        assert node.process.poll() is None  # it has neither ended nor closed its connections
        await page.until(lambda kind, data: kind == "swarm" and state_of(data, victim) == "unreachable")
        tokens, peers = await generated(swarm)  # along its copy
        assert (tokens, victim in peers) == (expected[0], False)
    finally:
        node.thaw()
    await page.until(lambda kind, data: kind == "peer" and data["what"] == "back")
    await page.until(lambda kind, data: kind == "swarm" and state_of(data, victim) == "online")
    assert (await swarm.liveness())[PeerId(victim)].answers == "yes"
    told = [(data["what"], data["peer"]) for _, kind, data in page.events if kind == "peer"]
    assert told == [("silent", victim), ("back", victim)]  # it never left, and nobody else was silent
    alone = Constraints(blocked=frozenset({copy_of(servers, victim)}))
    conversation = swarm.conversation(64, constraints=alone)
    again = swarm.generate("the sea", max_new_tokens=4, do_sample=False, conversation=conversation)
    assert [token.id async for token in again] == expected[0]
    assert victim in route_of(conversation)
    conversation.close()


def state_of(described: dict[str, Any], peer: str) -> str:
    return next(each["state"] for each in described["peers"] if each["peer"] == peer)


def copy_of(servers: LocalSwarm, peer: str) -> PeerId:
    """The other server of the blocks in the middle."""
    middle = [servers.nodes[place].facts["peer_id"] for place in (1, 3)]
    return PeerId(next(each for each in middle if each != peer))
