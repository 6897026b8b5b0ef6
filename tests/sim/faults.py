"""The kinds of faults, and the end of each.

kill         a process ends, its kernel resets its connections; it is started again with empty caches
vanish       a host ends without a word, and is started again
freeze       a process stands still (SIGSTOP), then goes on with all that has come meanwhile
slow         a node computes 10 or 100 times slower
drain        a node leaves politely, and is started again
cut          the connection of a pair is reset
silence      nothing passes between two, and neither is told (half-open)
deaf         the same, one way only
unreachable  one cannot open a connection to another
partition    some are cut off from all others
swizzle      servers are cut off one after another, and come back in another order
full         others take every page of a node's cache
sick         a node computes NaN
lossy        half of the frames between two come late
clock        a node's wall clock jumps
lies         a node takes new sessions, and lies about its neighbours or its progress (tests/fakes_lies.py)
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from routing.names import PeerId
from tests.fakes_lies import LIES, LyingNode
from tests.sim import glue
from tests.sim.network import KEEPALIVE_SECONDS
from tests.sim.people import Node, World
from tests.sim.plan import Fault

LEAVE_SECONDS = 2.0  # until all have the record
LOSSY = 0.5


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault that struck.  who: the participants struck.  well: when all its effects were over."""

    fault: Fault
    who: tuple[PeerId, ...]
    began: float
    well: float


class Injector:
    """Lets the faults of a plan happen.  happened: those that are over."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.happened: list[Happened] = []
        self._rng = rng
        self._busy: set[PeerId] = set()  # nodes that are being ended and started again

    async def strike(self, fault: Fault) -> None:
        """Wait for its time, let it happen, and return when it is over."""
        who = await self._when_due(fault)
        began = trio.current_time()
        self.world.log(f"{fault.kind} {' '.join(who)} for {fault.seconds:.1f} s")
        do: Callable[[Fault, list[PeerId]], Awaitable[None]] = getattr(self, f"_{fault.kind}")
        await do(fault, who)
        left = began + fault.seconds - trio.current_time()
        await trio.sleep(max(0.0, left))
        self.world.log(f"{fault.kind} {' '.join(who)} is over")
        well = trio.current_time()
        if fault.kind == "vanish":  # peers that do not send to it notice so late
            well = max(well, began + KEEPALIVE_SECONDS)
        self.happened.append(Happened(fault, tuple(who), began, well))

    async def _when_due(self, fault: Fault) -> list[PeerId]:
        """The participants that it strikes, when the time has come."""
        who = [PeerId(name) for name in fault.who]
        if fault.hit is None:
            await trio.sleep_until(fault.at)
            return who
        name, tokens, hop = fault.hit
        client = self.world.clients[PeerId(name)]
        with trio.move_on_at(fault.at):
            while client.progress < tokens and not client.finished:
                await client.moved.wait()
            await trio.sleep(self._rng.random() * 0.3)  # into the next step
        chains = client.chains()
        if not chains:
            return who
        chain = chains[0]
        at = hop % len(chain)
        near = [*chain[max(0, at - 1) : at], *chain[at + 1 : at + 2], client.peer]
        struck = [chain[at], self._rng.choice(near), *who[2:]]
        return struck[: len(who)]

    # --- processes ------------------------------------------------------------------------------------

    async def _kill(self, fault: Fault, who: list[PeerId], *, vanish: bool = False) -> None:
        node = self._mine(who[0])
        if node is not None:
            node.end(vanish=vanish)
            await self._again(node, fault.seconds)

    async def _vanish(self, fault: Fault, who: list[PeerId]) -> None:
        await self._kill(fault, who, vanish=True)

    async def _drain(self, fault: Fault, who: list[PeerId]) -> None:
        node = self._mine(who[0])
        if node is not None:
            node.say("draining")
            await node.listener.drain()
            node.say("offline")
            await trio.sleep(LEAVE_SECONDS)
            node.end()
            await self._again(node, fault.seconds)

    async def _again(self, node: Node, seconds: float) -> None:
        await trio.sleep(seconds)
        await node.run(self.world.nursery)
        self._busy.discard(node.peer)

    def _mine(self, peer: PeerId) -> Node | None:
        """A node that no other fault ends or starts just now."""
        if peer in self._busy:
            return None
        self._busy.add(peer)
        return self.world.nodes[peer]

    async def _freeze(self, fault: Fault, who: list[PeerId]) -> None:
        self.world.network.freeze(who[0], fault.seconds)
        await trio.sleep(fault.seconds)

    async def _slow(self, fault: Fault, who: list[PeerId]) -> None:
        node = self.world.nodes[who[0]]
        slow_by, compute = node.span.slow_by, node.compute
        slow_by.append(fault.amount)
        await trio.sleep(fault.seconds)
        slow_by.remove(fault.amount)
        await trio.sleep_until(compute.busy_until)  # what has begun slowly ends slowly

    async def _sick(self, fault: Fault, who: list[PeerId]) -> None:
        span = self.world.nodes[who[0]].span
        span.sick = True
        await trio.sleep(fault.seconds)
        span.sick = False

    async def _lies(self, fault: Fault, who: list[PeerId]) -> None:
        node = self.world.nodes[who[0]]
        with node.lying(LyingNode(LIES[int(fault.amount)])):
            await trio.sleep(fault.seconds)

    async def _full(self, fault: Fault, who: list[PeerId]) -> None:
        listener = self.world.nodes[who[0]].listener
        if listener.budget.tokens and not glue.is_hogged(listener):
            give_back = glue.hog(listener)
            await trio.sleep(fault.seconds)
            give_back()

    async def _clock(self, fault: Fault, who: list[PeerId]) -> None:
        self.world.nodes[who[0]].skew_seconds += fault.amount

    # --- the network ----------------------------------------------------------------------------------

    async def _cut(self, fault: Fault, who: list[PeerId]) -> None:
        self.world.network.cut(*who)

    async def _silence(self, fault: Fault, who: list[PeerId]) -> None:
        one, other = who
        self.world.network.silence(one, other, fault.seconds)
        self.world.network.silence(other, one, fault.seconds)

    async def _deaf(self, fault: Fault, who: list[PeerId]) -> None:
        self.world.network.silence(who[0], who[1], fault.seconds)

    async def _unreachable(self, fault: Fault, who: list[PeerId]) -> None:
        network = self.world.network
        network.way(*who).unreachable_until = trio.current_time() + fault.seconds
        network.cut(*who)

    async def _partition(self, fault: Fault, who: list[PeerId]) -> None:
        self._isolate(who, fault.seconds)

    async def _swizzle(self, fault: Fault, who: list[PeerId]) -> None:
        pause = fault.seconds / (2 * len(who))
        for peer in who:
            self._isolate([peer], fault.seconds / 2 * self._rng.random())
            await trio.sleep(pause)

    async def _lossy(self, fault: Fault, who: list[PeerId]) -> None:
        ways = [self.world.network.way(*who), self.world.network.way(*reversed(who))]
        before = [way.loss for way in ways]
        for way in ways:
            way.loss = LOSSY
        await trio.sleep(fault.seconds)
        for way, loss in zip(ways, before, strict=True):
            way.loss = min(loss, 0.05)

    def _isolate(self, who: list[PeerId], seconds: float) -> None:
        network = self.world.network
        for one in who:
            for other in network.participants:
                if other not in who:
                    network.silence(one, other, seconds)
                    network.silence(other, one, seconds)
