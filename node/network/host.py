"""A node's place in the network: listens, dials, and gives and takes framed streams.

The cost of a connecting peer is bounded here or in the layers below: the number of its connections and
streams, the time of each step, and the penalty for a broken rule.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.network.exceptions import SwarmException

from node.config import ConfigError
from node.network.addresses import Address, parse_address
from node.network.admission.door import BACKLOG, keep_door
from node.network.admission.reception import Reception
from node.network.budgets.large_frames import LargeFrames
from node.network.connection_table import ConnectionTable
from node.network.dialling.dialler import Dialler, Purpose
from node.network.dialling.from_port import share_port
from node.network.libp2p_adapter import Libp2pConnection
from node.network.libp2p_host import make_libp2p_host
from node.network.own_addresses import OwnAddresses, find_own_addresses
from node.network.prefixes import address_prefix
from node.network.reachability.probing import Prober
from node.network.streams import FramedStream, Traffic
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import Identity
from node.network.transport.membership import KEY_BYTES, swarm_id
from node.network.transport.multistream import Dialogue, negotiate
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from node.network.transport.yamux_limits import YamuxError, YamuxLimits
from node.runtime.faults import Faults
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)

Handler = Callable[[FramedStream], Awaitable[None]]
ByteHandler = Callable[[MuxedStream, PeerId, str], Awaitable[None]]

PING_PROTOCOL = "/raceme/ping/1"
_PURPOSES: Mapping[str, Purpose] = {  # of dials; those of other protocols are for sessions
    PING_PROTOCOL: "ping",
    "/raceme/records/1": "directory",
    "/ipfs/kad/1.0.0": "directory",
}
_NAMED_BY_CLIENTS = frozenset({"/raceme/push/1"})  # a client names the peer to push to
_PING_BYTES = 8
_PINGS = 3  # the quickest counts: the first ping also pays for opening the stream
_MAX_PINGS_PER_STREAM = 16
_SHUTDOWN_SECONDS = 2.0


class _Service(NamedTuple):
    """The answer to inbound streams of a protocol: see `Host.handle`."""

    handler: Handler
    limits: Limits
    bans: bool


class Host:
    """One node's access to the network: framed streams to peers and from them.  Made by `open_host`.

    peer_id: this node's own.
    swarm_id: of the swarm key, or that of the public swarm.
    faults: of peers, and the bans for them.
    traffic: payload bytes of all framed streams.
    connections: to peers, with their caps and their places.
    reception: of the peers that connect.
    own: where this node is, as last read.
    probe: a dial that reuses nothing, to see whether a peer answers at an address.
    dialler: of its dials, also through relays.
    raw: py-libp2p's host, for identify alone.
    """

    def __init__(
        self,
        identity: Identity,
        find_addresses: Callable[[], OwnAddresses],
        swarm_key: bytes | None,
        limits: Limits,
        nursery: trio.Nursery,
    ) -> None:
        """find_addresses: this node's addresses, by the machine's present interfaces."""
        self.peer_id = identity.peer_id
        self.swarm_id = swarm_id(swarm_key)
        self.faults = Faults(
            limits,
            clock=lambda: trio.current_time(),
            prefix_of=lambda peer: self.connections.prefix_of(peer),
            on_ban=lambda peer: _close_all(self.connections.of(PeerId(peer))),
        )
        self.traffic = Traffic()
        self.connections = ConnectionTable(limits, self.faults, members_only=swarm_key is not None)
        self._find_addresses = find_addresses
        self.own = OwnAddresses((), (), False)
        self._limits = limits
        self._large_frames = LargeFrames.of(limits)
        upgrade = Upgrade(identity, swarm_key, limits)
        self.probe = Prober(upgrade, limits)
        self.dialler = Dialler(self.peer_id, limits, upgrade, self.connections, self._add)
        self.read_addresses()
        self.reception = Reception(limits, upgrade, self.connections, nursery, self._add, self.charge)
        self._nursery = nursery
        self._services: dict[str, _Service | ByteHandler] = {}
        self.raw: BasicHost = make_libp2p_host(identity, lambda: self.own.announced, limits)
        self.handle(PING_PROTOCOL, partial(_answer_pings, limits), max_frame_bytes=_PING_BYTES)

    # --- for the rest of the node ---

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs at which this node can be dialled, without /p2p, as last read."""
        return self.own.announced

    def read_addresses(self) -> bool:
        """Read the machine's interfaces again; whether this node's addresses have changed."""
        found = self._find_addresses()
        self.dialler.networks.set_own(found.hosts, listens=found.listens)
        before, self.own = self.own, found
        return self.addresses != before.announced

    def configure_peers(self, multiaddrs: Iterable[str]) -> None:
        """The operator has named these addresses: they are dialled wherever they are, and at any time."""
        self.dialler.networks.configure(map(parse_address, multiaddrs))

    def sign_of_life(self, names: Iterable[str]) -> None:
        """These peers and multiaddrs may be back: see `node.network.dialling.backoff`."""
        self.dialler.backoff.sign_of_life(names)

    def handle(
        self, protocol: str, handler: Handler, *, max_frame_bytes: int | None = None, bans: bool = True
    ) -> None:
        """Answer inbound streams of a protocol.

        max_frame_bytes: of one frame on such a stream, also on those that we open; None: the limit of all
        protocols.  bans: False where a third peer can cause what a peer sends.
        A PeerFault that escapes the handler is counted in `faults` and resets the stream; when the handler
        returns, the stream is closed.  Any other error that escapes is our own bug and ends the host.
        """
        limits = self._limits
        if max_frame_bytes is not None:
            limits = replace(limits, max_frame_bytes=max_frame_bytes)
        self._services[protocol] = _Service(handler, limits, bans)

    def handle_bytes(self, protocol: str, handler: ByteHandler) -> None:
        """As `handle`, for a protocol that has frames of its own.

        handler: gets the stream, its peer, and the prefix of the peer's address.
        """
        self._services[protocol] = handler

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> FramedStream:
        """A new stream, over the live connection to the peer or a new one.

        Costs no round trip: the first frame carries the protocol's name, and the first `receive` raises
        RemoteProtocolError where the peer does not speak it.
        addresses: multiaddrs, tried as `node.network.dialling.race` says.
        seconds: for the connection.
        Raises PeerGone, SlowPeer, NotAMember, RemoteProtocolError.
        """
        stream = await self.open_bytes(peer, addresses, protocol, seconds=seconds)
        service = self._services.get(protocol)
        limits = service.limits if isinstance(service, _Service) else self._limits
        return _framed(self, stream, protocol, limits)

    async def open_bytes(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> MuxedStream:
        """As `open_stream`, for a protocol that has frames of its own."""
        connection = self.connections.live(peer)
        if connection is None:
            purpose = _PURPOSES.get(protocol, "session")
            most = self._limits.max_successor_addresses if protocol in _NAMED_BY_CLIENTS else None
            connection = await self.dialler.connect(peer, addresses, seconds, purpose, most)
        if connection.relayed_by is not None and protocol not in _PURPOSES:
            direct = partial(self.connections.live, direct=True)
            connection = await self.dialler.circuits.settled(connection, direct)
        stream = connection.open()
        stream.propose(protocol)
        return stream

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, seconds: float) -> None:
        """Make sure that there is a connection.  Raises what `open_stream` raises."""
        if self.connections.live(peer) is None:
            await self.dialler.connect(peer, addresses, seconds, "ping")

    async def ping(self, peer: PeerId, addresses: Sequence[str], *, seconds: float | None = None) -> float:
        """The least round trip of `_PINGS` pings to a peer, in seconds.

        seconds: for all of it, `dial_seconds` if None.  Raises what `open_stream` raises.
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
        return self.connections.connected()

    def charge(self, who: str, fault: PeerFault, *, bans: bool = True) -> None:
        """Count a peer's fault, and log it.  bans: see `Faults.add`."""
        self.faults.add(who, fault, bans=bans)
        level = logging.INFO if isinstance(fault, NotAMember) else logging.DEBUG
        logger.log(level, "%s: %s: %s", who, type(fault).__name__, fault)

    # --- inbound ---

    def _on_stream(self, stream: MuxedStream) -> None:
        room = self.connections.room_for(stream, trio.current_time())
        if room.instead_of is not None:
            room.instead_of.reset_now()
        if not room.admitted:
            stream.reset_now()
        else:
            stream.served = True
            self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: MuxedStream) -> None:
        """Serve a stream that a peer opened: the one place where the peer's faults on it are caught."""
        peer, bans = stream.connection.peer, True
        try:
            protocol = stream.protocol = await self._negotiate(stream)
            if protocol is None:
                unknown = RemoteProtocolError("a stream for no protocol that we speak")
                self.charge(peer, unknown, bans=False)  # another version may speak it
                await stream.aclose()  # and no reset, which would overtake our `na`
                return
            service = self._services.get(protocol)
            if service is None:
                stream.connection.offer(stream)  # one of py-libp2p's own
                return
            if not isinstance(service, _Service):
                await service(stream, peer, stream.connection.prefix)
                await stream.aclose()
                return
            handler, limits, bans = service
            framed = _framed(self, stream, protocol, limits)
            await handler(framed)
            await framed.aclose()
        except PeerFault as fault:
            stream.reset_now()
            self.charge(peer, fault, bans=bans)
        except BaseExceptionGroup as group:  # a handler with a nursery of its own
            stream.reset_now()
            faults, others = group.split(PeerFault)
            if others is not None:
                raise others from None
            if faults is not None:
                self.charge(peer, _first_fault(faults), bans=bans)
        except BaseException:
            stream.reset_now()
            raise

    async def _negotiate(self, stream: MuxedStream) -> str | None:
        known = (self._services, self.raw.get_mux().handlers)
        dialogue = Dialogue(stream.receive_some, stream.send_all)
        seconds = self._limits.negotiation_seconds
        with trio.move_on_after(seconds):
            try:
                protocol = await negotiate(dialogue, lambda name: any(name in each for each in known))
            except RemoteProtocolError:
                protocol = None  # the frame that came with the proposal follows our `na`
            await dialogue.flush()
            return protocol
        raise SlowPeer(f"a stream named no protocol within {seconds:g} s")

    # --- connections of both directions ---

    async def _add(self, channel: SecureChannel) -> Connection:
        """Make a connection of a secured channel, unless a cap or a ban forbids it.  Raises PeerGone."""
        peer, limits = channel.remote, self._limits
        relayed = channel.link.relayed_by is not None
        self.connections.check(peer, relayed=relayed)
        if channel.initiator:
            self.connections.raise_if_full()
        else:
            await self._make_room(peer, channel)
        connection = Connection(
            channel,
            YamuxLimits(
                max_inbound_streams=limits.streams_on_a_connection_of(peer),
                max_unread_bytes=limits.max_unread_bytes_per_connection,
            ),
            large_frames=self._large_frames,
            on_stream=self._on_stream,
            on_fault=lambda fault: self._on_fault(peer, fault),
            on_closed=self.connections.remove,
        )
        self.connections.add(connection, trio.current_time())
        try:
            await self.raw.get_network().add_conn(
                Libp2pConnection(connection, limits.max_libp2p_bytes_per_stream),
                "outbound" if channel.initiator else "inbound",
            )
        except SwarmException as error:
            connection.close_now(str(error))
            raise PeerGone(f"{peer} was not let in: {error}") from error
        except BaseException:
            connection.close_now("not wanted any more")
            raise
        connection.raise_if_closed()
        if channel.initiator and not relayed:
            self.faults.worked(peer)  # it proved its id where it said that it listens
        return connection

    async def _make_room(self, peer: PeerId, channel: SecureChannel) -> None:
        """End the connection that has to make way for this one.  Raises NoPlaceLeft."""
        remote = channel.link.remote
        prefix = address_prefix(remote[0]) if remote else ""
        loser = self.connections.make_room(peer, prefix, trio.current_time())
        if loser is not None:
            logger.debug("%s makes way for %s", loser.peer, peer)
            await loser.close()

    def _on_fault(self, peer: PeerId, fault: PeerFault) -> None:
        """A broken rule of yamux bans; bytes that Noise refuses may have been changed by the network."""
        self.charge(peer, fault, bans=isinstance(fault, YamuxError))

    async def close_connections(self) -> None:
        """Send a goodbye to every peer, and wait a bounded time for py-libp2p to notice."""
        for connection in self.connections:
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
    announce: addresses to announce in place of the listening addresses.
    swarm_key: 32 bytes; only peers that prove to hold it are admitted.
    Raises ConfigError for an address that cannot be read or listened on.
    """
    limits = limits or Limits()
    if swarm_key is not None and len(swarm_key) != KEY_BYTES:
        raise ConfigError(f"a swarm key of {len(swarm_key)} bytes, it has {KEY_BYTES}")
    chosen = tuple(str(_parse(text, "announce")) for text in announce)
    listeners: list[socket.socket] = []
    failure: BaseException | None = None
    try:
        listened_on: list[Address] = []
        for text in listen:
            opened, address = await _listen(_parse(text, "listen"))
            listeners += opened
            listened_on.append(address)

        async with trio.open_nursery() as nursery:
            find_addresses = partial(find_own_addresses, chosen, listened_on)
            host = Host(identity, find_addresses, swarm_key, limits, nursery)
            for address in listened_on:
                host.dialler.ports.listens(address.kind, address.port)
            async with host.raw.run([]):
                listening = trio.CancelScope()
                nursery.start_soon(_serve_listeners, host, listeners, listening)
                nursery.start_soon(host.reception.close_unused)
                try:
                    yield host
                except trio.Cancelled:
                    raise
                # the caller's own error: raised below, where no nursery wraps it in a group
                except BaseException as error:  # noqa: BLE001
                    failure = error
                finally:
                    listening.cancel()
                    with trio.CancelScope(shield=True):
                        await host.close_connections()
                        host.dialler.ports.close()
                    nursery.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.close()
    if failure is not None:
        raise failure


async def _serve_listeners(host: Host, listeners: Sequence[socket.socket], scope: trio.CancelScope) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(keep_door, listener, host.reception.may_enter, host.reception.enter)


def _framed(host: Host, stream: MuxedStream, protocol: str, limits: Limits) -> FramedStream:
    connection = stream.connection
    framed = FramedStream(stream, connection.peer, protocol, limits, host.traffic, connection.prefix)
    if connection.relayed_by is not None:
        framed.better = lambda: host.connections.live(connection.peer, direct=True) is not None
    elif host.dialler.circuits.came_of_one(connection):
        framed.better = lambda: False
    return framed


async def _answer_pings(limits: Limits, stream: FramedStream) -> None:
    for _ in range(_MAX_PINGS_PER_STREAM):
        question = await stream.receive(limits.frame_start_seconds)
        if question is None:
            return
        if len(question) != _PING_BYTES:
            raise RemoteProtocolError(f"a ping of {len(question)} bytes, expected {_PING_BYTES}")
        await stream.send(question)


def _close_all(connections: Iterable[Connection]) -> None:
    for connection in connections:
        connection.close_now("the peer broke the rules")


def _parse(text: str, what: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise ConfigError(f"bad {what} address: {error}") from None


async def _listen(address: Address) -> tuple[list[socket.socket], Address]:
    """The listeners, and the address with its present port."""
    if address.kind not in ("ip4", "ip6"):
        raise ConfigError(f"cannot listen on {address}: give an IP address, as in /ip4/127.0.0.1/tcp/0")
    try:
        opened = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ConfigError(f"cannot listen on {address}: {reason}") from error
    listeners = [socket.socket(fileno=each.socket.detach()) for each in opened]
    for each in listeners:
        each.setblocking(False)
        share_port(each)
    port = listeners[0].getsockname()[1]
    return listeners, Address(address.kind, address.host, port)


def _first_fault(group: BaseExceptionGroup[PeerFault]) -> PeerFault:
    error = group.exceptions[0]
    return _first_fault(error) if isinstance(error, BaseExceptionGroup) else error
