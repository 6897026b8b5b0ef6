"""The network of a peer by its addresses: the part of an address that one customer of a provider may have."""

from __future__ import annotations

import ipaddress
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache

from routing.names import PeerId

_NETWORK_BITS = {4: 24, 6: 48}


def network_of(addresses: Sequence[str]) -> str:
    """The network of the first public IP address among these multiaddrs: "198.51.100.0/24", or a /48.

    "" without one: peers on one machine, in one house, or behind names are never counted together.
    """
    return next((network for address in addresses if (network := _network(address))), "")


def draw(peers: Mapping[PeerId, Sequence[str]], most: int, rng: random.Random) -> list[PeerId]:
    """Up to `most` of these peers by chance: a network first, then a peer in it.

    peers: with their addresses.  So any number of ids in one network counts as one peer.  A peer without a
    public address counts as a network.  Every network gives one peer before any gives a second.
    """
    networks: dict[str, list[PeerId]] = defaultdict(list)
    for peer in sorted(peers):
        networks[network_of(peers[peer]) or peer].append(peer)
    found: list[PeerId] = []
    while len(found) < most and networks:
        for name in rng.sample(list(networks), min(most - len(found), len(networks))):
            found.append(networks[name].pop(rng.randrange(len(networks[name]))))
            if not networks[name]:
                del networks[name]
    return found


@lru_cache(maxsize=16_384)
def _network(multiaddr: str) -> str:
    parts = multiaddr.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return ""
    try:
        address = ipaddress.ip_address(parts[2])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if not address.is_global:
        return ""
    return str(ipaddress.ip_network((address, _NETWORK_BITS[address.version]), strict=False))
