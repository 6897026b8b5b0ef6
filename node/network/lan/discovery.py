"""Announces a node in its local network, and dials the peers of its swarm that announce themselves there."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from node.network.directory.visits import Meeting
from node.network.lan.announcement import LanPeer, interfaces_of, is_alone, write_announcement
from node.network.lan.lan_peers import LanPeers
from node.network.lan.multicast import LanError, Multicast, ZeroconfMulticast
from node.network.lan.start import Start
from node.runtime.nurseries import background_nursery
from routing.names import PeerId
from tensor_codec.limits import Limits

log = logging.getLogger(__name__)

Meet = Callable[[PeerId, Sequence[str]], Awaitable[Meeting]]
"""Exchange records with a peer at these addresses."""

ADDRESSES_SECONDS = 10.0  # between looks at the addresses of this machine, which costs nothing
AFTER_FAILURE_SECONDS = 60.0
CLOSE_SECONDS = 1.0  # a goodbye takes 0.4 s; a registration under way, 2 s, is left to the end of the process
WAITING_ANNOUNCEMENTS = 64  # from the library's thread to ours; older ones are lost under a flood


class LanDiscovery:
    """One node in its local network.  Made by `open_lan`.

    listening: the multiaddrs on which this node listens now.  make: a new `Multicast` for each set of
    interfaces.  start: the waits of a server that starts.
    """

    def __init__(
        self,
        peer: PeerId,
        swarm: str,
        listening: Callable[[], Sequence[str]],
        limits: Limits,
        make: Callable[[], Multicast],
    ) -> None:
        self._peer = peer
        self._swarm = swarm
        self._listening = listening
        self._limits = limits
        self._make = make
        self._peers = LanPeers(peer, swarm, limits, trio.current_time())
        self._token = trio.lowlevel.current_trio_token()
        self._texts: deque[bytes] = deque(maxlen=WAITING_ANNOUNCEMENTS)
        self._heard = trio.Event()
        self.start = Start(peer)
        self._said: str | None = None

    async def run(self) -> None:
        """Announce this node, and listen, on the interfaces of the moment."""
        while True:
            listening = tuple(self._listening())
            if hosts := interfaces_of(listening):
                await self._stay(listening, hosts)
            else:
                if is_alone(listening):
                    self._say("this machine has no network")
                self.start.failed.set()
                await self._until_others_than(listening)

    async def _stay(self, listening: tuple[str, ...], hosts: tuple[str, ...]) -> None:
        """Be in the local network until this machine's addresses change."""
        multicast, one = self._make(), trio.CapacityLimiter(1)
        in_thread = partial(trio.to_thread.run_sync, limiter=one, abandon_on_cancel=True)
        port = int(listening[0].split("/")[4])
        try:
            await in_thread(multicast.open, hosts, self._take)
            text = write_announcement(self._peer, self._swarm, listening)
            await in_thread(multicast.announce, hosts, port, text)
            self.start.announced.set()
            self._said = None
            await self._until_others_than(listening)
        except LanError as error:
            self._say(str(error))
            self.start.failed.set()
            with trio.move_on_after(AFTER_FAILURE_SECONDS):
                await self._until_others_than(listening)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
                await in_thread(multicast.close)

    def _say(self, why: str) -> None:
        """Why there is no local network, once."""
        if why != self._said:
            log.info("nobody finds this node in the local network: %s", why)
        self._said = why

    async def _until_others_than(self, listening: tuple[str, ...]) -> None:
        """Wait until this machine has other addresses."""
        while tuple(self._listening()) == listening:  # noqa: ASYNC110  the kernel tells nobody here
            await trio.sleep(ADDRESSES_SECONDS)

    def _take(self, text: bytes) -> None:
        """Runs in the library's thread."""
        if len(text) > self._limits.max_lan_announcement_bytes:
            return
        self._texts.append(text)
        try:
            self._token.run_sync_soon(self._wake, idempotent=True)
        except trio.RunFinishedError:
            return

    def _wake(self) -> None:
        self._heard.set()

    async def introduce(self, meet: Meet, is_known: Callable[[PeerId], bool]) -> None:
        """Meet each peer that announces itself, until its record is known, and look for it later."""
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                while self._texts:
                    self._peers.hear(self._texts.popleft(), now)
                for peer in self._peers.due(now):
                    if is_known(peer):
                        self._over(peer, "known")
                    elif (found := self._peers.begin(peer, now)) is not None:
                        self.start.begins()
                        nursery.start_soon(self._meet, meet, found)
                with trio.move_on_after(self._peers.seconds_left(now)):
                    await self._heard.wait()
                self._heard = trio.Event()

    async def _meet(self, meet: Meet, found: LanPeer) -> None:
        try:
            outcome = await meet(found.peer, found.addresses)
        finally:
            self.start.over()
        self._over(found.peer, outcome)

    def _over(self, peer: PeerId, outcome: Meeting) -> None:
        """A meeting is over, or a record came by itself."""
        if (found := self._peers.met(peer, outcome, trio.current_time())) is not None:
            log.info("found %s at %s in the local network", peer, found.addresses[0])
        self.start.met(peer, outcome)
        self._heard.set()  # the next one may be due sooner


@asynccontextmanager
async def open_lan(
    peer: PeerId,
    swarm: str,
    listening: Callable[[], Sequence[str]],
    limits: Limits,
    make: Callable[[], Multicast] = ZeroconfMulticast,
) -> AsyncIterator[LanDiscovery]:
    """Be in the local network until the end of the block.  Dials nobody before `introduce`.

    swarm: its id; peers of others are not dialled.
    """
    lan = LanDiscovery(peer, swarm, listening, limits, make)
    async with background_nursery() as nursery:
        nursery.start_soon(lan.run)
        yield lan
