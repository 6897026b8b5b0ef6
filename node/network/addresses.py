"""The multiaddrs that we read, the choice of announced addresses, and the order of dialling.

A multiaddr is /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/PEER].  All of it is pure:
`node.network.interfaces` reads the machine's interfaces.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, zip_longest
from typing import Literal, cast, get_args

from node.config import ConfigError
from routing.names import PeerId, public_key_of

Kind = Literal["ip4", "ip6", "dns", "dns4", "dns6"]
MAX_ANNOUNCED = 4  # addresses of a wildcard listener: a record has room for few

_EXAMPLE = "/ip4/127.0.0.1/tcp/4001"
_MAX_CHARACTERS = 512
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens.  peer: its id, or None where the multiaddr names none."""

    kind: Kind
    host: str
    port: int
    peer: PeerId | None = None

    def __str__(self) -> str:
        """The multiaddr, without the peer."""
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    @property
    def is_wildcard(self) -> bool:
        """True for 0.0.0.0 and ::, which a node can listen on and no peer can dial."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_unspecified

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can dial it."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_loopback


def parse_address(text: str) -> Address:
    """Read a multiaddr.  Raises ValueError that names its fault and shows a right one."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"a multiaddr of {len(text)} characters, at most {_MAX_CHARACTERS} are allowed")
    parts = text.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp" or (len(parts) == 7 and parts[5] != "p2p"):
        raise ValueError(f"{text!r} is not a TCP multiaddr such as {_EXAMPLE} or {_EXAMPLE}/p2p/12D3KooW...")
    kind, host, port = parts[1], parts[2], parts[4]
    if kind not in get_args(Kind):
        known = ", ".join(f"/{each}" for each in get_args(Kind))
        hint = ": name the host itself, as in /dns4/HOST/tcp/PORT" if kind == "dnsaddr" else ""
        raise ValueError(f"{text!r} begins with /{kind}, known are {known}{hint}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f"{text!r} has port {port!r}, allowed are 0 to 65535")
    peer = None
    if len(parts) == 7:
        peer = PeerId(parts[6])
        try:
            public_key_of(peer)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
    return Address(cast("Kind", kind), _check_host(kind, host, text), int(port), peer)


def bootstrap_peers(multiaddrs: Sequence[str]) -> dict[PeerId, tuple[str, ...]]:
    """The addresses of each peer in a bootstrap list.  Raises ConfigError for one that no peer can dial."""
    peers: dict[PeerId, tuple[str, ...]] = {}
    for text in multiaddrs:
        try:
            address = parse_address(text)
        except ValueError as error:
            raise ConfigError(f"peer {error}") from None
        if address.peer is None:
            raise ConfigError(f"peer {text!r} lacks /p2p/ID at its end: whom to expect there")
        if address.is_wildcard or address.port == 0:
            raise ConfigError(f"peer {text!r} is an address to listen on, not one to dial")
        peers[address.peer] = (*peers.get(address.peer, ()), str(address))
    return peers


def _check_host(kind: str, host: str, text: str) -> str:
    if kind in ("ip4", "ip6"):
        try:
            return str((ipaddress.IPv4Address if kind == "ip4" else ipaddress.IPv6Address)(host))
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an {kind} address") from None
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r}: {host!r} is not a host name")
    return host


# --- the reach of addresses, and the choice among them ---


class Reach(IntEnum):
    """The reach of an address, the farthest first.

    INSIDE: this machine with its containers and virtual machines.  It includes IPv4's link-local addresses,
    which a machine takes without a DHCP server.
    """

    PUBLIC = 0
    PRIVATE = 1
    INSIDE = 2
    LOOPBACK = 3


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One IP address of an interface.

    temporary: an IPv6 privacy address (RFC 8981), which changes within a day.
    usable: False during IPv6's search for a duplicate, after a duplicate was found, and past its lifetime.
    """

    host: str
    temporary: bool = False
    usable: bool = True


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface.

    is_inner: it leads to containers or virtual machines of this machine, and no farther.
    """

    name: str
    addresses: tuple[InterfaceAddress, ...] = ()
    is_up: bool = True
    is_inner: bool = False


