"""A node's identity: an Ed25519 key, kept as 32 raw bytes in a file of its owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config import ConfigError
from node.network.transport.secret_file import create_secret, read_secret
from routing.names import PeerId, peer_id_of

PRIVATE_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and the peer id that follows from it."""

    private_key: bytes = field(repr=False)  # 32 raw bytes: the Ed25519 seed
    public_key: bytes = field(repr=False)
    peer_id: PeerId


def identity_of(private_key: bytes) -> Identity:
    """The identity of an Ed25519 private key of 32 raw bytes."""
    public_key = Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
    return Identity(private_key, public_key, peer_id_of(public_key))


def load_or_create_identity(path: Path | str | None) -> Identity:
    """The identity in a file, made there on the first call; without a path, one for this process alone.

    Raises ConfigError where the file is readable by others, has another size, or cannot be had.
    """
    if path is None:
        return identity_of(secrets.token_bytes(PRIVATE_KEY_BYTES))
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        return _load(path)
    with contextlib.suppress(FileExistsError):  # another process was faster: its key counts
        create_secret(path, secrets.token_bytes(PRIVATE_KEY_BYTES), "identity")
    try:
        return _load(path)
    except FileNotFoundError:
        raise ConfigError(f"identity {path} disappeared while it was being made") from None


@contextlib.contextmanager
def held_identity(path: Path | str | None) -> Iterator[Identity]:
    """`load_or_create_identity`, for this process alone until the end of the block.

    Raises ConfigError, also where another node of this machine holds the file: two nodes with one id would
    overtake each other's records.  The system lets go of the file when the process ends, however it ends.
    """
    identity = load_or_create_identity(path)
    if path is None:
        yield identity
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"cannot read identity {path}: {error.strerror}") from error
    try:
        _hold(descriptor, path)
        yield identity
    finally:
        os.close(descriptor)


def _hold(descriptor: int, path: Path | str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(
                f"identity {path} is in use by another node: every node needs an identity of its own"
            ) from None
        # a file system without locks


def _load(path: Path) -> Identity:
    content = read_secret(path, "identity")
    if len(content) != PRIVATE_KEY_BYTES:
        size = f"{len(content)}" if len(content) <= PRIVATE_KEY_BYTES else f"more than {PRIVATE_KEY_BYTES}"
        raise ConfigError(f"identity {path} has {size} bytes, an Ed25519 key has {PRIVATE_KEY_BYTES}")
    return identity_of(content)
