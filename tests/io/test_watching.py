"""A client that watches its swarm: its sessions, the pings, and the listeners to events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from client.monitor.events import MAX_BEHIND, MAX_LISTENERS, Backlog, SwarmEvent
from client.monitor.watching import WATCH_AGAIN_SECONDS, Watching
from client.session.trace import Trace
from routing.names import PeerId
from routing.view.answers import UNKNOWN, Liveness
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tests.fakes_serving import World, best, conversation_of, swarm

PROMPT = [1, 2, 3]


@dataclass
class FakePings:
    """Notes what it is asked for."""

    asked: list[PeerId] = field(default_factory=list)
    monitored: list[float] = field(default_factory=list)
    routes: Callable[[], Iterable[PeerId]] = tuple

    def monitor(self, seconds: float, routes: Callable[[], Iterable[PeerId]]) -> None:
        self.monitored.append(seconds)
        self.routes = routes

    def liveness(self, peers: Iterable[PeerId]) -> dict[PeerId, Liveness]:
        return dict.fromkeys(peers, UNKNOWN)

    def ask(self, peer: PeerId) -> None:
        self.asked.append(peer)


class FakeDirectory:
    """A view that a test replaces."""

    def __init__(self) -> None:
        self.pings = FakePings()
        self.seen = SwarmView("public")
        self._news = trio.Event()

    def view(self) -> SwarmView:
        return self.seen

    async def changed(self, since: SwarmView | None = None) -> None:
        while self.seen is since:
            await self._news.wait()

    def show(self, *names: str, silent: str = "") -> None:
        records = [
            Record(peer=PeerId(name), role="serve", revision="r", blocks=3, start=0, stop=3) for name in names
        ]
        entries = {each.peer: Entry(each, b"", 0.0) for each in records}
        self.seen = SwarmView("public", entries=entries, silent=frozenset(map(PeerId, silent)))
        self._news.set()
        self._news = trio.Event()


@dataclass
class Case:
    world: World
    directory: FakeDirectory
    watching: Watching

    def conversation(self) -> Any:  # Any: a conversation whose sessions are watched
        """As `Swarm.open_chain` opens sessions."""
        inner = conversation_of(self.world).open_chain
        watching = self.watching

        async def open_chain(*, max_length: int, deadline: float, trace: Trace) -> Any:
            name = watching.traced(trace)
            session = await inner(max_length=max_length, deadline=deadline, trace=trace)
            watching.opened(name, session)
            return session

        return conversation_of(self.world, open_chain=open_chain)


@asynccontextmanager
async def case(*, always: bool = False) -> AsyncIterator[Case]:
    async with swarm() as world, trio.open_nursery() as nursery:
        directory = FakeDirectory()
        yield Case(world, directory, Watching(directory, nursery, always=always))
        nursery.cancel_scope.cancel()


async def test_sessions_are_listed_with_their_hops_times_and_rate_until_they_are_closed(
    autojump_clock: object,
) -> None:
    async with case() as one:
        one.world.add_chain(0, 3, 8)
        assert one.watching.sessions() == []
        conversation = one.conversation()
        tokens = list(PROMPT)
        for _ in range(4):
            tokens.append(await conversation.logits_after(tokens, best))
        (found,) = one.watching.sessions()
        assert (found.state, found.length, found.recoveries) == ("sound", len(PROMPT) + 3, 0)
        assert [(hop.start, hop.stop) for hop in found.hops] == [(0, 3), (3, 8)]
        assert all(hop.held is not None and hop.computed is not None for hop in found.hops)
        assert found.tokens_per_second > 0
        assert one.watching.routes() == [hop.peer for hop in found.hops]
        second = one.conversation()
        await second.logits_after(PROMPT, best)
        assert len({each.id for each in one.watching.sessions()}) == 2
        for each in (conversation, second):
            each.close()
        assert one.watching.sessions() == []
        assert one.watching.routes() == []


async def test_nothing_more_is_pinged_before_somebody_asks(autojump_clock: object) -> None:
    async with case() as one:
        one.world.add_chain(0, 8)
        conversation = one.conversation()
        await conversation.logits_after(PROMPT, best)
        conversation.close()
        await trio.sleep(WATCH_AGAIN_SECONDS)
        assert one.directory.pings.monitored == []
        one.directory.show("a", "b")
        assert one.watching.liveness() == {PeerId("a"): UNKNOWN, PeerId("b"): UNKNOWN}
        assert one.directory.pings.monitored == [WATCH_AGAIN_SECONDS]
    async with case(always=True) as one:
        assert one.directory.pings.monitored == [float("inf")]


async def test_a_fault_is_heard_before_the_next_token_and_its_peer_is_asked_at_once(
    autojump_clock: object,
) -> None:
    async with case() as one:
        one.world.add_chain(0, 3, 8)
        one.world.add("spare", 3, 8)
        heard: list[SwarmEvent] = []
        tokens = list(PROMPT)

        async def listen(task_status: trio.TaskStatus[None]) -> None:
            async with aclosing(one.watching.events()) as events:
                task_status.started()
                async for event in events:
                    heard.append(event)

        async with trio.open_nursery() as nursery:
            await nursery.start(listen)
            await trio.testing.wait_all_tasks_blocked()
            conversation = one.conversation()
            tokens.append(await conversation.logits_after(tokens, best))
            lost = one.watching.sessions()[0].hops[1].peer
            await one.world.kill(lost)
            tokens.append(await conversation.logits_after(tokens, best))
            await trio.testing.wait_all_tasks_blocked()
            kinds = [event.what for event in heard]
            assert kinds[:2] == ["opened", "step"]
            assert kinds.index("fault") < kinds.index("rerouted") < len(kinds) - 1 == kinds.index("step", 2)
            fault = heard[kinds.index("fault")]
            assert (fault.kind, fault.data["peer"]) == ("session", lost)
            assert {event.subject for event in heard} == {one.watching.sessions()[0].id}
            assert one.directory.pings.asked == [lost]
            assert lost not in one.directory.pings.routes()
            conversation.close()
            await trio.testing.wait_all_tasks_blocked()
            assert heard[-1].what == "ended"
            nursery.cancel_scope.cancel()


async def test_peers_that_come_go_and_fall_silent_are_heard_of(autojump_clock: object) -> None:
    async with case() as one:
        one.directory.show("a")
        async with aclosing(one.watching.events()) as events:
            heard = []
            async with trio.open_nursery() as nursery:

                async def take() -> None:
                    async for event in events:
                        heard.append((event.subject, event.what))

                nursery.start_soon(take)
                await trio.testing.wait_all_tasks_blocked()
                for change in (("ab", ""), ("ab", "b"), ("ab", ""), ("a", "")):
                    one.directory.show(*change[0], silent=change[1])
                    await trio.testing.wait_all_tasks_blocked()
                assert heard == [("b", "joined"), ("b", "silent"), ("b", "back"), ("b", "left")]
                await trio.sleep(10 * WATCH_AGAIN_SECONDS)  # it goes on for as long as somebody listens
                assert len(one.directory.pings.monitored) >= 10
                nursery.cancel_scope.cancel()
        before = len(one.directory.pings.monitored)
        await trio.sleep(10 * WATCH_AGAIN_SECONDS)
        assert len(one.directory.pings.monitored) == before


async def test_a_listener_that_comes_later_hears_of_sessions_that_are_open_and_each_event_once(
    autojump_clock: object,
) -> None:
    async with case() as one:
        one.world.add_chain(0, 8)
        conversation = one.conversation()
        tokens = [*PROMPT, await conversation.logits_after(PROMPT, best)]
        for _ in range(2):  # a second time, after the first listener has gone
            async with aclosing(one.watching.events()) as first, aclosing(one.watching.events()) as second:
                heard: list[list[str]] = [[], []]

                async def take(events: Any, into: list[str]) -> None:
                    async for event in events:
                        into.append(event.what)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(take, first, heard[0])
                    nursery.start_soon(take, second, heard[1])
                    await trio.testing.wait_all_tasks_blocked()
                    tokens.append(await conversation.logits_after(tokens, best))
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
            assert heard == [["step"], ["step"]]
        conversation.close()


async def test_more_listeners_than_allowed_are_refused(autojump_clock: object) -> None:
    async with case() as one, trio.open_nursery() as nursery:

        async def listen() -> None:
            async with aclosing(one.watching.events()) as events:
                async for _ in events:
                    pass

        for _ in range(MAX_LISTENERS):
            nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match=f"{MAX_LISTENERS} programs listen"):
            async with aclosing(one.watching.events()) as events:
                await anext(events)
        nursery.cancel_scope.cancel()


def test_a_listener_that_is_too_slow_loses_the_oldest_and_reads_how_many():
    backlog = Backlog(most=3)
    for number in range(5):
        backlog.add(SwarmEvent(float(number), "peer", "a", "joined"))
    first = backlog.take()
    assert first is not None
    assert (first.at, first.lost) == (2.0, 2)
    second = backlog.take()
    assert second is not None
    assert (second.at, second.lost) == (3.0, 0)
    assert Backlog().most == MAX_BEHIND
