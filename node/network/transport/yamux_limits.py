"""The accounts of one yamux connection: windows, opened streams, the round trip, stream ids.

Each account is plain arithmetic; `node.network.transport.yamux` acts on its answers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tensor_codec.errors import PeerFault
from tensor_codec.limits import KIB, MIB

INITIAL_WINDOW = 256 * KIB  # fixed by the protocol
MAX_ID = 2**32 - 1  # also the largest value of a ping
# A stream of a distant peer begins with a larger window: the bytes of one round trip at 80 Mbit/s.  With
# 256 KiB a prompt of a few hundred kilobytes waits for several round trips, and windows grow too late for it.
FAR_BYTES_PER_SECOND = 10_000_000
FAR_WINDOW = MIB  # at most


class YamuxError(PeerFault):
    """The peer broke the multiplexing protocol or a limit: the connection must be closed."""

    is_grave = True


@dataclass(frozen=True, slots=True)
class YamuxLimits:
    """The bounds of one connection."""

    max_inbound_streams: int = 32
    max_unread_bytes: int = 8 * MIB
    opens_per_second: float = 20.0
    open_burst: int = 64
    reset_window_seconds: float = 10.0  # rapid reset: more than half of >= 20 opens in this time
    reset_floor: int = 20
    breaches_allowed: int = 2  # seconds of one minute with more opens than the burst allows
    refusals_allowed: int = (
        512  # of opened streams, until a minute passes without one: each costs as a stream
    )
    max_control_bytes: int = 64 * KIB  # pongs, resets and window updates that the peer does not take
    # pings, pongs, credit, empty frames
    control_frames_per_second: float = 1000.0
    control_frames_burst: int = 4000
    bytes_per_control_frame: int = 256  # one more for so many bytes that we send: py-libp2p credits each read
    max_stray_bytes: int = 4 * MIB  # to streams that are closed, beyond the credit that they had
    linger_seconds: float = 10.0  # for the peer to end a stream that we have closed


@dataclass(slots=True)
class StreamIds:
    """The ids of both sides: odd ones belong to the side that dialled, even ones to the other."""

    is_client: bool
    _opened: int = 0  # by us
    _highest_seen: int = 0  # of the peer's

    def take(self) -> int | None:
        """Our next id; None when all are used."""
        stream_id = 2 * self._opened + (1 if self.is_client else 2)
        if stream_id > MAX_ID:
            return None
        self._opened += 1
        return stream_id

    def see(self, stream_id: int) -> None:
        """Note an id that the peer opens.  Raises YamuxError for an id of our side."""
        if not stream_id or self._is_ours(stream_id):
            raise YamuxError(f"the peer opened stream {stream_id}, an id that is not its own to use")
        self._highest_seen = max(self._highest_seen, stream_id)

    def was_open(self, stream_id: int) -> bool:
        """Whether either side has opened this id at some time."""
        if not stream_id:
            return False
        if self._is_ours(stream_id):
            return stream_id <= 2 * self._opened
        return stream_id <= self._highest_seen

    def _is_ours(self, stream_id: int) -> bool:
        return stream_id % 2 == self.is_client


@dataclass(slots=True)
class RoundTrip:
    """The round trip of a connection, by pings of which one at a time is under way.

    seconds: the least measured, since any more is waiting time; None before the first.
    """

    seconds: float | None = None
    _value: int = 0
    _sent_at: float | None = None

    def begin(self, now: float) -> int | None:
        """The value of a ping to send now; None while another is under way."""
        if self._sent_at is not None:
            return None
        self._value = (self._value + 1) & MAX_ID
        self._sent_at = now
        return self._value

    def answered(self, value: int, now: float) -> None:
        """Take a pong; one that answers no ping of ours is ignored."""
        if self._sent_at is not None and value == self._value:
            measured = now - self._sent_at
            self.seconds = measured if self.seconds is None else min(self.seconds, measured)
            self._sent_at = None


@dataclass(slots=True)
class WindowBudget:
    """Receive windows of all streams together.

    max_bytes: the bound of grown windows; the initial windows may exceed it.
    granted: the sum of all windows, in bytes.
    """

    max_bytes: int
    granted: int = 0

    def add(self, window: int) -> None:
        """Count a stream's window; a negative one gives it back."""
        self.granted += window

    def head_start(self, round_trip: float | None) -> int:
        """Bytes that a new stream gets beyond INITIAL_WINDOW, from at most half of the budget."""
        wanted = min(int((round_trip or 0) * FAR_BYTES_PER_SECOND), FAR_WINDOW)
        left = self.max_bytes // 2 - self.granted
        return max(0, min(wanted, left) - INITIAL_WINDOW)

    def resize(self, window: int, owed: int, may_grow: bool) -> int:
        """Bytes by which a window changes as `owed` bytes of credit go back to the peer; counted here.

        Negative, at most `owed`, where the budget is exceeded; a window never falls below INITIAL_WINDOW.
        """
        left = self.max_bytes - self.granted
        change = 0
        if left < 0:
            change = -min(-left, owed, max(window - INITIAL_WINDOW, 0))
        elif may_grow:
            change = min(window, left)
        self.granted += change
        return change


