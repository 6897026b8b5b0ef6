"""Which addresses a node dials: public ones, its own peers', and private ones of networks that it is part of.

Most addresses come from other peers, in records and tables.  A peer could name this machine's loopback, a
router, or a server behind this node's firewall, and learn by the time of the answer whether something is
there.  So a private address is dialled only where this node has an address of the same block, and a loopback
or link-local one only where this node's swarm is there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from node.network.addresses import Address, reach_of

PUBLIC = ""
LOOPBACK = "loopback"
LINK_LOCAL = "link-local"
_BLOCKS = tuple(
    ipaddress.ip_network(network)
    for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10")
)


def block_of(host: str) -> str:
    """The block of an IP address: "10.0.0.0/8", "loopback", "link-local"; PUBLIC for any other."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback or address.is_unspecified:
        return LOOPBACK
    if address.is_link_local:
        return LINK_LOCAL
    return next((str(block) for block in _BLOCKS if address in block), PUBLIC)


@dataclass(slots=True)
class OwnNetworks:
    """The blocks that a node is part of: by its own addresses, and by those of its own configuration.

    A node that listens nowhere and has no configured peer dials whatever its program tells it to.
    """

    _listens: bool = False
    _own: frozenset[str] = frozenset()
    _configured: set[Address] = field(default_factory=set)
    _resolved: dict[Address, frozenset[Address]] = field(default_factory=dict)  # of configured names

    def set_own(self, hosts: Iterable[str], *, listens: bool) -> None:
        """The IP addresses of this node."""
        self._own, self._listens = frozenset(map(block_of, hosts)), listens

    def configure(self, addresses: Iterable[Address]) -> None:
        """The operator has named these addresses."""
        self._configured.update(addresses)

    def resolved(self, name: Address, found: Iterable[Address]) -> None:
        """The present IP addresses of a name: a configured name's are configured until it has others."""
        if name in self._configured:
            self._resolved[name] = frozenset(found)

    def is_configured(self, address: Address) -> bool:
        """Whether the operator has named this address, or a name that resolves to it."""
        return address in self._configured or any(address in found for found in self._resolved.values())

    def why_not(self, address: Address, connected_from: Iterable[str] = ()) -> str | None:
        """The reason not to dial this address; None to dial it.  Names count once they are resolved.

        connected_from: IP addresses from which peers are connected now: their blocks are the node's too.
        """
        if address.kind not in ("ip4", "ip6") or not (self._listens or self._configured):
            return None
        if self.is_configured(address) or (block := block_of(address.host)) == PUBLIC:
            return None if reach_of(address.host) is not None else "names no single host"
        addresses = self._configured.union(*self._resolved.values())
        named = {block_of(each.host) for each in addresses if each.kind in ("ip4", "ip6")}
        if block in self._own or block in named or block in set(map(block_of, connected_from)):
            return None
        return f"a peer's {block} address, and this node is not there"
