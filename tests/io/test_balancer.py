"""Balancers of a whole swarm on one clock: one moves and not a herd, and none opens a gap."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import trio

from node.config import BalanceConfig
from node.serving.balancer import (
    AGAIN_SECONDS,
    ANSWER_SECONDS,
    BACK_OFF_SECONDS,
    LOSS_SECONDS,
    SETTLE_SECONDS,
    WATCH_SECONDS,
    Balancer,
    Better,
    by_capacity,
)
from node.serving.mover import MoveFailed
from routing.blocks import Blocks, coverage
from routing.names import PeerId
from routing.placement.rebalance import holders
from routing.placement.throughput import bound, capacity
from routing.view.records import Record
from routing.view.view import Entry, SwarmView

Answers = Callable[[PeerId], Awaitable[bool]]
BLOCKS = 6
LOAD_SECONDS = 3.0


@dataclass
class FakeSwarm:
    """The records of all servers, known to all at once.  serving: the blocks that each in truth serves."""

    records: dict[PeerId, Record] = field(default_factory=dict)
    serving: dict[PeerId, Record] = field(default_factory=dict)
    log: list[tuple[float, str, int, int]] = field(default_factory=list)

    def view(self) -> SwarmView:
        return SwarmView("", entries={peer: Entry(r, b"", 0.0) for peer, r in self.records.items()})

    def online(self) -> tuple[int, ...]:
        return coverage(self.serving.values(), BLOCKS)


@dataclass
class FakeMover:
    """A node that takes LOAD_SECONDS for a move; and fails as often as `failing` says."""

    swarm: FakeSwarm
    me: Record
    failing: int = 0

    def view(self) -> SwarmView:
        return self.swarm.view()

    def record(self) -> Record:
        return self.me

    async def announce_move(self, blocks: Blocks) -> None:
        await trio.lowlevel.checkpoint()
        self.swarm.records[self.me.peer] = replace(
            self.me, start=blocks.start, stop=blocks.stop, state="joining"
        )

    async def stay(self) -> None:
        await trio.lowlevel.checkpoint()
        self.swarm.records[self.me.peer] = self.swarm.serving[self.me.peer] = self.me

    async def move(self, blocks: Blocks) -> None:
        self.swarm.log.append((trio.current_time(), self.me.peer, *blocks))
        del self.swarm.serving[self.me.peer]
        await trio.sleep(LOAD_SECONDS)
        if self.failing:
            self.failing -= 1
            await self.stay()
            raise MoveFailed("no memory")
        self.me = replace(self.me, start=blocks.start, stop=blocks.stop)
        await self.stay()


def stay(spans: object, blocks: int, me: PeerId) -> Blocks | None:
    """No place is better."""
    return None


@asynccontextmanager
async def balanced(
    *spans: tuple[int, int],
    seed: int = 0,
    failing: int = 0,
    better: Better | None = stay,
    answers: Answers | None = None,
) -> AsyncIterator[FakeSwarm]:
    swarm = FakeSwarm()
    async with trio.open_nursery() as nursery:
        for number, (start, stop) in enumerate(spans):
            me = Record(
                peer=PeerId(f"p{number}"), role="serve", revision="r", blocks=BLOCKS, start=start, stop=stop
            )
            swarm.records[me.peer] = swarm.serving[me.peer] = me
            mover = FakeMover(swarm, me, failing)
            rng = random.Random(seed * 100 + number)
            choose = better or by_capacity(BalanceConfig(), rng)
            nursery.start_soon(Balancer(mover, BalanceConfig(), rng, choose, answers).run)
        yield swarm
        nursery.cancel_scope.cancel()


async def test_where_all_is_well_nobody_moves(autojump_clock: object) -> None:
    async with balanced((0, 3), (3, 6), (0, 3)) as swarm:
        await trio.sleep(3600)
        assert swarm.log == []


@pytest.mark.parametrize("seed", range(10))
async def test_of_many_that_could_cover_a_hole_one_goes_and_soon(seed: int, autojump_clock: object) -> None:
    async with balanced(*[(0, 3)] * 8, seed=seed) as swarm:
        began = trio.current_time()
        await trio.sleep(60)
        assert len(swarm.log) == 1
        assert swarm.log[0][0] - began < SETTLE_SECONDS + 3
        assert 0 not in swarm.online()


@pytest.mark.parametrize("seed", range(10))
async def test_a_large_hole_is_covered_by_as_many_as_it_takes_and_no_gap_is_opened(
    seed: int, autojump_clock: object
) -> None:
    async with balanced(*[(0, 2)] * 5, seed=seed) as swarm:
        for _ in range(600):
            await trio.sleep(0.1)
            assert 0 not in swarm.online()[:2]
        assert 0 not in swarm.online()
        assert len(swarm.log) == 2


async def test_who_alone_holds_its_blocks_stays(autojump_clock: object) -> None:
    async with balanced((0, 3)) as swarm:
        await trio.sleep(600)
        assert swarm.log == []


async def test_when_a_move_fails_the_next_in_turn_goes_and_the_first_leaves_it_be_for_a_while(
    autojump_clock: object,
) -> None:
    async with balanced((0, 3), (0, 3), (0, 3), failing=1) as swarm:
        await trio.sleep(BACK_OFF_SECONDS + 30)
        assert 0 not in swarm.online()
        times = {peer: [at for at, who, *_ in swarm.log if who == peer] for _, peer, *_ in swarm.log}
        assert len(times) > 1
        for tries in times.values():
            assert all(two - one > BACK_OFF_SECONDS for one, two in pairwise(tries))


@pytest.mark.parametrize("seed", range(5))
async def test_servers_settle_where_the_swarm_can_do_most_and_then_stay(
    seed: int, autojump_clock: object
) -> None:
    async with balanced((0, 3), (0, 3), (0, 3), (3, 6), seed=seed, better=None) as swarm:
        for _ in range(1800):
            await trio.sleep(1)
            assert 0 not in swarm.online()
        held = holders(tuple(swarm.serving.values()))
        assert capacity(held, BLOCKS) > 0.98 * bound(held, BLOCKS)
        moves = len(swarm.log)
        assert moves <= 3
        await trio.sleep(3600)
        assert len(swarm.log) == moves


async def test_a_better_place_is_taken_unless_that_opens_a_gap(autojump_clock: object) -> None:
    def better(spans: object, blocks: int, me: PeerId) -> Blocks | None:
        return Blocks(3, 6)

    async with balanced((0, 3), (3, 6), better=better) as swarm:
        await trio.sleep(600)
        assert swarm.log == []
    async with balanced((0, 3), (0, 3), (3, 6), better=better) as swarm:
        await trio.sleep(600)
        assert {start for _, peer, start, _ in swarm.log if peer != "p2"} == {3}
        assert 0 not in swarm.online()


async def test_of_two_that_leave_the_same_blocks_at_once_not_both_go(autojump_clock: object) -> None:
    def better(spans: object, blocks: int, me: PeerId) -> Blocks | None:
        return Blocks(3, 6)

    for seed in range(20):
        async with balanced((0, 3), (0, 3), (3, 6), better=better, seed=seed) as swarm:
            for _ in range(300):
                await trio.sleep(1)
                assert 0 not in swarm.online()


async def test_a_server_leaves_its_blocks_only_to_those_who_answer(autojump_clock: object) -> None:
    asked: list[PeerId] = []
    silent = {PeerId("p0")}

    def better(spans: object, blocks: int, me: PeerId) -> Blocks | None:
        return Blocks(3, 6) if me == "p1" else None

    async def answers(peer: PeerId) -> bool:
        asked.append(peer)
        if peer in silent:
            await trio.sleep_forever()
        return True

    async with balanced((0, 3), (0, 3), (3, 6), better=better, answers=answers) as swarm:
        await trio.sleep(600)
        assert swarm.log == []
        assert "p0" in asked
        silent.clear()
        await trio.sleep(600)
        assert [who for _, who, *_ in swarm.log] == ["p1"]


async def test_when_a_server_is_lost_the_others_look_for_better_places_at_once(
    autojump_clock: object,
) -> None:
    looked: list[float] = []

    def better(spans: object, blocks: int, me: PeerId) -> Blocks | None:
        looked.append(trio.current_time())
        return None

    async with balanced((0, 6), (0, 6), (0, 6), better=better) as swarm:
        await trio.sleep(1.5)
        lost_at = trio.current_time()
        del swarm.records[PeerId("p2")]
        await trio.sleep(LOSS_SECONDS + 1)
        assert len(looked) >= 2
        assert min(looked) >= lost_at


DETECTED_SECONDS = WATCH_SECONDS + ANSWER_SECONDS + AGAIN_SECONDS + ANSWER_SECONDS


@dataclass
class Pings:
    """Peers without answers: `dead` ones answer no peer, and `cut_off` ones reach no peer."""

    dead: set[PeerId] = field(default_factory=set)
    cut_off: set[PeerId] = field(default_factory=set)
    asked: list[tuple[PeerId, PeerId]] = field(default_factory=list)
    alive: dict[PeerId, trio.CancelScope] = field(default_factory=dict)

    def crash(self, peer: PeerId) -> None:
        self.dead.add(peer)
        self.alive[peer].cancel()

    def of(self, me: PeerId) -> Answers:
        async def answers(peer: PeerId) -> bool:
            self.asked.append((me, peer))
            if peer in self.dead or {me, peer} & self.cut_off:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            return True

        return answers


@asynccontextmanager
async def watching(*spans: tuple[int, int], seed: int = 0) -> AsyncIterator[tuple[FakeSwarm, Pings]]:
    """A swarm whose servers ping each other; it is over when this ends, tasks and all."""
    swarm, pings = FakeSwarm(), Pings()
    with trio.fail_after(36000):
        async with trio.open_nursery() as nursery:
            for number, (start, stop) in enumerate(spans):
                me = Record(
                    peer=PeerId(f"p{number}"),
                    role="serve",
                    revision="r",
                    blocks=BLOCKS,
                    start=start,
                    stop=stop,
                )
                swarm.records[me.peer] = swarm.serving[me.peer] = me
                rng = random.Random(seed * 100 + number)
                mover = FakeMover(swarm, me)
                balancer = Balancer(mover, BalanceConfig(), rng, stay, pings.of(me.peer))
                nursery.start_soon(run_while_alive, balancer, me.peer, pings)
            yield swarm, pings
            nursery.cancel_scope.cancel()


async def run_while_alive(balancer: Balancer, me: PeerId, pings: Pings) -> None:
    """Until it crashes: then it does nothing, and only its record is left."""
    with trio.CancelScope() as pings.alive[me]:
        await balancer.run()


@pytest.mark.parametrize("seed", range(10))
async def test_a_crashed_server_is_replaced_long_before_its_record_ends(
    seed: int, autojump_clock: object
) -> None:
    async with watching((0, 3), (0, 3), (0, 3), (3, 6), seed=seed) as (swarm, pings):
        await trio.sleep(60)
        assert swarm.log == []
        crashed_at = trio.current_time()
        pings.crash(PeerId("p3"))
        del swarm.serving[PeerId("p3")]
        await trio.sleep(DETECTED_SECONDS + SETTLE_SECONDS + LOAD_SECONDS + 10)
        assert 0 not in swarm.online()
        [(at, _, start, _)] = swarm.log
        assert at - crashed_at > AGAIN_SECONDS + SETTLE_SECONDS
        assert start == 3


async def test_who_is_silent_once_is_asked_again_and_then_believed(autojump_clock: object) -> None:
    async with watching((0, 3), (0, 3), (0, 3), (3, 6)) as (swarm, pings):
        await trio.sleep(60)
        while True:  # until the first silence of anybody's is over
            pings.dead.add(PeerId("p3"))
            pings.asked.clear()
            await trio.sleep(ANSWER_SECONDS / 2)
            pings.dead.clear()
            if any(peer == "p3" for _, peer in pings.asked):
                break
        await trio.sleep(600)
        assert swarm.log == []


@dataclass
class Eyes:
    """One balancer, p0 of (0, 3), without a reason to move, and its swarm."""

    balancer: Balancer
    swarm: FakeSwarm
    pings: Pings

    def sees(self) -> set[str]:
        return {str(span.peer) for span in self.balancer._see()[1]}


@asynccontextmanager
async def eyes(*others: tuple[int, int]) -> AsyncIterator[Eyes]:
    swarm, pings = FakeSwarm(), Pings()
    for number, (start, stop) in enumerate([(0, 3), *others]):
        peer = PeerId(f"p{number}")
        swarm.records[peer] = Record(
            peer=peer, role="serve", revision="r", blocks=BLOCKS, start=start, stop=stop, seq=7
        )
    mover = FakeMover(swarm, swarm.records[PeerId("p0")])
    balancer = Balancer(mover, BalanceConfig(quality=0), random.Random(0), stay, pings.of(PeerId("p0")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(balancer._watch)
        yield Eyes(balancer, swarm, pings)
        nursery.cancel_scope.cancel()


async def test_who_is_silent_twice_is_left_out_until_it_answers_again(autojump_clock: object) -> None:
    async with eyes((0, 3), (3, 6), (3, 6)) as us:
        await trio.sleep(30)
        us.pings.dead.add(PeerId("p2"))
        await trio.sleep(DETECTED_SECONDS)
        assert us.sees() == {"p0", "p1", "p3"}
        us.pings.dead.clear()
        await trio.sleep(WATCH_SECONDS + 1)
        assert us.sees() == {"p0", "p1", "p2", "p3"}


async def test_who_announces_something_new_is_there_although_we_cannot_reach_it(
    autojump_clock: object,
) -> None:
    async with eyes((0, 3), (3, 6), (3, 6)) as us:
        us.pings.dead.add(PeerId("p2"))
        await trio.sleep(2 * DETECTED_SECONDS)
        assert us.sees() == {"p0", "p1", "p3"}
        us.swarm.records[PeerId("p2")] = replace(us.swarm.records[PeerId("p2")], seq=8)
        for _ in range(300):
            await trio.sleep(1)
            assert us.sees() == {"p0", "p1", "p2", "p3"}
        us.pings.dead.clear()  # it answers, and from then on its silence says something again
        await trio.sleep(DETECTED_SECONDS)
        us.pings.dead.add(PeerId("p2"))
        await trio.sleep(2 * DETECTED_SECONDS)
        assert us.sees() == {"p0", "p1", "p3"}


async def test_who_is_cut_off_itself_takes_nobody_for_lost(autojump_clock: object) -> None:
    async with eyes((0, 3), (3, 6), (3, 6)) as us:
        us.pings.cut_off.add(PeerId("p0"))
        for _ in range(300):
            await trio.sleep(1)
            assert us.sees() == {"p0", "p1", "p2", "p3"}
