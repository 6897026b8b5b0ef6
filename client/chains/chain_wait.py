"""Waiting for a chain: the one loop of openings, repairs and requests without a session."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from routing.chains.hops import Chain, NoChain
from routing.chains.load_sharing import rendezvous
from routing.names import PeerId
from routing.view.view import SwarmView

LOOK_AGAIN_SECONDS = 0.5  # between looks for a chain while there is none
FIND_AGAIN_SECONDS = 10.0  # between searches for peers that the neighbours do not know
PING_SECONDS = 1.0  # to wait for the peers' answers, where no choice is possible without them
PINGED_PEERS = 16  # candidates whose round trip is measured before a chain is chosen
CHOICES = 4  # of a chain with an unknown peer in it


@dataclass(slots=True)
class ViewChanges:
    """Waits for another view of the swarm.

    changed_since: returns when the view is another one.
    find_peers: looks for peers that the neighbours do not know, bounded; may be None.
    """

    changed_since: Callable[[SwarmView], Awaitable[None]]
    find_peers: Callable[[], Awaitable[object]] | None = None
    _seen: SwarmView | None = None  # at the last choice
    _found_at: float = -math.inf

    def look(self, view: SwarmView) -> None:
        """Note that a choice uses this view."""
        self._seen = view

    async def wait(self, seconds: float) -> None:
        """Wait until the view differs from the last look, or the seconds are over.

        Periodically it searches for peers instead.
        """
        now = trio.current_time()
        with trio.move_on_after(max(0.0, seconds)):
            if self.find_peers is not None and now - self._found_at > FIND_AGAIN_SECONDS:
                self._found_at = now
                await self.find_peers()
            elif self._seen is not None:
                await self.changed_since(self._seen)


class Pings(Protocol):
    """Measures round trips.  See `node.network.directory.directory.Directory`."""

    async def measure(
        self, peers: Sequence[PeerId], seconds: float, enough: Callable[[Collection[PeerId]], bool]
    ) -> object:
        """Ping peers until the answers are `enough`, or the time is over."""

    def unknown(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """The peers without a known answer or silence."""


async def measure_candidates(
    pings: Pings, peers: Sequence[PeerId], client: str, is_enough: Callable[[Collection[PeerId]], bool]
) -> None:
    """Measure the round trips to the possible first and last peers of a chain.

    At most PINGED_PEERS are measured, different ones for each client.  Waits only until the answers are
    enough.
    """
    if len(peers) > PINGED_PEERS:
        peers = rendezvous(client, peers, PINGED_PEERS)
    await pings.measure(peers, PING_SECONDS, is_enough)


async def choose_among_the_living(pings: Pings, choose: Callable[[], Chain]) -> Chain:
    """A choice after its peers have been asked, if nothing was known of them.  Raises NoChain."""
    chain = choose()
    for _ in range(CHOICES - 1):
        unknown = pings.unknown(hop.peer for hop in chain.hops)
        if not unknown:
            break
        await pings.measure(unknown, PING_SECONDS, lambda _: True)
        chain = choose()
    return chain


async def wait_for_chain(
    choose: Callable[[bool], Awaitable[Chain]],
    changed: Callable[[float], Awaitable[object]],
    deadline: float = math.inf,
) -> Chain:
    """The first chain that can be chosen.  deadline: on trio's clock.  Raises NoChain when it has passed.

    choose: takes True from LOOK_AGAIN_SECONDS on: then peers that failed lately may be used.
    changed: waits for news of the swarm, at most the seconds that it is given.
    """
    last_resort_at = trio.current_time() + LOOK_AGAIN_SECONDS
    while True:
        now = trio.current_time()
        try:
            return await choose(now >= last_resort_at)
        except NoChain:
            if trio.current_time() >= deadline:
                raise
        look_at = last_resort_at if now < last_resort_at else now + LOOK_AGAIN_SECONDS
        await changed(min(look_at, deadline) - trio.current_time())
