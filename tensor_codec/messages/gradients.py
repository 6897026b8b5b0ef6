"""Sums of the gradients of adapters: a client has a server add them up, and collects the sum once.

A `backward` that names a sum adds its gradients of the adapter's A and B.  Every request of a sum has a
number and is added once, however often it comes.  The answer to a Collect says which numbers are in: a client
takes the sum whole or not at all, and asks for the requests of a lost sum again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import Header, pack_header
from tensor_codec.limits import MIB
from tensor_codec.messages.fields import Failed, read_failed, read_message

SUM_BYTES = 16  # of its name
MAX_SUMMED = 4096  # requests of one sum
SUM_DTYPES: dict[str, int] = {"fp32": 4, "fp64": 8}  # bytes of a value
GRADIENT_PIECE_BYTES = 8 * MIB  # of a sum in one message
MAX_SUM_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Summed:
    """Where the gradients of a backward are added.

    name: of the sum, 16 bytes.  number: of the request in it, below MAX_SUMMED.
    """

    name: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Collect:
    """Asks for a sum, which is forgotten once it was sent.

    dtype: "fp32", or "fp64" where the client adds it to sums of the same blocks.  Sums are kept in float64:
    float32 gradients add up in it without an error, in any order, but for very small ones next to large ones.
    """

    name: bytes
    dtype: str


@dataclass(frozen=True, slots=True)
class GradientPart:
    """A part of a sum, from byte `at` on.

    numbers: the requests that are in the sum.  data: for every block and site the gradient of A [rank, in],
    then that of B [out, rank], little-endian in the dtype asked for.
    """

    numbers: frozenset[int]
    at: int
    data: Buffer


def encode_collect(message: Collect) -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "collect", "sum": message.name, "as": message.dtype})]


def read_collect(header: Header) -> Collect:
    """Read a Collect.  Raises MessageError."""
    return Collect(header.binary("sum", SUM_BYTES), header.choice("as", frozenset(SUM_DTYPES)))


def read_summed(header: Header) -> Summed | None:
    """The sum that a backward names, if it names one.  Raises MessageError."""
    if "sum" not in header:
        return None
    return Summed(header.binary("sum", SUM_BYTES), header.integer("n", 0, MAX_SUMMED - 1, absent=0))


def encode_gradients(numbers: frozenset[int], at: int, data: Buffer) -> list[Buffer]:
    """The parts of a frame.  data: at most GRADIENT_PIECE_BYTES."""
    marks = bytearray(max(numbers, default=0) // 8 + 1)
    for number in numbers:
        marks[number // 8] |= 1 << number % 8
    return [pack_header({"k": "gradients", "n": bytes(marks), "at": at}), data]


def decode_gradients(frame: Buffer, at: int, size: int) -> GradientPart | Failed:
    """Read the part of a sum of `size` bytes that begins at byte `at`.  Raises MessageError."""
    message = read_message(frame, frozenset({"gradients", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    header = message.header
    found = header.integer("at", 0, MAX_SUM_BYTES)
    rest = size - at
    if found != at or len(message.body) != min(rest, GRADIENT_PIECE_BYTES):
        raise MessageError(
            f"{len(message.body)} bytes of gradients from {found} on, {min(rest, GRADIENT_PIECE_BYTES)} from"
            f" {at} on are allowed"
        )
    return GradientPart(_numbers(header), found, message.body)


def gradient_ranges(size: int) -> Sequence[tuple[int, int]]:
    """The bytes [start, stop) of a sum of `size` bytes that travel together; one range at least."""
    step = GRADIENT_PIECE_BYTES
    return [(at, min(at + step, size)) for at in range(0, max(size, 1), step)]


def _numbers(header: Header) -> frozenset[int]:
    marks = header.short_binary("n", MAX_SUMMED // 8)
    return frozenset(place for place in range(8 * len(marks)) if marks[place // 8] >> place % 8 & 1)
