"""Membership of a private swarm: a peer proves that it holds the key, without ever sending it.

The key file is text that people can mail, paste and read:

    # comments and empty lines do not count
    raceme-swarm-key-1
    <64 hexadecimal digits: 32 random bytes>

The proof runs inside the secured connection, before any protocol opens, and is the same for both
ends: each sends 32 random bytes (its challenge), then HMAC-SHA256 under the key over all facts of this
connection: the dialling side, both peer ids as the handshake authenticated them, both challenges, and the
handshake's own hash.  An answer is therefore worth nothing on any other connection, nor sent back to its
maker.
"""

from __future__ import annotations

import binascii
import codecs
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from node.config import ConfigError
from node.network.transport.secret_file import create_secret, read_secret
from routing.names import PeerId
from tensor_codec.errors import LocalProtocolError, NotAMember

KEY_BYTES = 32
CHALLENGE_BYTES = 32
PROOF_BYTES = 32
KEY_FILE_HEADER = "raceme-swarm-key-1"
PUBLIC_SWARM = "public"
_PROOF_DOMAIN = b"raceme-membership-1"
_ID_DOMAIN = b"raceme-swarm-id-1"

Role = Literal["initiator", "responder"]


def swarm_id(key: bytes | None) -> str:
    """A swarm's name in records: "public" without a key, else 32 hexadecimal digits that do not reveal it."""
    if key is None:
        return PUBLIC_SWARM
    return hashlib.sha256(_ID_DOMAIN + key).hexdigest()[:32]


def new_swarm_key(path: Path | str) -> bytes:
    """Make a new key and its file (0600).  Raises ConfigError, also where the file exists."""
    path = Path(path)
    key = secrets.token_bytes(KEY_BYTES)
    content = f"# Swarm key: whoever holds it may join.  Keep it secret.\n{KEY_FILE_HEADER}\n{key.hex()}\n"
    try:
        create_secret(path, content.encode(), "swarm key")
    except FileExistsError:
        raise ConfigError(f"swarm key {path} exists already; it was left as it is") from None
    return key


def load_swarm_key(path: Path | str) -> bytes:
    """The 32 bytes in a swarm key file.  Raises ConfigError."""
    path = Path(path)
    try:
        content = read_secret(path, "swarm key")
    except FileNotFoundError:
        raise ConfigError(f"no swarm key {path}; `python -m node new-swarm-key {path}` makes one") from None
    try:
        return parse_swarm_key(content)
    except ValueError as error:
        raise ConfigError(f"swarm key {path}: {error}") from None


def parse_swarm_key(content: bytes) -> bytes:
    """The key in a swarm key file's content.  Raises ValueError."""
    lines = [line.strip() for line in _text_of(content).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or lines[0] != KEY_FILE_HEADER:
        raise ValueError(f"the first line is not {KEY_FILE_HEADER!r}")
    if len(lines) != 2:
        raise ValueError(f"{len(lines) - 1} lines after {KEY_FILE_HEADER!r}, expected 1")
    try:
        key = binascii.unhexlify(lines[1])
    except ValueError:  # binascii.Error, and letters beyond ASCII
        raise ValueError("the key is not in hexadecimal digits") from None
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes, expected {KEY_BYTES}")
    return key


def _text_of(content: bytes) -> str:
    """Raises ValueError that names the encoding that an editor wrote instead of UTF-8."""
    marks = {
        codecs.BOM_UTF8: "UTF-8 with a BOM",
        codecs.BOM_UTF16_LE: "UTF-16",
        codecs.BOM_UTF16_BE: "UTF-16",
    }
    for mark, name in marks.items():
        if content.startswith(mark):
            raise ValueError(f"a text in {name}, UTF-8 without BOM is needed")
    if b"\0" in content:
        raise ValueError("a text in UTF-16 or no text, UTF-8 without BOM is needed")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError("not a text file: UTF-8 without BOM is needed") from None


@dataclass(slots=True)
class MembershipProof:
    """One end of the proof; sends and reads nothing itself.

    Promises, checked by tests/unit/test_membership.py:
      * two ends accept each other if and only if their keys are equal;
      * an answer made for another connection, role, peer or challenge is refused;
      * the key itself is never sent, and timing does not reveal the right bytes of a wrong answer.

    role: dialler or listener.  ours, theirs: peer ids as the secured handshake authenticated them.
    channel: the handshake's hash, equal at both ends of one connection and nowhere else.
    challenge: 32 bytes that were never used before.
    """

    key: bytes = field(repr=False)
    role: Role
    ours: PeerId
    theirs: PeerId
    channel: bytes
    challenge: bytes = field(default_factory=lambda: secrets.token_bytes(CHALLENGE_BYTES))
    _their_challenge: bytes | None = None

    def answer(self, their_challenge: bytes) -> bytes:
        """Our proof for their challenge.  Raises NotAMember if it is our own, sent back."""
        if len(their_challenge) != CHALLENGE_BYTES or hmac.compare_digest(their_challenge, self.challenge):
            raise NotAMember(f"{self.theirs} sent no challenge of its own")
        self._their_challenge = their_challenge
        return self._proof(self.role)

    def verify(self, their_proof: bytes) -> None:
        """Accept their proof.  Raises NotAMember."""
        expected = self._proof("responder" if self.role == "initiator" else "initiator")
        if not hmac.compare_digest(expected, their_proof):
            raise NotAMember(f"{self.theirs} does not hold the swarm key that this node was given")

    def _proof(self, prover: Role) -> bytes:
        if self._their_challenge is None:
            raise LocalProtocolError("a proof before the other side's challenge")
        ours = (self.ours.encode(), self.challenge)
        theirs = (self.theirs.encode(), self._their_challenge)
        initiator, responder = (ours, theirs) if self.role == "initiator" else (theirs, ours)
        fields = (_PROOF_DOMAIN, prover.encode(), self.channel, *initiator, *responder)
        message = b"".join(len(part).to_bytes(2, "big") + part for part in fields)
        return hmac.digest(self.key, message, "sha256")
