"""A client goes on with a session on another stream: over a direct connection, or through another relay.

    client -> hop      Attach, as the first message of the stream, and then those of the session
    hop -> client      attached or Failed, and then those of the session

Only hops that said so in `Opened.moves` know these messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.messages.contract import SESSION_ID_BYTES
from tensor_codec.messages.fields import Failed, no_body, read_failed, read_message
from tensor_codec.messages.session import Open, read_open


@dataclass(frozen=True, slots=True)
class Attach:
    """From here on the session of this id, which the same peer has opened, has this stream to its client."""

    session: bytes


def encode_attach(message: Attach) -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "attach", "s": message.session})]


def encode_attached() -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "attached"})]


def decode_first(frame: Buffer) -> Open | Attach:
    """Read the first message of a session stream.  Raises MessageError; see also `decode_open`."""
    message = read_message(frame, frozenset({"open", "attach"}))
    if message.kind == "open":
        return read_open(message)
    no_body(message)
    return Attach(message.header.binary("s", SESSION_ID_BYTES))


def decode_attach_reply(frame: Buffer) -> Failed | None:
    """Read a hop's answer to Attach; None where the session goes on.  Raises MessageError."""
    message = read_message(frame, frozenset({"attached", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
    return None
