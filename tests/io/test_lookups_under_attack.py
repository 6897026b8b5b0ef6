"""Peers that are silent or slow hold up neither a lookup nor the questions to the peers that it found."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from node.network.directory.kademlia.contact import Contact
from node.network.directory.kademlia.kademlia import ASK_SECONDS
from node.network.directory.kademlia.lookup import Lookup
from node.network.directory.kademlia.messages import Kind, Message
from node.network.directory.kademlia.walk import ASKED_AT_ONCE, LATE_SECONDS, walk
from node.network.directory.turns import Turns
from routing.names import PeerId
from tests.unit.test_kademlia_parts import KEY, at, peer


class Peers:
    """Peers with an answer after `delay` seconds, or none within ASK_SECONDS."""

    def __init__(self, delays: dict[PeerId, float], hints: dict[PeerId, list[Contact]]) -> None:
        self.delays, self.hints = delays, hints
        self.asked: dict[PeerId, float] = {}
        self.answered: dict[PeerId, float] = {}

    async def ask(self, contact: Contact) -> Message | None:
        self.asked[contact.peer] = trio.current_time()
        with trio.move_on_after(ASK_SECONDS):
            await trio.sleep(self.delays.get(contact.peer, 0.1))
            return Message(Kind.FIND_NODE, KEY, tuple(self.hints.get(contact.peer, ())))
        return None

    def note(self, contact: Contact, answer: Message) -> None:
        self.answered[contact.peer] = trio.current_time()


async def test_all_bootstrap_peers_are_asked_at_once_however_many_are_silent(autojump_clock: MockClock):
    first = [at(number) for number in range(1, 21)]
    peers = Peers({contact.peer: 60.0 for contact in first[:-1]}, {})
    began = trio.current_time()
    await walk(Lookup(peer(0), KEY, first), peers.ask, peers.note)
    assert set(peers.asked.values()) == {began}
    assert peers.answered == {first[-1].peer: pytest.approx(began + 0.1)}


async def test_a_path_past_silent_peers_asks_further_ones_twice_a_second(autojump_clock: MockClock):
    first, liars = at(1), [at(number) for number in range(100, 108)]
    honest = max(liars, key=lambda contact: contact.peer)
    peers = Peers({contact.peer: 60.0 for contact in liars}, {first.peer: liars})
    began = trio.current_time()
    await walk(Lookup(peer(0), KEY, [first], paths=1), peers.ask, peers.note)
    assert honest.peer in peers.asked
    last = max(peers.asked.values()) - began
    assert last == pytest.approx(0.1 + (len(liars) / ASKED_AT_ONCE - 1) * LATE_SECONDS)


async def test_a_quick_answer_is_followed_while_a_slow_peer_is_waited_for(autojump_clock: MockClock):
    slow, quick, after = at(1), at(2), at(3)
    peers = Peers({slow.peer: 1.9}, {quick.peer: [after]})
    began = trio.current_time()
    await walk(Lookup(peer(0), KEY, [slow, quick], paths=1), peers.ask, peers.note)
    assert peers.asked[after.peer] == pytest.approx(began + 0.1)
    assert peers.answered.keys() == {slow.peer, quick.peer, after.peer}


async def test_a_late_job_goes_on_and_holds_no_turn(autojump_clock: MockClock):
    turns, begun, done = Turns(2, 0.5), [], []

    async def job(name: str, seconds: float) -> None:
        begun.append((name, trio.current_time()))
        await trio.sleep(seconds)
        done.append((name, trio.current_time()))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for name, seconds in (("a", 3.0), ("b", 3.0)):
            nursery.start_soon(turns.run, lambda name=name, seconds=seconds: job(name, seconds))
        await trio.sleep(0.1)
        for name in "cdef":
            nursery.start_soon(turns.run, lambda name=name: job(name, 0.2))
    assert sorted(when - start for name, when in begun if name in "cdef") == pytest.approx(
        [0.5, 0.5, 0.7, 0.7]
    )
    assert {name: when - start for name, when in done if name in "ab"} == pytest.approx({"a": 3.0, "b": 3.0})


async def test_a_job_that_fails_gives_its_turn_back(autojump_clock: MockClock):
    turns = Turns(1, 60.0)

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("a job")

    with pytest.raises(ExceptionGroup):
        await turns.run(fail)
    with trio.fail_after(1.0):
        await turns.run(trio.lowlevel.checkpoint)
