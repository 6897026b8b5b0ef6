"""Makes connections to peers: one dial to a peer at a time, several addresses raced against each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import trio

from node.network.addresses import Address, parse_address
from node.network.connection_table import ConnectionTable
from node.network.dialling import Race, open_tcp, resolve
from node.network.transport.connection import Connection
from node.network.transport.link import SocketLink
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerGone, SlowPeer
from tensor_codec.limits import Limits

MAX_DIALS = 32  # at once; more than one round of pings starts, so that silent peers delay no other dial


class Dialler:
    """Dials peers for one node.

    me: this node's own id, which is never dialled.
    add: turns a secured channel into a connection of the table.  Raises PeerGone.
    """

    def __init__(
        self,
        me: PeerId,
        limits: Limits,
        upgrade: Upgrade,
        connections: ConnectionTable,
        add: Callable[[SecureChannel], Awaitable[Connection]],
    ) -> None:
        self._me = me
        self._limits = limits
        self._upgrade = upgrade
        self._connections = connections
        self._add = add
        self._places = trio.CapacityLimiter(MAX_DIALS)
        self._locks: dict[PeerId, trio.Lock] = {}  # of peers that are dialled now

    async def connect(self, peer: PeerId, addresses: Sequence[str], seconds: float) -> Connection:
        """The live connection to a peer, or a new one.

        seconds: for all of it, including the wait for another task's dial to this peer.
        Raises PeerGone, SlowPeer, NotAMember, RemoteProtocolError.
        """
        if peer == self._me:
            raise PeerGone("a node does not dial itself")
        lock = self._locks.setdefault(peer, trio.Lock())
        silent: list[Address] = []
        try:
            with trio.move_on_after(seconds):
                async with lock:  # one dial to a peer at a time; the other callers use its connection
                    live = self._connections.live(peer)
                    if live is not None:
                        return live
                    async with self._places:
                        return await self._dial(peer, addresses, silent)
            said_nothing = f": not a word from {', '.join(map(str, silent))}" if silent else ""
            raise SlowPeer(f"no connection to {peer} within {seconds:g} s{said_nothing}")
        finally:
            statistics = lock.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._locks.pop(peer, None)

    async def _dial(self, peer: PeerId, texts: Sequence[str], silent: list[Address]) -> Connection:
        """A new connection, `dial_seconds` for all addresses together.

        silent: at any time the addresses under trial.  Raises PeerGone, NotAMember.
        """
        self._connections.raise_if_banned(peer)
        self._connections.raise_if_full()
        addresses, unreadable = _readable(texts, peer)
        race = Race(partial(self._attempt, peer), resolve, lambda late: late.link.close(), unanswered=silent)
        channel, seconds = None, self._limits.dial_seconds
        with trio.move_on_after(seconds):
            channel = await race.run(addresses)
        if channel is not None:
            try:
                return await self._add(channel)
            except BaseException:
                channel.link.close()
                raise
        for _, fault in race.failures:
            if isinstance(fault, NotAMember):  # the operator should read this one first
                raise fault
        reasons = [f"{address}: {fault}" for address, fault in race.failures]
        reasons += [f"{address}: no answer within {seconds:g} s" for address in race.unanswered]
        reasons += unreadable
        raise PeerGone(f"{peer} cannot be reached: {'; '.join(reasons) or 'none of its addresses is known'}")

    async def _attempt(self, peer: PeerId, address: Address) -> SecureChannel:
        link = SocketLink(await open_tcp(address), self._limits.tcp_user_timeout_seconds)
        try:
            return await self._upgrade.outbound(link, peer, str(address))
        except BaseException:
            link.close()
            raise


def _readable(texts: Sequence[str], peer: PeerId) -> tuple[list[Address], list[str]]:
    """The addresses that a dial to this peer may use, and the reason against each other address."""
    addresses, unreadable = [], []
    for text in dict.fromkeys(texts):
        try:
            address = parse_address(text)
        except ValueError as error:
            unreadable.append(f"{text}: {error}")
            continue
        if address.peer in (None, peer):
            addresses.append(replace(address, peer=None))
        else:
            unreadable.append(f"{text}: it is the address of {address.peer}")
    return addresses, unreadable
