import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from node.network.transport.yamux import (
    ACK,
    CHUNK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Happening,
    StreamReset,
    Yamux,
)
from node.network.transport.yamux_limits import (
    FAR_BYTES_PER_SECOND,
    FAR_WINDOW,
    INITIAL_WINDOW,
    YamuxError,
    YamuxLimits,
)
from tensor_codec.errors import LocalProtocolError
from tensor_codec.limits import KIB, MIB


def frame(kind, flags, stream, length, body=b""):
    return HEADER.pack(0, kind, flags, stream, length) + body


def data(stream, body, flags=0):
    return frame(DATA, flags, stream, len(body), body)


def opened(stream=1):
    return frame(WINDOW_UPDATE, SYN, stream, 0)


def frames(wire):
    """(kind, flags, stream, length) of every frame."""
    found = []
    while wire:
        _, kind, flags, stream, length = HEADER.unpack_from(wire)
        found.append((kind, flags, stream, length))
        wire = wire[HEADER.size + (length if kind == DATA else 0) :]
    return found


def send_all(core, stream, payload):
    """As much of the payload as the stream's credit allows."""
    view = memoryview(payload)
    while view and (size := core.send(stream, view)):
        view = view[size:]


def take_all(core, stream):
    taken = b""
    while chunk := core.take(stream, MIB):
        taken += chunk
    return taken


class Pair:
    """Two cores joined by a wire that takes `one_way` seconds, with a clock."""

    def __init__(self, one_way=0.0, **limits):
        self.now = 0.0
        self.one_way = one_way
        self.client = Yamux(True, YamuxLimits(**limits))
        self.server = Yamux(False, YamuxLimits(**limits))

    def deliver(self):
        """Carry everything both ways; what happened at the client and the server."""
        happened = ([], [])
        while self.client.has_data_to_send or self.server.has_data_to_send:
            to_server, to_client = self.client.data_to_send(), self.server.data_to_send()
            self.now += self.one_way
            happened[1].extend(self.server.receive(to_server, self.now))
            happened[0].extend(self.client.receive(to_client, self.now))
        return happened

    def open(self):
        """A stream, as the client and as the server have it."""
        stream = self.client.open()
        _, events = self.deliver()
        return stream, next(event.stream for event in events if event.what is Happening.OPENED)


def test_a_message_arrives_and_so_does_the_end():
    pair = Pair()
    ours, theirs = pair.open()
    send_all(pair.client, ours, b"hello")
    pair.client.end(ours)
    pair.deliver()
    assert take_all(pair.server, theirs) == b"hello"
    assert theirs.receive_ended
    pair.server.end(theirs)
    pair.deliver()
    assert ours.receive_ended
    assert pair.client.streams == pair.server.streams == 0


def test_the_stream_is_opened_in_the_same_bytes_as_its_first_message():
    client, server = Yamux(True), Yamux(False)
    stream = client.open()
    send_all(client, stream, b"hello")
    events = server.receive(client.data_to_send(), 0.0)
    assert [event.what for event in events] == [Happening.OPENED, Happening.READABLE]


@given(st.data())
@settings(max_examples=60)
def test_any_split_of_the_same_bytes_has_the_same_effect(draw):
    bodies = draw.draw(st.lists(st.binary(max_size=40), max_size=6))
    wire = opened() + b"".join(data(1, body) for body in bodies)
    wire += frame(PING, SYN, 0, 7) + opened(3) + data(3, b"x", FIN) + frame(WINDOW_UPDATE, RST, 1, 0)
    whole, split = Yamux(False), Yamux(False)
    events = [(event.what, event.stream.id) for event in whole.receive(wire, 0.0)]
    split_events = []
    while wire:
        cut = draw.draw(st.integers(1, len(wire)))
        split_events += [(event.what, event.stream.id) for event in split.receive(wire[:cut], 0.0)]
        wire = wire[cut:]
    assert list(dict.fromkeys(split_events)) == list(dict.fromkeys(events))
    assert split.data_to_send() == whole.data_to_send()
    assert split.unread_bytes == whole.unread_bytes == 1


FIELDS = st.tuples(
    st.sampled_from([0, 0, 0, 0, 0, 1]),
    st.integers(0, 4),
    st.sampled_from([0, 0, SYN, SYN, ACK, FIN, RST, SYN | FIN, 0xFFFF]),
    st.integers(0, 7),
    st.sampled_from([0, 1, 5, CHUNK, INITIAL_WINDOW, INITIAL_WINDOW + 1, 2**32 - 1]),
)


