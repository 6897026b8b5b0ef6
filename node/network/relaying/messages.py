"""The messages of circuit relay v2 and of DCUtR, read and built; no stream and no clock.

The wire is libp2p's (specs/relay/circuit-v2 and specs/relay/DCUtR): protobuf, each message after its length
as a varint.  A peer's id in a message says whom to connect to, never who asks: the connection says that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from google.protobuf.message import DecodeError, Message
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from node.network.addresses import Address, parse_address
from routing.names import PeerId
from tensor_codec.errors import PeerGone, RemoteProtocolError
from tensor_codec.limits import MIB

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/stop"
DCUTR_PROTOCOL = "/libp2p/dcutr"
MAX_ADDRESSES = 8  # that are read of a message; the others are left out
# Of other programs' relays: with less a session does not begin.  libp2p's usual limits are 120 s and 128 KiB.
# A session outlives the end of a circuit, but 2048 positions are 32 MiB in float32, and 32 MiB back.
MIN_CIRCUIT_SECONDS, MIN_CIRCUIT_BYTES = 600, 128 * MIB
_MAX_ID_BYTES = 64  # an Ed25519 id has 38, an RSA id 34
_MAX_ADDRESS_BYTES = 256


class Status(IntEnum):
    """The answer of a relay, or of a relay's target; the numbers are the specification's."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


@dataclass(frozen=True, slots=True)
class Reserve:
    """Keep a place for the peer that asks: others may reach it through this relay."""


@dataclass(frozen=True, slots=True)
class Connect:
    """hop: a circuit to this peer, please.  stop: this peer asks for a circuit.

    is_limited: see `HopAnswer`.
    """

    peer: PeerId
    is_limited: bool = False


@dataclass(frozen=True, slots=True)
class HopAnswer:
    """A relay's answer.

    status: one of Status, or a number that we do not know.  expires_at: of a reservation, Unix seconds.
    is_limited: the relay ends the circuit before MIN_CIRCUIT_SECONDS or MIN_CIRCUIT_BYTES.
    """

    status: int
    expires_at: int | None = None
    is_limited: bool = False


@dataclass(frozen=True, slots=True)
class Punch:
    """A message of DCUtR.  is_sync: dial now.  addresses: IP addresses at which its sender was seen."""

    is_sync: bool
    addresses: tuple[Address, ...] = ()


def delimited(message: bytes) -> bytes:
    """A message after its length."""
    size, prefix = len(message), bytearray()
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*prefix, size)) + message


async def read_delimited(receive: Callable[[int], Awaitable[bytes]], max_bytes: int) -> bytes:
    """The next message, and no byte after it: the bytes of a circuit follow.

    receive: the next bytes, at most the given number; b"" at the end.
    Raises PeerGone at an earlier end, RemoteProtocolError for a length above `max_bytes`.
    """
    size = shift = 0
    while True:
        byte = await receive(1)
        if not byte:
            raise PeerGone("the stream ended before a message")
        size |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            break
        if shift > 21:
            raise RemoteProtocolError("the length of a message has more than three bytes")
    if size > max_bytes:
        raise RemoteProtocolError(f"a message of {size} bytes, at most {max_bytes}")
    message = b""
    while len(message) < size:
        more = await receive(size - len(message))
        if not more:
            raise PeerGone("the stream ended inside a message")
        message += more
    return message


# --- hop: a peer and its relay ---


def encode_reserve() -> bytes:
    """The question for a reservation."""
    return delimited(HopMessage(type=HopMessage.RESERVE).SerializeToString())


def encode_hop_connect(peer: PeerId) -> bytes:
    """The question for a circuit to a peer."""
    message = HopMessage(type=HopMessage.CONNECT)
    message.peer.id = _id_bytes(peer)
    return delimited(message.SerializeToString())


def encode_hop_status(status: Status) -> bytes:
    """A relay's answer without a reservation.  It names no limit: the specification's word for none."""
    message: Any = HopMessage(type=HopMessage.STATUS)
    message.status = status.value
    return delimited(message.SerializeToString())


def encode_reservation(expires_at: int, addresses: Iterable[str]) -> bytes:
    """A relay's answer with a reservation.

    expires_at: Unix seconds.  addresses: of the relay, multiaddrs with /p2p/ID.
    """
    message: Any = HopMessage(type=HopMessage.STATUS)
    message.status = Status.OK.value
    message.reservation.expire = expires_at
    message.reservation.addrs.extend(Multiaddr(each).to_bytes() for each in addresses)
    return delimited(message.SerializeToString())


def decode_hop(data: bytes) -> Reserve | Connect:
    """A question to a relay.  Raises RemoteProtocolError."""
    message: Any = _parsed(HopMessage(), data)
    if message.type == HopMessage.RESERVE:
        return Reserve()
    if message.type == HopMessage.CONNECT:
        return Connect(_peer(message.peer.id))
    raise RemoteProtocolError(f"a question of type {message.type} to a relay, known are 0 and 1")


