"""Serves one span after the other: the node's work between joining and leaving the swarm.

Moves are decided elsewhere (`node.serving.balancer`) and carried out here.  Blocks that the old and the new
span share are served all the time, and their sessions stay.  Only the missing blocks are loaded: at once
where memory holds all of them, else after the node has given back the blocks that it leaves.  A new span
without a block of the old one is loaded besides the old one; where memory is short, after the old one has
ended: only then nothing is served for a while.  Clients move the sessions of blocks that the node leaves to
other servers.  If the new blocks cannot be loaded, the old ones are served again.

The node's record always names the served blocks, and the blocks of a coming move.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import trio

from node.config import ConfigError
from node.runtime.compute_thread import Runner
from node.serving.mover import MoveFailed
from node.serving.own_record import Announcer, OwnRecord
from node.serving.served_span import ServedSpan, ServingSetup, StreamDispatch, load_blocks, load_served_span
from node.serving.span_loader import Load, LoadBlocks, SpanLoader
from routing.blocks import Blocks
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.span_spec import SpanSpec

log = logging.getLogger("raceme")


@dataclass(slots=True)
class Server:
    """Serves a span, and another one after a move.

    nursery: for the computing.  came_online: called with the spec of each span that is served.
    moving: blocks of two spans may be in memory.  moves, moves_failed: so far.
    """

    setup: ServingSetup
    directory: Announcer
    compute: Runner
    nursery: trio.Nursery
    came_online: Callable[[SpanSpec], None]
    load: Load = load_served_span
    load_blocks: LoadBlocks = load_blocks
    moving: bool = field(default=False, init=False)
    moves: int = field(default=0, init=False)
    moves_failed: int = field(default=0, init=False)
    dispatch: StreamDispatch = field(init=False)
    _own: OwnRecord = field(init=False)
    _loader: SpanLoader = field(init=False)

    def __post_init__(self) -> None:
        self.dispatch = StreamDispatch(self.setup.limits, self.setup.meters)
        self._own = OwnRecord(self.setup, self.directory, self.dispatch)
        self._loader = SpanLoader(self.setup, self.compute, self.load, self.load_blocks)

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return sum(span.listener.session_count for span in self.dispatch.served_spans)

    async def begin(self, blocks: Blocks) -> None:
        """Load the first span and serve it.  Raises ConfigError, and torch's out-of-memory errors."""
        await self._own.announce_joining(blocks)
        await self._open(await self.load(self.setup, blocks, self.compute))
        self._settled()

    async def leave(self) -> None:
        """Finish the open sessions, and admit no new ones.  Bounded."""
        await self._own.announce_draining()
        async with trio.open_nursery() as nursery:
            for span in self.dispatch.served_spans:
                nursery.start_soon(span.drain)

    async def keep_record_true(self) -> None:
        """See `OwnRecord.keep_true`."""
        await self._own.keep_true()

    # --- for the balancer ---

    def view(self) -> SwarmView:
        """The swarm as known now."""
        return self.directory.view()

    def record(self) -> Record:
        """The node's record while it serves; a move under way is left out."""
        return self._own.serving(self._current())

    async def announce_move(self, blocks: Blocks) -> None:
        """Say that the node is about to serve these blocks; the present ones are served meanwhile."""
        self._own.plan(blocks)
        await self._own.announce()

    async def stay(self) -> None:
        """Say that the node goes on with the blocks that it serves."""
        self._own.plan(None)
        await self._own.announce()

    async def move(self, blocks: Blocks) -> None:
        """Serve these blocks, and hand over the sessions of the blocks that the node leaves.

        Raises MoveFailed: the old blocks are served again, or as many of them as can be loaded.
        Raises ConfigError: nothing can be loaded.
        """
        self.moving = True
        try:
            await self._move(blocks)
            self.moves += 1
        except MoveFailed:
            self.moves_failed += 1
            raise
        finally:
            self.moving = False

    async def _move(self, blocks: Blocks) -> None:
        old = self._current().spec.blocks
        self._own.plan(blocks)
        try:
            await trio.to_thread.run_sync(self.setup.fetch, blocks)
        except (ConfigError, OSError) as error:
            await self._fail_move(str(error))
        log.info("moving: %d sessions are open", self.session_count)
        missing = blocks.minus(old)
        fits = await self._loader.fits(missing)
        if missing == (blocks,):
            await (self._exchange(blocks) if fits else self._load_alone(blocks, old))
        elif fits:
            await self._load_first(blocks, missing)
        else:
            await self._leave_first(blocks, old)

    def _current(self) -> ServedSpan:
        assert self.dispatch.served_span is not None, "nothing is served"
        return self.dispatch.served_span

    async def _load_first(self, blocks: Blocks, missing: Sequence[Blocks]) -> None:
        """Load the missing blocks besides all that is served, then leave the others.  Raises MoveFailed."""
        if (failure := await self._loader.extend(self._current(), missing)) is not None:
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
        if not await self._loader.fits(missing):
            return await self._load_alone(blocks, old)
        failure = await self._loader.extend(self._current(), missing)
        if failure is not None:
            self._own.plan(None)
            again = await self._loader.extend(self._current(), old.minus(kept))
            blocks = old if again is None else kept
        await self._serve_only(blocks)
        self._settled()
        if failure is not None:
            raise MoveFailed(f"{failure}; serving blocks {blocks}")
        return None

    async def _give_back(self) -> None:
        """Hand over the sessions of blocks that are served no longer, and forget these blocks' weights."""
        await self._current().hand_over_others()
        await self._current().give_back(self.compute)
        await self._loader.forget()

    async def _exchange(self, blocks: Blocks) -> None:
        """Load a new span besides the old one, then leave the old one.  Raises MoveFailed."""
        new = await self._loader.load_span(blocks, in_pieces=True)
        if isinstance(new, str):
            await self._fail_move(new)
        old = self.dispatch.leaving = self._current()
        await self._open(new)
        await old.drain()
        self.dispatch.leaving = None
        await old.end()
        del old
        await self._loader.forget()
        self._settled()

    async def _fail_move(self, failure: str) -> NoReturn:
        """Go on with the blocks that are served.  Raises MoveFailed."""
        await self.stay()
        raise MoveFailed(failure)

    async def _load_alone(self, blocks: Blocks, before: Blocks) -> None:
        """Leave all blocks, and load the new span; where that fails, the span before it again.

        Raises MoveFailed, ConfigError.
        """
        await self._own.announce_joining(blocks)
        await self._end()
        new = await self._loader.load_span(blocks)
        span = await self._loader.load_span(before) if isinstance(new, str) else new
        if isinstance(span, str):
            raise ConfigError(f"blocks {before} were left for others, and neither could be loaded: {span}")
        await self._open(span)
        self._settled()
        if isinstance(new, str):
            raise MoveFailed(new)

    async def _end(self) -> None:
        span = self._current()
        await span.drain()
        self.dispatch.served_span = None
        await span.end()
        del span
        await self._loader.forget()

    async def _open(self, span: ServedSpan) -> None:
        """Serve a span that has been loaded."""
        self.nursery.start_soon(span.run)
        self.dispatch.served_span = span
        await self.stay()

    async def _serve_only(self, blocks: Blocks) -> None:
        """Admit sessions of these blocks alone from now on, and announce that."""
        self._current().serve(self.setup.spec(blocks))
        self._own.reached(blocks)
        await self._own.announce()

    def _settled(self) -> None:
        """A move, or the start, has ended with the blocks that are served now."""
        gc.freeze()  # later collections need not look at a million objects
        self.came_online(self._current().spec)
