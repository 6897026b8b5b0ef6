"""Serves one span after the other: what a node does between joining and leaving the swarm.

The moves are decided elsewhere (`node.serving.balancer`).  Here is what one takes.  Where the new span has
blocks of the old one, these are served all the time, and their sessions stay; only the missing blocks
are loaded: first, where there is memory for all, else when those that are left have been given back.
Where the spans have nothing in common the new one is loaded beside the old one, or, without the memory
for that, after it: only then is nothing served meanwhile.  Sessions of blocks that are left are moved
to other servers by their clients.  If the new blocks cannot be loaded the old ones are served again.

What we announce is always what is served, and where we are going.
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
from node.serving.balancer import MoveFailed
from node.serving.served_span import (
    LOAD_FAULTS,
    Offer,
    ServedSpan,
    ServingSetup,
    StreamDispatch,
    forget_unused,
    load_blocks,
    load_served_span,
)
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView

log = logging.getLogger("raceme")

REFRESH_SECONDS = 5.0  # between looks at whether our record still tells the truth
LOOK_ROUNDS = 6  # of these: as often an idle node measures how fast it is
TRUE_ENOUGH = 0.2  # a rate or a count that differs by less needs no new record


class Announcer(Protocol):
    """What is used of `node.network.directory.directory.Directory`."""

    peer_id: PeerId

    def view(self) -> SwarmView:
        """The swarm as known now."""

    async def announce(self, record: Record) -> None:
        """Say this of ourselves."""


class Load(Protocol):
    """Makes a stint: `load_served_span`."""

    async def __call__(
        self, setup: ServingSetup, offer: Offer, compute: ComputeThread, *, in_pieces: bool = False
    ) -> ServedSpan:
        """Raises LOAD_FAULTS."""


LoadBlocks = Callable[[ServingSetup, Offer, ComputeThread], Awaitable[Sequence[Span]]]


@dataclass(slots=True)
class Server:
    """Serves a span, and another one when told to.

    nursery: for the computing.  came_online: called with the new offer whenever a span is served.
    """

    setup: ServingSetup
    directory: Announcer
    compute: ComputeThread
    nursery: trio.Nursery
    came_online: Callable[[Offer], None]
    load: Load = load_served_span
    load_blocks: LoadBlocks = load_blocks
    dispatch: StreamDispatch = field(init=False)
    _said: Record | None = None  # while it is to be kept true
    _going: tuple[int, int] | None = None  # to these blocks
    _saying: trio.Lock = field(default_factory=trio.Lock)  # else an older record might overtake a newer one

    def __post_init__(self) -> None:
        self.dispatch = StreamDispatch(self.setup.limits)

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return sum(served_span.listener.session_count for served_span in self.dispatch.served_spans)

    async def begin(self, start: int, stop: int) -> None:
        """Load the first span and serve it.  Raises ConfigError."""
        offer = self.setup.offer(start, stop)
        await self._say_joining(offer)
        served_span = await self.load(self.setup, offer, self.compute)
        await self._open(served_span)
        self._settled()

    async def leave(self) -> None:
        """Serve what is there to its end, and nothing new.  Bounded."""
        async with self._saying:
            self._said = None
            if self.dispatch.served_span is not None:
                await self.directory.announce(self.dispatch.served_span.record("draining"))
        async with trio.open_nursery() as nursery:
            for served_span in self.dispatch.served_spans:
                nursery.start_soon(served_span.drain)

    async def keep_record_true(self) -> None:
        """Announce anew when what we said of our speed and room has become wrong, until cancelled."""
        idle = 0  # rounds
        while True:
            await trio.sleep(REFRESH_SECONDS)
            served_span = self.dispatch.served_span
            if self._said is None or served_span is None:
                continue
            engine = served_span.listener.engine
            idle = idle + 1 if engine.rates.relax() else 0
            if idle % LOOK_ROUNDS == 1:
                await engine.measure_again()
            async with self._saying:
                if served_span is not self.dispatch.served_span or self._said is None:
                    continue
                if not _about_equal(self._said, now := self._truth()):
                    self._said = now
                    await self.directory.announce(now)

    # --- what the balancer asks for ---

    def view(self) -> SwarmView:
        """The swarm as known now."""
        return self.directory.view()

    def record(self) -> Record:
        """What we say of ourselves while we serve."""
        return replace(self._current().record("online"), peer=self.directory.peer_id)

    async def announce_move(self, start: int, stop: int) -> None:
        """Say that we are about to serve these blocks; what we serve, we go on serving."""
        self._going = (start, stop)
        await self._say()

    async def stay(self) -> None:
        """Say again that we serve what we serve."""
        self._going = None
        await self._say()

    async def move(self, start: int, stop: int) -> None:
        """Serve these blocks, and hand over the sessions of those that are left.

        Raises MoveFailed: the old ones are served again, or as many of them as can be.  ConfigError:
        nothing can be loaded.
        """
        old, offer = self._current().offer, self.setup.offer(start, stop)
        self._going = (start, stop)
        try:
            await trio.to_thread.run_sync(self.setup.fetch, start, stop)
        except (ConfigError, OSError) as error:
            await self._stay_without(str(error))
        log.info("moving: %d sessions are open", self.session_count)
        missing = _without(offer, old)
        room = await self._has_room(missing)
        if missing == [offer]:
            await (self._exchange(offer) if room else self._load_alone(offer, old))
        elif room:
            await self._load_first(offer, missing)
        else:
            await self._leave_first(offer, old)

    def _current(self) -> ServedSpan:
        assert self.dispatch.served_span is not None, "nothing is served"
        return self.dispatch.served_span

    async def _has_room(self, offers: Sequence[Offer]) -> bool:
        """Whether these blocks fit beside what is loaded."""
        try:
            await self.compute.run(self.setup.check_room, sum(offer.stop - offer.start for offer in offers))
        except ConfigError:
            return False
        return True

    async def _load_first(self, offer: Offer, missing: Sequence[Offer]) -> None:
        """Load what is missing beside all that is served, and leave the rest then.  Raises MoveFailed."""
        if (failure := await self._take_up(missing)) is not None:
            await self._stay_without(failure)
        await self._offer(offer)
        await self._give_back()
        self._settled()

    async def _leave_first(self, offer: Offer, old: Offer) -> None:
        """Leave what is not wanted any more, and load what is missing then.

        Raises MoveFailed, ConfigError.
        """
        kept = replace(offer, start=max(old.start, offer.start), stop=min(old.stop, offer.stop))
        missing = _without(offer, kept)
        await self._offer(kept)
        await self._give_back()
        if not await self._has_room(missing):
            return await self._load_alone(offer, old)
        failure = await self._take_up(missing)
        if failure is not None:
            self._going = None
            again = await self._take_up(_without(old, kept))
            offer = old if again is None else kept
        await self._offer(offer)
        self._settled()
        if failure is not None:
            raise MoveFailed(f"{failure}; serving blocks {offer.start}:{offer.stop}")
        return None

    async def _take_up(self, missing: Sequence[Offer]) -> str | None:
        """Load blocks next to those that we have; why not, where that fails, and nothing is changed then."""
        failure = None
        try:
            fresh = [s for run in missing for s in await self.load_blocks(self.setup, run, self.compute)]
            await self._current().take_up(fresh, self.compute)
        except LOAD_FAULTS as error:
            failure = str(error)
        if failure is not None:  # by now the error holds nothing of what was loaded
            runs = ", ".join("{}:{}".format(*_run(offer)) for offer in missing)
            log.warning("blocks %s could not be loaded: %s", runs, failure)
            await self.compute.run(forget_unused, self.setup.device)
        return failure

    async def _give_back(self) -> None:
        """Of the blocks that are offered no longer: hand the sessions over, and forget the weights."""
        await self._current().hand_over_others()
        await self._current().give_back(self.compute)
        await self.compute.run(forget_unused, self.setup.device)

    async def _exchange(self, offer: Offer) -> None:
        """Load a new span beside the old one, which is left then.  Raises MoveFailed."""
        failure = None
        try:
            new = await self.load(self.setup, offer, self.compute, in_pieces=True)
        except LOAD_FAULTS as error:
            failure = str(error)
        if failure is not None:
            await self.compute.run(forget_unused, self.setup.device)
            await self._stay_without(failure)
        old = self.dispatch.leaving = self._current()
        await self._open(new)
        await old.drain()
        self.dispatch.leaving = None
        await old.end()
        del old
        await self.compute.run(forget_unused, self.setup.device)
        self._settled()

    async def _stay_without(self, failure: str) -> NoReturn:
        """Go on with what is served.  Raises MoveFailed."""
        await self.stay()
        raise MoveFailed(failure)

    async def _load_alone(self, offer: Offer, before: Offer) -> None:
        """Leave all that is served, and load the new span, or again the one before.

        Raises MoveFailed, ConfigError.
        """
        await self._say_joining(offer)
        await self._end()
        failure = None
        try:
            served_span = await self.load(self.setup, offer, self.compute)
        except LOAD_FAULTS as error:
            failure = str(error)
        if failure is not None:  # by now the error holds nothing of what was loaded
            log.warning("blocks %d:%d could not be loaded: %s", *_run(offer), failure)
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

    async def _load_again(self, before: Offer) -> ServedSpan:
        await self.compute.run(forget_unused, self.setup.device)
        try:
            return await self.load(self.setup, before, self.compute)
        except LOAD_FAULTS as error:
            blocks = f"{before.start}:{before.stop}"
            raise ConfigError(
                f"blocks {blocks} were left for others, and neither could be loaded: {error}"
            ) from error

    async def _open(self, served_span: ServedSpan) -> None:
        """Serve a span that was loaded for it."""
        self.nursery.start_soon(served_span.run)
        self.dispatch.served_span, self._going = served_span, None
        await self._say()

    async def _offer(self, offer: Offer) -> None:
        """Take sessions of these blocks alone from now on, and say so."""
        self._current().offers(offer)
        if self._going == _run(offer):
            self._going = None
        await self._say()

    def _settled(self) -> None:
        """What is served now stays."""
        gc.freeze()  # later collections need not look at a million objects
        self.came_online(self._current().offer)

    async def _say(self) -> None:
        """Announce what is served, and where we are going; from now on it is kept true."""
        async with self._saying:
            self._said = self._truth()
            await self.directory.announce(self._said)

    def _truth(self) -> Record:
        record = self._current().record("online")
        if self._going is None:
            return record
        return replace(record, next_start=self._going[0], next_stop=self._going[1])

    async def _say_joining(self, offer: Offer) -> None:
        """Say that nothing is served until these blocks are loaded."""
        async with self._saying:
            self._said = None
            await self.directory.announce(offer.record("joining"))


def _run(offer: Offer) -> tuple[int, int]:
    return offer.start, offer.stop


def _without(offer: Offer, there: Offer) -> list[Offer]:
    """The runs of blocks of an offer that are not in another one."""
    runs = (offer.start, min(offer.stop, there.start)), (max(offer.start, there.stop), offer.stop)
    if there.stop <= offer.start or offer.stop <= there.start:
        return [offer]
    return [replace(offer, start=start, stop=stop) for start, stop in runs if start < stop]


def _about_equal(said: Record, now: Record) -> bool:
    """Whether a client that believes `said` is not far wrong."""
    numbers = (
        (1 + said.queue, 1 + now.queue),
        (said.seconds_per_block, now.seconds_per_block),
        (said.prefill_seconds_per_token, now.prefill_seconds_per_token),
        (said.cache_tokens, now.cache_tokens),
    )
    return all(abs(a - b) <= TRUE_ENOUGH * max(a, b) for a, b in numbers)
