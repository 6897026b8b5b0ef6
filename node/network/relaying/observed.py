"""The address at which a peer sees this node, by libp2p's identify: any relay answers it."""

from __future__ import annotations

import logging

import trio

from node.network.addresses import Address
from node.network.relaying.messages import decode_observed, read_delimited
from node.network.transport.connection import Connection
from tensor_codec.errors import PeerFault
from tensor_codec.limits import KIB

logger = logging.getLogger(__name__)

IDENTIFY = "/ipfs/id/1.0.0"
_MAX_BYTES = 16 * KIB  # with a signed record and forty addresses


async def ask_observed(connection: Connection, seconds: float) -> Address | None:
    """Of this end of a connection; None where the peer does not say within the time."""
    with trio.move_on_after(seconds):
        try:
            stream = connection.open()
            try:
                stream.propose(IDENTIFY)
                return decode_observed(await read_delimited(stream.receive_some, _MAX_BYTES))
            finally:
                await stream.aclose()
        except PeerFault as fault:
            logger.debug("%s does not say where it sees us: %s", connection.peer, fault)
    return None
