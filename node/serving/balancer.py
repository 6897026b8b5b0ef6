"""Moves a serving node to the blocks where the swarm needs it: a clock around pure decisions.

Twice in `routing.placement.cover_gaps` it is decided whether to go: before a move is announced, and a
moment later, when everybody has heard of it and we of theirs; then those who stay for what we leave are
asked once more.  Blocks that nobody holds are looked for every second; whether another place would be
better, at random times, so that servers do not all move at once, and soon after another server is lost.

A server that crashed is announced by others until its record ends.  So peers whose loss matters are
asked now and then whether they are there (`routing.placement.cover_gaps.watched`); who is silent twice
in a row is left out of what we see until it answers again or announces something new.  Nobody is
told: each server finds out by itself, and a liar can talk nobody down.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.config import BalanceConfig
from routing.names import PeerId
from routing.placement.cover_gaps import (
    objection,
    opens_gap,
    taken_for_lost,
    turn_to_cover,
    watched,
    witnesses,
)
from routing.placement.rebalance import better_window, holders
from routing.placement.throughput import Holder
from routing.view.records import Record
from routing.view.view import ONLINE_SOON, SwarmView

log = logging.getLogger("raceme")

LOOK_SECONDS = 1.0  # between looks for blocks that nobody holds
TURN_SECONDS = 3.0  # that a server waits for each one whose turn comes before its own
ANSWER_SECONDS = 2.0  # in which a peer must answer
SETTLE_SECONDS = 5.0  # from the announcement of a move until all have heard of it, where a flood lost it too
WATCH_SECONDS = 10.0  # at most, between two times that we ask the peers whose loss matters
AGAIN_SECONDS = 3.0  # until those who were silent are asked once more
LOSS_SECONDS = 5.0  # at most, from the loss of a server until we look for a better place
BACK_OFF_SECONDS = 60.0  # after a move that failed; doubles with each further one
BACK_OFF_MOST_SECONDS = 3600.0

Window = tuple[int, int]


class MoveFailed(Exception):
    """The new blocks could not be loaded, and the old ones are served again."""


class Better(Protocol):
    """A better place for `me`, which holds as many blocks there; None where it should stay."""

    def __call__(self, spans: Sequence[Record], blocks: int, me: PeerId) -> Window | None:
        """spans: online and joining, of one model revision."""


class Mover(Protocol):
    """The node, as the balancer needs it."""

    def view(self) -> SwarmView:
        """The swarm as known now."""

    def record(self) -> Record:
        """What we say of ourselves while we serve: peer, revision, blocks, start, stop."""

    async def announce_move(self, start: int, stop: int) -> None:
        """Say that we are about to serve these blocks."""

    async def stay(self) -> None:
        """Say again that we serve what we serve."""

    async def move(self, start: int, stop: int) -> None:
        """Let the sessions move elsewhere, and serve these blocks.  Raises MoveFailed."""


def by_capacity(config: BalanceConfig, rng: random.Random) -> Better:
    """The place from which the swarm's capacity, as `routing.placement.rebalance` has it, gains most."""

    def better(spans: Sequence[Record], blocks: int, me: PeerId) -> Window | None:
        held = holders(spans)
        count = next(holder.stop - holder.start for holder in held if holder.peer == me)
        return better_window(
            held, blocks, me, count, quality=config.quality, min_replicas=config.min_replicas, rng=rng
        )

    return better


