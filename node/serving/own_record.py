"""The node's own record: it announces the blocks that are served, and the blocks of a coming move."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from node.serving.served_span import ServedSpan, ServingSetup, StreamDispatch
from routing.blocks import Blocks
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView

REFRESH_SECONDS = 5.0  # between checks whether the node's record is still true
MEASURE_ROUNDS = 6  # checks between two measurements of an idle node's rates
TOLERANCE = 0.2  # a rate or a count that differs by a smaller share needs no new record


class Announcer(Protocol):
    """The part of `node.network.directory.directory.Directory` that a server needs."""

    peer_id: PeerId

    def view(self) -> SwarmView:
        """The swarm as known now."""

    async def announce(self, record: Record) -> None:
        """Publish this record of the node."""


@dataclass(slots=True)
class OwnRecord:
    """Announces the node's record.  dispatch: says which span is served."""

    setup: ServingSetup
    directory: Announcer
    dispatch: StreamDispatch
    _next: Blocks | None = None  # the blocks of the move under way
    _announced: Record | None = None  # the record that `keep_true` keeps true; None: none now
    _announcing: trio.Lock = field(default_factory=trio.Lock)  # keeps an older record from overtaking a newer

    def serving(self, span: ServedSpan) -> Record:
        """The record of this span as it is now, without the move under way."""
        return replace(span.record("online"), peer=self.directory.peer_id)

    def now(self, span: ServedSpan) -> Record:
        """The record of this span as it is now, with the move under way."""
        record = span.record("online")
        if self._next is None:
            return record
        return replace(record, next_start=self._next.start, next_stop=self._next.stop)

    def plan(self, blocks: Blocks | None) -> None:
        """Name the blocks of a move in records from now on; None: no move is under way."""
        self._next = blocks

    def reached(self, blocks: Blocks) -> None:
        """End the move under way where it is to these blocks."""
        if self._next == blocks:
            self._next = None

    async def announce(self) -> None:
        """Announce the served blocks, and those of a coming move; from now on that record is kept true."""
        span = self.dispatch.served_span
        assert span is not None, "nothing is served"
        async with self._announcing:
            self._announced = self.now(span)
            await self.directory.announce(self._announced)

    async def announce_joining(self, blocks: Blocks) -> None:
        """Say that nothing is served until these blocks are loaded."""
        async with self._announcing:
            self._announced = None
            await self.directory.announce(self.setup.record(self.setup.spec(blocks), "joining"))

    async def announce_draining(self) -> None:
        """Say that the node is leaving; nothing is announced where nothing is served."""
        async with self._announcing:
            self._announced = None
            if self.dispatch.served_span is not None:
                await self.directory.announce(self.dispatch.served_span.record("draining"))

    async def keep_true(self) -> None:
        """Announce anew when rates or free memory differ from the announced record, until cancelled."""
        idle = 0  # rounds
        while True:
            await trio.sleep(REFRESH_SECONDS)
            span = self.dispatch.served_span
            if self._announced is None or span is None:
                continue
            engine = span.listener.engine
            idle = idle + 1 if engine.rates.relax() else 0
            if idle % MEASURE_ROUNDS == 1:
                await engine.measure_again()
            async with self._announcing:
                if span is not self.dispatch.served_span or self._announced is None:
                    continue
                if not _about_equal(self._announced, now := self.now(span)):
                    self._announced = now
                    await self.directory.announce(now)


def _about_equal(announced: Record, now: Record) -> bool:
    """Whether a client that believes the announced record is not far wrong."""
    numbers = (
        (1 + announced.queue, 1 + now.queue),
        (announced.seconds_per_block, now.seconds_per_block),
        (announced.prefill_seconds_per_token, now.prefill_seconds_per_token),
        (announced.cache_tokens, now.cache_tokens),
    )
    return all(abs(a - b) <= TOLERANCE * max(a, b) for a, b in numbers)
