"""A relay: gives reservations to peers behind NAT, and carries circuits to them (circuit relay v2, hop).

The relay dials nobody: it carries bytes between two connections that are there.  Each byte in hand has the
credit of its stream: a circuit whose target takes nothing stops its source, and the relay's memory stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from node.network.budgets.fair_rate import FairRate
from node.network.relaying.messages import (
    STOP_PROTOCOL,
    Reserve,
    Status,
    decode_hop,
    decode_stop_status,
    encode_hop_status,
    encode_reservation,
    encode_stop_connect,
    read_delimited,
)
from node.network.relaying.reservations import Circuit, RelayTable
from node.network.transport.connection import Connection, MuxedStream
from routing.names import PeerId
from tensor_codec.errors import PeerFault, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Relay:
    """Answers the hop streams of a node.

    table: its accounts.  rate: of all circuits.
    direct: the direct connection to a peer, None without one.
    addresses: this node's own multiaddrs, with /p2p/ID.
    wall_clock: Unix seconds, for the ends of reservations on the wire.
    """

    limits: Limits
    table: RelayTable
    rate: FairRate
    direct: Callable[[PeerId], Connection | None]
    addresses: Callable[[], Sequence[str]] = tuple
    wall_clock: Callable[[], float] = time.time

    async def serve(self, stream: MuxedStream, peer: PeerId, prefix: str) -> None:
        """Answer one stream; returns when its circuit has ended.  Raises PeerFault."""
        limits = self.limits
        with trio.move_on_after(limits.circuit_open_seconds) as scope:
            data = await read_delimited(stream.receive_some, limits.max_relay_message_bytes)
        if scope.cancelled_caught:
            raise SlowPeer(f"no question to the relay within {limits.circuit_open_seconds:g} s")
        try:
            question = decode_hop(data)
        except RemoteProtocolError:
            await self._refuse(stream, Status.MALFORMED_MESSAGE)
            raise
        if stream.connection.relayed_by is not None:
            await self._refuse(stream, Status.PERMISSION_DENIED)
        elif isinstance(question, Reserve):
            await self._reserve(stream, peer, prefix)
        else:
            await self._connect(stream, peer, question.peer, prefix)

    async def _reserve(self, stream: MuxedStream, peer: PeerId, prefix: str) -> None:
        status = self.table.reserve(peer, prefix, trio.current_time())
        if status is not Status.OK:
            await self._refuse(stream, status)
            return
        expires_at = int(self.wall_clock() + self.limits.reservation_seconds)
        await self._say(stream, encode_reservation(expires_at, self.addresses()))

    async def _connect(self, stream: MuxedStream, source: PeerId, target: PeerId, prefix: str) -> None:
        circuit = self.table.begin(source, target, trio.current_time(), prefix)
        if not isinstance(circuit, Circuit):
            await self._refuse(stream, circuit)
            return
        try:
            other = await self._open(circuit)
            if isinstance(other, Status):
                await self._refuse(stream, other)
                return
            try:
                await self._say(stream, encode_hop_status(Status.OK))
                await self._carry(circuit, stream, other)
            finally:
                other.reset_now()  # nothing where it has ended
        finally:
            self.table.end(circuit)

    async def _open(self, circuit: Circuit) -> MuxedStream | Status:
        """The stream to the target, after its agreement; or why there is none."""
        connection = self.direct(PeerId(circuit.target))
        if connection is None:
            return Status.NO_RESERVATION
        other = None
        try:
            with trio.move_on_after(self.limits.circuit_open_seconds):
                other = connection.open()
                other.propose(STOP_PROTOCOL)
                await other.send_all(encode_stop_connect(PeerId(circuit.source)))
                most = self.limits.max_relay_message_bytes
                status = decode_stop_status(await read_delimited(other.receive_some, most))
                if status == Status.OK:
                    return other
                logger.debug("%s refuses a circuit: status %d", circuit.target, status)
        except PeerFault as fault:
            logger.debug("no circuit to %s: %s", circuit.target, fault)
        except BaseException:
            if other is not None:
                other.reset_now()
            raise
        if other is not None:
            other.reset_now()
        return Status.CONNECTION_FAILED

    async def _carry(self, circuit: Circuit, one: MuxedStream, other: MuxedStream) -> None:
        """Carry bytes both ways until both have ended, or either is gone, or silence."""
        gone = False
        with trio.move_on_after(self.limits.circuit_idle_seconds) as scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry_one_way, circuit, one, other, scope)
                    nursery.start_soon(self._carry_one_way, circuit, other, one, scope)
            except* PeerFault:
                gone = True  # one of the two has left: no fault against the rules
        if gone or scope.cancelled_caught:
            one.reset_now()
            other.reset_now()

    async def _carry_one_way(
        self, circuit: Circuit, source: MuxedStream, sink: MuxedStream, scope: trio.CancelScope
    ) -> None:
        limits, receive = self.limits, partial(source.receive_held, self.limits.circuit_bytes_in_hand)
        while data := await receive():
            await self.rate.take(circuit, len(data))
            await sink.send_all(data)
            source.hold(0)  # only now may the source send as many bytes more
            self.table.carried(circuit, len(data))
            scope.deadline = trio.current_time() + limits.circuit_idle_seconds
        await sink.send_eof()

    async def _refuse(self, stream: MuxedStream, status: Status) -> None:
        await self._say(stream, encode_hop_status(status))

    async def _say(self, stream: MuxedStream, answer: bytes) -> None:
        seconds = self.limits.circuit_open_seconds
        with trio.move_on_after(seconds):
            await stream.send_all(answer)
            return
        raise SlowPeer(f"the relay's answer was not taken within {seconds:g} s")
