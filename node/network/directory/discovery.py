"""Finds servers of a model that no neighbour knows, by a Kademlia table."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import trio

from node.network.directory.live_view import LiveView
from node.network.directory.neighbours import DIALS_AT_ONCE, Neighbours
from node.network.directory.turns import Turns
from routing.names import PeerId
from routing.view.records import Record

FIND_SECONDS = 5.0
LOOKUP_SHARE = 0.5  # of that time, for the table; the rest is for the peers that it names
MOST_MET = 24  # peers of one look into the table that are asked for their view
LATE_SECONDS = 0.5  # without an answer, until the next one is asked as well: it may be silent for long
DISCOVER_SECONDS = 60.0  # between looks into the Kademlia table


class Finder(Protocol):
    """A Kademlia table.  Neither method raises errors of the network."""

    async def provide(self, revision: str) -> None:
        """Write into the table that this node serves the model revision."""

    async def find(self, revision: str, seconds: float) -> Mapping[PeerId, tuple[str, ...]]:
        """The peers that the table names within `seconds`, the best first, with their addresses."""


class Discovery:
    """Looks into the table and asks the peers that it names for their view.  finder: None for no table."""

    def __init__(
        self,
        peer_id: PeerId,
        view: LiveView,
        neighbours: Neighbours,
        finder: Finder | None,
        rng: random.Random,
    ) -> None:
        self._peer_id = peer_id
        self._view = view
        self._neighbours = neighbours
        self._finder = finder
        self._rng = rng

    async def find_peers(self, revision: str, seconds: float = FIND_SECONDS) -> tuple[Record, ...]:
        """The online servers of a model revision, after a look into the Kademlia table.

        Peers found there are asked for their view.  Without a table, or without its answer in `seconds`,
        only the neighbours' records count.
        """
        if self._finder is not None:
            with trio.move_on_after(seconds):
                await self._meet(await self._finder.find(revision, seconds * LOOKUP_SHARE))
        return self._view.view().spans(revision)

    async def run(self, served_revision: Callable[[], str | None]) -> None:
        """Write the served revision into the table, and find peers there that no neighbour knows."""
        while self._finder is not None:
            view, revision = self._view.view(), served_revision()
            if revision is not None:
                await self._finder.provide(revision)
                await self.find_peers(revision)
                await trio.sleep(DISCOVER_SECONDS * self._rng.uniform(0.8, 1.2))
            else:
                await self._view.changed(view)

    async def _meet(self, found: Mapping[PeerId, tuple[str, ...]]) -> None:
        """Ask the peers without a record for their view, in this order, a few at once."""
        turns = Turns(DIALS_AT_ONCE, LATE_SECONDS)

        async def meet(peer: PeerId) -> None:
            if self._view.view().get(peer) is None:
                await self._neighbours.ask_once(peer, found[peer])

        view = self._view.view()
        async with trio.open_nursery() as nursery:
            for peer in list(found)[:MOST_MET]:
                if (
                    peer != self._peer_id
                    and view.get(peer) is None
                    and self._neighbours.retries.may_dial(peer)
                ):
                    nursery.start_soon(turns.run, partial(meet, peer))
