"""Which addresses are asked about, which are dialled back, and which peers are asked.  All of it is pure."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from node.network.addresses import Address, Reach, parse_address, reach_of
from routing.names import PeerId
from routing.view.networks import draw
from routing.view.records import Record
from tensor_codec.messages.reach import MAX_ADDRESSES

Family = Literal["ip4", "ip6"]
FAMILIES: tuple[Family, ...] = ("ip4", "ip6")
_ANY = {"ip4": "0.0.0.0", "ip6": "::"}  # stands for the address that the other side sees


def to_ask_about(
    announced: Iterable[str], listening: Iterable[Address], further: Iterable[str] = ()
) -> tuple[str, ...]:
    """The addresses to ask about, at most MAX_ADDRESSES of each family of IP.

    None where this machine alone reaches the node.

    announced: the node's own multiaddrs.  listening: where it listens; each port is asked about at the
    address that others see, in case a router passes it on.  further: those that a port mapping has promised.
    Names are left out: they are dialled for nobody.
    """
    open_ports = [each for each in listening if reach_of_address(each) is not Reach.LOOPBACK]
    if not open_ports:
        return ()
    seen_at = [str(Address(each.kind, _ANY[each.kind], each.port)) for each in open_ports]
    named = [str(each) for each in map(parse_address, [*further, *announced]) if is_asked_about(each)]
    asked = list(dict.fromkeys([*seen_at, *named]))
    return tuple(text for kind in FAMILIES for text in of_family(asked, kind)[:MAX_ADDRESSES])


def is_asked_about(address: Address) -> bool:
    """Whether others can say something about this address: not about a name, nor this machine's inside."""
    return address.kind in _ANY and reach_of_address(address) in (Reach.PUBLIC, Reach.PRIVATE)


def reach_of_address(address: Address) -> Reach | None:
    """The reach of an IP address or a name; None for one that names no single host."""
    return reach_of(address.host) if address.kind in _ANY else Reach.PUBLIC


def seen_as(text: str, host: str) -> str:
    """The multiaddr of a question with the address that the other side sees in place of 0.0.0.0 or ::."""
    address = parse_address(text)
    if not address.is_wildcard or ipaddress.ip_address(host).version != _version(address):
        return text
    return str(Address(address.kind, host, address.port))


def to_dial_back(texts: Sequence[str], seen: str, most: int) -> dict[int, Address]:
    """The addresses of a question that are dialled, by index: those of the IP address from which it came.

    A peer has a node dial the peer's own machine and nobody else's.  seen: an IP address.
    Raises ValueError for an address that cannot be read.
    """
    found: dict[int, Address] = {}
    host = canonical(seen)
    for index, text in enumerate(texts):
        address = parse_address(seen_as(text, host))
        if address.kind not in _ANY or canonical(address.host) != host or not address.port:
            continue
        own = Address(address.kind, host, address.port)
        if own not in found.values() and len(found) < most:
            found[index] = own
    return found


def canonical(host: str) -> str:
    """An IP address without its zone, and as IPv4 where IPv6 only carries one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or address)
    return str(address)


def of_family(addresses: Iterable[str], kind: Family) -> tuple[str, ...]:
    """The multiaddrs that are dialled over this family of IP; a name of both counts for either."""
    names = (kind, "dns4" if kind == "ip4" else "dns6", "dns")
    return tuple(text for text in addresses if text.split("/", 2)[1] in names)


def whom_to_ask(
    records: Sequence[Record],
    but_for: Collection[PeerId],
    connected: Collection[PeerId],
    rng: random.Random,
    kind: Family = "ip4",
    askers: Collection[PeerId] = (),
) -> list[PeerId]:
    """The peers that may be asked over this family, the best first: public ones before private neighbours.

    Each network (/24, /48) gives one peer before any gives a second, so that one network's word is one of
    three.  records: of the view.  but_for: this node, and peers that were asked.
    connected: over this family.  askers: peers that have asked this node the same: they speak the protocol,
    whether or not there is a record of them yet.
    """
    usable = {
        record.peer: addresses
        for record in records
        if record.peer not in but_for
        and record.role != "client"
        and ((addresses := of_family(record.addresses, kind)) or record.peer in connected)
    }
    far = {peer: addresses for peer, addresses in usable.items() if any(map(_is_public, addresses))}
    near = {peer: addresses for peer, addresses in usable.items() if peer not in far}
    new = sorted(peer for peer in askers if peer in connected and peer not in usable and peer not in but_for)
    return draw(far, len(far), rng) + draw(near, len(near), rng) + new


def is_public(record: Record) -> bool:
    """Whether a peer announces an address of the Internet."""
    return any(map(_is_public, record.addresses))


def _is_public(text: str) -> bool:
    try:
        return reach_of_address(parse_address(text)) is Reach.PUBLIC
    except ValueError:
        return False


def _version(address: Address) -> int:
    return 4 if address.kind == "ip4" else 6
