"""The waits of a server that starts in a local network: for a first peer, for those that start with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from node.network.directory.visits import Meeting
from routing.names import PeerId

# Our announcement takes 2 s, the answer of a node that is there 0.5 s (seen).  A node that started a second
# after us is heard of in the time after our announcement.
LOOK_SECONDS, QUIET_SECONDS = 10.0, 1.5
SETTLE_SECONDS = 4.0  # for the blocks of nodes that start at this moment: they check their models' files


class Start:
    """What has happened in the local network since this node came.

    announced: this node is; failed: nobody will be found at present.
    """

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self.announced = trio.Event()
        self.failed = trio.Event()
        self._known = trio.Event()  # a peer with a record
        self._starting: set[PeerId] = set()  # peers that answer and have no record yet
        self._under_way = 0
        self._news = trio.Event()

    def begins(self) -> None:
        """A meeting with a peer begins."""
        self._under_way += 1

    def over(self) -> None:
        """It is over, or given up."""
        self._under_way -= 1
        self._tell()

    def met(self, peer: PeerId, outcome: Meeting) -> None:
        """The outcome of a meeting, or a record that came by itself."""
        self._starting.discard(peer)
        if outcome == "known":
            self._known.set()
        elif outcome == "starting":
            self._starting.add(peer)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def first_peer(self) -> bool:
        """Wait for a peer of the swarm, LOOK_SECONDS at most; whether there is one.

        The wait ends soon after our own announcement where nobody has answered it and no dial is under way.
        """
        with trio.move_on_after(LOOK_SECONDS):
            async with trio.open_nursery() as nursery:
                for wait in (self._known.wait, self.failed.wait, self._quiet):
                    nursery.start_soon(_cancel_after, wait, nursery.cancel_scope)
        return self._known.is_set() or bool(self._starting)

    async def _quiet(self) -> None:
        await self.announced.wait()
        await trio.sleep(QUIET_SECONDS)
        while self._under_way:
            await self._news.wait()

    async def settled(self) -> None:
        """Wait until peers that start at this moment have said what they will serve, SETTLE_SECONDS at most.

        Of several the one with the least id waits for nobody, and is waited for.
        """
        with trio.move_on_after(SETTLE_SECONDS):
            while any(peer < self._own for peer in self._starting):
                await self._news.wait()


async def _cancel_after(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()
