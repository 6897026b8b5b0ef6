"""Receives the peers that connect: from an accepted socket to a connection with a place, and to its end."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from node.network.admission.half_open import Handshake
from node.network.connection_table import ConnectionTable
from node.network.prefixes import address_prefix
from node.network.transport.link import SocketLink
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from tensor_codec.errors import PeerFault, PeerGone, SlowPeer
from tensor_codec.limits import Limits

_TURN_SECONDS = 0.15  # between two looks at whether a handshake may begin
_UNUSED_SECONDS = 5.0  # between two looks at the connections that are not in use


class Charge(Protocol):
    """Counts a fault, as `Host.charge` does."""

    def __call__(self, who: str, fault: PeerFault, *, bans: bool = True) -> None:
        """See Host."""


class Reception:
    """Makes connections of accepted sockets, and ends those that peers leave unused.

    add: turns a secured channel into a connection of the table.  Raises PeerGone.
    """

    def __init__(
        self,
        limits: Limits,
        upgrade: Upgrade,
        connections: ConnectionTable,
        nursery: trio.Nursery,
        add: Callable[[SecureChannel], Awaitable[object]],
        charge: Charge,
    ) -> None:
        self._limits = limits
        self._upgrade = upgrade
        self._connections = connections
        self._nursery = nursery
        self._add = add
        self._charge = charge

    def may_enter(self, host: str) -> bool:
        """Count a socket from this address; False: it is to be closed at once."""
        return self._connections.may_accept(address_prefix(host), trio.current_time())

    def enter(self, accepted: socket.socket) -> None:
        """Begin the handshake on an accepted socket; the oldest of the largest holder may end for it."""
        link, scope = SocketLink(accepted, self._limits.tcp_user_timeout_seconds), trio.CancelScope()
        handshake = Handshake(address_prefix(link.remote[0]) if link.remote else "", scope.cancel)
        if (loser := self._connections.handshakes.begin(handshake)) is not None:
            loser.give_up()
        self._nursery.start_soon(self._shake_hands, link, handshake, scope)

    async def _shake_hands(self, link: SocketLink, handshake: Handshake, scope: trio.CancelScope) -> None:
        """Make a connection of an accepted socket, or close it.  Never raises for a peer's fault."""
        where = link.remote[0] if link.remote else "a peer that left"
        try:
            seconds = self._limits.handshake_seconds
            with trio.move_on_after(seconds), scope:
                await link.readable()  # a silent socket has cost no buffer and no key yet
                await self._turn(link, handshake)
                handshake.spoke = True
                channel = await self._upgrade.inbound(link)
                self._connections.handshakes.end(handshake)
                where = channel.remote
                await self._add(channel)
                return
            if scope.cancel_called:
                raise PeerGone("its handshake made way for another one")
            raise SlowPeer(f"the handshake was not done within {seconds:g} s")
        except PeerFault as fault:
            self._charge(where, fault, bans=False)  # perhaps another than the peer: nothing was proved
            link.close()
        except BaseException:
            link.close()
            raise
        finally:
            self._connections.handshakes.end(handshake)

    async def _turn(self, link: SocketLink, handshake: Handshake) -> None:
        """Wait until the rate of its address allows one more handshake.  Raises PeerGone."""
        while True:
            if link.has_ended:
                raise PeerGone("it left before its handshake")
            if self._connections.arrivals.handshake(handshake.prefix, trio.current_time()):
                return
            await trio.sleep(_TURN_SECONDS)

    async def close_unused(self) -> None:
        """Close the connections that peers leave without a stream; runs until cancelled."""
        while True:
            await trio.sleep(_UNUSED_SECONDS)
            for connection in self._connections.unused(trio.current_time()):
                await connection.close()
