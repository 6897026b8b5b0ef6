"""Network prefixes: the part of an IP address that one person has for the asking.

One host has an IPv4 address, but as many IPv6 addresses as it likes of its /64.  One provider's customer may
have many of them: a /24, a /48.  Peer ids cost nothing, so shares are counted by prefix first.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from node.network.addresses import Reach, reach_of

_HOST_BITS = {4: 32, 6: 64}
_NETWORK_BITS = {4: 24, 6: 48}


@lru_cache(maxsize=4096)  # asked for with each stream
def address_prefix(host: str) -> str:
    """The addresses that one host has: "192.0.2.7/32", "2001:db8::/64".

    host: an IP address; its zone is ignored, and an IPv4 address in IPv6's form counts as the former.
    "" for no IP address.
    """
    return _prefix(host, _HOST_BITS)


def network_prefix(host: str) -> str:
    """The addresses that one customer of a provider may have: "192.0.2.0/24", "2001:db8::/48".

    "" for no IP address.
    """
    return _prefix(host, _NETWORK_BITS)


@lru_cache(maxsize=4096)
def network_of(prefix: str) -> str:
    """The network prefix that an address prefix lies in; "" for ""."""
    return network_prefix(prefix.partition("/")[0])


@lru_cache(maxsize=4096)
def is_local(prefix: str) -> bool:
    """Whether the peers of this prefix are on this machine or in its private network, or have no address."""
    host = prefix.partition("/")[0]
    return not host or reach_of(host) is not Reach.PUBLIC


def sharer(peer: str, prefix: str) -> str:
    """The name under which a peer's share of something is counted: its public prefix, else its id.

    Peers of one public address share; a local network has many honest peers at one address.
    """
    return peer if is_local(prefix) else prefix


def _prefix(host: str, bits: dict[int, int]) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return str(ipaddress.ip_network((address, bits[address.version]), strict=False))
