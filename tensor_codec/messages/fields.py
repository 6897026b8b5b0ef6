"""Header fields that several messages have, and the message of a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
from tensor_codec.messages.contract import CODECS, MAX_EPOCH, MAX_HOPS, MAX_STEP, Contract

# What a Failed can say besides the refusals, and what it means for whoever reads it.
FAULTS: dict[str, type[PeerFault]] = {
    "protocol": RemoteProtocolError,  # you sent what must not come now
    "message": MessageError,  # you sent what cannot be read
    "bad_values": BadResult,  # NaN or infinity, found at the door or after computing
    "cannot_push": PeerGone,  # the next hop is gone or slow; `peer` names it
    "ended": PeerGone,  # the session is over here: idle, too old, or shut down
    "leaving": PeerGone,  # the session goes on for a while, but this node is about to leave
}


@dataclass(frozen=True, slots=True)
class Failed:
    """A session could not be opened, or a step or a stateless request could not be done.

    code: a key of REFUSALS or FAULTS.  peer: whom the fault concerns, if not the sender.
    """

    code: str
    message: str
    retry_after_seconds: float | None = None
    step: int | None = None
    peer: str | None = None

    def error(self) -> Refused | PeerFault:
        """The exception that says the same."""
        if self.code in REFUSALS:
            return REFUSALS[self.code](self.message, self.retry_after_seconds)
        return FAULTS[self.code](self.message)

    @staticmethod
    def of(error: Refused | PeerFault, step: int | None = None, peer: str | None = None) -> Failed:
        """The message that says what `error` says."""
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


def _read_failed(message: Message) -> Failed:
    _no_body(message)
    header = message.header
    return Failed(
        code=header.choice("code", _FAILURE_CODES),
        message=header.text("message", 300),
        retry_after_seconds=header.number("retry", 0.0, 3600.0) if "retry" in header else None,
        step=_last_step(header),
        peer=_peer(header, "peer"),
    )


def _codec(header: Header) -> str | None:
    return header.choice("codec", CODECS) if "codec" in header else None


def _last_step(header: Header) -> int | None:
    return header.integer("n", 0, MAX_STEP) if "n" in header else None


def _epoch(header: Header, name: str) -> int:
    return header.integer(name, 0, MAX_EPOCH) if name in header else 0


def _rope_length(header: Header, contract: Contract) -> int:
    return header.integer("l", 0, contract.max_length) if "l" in header else 0


def _flag(header: Header, name: str, *, absent: bool = False) -> bool:
    return header.flag(name) if name in header else absent


def _peer(header: Header, name: str) -> str | None:
    return header.text(name, 128) if name in header else None


def _read_timings(header: Header, most: int = MAX_HOPS) -> tuple[tuple[int, int], ...]:
    if "t" not in header:
        return ()
    pairs = header.items("t", most)
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or any(type(n) is not int or n < 0 for n in pair):
            raise MessageError("timings are pairs of microseconds")
    return tuple((held, computing) for held, computing in pairs)


def _no_body(message: Message) -> None:
    if len(message.body):
        raise MessageError(f"{len(message.body)} body bytes behind {message.kind!r}, which has none")