@dataclass(slots=True)
class Balancer:
    """Watches the swarm and has the node move.  `run` it beside what serves.

    answers: whether that peer answers us now.  Those who are to serve what we leave are asked before we
    go, and those whose loss matters all the time; without it all are believed to be there as long as their
    records last.
    """

    mover: Mover
    config: BalanceConfig
    rng: random.Random
    better: Better
    answers: Callable[[PeerId], Awaitable[bool]] | None = None
    moves: int = 0
    _failures: int = 0
    _hole_since: float | None = None
    _there: frozenset[PeerId] = frozenset()  # at the last look
    _lost: dict[PeerId, int] = field(default_factory=dict)  # who is silent, and the seq that it had
    _look_at: float = 0.0  # when to look for a better place next

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
        """Where a server is gone that was there."""
        there = frozenset(span.peer for span in spans)
        if self._there - there:
            self._look_at = min(self._look_at, now + LOSS_SECONDS * self.rng.random())
        self._there = there

    def _choose(self, now: float) -> Window | None:
        """Where to go now, if anywhere."""
        me, spans = self._see()
        turn = turn_to_cover(holders(spans), me.blocks, me.peer)
        if turn is not None:
            self._hole_since = now if self._hole_since is None else self._hole_since
            due = self._hole_since + TURN_SECONDS * turn.rank
            return (turn.start, turn.stop) if turn.ready and now >= due else None
        self._hole_since = None
        self._look_sooner(now, spans)
        if now < self._look_at or not self.config.quality:
            return None
        self._look_later()
        found = self.better(spans, me.blocks, me.peer)
        if found is None or found == (me.start, me.stop):
            return None
        return None if opens_gap(holders(spans), me.peer, (me.start, me.stop), found) else found

    def _see(self) -> tuple[Record, tuple[Record, ...]]:
        """Ourselves, as we serve, and everybody who is there, ourselves included."""
        me = self.mover.record()
        others = self._announced(me)
        return me, (me, *(span for span in others if not self._is_lost(span)))

    def _announced(self, me: Record) -> list[Record]:
        spans = self.mover.view().spans(me.revision, me.blocks, ONLINE_SOON)
        return [span for span in spans if span.peer != me.peer]

    def _is_lost(self, span: Record) -> bool:
        return span.seq <= self._lost.get(span.peer, -1)

    async def _watch(self) -> None:
        """Find out, again and again, who is no longer there."""
        while self.answers is not None:
            await trio.sleep(WATCH_SECONDS * self.rng.uniform(0.5, 1.0))
            await self._ask_around()

    async def _ask_around(self) -> None:
        """Ask those whose loss matters, and those that were silent.

        Who was silent and then announced something new is alive, but we cannot reach it: its silence says
        nothing any more, until it has answered once.
        """
        me, spans = self._see()
        announced = {span.peer for span in self._announced(me)}
        known = {peer: seq for peer, seq in self._lost.items() if peer in announced}
        asked = [peer for peer in watched(holders(spans), me.blocks, me.peer) if peer not in known]
        there = await self._those_who_answer([*asked, *known])
        silent = set(asked) - there
        if silent:
            await trio.sleep(AGAIN_SECONDS)
            silent -= await self._those_who_answer(list(silent))
        lost = taken_for_lost(asked, silent)
        for peer in lost:
            log.info("%s no longer answers: left out until it does, or announces something new", peer)
        before = {peer: seq for peer, seq in known.items() if peer not in there}
        self._lost = before | {span.peer: span.seq for span in spans if span.peer in lost}

    async def _go(self, window: Window) -> None:
        """Announce a move, and make it unless the others' news speak against it."""
        me, before = self._see()
        log.info("about to move from blocks %d:%d to %d:%d", me.start, me.stop, *window)
        await self.mover.announce_move(*window)
        await trio.sleep(SETTLE_SECONDS)
        why_not = await self._objection(holders(before), window)
        if why_not is not None:
            log.info("stays with blocks %d:%d: %s", me.start, me.stop, why_not)
            await self.mover.stay()
            await trio.sleep(TURN_SECONDS * self.rng.random())
            return
        try:
            await self.mover.move(*window)
        except MoveFailed as error:
            log.warning("the move to blocks %d:%d failed: %s", *window, error)
            self._failures += 1
            seconds = BACK_OFF_SECONDS * 2 ** min(self._failures - 1, 8)
            await trio.sleep(min(seconds, BACK_OFF_MOST_SECONDS))
        else:
            self.moves, self._failures = self.moves + 1, 0
            self._look_later()
        self._hole_since = None

    async def _objection(self, before: Sequence[Holder], window: Window) -> str | None:
        """Why the move must not be made after all."""
        me, spans = self._see()
        now, own = holders(spans), (me.start, me.stop)
        heard: set[PeerId] = set()
        while (why_not := objection(before, now, me.peer, own, window)) is None and self.answers is not None:
            asked = [peer for peer in witnesses(now, me.peer, own, window) if peer not in heard]
            if not asked:
                break
            there = await self._those_who_answer(asked)
            heard |= there
            now = [holder for holder in now if holder.peer in there or holder.peer not in asked]
        return why_not

    async def _those_who_answer(self, peers: Sequence[PeerId]) -> set[PeerId]:
        answers, there = self.answers, set[PeerId]()
        assert answers is not None

        async def ask(peer: PeerId) -> None:
            if await answers(peer):
                there.add(peer)

        with trio.move_on_after(ANSWER_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(ask, peer)
        return there
