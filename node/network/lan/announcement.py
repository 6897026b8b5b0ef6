"""What a node says of itself by multicast DNS, and the bounds within which it believes others.

An announcement is a TXT record of the service _p2p._udp.local., as libp2p's specification of mDNS has it: a
string dnsaddr=MULTIADDR/p2p/ID for each address.  One more string, raceme=SWARM, names the swarm: "public",
or the id of a private swarm, which does not reveal its key.  Anybody in the local network may say anything
here.  An announcement only leads to a dial, in which the peer proves its id, and in a private swarm its
membership.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from node.network.addresses import Address, Reach, parse_address, reach_of
from routing.names import PeerId
from tensor_codec.limits import Limits

SERVICE = "_p2p._udp.local."
MAX_ADDRESSES = 4  # of one peer: as many as a node announces
_ADDRESS, _SWARM = b"dnsaddr=", b"raceme="
_MAX_STRING_BYTES = 255  # a string's length has one byte (RFC 1035, section 3.3)


class LanPeer(NamedTuple):
    """A peer that has announced itself, and its multiaddrs without /p2p."""

    peer: PeerId
    addresses: tuple[str, ...]


def write_announcement(peer: PeerId, swarm: str, listening: Sequence[str]) -> bytes:
    """The TXT record of a node; it has no address where nobody else could dial this node."""
    strings = [_SWARM + swarm.encode()]
    dialled = [text for text in listening if _can_be_dialled(parse_address(text))]
    strings += [_ADDRESS + f"{text}/p2p/{peer}".encode() for text in dialled[:MAX_ADDRESSES]]
    return b"".join(bytes([len(each)]) + each for each in strings if len(each) <= _MAX_STRING_BYTES)


def read_announcement(text: bytes, swarm: str, limits: Limits) -> LanPeer | None:
    """The peer of a TXT record; None for another swarm's, another program's, or nonsense.

    A record counts as a whole: with two peers in it there is none.
    """
    if len(text) > limits.max_lan_announcement_bytes:
        return None
    strings = list(_strings(text))
    if _SWARM + swarm.encode() not in strings:
        return None
    found: list[Address] = []
    for each in strings:
        if not each.startswith(_ADDRESS):
            continue
        try:
            address = parse_address(each[len(_ADDRESS) :].decode("ascii"))
        except ValueError:  # of the text, or not ASCII
            continue
        if address.peer is not None and _can_be_dialled(address):
            found.append(address)
    peers = {address.peer for address in found}
    if len(peers) != 1 or (peer := peers.pop()) is None:
        return None
    return LanPeer(peer, tuple(dict.fromkeys(map(str, found)))[:MAX_ADDRESSES])


def _strings(text: bytes) -> Iterator[bytes]:
    """The strings of a TXT record, as far as they are whole."""
    position = 0
    while position < len(text):
        end = position + 1 + text[position]
        if end > len(text):
            return
        yield text[position + 1 : end]
        position = end


def _can_be_dialled(address: Address) -> bool:
    """Whether another machine can dial it.  Names are left out: who resolves them decides where they lead."""
    if address.kind not in ("ip4", "ip6") or address.port == 0:
        return False
    return reach_of(address.host) not in (None, Reach.LOOPBACK)


def interfaces_of(listening: Iterable[str]) -> tuple[str, ...]:
    """The IPv4 addresses from which a node announces itself: the private ones on which it listens.

    Next to a public address live other people's servers, to which multicast is noise.
    """
    found = [address for address in map(parse_address, listening) if _can_be_dialled(address)]
    local = [a.host for a in found if a.kind == "ip4" and reach_of(a.host) is not Reach.PUBLIC]
    return tuple(dict.fromkeys(local))


def is_alone(listening: Iterable[str]) -> bool:
    """Whether no other machine can dial a node that listens there, at all."""
    return not any(map(_can_be_dialled, map(parse_address, listening)))


def packed(hosts: Iterable[str]) -> list[bytes]:
    """The bytes of IP addresses, as DNS has them."""
    return [ipaddress.ip_address(host).packed for host in hosts]
