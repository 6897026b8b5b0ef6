"""Dials from the port that this node listens on, so that a NAT shows others one address for both.

A NAT keeps one outside port for an inside port (RFC 4787, endpoint-independent mapping).  So the address at
which a relay sees this node is the one at which others meet it, if both dials leave from the same port.
"""

from __future__ import annotations

import errno
import socket

import trio

from node.network.addresses import Address
from node.network.dialling.race import prefer_lasting_address
from node.network.transport.connection import Connection
from node.network.transport.link import SocketLink
from tensor_codec.errors import PeerGone

_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
_ANY_HOST = {"ip4": "0.0.0.0", "ip6": "::"}


def share_port(listener: socket.socket) -> None:
    """Let this process's dials leave from the port of a listener.

    To be called after `listen`: a second listener at the port is still refused then.
    """
    if hasattr(socket, "SO_REUSEPORT"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


class PortTaken(PeerGone):
    """Another connection between this port and this address is there."""


class OwnPorts:
    """The ports from which relays and punched peers are dialled: a listener's, or else one kept for that."""

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}
        self._kept: list[socket.socket] = []

    def listens(self, kind: str, port: int) -> None:
        """A listener of this family ("ip4", "ip6") is at this port; the first one counts."""
        self._ports.setdefault(kind, port)

    def has(self, port: int) -> bool:
        """Whether a dial from this port was one from our own."""
        return port in self._ports.values()

    def are_left_by(self, connection: Connection) -> bool:
        """Whether the other side sees a connection at our listener's port, or at a router's port for it."""
        link = connection.channel.link
        return isinstance(link, SocketLink) and self.has(link.local_port)

    def of(self, kind: str) -> int:
        """The port of a family.  Raises PeerGone where this machine has no such family."""
        if kind not in self._ports:
            kept = socket.socket(_FAMILIES[kind], socket.SOCK_STREAM)
            self._kept.append(kept)
            try:
                _share(kept)
                kept.bind((_ANY_HOST[kind], 0))
            except OSError as error:
                raise PeerGone(error.strerror or str(error)) from error
            self._ports[kind] = int(kept.getsockname()[1])
        return self._ports[kind]

    def close(self) -> None:
        """Give the ports back that were kept."""
        for each in self._kept:
            each.close()
        self._kept.clear()


async def open_tcp_from(port: int, address: Address) -> trio.SocketStream:
    """Connect to an IP address from a port of this machine.  Raises PeerGone, PortTaken."""
    dialled = trio.socket.socket(_FAMILIES[address.kind], socket.SOCK_STREAM)
    try:
        _share(dialled)
        if address.kind == "ip6":
            prefer_lasting_address(dialled)
        await dialled.bind((_ANY_HOST[address.kind], port))
        await dialled.connect((address.host, address.port))
    except OSError as error:
        dialled.close()
        taken = error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
        raise (PortTaken if taken else PeerGone)(error.strerror or str(error)) from error
    except BaseException:
        dialled.close()
        raise
    return trio.SocketStream(dialled)


def _share(sock: socket.socket | trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
