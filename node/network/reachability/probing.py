"""A dial that reuses nothing: a fresh socket, the whole handshake, and the end of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from node.network.addresses import Address
from node.network.dialling.race import open_tcp
from node.network.transport.link import Link, SocketLink
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import Outcome


class Prober:
    """Tries whether a peer answers at an address.  connect: a link to an IP address; raises PeerGone."""

    def __init__(
        self,
        upgrade: Upgrade,
        limits: Limits,
        connect: Callable[[Address], Awaitable[Link]] | None = None,
    ) -> None:
        self._upgrade = upgrade
        self._limits = limits
        self._connect = connect or self._dial

    async def __call__(self, peer: PeerId, address: Address) -> Outcome:
        """What came of one dial, within `reach_dial_seconds`; the connection is closed at once.

        "another peer": something else answers there, or a peer of another swarm.
        """
        with trio.move_on_after(self._limits.reach_dial_seconds):
            try:
                link = await self._connect(address)
            except PeerGone:
                return "refused"
            try:
                await self._upgrade.outbound(link, peer, str(address))
            except PeerGone:
                return "refused"
            except PeerFault:
                return "another peer"
            finally:
                link.close()
            return "reached"
        return "timed out"

    async def _dial(self, address: Address) -> Link:
        return SocketLink(await open_tcp(address), self._limits.tcp_user_timeout_seconds)
