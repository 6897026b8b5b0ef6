"""Agreeing on a protocol by name (multistream-select 1.0), in the fewest round trips.

Each line is a varint length, the text and a newline.  Both sides say `/multistream/1.0.0`; then the
initiator names a protocol, and the responder repeats it or says `na`.  The initiator may send its
next bytes at once: with one proposal it need not wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tensor_codec.errors import PeerGone, RemoteProtocolError

HEADER = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
_MAX_LINE_BYTES = 1024
_MAX_PROPOSALS = 16


class Dialogue:
    """Exact reads, and writes that are held back until a read waits for an answer.

    So writes share a packet where they can.

    receive: the next bytes, at most the given number; b"" at the end.  send: all of the bytes.
    """

    def __init__(
        self, receive: Callable[[int], Awaitable[bytes]], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._receive = receive
        self._send = send
        self._held = bytearray()

    async def write(self, data: bytes) -> None:
        """Send these bytes with the next flush."""
        self._held += data

    async def flush(self) -> None:
        """Send the bytes that were held back."""
        if self._held:
            data = bytes(self._held)
            self._held.clear()
            await self._send(data)

    async def read(self, size: int) -> bytes:
        """Exactly this number of bytes.  Raises PeerGone at an earlier end."""
        data = b""
        while len(data) < size:
            await self.flush()
            more = await self._receive(size - len(data))
            if not more:
                raise PeerGone("the connection ended in the middle of the handshake")
            data += more
        return data

    async def read_line(self) -> str:
        """The next multistream line.  Raises PeerGone, RemoteProtocolError."""
        size = shift = 0
        while True:
            (byte,) = await self.read(1)
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 14:
                raise RemoteProtocolError("the length of a multistream line has more than two bytes")
        if not 0 < size <= _MAX_LINE_BYTES:
            raise RemoteProtocolError(f"a multistream line of {size} bytes, at most {_MAX_LINE_BYTES}")
        line = await self.read(size)
        if not line.endswith(b"\n"):
            raise RemoteProtocolError("a multistream line without its newline")
        try:
            return line[:-1].decode()
        except UnicodeDecodeError:
            raise RemoteProtocolError("a multistream line that is not text") from None


def encode_lines(*lines: str) -> bytes:
    """Multistream lines on the wire."""
    encoded = b""
    for line in lines:
        text = line.encode() + b"\n"
        size = len(text)
        encoded += (bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])) + text
    return encoded


def proposal(protocol: str) -> bytes:
    """The initiator's first bytes; a responder that agrees sends equal bytes."""
    return encode_lines(HEADER, protocol)


async def read_answer(dialogue: Dialogue, protocol: str) -> bool:
    """True if the peer agrees to a `proposal`.  Raises PeerGone, RemoteProtocolError."""
    if (header := await dialogue.read_line()) != HEADER:
        raise RemoteProtocolError(f"multistream header {header!r}, expected {HEADER!r}")
    answer = await dialogue.read_line()
    if answer not in (protocol, NOT_AVAILABLE):
        raise RemoteProtocolError(f"{answer!r} in answer to {protocol!r}")
    return answer == protocol


async def negotiate(dialogue: Dialogue, speaks: Callable[[str], bool]) -> str | None:
    """The responder's part: the protocol agreed on, or None if nothing proposed was known.

    The agreement goes out with the next flush.  Raises PeerGone, RemoteProtocolError.
    """
    if (header := await dialogue.read_line()) != HEADER:
        raise RemoteProtocolError(f"multistream header {header!r}, expected {HEADER!r}")
    await dialogue.write(encode_lines(HEADER))
    for _ in range(_MAX_PROPOSALS):
        try:
            line = await dialogue.read_line()
        except PeerGone:
            return None
        if line != "ls" and speaks(line):
            await dialogue.write(encode_lines(line))
            return line
        await dialogue.write(encode_lines(NOT_AVAILABLE))
    await dialogue.flush()
    return None
