"""The forwarded ports of a node: when a router is asked, by which protocol, and when again.

A router at home drops connections from outside unless it forwards their port.  Two protocols ask for that:
NAT-PMP (RFC 6886), which is two UDP packets, and UPnP's Internet Gateway Device, which begins with a search
of a second.  Both give a lease.  A forwarded port proves nothing: a second NAT may stand before the router.
So the addresses here are candidates, to be dialled from outside before they are announced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from node.network.addresses import Address, Reach, parse_address, reach_of

Method = Literal["nat-pmp", "upnp"]
METHODS: tuple[Method, ...] = ("nat-pmp", "upnp")  # in the order of their costs

LEASE_SECONDS = 3600  # RFC 6886 advises 7200; the port of a node that was killed stays open this long
LEAST_RENEWAL_SECONDS = 10.0  # whatever short lease a router gives
# A router that starts again forgets its ports and may come back with another address, and tells nobody.
# Asking by NAT-PMP is two packets, by UPnP a search and four exchanges.
RENEWAL_SECONDS: Mapping[Method, float] = {"nat-pmp": 120.0, "upnp": 900.0}
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 1800.0  # after a refusal; most homes stay as they are
MAX_PORTS = 4  # forwarded for one node: IPv4 listeners beyond that are an operator's own affair


NO_ROUTER = "this machine has no default route"


class MappingError(Exception):
    """A router that forwards no port, with the reason in one line."""


class Ask(NamedTuple):
    """Have the router forward a port.

    port: of this node.  hosts: the IPv4 addresses on which this node listens there.
    outside_port: the wanted port of the router.
    """

    method: Method
    port: int
    hosts: frozenset[str]
    outside_port: int
    lease_seconds: int = LEASE_SECONDS


class Forwarding(NamedTuple):
    """A port of the router that leads to a port of this node.

    host: the router's own IPv4 address on its outer side.  lease_seconds: 0 for a forwarding without an end.
    """

    method: Method
    port: int
    host: str
    outside_port: int
    lease_seconds: int = LEASE_SECONDS


class Release(NamedTuple):
    """Have the router forget a port."""

    forwarding: Forwarding


class Wait(NamedTuple):
    """Nothing is due for so many seconds."""

    seconds: float


class ExtraAddress(NamedTuple):
    """An address that may lead to this node from outside, and the protocol that it comes from."""

    address: Address
    origin: Method


@dataclass(slots=True)
class _Port:
    """One port of this node.

    order: the methods, the one that worked last first.  tried: so many of them were refused in this round.
    """

    hosts: frozenset[str]
    due: float
    order: tuple[Method, ...] = METHODS
    tried: int = 0
    rounds_refused: int = 0
    asked: Ask | None = None
    forwarding: Forwarding | None = None
    ends: float = 0.0


@dataclass(slots=True)
class MappingPlan:
    """Decides what a router is asked; sends nothing and reads no clock.

    Promises, checked by tests/unit/test_mapping_plan.py:
      * NAT-PMP is asked before UPnP, and afterwards the method that worked;
      * a forwarding is renewed at half its lease, and after RENEWAL_SECONDS at most;
      * it gives an address until its lease is over, or until the router has another one;
      * after a round of refusals the next one comes after a minute, then ever later, up to half an hour;
      * a router whose own address is not public forwards to nowhere: its port is released;
      * a port without a listener is released, and at the end all are.
    """

    _ports: dict[int, _Port] = field(default_factory=dict)
    _unwanted: list[Forwarding] = field(default_factory=list)
    refusals: dict[Method, str] = field(default_factory=dict)  # the last reason of each method

    def set_ports(self, ports: Mapping[int, frozenset[str]], now: float) -> None:
        """The ports that need forwarding, with their addresses: see `ports_to_map`."""
        for port in self._ports.keys() - ports.keys():
            self._unwanted += _granted([self._ports.pop(port)])
        for port, hosts in ports.items():
            known = self._ports.get(port)
            if known is None:
                self._ports[port] = _Port(hosts, now)
            elif known.hosts != hosts:  # another network, perhaps another router
                known.hosts, known.order = hosts, METHODS
                self._ask_again(known, now)

    def look_again(self, now: float) -> None:
        """Ask for every port now: the address of the router may have changed, or its memory be lost."""
        for port in self._ports.values():
            self._ask_again(port, now)

    def _ask_again(self, port: _Port, now: float) -> None:
        port.due, port.tried, port.rounds_refused = now, 0, 0

    def next(self, now: float) -> Ask | Release | Wait:
        """The present task.  An `Ask` is to be answered with `granted` or `refused`."""
        for port in self._ports.values():
            if port.forwarding is not None and port.ends <= now:
                port.forwarding = None
        if self._unwanted:
            return Release(self._unwanted.pop())
        for number, port in self._ports.items():
            if port.due <= now:
                wanted = number if port.forwarding is None else port.forwarding.outside_port
                port.asked = Ask(port.order[port.tried], number, port.hosts, wanted)
                return port.asked
        times = [port.due for port in self._ports.values()]
        times += [port.ends for port in self._ports.values() if port.forwarding is not None]
        return Wait(max(0.0, min(times, default=now + LONGEST_PAUSE_SECONDS) - now))

    def granted(self, ask: Ask, forwarding: Forwarding, now: float) -> None:
        """The router forwards the port."""
        port = self._ports.get(ask.port)
        if port is None:
            self._unwanted.append(forwarding)
            return
        port.asked = None
        if not _is_public(forwarding.host):
            self._unwanted.append(forwarding)
            port.forwarding = None
            why = f"the router's own address {forwarding.host} is not public: there is another NAT before it"
            self.refusals[ask.method] = why
            self._pause(port, now)
            return
        if (before := port.forwarding) is not None and _place(before) != _place(forwarding):
            self._unwanted.append(before)
        lease = forwarding.lease_seconds or LEASE_SECONDS
        port.forwarding, port.ends = forwarding, now + lease if forwarding.lease_seconds else float("inf")
        port.order = (ask.method, *(method for method in METHODS if method != ask.method))
        port.tried = port.rounds_refused = 0
        port.due = now + max(LEAST_RENEWAL_SECONDS, min(lease / 2, RENEWAL_SECONDS[ask.method]))
        self.refusals.pop(ask.method, None)

    def refused(self, ask: Ask, why: str, now: float) -> None:
        """The router has not forwarded the port, or has not answered."""
        self.refusals[ask.method] = why
        port = self._ports.get(ask.port)
        if port is None or port.asked != ask:
            return
        port.asked = None
        port.tried += 1
        if port.tried >= len(port.order):
            self._pause(port, now)

    def _pause(self, port: _Port, now: float) -> None:
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(port.rounds_refused, 16))
        port.tried, port.due = 0, now + pause
        port.rounds_refused += 1

    def extra(self) -> tuple[ExtraAddress, ...]:
        """The addresses of the present forwardings, to be verified by dials from outside."""
        return tuple(
            ExtraAddress(Address("ip4", found.host, found.outside_port), found.method)
            for port in self._ports.values()
            if (found := port.forwarding) is not None
        )

    def releases(self) -> list[Forwarding]:
        """What to release at the end.  A request of NAT-PMP without an answer yet may have been granted."""
        found = [*self._unwanted, *_granted(self._ports.values())]
        asked = [port.asked for port in self._ports.values() if port.asked is not None]
        held = {(forwarding.method, forwarding.port) for forwarding in found}
        return found + [
            Forwarding(ask.method, ask.port, "", ask.outside_port)
            for ask in asked
            if ask.method == "nat-pmp" and (ask.method, ask.port) not in held
        ]


def _granted(ports: Iterable[_Port]) -> list[Forwarding]:
    return [port.forwarding for port in ports if port.forwarding is not None]


def _place(forwarding: Forwarding) -> tuple[Method, int]:
    """What a release deletes: for NAT-PMP what leads to this node's port, for UPnP the router's port."""
    number = forwarding.port if forwarding.method == "nat-pmp" else forwarding.outside_port
    return forwarding.method, number


def _is_public(host: str) -> bool:
    return reach_of(host) is Reach.PUBLIC


def ports_to_map(listening: Iterable[str]) -> dict[int, frozenset[str]]:
    """The ports that a router must forward, each with the node's IPv4 addresses there.

    listening: the multiaddrs on which a node listens.  Next to a public IPv4 address none needs forwarding,
    and on loopback alone none can be forwarded.  IPv6 has no NAT.
    """
    found: dict[int, frozenset[str]] = {}
    for address in map(parse_address, listening):
        if address.kind != "ip4":
            continue
        reach = reach_of(address.host)
        if reach is Reach.PUBLIC:
            return {}
        if reach is Reach.PRIVATE and (address.port in found or len(found) < MAX_PORTS):
            found[address.port] = found.get(address.port, frozenset()) | {address.host}
    return found
