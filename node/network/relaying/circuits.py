"""Circuits that this node asks for: the relays of a peer, and a connection through one of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import trio

from node.network.relaying.circuit_link import CircuitLink, is_limited
from node.network.relaying.messages import (
    HOP_PROTOCOL,
    HopAnswer,
    Status,
    decode_hop_answer,
    encode_hop_connect,
    read_delimited,
)
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import PeerGone, Refused, SlowPeer
from tensor_codec.limits import Limits

SETTLING_SECONDS = 1.5  # a punch takes eight round trips: 1.3 s over two lines of 40 ms each
_LOOK_SECONDS = 0.02


class RelayAt(NamedTuple):
    """A relay, and the multiaddrs at which it listens."""

    peer: PeerId
    addresses: tuple[str, ...]


class Routes(NamedTuple):
    """The relays of a peer, the nearest first.

    at_once: the peer cannot be reached without a relay, so a circuit need not wait for its addresses.
    """

    relays: tuple[RelayAt, ...] = ()
    at_once: bool = False


@dataclass(slots=True)
class Circuits:
    """Makes connections through relays.

    upgrade, add: make a connection of a link, as for a socket.
    routes_to: the relays of a peer, as far as known; to be set by those that know records.
    settles_at: of circuits that we asked for, the time until which a direct way is likely to come.
    replaced_by: the direct connections that came of circuits to us; their peers cannot dial us.
    replacing: the peers to which a direct way is looked for now, over a circuit.
    """

    limits: Limits
    upgrade: Upgrade
    add: Callable[[SecureChannel], Awaitable[Connection]]
    routes_to: Callable[[PeerId], Routes] = lambda _: Routes()
    settles_at: WeakKeyDictionary[Connection, float] = field(default_factory=WeakKeyDictionary)
    replaced_by: WeakSet[Connection] = field(default_factory=WeakSet)
    replacing: set[PeerId] = field(default_factory=set)

    def came_of_one(self, connection: Connection) -> bool:
        """Whether a direct connection came of a circuit, or does just now: its peer may use it at once."""
        return connection in self.replaced_by or connection.peer in self.replacing

    async def dial(self, relay: Connection, peer: PeerId) -> Connection:
        """A connection to a peer through a connected relay.

        Takes three round trips: the question, and the handshake's two.  Raises PeerFault.
        """
        if relay.relayed_by is not None:
            raise PeerGone(f"{relay.peer} is itself reached through a relay")
        seconds = self.limits.circuit_open_seconds
        with trio.move_on_after(seconds):
            stream = relay.open()
            try:
                answer = await self._ask(stream, peer)
                where = f"{peer} through {relay.peer}"
                made = await self.add(
                    await self.upgrade.outbound(
                        CircuitLink(stream, is_limited=answer.is_limited), peer, where
                    )
                )
                patience = self.limits.punch_seconds if is_limited(made) else SETTLING_SECONDS
                self.settles_at[made] = trio.current_time() + patience
                return made
            except Refused as refused:
                stream.close_now()  # answered: many resets would break a rule of the muxer
                raise PeerGone(str(refused)) from None
            except BaseException:
                stream.reset_now()
                raise
        raise SlowPeer(f"no circuit through {relay.peer} within {seconds:g} s")

    async def settled(self, circuit: Connection, live: Callable[[PeerId], Connection | None]) -> Connection:
        """The way on which a session begins: a direct one, if it comes a moment after the circuit.

        live: the direct connection to a peer, None without one.
        Raises PeerGone where there is none, and the relay would end the circuit in mid-session.
        """
        while trio.current_time() < self.settles_at.get(circuit, 0.0) and not circuit.closed.is_set():
            if (direct := live(circuit.peer)) is not None:
                return direct
            await trio.sleep(_LOOK_SECONDS)
        if (direct := live(circuit.peer)) is None and is_limited(circuit):
            raise PeerGone(
                f"{circuit.peer} has no direct way, and relay {circuit.relayed_by} ends circuits after"
                " a while: no session begins there"
            )
        return direct or circuit

    async def _ask(self, stream: MuxedStream, peer: PeerId) -> HopAnswer:
        """The relay's yes.  Raises Refused, PeerFault."""
        stream.propose(HOP_PROTOCOL)
        await stream.send_all(encode_hop_connect(peer))
        data = await read_delimited(stream.receive_some, self.limits.max_relay_message_bytes)
        answer = decode_hop_answer(data)
        if answer.status != Status.OK:
            raise Refused(f"relay {stream.connection.peer} refuses: {reason_of(answer.status)}")
        return answer


def reason_of(status: int) -> str:
    """A status in words."""
    try:
        return Status(status).name.lower().replace("_", " ")
    except ValueError:
        return f"status {status}"