@given(st.booleans(), st.lists(st.one_of(st.binary(max_size=64), FIELDS), max_size=60))
@settings(max_examples=300)
def test_from_random_frames_nothing_but_its_own_error_escapes(is_client, pieces):
    core = Yamux(is_client, YamuxLimits(max_unread_bytes=INITIAL_WINDOW))
    core.open()
    core.ping()
    try:
        for number, piece in enumerate(pieces):
            if isinstance(piece, tuple):
                body = bytes(min(piece[4], INITIAL_WINDOW)) if piece[1] == DATA else b""
                piece = HEADER.pack(*piece) + body
            core.receive(piece, number * 0.1)
            assert core.unread_bytes <= INITIAL_WINDOW
            core.data_to_send()
    except YamuxError:
        with pytest.raises(YamuxError):
            core.receive(b"", 100.0)


def test_a_peer_that_ignores_its_window_is_stopped_at_the_header_of_its_first_frame_too_many():
    core = Yamux(False)
    core.receive(opened() + data(1, bytes(INITIAL_WINDOW)), 0.0)
    with pytest.raises(YamuxError, match="a frame of 1 bytes on stream 1, its window allows 0"):
        core.receive(frame(DATA, 0, 1, 1), 0.0)
    assert core.unread_bytes == INITIAL_WINDOW


def test_the_unread_bytes_of_a_connection_are_bounded_whatever_its_streams_allow():
    core = Yamux(False, YamuxLimits(max_unread_bytes=MIB))
    for number in range(4):
        core.receive(opened(1 + 2 * number) + data(1 + 2 * number, bytes(INITIAL_WINDOW)), 0.0)
    with pytest.raises(YamuxError, match="1048577 bytes wait unread on this connection, allowed are 1048576"):
        core.receive(opened(9) + data(9, b"x"), 0.0)


