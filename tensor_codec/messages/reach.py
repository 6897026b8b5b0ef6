"""Whether a peer can be reached: it asks another one, which dials back, and says what came of it.

The question has the addresses; the answer comes in two parts: at once the address from which the question
came, and after the dials what became of each.  The idea and the rule that a peer dials nothing for another
but the other's own IP address are those of libp2p's AutoNAT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.limits import MAX_HEADER_BYTES
from tensor_codec.messages.fields import Failed, no_body, read_failed, read_message

REACH_PROTOCOL = "/raceme/reach/1"  # any two nodes
REACH_FRAME_BYTES = 2 + MAX_HEADER_BYTES  # the messages have no body
NONCE_BYTES = 8
MAX_ADDRESS_CHARACTERS = 128  # of a multiaddr, as in a record
MAX_ADDRESSES = 8  # of a question: as many as a record has

Outcome = Literal["reached", "timed out", "refused", "another peer"]
OUTCOMES = frozenset(get_args(Outcome))


@dataclass(frozen=True, slots=True)
class ReachQuestion:
    """Do these addresses reach me?

    addresses: multiaddrs; the host 0.0.0.0 or :: stands for the IP address that the other side sees.
    nonce: 8 bytes, said again with both parts of the answer.
    """

    addresses: tuple[str, ...]
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """The first part of the answer.  address: multiaddr from which the question came."""

    address: str
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Reached:
    """The second part.  outcomes: by index of the address; addresses that were not dialled are left out."""

    outcomes: Mapping[int, Outcome]
    nonce: bytes


def encode_reach(question: ReachQuestion) -> list[Buffer]:
    """The question: the parts of a frame."""
    return [pack_header({"k": "reach", "addresses": list(question.addresses), "nonce": question.nonce})]


def decode_reach(frame: Buffer) -> ReachQuestion:
    """Read the question.  Raises MessageError."""
    message = read_message(frame, frozenset({"reach"}))
    no_body(message)
    addresses = message.header.items("addresses", MAX_ADDRESSES)
    if not all(type(text) is str and 0 < len(text) <= MAX_ADDRESS_CHARACTERS for text in addresses):
        raise MessageError(f"addresses are not each 1 to {MAX_ADDRESS_CHARACTERS} characters")
    return ReachQuestion(tuple(addresses), message.header.binary("nonce", NONCE_BYTES))


def encode_seen(seen: Seen) -> list[Buffer]:
    """The first part of the answer: the parts of a frame."""
    return [pack_header({"k": "seen", "address": seen.address, "nonce": seen.nonce})]


def decode_seen(frame: Buffer) -> Seen | Failed:
    """Read the first part of the answer.  Raises MessageError."""
    message = read_message(frame, frozenset({"seen", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
    address = message.header.text("address", MAX_ADDRESS_CHARACTERS)
    return Seen(address, message.header.binary("nonce", NONCE_BYTES))


def encode_reached(reached: Reached) -> list[Buffer]:
    """The second part of the answer: the parts of a frame."""
    pairs = [[index, outcome] for index, outcome in sorted(reached.outcomes.items())]
    return [pack_header({"k": "reached", "outcomes": pairs, "nonce": reached.nonce})]


def decode_reached(frame: Buffer) -> Reached | Failed:
    """Read the second part of the answer.  Raises MessageError."""
    message = read_message(frame, frozenset({"reached", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
    outcomes: dict[int, Outcome] = {}
    for pair in message.header.items("outcomes", MAX_ADDRESSES):
        if type(pair) is not list or [type(part) for part in pair] != [int, str]:
            raise MessageError("outcomes is not a list of pairs of an index and a text")
        index, outcome = pair
        if not 0 <= index < MAX_ADDRESSES or outcome not in OUTCOMES or index in outcomes:
            raise MessageError(f"outcome {outcome[:20]!r} of address {index}")
        outcomes[index] = cast("Outcome", outcome)
    return Reached(outcomes, message.header.binary("nonce", NONCE_BYTES))
