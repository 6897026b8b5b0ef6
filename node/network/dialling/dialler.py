"""Makes connections to peers: one dial to a peer at a time, several addresses raced against each other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import trio

from node.network.addresses import Address, dial_order, parse_address
from node.network.connection_table import ConnectionTable
from node.network.dialling.backoff import Backoff, DialPaused
from node.network.dialling.from_port import OwnPorts, PortTaken, open_tcp_from
from node.network.dialling.networks import OwnNetworks
from node.network.dialling.race import MAX_ANSWERS, STAGGER_SECONDS, Race, first_of, open_tcp, resolve
from node.network.prefixes import address_prefix, is_local
from node.network.relaying.circuits import Circuits, Routes
from node.network.transport.connection import Connection
from node.network.transport.link import SocketLink
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, SlowPeer
from tensor_codec.limits import Limits

Purpose = Literal["session", "ping", "directory", "relay"]
SILENT_SECONDS = 1.0  # after which an address whose dial is given up counts as failed
PORTS_OF_A_HOST = 2  # that one dial tries, of those that a peer has named: nobody listens on more
AGAIN_SECONDS = 0.5  # before a second dial to a peer that ended the connection at once: it may be crowded


class TurnedAway(PeerGone):
    """The connection was there and ended before the handshake was done."""


class Dialler:
    """Dials peers for one node.

    me: this node's own id, which is never dialled.
    add: turns a secured channel into a connection of the table.  Raises PeerGone.
    networks, backoff: the rules for addresses that peers have named.
    circuits: connections through relays.  ports: from which relays and punched peers are dialled.
    """

    def __init__(
        self,
        me: PeerId,
        limits: Limits,
        upgrade: Upgrade,
        connections: ConnectionTable,
        add: Callable[[SecureChannel], Awaitable[Connection]],
        rng: random.Random | None = None,
    ) -> None:
        self.networks = OwnNetworks()
        self.backoff = Backoff(limits, rng or random.Random())
        self.circuits = Circuits(limits, upgrade, add)
        self.ports = OwnPorts()
        self._me = me
        self._limits = limits
        self._upgrade = upgrade
        self._connections = connections
        self._add = add
        # of each purpose: silent peers delay pings and no session's dial
        self._places = {purpose: trio.CapacityLimiter(limits.max_dials) for purpose in get_args(Purpose)}
        self._locks: dict[PeerId, trio.Lock] = {}  # of peers that are dialled now

    async def connect(
        self,
        peer: PeerId,
        addresses: Sequence[str],
        seconds: float,
        purpose: Purpose = "session",
        most_addresses: int | None = None,
    ) -> Connection:
        """The live connection to a peer, or a new one.

        seconds: for all of it, including the wait for another task's dial to this peer.
        most_addresses: those reached before come first; None: all.
        Raises PeerGone, SlowPeer, NotAMember, RemoteProtocolError.
        """
        if peer == self._me:
            raise PeerGone("a node does not dial itself")
        lock = self._locks.setdefault(peer, trio.Lock())
        silent: list[Address] = []
        try:
            with trio.move_on_after(seconds):
                async with lock:  # one dial to a peer at a time; the other callers use its connection
                    live = self._connections.live(peer)
                    if live is not None:
                        return live
                    readable, unreadable = self._readable(addresses, peer, most_addresses)
                    dial = partial(self._dial, peer, readable, unreadable, silent)
                    async with self._places[purpose]:
                        if not (routes := self.circuits.routes_to(peer)).relays:
                            return await dial()
                        return await self._dial_or_relay(peer, routes, dial if readable else None)
            said_nothing = f": not a word from {', '.join(map(str, silent))}" if silent else ""
            raise SlowPeer(f"no connection to {peer} within {seconds:g} s{said_nothing}")
        finally:
            self._forget_lock(peer, lock)

    def _forget_lock(self, peer: PeerId, lock: trio.Lock) -> None:
        statistics = lock.statistics()
        if not statistics.locked and not statistics.tasks_waiting:
            self._locks.pop(peer, None)

    # --- relays ---

    async def _dial_or_relay(
        self, peer: PeerId, routes: Routes, dial: Callable[[], Awaitable[Connection]] | None
    ) -> Connection:
        """A new connection, direct or through a relay: the first that is there.  Raises PeerFault.

        dial: makes a direct one; None where the peer has no address.
        """
        through = [
            partial(self.dial_through, relay, peer, addresses)
            for relay, addresses in routes.relays
            if relay not in (self._me, peer)
        ]
        direct = [] if dial is None else [dial]
        head_starts = [0.0 if routes.at_once else STAGGER_SECONDS for _ in direct]
        return await first_of([*direct, *through], [*head_starts, *(STAGGER_SECONDS for _ in through)])

    async def dial_through(self, relay: PeerId, peer: PeerId, addresses: Sequence[str] = ()) -> Connection:
        """A new connection to a peer through a relay.

        addresses: of the relay, where it is not connected.  Raises PeerFault.
        """
        name = f"{peer} through {relay}"
        self._raise_if_paused(name, f"{name}: ")
        try:
            connection = self._connections.live(relay, direct=True) or await self.connect_to_relay(
                relay, addresses
            )
            made = await self.circuits.dial(connection, peer)
        except PeerFault:
            self.backoff.failed(name, trio.current_time())
            raise
        self.backoff.worked(name)
        return made

    async def connect_to_relay(self, relay: PeerId, addresses: Sequence[str]) -> Connection:
        """A direct connection from the port that this node listens on: others see that port's address.

        Another direct connection where that one cannot be made.  Raises PeerFault.
        """
        lock, purpose = self._locks.setdefault(relay, trio.Lock()), "relay"
        readable, unreadable = self._readable(addresses, relay, None)
        try:
            async with lock:
                if (connection := self._from_own_port(relay)) is not None:
                    return connection
                if not readable:
                    raise PeerGone(
                        f"no address of relay {relay} is known{''.join(map('; {}'.format, unreadable))}"
                    )
                async with self._places[purpose]:
                    return await self._dial(relay, readable, unreadable, [], from_own_port=True)
        except PeerFault:
            if (direct := self._connections.live(relay, direct=True)) is None:
                raise
            return direct
        finally:
            self._forget_lock(relay, lock)

    async def connect_directly(
        self, peer: PeerId, addresses: Sequence[str], kind: Literal["ip4", "ip6"] | None = None
    ) -> Connection:
        """A direct connection to a peer, also next to a circuit.

        kind: the family of IP; with one the connection is over it, also next to one of the other family.
        Raises PeerFault.
        """
        lock, purpose = self._locks.setdefault(peer, trio.Lock()), "relay"
        readable, unreadable = self._readable(addresses, peer, None)
        if kind is not None:
            readable = _over(kind, readable)
        try:
            async with lock:
                if (direct := _direct(self._connections, peer, kind)) is not None:
                    return direct
                async with self._places[purpose]:
                    return await self._dial(peer, readable, unreadable, [])
        finally:
            self._forget_lock(peer, lock)

    def _from_own_port(self, peer: PeerId) -> Connection | None:
        """A live connection to a peer, which sees us there as it would see our listener."""
        for each in self._connections.of(peer):
            if each.is_established and self.ports.are_left_by(each):
                return each
        return None

    async def dial_from_own_port(self, address: Address) -> SocketLink:
        """Connect to an address that a peer behind NAT has named, to meet its own dial.  Raises PeerGone.

        A failure counts for the rate of failed dials to the host, whoever is there.
        """
        self._raise_unless_allowed(address)
        began = trio.current_time()
        try:
            stream = await open_tcp_from(self.ports.of(address.kind), address)
        except PeerGone:
            self._failed(address, pause=False)
            raise
        except trio.Cancelled:
            if trio.current_time() >= began + SILENT_SECONDS:
                self._failed(address, pause=False)
            raise
        return SocketLink(stream, self._limits.tcp_user_timeout_seconds)

    # --- addresses ---

    def _readable(
        self, texts: Sequence[str], peer: PeerId, most: int | None
    ) -> tuple[list[Address], list[str]]:
        """The addresses that a dial to this peer may use, and the reason against each other address."""
        addresses, unreadable = _readable(texts, peer)
        addresses, others = self._few_ports(addresses)
        unreadable += [f"{other}: an address too many of its host" for other in others]
        if most is not None:
            addresses = sorted(
                dial_order(addresses), key=lambda address: not self.backoff.was_reached(str(address))
            )[:most]
        return addresses, unreadable

    def _few_ports(self, addresses: list[Address]) -> tuple[list[Address], list[Address]]:
        """The addresses with PORTS_OF_A_HOST of each public host at most, and the others.

        A record with many ports of a third party would else be as many dials of everybody that hears of it.
        """
        kept: list[Address] = []
        ports = Counter[str]()
        known = {each: self._is_known(each) for each in addresses}
        for address in sorted(addresses, key=lambda each: not known[each]):
            ports[address.host] += 1
            local = (prefix := address_prefix(address.host)) and is_local(prefix)
            if local or known[address] or ports[address.host] <= PORTS_OF_A_HOST:
                kept.append(address)
        return [each for each in addresses if each in kept], [each for each in addresses if each not in kept]

    def _is_known(self, address: Address) -> bool:
        """Whether our operator gave the address, or a dial to it has worked."""
        return self.networks.is_configured(address) or self.backoff.was_reached(str(address))

    async def _dial(
        self,
        peer: PeerId,
        addresses: list[Address],
        unreadable: list[str],
        silent: list[Address],
        from_own_port: bool = False,
    ) -> Connection:
        """A new connection, `dial_seconds` for all addresses together.

        Where all addresses fail, those that we know and that ended the connection at once are dialled once
        more.
        silent: at any time the addresses under trial.  Raises PeerGone, NotAMember.
        """
        self._connections.raise_if_banned(peer)
        self._connections.raise_if_full()
        if not any(self.networks.is_configured(each) or self.backoff.is_new(str(each)) for each in addresses):
            self._raise_if_paused(peer, f"{peer} cannot be reached: ")
        race = self._race(peer, silent, from_own_port=from_own_port)
        channel, seconds, done = None, self._limits.dial_seconds, False
        try:
            with trio.move_on_after(seconds):
                channel = await race.run(addresses)
                turned = [
                    (address, fault)
                    for address, fault in race.failures
                    if isinstance(fault, TurnedAway) and self._is_known(address)
                ]
                if channel is None and turned:
                    await trio.sleep(AGAIN_SECONDS)
                    others = [failure for failure in race.failures if failure not in turned]
                    race = self._race(peer, silent, others, from_own_port=from_own_port)
                    channel = await race.run([address for address, _ in turned])
            done = True
        finally:
            if channel is None and (done or race.failures):
                self.backoff.failed(peer, trio.current_time())
        if channel is not None:
            try:
                connection = await self._add(channel)
            except BaseException:
                channel.link.close()
                raise
            self.backoff.worked(peer)
            return connection
        for _, fault in race.failures:
            if isinstance(fault, NotAMember):  # the operator should read this one first
                raise fault
        reasons = [f"{address}: {fault}" for address, fault in race.failures]
        reasons += [f"{address}: no answer within {seconds:g} s" for address in race.unanswered]
        reasons += unreadable
        raise PeerGone(f"{peer} cannot be reached: {'; '.join(reasons) or 'none of its addresses is known'}")

    def _race(
        self,
        peer: PeerId,
        silent: list[Address],
        earlier: list[tuple[Address, PeerFault]] | None = None,
        *,
        from_own_port: bool = False,
    ) -> Race[SecureChannel]:
        """earlier: failures of the other addresses; None: this is the first dial to any of them."""
        attempt = partial(self._attempt, peer, earlier is None, from_own_port)
        return Race(attempt, self._resolve, lambda late: late.link.close(), earlier or [], silent)

    async def _resolve(self, name: Address) -> list[Address]:
        """As `resolve`, MAX_ANSWERS at most.  Raises PeerGone."""
        found = (await resolve(name))[:MAX_ANSWERS]
        self.networks.resolved(name, found)
        return found

    async def _attempt(
        self, peer: PeerId, first: bool, from_own_port: bool, address: Address
    ) -> SecureChannel:
        """One dial to an IP address.  Raises PeerFault; PeerGone where the rules forbid it.

        first: where the peer ends the connection at once another dial follows, so no pause begins.
        """
        self._raise_unless_allowed(address)
        began, name = trio.current_time(), str(address)
        try:
            stream = await (self._open_from_own_port(address) if from_own_port else open_tcp(address))
            link = SocketLink(stream, self._limits.tcp_user_timeout_seconds)
            try:
                channel = await self._upgrade.outbound(link, peer, name)
            except PeerGone as gone:
                link.close()
                raise TurnedAway(str(gone)) from gone
            except BaseException:
                link.close()
                raise
        except PeerFault as fault:
            again = first and isinstance(fault, TurnedAway) and self._is_known(address)
            self._failed(address, pause=not again)
            raise
        except trio.Cancelled:
            if trio.current_time() >= began + SILENT_SECONDS:
                self._failed(address)
            raise
        self.backoff.worked(name)
        return channel

    async def _open_from_own_port(self, address: Address) -> trio.SocketStream:
        """As `open_tcp`, from our own port unless an earlier connection to the address has it."""
        try:
            return await open_tcp_from(self.ports.of(address.kind), address)
        except PortTaken:
            return await open_tcp(address)

    def _raise_unless_allowed(self, address: Address) -> None:
        connected_from = (each.prefix.partition("/")[0] for each in self._connections if each.prefix)
        if (reason := self.networks.why_not(address, connected_from)) is not None:
            raise PeerGone(reason)
        if not self.networks.is_configured(address):
            self._raise_if_paused(str(address))
            if not self.backoff.may_dial_host(address.host, trio.current_time()):
                raise DialPaused(f"too many dials to {address.host} have failed")

    def _raise_if_paused(self, name: str, what: str = "") -> None:
        if (seconds := self.backoff.seconds_left(name, trio.current_time())) > 0:
            raise DialPaused(
                f"{what}the last dial failed a moment ago, the next one is made in {seconds:.1f} s"
            )

    def _failed(self, address: Address, *, pause: bool = True) -> None:
        now = trio.current_time()
        if pause:
            self.backoff.failed(str(address), now)
        self.backoff.host_failed(address.host, now)


def family_of(connection: Connection) -> Literal["ip4", "ip6"] | None:
    """The family of IP of a direct connection; None of one that is not live or goes through a relay."""
    remote = connection.channel.link.remote
    if remote is None or not connection.is_established:
        return None
    return "ip6" if ":" in remote[0].removeprefix("::ffff:") else "ip4"


def _direct(
    connections: ConnectionTable, peer: PeerId, kind: Literal["ip4", "ip6"] | None
) -> Connection | None:
    """A live direct connection to a peer, of this family of IP if one is given."""
    if kind is None:
        return connections.live(peer, direct=True)
    return next((each for each in connections.of(peer) if family_of(each) == kind), None)


def _over(kind: Literal["ip4", "ip6"], addresses: Sequence[Address]) -> list[Address]:
    """The addresses of one family of IP; a name of both stands for that family."""
    name: Literal["dns4", "dns6"] = "dns4" if kind == "ip4" else "dns6"
    found = [replace(each, kind=name) if each.kind == "dns" else each for each in addresses]
    return [each for each in found if each.kind in (kind, name)]


def _readable(texts: Sequence[str], peer: PeerId) -> tuple[list[Address], list[str]]:
    """The addresses that a dial to this peer may use, and the reason against each other address."""
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
