"""The plan of a lab: its hosts, their addresses, and the steps that make them.  Pure: it starts nothing.

The Internet is one router.  Each public host and each home has a /24 and a /48 of its own: of those for
benchmarks (RFC 2544) and for documentation (RFC 3849).  Every second one is in another /16.  Packets for
private addresses vanish, as mostly in life.  The private networks of all homes behind NAT have the same
addresses.  IPv6 is routed without NAT, and filtered by state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tests.netlab.rules import KINDS, TABLES, Kind, forwarding, has_nat, rules

INTERNET = "internet"  # the router
BRIDGE = "br0"
PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
LAN = "192.168.1"
MAX_NAME = 13  # letters: of a device's 15, two are the prefix
_HOMES = 100  # public hosts have the networks below this number
_LANS6 = 1000  # networks from this number on are of homes' IPv6
_HOST = 11  # the first host of each network; its router is 1


@dataclass(frozen=True, slots=True)
class Line:
    """A host's or a home's way to the Internet.

    milliseconds: one way.  mbit: a second, each way.  queue_ms: frames that would wait longer are dropped.
    """

    milliseconds: float
    mbit: float = math.inf
    queue_ms: float = math.inf


@dataclass(frozen=True, slots=True)
class Namespace:
    """A step: make a host."""

    host: str


@dataclass(frozen=True, slots=True)
class Cable:
    """A step: join a host's device and a bridge of another host.  line: None for an ideal cable."""

    bridge_host: str
    bridge: str
    host: str
    device: str
    line: Line | None = None

    @property
    def port(self) -> str:
        """The device at the bridge's end."""
        return f"p-{self.host}"


@dataclass(frozen=True, slots=True)
class Ip:
    """A step: `ip WORDS` on a host."""

    host: str
    words: str


@dataclass(frozen=True, slots=True)
class Setting:
    """A step: a sysctl on a host."""

    host: str
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Rules:
    """A step: load rules of nftables on a host."""

    host: str
    text: str


Step = Namespace | Cable | Ip | Setting | Rules


@dataclass(slots=True)
class Host:
    """ip4, ip6: as others would dial it, if they could.  home: "" for a host of the Internet."""

    name: str
    ip4: str
    ip6: str = ""
    home: str = ""
    device: str = "eth0"