def reach_of(host: str) -> Reach | None:
    """The reach of an IP address; None for an address that needs an interface's name to dial."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_unspecified or address.is_multicast:
        return None
    if address.is_loopback:
        return Reach.LOOPBACK
    if address.is_link_local:
        return Reach.INSIDE if address.version == 4 else None
    return Reach.PRIVATE if any(address in network for network in _PRIVATE) else Reach.PUBLIC


# RFC 1918, RFC 6598 (carriers and VPNs), unique local addresses, and the site-local ones before them
_PRIVATE = tuple(
    ipaddress.ip_network(network)
    for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10")
)
_INNER_NAME = re.compile(
    r"docker[0-9]+|docker_gwbridge|br-[0-9a-f]{12}|virbr[0-9]+(-nic)?|vnet[0-9]+|veth.+|vmnet[0-9]+|vboxnet[0-9]+"
    r"|lxcbr[0-9]+|lxdbr[0-9]+|incusbr[0-9]+|cni[0-9]+|cni-podman[0-9]+|podman[0-9]+|nerdctl[0-9]+"
    r"|flannel.*|cali.+|vxlan\.calico|tunl0|cilium_.+|lxc[0-9a-f_].*|kube-.+|weave|nodelocaldns|waydroid[0-9]+"
)


def is_inner_interface(name: str, ports_lead_out: Iterable[bool] | None) -> bool:
    """Whether an interface leads to containers or virtual machines of this machine alone.

    ports_lead_out: of a bridge, for each of its ports whether it is hardware or made of hardware (a bond, a
    VLAN): this bridge connects the machine to its network.  None: it is no bridge.
    """
    if ports_lead_out is not None:
        return not any(ports_lead_out)
    return _INNER_NAME.fullmatch(name) is not None


def announced(listening: Sequence[Address], interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """The addresses that a node announces for its listening addresses, the farthest reach first.

    A wildcard stands for the addresses of all interfaces that are up; a chosen address is always announced.
    Addresses that reach only this machine are left out next to others, and loopback addresses are left out
    next to those.
    """
    ranked: dict[Address, Reach] = {}
    for address in listening:
        if not address.is_wildcard:
            reach = reach_of(address.host)
            ranked.setdefault(address, Reach.PRIVATE if reach is None else _chosen(reach))
            continue
        for host, reach in _hosts(address.kind, interfaces).items():
            ranked.setdefault(Address(address.kind, host, address.port), reach)
    nearest = min(ranked.values(), default=Reach.LOOPBACK)
    useful = [a for a in ranked if ranked[a] <= max(Reach.PRIVATE, nearest)]
    useful.sort(key=lambda each: ranked[each])  # stable: in the order given among equals
    return tuple(map(str, _few(useful, max(MAX_ANNOUNCED, sum(not a.is_wildcard for a in listening)))))


def _chosen(reach: Reach) -> Reach:
    return Reach.PRIVATE if reach is Reach.INSIDE else reach


def _hosts(kind: Kind, interfaces: Sequence[Interface]) -> Mapping[str, Reach]:
    """The IP addresses of one family that a wildcard listens on and others could dial."""
    version, found = (4 if kind == "ip4" else 6), dict[str, Reach]()
    for interface in interfaces:
        if not interface.is_up:
            continue
        own = [a for a in interface.addresses if a.usable and ipaddress.ip_address(a.host).version == version]
        lasting = [a for a in own if not a.temporary]
        for each in own:
            reach = reach_of(each.host)
            if reach is None or (each.temporary and any(_same_network(each, other) for other in lasting)):
                continue
            if interface.is_inner and reach is not Reach.LOOPBACK:
                reach = Reach.INSIDE
            found.setdefault(each.host, reach)
    return found


def _same_network(one: InterfaceAddress, other: InterfaceAddress) -> bool:
    """Whether two IPv6 addresses share their first 64 bits."""
    return int(ipaddress.ip_address(one.host)) >> 64 == int(ipaddress.ip_address(other.host)) >> 64


def _few(addresses: Sequence[Address], most: int) -> list[Address]:
    """The first addresses, with at least one of each family, for peers of one family."""
    first = {address.kind: address for address in reversed(addresses)}
    kept = set(chain(first.values(), [a for a in addresses if a not in first.values()][: most - len(first)]))
    return [address for address in addresses if address in kept]


def dial_order(addresses: Iterable[Address]) -> list[Address]:
    """Each address once, in the order in which they should be tried.

    Names and public addresses first, then private ones, then those inside a machine; IPv6 and IPv4
    alternate among equals, so that a family without a route costs one try (RFC 8305, section 4).
    """
    groups: dict[Reach, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        reach = reach_of(address.host) if address.kind in ("ip4", "ip6") else Reach.PUBLIC
        groups.setdefault(Reach.LOOPBACK if reach is None else reach, []).append(address)
    return [address for reach in sorted(groups) for address in _families_by_turns(groups[reach])]


def _families_by_turns(addresses: Sequence[Address]) -> list[Address]:
    """Alternate the families, beginning with the family of the first address."""

    def is_six(address: Address) -> bool:
        return address.kind in ("ip6", "dns6")

    first = [a for a in addresses if is_six(a) == is_six(addresses[0])]
    second = [a for a in addresses if is_six(a) != is_six(addresses[0])]
    return [a for pair in zip_longest(first, second) for a in pair if a is not None]
