"""Records: the announcements of peers about themselves, each signed by its peer.

On the wire a record is the msgpack array `[payload, public_key, signature]`.  The payload is a
msgpack map with its keys in order; the signature is Ed25519 over the domain `raceme-record-1` and
the payload's bytes.  The peer id is not on the wire: it follows from the public key, so no peer can sign
for another.  Unknown keys are ignored, since a later version may add some.  All known keys are checked here,
once, and trusted from then on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from routing.blocks import MAX_BLOCKS, Blocks
from routing.names import PUBLIC_KEY_BYTES, PeerId, peer_id_of, public_key_of
from routing.signed import SIGNATURE_BYTES, packed, public_key_in, signed, verified
from tensor_codec.errors import MessageError, PeerFault
from tensor_codec.header import Header, unpack_map
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import MAX_CACHE_TOKENS, MAX_QUEUE, MAX_RATE_SECONDS

Role = Literal["serve", "bootstrap", "client"]
State = Literal["joining", "online", "draining", "offline"]
Reach = Literal["unknown", "public", "relayed", "none"]
Unreached = Literal["", "timed out", "refused", "another peer"]

NOBODY = PeerId("")
ROLES = frozenset(get_args(Role))
STATES = frozenset(get_args(State))
REACHES = frozenset(get_args(Reach))
UNREACHED = frozenset(get_args(Unreached))
DOMAIN = b"raceme-record-1"
MAX_ADDRESSES = 8
MAX_ADAPTERS = 8
MAX_CODECS = 8
MAX_RANK = 4096  # of an adapter: as much as the hidden size of a large model
MAX_RTTS = 16
MAX_RELAYS = 3
MAX_THROUGH = 2  # multiaddrs of relays that are no peers of the swarm
MAX_LAN = 2  # private addresses
MAX_RELAY_MBIT = 1_000_000
MAX_IP_CHARACTERS = 45  # an IPv4 address in the longest form of IPv6
MAX_SEQ = 2**63
MIN_TTL_SECONDS, MAX_TTL_SECONDS = 1.0, 3600.0
MIN_RATE_SECONDS = 1e-7  # one token through one block; 0: not yet measured
MAX_RTT_SECONDS = 60.0


class RecordError(PeerFault):
    """A record that is forged, malformed, out of range or not of this swarm."""


@dataclass(frozen=True, slots=True)
class Record:
    """The announcement of one peer.  The defaults mean "not said"; `verify_record` returns checked values.

    addresses: multiaddrs without /p2p.  swarm: id of the swarm, "public" where the swarm has no key.
    blocks: of the whole model; this peer serves [start, stop) of them.
    next_start, next_stop: the blocks that the peer is about to move to; 0 and 0: no move.  Until then it
        serves [start, stop), or the blocks that both runs share.
    seconds_per_block: one decode step of one token of one session through one block; 0 where not
        yet measured (allowed only in state joining or offline).
    prefill_seconds_per_token: one token of a prefill through one block, in seconds.
    cache_tokens: free tokens of cache.
    session_tokens: of the longest session that the peer takes, rows times positions; 0: not said.
    step_tokens: of the largest step that the peer takes, in float32; 0: not said.
    prompts: whether the peer takes deep prompts; older versions do not say.
    codecs: of hidden states that the peer reads besides fp32 and bf16; older versions read no other.
    batches: whether the peer takes and sends frames of many sessions' steps; older versions do not say.
    queue: waiting time of a decode step, in times of its own computing; the mean of the last seconds.
    rtt: seconds to other peers and back, as this peer measured them.
    reach: whether others can dial this peer, as others have tried it: "public" at its addresses, "relayed"
        through its relays alone, "none" not at all, "unknown" where nobody has tried.
    unreached: what came of dials to a peer that others do not reach directly; "" where it was not said.
    relays: peers through which this one can be dialled.  through: multiaddrs with /p2p/ID of relays of which
        there may be no record.  helps: it relays for others, at `relay_mbit`
        (10**6 bits per second; 0: not said), and has carried `relayed_bytes` since its start, both ways.
    lan: private addresses, for peers with the same `seen`: the IP address under which others see this peer.
    seq: order among this peer's records; only the highest counts.
    """

    peer: PeerId = NOBODY
    addresses: tuple[str, ...] = ()
    swarm: str = "public"
    role: Role = "client"
    model: str = ""
    revision: str = ""
    blocks: int = 0
    start: int = 0
    stop: int = 0
    next_start: int = 0
    next_stop: int = 0
    state: State = "online"
    dtype: str = ""
    quantize: str = "none"
    adapters: tuple[str, ...] = ()
    seconds_per_block: float = 0.0
    prefill_seconds_per_token: float = 0.0
    cache_tokens: int = 0
    session_tokens: int = 0
    step_tokens: int = 0
    prompts: bool = False
    codecs: tuple[str, ...] = ()
    batches: bool = False
    lora: int = 0
    queue: float = 0.0
    rtt: Mapping[PeerId, float] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    reach: Reach = "unknown"
    relays: tuple[PeerId, ...] = ()
    through: tuple[str, ...] = ()
    lan: tuple[str, ...] = ()
    seen: str = ""
    helps: bool = False
    relay_mbit: int = 0
    relayed_bytes: int = 0
    unreached: Unreached = ""
    seq: int = 0
    ttl_seconds: float = 90.0
    name: str = ""
    version: str = ""

    @property
    def span(self) -> Blocks:
        """The blocks that this peer serves."""
        return Blocks(self.start, self.stop)

    @property
    def every_relay(self) -> tuple[PeerId, ...]:
        """The peers of `relays` and of `through`, each once."""
        return tuple(dict.fromkeys((*self.relays, *peers_of(self.through))))

    @property
    def moves(self) -> bool:
        """Whether this peer is about to serve other blocks."""
        return self.next_stop > 0


def peers_of(through: Sequence[str]) -> tuple[PeerId, ...]:
    """The peers of multiaddrs that end with /p2p/ID."""
    return tuple(PeerId(text.rpartition("/p2p/")[2]) for text in through)


def sign_record(record: Record, private_key: bytes) -> bytes:
    """The wire form of this node's own record.

    private_key: 32 raw bytes of Ed25519.
    Raises ValueError for a record that no peer would accept: a bug of this node.
    """
    public_key = Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
    if record.peer != peer_id_of(public_key):
        raise ValueError(f"the record of {record.peer} cannot be signed by {peer_id_of(public_key)}")
    wire = signed(DOMAIN, packed(_to_wire(record)), private_key)
    try:
        verify_record(wire, swarm=record.swarm, limits=Limits())
    except RecordError as error:
        raise ValueError(f"no peer would accept this record: {error}") from None
    return wire


def fit_record(record: Record, limits: Limits) -> Record:
    """The record with as much of its lists as fits into max_record_bytes.

    The private addresses are dropped first, then the longest round-trip times, then the last addresses; one
    address stays.
    """
    lan = list(record.lan[:MAX_LAN])
    nearest = sorted(record.rtt.items(), key=lambda item: (item[1], item[0]))[:MAX_RTTS]
    addresses = list(record.addresses[:MAX_ADDRESSES])
    while True:
        rtt = MappingProxyType(dict(nearest))
        fitted = replace(record, rtt=rtt, addresses=tuple(addresses), lan=tuple(lan))
        size = len(packed([packed(_to_wire(fitted)), bytes(PUBLIC_KEY_BYTES), bytes(SIGNATURE_BYTES)]))
        if size <= limits.max_record_bytes or not (lan or nearest or addresses[1:]):
            return fitted
        (lan or nearest or addresses).pop()


def signer(wire: bytes) -> bytes:
    """The public key that a record names, 32 bytes, unverified: to look up the known record.

    Empty where the bytes are too short for a record.
    """
    return public_key_in(wire)


def verify_record(wire: bytes, *, swarm: str, limits: Limits) -> Record:
    """Check a record from the wire: size, signature, swarm, every field.  Raises RecordError."""
    if len(wire) > limits.max_record_bytes:
        raise RecordError(f"a record of {len(wire)} bytes, at most {limits.max_record_bytes} are allowed")
    try:
        payload, public_key = verified(DOMAIN, wire, "a record")
        return _from_wire(Header(unpack_map(payload)), peer_id_of(public_key), swarm)
    except MessageError as error:
        raise RecordError(str(error)) from None


def _to_wire(record: Record) -> dict[str, object]:
    fields: dict[str, object] = {
        "adapters": list(record.adapters),
        "addresses": list(record.addresses),
        "blocks": record.blocks,
        "cache_tokens": record.cache_tokens,
        "dtype": record.dtype,
        "model": record.model,
        "name": record.name,
        "prefill_seconds_per_token": float(record.prefill_seconds_per_token),
        "quantize": record.quantize,
        "queue": float(record.queue),
        "revision": record.revision,
        "role": record.role,
        # keys raw: 16 base58 strings would fill the record
        "rtt": sorted([public_key_of(peer), float(seconds)] for peer, seconds in record.rtt.items()),
        "seconds_per_block": float(record.seconds_per_block),
        "seq": record.seq,
        "start": record.start,
        "state": record.state,
        "stop": record.stop,
        "swarm": record.swarm,
        "ttl_seconds": float(record.ttl_seconds),
        "version": record.version,
    }
    if record.next_start or record.next_stop:  # absent without a move
        fields |= {"next_start": record.next_start, "next_stop": record.next_stop}
    most = {"session_tokens": record.session_tokens, "step_tokens": record.step_tokens}
    fields |= {name: tokens for name, tokens in most.items() if tokens}
    if record.prompts:
        fields["prompts"] = True
    if record.codecs:
        fields["codecs"] = list(record.codecs)
    if record.batches:
        fields["batches"] = True
    if record.lora:
        fields["lora"] = record.lora
    return dict(sorted((fields | _reach_to_wire(record)).items()))


def _reach_to_wire(record: Record) -> dict[str, object]:
    """The keys that say how the peer is reached; absent without a value."""
    fields: dict[str, object] = {}
    if record.reach != "unknown":
        fields["reach"] = record.reach
    if record.relays:
        fields["relays"] = [public_key_of(peer) for peer in record.relays]
    if record.through:
        fields["through"] = list(record.through)
    if record.lan:
        fields["lan"] = list(record.lan)
    if record.seen:
        fields["seen"] = record.seen
    if record.helps:
        fields["helps"] = True
    if record.unreached:
        fields["unreached"] = record.unreached
    if record.relay_mbit:
        fields["relay_mbit"] = record.relay_mbit
    if record.relayed_bytes:
        fields["relayed_bytes"] = record.relayed_bytes
    return fields


def _from_wire(fields: Header, peer: PeerId, swarm: str) -> Record:
    """Read all known fields.  Raises MessageError or RecordError."""
    if (theirs := fields.text("swarm", 64)) != swarm:
        raise RecordError(f"a record of swarm {theirs}, ours is {swarm}")
    role: Any = fields.choice("role", ROLES)  # Any: mypy cannot see that the choice is a Literal
    state: Any = fields.choice("state", STATES)
    reach: Any = fields.choice("reach", REACHES) if "reach" in fields else "unknown"
    unreached: Any = fields.choice("unreached", UNREACHED) if "unreached" in fields else ""
    serves = role == "serve"
    blocks = fields.integer("blocks", int(serves), MAX_BLOCKS if serves else 0)
    start = fields.integer("start", 0, max(blocks - 1, 0))
    stop = fields.integer("stop", start + 1 if serves else 0, blocks)
    next_start, next_stop = 0, 0
    if "next_start" in fields or "next_stop" in fields:
        next_start = fields.integer("next_start", 0, max(blocks - 1, 0))
        next_stop = fields.integer("next_stop", next_start + 1, blocks)
    slowest = MAX_RATE_SECONDS if serves else 0.0
    fastest = MIN_RATE_SECONDS if serves and state in ("online", "draining") else 0.0
    return Record(
        peer=peer,
        addresses=tuple(_address(text) for text in _texts(fields, "addresses", MAX_ADDRESSES, 128)),
        swarm=swarm,
        role=role,
        model=fields.text("model", 128, empty=not serves),
        revision=fields.text("revision", 64, empty=not serves),
        blocks=blocks,
        start=start,
        stop=stop,
        next_start=next_start,
        next_stop=next_stop,
        state=state,
        dtype=fields.text("dtype", 16, empty=not serves),
        quantize=fields.text("quantize", 16, empty=True),
        adapters=_texts(fields, "adapters", MAX_ADAPTERS, 64),
        seconds_per_block=fields.number("seconds_per_block", fastest, slowest),
        prefill_seconds_per_token=fields.number("prefill_seconds_per_token", fastest, slowest),
        cache_tokens=fields.integer("cache_tokens", 0, MAX_CACHE_TOKENS),
        session_tokens=_tokens(fields, "session_tokens"),
        step_tokens=_tokens(fields, "step_tokens"),
        prompts=fields.flag("prompts", absent=False),
        codecs=_texts(fields, "codecs", MAX_CODECS, 16) if "codecs" in fields else (),
        batches=fields.flag("batches", absent=False),
        lora=fields.integer("lora", 0, MAX_RANK, absent=0),
        queue=fields.number("queue", 0.0, MAX_QUEUE),
        rtt=_rtt(fields.items("rtt", MAX_RTTS)),
        reach=reach,
        relays=_relays(fields.items("relays", MAX_RELAYS, absent=True)),
        through=_through(fields),
        lan=tuple(_address(text) for text in _texts(fields, "lan", MAX_LAN, 128)) if "lan" in fields else (),
        seen=_ip(fields.text("seen", MAX_IP_CHARACTERS)) if "seen" in fields else "",
        helps=fields.flag("helps", absent=False),
        relay_mbit=fields.integer("relay_mbit", 0, MAX_RELAY_MBIT, absent=0),
        relayed_bytes=fields.integer("relayed_bytes", 0, MAX_SEQ, absent=0),
        unreached=unreached,
        seq=fields.integer("seq", 0, MAX_SEQ),
        ttl_seconds=fields.number("ttl_seconds", MIN_TTL_SECONDS, MAX_TTL_SECONDS),
        name=fields.text("name", 64, empty=True),
        version=fields.text("version", 32, empty=True),
    )


def _tokens(fields: Header, name: str) -> int:
    """A number that older versions do not send; 0 without it."""
    return fields.integer(name, 1, MAX_CACHE_TOKENS) if name in fields else 0


def _texts(fields: Header, name: str, most: int, longest: int) -> tuple[str, ...]:
    values = fields.items(name, most)
    if any(
        type(text) is not str or not 0 < len(text) <= longest or not text.isprintable() for text in values
    ):
        raise RecordError(f"{name} are not each 1 to {longest} printable characters")
    return tuple(values)


def _rtt(pairs: list[Any]) -> Mapping[PeerId, float]:
    rtt: dict[PeerId, float] = {}
    for pair in pairs:
        if type(pair) is not list or [type(part) for part in pair] != [bytes, float]:
            raise RecordError("rtt is not a list of pairs of a key and seconds")
        key, seconds = pair
        if len(key) != PUBLIC_KEY_BYTES or not 0.0 <= seconds <= MAX_RTT_SECONDS:  # NaN fails this too
            raise RecordError(f"rtt of {seconds} s to a key of {len(key)} bytes")
        rtt[peer_id_of(key)] = seconds
    if len(rtt) != len(pairs):
        raise RecordError("rtt names a peer twice")
    return MappingProxyType(rtt)


def _relays(keys: list[Any]) -> tuple[PeerId, ...]:
    if any(type(key) is not bytes or len(key) != PUBLIC_KEY_BYTES for key in keys) or len({*keys}) < len(
        keys
    ):
        raise RecordError(f"relays are not different keys of {PUBLIC_KEY_BYTES} bytes")
    return tuple(map(peer_id_of, keys))


def _through(fields: Header) -> tuple[str, ...]:
    """Addresses of relays, each after /p2p/ the relay's id, which may be of any kind of key."""
    if "through" not in fields:
        return ()
    texts = _texts(fields, "through", MAX_THROUGH, 192)
    for text in texts:
        address, _, peer = text.rpartition("/p2p/")
        _address(address)
        if not _PEER_ID.fullmatch(peer):
            raise RecordError(f"{_brief(text)} does not end with a peer id")
    return texts


