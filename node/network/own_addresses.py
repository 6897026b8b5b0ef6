"""This machine's addresses, as a node listens on them, announces them, and dials others by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from node.network.addresses import Address, Reach, announced, reach_of
from node.network.interfaces import read_interfaces


class OwnAddresses(NamedTuple):
    """Where this node is.

    announced: multiaddrs for others.  hosts: IP addresses of this node.  listens: anywhere at all.
    chosen: the operator has named the announced ones.  found: multiaddrs by the interfaces, where it listens.
    listening: as the node was told to listen, with the present ports.
    """

    announced: tuple[str, ...]
    hosts: tuple[str, ...]
    listens: bool
    chosen: bool = False
    found: tuple[str, ...] = ()
    listening: tuple[Address, ...] = ()


def find_own_addresses(chosen: tuple[str, ...], listened_on: Sequence[Address]) -> OwnAddresses:
    """The present addresses, by the machine's interfaces.

    chosen: to be announced in place of the others.  A loopback address counts as this node's where it
    listens there, not where a wildcard only includes it.
    """
    interfaces = read_interfaces() if listened_on else []
    hosts = [address.host for address in listened_on if not address.is_wildcard]
    hosts += [
        each.host
        for interface in interfaces
        if interface.is_up and not interface.is_inner
        for each in interface.addresses
        if reach_of(each.host) is not Reach.LOOPBACK
    ]
    found = announced(listened_on, interfaces) if listened_on else ()
    texts = chosen or found
    named = [text.split("/") for text in texts]
    hosts += [parts[2] for parts in named if parts[1] in ("ip4", "ip6")]
    listening = tuple(listened_on)
    return OwnAddresses(texts, tuple(dict.fromkeys(hosts)), bool(listened_on), bool(chosen), found, listening)
