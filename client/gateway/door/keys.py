"""The keys of callers: a file of their hashes, read again on SIGHUP; compared in constant time."""

from __future__ import annotations

import hmac
import logging
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from node.config import ConfigError

log = logging.getLogger("raceme")

MAX_FILE_BYTES = 1 << 20  # some ten thousand keys
MAX_KEY_CHARACTERS = 512  # of a key that a caller shows: 512 bits take 86
MAX_RATE = 10**9
_NAME = re.compile(r"[\w.@+-]{1,64}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """One caller's key.  digest: SHA-256 of it.  Rates are for each minute; None: no bound."""

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sends a request.

    name: of the key; without keys the address of the machine.  Rates: of the key.
    """

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class KeyRing:
    """The keys of a file.  Without a file everybody may call."""

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError where the file cannot be read or holds something else."""
        self._path = path
        self._keys: tuple[Key, ...] = () if path is None else read_keys(path)

    @property
    def is_needed(self) -> bool:
        """Whether a caller needs a key."""
        return self._path is not None

    def find(self, shown: str) -> Key | None:
        """The key that a caller shows; None where it is none of ours.

        shown: bytes of a header, each as one character (ISO-8859-1, as ASGI's programs read headers).  A key
        that is not ASCII comes as UTF-8 (curl) or as ISO-8859-1 (requests); its digest is that of its UTF-8.
        Every key of the file is compared, each in constant time: the time tells nothing about a key.
        """
        if len(shown) > MAX_KEY_CHARACTERS:
            return None
        forms = [shown.encode("utf-8", "surrogateescape"), shown.encode("latin-1", "backslashreplace")]
        found = None
        for digest in (sha256(form).digest() for form in forms):
            for key in self._keys:
                if hmac.compare_digest(key.digest, digest):
                    found = key
        return found

    def reload(self) -> None:
        """Read the file again; where it is wrong now the keys of before stay, and the log says so."""
        if self._path is None:
            return
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            log.error("the keys are those of before: %s", error)
        else:
            log.info("%d keys from %s", len(self._keys), self._path)


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file.  Raises ConfigError that names the file and the line."""
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the keys {path}: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s can be read by other users of this machine: chmod 600 is better", path)
    try:
        keys = parse_keys(content.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ConfigError(f"{path}: {error}") from None
    if not keys:
        raise ConfigError(f"{path} holds no key: nobody could call")
    return keys


def parse_keys(text: str) -> tuple[Key, ...]:
    """The keys of a text; empty lines and those with # in front are left out.  Raises ValueError."""
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _key_of(words, f"line {number}")
        if key.name in keys:
            raise ValueError(f"line {number}: {key.name} has a key already")
        keys[key.name] = key
    return tuple(keys.values())


def _key_of(words: Sequence[str], where: str) -> Key:
    if not 2 <= len(words) <= 4:
        raise ValueError(f"{where} has {len(words)} words, NAME SHA256 [REQUESTS [TOKENS]] is allowed")
    name, digest, *rates = words
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}: {name[:64]!r} is no name: up to 64 letters, digits, and _ . @ + - are allowed"
        )
    if not _HASH.fullmatch(digest):
        raise ValueError(f"{where}: the second word is not the SHA-256 of a key, 64 hexadecimal digits")
    return Key(name, bytes.fromhex(digest), *(_rate(word, where) for word in rates))


def _rate(word: str, where: str) -> int | None:
    """A number for each minute; - for none."""
    if word == "-":
        return None
    if not word.isascii() or not word.isdigit() or not 0 < int(word[:12]) <= MAX_RATE:
        raise ValueError(
            f"{where}: {word[:20]!r} is no rate, 1 to {MAX_RATE} for each minute or - is allowed"
        )
    return int(word[:12])
