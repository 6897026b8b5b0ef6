"""Names that are all strings or bytes underneath, kept apart by type.

A peer id is libp2p's form of an Ed25519 public key: base58 of an identity multihash over the
protobuf-encoded key.  It holds the whole key, so each can be had from the other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NewType

import base58

PeerId = NewType("PeerId", str)
ModelId = NewType("ModelId", str)
Revision = NewType("Revision", str)

PUBLIC_KEY_BYTES = 32
# identity multihash of 36 bytes; in it a protobuf PublicKey: type Ed25519, 32 bytes of data
_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
_MAX_PEER_ID_CHARACTERS = 64  # base58 of 38 bytes is 52; decoding is quadratic in the length


@lru_cache(maxsize=16_384)
def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of an Ed25519 public key of 32 raw bytes.  Raises ValueError for another size."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PREFIX + public_key).decode("ascii"))


def peer_id_bytes(peer: PeerId) -> bytes:
    """The peer id as libp2p's binary messages have it.  Raises ValueError where it holds no Ed25519 key."""
    return _PREFIX + public_key_of(peer)


def peer_id_from_bytes(raw: bytes) -> PeerId:
    """The peer id in libp2p's binary form.  Raises ValueError for a peer with another kind of key."""
    if not raw.startswith(_PREFIX):
        raise ValueError(f"{len(raw)} bytes are not the id of a peer with an Ed25519 key")
    return peer_id_of(bytes(raw[len(_PREFIX) :]))


@lru_cache(maxsize=16_384)
def public_key_of(peer: PeerId) -> bytes:
    """The Ed25519 public key, 32 raw bytes, inside a peer id.  Raises ValueError where there is none."""
    if len(peer) > _MAX_PEER_ID_CHARACTERS:
        raise ValueError(
            f"a peer id of {len(peer)} characters, at most {_MAX_PEER_ID_CHARACTERS} are allowed"
        )
    raw = bytes(base58.b58decode(peer))
    if len(raw) != len(_PREFIX) + PUBLIC_KEY_BYTES or not raw.startswith(_PREFIX):
        raise ValueError(f"{peer!r} is not the id of a peer with an Ed25519 key")
    return raw[len(_PREFIX) :]
