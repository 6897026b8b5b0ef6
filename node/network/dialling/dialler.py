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
from node.network.dialling.networks import OwnNetworks
from node.network.dialling.race import MAX_ANSWERS, Race, open_tcp, resolve
from node.network.prefixes import address_prefix, is_local
from node.network.transport.connection import Connection
from node.network.transport.link import SocketLink
from node.network.transport.noise import SecureChannel
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, SlowPeer
from tensor_codec.limits import Limits

Purpose = Literal["session", "ping", "directory"]
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
                    async with self._places[purpose]:
                        return await self._dial(peer, readable, unreadable, silent)
            said_nothing = f": not a word from {', '.join(map(str, silent))}" if silent else ""
            raise SlowPeer(f"no connection to {peer} within {seconds:g} s{said_nothing}")
        finally:
            statistics = lock.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._locks.pop(peer, None)

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
        self, peer: PeerId, addresses: list[Address], unreadable: list[str], silent: list[Address]
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
        race = self._race(peer, silent)
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
                    race = self._race(peer, silent, others)
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
        self, peer: PeerId, silent: list[Address], earlier: list[tuple[Address, PeerFault]] | None = None
    ) -> Race[SecureChannel]:
        """earlier: failures of the other addresses; None: this is the first dial to any of them."""
        attempt = partial(self._attempt, peer, earlier is None)
        return Race(attempt, self._resolve, lambda late: late.link.close(), earlier or [], silent)

    async def _resolve(self, name: Address) -> list[Address]:
        """As `resolve`, MAX_ANSWERS at most.  Raises PeerGone."""
        found = (await resolve(name))[:MAX_ANSWERS]
        self.networks.resolved(name, found)
        return found

    async def _attempt(self, peer: PeerId, first: bool, address: Address) -> SecureChannel:
        """One dial to an IP address.  Raises PeerFault; PeerGone where the rules forbid it.

        first: where the peer ends the connection at once another dial follows, so no pause begins.
        """
        self._raise_unless_allowed(address)
        began, name = trio.current_time(), str(address)
        try:
            link = SocketLink(await open_tcp(address), self._limits.tcp_user_timeout_seconds)
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
