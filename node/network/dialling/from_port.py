"""Dials from the port that this node listens on, so that a NAT shows others one address for both.

A NAT keeps one outside port for an inside port (RFC 4787, endpoint-independent mapping).  So the address at
which a relay sees this node is the one at which others meet it, if both dials leave from the same port.
"""

from __future__ import annotations

import socket

import trio

from node.network.addresses import Address
from tensor_codec.errors import PeerGone

_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
_ANY_HOST = {"ip4": "0.0.0.0", "ip6": "::"}


def share_port(listener: socket.socket) -> None:
    """Let this process's dials leave from the port of a listener.

    To be called after `listen`: a second listener at the port is still refused then.
    """
    if hasattr(socket, "SO_REUSEPORT"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


async def open_tcp_from(port: int, address: Address) -> trio.SocketStream:
    """Connect to an IP address from a port of this machine.  Raises PeerGone."""
    dialled = trio.socket.socket(_FAMILIES[address.kind], socket.SOCK_STREAM)
    try:
        dialled.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            dialled.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await dialled.bind((_ANY_HOST[address.kind], port))
        await dialled.connect((address.host, address.port))
    except OSError as error:
        dialled.close()
        raise PeerGone(error.strerror or str(error)) from error
    except BaseException:
        dialled.close()
        raise
    return trio.SocketStream(dialled)
