"""Header fields that several messages have, and the message of a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensor_codec.blocks import MAX_BLOCKS, Blocks
from tensor_codec.errors import (
    REFUSALS,
    BadResult,
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
)
from tensor_codec.frame import Buffer
from tensor_codec.header import Header, pack_header, split_message
from tensor_codec.messages.contract import MAX_HOPS, MAX_SPEED, MAX_STEP, WHOLE_CODECS
from tensor_codec.span_spec import DTYPES, SpanSpec

_DTYPES = frozenset(DTYPES)

# The codes of a Failed besides the refusals, and the exception that each of them stands for.
FAULTS: dict[str, type[PeerFault]] = {
    "protocol": RemoteProtocolError,  # you sent what must not come now
    "message": MessageError,  # you sent what cannot be read
    "bad_values": BadResult,  # NaN or infinity, found on arrival or after computing
    "cannot_push": PeerGone,  # the next hop is gone or slow; `peer` names it
    "ended": PeerGone,  # the session is over here: idle, too old, or shut down
    "leaving": PeerGone,  # this node is about to leave; the session goes on for a while
}


@dataclass(frozen=True, slots=True)
class Failed:
    """A session could not be opened, or a step or a stateless request could not be done.

    code: a key of REFUSALS or FAULTS.  peer: the peer at fault, if not the sender.
    """

    code: str
    message: str
    retry_after_seconds: float | None = None
    step: int | None = None
    peer: str | None = None

    def error(self) -> Refused | PeerFault:
        """The exception that this message stands for."""
        if self.code in REFUSALS:
            return REFUSALS[self.code](self.message, self.retry_after_seconds)
        return FAULTS[self.code](self.message)

    @staticmethod
    def of(error: Refused | PeerFault, step: int | None = None, peer: str | None = None) -> Failed:
        """The message that stands for `error`."""
        text = "".join(c if c.isprintable() else " " for c in str(error))[:300] or type(error).__name__
        if isinstance(error, Refused):
            known = error.code if error.code in REFUSALS else Refused.code
            return Failed(known, text, error.retry_after_seconds, step, peer)
        if isinstance(error, PeerGone | SlowPeer):
            return Failed("ended", text, None, step, peer)
        code = next((code for code, kind in FAULTS.items() if isinstance(error, kind)), "message")
        return Failed(code, text, None, step, peer)


_FAILURE_CODES = frozenset(REFUSALS) | frozenset(FAULTS)


@dataclass(frozen=True, slots=True)
class Message:
    """A frame split into kind, header and body; `read_*` makes it a value."""

    kind: str
    header: Header
    body: memoryview


def read_message(frame: Buffer, allowed: frozenset[str]) -> Message:
    """Split a frame and check its kind.  Raises MessageError."""
    header, body = split_message(frame)
    return Message(header.choice("k", allowed), header, body)


def encode_failed(message: Failed) -> list[Buffer]:
    """The parts of a frame."""
    fields: Mapping[str, object] = {
        "k": "failed",
        "code": message.code,
        "message": message.message,
        "retry": message.retry_after_seconds,
        "n": message.step,
        "peer": message.peer,
    }
    return [pack_header({name: value for name, value in fields.items() if value is not None})]


def read_failed(message: Message) -> Failed:
    """Read a Failed.  Raises MessageError."""
    no_body(message)
    header = message.header
    return Failed(
        code=header.choice("code", _FAILURE_CODES),
        message=header.text("message", 300),
        retry_after_seconds=header.number("retry", 0.0, 3600.0) if "retry" in header else None,
        step=optional_step(header),
        peer=optional_peer(header, "peer"),
    )


def read_spec(header: Header) -> SpanSpec:
    """The span that a message asks for.  Raises MessageError."""
    start = header.integer("start", 0, MAX_BLOCKS - 1)
    return SpanSpec(
        model=header.text("model"),
        revision=header.text("revision", 128),
        blocks=Blocks(start, header.integer("stop", start + 1, MAX_BLOCKS)),
        dtype=header.choice("dtype", _DTYPES),
        adapter=header.text("adapter") if "adapter" in header else None,
    )


def optional_step(header: Header) -> int | None:
    """The number of a step, where there is one."""
    return header.integer("n", 0, MAX_STEP) if "n" in header else None


def optional_codec(header: Header) -> str | None:
    """A codec's name, where there is one."""
    return header.choice("codec", WHOLE_CODECS) if "codec" in header else None


def optional_peer(header: Header, name: str) -> str | None:
    """A peer id, where there is one."""
    return header.text(name, 128) if name in header else None


def read_timings(header: Header, max_hops: int = MAX_HOPS) -> tuple[tuple[int, int], ...]:
    """Microseconds (held, computing) of each hop that was passed; none where the field is missing."""
    found = []
    for pair in header.items("t", max_hops, absent=True):
        if type(pair) is not list or len(pair) != 2:
            raise MessageError("timings are pairs of microseconds")
        held, computing = pair
        if type(held) is not int or type(computing) is not int or held < 0 or computing < 0:
            raise MessageError("timings are pairs of microseconds")
        found.append((held, computing))
    return tuple(found)


def read_speeds(header: Header, max_hops: int = MAX_HOPS) -> tuple[int, ...]:
    """Bytes per second of the link to each hop that was passed, 0: unknown; none without the field."""
    found = header.items("v", max_hops, absent=True)
    if any(type(speed) is not int or not 0 <= speed <= MAX_SPEED for speed in found):
        raise MessageError(f"speeds are whole numbers of bytes per second, 0 to {MAX_SPEED}")
    return tuple(found)


def no_body(message: Message) -> None:
    """Raises MessageError where a message that has no body has one."""
    if len(message.body):
        raise MessageError(f"{len(message.body)} body bytes after {message.kind!r}, which has none")
