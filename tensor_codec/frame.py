"""Length-prefixed frames out of any split of a byte stream, and back.

A frame on the wire is a 4-byte big-endian length and then its payload.  Sans-IO, in the way of h11: bytes
go in, whole frames come out; nothing here reads, sleeps or knows the time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from tensor_codec.errors import FrameError, LocalProtocolError

PREFIX_BYTES = 4
PREFIX = struct.Struct(">I")

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
    return b"".join([PREFIX.pack(size), *pieces])


@dataclass(slots=True)
class FrameDecoder:
    """Turns an arbitrary split of a byte stream back into whole frames.

    Promises, checked by tests/unit/test_frame.py:
      * any split of the same bytes gives the same frames;
      * a length above `max_frame` is refused on sight of its prefix, before its bytes are waited for;
      * nothing but FrameError is raised, and after it every later call raises it again;
      * memory grows with the bytes that came in, not with the length that was announced.

    max_frame: largest payload accepted, in bytes.  It may change: it holds for the frames not taken yet.
    ended: whether the bytes ended, between two frames.
    """

    max_frame: int
    ended: bool = field(default=False, init=False)
    _buffer: bytearray = field(default_factory=bytearray)
    _unwanted: int = 0  # bytes still to come of a frame that is not wanted
    _broken: str | None = None

    @property
    def in_frame(self) -> bool:
        """Whether bytes of a frame have come that was not taken yet."""
        return bool(self._buffer or self._unwanted)

    @property
    def held(self) -> int:
        """Bytes held: of frames that were not taken yet."""
        return len(self._buffer)

    @property
    def size(self) -> int | None:
        """Payload bytes of the next frame, as announced; None before its prefix has come."""
        if len(self._buffer) < PREFIX_BYTES:
            return None
        return int(PREFIX.unpack_from(self._buffer)[0])

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come for the next frame; 0 if its length is not known yet, or if it is whole."""
        size = self.size
        return self._unwanted if size is None else max(0, PREFIX_BYTES + size - len(self._buffer))

    def add(self, data: Buffer) -> None:
        """Add received bytes.  Raises FrameError if an earlier call did."""
        if self._broken is not None:
            raise FrameError(self._broken)
        if self._unwanted:
            passed = min(self._unwanted, len(data))
            self._unwanted -= passed
            data = memoryview(data)[passed:]
        self._buffer += data

    def take(self, data: Buffer = b"") -> bytearray | None:
        """Add bytes; the next frame, in memory of its own, or None if it is not whole.  Raises FrameError."""
        if self._broken is not None:
            raise FrameError(self._broken)
        if self._unwanted:
            self.add(data)
        else:
            self._buffer += data
        buffer = self._buffer
        held = len(buffer)
        if held < PREFIX_BYTES:
            return None
        size = int(PREFIX.unpack_from(buffer)[0])
        if size > self.max_frame:
            self._fail(f"a frame of {size} bytes was announced, {self.max_frame} are allowed")
        end = PREFIX_BYTES + size
        if end > held:
            return None
        if end == held:  # the usual case, without a copy
            self._buffer = bytearray()
            del buffer[:PREFIX_BYTES]
            return buffer
        frame = buffer[PREFIX_BYTES:end]
        del buffer[:end]
        return frame

    def feed(self, data: Buffer) -> list[bytearray]:
        """Add received bytes; return every frame now complete.  Raises FrameError."""
        frames: list[bytearray] = []
        frame = self.take(data)
        while frame is not None:
            frames.append(frame)
            frame = self.take()
        return frames

    def beginning(self, max_bytes: int) -> bytes:
        """The first bytes of the next frame's payload, as far as they are here."""
        return bytes(self._buffer[PREFIX_BYTES : PREFIX_BYTES + max_bytes])

    def discard(self) -> None:
        """Drop the frame that has begun and is not whole: its further bytes pass by."""
        self._unwanted = self.missing_bytes
        self._buffer.clear()

    def close(self) -> None:
        """Say that no more bytes will come, with all frames taken.  Raises FrameError inside a frame."""
        if self._broken is not None:
            raise FrameError(self._broken)
        if self.in_frame:
            self._fail(f"the stream ended inside a frame, {len(self._buffer)} bytes into it")
        self.ended = True

    def _fail(self, reason: str) -> NoReturn:
        self._broken = reason
        self._buffer.clear()
        raise FrameError(reason)
