"""How receive windows grow and shrink, on a clock of our own: one end's yamux, or both over a line."""

import heapq
import itertools

import pytest

from node.network.transport.yamux import CHUNK, HEADER, PING, SYN, WINDOW_UPDATE, Happening, Yamux
from node.network.transport.yamux_limits import INITIAL_WINDOW, YamuxLimits
from tensor_codec.limits import KIB, MIB

ROUND_TRIP = 0.1


class Reader:
    """The receiving end of a stream, whose peer sends and whose reader takes half a window at a time."""

    def __init__(self, **limits):
        self.core = Yamux(False, YamuxLimits(**limits), 0.0, ROUND_TRIP)
        self.now = 0.0
        self.ids = itertools.count(1, 2)

    def open(self):
        (event,) = self.core.receive(HEADER.pack(0, WINDOW_UPDATE, SYN, next(self.ids), 0), self.now)
        return event.stream

    def half(self, stream, round_trips):
        """Half of the window comes, so much later, and is taken at once; the window afterwards."""
        self.now += round_trips * ROUND_TRIP
        size = stream.window // 2
        while size:
            part = min(size, CHUNK)
            self.core.receive(HEADER.pack(0, 0, 0, stream.id, part) + bytes(part), self.now)
            size -= len(self.core.take(stream, part))
        self.core.data_to_send()
        return stream.window


# Far less than a window for each round trip is no reason; a window for every one, two or three is.
@pytest.mark.parametrize(
    ("round_trips", "windows"), [(0.5, 8), (1.0, 8), (1.9, 8), (2.1, 1), (5.0, 1), (9.0, 1)]
)
def test_a_window_grows_where_halves_of_it_are_used_up_faster_than_one_in_two_round_trips(
    round_trips, windows
):
    reader = Reader(max_unread_bytes=8 * INITIAL_WINDOW)
    stream = reader.open()
    start = stream.window
    reader.now += 1000 * ROUND_TRIP
    reader.half(stream, round_trips)
    reader.half(stream, round_trips)
    for _ in range(8):
        reader.half(stream, round_trips)
    assert stream.window == min(windows * start, 8 * INITIAL_WINDOW)


def test_a_window_doubles_with_every_half():
    reader = Reader(max_unread_bytes=64 * INITIAL_WINDOW)
    stream = reader.open()
    start = stream.window
    assert [reader.half(stream, 1.0) // start for _ in range(4)] == [2, 4, 8, 16]


def test_one_window_at_once_now_and_then_is_no_reason_to_grow():
    reader = Reader()
    stream = reader.open()
    start = stream.window
    for _ in range(6):
        reader.half(stream, 50.0)
        reader.half(stream, 0.0)
    assert stream.window == start


def test_a_stream_that_ends_gives_its_window_back_to_the_budget():
    reader = Reader(max_unread_bytes=16 * INITIAL_WINDOW)
    for _ in range(3):
        stream = reader.open()
        for _ in range(6):
            reader.half(stream, 1.0)
        assert stream.window == 16 * INITIAL_WINDOW
        reader.core.reset(stream)
    assert reader.core._windows.granted == 0


def test_a_window_that_has_grown_makes_room_for_streams_that_come_later():
    reader = Reader(max_unread_bytes=16 * INITIAL_WINDOW)
    grown = reader.open()
    for _ in range(6):
        reader.half(grown, 1.0)
    others = [reader.open() for _ in range(4)]
    reader.half(grown, 1.0)
    assert grown.window == 12 * INITIAL_WINDOW
    assert [other.window for other in others] == [INITIAL_WINDOW] * 4
    assert grown.credit + len(grown.unread) == grown.window
    others += [reader.open() for _ in range(11)]
    for _ in range(12):  # but never below what the protocol promises
        reader.half(grown, 1.0)
    assert grown.window == INITIAL_WINDOW


def test_the_round_trip_is_the_least_that_was_measured():
    core, now, seen = Yamux(True, now=0.0, round_trip_seconds=0.3), 0.0, []
    for took in (0.2, 0.5, 0.1, 0.4):
        core.ping()
        (value,) = (HEADER.unpack(core.data_to_send())[4],)
        now += took
        core.receive(HEADER.pack(0, PING, 2, 0, value), now)
        seen.append(core.round_trip_seconds)
    assert seen == pytest.approx([0.2, 0.2, 0.1, 0.1])


class Line:
    """Two cores joined by TCP in slow start, over a line with a delay and a rate; its clock is virtual.

    gain: bytes by which the congestion window grows for each byte that arrives: 1 doubles it in a round
    trip, as cubic does; 1.9 is about what bbr does.
    """

    SEGMENT, UNSENT, CONGESTION, MOST = 16 * KIB, 128 * KIB, 60 * KIB, 3 * MIB

    def __init__(self, round_trip, gain, bytes_per_second=125e6, *, unbounded=False):
        limits = YamuxLimits(max_unread_bytes=1 << 30) if unbounded else YamuxLimits()
        self.sender, self.receiver = (Yamux(one, limits, 0.0, round_trip) for one in (True, False))
        self.delay, self.gain, self.rate = round_trip / 2, gain, bytes_per_second
        self.now = self.free_at = 0.0
        self.congestion, self.in_flight, self.unsent = self.CONGESTION, 0, bytearray()
        self.due, self.count = [], itertools.count()
        self.stream, self.unbounded = self.sender.open(), unbounded
        if unbounded:
            self.stream.send_credit = 1 << 30

    def seconds(self, size):
        """That a transfer of so many bytes takes, from the first sent to the last taken."""
        began, self.left, taken = self.now, size, 0
        self.write()
        while taken < size:
            self.now, _, data, acknowledged, back = heapq.heappop(self.due)
            if data:
                for event in self.receiver.receive(data, self.now):
                    if event.what is Happening.OPENED:
                        self.theirs = event.stream
                        self.theirs.credit = 1 << 30 if self.unbounded else self.theirs.credit
                while chunk := self.receiver.take(self.theirs, 256 * KIB):
                    taken += len(chunk)
                self.push(self.now + self.delay, b"", len(data), self.receiver.data_to_send())
            else:
                self.in_flight -= acknowledged
                self.congestion = min(self.congestion + self.gain * acknowledged, self.MOST)
                self.sender.receive(back, self.now)
                self.write()
        return self.now - began

    def push(self, at, *what):
        heapq.heappush(self.due, (at, next(self.count), *what))

    def write(self):
        while self.left or self.unsent:
            if self.left and len(self.unsent) < self.UNSENT:
                size = self.sender.send(self.stream, memoryview(bytes(min(self.left, CHUNK))))
                self.left -= size
                self.unsent += self.sender.data_to_send()
                if size:
                    continue
            if not self.unsent or self.in_flight >= self.congestion:
                return
            part = bytes(self.unsent[: self.SEGMENT])
            del self.unsent[: len(part)]
            self.in_flight += len(part)
            self.free_at = max(self.now, self.free_at) + len(part) / self.rate
            self.push(self.free_at + self.delay, part, 0, b"")


@pytest.mark.parametrize("gain", [1.0, 1.9])
@pytest.mark.parametrize("round_trip", [0.04, 0.16])
def test_windows_cost_a_long_transfer_at_most_15_percent_from_the_first_byte_on(round_trip, gain):
    bounded, unbounded = Line(round_trip, gain), Line(round_trip, gain, unbounded=True)
    for _ in range(2):  # the second with windows and congestion window as the first has left them
        assert bounded.seconds(8 * MIB) <= 1.15 * unbounded.seconds(8 * MIB)
    assert bounded.receiver._windows.granted <= YamuxLimits().max_unread_bytes