def decode_hop_answer(data: bytes) -> HopAnswer:
    """A relay's answer.  Raises RemoteProtocolError."""
    message: Any = _parsed(HopMessage(), data)
    if message.type != HopMessage.STATUS:
        raise RemoteProtocolError(f"an answer of type {message.type} from a relay, expected 2")
    expires_at = message.reservation.expire if message.HasField("reservation") else None
    return HopAnswer(message.status, expires_at, _is_limited(message))


# --- stop: a relay and its target ---


def encode_stop_connect(source: PeerId) -> bytes:
    """A relay's word that a peer asks for a circuit."""
    message = StopMessage(type=StopMessage.CONNECT)
    message.peer.id = _id_bytes(source)
    return delimited(message.SerializeToString())


def encode_stop_status(status: Status) -> bytes:
    """The target's answer."""
    message: Any = StopMessage(type=StopMessage.STATUS)
    message.status = status.value
    return delimited(message.SerializeToString())


def decode_stop(data: bytes) -> Connect:
    """A relay's question to its target.  Raises RemoteProtocolError."""
    message: Any = _parsed(StopMessage(), data)
    if message.type != StopMessage.CONNECT:
        raise RemoteProtocolError(f"a question of type {message.type} from a relay, expected 0")
    return Connect(_peer(message.peer.id), _is_limited(message))


def decode_stop_status(data: bytes) -> int:
    """The target's answer: one of Status, or a number that we do not know.  Raises RemoteProtocolError."""
    message: Any = _parsed(StopMessage(), data)
    if message.type != StopMessage.STATUS:
        raise RemoteProtocolError(f"an answer of type {message.type} to a relay, expected 1")
    return int(message.status)


# --- DCUtR: two peers with a circuit ---


def encode_punch(punch: Punch) -> bytes:
    """A message of DCUtR."""
    kind = HolePunch.SYNC if punch.is_sync else HolePunch.CONNECT
    addresses = [Multiaddr(str(each)).to_bytes() for each in punch.addresses[:MAX_ADDRESSES]]
    return delimited(HolePunch(type=kind, ObsAddrs=addresses).SerializeToString())


def decode_punch(data: bytes) -> Punch:
    """A message of DCUtR; addresses that are not of TCP over IP are left out.  Raises RemoteProtocolError."""
    message: Any = _parsed(HolePunch(), data)
    if message.type not in (HolePunch.CONNECT, HolePunch.SYNC):
        raise RemoteProtocolError(f"a message of type {message.type} for a punch, known are 100 and 300")
    read = (_address(each) for each in message.ObsAddrs[:MAX_ADDRESSES])
    found = [each for each in read if each is not None]
    return Punch(message.type == HolePunch.SYNC, tuple(dict.fromkeys(found)))


def decode_observed(data: bytes) -> Address | None:
    """The address at which the sender of an identify message sees us; None where it names none.

    Raises RemoteProtocolError.
    """
    message: Any = _parsed(Identify(), data)
    return _address(message.observed_addr) if message.observed_addr else None


def _parsed(message: Message, data: bytes) -> Message:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise RemoteProtocolError(f"{len(data)} bytes that are no {type(message).__name__}") from error
    if "type" in message.DESCRIPTOR.fields_by_name and not message.HasField("type"):
        raise RemoteProtocolError(f"a {type(message).__name__} without its type")
    return message


def _is_limited(message: Any) -> bool:  # Any: protobuf's classes have no types
    """Whether a limit is named that is too small for a session; 0 is none."""
    if not message.HasField("limit"):
        return False
    seconds, size = int(message.limit.duration), int(message.limit.data)
    return 0 < seconds < MIN_CIRCUIT_SECONDS or 0 < size < MIN_CIRCUIT_BYTES


def _peer(data: bytes) -> PeerId:
    if not 0 < len(data) <= _MAX_ID_BYTES:
        raise RemoteProtocolError(f"a peer id of {len(data)} bytes, 1 to {_MAX_ID_BYTES} are allowed")
    return PeerId(ID(data).to_base58())


def _id_bytes(peer: PeerId) -> bytes:
    return bytes(ID.from_base58(peer).to_bytes())


def _address(data: bytes) -> Address | None:
    """Of a binary multiaddr; None for one that we do not dial."""
    if not 0 < len(data) <= _MAX_ADDRESS_BYTES:
        return None
    try:
        address = parse_address(str(Multiaddr(data)))
    except Exception:  # noqa: BLE001  # the library raises errors of any type for a peer's bytes
        return None
    return address if address.kind in ("ip4", "ip6") and address.port and not address.is_wildcard else None
