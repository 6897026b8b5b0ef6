"""Length-prefixed frames out of any split of a byte stream, and back.

A frame on the wire is a 4-byte big-endian length and then its payload.  Sans-IO, in the way of h11: bytes
go in, whole frames come out; nothing here reads, sleeps or knows the time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from tensor_codec.errors import FrameError, LocalProtocolError

PREFIX_BYTES = 4
_PREFIX = struct.Struct(">I")

Buffer = bytes | bytearray | memoryview


def encode_frame(parts: Buffer | Iterable[Buffer], max_frame: int | None = None) -> bytes:
    """Return one frame with `parts`, joined, as its payload.

    max_frame: largest payload in bytes that the other side accepts; LocalProtocolError above it,
        because sending more than was agreed is our own bug.
    """
    pieces = [parts] if isinstance(parts, bytes | bytearray | memoryview) else list(parts)
    size = 0
    for piece in pieces:
        size += len(piece)
    if size >= 1 << 32 or (max_frame is not None and size > max_frame):
        raise LocalProtocolError(f"a frame of {size} bytes, where {max_frame or 2**32 - 1} are allowed")
    return b"".join([_PREFIX.pack(size), *pieces])


@dataclass(slots=True)
class FrameDecoder:
    """Turns an arbitrary split of a byte stream back into whole frames.

    Promises, checked by tests/unit/test_frame.py:
      * any split of the same bytes gives the same frames;
      * a length above `max_frame` is refused on sight of its prefix, before its bytes are waited for;
      * nothing but FrameError is raised, and after it every later call raises it again;
      * at most one frame, and the rest of the read that ended it, is held.

    max_frame: largest payload accepted, in bytes.
    """

    max_frame: int
    _buffer: bytearray = field(default_factory=bytearray)
    _broken: str | None = None

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return bool(self._buffer)

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come for the frame that has begun (0 if its length is not known yet)."""
        if len(self._buffer) < PREFIX_BYTES:
            return 0
        return PREFIX_BYTES + int(_PREFIX.unpack_from(self._buffer)[0]) - len(self._buffer)

    def feed(self, data: Buffer) -> list[bytearray]:
        """Add received bytes; return every frame now complete, each in memory of its own.

        Raises FrameError.
        """
        if self._broken is not None:
            raise FrameError(self._broken)
        self._buffer += data
        frames: list[bytearray] = []
        begin, held = 0, len(self._buffer)
        while held - begin >= PREFIX_BYTES:
            size = int(_PREFIX.unpack_from(self._buffer, begin)[0])
            if size > self.max_frame:
                self._fail(f"a frame of {size} bytes was announced, {self.max_frame} are allowed")
            end = begin + PREFIX_BYTES + size
            if end > held:
                break
            frames.append(self._buffer[begin + PREFIX_BYTES : end])
            begin = end
        if begin:
            del self._buffer[:begin]
        return frames

    def close(self) -> None:
        """Say that no more bytes will come.  Raises FrameError if they end inside a frame."""
        if self._broken is not None:
            raise FrameError(self._broken)
        if self._buffer:
            self._fail(f"the stream ended inside a frame, {len(self._buffer)} bytes into it")

    def _fail(self, reason: str) -> None:
        self._broken = reason
        self._buffer.clear()
        raise FrameError(reason)
