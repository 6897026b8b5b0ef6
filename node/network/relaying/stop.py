"""The far end of a circuit: a relay brings a peer, which proves its id as after any dial (stop)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from node.network.admission.reception import Charge
from node.network.relaying.circuit_link import CircuitLink
from node.network.relaying.messages import Connect, Status, decode_stop, encode_stop_status, read_delimited
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import PeerFault, SlowPeer
from tensor_codec.limits import Limits


@dataclass(slots=True)
class StopListener:
    """Answers the stop streams of a node.

    upgrade, add: make a connection of a link, as for a socket.  charge: counts a fault.
    is_reserved_at: whether we have asked this peer to relay to us; nobody else brings peers.
    is_banned: whether a peer would not be let in, by the id that the relay names.
    on_circuit: called with each connection that came through a relay.
    """

    limits: Limits
    upgrade: Upgrade
    add: Callable[[SecureChannel], Awaitable[Connection]]
    charge: Charge
    is_reserved_at: Callable[[PeerId], bool]
    is_banned: Callable[[PeerId], bool] = lambda _: False
    on_circuit: Callable[[Connection], None] = lambda _: None
    handshakes: int = 0  # under way

    async def serve(self, stream: MuxedStream, relay: PeerId, prefix: str) -> None:
        """Answer one stream; returns when the connection over it has ended.  Raises PeerFault."""
        limits = self.limits
        with trio.move_on_after(limits.circuit_open_seconds) as scope:
            data = await read_delimited(stream.receive_some, limits.max_relay_message_bytes)
        if scope.cancelled_caught:
            raise SlowPeer(f"no question of the relay within {limits.circuit_open_seconds:g} s")
        question = decode_stop(data)
        self.handshakes += 1
        try:
            connection = await self._accept(stream, relay, question)
        finally:
            self.handshakes -= 1
        if connection is not None:
            self.on_circuit(connection)
            await connection.closed.wait()

    async def _accept(self, stream: MuxedStream, relay: PeerId, question: Connect) -> Connection | None:
        """The connection over the circuit; None where there is none, which is no fault of the relay's."""
        seconds, status = self.limits.handshake_seconds, self._status(stream, relay, question)
        try:
            with trio.move_on_after(seconds):
                await stream.send_all(encode_stop_status(status))
                link = CircuitLink(stream, is_limited=question.is_limited)
                return await self._secure(link) if status is Status.OK else None
            raise SlowPeer(f"the handshake over a circuit was not done within {seconds:g} s")
        except PeerFault as fault:
            self.charge(relay, fault, bans=False)
            stream.reset_now()
            return None

    def _status(self, stream: MuxedStream, relay: PeerId, question: Connect) -> Status:
        if stream.connection.relayed_by is not None or not self.is_reserved_at(relay):
            return Status.PERMISSION_DENIED
        if self.is_banned(question.peer):
            return Status.PERMISSION_DENIED
        if self.handshakes > self.limits.max_circuit_handshakes:
            return Status.RESOURCE_LIMIT_EXCEEDED
        return Status.OK

    async def _secure(self, link: CircuitLink) -> Connection:
        try:
            return await self.add(await self.upgrade.inbound(link))
        except BaseException:
            link.close()
            raise