@dataclass(frozen=True, slots=True)
class Home:
    """A router and its hosts.  network: the LAN's first three numbers.  number: from 1, in order of time."""

    name: str
    kind: Kind
    number: int
    network: str
    hosts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Topology:
    """Every method adds to the plan, and returns the steps that make the addition, in their order.

    Raises ValueError for a name that is taken or too long, for an unknown kind, and for no host.
    """

    hosts: dict[str, Host] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)
    _publics: int = 0

    def internet(self) -> list[Step]:
        """The router of all; its namespace is there."""
        own = self._add(_on_the_internet(INTERNET, 0, host=1))
        own.device = BRIDGE
        lines = (
            f"link add {BRIDGE} type bridge forward_delay 0",
            f"link set {BRIDGE} up",
            *(f"route add blackhole {network}" for network in PRIVATE),
        )
        silent = [
            Setting(INTERNET, f"net.ipv4.conf.{each}.send_redirects", "0") for each in ("all", "default")
        ]
        return [*silent, *(Ip(INTERNET, line) for line in lines), *_addresses(own), *_forwards(INTERNET)]

    def public(self, name: str, line: Line | None = None) -> list[Step]:
        """A host with public addresses and no filter.  Raises ValueError for too many, too."""
        self._publics += 1
        if self._publics >= _HOMES:
            raise ValueError(f"{self._publics} public hosts, at most {_HOMES - 1} are allowed")
        host = self._add(_on_the_internet(name, self._publics))
        return [Namespace(name), Cable(INTERNET, BRIDGE, name, "eth0", line), *_joined(host)]

    def home(
        self, name: str, kind: Kind, hosts: int, line: Line | None = None, *, ipv6: bool = True
    ) -> list[Step]:
        """A router, and on its LAN the hosts `name`1, `name`2...; line: of the router."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}, known are {', '.join(KINDS)}")
        if hosts < 1:
            raise ValueError(f"{hosts} hosts in the home {name!r}, at least 1 is needed")
        number = len(self.homes) + 1
        home = Home(name, kind, number, LAN if has_nat(kind) else f"198.51.{number}")
        router = self._add(_on_the_internet(name, _HOMES + number))
        router.device = "wan"
        router.ip6 = router.ip6 if ipv6 else ""
        self.homes[name] = home
        steps: list[Step] = [Namespace(name), Cable(INTERNET, BRIDGE, name, "wan", line)]
        steps += self._router(home, router)
        for index in range(hosts):
            steps += self._host(home, index, ipv6)
        return [*steps, Rules(name, rules(kind))] if kind != "open" else steps

    def _router(self, home: Home, router: Host) -> list[Step]:
        steps: list[Step] = [
            *_joined(router),
            Ip(home.name, "link add lan type bridge forward_delay 0"),
            Ip(home.name, "link set lan up"),
            Ip(home.name, f"addr add {home.network}.1/24 dev lan"),
            *_forwards(home.name),
        ]
        if not has_nat(home.kind):
            steps.append(Ip(INTERNET, f"route add {home.network}.0/24 via {router.ip4}"))
        if router.ip6:
            network6 = f"2001:db8:{_LANS6 + home.number}"
            steps += [
                Ip(home.name, f"addr add {network6}::1/64 dev lan nodad"),
                Ip(INTERNET, f"route add {network6}::/64 via {router.ip6} dev {BRIDGE}"),
            ]
        return steps

    def _host(self, home: Home, index: int, ipv6: bool) -> list[Step]:
        host = Host(f"{home.name}{index + 1}", f"{home.network}.{_HOST + index}", home=home.name)
        host.ip6 = f"2001:db8:{_LANS6 + home.number}::{_HOST + index}" if ipv6 else ""
        self._add(host)
        home.hosts.append(host.name)
        return [
            Namespace(host.name),
            Cable(home.name, "lan", host.name, "eth0"),
            *_addresses(host),
            *_routes(host),
        ]

    def forward(self, home: str, port: int, host: str) -> list[Step]:
        """A TCP port of a router leads to the same port of a host."""
        return [Rules(home, forwarding(port, self.hosts[host].ip4))]

    def forget(self, home: str) -> list[Step]:
        """The router starts again: forwarded ports are gone, and its rules are new."""
        kind = self.homes[home].kind
        if kind == "open":
            return []
        return [Rules(home, "".join(f"delete table {table}\n" for table in TABLES) + rules(kind))]

    def cut(self, name: str) -> list[Step]:
        """Pull a host's cable: no packet passes, and no connection is reset."""
        return [Ip(*self._far_end(name, "down"))]

    def mend(self, name: str) -> list[Step]:
        """Put the cable in again."""
        return [Ip(*self._far_end(name, "up"))]

    def _far_end(self, name: str, state: str) -> tuple[str, str]:
        # Not the host's own end: its routes, and its IPv6 addresses, would go with it.
        return self.hosts[name].home or INTERNET, f"link set p-{name} {state}"

    def readdress(self, name: str, ip4: str) -> list[Step]:
        """A host gets another IPv4 address, as a laptop that changes networks.

        ip4: of the same /24.  The IPv6 address stays.
        """
        host = self.hosts[name]
        old, host.ip4 = host.ip4, ip4
        return [
            Ip(name, f"addr del {old}/24 dev {host.device}"),
            Ip(name, f"addr add {ip4}/24 dev {host.device}"),
            Ip(name, f"route replace default via {_gateways(host)[0]}"),
        ]

    def bridge(self, name: str, device: str, ip4: str) -> list[Step]:
        """A bridge of a host's own with an address, as a container engine makes it."""
        return [
            Ip(name, f"link add {device} type bridge"),
            Ip(name, f"addr add {ip4}/16 dev {device}"),
            Ip(name, f"link set {device} up"),
        ]

    def _add(self, host: Host) -> Host:
        if host.name in self.hosts:
            raise ValueError(f"the name {host.name!r} is taken")
        if not 0 < len(host.name) <= MAX_NAME:
            raise ValueError(
                f"the name {host.name!r} has {len(host.name)} letters, 1 to {MAX_NAME} are allowed"
            )
        self.hosts[host.name] = host
        return host


def _on_the_internet(name: str, number: int, host: int = _HOST) -> Host:
    """The addresses of a host in the network of this number."""
    return Host(name, f"198.{18 + number % 2}.{number}.{host}", f"2001:db8:{number}::{host}")


def _gateways(host: Host) -> tuple[str, str]:
    """Of its IPv4 and of its IPv6 network, which has 64 bits."""
    return f"{host.ip4.rpartition('.')[0]}.1", f"{host.ip6.rpartition('::')[0]}::1"


def _joined(host: Host) -> list[Step]:
    """A host on the Internet, and the router's address in its network."""
    four, six = _gateways(host)
    at_the_router = Host(INTERNET, four, six if host.ip6 else "", device=BRIDGE)
    return [*_addresses(at_the_router), *_addresses(host), *_routes(host)]


def _addresses(host: Host) -> list[Step]:
    steps: list[Step] = [Ip(host.name, f"addr add {host.ip4}/24 dev {host.device}")]
    if host.ip6:
        steps.append(Ip(host.name, f"addr add {host.ip6}/64 dev {host.device} nodad"))
    return steps


def _routes(host: Host) -> list[Step]:
    four, six = _gateways(host)
    steps: list[Step] = [Ip(host.name, f"route add default via {four}")]
    if host.ip6:
        steps.append(Ip(host.name, f"route add ::/0 via {six} dev {host.device}"))
    return steps


def _forwards(host: str) -> list[Step]:
    return [Setting(host, "net.ipv4.ip_forward", "1"), Setting(host, "net.ipv6.conf.all.forwarding", "1")]