def test_two_bytes_per_frame_cost_no_more_memory_than_their_number():
    import tracemalloc

    core = Yamux(False)
    core.receive(opened(), 0.0)
    wire = data(1, b"ab") * 5000
    tracemalloc.start()
    for _ in range(4):
        core.receive(wire, 0.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert core.unread_bytes == 40_000
    assert held < 2 * core.unread_bytes


def test_credit_comes_back_in_halves_of_the_window():
    pair = Pair()
    ours, theirs = pair.open()
    send_all(pair.client, ours, bytes(INITIAL_WINDOW))
    pair.deliver()
    assert ours.send_credit == 0
    assert pair.client.send(ours, memoryview(b"x")) == 0
    pair.server.take(theirs, INITIAL_WINDOW // 2 - 1)
    assert not pair.server.has_data_to_send
    pair.server.take(theirs, 1)
    assert frames(pair.server.data_to_send()) == [(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW // 2)]


def test_no_credit_is_given_for_the_part_of_a_frame_that_is_still_to_come():
    core = Yamux(False)
    (event,) = core.receive(opened() + frame(DATA, 0, 1, INITIAL_WINDOW), 0.0)
    core.receive(bytes(INITIAL_WINDOW // 4), 0.0)
    core.data_to_send()
    assert len(core.take(event.stream, MIB)) == INITIAL_WINDOW // 4
    assert not core.has_data_to_send  # three quarters of the window are under way
    core.receive(bytes(INITIAL_WINDOW // 4), 0.0)
    core.take(event.stream, MIB)
    assert frames(core.data_to_send()) == [(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW // 2)]


def test_a_window_grows_when_it_is_used_up_in_two_round_trips_and_the_budget_allows():
    pair = Pair(one_way=0.05, max_unread_bytes=MIB)
    pair.server.ping()
    pair.deliver()
    assert pair.server.round_trip_seconds == pytest.approx(0.1)
    ours, theirs = pair.open()
    windows = []
    for _ in range(6):
        send_all(pair.client, ours, bytes(4 * MIB))
        pair.deliver()
        take_all(pair.server, theirs)
        pair.deliver()
        windows.append(theirs.window)
    assert windows == sorted(windows)
    assert windows[-1] == MIB

    slow, slow_theirs = pair.open()
    for _ in range(6):
        pair.now += 1.0
        send_all(pair.client, slow, bytes(4 * MIB))
        pair.deliver()
        while pair.server.take(slow_theirs, 10_000):  # a burst now and then is no reason
            pass
    assert slow_theirs.window == INITIAL_WINDOW


def test_a_stream_of_a_peer_far_away_begins_with_more_credit_within_half_of_the_budget():
    pair = Pair(one_way=0.05, max_unread_bytes=4 * MIB)
    near = pair.open()
    pair.server.ping()
    pair.deliver()
    streams = [pair.open() for _ in range(4)]
    windows = [theirs.window for _, theirs in (near, *streams)]
    assert windows[:2] == [INITIAL_WINDOW, int(pair.server.round_trip_seconds * FAR_BYTES_PER_SECOND)]
    assert sum(windows[:3]) == 2 * MIB
    assert windows[3:] == [INITIAL_WINDOW] * 2
    for ours, theirs in streams:
        assert ours.send_credit == theirs.credit == theirs.window
        assert theirs.window <= FAR_WINDOW
    ours, theirs = streams[0]
    data = bytes(theirs.window)
    while data:
        data = data[pair.client.send(ours, memoryview(data)) :]
    pair.deliver()
    assert len(theirs.unread) == theirs.window


def test_streams_beyond_the_cap_are_reset_and_the_rest_live_on():
    core = Yamux(False, YamuxLimits(max_inbound_streams=2))
    events = core.receive(opened(1) + opened(3) + opened(5) + data(5, b"ignored") + data(1, b"read"), 0.0)
    assert [(event.what, event.stream.id) for event in events] == [
        (Happening.OPENED, 1),
        (Happening.OPENED, 3),
        (Happening.READABLE, 1),
    ]
    assert (WINDOW_UPDATE, RST, 5, 0) in frames(core.data_to_send())
    assert core.unread_bytes == 4


def test_streams_opened_faster_than_allowed_are_reset_and_the_third_time_in_a_minute_is_the_last():
    core = Yamux(False, YamuxLimits(max_inbound_streams=10**6, reset_floor=10**6))
    stream_id = 1

    def burst(count, now):
        nonlocal stream_id
        wire = b""
        for _ in range(count):
            wire += opened(stream_id)
            stream_id += 2
        return sum(event.what is Happening.OPENED for event in core.receive(wire, now))

    assert burst(64, 0.0) == 64
    assert burst(21, 1.0) == 20  # 20 a second, and the first breach
    core.data_to_send()
    burst(21, 2.0)
    core.data_to_send()
    with pytest.raises(
        YamuxError, match="more than 20 streams a second were opened, 3 times within a minute"
    ):
        burst(21, 3.0)


def test_streams_opened_beyond_the_cap_count_as_opened_too_fast():
    core, ids = Yamux(False, YamuxLimits(max_inbound_streams=60)), iter(range(1, 10**6, 2))

    def burst(now):
        core.receive(b"".join(opened(next(ids)) for _ in range(100)), now)
        core.data_to_send()

    burst(0.0)  # 60 are open from now on, and nobody ends them
    burst(5.0)
    with pytest.raises(YamuxError, match="3 times within a minute"):
        burst(10.0)


def test_a_flood_of_opened_streams_is_stopped_within_the_second():
    core, ids = Yamux(False), iter(range(1, 10**6, 2))

    def burst(count, now):
        for _ in range(count):
            core.receive(opened(next(ids)), now)
            core.data_to_send()

    burst(64 + 512, 0.0)
    with pytest.raises(YamuxError, match="1 times within a minute, 513 too many"):
        burst(1, 0.01)


def test_streams_refused_in_another_minute_are_forgotten():
    core, ids = Yamux(False), iter(range(1, 10**6, 2))
    for now in (0.0, 70.0, 140.0):
        for _ in range(64 + 300):
            core.receive(opened(next(ids)), now)
            core.data_to_send()


def test_opening_and_resetting_in_turn_is_stopped():
    core = Yamux(False)
    in_turn = [opened(1 + 2 * i) + frame(WINDOW_UPDATE, RST, 1 + 2 * i, 0) for i in range(20)]
    for number, wire in enumerate(in_turn[:19]):
        core.receive(wire, number * 0.1)
    with pytest.raises(YamuxError, match=r"20 of 20 streams were opened and reset within 10\.0 s"):
        core.receive(in_turn[19], 2.0)


def test_resets_spread_over_time_are_nobodys_fault():
    core = Yamux(False)
    for number in range(40):
        core.receive(opened(1 + 2 * number) + frame(WINDOW_UPDATE, RST, 1 + 2 * number, 0), number * 1.0)
        core.data_to_send()
    assert core.streams == 0


def test_pings_are_answered_and_a_flood_of_them_without_reading_the_answers_ends_the_connection():
    core = Yamux(False)
    core.receive(frame(PING, SYN, 0, 77), 0.0)
    assert frames(core.data_to_send()) == [(PING, ACK, 0, 77)]
    for tenth in range(100):  # a thousand a second, while the answers are taken
        core.receive(frame(PING, SYN, 0, 1) * 100, tenth / 10)
        core.data_to_send()
    core.receive(frame(PING, SYN, 0, 1) * 3000, 20.0)
    with pytest.raises(YamuxError, match="wait for a peer that does not take them"):
        core.receive(frame(PING, SYN, 0, 1) * 3000, 30.0)


def test_a_reset_ends_both_directions_at_once():
    pair = Pair()
    ours, theirs = pair.open()
    send_all(pair.client, ours, b"unread")
    pair.deliver()
    pair.client.reset(ours)
    pair.client.reset(ours)
    _, events = pair.deliver()
    assert [event.what for event in events] == [Happening.RESET]
    with pytest.raises(StreamReset):
        pair.server.send(theirs, memoryview(b"x"))
    assert pair.server.take(theirs, 10) == b""
    assert pair.client.streams == pair.server.streams == pair.server.unread_bytes == 0


def test_what_a_peer_had_on_its_way_to_a_stream_that_we_reset_is_thrown_away():
    pair = Pair()
    ours, theirs = pair.open()
    send_all(pair.client, ours, bytes(100_000))
    pair.server.reset(theirs)
    pair.deliver()
    assert ours.is_reset
    assert pair.server.unread_bytes == 0


def test_bytes_to_streams_that_are_closed_are_thrown_away_up_to_their_credit_and_4_mib_more():
    core = Yamux(False)
    (event,) = core.receive(opened(), 0.0)
    core.reset(event.stream)
    stray = data(1, bytes(64 * KIB))
    for _ in range((INITIAL_WINDOW + 4 * MIB) // (64 * KIB)):
        assert core.receive(stray, 0.0) == []
    with pytest.raises(YamuxError, match="bytes for closed streams beyond their credit"):
        core.receive(stray, 3600.0)


def test_honest_peers_whose_streams_are_reset_all_the_time_send_no_byte_too_many():
    pair = Pair()
    for _ in range(100):
        pair.now += 1.0
        ours, theirs = pair.open()
        send_all(pair.client, ours, bytes(INITIAL_WINDOW))
        pair.server.reset(theirs)
        pair.deliver()
        assert ours.is_reset


EMPTY_FRAMES = {
    "credit of nothing": frame(WINDOW_UPDATE, 0, 1, 0),
    "credit": frame(WINDOW_UPDATE, 0, 1, 1),
    "credit of a closed stream": frame(WINDOW_UPDATE, 0, 3, 1),
    "a pong that nobody asked for": frame(PING, ACK, 0, 7),
    "no data": frame(DATA, 0, 1, 0),
    "no data, to a closed stream": frame(DATA, FIN, 3, 0),
    "a reset of a closed stream": frame(WINDOW_UPDATE, RST, 3, 0),
    "going away": frame(GO_AWAY, 0, 0, 0),
}


@pytest.mark.parametrize("what", EMPTY_FRAMES)
def test_frames_without_data_are_limited_to_a_thousand_a_second(what):
    core = Yamux(False)
    core.receive(opened() + opened(3) + frame(DATA, RST, 3, 0), 0.0)
    burst = core._limits.control_frames_burst
    core.receive(EMPTY_FRAMES[what] * (burst - 1), 0.0)
    for second in range(1, 4):
        core.receive(EMPTY_FRAMES[what] * 1000, float(second))
    with pytest.raises(YamuxError, match="more than 1000 frames a second without data"):
        core.receive(EMPTY_FRAMES[what] * 1001, 4.0)


def test_pings_are_limited_as_other_frames_without_data_also_where_their_answers_are_taken():
    core = Yamux(False)
    for _ in range(core._limits.control_frames_burst):
        core.receive(frame(PING, SYN, 0, 1), 0.0)
        core.data_to_send()
    with pytest.raises(YamuxError, match="frames a second without data"):
        core.receive(frame(PING, SYN, 0, 1), 0.0)


def test_a_peer_that_returns_credit_in_small_pieces_for_what_we_sent_meets_no_limit():
    pair = Pair()
    ours, theirs = pair.open()
    for _ in range(200):
        send_all(pair.server, theirs, bytes(100_000))
        pair.deliver()
        while taken := len(pair.client.take(ours, 256)):
            pair.client._queue(WINDOW_UPDATE, 0, ours.id, 0)  # as often as py-libp2p would
            assert taken
        pair.deliver()


def test_one_read_full_of_frames_is_handled_in_parts():
    core, wire = Yamux(False), opened() + frame(WINDOW_UPDATE, 0, 1, 1) * 999
    sizes = []
    while wire:
        _, used = core.receive_some(memoryview(wire), 0.0)
        sizes.append(used // HEADER.size)
        wire = wire[used:]
    assert sizes == [256, 256, 256, 232]


def test_bytes_that_a_reader_holds_count_as_unread_and_their_credit_stays_here():
    core = Yamux(False)
    (event,) = core.receive(opened(), 0.0)
    stream = event.stream
    core.receive(data(1, bytes(INITIAL_WINDOW)), 0.0)
    core.data_to_send()
    assert len(core.take_held(stream, 100_000)) == 100_000
    assert len(core.take_held(stream, MIB)) == INITIAL_WINDOW - 100_000
    assert core.unread_bytes == stream.held == INITIAL_WINDOW
    assert not core.has_data_to_send
    core.hold(stream, 100_000)
    assert core.unread_bytes == stream.held == 100_000
    assert frames(core.data_to_send()) == [(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW - 100_000)]
    core.receive(frame(DATA, RST, 1, 0), 0.0)
    assert core.unread_bytes == 100_000  # the reader still has them
    core.reset(stream)
    assert core.unread_bytes == 0


def test_bytes_that_were_used_where_they_lay_count_no_more():
    core = Yamux(False)
    (event,) = core.receive(opened(), 0.0)
    stream = event.stream
    core.receive(data(1, b"x" * 100_000) + data(1, b"y" * 100_000), 0.0)
    core.used(stream, 150_000)
    assert core.unread_bytes == len(stream.unread) == 50_000
    assert stream.credit == INITIAL_WINDOW - 50_000
    core.reset(stream)
    core.used(stream, 50_000)
    assert core.unread_bytes == 0


def test_a_stream_that_we_abandon_and_the_peer_does_not_end_is_reset_after_a_while():
    pair = Pair(linger_seconds=10.0)
    ours, theirs = pair.open()
    pair.server.abandon(theirs)
    pair.deliver()
    send_all(pair.client, ours, b"nobody wants this")
    pair.now = 9.0
    pair.deliver()
    assert pair.server.unread_bytes == 0
    assert pair.server.streams == 1
    pair.now = 10.0
    pair.client.ping()
    pair.deliver()
    assert ours.is_reset
    assert pair.server.streams == 0


def test_after_its_end_nothing_is_sent_on_a_stream():
    pair = Pair()
    ours, _ = pair.open()
    pair.client.end(ours)
    pair.client.end(ours)
    with pytest.raises(LocalProtocolError):
        pair.client.send(ours, memoryview(b"x"))


def test_a_long_message_goes_in_pieces_that_fill_one_noise_message_each():
    pair = Pair()
    ours, _ = pair.open()
    assert pair.client.send(ours, memoryview(bytes(200_000))) == CHUNK
    assert len(pair.client.data_to_send()) == 65_535 - 16


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (HEADER.pack(1, DATA, 0, 1, 0), "yamux version 1, expected 0"),
        (frame(4, 0, 0, 0), "a frame of type 4, known are 0 to 3"),
        (frame(DATA, 0, 1, 0), "stream 1, which was never opened"),
        (frame(DATA, 0, 2, 0), "stream 2, which was never opened"),
        (frame(WINDOW_UPDATE, 0, 0, 9), "stream 0, which was never opened"),
        (opened(2), "stream 2, an id that is not its own"),
        (opened(0), "stream 0, an id that is not its own"),
        (opened() + opened(), "stream 1 was opened twice"),
        (opened() + frame(DATA, FIN, 1, 0) + data(1, b"x"), "bytes on stream 1 after its end"),
        (opened() + frame(WINDOW_UPDATE, 0, 1, 2**32 - 1), "bytes of credit on stream 1, allowed are"),
        (opened() + frame(DATA, 0, 1, 2**32 - 1), "a frame of 4294967295 bytes on stream 1"),
        (
            opened() + frame(DATA, RST, 1, 0) + frame(DATA, 0, 1, 2**32 - 1),
            "4294967295 bytes for closed streams beyond their credit, allowed are 4194304",
        ),
    ],
)
def test_a_broken_rule_ends_the_connection_and_names_the_rule(wire, message):
    core = Yamux(False)
    with pytest.raises(YamuxError, match=message):
        core.receive(wire, 0.0)
    with pytest.raises(YamuxError, match=message):
        core.receive(frame(PING, SYN, 0, 1), 0.0)
    with pytest.raises(YamuxError):
        core.open()


def test_the_peer_says_that_it_goes_away():
    core = Yamux(False)
    assert [event.what for event in core.receive(frame(GO_AWAY, 0, 0, 0), 0.0)] == [Happening.GONE_AWAY]
    core.go_away()
    assert frames(core.data_to_send()) == [(GO_AWAY, 0, 0, 0)]


class TwoEnds(RuleBasedStateMachine):
    """Bytes sent = bytes received, in order, on every stream; no window and no credit is exceeded."""

    streams = Bundle("streams")

    def __init__(self):
        super().__init__()
        limits = YamuxLimits(
            max_unread_bytes=16 * MIB, opens_per_second=1000, open_burst=1000, reset_floor=1000
        )
        self.cores = (Yamux(True, limits), Yamux(False, limits))
        self.wires = (bytearray(), bytearray())  # to the client, to the server
        self.accepted = {}
        self.sent, self.got = {}, {}
        self.now = 0.0

    @rule(target=streams, who=st.integers(0, 1))
    def open(self, who):
        stream = self.cores[who].open()
        self.sent[stream.id, who] = self.sent[stream.id, 1 - who] = 0
        self.got[stream.id, who] = self.got[stream.id, 1 - who] = 0
        self.accepted[stream.id, who] = stream
        return stream.id

    @rule(stream=streams, who=st.integers(0, 1), size=st.integers(0, 400 * KIB))
    def send(self, stream, who, size):
        state = self.accepted.get((stream, who))
        if state is None or state.send_ended:
            return
        begin = self.sent[stream, who]
        view = memoryview(bytes((begin + i) % 251 for i in range(min(size, state.send_credit))))
        while view and (count := self.cores[who].send(state, view)):
            view = view[count:]
            self.sent[stream, who] += count

    @rule(stream=streams, who=st.integers(0, 1), size=st.integers(1, 300 * KIB))
    def take(self, stream, who, size):
        state = self.accepted.get((stream, who))
        if state is None:
            return
        taken = self.cores[who].take(state, size)
        begin = self.got[stream, who]
        assert taken == bytes((begin + i) % 251 for i in range(len(taken)))
        self.got[stream, who] += len(taken)

    @rule(stream=streams, who=st.integers(0, 1))
    def end(self, stream, who):
        if (state := self.accepted.get((stream, who))) is not None:
            self.cores[who].end(state)

    @rule(who=st.integers(0, 1), share=st.floats(0.1, 1.0), seconds=st.floats(0.0, 0.1))
    def deliver(self, who, share, seconds):
        self.now += seconds
        self.wires[who].extend(self.cores[1 - who].data_to_send())
        size = int(len(self.wires[who]) * share)
        for event in self.cores[who].receive(bytes(self.wires[who][:size]), self.now):
            if event.what is Happening.OPENED:
                self.accepted[event.stream.id, who] = event.stream
        del self.wires[who][:size]

    @rule(who=st.integers(0, 1))
    def ping(self, who):
        self.cores[who].ping()

    @invariant()
    def nothing_is_exceeded(self):
        for core in self.cores:
            assert core.unread_bytes <= 16 * MIB
            assert core._windows.granted <= 16 * MIB
        for (stream, who), state in self.accepted.items():
            assert state.credit >= 0
            assert state.send_credit >= 0
            assert len(state.unread) + state.credit <= state.window
            assert self.got[stream, who] <= self.sent[stream, 1 - who]


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
