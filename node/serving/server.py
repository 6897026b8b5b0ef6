"""Serves one span after the other: what a node does between joining and leaving the swarm.

Moves are decided elsewhere (`node.serving.balancer`) and carried out here.  Blocks that the old and the new
span share are served all the time, and their sessions stay.  Only the missing blocks are loaded: at once
where memory holds all of them, else after the node has given back the blocks that it leaves.  A new span
without a block of the old one is loaded besides the old one; where memory is short, after the old one has
ended: only then nothing is served for a while.  Clients move the sessions of blocks that the node leaves to
other servers.  If the new blocks cannot be loaded, the old ones are served again.

The node's record always says what is served, and where the node is going.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import trio

from node.config import ConfigError
from node.model.blocks.span import Span
from node.runtime.compute_thread import ComputeThread
from node.serving.mover import MoveFailed
from node.serving.served_span import (
    LOAD_FAULTS,
    ServedSpan,
    ServingSetup,
    StreamDispatch,
    forget_unused,
    load_blocks,
    load_served_span,
)
from routing.blocks import Blocks
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.span_spec import SpanSpec

log = logging.getLogger("raceme")

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


class Load(Protocol):
    """Loads a span to be served: `load_served_span`."""

    async def __call__(
        self, setup: ServingSetup, blocks: Blocks, compute: ComputeThread, *, in_pieces: bool = False
    ) -> ServedSpan:
        """Raises LOAD_FAULTS."""


LoadBlocks = Callable[[ServingSetup, Blocks, ComputeThread], Awaitable[Sequence[Span]]]


@dataclass(slots=True)
class Server:
    """Serves a span, and another one after a move.

    nursery: for the computing.  came_online: called with the spec of each span that is served.
    """

    setup: ServingSetup
    directory: Announcer
    compute: ComputeThread
    nursery: trio.Nursery
    came_online: Callable[[SpanSpec], None]
    load: Load = load_served_span
    load_blocks: LoadBlocks = load_blocks
    dispatch: StreamDispatch = field(init=False)
    _announced: Record | None = None  # the record that `keep_record_true` keeps true; None: none now
    _next: Blocks | None = None  # the blocks of the move under way
    _announcing: trio.Lock = field(default_factory=trio.Lock)  # keeps an older record from overtaking a newer

    def __post_init__(self) -> None:
        self.dispatch = StreamDispatch(self.setup.limits)

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return sum(span.listener.session_count for span in self.dispatch.served_spans)

    async def begin(self, blocks: Blocks) -> None:
        """Load the first span and serve it.  Raises ConfigError."""
        await self._announce_joining(blocks)
        served_span = await self.load(self.setup, blocks, self.compute)
        await self._open(served_span)
        self._settled()

    async def leave(self) -> None:
        """Finish the open sessions, and admit no new ones.  Bounded."""
        async with self._announcing:
            self._announced = None
            if self.dispatch.served_span is not None:
                await self.directory.announce(self.dispatch.served_span.record("draining"))
        async with trio.open_nursery() as nursery:
            for served_span in self.dispatch.served_spans:
                nursery.start_soon(served_span.drain)

    async def keep_record_true(self) -> None:
        """Announce anew when rates or free memory differ from the node's record, until cancelled."""
        idle = 0  # rounds
        while True:
            await trio.sleep(REFRESH_SECONDS)
            served_span = self.dispatch.served_span
            if self._announced is None or served_span is None:
                continue
            engine = served_span.listener.engine
            idle = idle + 1 if engine.rates.relax() else 0
            if idle % MEASURE_ROUNDS == 1:
                await engine.measure_again()
            async with self._announcing:
                if served_span is not self.dispatch.served_span or self._announced is None:
                    continue
                if not _about_equal(self._announced, now := self._present_record()):
                    self._announced = now
                    await self.directory.announce(now)

    # --- what the balancer asks for ---

    def view(self) -> SwarmView:
        """The swarm as known now."""
        return self.directory.view()

    def record(self) -> Record:
        """What the node says of itself while it serves."""
        return replace(self._current().record("online"), peer=self.directory.peer_id)

    async def announce_move(self, blocks: Blocks) -> None:
        """Say that the node is about to serve these blocks; the present ones are served meanwhile."""
        self._next = blocks
        await self._announce()

    async def stay(self) -> None:
        """Say that the node goes on with the blocks that it serves."""
        self._next = None
        await self._announce()

    async def move(self, blocks: Blocks) -> None:
        """Serve these blocks, and hand over the sessions of the blocks that the node leaves.

        Raises MoveFailed: the old blocks are served again, or as many of them as can be loaded.
        Raises ConfigError: nothing can be loaded.
        """
        old = self._current().spec.blocks
        self._next = blocks
        try:
            await trio.to_thread.run_sync(self.setup.fetch, blocks)
        except (ConfigError, OSError) as error:
            await self._fail_move(str(error))
        log.info("moving: %d sessions are open", self.session_count)
        missing = blocks.minus(old)
        fits = await self._has_room(missing)
        if missing == (blocks,):
            await (self._exchange(blocks) if fits else self._load_alone(blocks, old))
        elif fits:
            await self._load_first(blocks, missing)
        else:
            await self._leave_first(blocks, old)

    def _current(self) -> ServedSpan:
        assert self.dispatch.served_span is not None, "nothing is served"
        return self.dispatch.served_span

    async def _has_room(self, runs: Sequence[Blocks]) -> bool:
        """Whether these blocks fit besides what is loaded."""
        try:
            await self.compute.run(self.setup.check_room, sum(run.size for run in runs))
        except ConfigError:
            return False
        return True

    async def _load_first(self, blocks: Blocks, missing: Sequence[Blocks]) -> None:
        """Load the missing blocks besides all that is served, then leave the others.  Raises MoveFailed."""
        if (failure := await self._take_up(missing)) is not None:
            await self._fail_move(failure)
        await self._serve_only(blocks)
        await self._give_back()
        self._settled()

    async def _leave_first(self, blocks: Blocks, old: Blocks) -> None:
        """Leave the blocks that are not wanted any more, then load the missing ones.

        Raises MoveFailed, ConfigError.
        """
        kept = blocks.overlap(old)
        missing = blocks.minus(kept)
        await self._serve_only(kept)
        await self._give_back()
        if not await self._has_room(missing):
            return await self._load_alone(blocks, old)
        failure = await self._take_up(missing)
        if failure is not None:
            self._next = None
            again = await self._take_up(old.minus(kept))
            blocks = old if again is None else kept
        await self._serve_only(blocks)
        self._settled()
        if failure is not None:
            raise MoveFailed(f"{failure}; serving blocks {blocks}")
        return None

    async def _take_up(self, missing: Sequence[Blocks]) -> str | None:
        """Load blocks next to the present ones.  Where that fails: the reason, and nothing has changed."""
        failure = None
        try:
            fresh = [s for run in missing for s in await self.load_blocks(self.setup, run, self.compute)]
            await self._current().take_up(fresh, self.compute)
        except LOAD_FAULTS as error:
            failure = str(error)
        if failure is not None:  # by now the error holds nothing of what was loaded
            log.warning("blocks %s could not be loaded: %s", ", ".join(map(str, missing)), failure)
            await self.compute.run(forget_unused, self.setup.device)
        return failure

    async def _give_back(self) -> None:
        """Hand over the sessions of blocks that are served no longer, and forget these blocks' weights."""
        await self._current().hand_over_others()
        await self._current().give_back(self.compute)
        await self.compute.run(forget_unused, self.setup.device)

    async def _exchange(self, blocks: Blocks) -> None:
        """Load a new span besides the old one, then leave the old one.  Raises MoveFailed."""
        failure = None
        try:
            new = await self.load(self.setup, blocks, self.compute, in_pieces=True)
        except LOAD_FAULTS as error:
            failure = str(error)
        if failure is not None:
            await self.compute.run(forget_unused, self.setup.device)
            await self._fail_move(failure)
        old = self.dispatch.leaving = self._current()
        await self._open(new)
        await old.drain()
        self.dispatch.leaving = None
        await old.end()
        del old
        await self.compute.run(forget_unused, self.setup.device)
        self._settled()

    async def _fail_move(self, failure: str) -> NoReturn:
        """Go on with the blocks that are served.  Raises MoveFailed."""
        await self.stay()
        raise MoveFailed(failure)

    async def _load_alone(self, blocks: Blocks, before: Blocks) -> None:
        """Leave all blocks, and load the new span; where that fails, the span before it again.

        Raises MoveFailed, ConfigError.
        """
        await self._announce_joining(blocks)
        await self._end()
        failure = None
        try:
            served_span = await self.load(self.setup, blocks, self.compute)
        except LOAD_FAULTS as error:
            failure = str(error)
        if failure is not None:  # by now the error holds nothing of what was loaded
            log.warning("blocks %s could not be loaded: %s", blocks, failure)
            served_span = await self._load_again(before)
        await self._open(served_span)
        self._settled()
        if failure is not None:
            raise MoveFailed(failure)

    async def _end(self) -> None:
        served_span = self._current()
        await served_span.drain()
        self.dispatch.served_span = None
        await served_span.end()
        del served_span
        await self.compute.run(forget_unused, self.setup.device)

    async def _load_again(self, before: Blocks) -> ServedSpan:
        await self.compute.run(forget_unused, self.setup.device)
        try:
            return await self.load(self.setup, before, self.compute)
        except LOAD_FAULTS as error:
            raise ConfigError(
                f"blocks {before} were left for others, and neither could be loaded: {error}"
            ) from error

    async def _open(self, served_span: ServedSpan) -> None:
        """Serve a span that has been loaded."""
        self.nursery.start_soon(served_span.run)
        self.dispatch.served_span, self._next = served_span, None
        await self._announce()

    async def _serve_only(self, blocks: Blocks) -> None:
        """Admit sessions of these blocks alone from now on, and announce that."""
        self._current().serve(self.setup.spec(blocks))
        if self._next == blocks:
            self._next = None
        await self._announce()

    def _settled(self) -> None:
        """A move, or the start, has ended with the blocks that are served now."""
        gc.freeze()  # later collections need not look at a million objects
        self.came_online(self._current().spec)

    async def _announce(self) -> None:
        """Announce what is served, and where the node is going; from now on that record is kept true."""
        async with self._announcing:
            self._announced = self._present_record()
            await self.directory.announce(self._announced)

    def _present_record(self) -> Record:
        record = self._current().record("online")
        if self._next is None:
            return record
        return replace(record, next_start=self._next.start, next_stop=self._next.stop)

    async def _announce_joining(self, blocks: Blocks) -> None:
        """Say that nothing is served until these blocks are loaded."""
        async with self._announcing:
            self._announced = None
            await self.directory.announce(self.setup.record(self.setup.spec(blocks), "joining"))


def _about_equal(announced: Record, now: Record) -> bool:
    """Whether a client that believes the announced record is not far wrong."""
    numbers = (
        (1 + announced.queue, 1 + now.queue),
        (announced.seconds_per_block, now.seconds_per_block),
        (announced.prefill_seconds_per_token, now.prefill_seconds_per_token),
        (announced.cache_tokens, now.cache_tokens),
    )
    return all(abs(a - b) <= TOLERANCE * max(a, b) for a, b in numbers)
