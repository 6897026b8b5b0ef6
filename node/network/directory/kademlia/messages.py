"""Kademlia's messages: protocol buffers behind a varint length, as libp2p has them.

    FIND_NODE       the peers that are nearest to a key
    GET_PROVIDERS   the same, and the peers that provide the key
    ADD_PROVIDER    the sender provides the key
    PING            nothing

PUT_VALUE and GET_VALUE are refused: no part of Raceme keeps values, and each would be memory for a stranger.
Fields that are not used (records, signatures, connection types) are passed over.  Written by hand, since a
general decoder builds objects for whatever a message holds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from node.network.directory.kademlia.contact import NEAREST, Contact
from routing.names import PeerId, peer_id_bytes, peer_id_from_bytes
from routing.view.records import MAX_ADDRESSES, check_address
from tensor_codec.errors import MessageError

MAX_KEY_BYTES = 80  # libp2p's bound
_TYPE, _KEY, _CLOSER, _PROVIDERS = 1, 2, 8, 9
_PEER_ID, _PEER_ADDRESS = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Kind(IntEnum):
    """The kinds of message, by libp2p's numbers."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, slots=True)
class Message:
    """A question or its answer.  closer, providers: NEAREST at most."""

    kind: Kind
    key: bytes = b""
    closer: tuple[Contact, ...] = ()
    providers: tuple[Contact, ...] = ()


def encode(message: Message) -> bytes:
    """The message's bytes, without their length."""
    parts = [_number(_TYPE, message.kind)]
    if message.key:
        parts.append(_field(_KEY, message.key))
    parts += [_field(_CLOSER, _contact(contact)) for contact in message.closer]
    parts += [_field(_PROVIDERS, _contact(contact)) for contact in message.providers]
    return b"".join(parts)


def decode(data: bytes) -> Message:
    """Read a message.  Peers with keys of other kinds are passed over.  Raises MessageError."""
    kind, key = 0, b""
    closer, providers = list[Contact](), list[Contact]()
    for number, value in _fields(data):
        if number == _TYPE and isinstance(value, int):
            kind = value
        elif number == _KEY and isinstance(value, bytes):
            key = value
        elif number in (_CLOSER, _PROVIDERS) and isinstance(value, bytes):
            contacts = closer if number == _CLOSER else providers
            if len(contacts) < NEAREST and (contact := _read_contact(value)) is not None:
                contacts.append(contact)
    if kind not in Kind.__members__.values():
        raise MessageError(f"a Kademlia message of kind {kind}, known are 0 to {max(Kind)}")
    if len(key) > MAX_KEY_BYTES:
        raise MessageError(f"a Kademlia key of {len(key)} bytes, at most {MAX_KEY_BYTES} are allowed")
    return Message(Kind(kind), key, tuple(closer), tuple(providers))


def encode_varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """The number at this place, and the place after it; None if it is not whole.  Raises MessageError."""
    number = 0
    for index in range(10):
        if at + index >= len(data):
            return None
        byte = data[at + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return number, at + index + 1
    raise MessageError("a number of more than 64 bits in a Kademlia message")


def _number(field: int, value: int) -> bytes:
    return encode_varint(field << 3 | _VARINT) + encode_varint(value)


def _field(field: int, value: bytes) -> bytes:
    return encode_varint(field << 3 | _BYTES) + encode_varint(len(value)) + value


def _contact(contact: Contact) -> bytes:
    addresses = [_field(_PEER_ADDRESS, _pack_address(text)) for text in contact.addresses[:MAX_ADDRESSES]]
    return _field(_PEER_ID, peer_id_bytes(contact.peer)) + b"".join(addresses)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field's number and value.  Raises MessageError."""
    at = 0
    while at < len(data):
        tag, at = _whole(read_varint(data, at))
        wire = tag & 7
        if wire == _VARINT:
            number, at = _whole(read_varint(data, at))
            yield tag >> 3, number
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise MessageError(f"a field of wire type {wire} in a Kademlia message")
        size = 8 if wire == _FIXED64 else 4
        if wire == _BYTES:
            size, at = _whole(read_varint(data, at))
        if size > len(data) - at:
            raise MessageError(f"a field of {size} bytes in a Kademlia message, {len(data) - at} are left")
        if wire == _BYTES:
            yield tag >> 3, bytes(data[at : at + size])
        at += size


def _whole(found: tuple[int, int] | None) -> tuple[int, int]:
    if found is None:
        raise MessageError("a Kademlia message that is cut short")
    return found


def _read_contact(data: bytes) -> Contact | None:
    """A peer; None for an id that we cannot check."""
    peer: PeerId | None = None
    addresses: dict[str, None] = {}
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == _PEER_ID:
            try:
                peer = peer_id_from_bytes(value)
            except ValueError:
                return None
        elif (
            number == _PEER_ADDRESS
            and len(addresses) < MAX_ADDRESSES
            and (text := _read_address(value)) is not None
        ):
            addresses[text] = None
    return None if peer is None else Contact(peer, tuple(addresses))


# --- multiaddrs in binary form: https://github.com/multiformats/multiaddr ---

_CODES = {"ip4": 4, "ip6": 41, "dns": 53, "dns4": 54, "dns6": 55}
_NAMES = {code: name for name, code in _CODES.items()}
_TCP = 6
_P2P = 421


def _pack_address(text: str) -> bytes:
    _, kind, host, _, port = text.split("/")
    if kind in ("ip4", "ip6"):
        packed = ipaddress.ip_address(host).packed
    else:
        packed = encode_varint(len(host)) + host.encode()
    return encode_varint(_CODES[kind]) + packed + bytes([_TCP]) + int(port).to_bytes(2, "big")


def _read_address(data: bytes) -> str | None:
    """A TCP multiaddr that can be dialled, without /p2p; None for any other."""
    if not data or (kind := _NAMES.get(data[0])) is None:
        return None
    if kind in ("ip4", "ip6"):
        size, at = (4, 1) if kind == "ip4" else (16, 1)
    else:
        size, at = (data[1], 2) if len(data) > 1 and data[1] < 0x80 else (len(data), 0)
    host, rest = data[at : at + size], data[at + size :]
    if len(host) < size or len(rest) < 3 or rest[0] != _TCP or not _is_end(rest[3:]):
        return None
    name = str(ipaddress.ip_address(host)) if kind in ("ip4", "ip6") else host.decode("ascii", "replace")
    text = f"/{kind}/{name}/tcp/{int.from_bytes(rest[1:3], 'big')}"
    try:
        check_address(text)
    except ValueError:
        return None
    return text


def _is_end(rest: bytes) -> bool:
    """Whether nothing follows, or the peer's id."""
    return not rest or rest.startswith(encode_varint(_P2P))
