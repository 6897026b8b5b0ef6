"""Moves a serving node to the blocks where the swarm needs it: a clock around pure decisions.

`routing.placement.cover_gaps` decides twice whether to move: before the move is announced, and again when all
announcements of that moment have spread.  Then the servers that still hold the blocks to be left are asked
whether they are there.  The balancer looks for blocks that nobody holds every second.  It looks for a better
place at random times, so that servers do not all move at once, and soon after another server is lost.

Peers keep gossiping a crashed server's record until its TTL.  So this node asks the peers whose loss matters
now and then whether they are there (`routing.placement.cover_gaps.watched`).  A peer that is silent twice in
a row is left out of the view until it answers again or announces something new.  The finding is not
gossiped: each server asks for itself, so a liar cannot have a peer left out.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.config import BalanceConfig
from node.serving.mover import MoveFailed, Mover
from routing.blocks import Blocks
from routing.names import PeerId
from routing.placement.cover_gaps import (
    move_to_cover,
    objection,
    opens_gap,
    taken_for_lost,
    watched,
    witnesses,
)
from routing.placement.rebalance import better_window, holders
from routing.placement.throughput import Holder
from routing.view.records import Record
from routing.view.view import ONLINE_SOON

log = logging.getLogger("raceme")

LOOK_SECONDS = 1.0  # between looks for blocks that nobody holds
RANK_SECONDS = 3.0  # a plan of rank n begins n times this later: the plans before it may not be carried out
ANSWER_SECONDS = 2.0  # in which a peer must answer
SETTLE_SECONDS = 5.0  # until the announcement of a move has reached all, by the periodic exchange too
WATCH_SECONDS = 10.0  # at most, between two rounds of asking the peers whose loss matters
AGAIN_SECONDS = 3.0  # until silent peers are asked once more
LOSS_SECONDS = 5.0  # at most, from the loss of a server until the look for a better place
BACK_OFF_SECONDS = 60.0  # after a move that failed; doubles with each further one
MAX_BACK_OFF_SECONDS = 3600.0


class Better(Protocol):
    """Finds better blocks for `me`, as many as it holds; None where it should stay."""

    def __call__(self, spans: Sequence[Record], blocks: int, me: PeerId) -> Blocks | None:
        """spans: online and joining, of one model revision.  blocks: of the model."""


def by_capacity(config: BalanceConfig, rng: random.Random, position_bytes: int = 0) -> Better:
    """Finds the blocks with which the swarm gains most capacity (`routing.placement.rebalance`).

    position_bytes: of one position's hidden state on the wire; 0: not known.
    """

    def better(spans: Sequence[Record], blocks: int, me: PeerId) -> Blocks | None:
        held = holders(spans, position_bytes)
        count = next(holder.stop - holder.start for holder in held if holder.peer == me)
        return better_window(
            held, blocks, me, count, quality=config.quality, min_replicas=config.min_replicas, rng=rng
        )

    return better


@dataclass(slots=True)
class Balancer:
    """Watches the swarm and has the node move.  `run` must be running while the node serves.

    answers: whether a peer answers this node now.  It is asked about the servers of the blocks to be left
    before a move, and about the peers whose loss matters all the time.  None: each peer counts as present
    until its record ends.
    """

    mover: Mover
    config: BalanceConfig
    rng: random.Random
    better: Better
    answers: Callable[[PeerId], Awaitable[bool]] | None = None
    moves: int = 0
    _failures: int = 0
    _hole_since: float | None = None
    _present: frozenset[PeerId] = frozenset()  # peers at the last look
    _lost: dict[PeerId, int] = field(default_factory=dict)  # silent peers, with the seq of their records then
    _look_at: float = 0.0  # time of the next look for a better place

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._balance)

    async def _balance(self) -> None:
        self._look_later()
        while True:
            await trio.sleep(LOOK_SECONDS * self.rng.uniform(0.5, 1.0))
            choice = self._choose(trio.current_time())
            if choice is not None:
                await self._go(choice)

    def _look_later(self) -> None:
        self._look_at = trio.current_time() + self.config.seconds * self.rng.uniform(0.5, 1.5)

    def _look_sooner(self, now: float, spans: Sequence[Record]) -> None:
        """Bring the next look for a better place forward where a server has gone since the last one."""
        present = frozenset(span.peer for span in spans)
        if self._present - present:
            self._look_at = min(self._look_at, now + LOSS_SECONDS * self.rng.random())
        self._present = present

    def _choose(self, now: float) -> Blocks | None:
        """The blocks to move to now; None: stay."""
        me, spans = self._see()
        plan = move_to_cover(holders(spans), me.blocks, me.peer)
        if plan is not None:
            self._hole_since = now if self._hole_since is None else self._hole_since
            due = self._hole_since + RANK_SECONDS * plan.rank
            return plan.blocks if plan.ready and now >= due else None
        self._hole_since = None
        self._look_sooner(now, spans)
        if now < self._look_at or not self.config.quality:
            return None
        self._look_later()
        found = self.better(spans, me.blocks, me.peer)
        if found is None or found == me.span:
            return None
        return None if opens_gap(holders(spans), me.peer, me.span, found) else found

    def _see(self) -> tuple[Record, tuple[Record, ...]]:
        """This node's record, and the records of all present servers, this node's included."""
        me = self.mover.record()
        others = self._announced(me)
        return me, (me, *(span for span in others if not self._is_lost(span)))

    def _announced(self, me: Record) -> list[Record]:
        spans = self.mover.view().spans(me.revision, me.blocks, ONLINE_SOON)
        return [span for span in spans if span.peer != me.peer]

    def _is_lost(self, span: Record) -> bool:
        return span.seq <= self._lost.get(span.peer, -1)

    async def _watch(self) -> None:
        """Find out, again and again, which peers are lost."""
        while self.answers is not None:
            await trio.sleep(WATCH_SECONDS * self.rng.uniform(0.5, 1.0))
            await self._ask_around()

    async def _ask_around(self) -> None:
        """Ask the peers whose loss matters, and the silent ones again.

        A silent peer that announces something new is alive and cannot be reached from here.  Its silence
        counts no longer, until it has answered once.
        """
        me, spans = self._see()
        announced = {span.peer for span in self._announced(me)}
        known = {peer: seq for peer, seq in self._lost.items() if peer in announced}
        asked = [peer for peer in watched(holders(spans), me.blocks, me.peer) if peer not in known]
        present = await self._answering([*asked, *known])
        silent = set(asked) - present
        if silent:
            await trio.sleep(AGAIN_SECONDS)
            silent -= await self._answering(list(silent))
        lost = taken_for_lost(asked, silent)
        for peer in lost:
            log.info("%s no longer answers: left out until it does, or announces something new", peer)
        before = {peer: seq for peer, seq in known.items() if peer not in present}
        self._lost = before | {span.peer: span.seq for span in spans if span.peer in lost}

    async def _go(self, window: Blocks) -> None:
        """Announce a move, and make it unless other servers' announcements speak against it."""
        me, before = self._see()
        log.info("about to move from blocks %s to %s", me.span, window)
        await self.mover.announce_move(window)
        await trio.sleep(SETTLE_SECONDS)
        why_not = await self._objection(holders(before), window)
        if why_not is not None:
            log.info("stays with blocks %s: %s", me.span, why_not)
            await self.mover.stay()
            await trio.sleep(RANK_SECONDS * self.rng.random())
            return
        try:
            await self.mover.move(window)
        except MoveFailed as error:
            log.warning("the move to blocks %s failed: %s", window, error)
            self._failures += 1
            seconds = BACK_OFF_SECONDS * 2 ** min(self._failures - 1, 8)
            await trio.sleep(min(seconds, MAX_BACK_OFF_SECONDS))
        else:
            self.moves, self._failures = self.moves + 1, 0
            self._look_later()
        self._hole_since = None

    async def _objection(self, before: Sequence[Holder], window: Blocks) -> str | None:
        """Why the move must not be made after all; None where nothing speaks against it."""
        me, spans = self._see()
        now, own = holders(spans), me.span
        answered: set[PeerId] = set()
        while (why_not := objection(before, now, me.peer, own, window)) is None and self.answers is not None:
            asked = [peer for peer in witnesses(now, me.peer, own, window) if peer not in answered]
            if not asked:
                break
            present = await self._answering(asked)
            answered |= present
            now = [holder for holder in now if holder.peer in present or holder.peer not in asked]
        return why_not

    async def _answering(self, peers: Sequence[PeerId]) -> set[PeerId]:
        answers, present = self.answers, set[PeerId]()
        assert answers is not None

        async def ask(peer: PeerId) -> None:
            if await answers(peer):
                present.add(peer)

        with trio.move_on_after(ANSWER_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(ask, peer)
        return present
