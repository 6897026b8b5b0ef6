"""What a peer has signed: the msgpack array `[payload, public_key, signature]`.

The signature is Ed25519 over a domain, which says what is signed, and the payload's bytes.  The peer id is
not on the wire: it follows from the public key, so no peer can sign for another.
"""

from __future__ import annotations

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from routing.names import PUBLIC_KEY_BYTES, peer_id_of
from tensor_codec.errors import MessageError

SIGNATURE_BYTES = 64
TAIL_BYTES = 2 + PUBLIC_KEY_BYTES + 2 + SIGNATURE_BYTES  # each with its msgpack bin 8 header


def packed(value: object) -> bytes:
    """Msgpack."""
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def signed(domain: bytes, payload: bytes, private_key: bytes) -> bytes:
    """The wire form of a payload.  private_key: 32 raw bytes of Ed25519."""
    key = Ed25519PrivateKey.from_private_bytes(private_key)
    return packed([payload, key.public_key().public_bytes_raw(), key.sign(domain + payload)])


def public_key_in(wire: bytes) -> bytes:
    """The public key that the bytes name, 32 bytes, unverified; empty where they are too short."""
    if len(wire) < TAIL_BYTES:
        return b""
    return wire[len(wire) - TAIL_BYTES + 2 :][:PUBLIC_KEY_BYTES]


def verified(domain: bytes, wire: bytes, what: str) -> tuple[bytes, bytes]:
    """The payload and the public key of its signer.  what: "a record", for the errors.

    One value has one form: anything else is refused.  Raises MessageError.
    """
    key_at = len(wire) - TAIL_BYTES
    head = 3 if wire[1:2] == b"\xc4" else 4  # array header, and bin 8 or bin 16 header of the payload
    if key_at < head:
        raise MessageError(f"{what} of {len(wire)} bytes has no room for a key and a signature")
    payload, public_key, signature = wire[head:key_at], public_key_in(wire), wire[-SIGNATURE_BYTES:]
    if packed((payload, public_key, signature)) != wire:
        raise MessageError(f"{what} is the msgpack array of payload, public key and signature")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, domain + payload)
    except (InvalidSignature, ValueError):
        raise MessageError(f"the signature is not that of {peer_id_of(public_key)}") from None
    return payload, public_key
