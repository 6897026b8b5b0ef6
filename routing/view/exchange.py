"""The messages with which peers keep each other's views complete, and their wire form.

    Digest    the highest seq that the sender knows of each peer, in one or more frames; `ask`: the receiver
              sends the records that the sender lacks, then its own digest
    Records   records, each with its age: the seconds since its peer sent it

Either side may send either at any time.  Nothing here opens a record: `records.verify_record` does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from routing.names import PUBLIC_KEY_BYTES
from routing.view.records import MAX_SEQ, MAX_TTL_SECONDS
from routing.view.view import Arrival
from tensor_codec.errors import MessageError
from tensor_codec.header import pack_header, split_message

KINDS = frozenset({"digest", "records"})
DIGEST_ENTRIES = 1024  # per frame: 40 KiB
RECORDS_BYTES = 16 * 1024  # per frame: about 30 records, verified in a few milliseconds
FRAME_BYTES = 48 * 1024  # of the longest message, with room for what a later version adds to its header
_ENTRY = struct.Struct(f">{PUBLIC_KEY_BYTES}sQ")  # public key, seq
_RECORD = struct.Struct(">HI")  # size in bytes, age in milliseconds


@dataclass(frozen=True, slots=True)
class Digest:
    """One frame of a digest.

    seqs: by public key, 32 bytes.  last: whether it is the digest's last frame.  ask: whether the receiver
    should send its own digest.
    """

    seqs: Mapping[bytes, int]
    last: bool
    ask: bool


@dataclass(frozen=True, slots=True)
class Records:
    """Wire forms of records, unverified, each with its age in seconds."""

    items: tuple[tuple[bytes, float], ...]


def encode_digest(seqs: Mapping[bytes, int], *, ask: bool) -> Iterator[bytes]:
    """The frames of a whole digest, at least one."""
    entries = [_ENTRY.pack(key, seq) for key, seq in sorted(seqs.items())]
    for first in range(0, max(len(entries), 1), DIGEST_ENTRIES):
        last = first + DIGEST_ENTRIES >= len(entries)
        header = pack_header({"type": "digest", "last": last, "ask": ask})
        yield header + b"".join(entries[first : first + DIGEST_ENTRIES])


def encode_records(arrivals: Iterable[Arrival]) -> Iterator[bytes]:
    """The frames that carry these records; no frame without a record.  Ages are rounded up."""
    header, body = pack_header({"type": "records"}), b""
    for arrival in arrivals:
        age = min(math.ceil(arrival.age * 1000), 2**32 - 1)
        item = _RECORD.pack(len(arrival.wire), age) + arrival.wire
        if body and len(body) + len(item) > RECORDS_BYTES:
            yield header + body
            body = b""
        body += item
    if body:
        yield header + body


def decode(frame: bytes | bytearray) -> Digest | Records:
    """Read one frame.  Raises MessageError."""
    header, body = split_message(frame)
    if header.choice("type", KINDS) == "digest":
        return Digest(_read_digest(body), header.flag("last"), header.flag("ask"))
    return Records(tuple(_read_records(body)))


def _read_digest(body: memoryview) -> dict[bytes, int]:
    count, rest = divmod(len(body), _ENTRY.size)
    if rest or count > DIGEST_ENTRIES:
        raise MessageError(f"{len(body)} bytes are not 0 to {DIGEST_ENTRIES} entries of {_ENTRY.size}")
    seqs: dict[bytes, int] = dict(_ENTRY.iter_unpack(body))
    if len(seqs) != count or max(seqs.values(), default=0) > MAX_SEQ:
        raise MessageError(f"a digest names a peer twice, or a seq above {MAX_SEQ}")
    return seqs


def _read_records(body: memoryview) -> Iterator[tuple[bytes, float]]:
    if not 0 < len(body) <= RECORDS_BYTES:
        raise MessageError(f"{len(body)} bytes of records, allowed are 1 to {RECORDS_BYTES}")
    at = 0
    while at < len(body):
        if len(body) - at < _RECORD.size:
            raise MessageError(f"{len(body) - at} bytes after the last record")
        size, milliseconds = _RECORD.unpack_from(body, at)
        at += _RECORD.size
        if not 0 < size <= len(body) - at:
            raise MessageError(f"a record of {size} bytes in the {len(body) - at} that are left")
        # an age beyond any TTL is cut to the longest TTL
        yield bytes(body[at : at + size]), min(milliseconds / 1000, MAX_TTL_SECONDS)
        at += size
