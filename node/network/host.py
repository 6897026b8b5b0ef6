"""A node's place in the network: listens, dials, and gives and takes framed streams.

Everything that a peer can do to us by connecting is bounded here or in the layers below: how many
connections and streams, for how long each step may take, and what becomes of one that breaks a rule.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.network.exceptions import SwarmException

from node.config import ConfigError
from node.network.addresses import Address, announced, parse_address
from node.network.dialling import Race, open_tcp, resolve
from node.network.interfaces import read_interfaces
from node.network.libp2p_host import make_libp2p_host
from node.network.streams import FramedStream, Traffic
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import Identity
from node.network.transport.link import SocketLink
from node.network.transport.membership import KEY_BYTES, swarm_id
from node.network.transport.multistream import Dialogue, negotiate
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from node.network.transport.yamux import YamuxError, YamuxLimits
from node.runtime.faults import Faults
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)

Handler = Callable[[FramedStream], Awaitable[None]]

PING_PROTOCOL = "/raceme/ping/1"
_PING_BYTES = 8
_PINGS = 3  # the quickest of so many: the first also pays for opening the stream
_MAX_PINGS_PER_STREAM = 16
_BAN_SECONDS = 60.0  # for a peer that floods or ignores windows
_DIALS_AT_ONCE = 32  # more than whoever measures dials at once: the silent must not hold up the others
_SHUTDOWN_SECONDS = 2.0


class NoPlaceLeft(PeerGone):
    """This node itself allows no further connection: it says nothing of the peer."""


class Host:
    """What the rest of a node sees of the network.  Made by `open_host`.

    peer_id: ours.
    faults: of peers, counted.
    raw: py-libp2p's host, for `node.network.directory.kademlia` alone.
    """

    def __init__(
        self,
        identity: Identity,
        find_addresses: Callable[[], tuple[str, ...]],
        swarm_key: bytes | None,
        limits: Limits,
        nursery: trio.Nursery,
    ) -> None:
        """find_addresses: what to announce, as the machine's interfaces are at that moment."""
        self.peer_id = identity.peer_id
        self._find_addresses = find_addresses
        self._addresses = find_addresses()
        self.swarm_id = swarm_id(swarm_key)
        self.faults = Faults()
        self.raw: BasicHost = make_libp2p_host(
            identity, lambda: self._addresses, limits, self._dial_for_libp2p
        )
        self._limits = limits
        self._upgrade = Upgrade(identity, swarm_key, limits)
        self._nursery = nursery
        self._traffic = Traffic()
        self._handlers: dict[str, Handler] = {}
        self._connections: dict[PeerId, list[Connection]] = {}
        self._inbound = 0
        self._unauthenticated = 0
        self._dials = trio.CapacityLimiter(_DIALS_AT_ONCE)
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._banned_until: dict[PeerId, float] = {}
        self._yamux_limits = YamuxLimits(
            max_inbound_streams=limits.max_streams_per_connection,
            max_unread_bytes=limits.max_unread_bytes_per_connection,
        )
        self.handle(PING_PROTOCOL, self._answer_pings)

    # --- what a node does with it ---

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs under which we can be dialled, without /p2p, as last read."""
        return self._addresses

    def read_addresses(self) -> bool:
        """Look at the machine's interfaces again; whether our addresses are others now."""
        before, self._addresses = self._addresses, self._find_addresses()
        return self._addresses != before

    @property
    def bytes_sent(self) -> int:
        """Payload sent on framed streams."""
        return self._traffic.sent

    @property
    def bytes_received(self) -> int:
        """Payload received on framed streams."""
        return self._traffic.received

    def handle(self, protocol: str, handler: Handler) -> None:
        """Answer inbound streams of a protocol.

        A PeerFault that escapes the handler is counted in `faults` and resets the stream; when the handler
        returns, the stream is closed.  Anything else that escapes is our own bug and ends the host.
        """
        self._handlers[protocol] = handler

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> FramedStream:
        """A new stream, over a connection that there is or that is made now.

        Costs no round trip: the protocol is asked for with the first frame, and a peer that does not
        speak it is found out by the first `receive` (RemoteProtocolError).
        addresses: tried as `node.network.dialling` says.
        Raises PeerGone, SlowPeer, NotAMember, RemoteProtocolError.
        """
        connection = self._live(peer) or await self._connect(peer, addresses, seconds)
        stream = connection.open()
        stream.propose(protocol)
        return FramedStream(stream, peer, protocol, self._limits, self._traffic)

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, seconds: float) -> None:
        """Make sure that there is a connection.  Raises as `open_stream`."""
        if self._live(peer) is None:
            await self._connect(peer, addresses, seconds)

    async def ping(self, peer: PeerId, addresses: Sequence[str], *, seconds: float | None = None) -> float:
        """The round trip to a peer, in seconds, between two of our protocol handlers.

        seconds: for all of it, `dial_seconds` if None.  Raises as `open_stream`.
        """
        seconds = self._limits.dial_seconds if seconds is None else seconds
        stream = await self.open_stream(peer, addresses, PING_PROTOCOL, seconds=seconds)
        try:
            best = float("inf")
            for _ in range(_PINGS):
                question = secrets.token_bytes(_PING_BYTES)
                sent_at = trio.current_time()
                await stream.send(question)
                answer = await stream.receive(seconds)
                if answer is None or bytes(answer) != question:
                    raise RemoteProtocolError(f"{peer} answered a ping with other bytes")
                best = min(best, trio.current_time() - sent_at)
            return best
        finally:
            await stream.aclose()

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""
        return {peer for peer in self._connections if self._live(peer) is not None}

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        for connection in list(self._connections.get(peer, ())):
            await connection.close()

    def charge(self, who: str, fault: PeerFault) -> None:
        """Count a peer's fault, and log it."""
        self.faults.add(who, fault)
        level = logging.INFO if isinstance(fault, NotAMember) else logging.DEBUG
        logger.log(level, "%s: %s: %s", who, type(fault).__name__, fault)

    # --- inbound ---

    async def accept(self, stream: trio.SocketStream) -> None:
        """Make a connection of an accepted socket, or close it.  Never raises for what a peer does."""
        if not self._may_accept():
            await trio.aclose_forcefully(stream)
            return
        link = SocketLink(stream, self._limits.tcp_user_timeout_seconds)
        where = link.remote[0] if link.remote else "a peer that left"
        self._unauthenticated += 1
        waiting = True
        try:
            seconds = self._limits.handshake_seconds
            with trio.move_on_after(seconds):
                channel = await self._upgrade.inbound(link)
                self._unauthenticated, waiting = self._unauthenticated - 1, False
                where = channel.remote
                await self._add(channel)
                return
            raise SlowPeer(f"the handshake was not done within {seconds:g} s")
        except PeerFault as fault:
            self.charge(where, fault)
            link.close()
        except BaseException:
            link.close()
            raise
        finally:
            self._unauthenticated -= waiting

    def _may_accept(self) -> bool:
        return (
            self._unauthenticated < self._limits.max_unauthenticated_connections
            and self._inbound < self._limits.max_inbound_connections
            and self._count() < self._limits.max_connections
        )

    def _on_stream(self, stream: MuxedStream) -> None:
        connections = self._connections.get(stream.muxed_conn.peer, [stream.muxed_conn])
        of_peer = sum(connection.inbound_streams for connection in connections)
        of_node = sum(each.inbound_streams for all_of in self._connections.values() for each in all_of)
        if of_peer >= self._limits.max_streams_per_peer or of_node >= self._limits.max_streams:
            stream.reset_now()
        else:
            stream.let_in = True
            self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: MuxedStream) -> None:
        """The one place that catches a peer's fault on a stream that it opened."""
        peer = stream.muxed_conn.peer
        try:
            protocol = stream.protocol = await self._negotiate(stream)
            if protocol is None:
                self.charge(peer, RemoteProtocolError("a stream for no protocol that we speak"))
                await stream.aclose()  # and no reset, which would overtake our `na`
                return
            handler = self._handlers.get(protocol)
            if handler is None:
                stream.muxed_conn.offer(stream)  # one of py-libp2p's own
                return
            framed = FramedStream(stream, peer, protocol, self._limits, self._traffic)
            await handler(framed)
            await framed.aclose()
        except PeerFault as fault:
            stream.reset_now()
            self.charge(peer, fault)
        except BaseExceptionGroup as group:  # a handler with a nursery of its own
            stream.reset_now()
            faults, others = group.split(PeerFault)
            if others is not None:
                raise others from None
            if faults is not None:
                self.charge(peer, _first_fault(faults))
        except BaseException:
            stream.reset_now()
            raise

    async def _negotiate(self, stream: MuxedStream) -> str | None:
        libp2p_protocols = self.raw.get_mux().handlers
        dialogue = Dialogue(stream.receive_some, stream.send_all)
        seconds = self._limits.negotiation_seconds
        with trio.move_on_after(seconds):
            try:
                protocol = await negotiate(
                    dialogue, lambda name: name in self._handlers or name in libp2p_protocols
                )
            except RemoteProtocolError:
                protocol = None  # what follows our `na` is the frame that was sent along with the proposal
            await dialogue.flush()
            return protocol
        raise SlowPeer(f"a stream named no protocol within {seconds:g} s")

    async def _answer_pings(self, stream: FramedStream) -> None:
        for _ in range(_MAX_PINGS_PER_STREAM):
            question = await stream.receive(self._limits.frame_start_seconds)
            if question is None:
                return
            if len(question) != _PING_BYTES:
                raise RemoteProtocolError(f"a ping of {len(question)} bytes, expected {_PING_BYTES}")
            await stream.send(question)

    # --- outbound ---

    async def _connect(self, peer: PeerId, addresses: Sequence[str], seconds: float) -> Connection:
        if peer == self.peer_id:
            raise PeerGone("a node does not dial itself")
        lock = self._dialling.setdefault(peer, trio.Lock())
        silent: list[Address] = []
        try:
            with trio.move_on_after(seconds):
                async with lock:  # one dial to a peer at a time; the others use what it makes
                    live = self._live(peer)
                    if live is not None:
                        return live
                    async with self._dials:
                        return await self._dial(peer, addresses, silent)
            said_nothing = f": not a word from {', '.join(map(str, silent))}" if silent else ""
            raise SlowPeer(f"no connection to {peer} within {seconds:g} s{said_nothing}")
        finally:
            statistics = lock.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._dialling.pop(peer, None)

    async def _dial(self, peer: PeerId, texts: Sequence[str], silent: list[Address]) -> Connection:
        """A new connection, `dial_seconds` for all addresses together.

        silent: those that are being tried, at any time.  Raises PeerGone, NotAMember.
        """
        if self._count() >= self._limits.max_connections:
            raise self._no_place_left()
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
            if isinstance(fault, NotAMember):  # what the operator should hear of first
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

    async def _dial_for_libp2p(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await self._connect(peer, addresses, self._limits.dial_seconds)

    # --- both ---

    async def _add(self, channel: SecureChannel) -> Connection:
        """Take a peer in, unless a cap or a ban is in the way.  Raises PeerGone."""
        peer = channel.remote
        if self._banned_until.get(peer, -1.0) > trio.current_time():
            raise PeerGone(f"{peer} broke the rules a short time ago and is not let in")
        if len(self._connections.get(peer, ())) >= self._limits.max_connections_per_peer:
            raise PeerGone(f"{peer} has {self._limits.max_connections_per_peer} connections already")
        if self._count() >= self._limits.max_connections:
            raise self._no_place_left()
        connection = Connection(
            channel,
            self._yamux_limits,
            on_stream=self._on_stream,
            on_fault=lambda fault: self._on_fault(peer, fault),
            on_closed=self._forget,
        )
        self._connections.setdefault(peer, []).append(connection)
        self._inbound += not channel.initiator
        try:
            await self.raw.get_network().add_conn(connection, "outbound" if channel.initiator else "inbound")
        except SwarmException as error:
            connection.close_now(str(error))
            raise PeerGone(f"{peer} was not let in: {error}") from error
        except BaseException:
            connection.close_now("not wanted any more")
            raise
        connection.raise_if_closed()
        return connection

    def _no_place_left(self) -> NoPlaceLeft:
        return NoPlaceLeft(f"all {self._limits.max_connections} connections that this node allows are in use")

    def _forget(self, connection: Connection) -> None:
        others = [each for each in self._connections.get(connection.peer, ()) if each is not connection]
        if others:
            self._connections[connection.peer] = others
        else:
            self._connections.pop(connection.peer, None)
        self._inbound -= not connection.is_initiator

    def _on_fault(self, peer: PeerId, fault: PeerFault) -> None:
        self.charge(peer, fault)
        if isinstance(fault, YamuxError):
            now = trio.current_time()
            self._banned_until = {each: end for each, end in self._banned_until.items() if end > now}
            self._banned_until[peer] = now + _BAN_SECONDS

    def _live(self, peer: PeerId) -> Connection | None:
        for connection in self._connections.get(peer, ()):
            if connection.is_established:
                return connection
        return None

    def _count(self) -> int:
        return sum(map(len, self._connections.values()))

    async def close_connections(self) -> None:
        """Say goodbye to every peer, and wait a bounded time until py-libp2p has noticed."""
        for connections in list(self._connections.values()):
            for connection in list(connections):
                await connection.close()
        with trio.move_on_after(_SHUTDOWN_SECONDS):
            while self.raw.get_network().get_connections():  # noqa: ASYNC110  # it has no event for this
                await trio.sleep(0.02)
            await self.raw.close()


@contextlib.asynccontextmanager
async def open_host(
    *,
    identity: Identity,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    swarm_key: bytes | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Host]:
    """A host, running until the end of the block; then every connection, task and socket is gone.

    listen: multiaddrs with an ip4 or ip6 address; port 0 takes a free one; none at all for a node that
        only dials.
    announce: what to tell others in place of the addresses listened on.
    swarm_key: 32 bytes; only peers that prove to hold it get in.
    Raises ConfigError for an address that cannot be read or listened on.
    """
    limits = limits or Limits()
    if swarm_key is not None and len(swarm_key) != KEY_BYTES:
        raise ConfigError(f"a swarm key of {len(swarm_key)} bytes, it has {KEY_BYTES}")
    chosen = tuple(str(_parse(text, "announce")) for text in announce)
    listeners: list[trio.SocketListener] = []
    failure: BaseException | None = None
    try:
        listened_on: list[Address] = []
        for text in listen:
            opened, address = await _listen(_parse(text, "listen"))
            listeners += opened
            listened_on.append(address)

        def find_addresses() -> tuple[str, ...]:
            if chosen or not listened_on:
                return chosen
            return announced(listened_on, read_interfaces())

        async with trio.open_nursery() as nursery:
            host = Host(identity, find_addresses, swarm_key, limits, nursery)
            async with host.raw.run([]):
                listening = trio.CancelScope()
                nursery.start_soon(_serve_listeners, host, listeners, nursery, listening)
                try:
                    yield host
                except trio.Cancelled:
                    raise
                # the caller's own, whatever it is: raised below, where no nursery wraps it in a group
                except BaseException as error:  # noqa: BLE001
                    failure = error
                finally:
                    listening.cancel()
                    with trio.CancelScope(shield=True):
                        await host.close_connections()
                    nursery.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.socket.close()
    if failure is not None:
        raise failure


async def _serve_listeners(
    host: Host, listeners: Sequence[trio.SocketListener], nursery: trio.Nursery, scope: trio.CancelScope
) -> None:
    with scope:
        if listeners:
            await trio.serve_listeners(host.accept, list(listeners), handler_nursery=nursery)


def _parse(text: str, what: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(f"bad {what} address: {error}") from None


async def _listen(address: Address) -> tuple[list[trio.SocketListener], Address]:
    """Listeners, and the address with the port that it has now."""
    if address.kind not in ("ip4", "ip6"):
        raise ConfigError(f"cannot listen on {address}: give an IP address, as in /ip4/127.0.0.1/tcp/0")
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=128)
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ConfigError(f"cannot listen on {address}: {reason}") from error
    port = listeners[0].socket.getsockname()[1]
    return listeners, Address(address.kind, address.host, port)


def _readable(texts: Sequence[str], peer: PeerId) -> tuple[list[Address], list[str]]:
    """The addresses that a dial to this peer may use, and what is wrong with the others."""
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


def _first_fault(group: BaseExceptionGroup[PeerFault]) -> PeerFault:
    error = group.exceptions[0]
    return _first_fault(error) if isinstance(error, BaseExceptionGroup) else error