def _ip(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise RecordError(f"seen is {_brief(text)}, an IP address is allowed") from None
    if address.is_unspecified or address.is_multicast or "%" in text:
        raise RecordError(f"seen is {_brief(text)}, which is no single host")
    return text


_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\.?")
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,60}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def _address(text: str) -> str:
    try:
        check_address(text)
    except ValueError as error:
        raise RecordError(str(error)) from None
    return text


def check_address(text: str) -> None:
    """Raise ValueError unless this is a TCP multiaddr that can be dialled: /ip4|ip6|dns../HOST/tcp/PORT."""
    parts = text.split("/")
    if len(parts) != 5 or parts[0] or parts[3] != "tcp":
        raise ValueError(f"{_brief(text)} is not of the form /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT")
    _, protocol, host, _, port = parts
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"{_brief(text)} has port {_brief(port)}, allowed are 1 to 65535")
    if protocol in ("ip4", "ip6"):
        address = ipaddress.IPv4Address(host) if protocol == "ip4" else ipaddress.IPv6Address(host)
        if address.is_unspecified or address.is_multicast or "%" in host:  # %: a scope, which is local
            raise ValueError(f"{_brief(text)} names no single host")
    elif protocol not in ("dns", "dns4", "dns6") or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{_brief(text)} has host {_brief(host)}, which {protocol} cannot be")


def _brief(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")
