"""Serves one span after the other: what a node does between joining and leaving the swarm.

The moves are decided elsewhere (`node.balancer`).  Here is what one takes: the sessions are moved to
other servers by their clients, the new span is loaded, beside the old one where there is memory for
both, and if it cannot be loaded the old one is served again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from node.balancer import MoveFailed
from node.compute import ComputeThread
from node.config import ConfigError
from node.serving.door import Door
from node.serving.stint import LOAD_FAULTS, Means, Offer, Stint, forget_unused, load_stint
from routing.names import PeerId
from routing.records import Record
from routing.swarm import SwarmView

log = logging.getLogger("raceme")

REFRESH_SECONDS = 5.0  # between looks at whether our record still tells the truth
LOOK_ROUNDS = 6  # of these: as often an idle node measures how fast it is
TRUE_ENOUGH = 0.2  # a rate or a count that differs by less needs no new record


class Announcer(Protocol):
    """What is used of `node.network.directory.Directory`."""

    peer_id: PeerId

    def view(self) -> SwarmView:
        """The swarm as known now."""

    async def announce(self, record: Record) -> None:
        """Say this of ourselves."""


Load = Callable[[Means, Offer, ComputeThread], Awaitable[Stint]]


@dataclass(slots=True)
class Server:
    """Serves a span, and another one when told to.

    nursery: for the computing.  came_online: called with the new offer whenever a span is served.
    load: makes a stint, `load_stint`.
    """

    means: Means
    directory: Announcer
    compute: ComputeThread
    nursery: trio.Nursery
    came_online: Callable[[Offer], None]
    load: Load = load_stint
    door: Door = field(init=False)
    _said: Record | None = None  # while it is to be kept true

    def __post_init__(self) -> None:
        self.door = Door(self.means.limits)

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return 0 if self.door.stint is None else self.door.stint.listener.session_count

    async def begin(self, start: int, stop: int) -> None:
        """Load the first span and serve it.  Raises ConfigError."""
        offer = self.means.offer(start, stop)
        await self.directory.announce(offer.record("joining"))
        stint = await self.load(self.means, offer, self.compute)
        self.nursery.start_soon(stint.run)
        await self._open(stint)

    async def leave(self) -> None:
        """Serve what is there to its end, and nothing new.  Bounded."""
        self._said = None
        if self.door.stint is not None:
            await self.directory.announce(self.door.stint.record("draining"))
            await self.door.stint.drain()

    async def keep_record_true(self) -> None:
        """Announce anew when what we said of our speed and room has become wrong, until cancelled."""
        idle = 0  # rounds
        while True:
            await trio.sleep(REFRESH_SECONDS)
            stint = self.door.stint
            if self._said is None or stint is None:
                continue
            engine = stint.listener.engine
            idle = idle + 1 if engine.rates.relax() else 0
            if idle % LOOK_ROUNDS == 1:
                await engine.look_again()
            now = stint.record("online")
            if stint is self.door.stint and self._said is not None and not _about_equal(self._said, now):
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
        self._said = None
        await self.directory.announce(self.means.offer(start, stop).record("joining"))

    async def stay(self) -> None:
        """Say again that we serve what we serve."""
        self._said = self._current().record("online")
        await self.directory.announce(self._said)

    async def move(self, start: int, stop: int) -> None:
        """Hand our sessions over, and serve these blocks.

        Raises MoveFailed: the old ones are served again.  ConfigError: neither can be loaded.
        """
        old, offer = self._current(), self.means.offer(start, stop)
        try:
            await trio.to_thread.run_sync(self.means.fetch, start, stop)
        except (ConfigError, OSError) as error:
            await self.stay()
            raise MoveFailed(str(error)) from error
        log.info("moving: %d sessions are open", self.session_count)
        await old.drain()
        both = await self._room_for_both(offer)
        if both:
            await self._exchange(old, offer)
            return
        before = old.offer
        await self._close(old)
        del old
        await self._load_alone(offer, before)

    def _current(self) -> Stint:
        assert self.door.stint is not None, "nothing is served"
        return self.door.stint

    async def _room_for_both(self, offer: Offer) -> bool:
        try:
            await self.compute.run(self.means.check_room, offer.stop - offer.start)
        except ConfigError:
            return False
        return True

    async def _exchange(self, old: Stint, offer: Offer) -> None:
        """Load the new span before the old one is dropped.  Raises MoveFailed."""
        try:
            new = await self.load(self.means, offer, self.compute)
        except LOAD_FAULTS as error:
            old.reopen()
            await self._open(old)
            raise MoveFailed(str(error)) from error
        await self._close(old)
        self.nursery.start_soon(new.run)
        await self._open(new)

    async def _load_alone(self, offer: Offer, before: Offer) -> None:
        """Load the new span, or again the one before.  Raises MoveFailed, ConfigError."""
        failure: BaseException | None = None
        try:
            stint = await self.load(self.means, offer, self.compute)
        except LOAD_FAULTS as error:
            failure = error
            log.warning("blocks %d:%d could not be loaded: %s", offer.start, offer.stop, error)
            stint = await self._load_again(before)
        self.nursery.start_soon(stint.run)
        await self._open(stint)
        if failure is not None:
            raise MoveFailed(str(failure)) from failure

    async def _load_again(self, before: Offer) -> Stint:
        await self.compute.run(forget_unused, self.means.device)
        try:
            return await self.load(self.means, before, self.compute)
        except LOAD_FAULTS as error:
            blocks = f"{before.start}:{before.stop}"
            raise ConfigError(
                f"blocks {blocks} were left for others, and neither could be loaded: {error}"
            ) from error

    async def _open(self, stint: Stint) -> None:
        self.door.stint = stint
        self._said = stint.record("online")
        await self.directory.announce(self._said)
        gc.freeze()  # what is there now stays: later collections need not look at a million objects
        self.came_online(stint.offer)

    async def _close(self, stint: Stint) -> None:
        self.door.stint = None
        await stint.end()
        del stint
        await self.compute.run(forget_unused, self.means.device)


def _about_equal(said: Record, now: Record) -> bool:
    """Whether a client that believes `said` is not far wrong."""
    numbers = (
        (1 + said.queue, 1 + now.queue),
        (said.seconds_per_block, now.seconds_per_block),
        (said.prefill_seconds_per_token, now.prefill_seconds_per_token),
        (said.cache_tokens, now.cache_tokens),
    )
    return all(abs(a - b) <= TRUE_ENOUGH * max(a, b) for a, b in numbers)