@dataclass(slots=True)
class InboundStreams:
    """The streams that the peer opens: their number, their rate, and the number that is reset at once.

    A token bucket over opened streams; a minute with too many dry seconds ends the connection, and so do too
    many refusals, and rapid reset (CVE-2023-44487).
    """

    limits: YamuxLimits
    now: float
    count: int = 0  # open now
    _tokens: float = field(init=False)
    _tokens_at: float = field(init=False)
    _breaches: deque[float] = field(default_factory=deque)
    _refusals: int = 0  # since the oldest breach
    _since: float = field(init=False)  # when the counts below began
    _opens: int = 0
    _resets: int = 0

    def __post_init__(self) -> None:
        self._tokens = float(self.limits.open_burst)
        self._tokens_at = self._since = self.now

    def may_open(self, now: float) -> bool:
        """Count an attempt to open a stream; whether it is allowed.  Raises YamuxError for a flood."""
        if now - self._since > self.limits.reset_window_seconds:
            self._since, self._opens, self._resets = now, 0, 0
        self._opens += 1
        in_time = self._take_token(now)  # also beyond the cap, or a peer there could go on for ever
        return in_time and self.count < self.limits.max_inbound_streams

    def _take_token(self, now: float) -> bool:
        limits = self.limits
        tokens = self._tokens + (now - self._tokens_at) * limits.opens_per_second
        self._tokens, self._tokens_at = min(tokens, float(limits.open_burst)), now
        if self._tokens >= 1:
            self._tokens -= 1
            return True
        while self._breaches and now - self._breaches[0] > 60:
            self._breaches.popleft()
        self._refusals = self._refusals + 1 if self._breaches else 1
        if not self._breaches or now - self._breaches[-1] >= 1:
            self._breaches.append(now)
        if len(self._breaches) > limits.breaches_allowed or self._refusals > limits.refusals_allowed:
            raise YamuxError(
                f"more than {limits.opens_per_second:g} streams a second were opened, "
                f"{len(self._breaches)} times within a minute, {self._refusals} too many"
            )
        return False

    def opened(self) -> None:
        """A stream of the peer's is open from now on."""
        self.count += 1

    def ended(self) -> None:
        """A stream of the peer's is open no more."""
        self.count -= 1

    def was_reset(self, now: float) -> None:
        """Count a reset by the peer of a stream that it had opened.  Raises YamuxError for a flood."""
        limits = self.limits
        self._resets += 1
        if (
            self._opens >= limits.reset_floor
            and self._resets * 2 > self._opens
            and now - self._since <= limits.reset_window_seconds
        ):
            raise YamuxError(
                f"{self._resets} of {self._opens} streams were opened and reset within "
                f"{limits.reset_window_seconds} s"
            )


@dataclass(slots=True)
class ControlFrames:
    """The peer's frames that carry no data and open no stream: a token bucket.

    Honest peers return credit for the bytes that we sent, so these add tokens.
    """

    limits: YamuxLimits
    now: float
    _tokens: float = field(init=False)

    def __post_init__(self) -> None:
        self._tokens = float(self.limits.control_frames_burst)

    def sent(self, size: int) -> None:
        """Count bytes of ours, for which the peer returns credit."""
        self._tokens += 1 + size / self.limits.bytes_per_control_frame  # cut when the next one is taken

    def take(self, now: float) -> None:
        """Count a frame of the peer's.  Raises YamuxError for a flood."""
        limits = self.limits
        tokens = self._tokens + (now - self.now) * limits.control_frames_per_second
        self._tokens, self.now = min(tokens, float(limits.control_frames_burst)) - 1, now
        if self._tokens < 0:
            raise YamuxError(
                f"more than {limits.control_frames_per_second:g} frames a second without data, "
                f"beyond {limits.control_frames_burst} at once"
            )


@dataclass(slots=True)
class StrayBytes:
    """The peer's bytes to streams that are closed: what it may have sent before it knew, and some more.

    granted: credit that closed streams had, at most that of all streams that the peer may have open.
    """

    limits: YamuxLimits
    granted: int = 0

    def closed(self, credit: int) -> None:
        """Count a stream that we reset, with the credit that the peer had."""
        most = max(self.limits.max_unread_bytes, self.limits.max_inbound_streams * INITIAL_WINDOW)
        self.granted = min(self.granted + credit, most)

    def take(self, size: int) -> None:
        """Count a frame.  Raises YamuxError beyond the bound."""
        self.granted -= size
        if self.granted < -self.limits.max_stray_bytes:
            raise YamuxError(
                f"{-self.granted} bytes for closed streams beyond their credit, "
                f"allowed are {self.limits.max_stray_bytes}"
            )
