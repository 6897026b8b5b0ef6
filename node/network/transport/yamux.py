"""Yamux, sans-IO: many streams over one connection, with receive windows that are enforced.

The wire is that of hashicorp's specification (libp2p's `/yamux/1.0.0`): a header of 12 bytes

    version (1) | type (1) | flags (2) | stream (4) | length (4)        all big-endian

and, for type DATA, `length` bytes.  A stream starts with 256 KiB of credit in each direction; the
receiver returns credit as its reader takes bytes, half a window at a time.  `credit + unread` never
exceeds the stream's window: a peer that keeps the rules cannot fill memory, and the connection to any other
peer is closed at its first byte over the window.

Windows grow.  A stream of a distant peer gets more credit with the ACK, as the specification allows.
A window doubles (the idea of go-yamux and rust-yamux) after two halves were used up in less than four
round trips, as long as all windows together stay within the connection's budget.  A sender limited
only by the window needs one round trip for both halves, two at the most.  TCP's slow start may triple its
bytes in each round trip, so the window must be larger: hence four.  When later
streams bring the windows beyond the budget, grown windows shrink: part of their credit is kept back.

Bytes come in by `receive` and go out by `data_to_send`; nothing here waits or reads a clock.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from node.network.transport.yamux_limits import (
    INITIAL_WINDOW,
    ControlFrames,
    InboundStreams,
    RoundTrip,
    StrayBytes,
    StreamIds,
    WindowBudget,
    YamuxError,
    YamuxLimits,
)
from tensor_codec.errors import LocalProtocolError, PeerGone
from tensor_codec.frame import Buffer

PROTOCOL = "/yamux/1.0.0"
HEADER = struct.Struct(">BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
NORMAL, PROTOCOL_ERROR = 0, 1  # codes of GO_AWAY
# Largest payload of one DATA frame that we send: with its header it fills exactly one Noise message (65,535
# bytes less the tag).  A small message waits for no more than this payload of another stream.
CHUNK = 65_519 - HEADER.size
FRAMES_AT_ONCE = 256  # of about 5 us each, before other tasks run: one read may bring 16,000
_MAX_CREDIT = 2**32 - 1


class StreamReset(PeerGone):
    """The stream was reset, by the peer or by ourselves."""


class Happening(Enum):
    """The kinds of events that `receive` returns."""

    OPENED = auto()  # the peer opened this stream
    READABLE = auto()  # bytes or the end of the stream wait to be taken
    WRITABLE = auto()  # credit came
    RESET = auto()
    GONE_AWAY = auto()  # the peer will open and accept no more; stream is None


class Event(NamedTuple):
    """One event of a stream or of the connection."""

    what: Happening
    stream: Stream | None


class Stream:
    """The state of one stream.  Read it, and change it by the methods of its Yamux alone."""

    __slots__ = (
        "abandoned_at",
        "credit",
        "credited_at",
        "credited_before",
        "ends_after_body",
        "held",
        "id",
        "inbound",
        "is_reset",
        "receive_ended",
        "send_credit",
        "send_ended",
        "unread",
        "window",
    )

    def __init__(self, stream_id: int, inbound: bool, now: float) -> None:
        self.id = stream_id
        self.inbound = inbound
        self.window = INITIAL_WINDOW  # most bytes that may wait here unread
        self.credit = INITIAL_WINDOW  # bytes that the peer may still send
        self.credited_at = self.credited_before = now  # when credit went back last, and before that
        self.send_credit = INITIAL_WINDOW  # bytes that we may still send
        # one buffer, not a list of chunks: a peer that sends two bytes per frame must not cost fifty
        self.unread = bytearray()
        self.held = 0  # bytes taken that the reader has not let go
        self.send_ended = False
        self.receive_ended = False
        self.ends_after_body = False  # the frame being received is the last
        self.is_reset = False
        self.abandoned_at: float | None = None

    def __repr__(self) -> str:
        return f"<stream {self.id}, {len(self.unread)} unread, may send {self.send_credit}>"


@dataclass(slots=True)
class _PartOfFrame:
    """A frame that is being received: its header as far as it came, then the rest of its body."""

    header: bytes = b""
    body_left: int = 0
    stream: Stream | None = None


class Yamux:
    """One connection's streams: bytes in, events and bytes out.

    Promises, checked by tests/unit/test_yamux.py:
      * any split of the same bytes has the same effect;
      * a peer's bytes raise nothing but YamuxError, and after it every call raises it again;
      * a stream never holds more than its window, the connection never more than `max_unread_bytes`;
      * we never send more than the peer's credit;
      * our owed answers (pongs, resets) are bounded for any flood of the peer;
      * frames without data, and bytes for closed streams, end a connection beyond what honest peers send.

    is_client: True for the side that dialled; its streams have odd ids.
    round_trip_seconds: of the handshake, until a ping took less.
    """

    def __init__(
        self,
        is_client: bool,
        limits: YamuxLimits | None = None,
        now: float = 0.0,
        round_trip_seconds: float | None = None,
    ) -> None:
        self._limits = limits or YamuxLimits()
        self._now = now
        self._ids = StreamIds(is_client)
        self._streams: dict[int, Stream] = {}
        self._inbound = InboundStreams(self._limits, now)
        self._unread_bytes = 0
        self._windows = WindowBudget(self._limits.max_unread_bytes)
        self._round_trip = RoundTrip(round_trip_seconds)
        self._control = ControlFrames(self._limits, now)
        self._stray = StrayBytes(self._limits)
        self._abandoned: deque[Stream] = deque()
        self._failure: str | None = None
        self._part = _PartOfFrame()
        # to be sent
        self._outbox: list[bytes | memoryview] = []
        self._control_bytes = 0

    # --- for the connection's owner ---

    @property
    def has_data_to_send(self) -> bool:
        """True if `data_to_send` would return bytes."""
        return bool(self._outbox)

    @property
    def unread_bytes(self) -> int:
        """Bytes received and not yet taken, or taken and still held, of all streams."""
        return self._unread_bytes

    @property
    def streams(self) -> int:
        """The number of open streams, including streams that only the other side has not closed."""
        return len(self._streams)

    @property
    def round_trip_seconds(self) -> float | None:
        """The least round trip measured; None before the first."""
        return self._round_trip.seconds

    def data_to_send(self) -> bytes:
        """All bytes to send now, once.  Hand them to the network in this order."""
        outbox, self._outbox = self._outbox, []
        self._control_bytes = 0
        return b"".join(outbox)

    def open(self) -> Stream:
        """Start a stream.  Says so to the peer with the first bytes that go out."""
        self._check()
        stream_id = self._ids.take()
        if stream_id is None:
            raise StreamReset("the connection has used up its stream ids")
        stream = Stream(stream_id, False, self._now)
        self._add(stream)
        self._queue(WINDOW_UPDATE, SYN, stream.id, 0)
        return stream

    def send(self, stream: Stream, data: memoryview) -> int:
        """Queue one frame with the beginning of `data`; return how many bytes of it, 0 without credit.

        The bytes are not copied before `data_to_send`: leave them alone until then.
        Raises StreamReset; LocalProtocolError after `end`.
        """
        self._check()
        if stream.is_reset:
            raise StreamReset(f"stream {stream.id} was reset")
        if stream.send_ended:
            raise LocalProtocolError(f"bytes to send on stream {stream.id} after its end")
        size = min(len(data), stream.send_credit, CHUNK)
        if size:
            stream.send_credit -= size
            self._control.sent(size)
            self._outbox.append(HEADER.pack(0, DATA, 0, stream.id, size))
            self._outbox.append(data[:size])
        return size

    def take(self, stream: Stream, max_bytes: int) -> bytes:
        """Up to `max_bytes` that have come in, oldest first; b"" if there are none.  Gives credit back."""
        held = stream.held
        data = self.take_held(stream, max_bytes)
        self.hold(stream, held)
        return data

    def take_held(self, stream: Stream, max_bytes: int) -> bytes:
        """As `take`, but the bytes count as unread until `hold` says otherwise: their credit stays here."""
        data = bytes(memoryview(stream.unread)[:max_bytes])
        del stream.unread[: len(data)]
        stream.held += len(data)
        return data

    def used(self, stream: Stream, size: int) -> None:
        """Say that the oldest `size` unread bytes were used where they lay.  Gives their credit back."""
        size = min(size, len(stream.unread))  # none are left after a reset
        del stream.unread[:size]
        self._unread_bytes -= size
        if size and not (stream.receive_ended or stream.is_reset):
            self._give_credit(stream)

    def hold(self, stream: Stream, size: int) -> None:
        """Say how many of the bytes of `take_held` are still held.  Gives the others' credit back."""
        freed = stream.held - size
        if freed <= 0:
            return
        stream.held = size
        self._unread_bytes -= freed
        if not (stream.receive_ended or stream.is_reset):
            self._give_credit(stream)

    def end(self, stream: Stream) -> None:
        """End our side of this stream.  A second call does no harm."""
        if stream.send_ended or stream.is_reset or self._failure is not None:
            return
        stream.send_ended = True
        self._queue(DATA, FIN, stream.id, 0)
        if stream.receive_ended:
            self._drop(stream)

    def abandon(self, stream: Stream) -> None:
        """`end`, and discard further and unread bytes.

        A peer that has not ended the stream itself after `linger_seconds` gets a reset.
        """
        self.end(stream)
        self._forget_all(stream)
        if not stream.is_reset and stream.id in self._streams and stream.abandoned_at is None:
            stream.abandoned_at = self._now
            self._abandoned.append(stream)

    def reset(self, stream: Stream) -> None:
        """End both directions at once, and forget unread bytes."""
        self._forget_all(stream)
        if stream.is_reset:
            return
        was_open = self._streams.get(stream.id) is stream
        stream.is_reset = True
        if was_open and self._failure is None:
            self._stray.closed(stream.credit)
            self._drop(stream)
            self._queue(WINDOW_UPDATE, RST, stream.id, 0)

    def ping(self) -> None:
        """Measure the round trip, unless a ping is under way: its answer sets `round_trip_seconds`."""
        value = self._round_trip.begin(self._now)
        if value is not None:
            self._queue(PING, SYN, 0, value)

    def go_away(self, code: int = NORMAL) -> None:
        """Say that this connection ends now."""
        self._queue(GO_AWAY, 0, 0, code)

    # --- the peer's bytes ---

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the network.  Raises YamuxError, and nothing else.

        now: seconds on any clock that does not go back.
        """
        events, used = self.receive_some(data, now)
        while used < len(data):
            data = data[used:]
            more, used = self.receive_some(data, now)
            events += more
        return events

    def receive_some(self, data: Buffer, now: float) -> tuple[list[Event], int]:
        """As `receive`, but of at most FRAMES_AT_ONCE frames; the events, and the number of bytes used."""
        self._check()
        self._now = now
        events: list[Event] = []
        try:
            used = self._parse(data, events)
            if self._abandoned:
                self._sweep()
            if self._control_bytes > self._limits.max_control_bytes:
                raise YamuxError(
                    f"{self._control_bytes} bytes of answers wait for a peer that does not take them, "
                    f"allowed are {self._limits.max_control_bytes}"
                )
        except YamuxError as error:
            self._failure = str(error)
            raise
        return events, used

    def _parse(self, data: Buffer, events: list[Event]) -> int:
        position, size, frames, part = 0, len(data), 0, self._part
        while position < size:
            if part.body_left:
                body = data[position : position + part.body_left]
                position += len(body)
                self._on_body(body, events)
                continue
            if frames == FRAMES_AT_ONCE:
                break
            if not part.header and size - position >= HEADER.size:
                fields = HEADER.unpack_from(data, position)
                position += HEADER.size
            else:
                missing = HEADER.size - len(part.header)
                part.header += bytes(data[position : position + missing])
                position += min(missing, size - position)
                if len(part.header) < HEADER.size:
                    break
                fields = HEADER.unpack(part.header)
                part.header = b""
            frames += 1
            self._on_header(fields, events)
        return position

    def _on_header(self, fields: tuple[int, ...], events: list[Event]) -> None:
        version, kind, flags, stream_id, length = fields
        if version:
            raise YamuxError(f"yamux version {version}, expected 0")
        if kind > WINDOW_UPDATE:
            self._on_session_frame(kind, flags, length, events)
            return
        stream = self._streams.get(stream_id)
        if flags & SYN:
            if stream is not None:
                raise YamuxError(f"stream {stream_id} was opened twice")
            stream = self._on_open(stream_id, events)
        elif stream is None and not self._ids.was_open(stream_id):
            raise YamuxError(f"a frame for stream {stream_id}, which was never opened")
        if not (flags & SYN or (kind == DATA and length)):
            self._control.take(self._now)
        if flags & RST:
            if kind == DATA and length:
                self._expect_body(None, length, False)
            if stream is not None:
                self._on_reset(stream, events)
        elif kind == WINDOW_UPDATE:
            if stream is not None:
                self._on_credit(stream, length, events)
                if flags & FIN:
                    self._on_end(stream, events)
        elif length:
            self._expect_body(stream, length, bool(flags & FIN))
        elif stream is not None and flags & FIN:
            self._on_end(stream, events)

    def _on_session_frame(self, kind: int, flags: int, value: int, events: list[Event]) -> None:
        self._control.take(self._now)
        if kind == PING:
            if flags & SYN:
                self._queue(PING, ACK, 0, value)
            else:
                self._round_trip.answered(value, self._now)
        elif kind == GO_AWAY:
            events.append(Event(Happening.GONE_AWAY, None))
        else:
            raise YamuxError(f"a frame of type {kind}, known are 0 to {GO_AWAY}")

    def _on_open(self, stream_id: int, events: list[Event]) -> Stream | None:
        self._ids.see(stream_id)
        if not self._inbound.may_open(self._now):
            self._stray.closed(INITIAL_WINDOW)
            self._queue(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = Stream(stream_id, True, self._now)
        more = self._windows.head_start(self._round_trip.seconds)
        stream.window += more
        stream.credit += more
        self._add(stream)
        self._queue(WINDOW_UPDATE, ACK, stream_id, more)
        events.append(Event(Happening.OPENED, stream))
        return stream

    def _expect_body(self, stream: Stream | None, length: int, ends_stream: bool) -> None:
        if stream is None:
            self._stray.take(length)
        else:
            if stream.receive_ended:
                raise YamuxError(f"bytes on stream {stream.id} after its end")
            if length > stream.credit:
                raise YamuxError(
                    f"a frame of {length} bytes on stream {stream.id}, its window allows {stream.credit}"
                )
            stream.credit -= length
            stream.ends_after_body = ends_stream
        self._part.body_left, self._part.stream = length, stream

    def _on_body(self, body: Buffer, events: list[Event]) -> None:
        part = self._part
        part.body_left -= len(body)
        stream = part.stream
        if stream is None:
            return
        if not (stream.is_reset or stream.abandoned_at is not None):
            stream.unread += body
            self._unread_bytes += len(body)
            if self._unread_bytes > self._limits.max_unread_bytes:
                raise YamuxError(
                    f"{self._unread_bytes} bytes wait unread on this connection, "
                    f"allowed are {self._limits.max_unread_bytes}"
                )
            events.append(Event(Happening.READABLE, stream))
        if not part.body_left:
            part.stream = None
            if stream.ends_after_body and not stream.is_reset:
                self._on_end(stream, events)

    def _on_credit(self, stream: Stream, credit: int, events: list[Event]) -> None:
        stream.send_credit += credit
        if stream.send_credit > _MAX_CREDIT:
            raise YamuxError(
                f"{stream.send_credit} bytes of credit on stream {stream.id}, allowed are {_MAX_CREDIT}"
            )
        if credit:
            events.append(Event(Happening.WRITABLE, stream))

    def _on_end(self, stream: Stream, events: list[Event]) -> None:
        if stream.receive_ended:
            return
        stream.receive_ended = True
        events.append(Event(Happening.READABLE, stream))
        if stream.send_ended:
            self._drop(stream)

    def _on_reset(self, stream: Stream, events: list[Event]) -> None:
        stream.is_reset = True
        self._forget_unread(stream)
        self._drop(stream)
        events.append(Event(Happening.RESET, stream))
        if stream.inbound:
            self._inbound.was_reset(self._now)

    # --- accounts ---

    def _give_credit(self, stream: Stream) -> None:
        announced = self._part.body_left if self._part.stream is stream else 0  # its credit is spent already
        owed = stream.window - stream.credit - len(stream.unread) - stream.held - announced
        if owed * 2 < stream.window:
            return
        round_trip = self._round_trip.seconds
        may_grow = round_trip is not None and self._now - stream.credited_before < 4 * round_trip
        change = self._windows.resize(stream.window, owed, may_grow)
        if may_grow and change >= 0:
            self.ping()
        stream.window += change
        owed += change
        stream.credited_before, stream.credited_at = stream.credited_at, self._now
        if owed:
            stream.credit += owed
            self._queue(WINDOW_UPDATE, 0, stream.id, owed)

    def _add(self, stream: Stream) -> None:
        self._streams[stream.id] = stream
        self._windows.add(stream.window)
        if stream.inbound:
            self._inbound.opened()

    def _drop(self, stream: Stream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            self._windows.add(-stream.window)
            if stream.inbound:
                self._inbound.ended()

    def _forget_unread(self, stream: Stream) -> None:
        self._unread_bytes -= len(stream.unread)
        stream.unread.clear()

    def _forget_all(self, stream: Stream) -> None:
        """The reader is gone, and the bytes that it held with it."""
        self._forget_unread(stream)
        self._unread_bytes -= stream.held
        stream.held = 0

    def _sweep(self) -> None:
        while self._abandoned:
            stream = self._abandoned[0]
            if self._streams.get(stream.id) is stream:
                if self._now - (stream.abandoned_at or 0.0) < self._limits.linger_seconds:
                    return
                self.reset(stream)
            self._abandoned.popleft()

    def _queue(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._outbox.append(HEADER.pack(0, kind, flags, stream_id, length))
        self._control_bytes += HEADER.size

    def _check(self) -> None:
        if self._failure is not None:
            raise YamuxError(self._failure)
