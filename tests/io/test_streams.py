from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from node.network.budgets.large_frames import SMALL_FRAME, LargeFrames
from node.network.streams import FramedStream, Traffic
from node.network.transport.yamux_limits import INITIAL_WINDOW, YamuxError, YamuxLimits
from tensor_codec.errors import FrameError, LocalProtocolError, MessageError, PeerGone, Refused, SlowPeer
from tensor_codec.frame import encode_frame
from tensor_codec.limits import KIB, MIB, Limits
from tests.fakes import ALICE, BOB, connection_pair, memory_framed_pair

SMALL = Limits(max_frame_bytes=1000)
MANY = YamuxLimits(max_inbound_streams=80)


def framed(stream, limits=None, traffic=None):
    return FramedStream(stream, ALICE.peer_id, "/raceme/test/1", limits, traffic)


async def drip(stream, data, seconds):
    """A byte every so many seconds."""
    for byte in data:
        await stream.send_all(bytes([byte]))
        await trio.sleep(seconds)


async def test_frames_arrive_whole_and_in_order():
    ours, theirs = memory_framed_pair()
    await ours.send(b"one")
    await ours.send([b"t", bytearray(b"w"), memoryview(b"o")])
    await ours.send(b"")
    await ours.aclose()
    assert [await theirs.receive(1.0) for _ in range(4)] == [b"one", b"two", b"", None]
    assert await theirs.receive() is None
    assert theirs.peer == ALICE.peer_id
    assert ours.peer == BOB.peer_id


async def test_payload_is_counted_on_both_sides():
    first, second = trio.testing.memory_stream_pair()
    sent, received = Traffic(), Traffic()
    ours, theirs = framed(first, traffic=sent), framed(second, traffic=received)
    await ours.send(b"x" * 10)
    await ours.send(b"y" * 5)
    await theirs.receive(1.0)
    assert (sent.sent, received.received) == (15, 10)  # what was not taken was not received yet
    await theirs.receive(1.0)
    assert (sent.received, received.received) == (0, 15)


async def test_dripping_bytes_does_not_hold_a_stream(autojump_clock):
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip, theirs, encode_frame(b"x" * 1000), 1.0)
        started = trio.current_time()
        with pytest.raises(SlowPeer, match="within 5 s"):
            await framed(ours).receive(5.0)
        assert trio.current_time() - started == pytest.approx(5.0)
        nursery.cancel_scope.cancel()


async def test_without_a_deadline_the_first_byte_may_take_for_ever_but_not_the_rest(autojump_clock):
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        started = trio.current_time()

        async def late():
            await trio.sleep(10_000)
            await drip(theirs, encode_frame(b"x" * 1000), 0.5)

        nursery.start_soon(late)
        with pytest.raises(SlowPeer, match="had begun and was not whole"):
            await framed(ours).receive()
        assert trio.current_time() - started == pytest.approx(10_005.0, abs=0.1)
        nursery.cancel_scope.cancel()


async def test_a_long_frame_has_the_time_that_its_size_takes_at_the_slowest_rate_allowed(autojump_clock):
    limits = Limits(frame_start_seconds=5.0, frame_floor_bytes_per_second=1000)
    for rate, arrives in ((1500, True), (500, False)):
        ours, theirs = trio.testing.memory_stream_pair()
        wire = encode_frame(bytes(20_000))  # 25 s at the floor, 13 s and 40 s at these rates

        async def send(theirs=theirs, rate=rate, wire=wire):
            for begin in range(0, len(wire), rate):
                await theirs.send_all(wire[begin : begin + rate])
                await trio.sleep(1.0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            if arrives:
                assert await framed(ours, limits).receive() == bytes(20_000)
            else:
                started = trio.current_time()
                with pytest.raises(SlowPeer):
                    await framed(ours, limits).receive()
                assert trio.current_time() - started == pytest.approx(25.0, abs=1.0)
            nursery.cancel_scope.cancel()


async def test_a_reader_that_never_reads_is_given_up_after_ten_seconds(autojump_clock):
    ours, _ = memory_framed_pair(lockstep=True)
    started = trio.current_time()
    with pytest.raises(SlowPeer, match="did not take 7 bytes within 10 s"):
        await ours.send(b"abc")
    assert trio.current_time() - started == pytest.approx(10.0, abs=0.01)
    with pytest.raises(PeerGone):  # the frame was cut, and the stream with it
        await ours.send(b"d")


async def test_the_other_end_of_a_stream_that_was_cut_sees_a_reset_and_no_clean_end(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours = framed(alice.open())
        with trio.move_on_after(1.0):
            await ours.send(bytes(1_000_000))  # of which a window goes through
        theirs = framed(await bob.accept())
        with pytest.raises(PeerGone, match="reset"):
            await theirs.receive(1.0)


async def test_a_frame_that_a_cancellation_cuts_takes_the_stream_with_it(autojump_clock):
    ours, _ = memory_framed_pair(lockstep=True)
    with trio.move_on_after(1.0):
        await ours.send(b"x" * 1000)
    with pytest.raises(PeerGone):
        await ours.send(b"y")


async def test_cancelling_a_receive_loses_nothing(autojump_clock):
    ours, theirs = trio.testing.memory_stream_pair()
    receiver = framed(ours)
    wire = encode_frame(b"whole")
    await theirs.send_all(wire[:6])
    with trio.move_on_after(1.0):
        await receiver.receive()
    await theirs.send_all(wire[6:])
    assert await receiver.receive(1.0) == b"whole"


async def test_many_senders_do_not_mix_their_frames(autojump_clock):
    ours, theirs = memory_framed_pair(lockstep=True)
    async with trio.open_nursery() as nursery:
        for byte in b"abcdefgh":
            nursery.start_soon(ours.send, bytes([byte]) * 1000)
        got = [bytes(await theirs.receive(5.0)) for _ in range(8)]
    assert sorted(got) == [bytes([byte]) * 1000 for byte in b"abcdefgh"]


async def test_only_one_task_receives():
    ours, _ = memory_framed_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await ours.receive()
        nursery.cancel_scope.cancel()


async def test_a_hostile_length_is_refused_at_once():
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b"\xff\xff\xff\xff")
    with pytest.raises(FrameError, match="4294967295 bytes was announced, 1000 are allowed"):
        await framed(ours, SMALL).receive()


async def test_a_frame_of_ours_above_the_limit_is_our_own_bug():
    ours, _ = memory_framed_pair(SMALL)
    with pytest.raises(LocalProtocolError):
        await ours.send(bytes(1001))


async def test_an_end_inside_a_frame_is_an_error_and_not_an_end():
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b"\x00\x00\x00\x09half")
    await theirs.aclose()
    with pytest.raises(FrameError, match="ended inside a frame"):
        await framed(ours).receive(1.0)


async def test_a_stream_closed_on_our_side_is_gone_for_us_too():
    ours, _ = memory_framed_pair()
    await ours.reset()
    with pytest.raises(PeerGone):
        await ours.receive(1.0)
    with pytest.raises(PeerGone):
        await ours.send(b"x")
    await ours.aclose()


async def test_what_waits_unread_is_bounded_and_stops_the_sender(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours = framed(alice.open())

        async def send_too_much():
            for _ in range(100):
                await ours.send(bytes(16_000))

        with pytest.raises(SlowPeer):
            await send_too_much()
        assert 200_000 < bob.core.unread_bytes <= 256 * 1024


async def test_the_end_of_a_muxed_stream_is_clean(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours = framed(alice.open())
        await ours.send(b"question")
        theirs = framed(await bob.accept())
        assert await theirs.receive() == b"question"
        await ours.send_eof()
        assert await theirs.receive() is None
        await theirs.send(b"answer")
        await theirs.aclose()
        assert await ours.receive() == b"answer"
        assert await ours.receive() is None
        await trio.testing.wait_all_tasks_blocked()
        assert alice.core.streams == bob.core.streams == 0


# --- bounds ---


async def test_the_limit_may_change_and_holds_for_frames_that_were_not_taken_yet():
    ours, theirs = trio.testing.memory_stream_pair()
    receiver = framed(ours)
    receiver.limit = 10
    await theirs.send_all(b"".join(encode_frame(bytes(size)) for size in (10, 50, 51)))
    assert len(await receiver.receive(1.0)) == 10
    receiver.limit = 50
    assert len(await receiver.receive(1.0)) == 50
    with pytest.raises(FrameError, match="51 bytes was announced, 50 are allowed"):
        await receiver.receive(1.0)


async def count_turns(turns):
    while True:
        turns.append(1)
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("muxed", [False, True])
async def test_a_reader_of_many_small_frames_lets_others_run(muxed, autojump_clock):
    wire = encode_frame(b"x") * 1000
    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        if muxed:
            stream = alice.open()
            await stream.send_all(wire)
            receiver = framed(await bob.accept())
        else:
            ours, theirs = trio.testing.memory_stream_pair()
            receiver = framed(ours)
            await theirs.send_all(wire)
        await receiver.receive(1.0)
        turns = []
        nursery.start_soon(count_turns, turns)
        for _ in range(999):
            await receiver.receive()
        assert len(turns) >= 50
        nursery.cancel_scope.cancel()


async def test_many_streams_of_one_connection_have_one_turn_together(autojump_clock):
    handed_out, rounds = [], []

    async def read(stream):
        while True:
            await stream.receive()
            handed_out.append(stream)

    async def look():
        while len(handed_out) < 2000:
            before = len(handed_out)
            await trio.lowlevel.checkpoint()
            rounds.append(len(handed_out) - before)

    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        readers = []
        for _ in range(20):
            stream = alice.open()
            await stream.send_all(encode_frame(b"x") * 100)
            readers.append(framed(await bob.accept()))
        await trio.testing.wait_all_tasks_blocked()
        for reader in readers:
            nursery.start_soon(read, reader)
        await look()
        assert max(rounds) <= 2 * 16
        nursery.cancel_scope.cancel()


class Tasker:
    """A taker of the frames that begin with "t"; `found` has what it took, and what the reader got."""

    def __init__(self, stream: FramedStream) -> None:
        self.stream = stream
        self.found: list[tuple[str, bytes]] = []

    def take(self, frame) -> bool:
        if bytes(frame) == b"fault":
            raise MessageError("of no use")
        if not bytes(frame).startswith(b"t"):
            return False
        self.found.append(("taker", bytes(frame)))
        return True

    async def read(self) -> None:
        while (frame := await self.stream.receive(taker=self.take)) is not None:
            self.found.append(("reader", bytes(frame)))


@asynccontextmanager
async def taking(limits: Limits | None = None):
    """A stream of Alice's, and Bob's taker of its frames."""
    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        stream = alice.open()
        await stream.send_all(encode_frame(b"first"))
        tasker = Tasker(framed(await bob.accept(), limits))
        nursery.start_soon(tasker.read)
        await trio.testing.wait_all_tasks_blocked()
        yield stream, tasker
        nursery.cancel_scope.cancel()


async def sent_one_by_one(stream, *pieces: bytes) -> None:
    for piece in pieces:
        await stream.send_all(piece)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_taker_gets_whole_small_frames_and_the_reader_those_that_it_leaves(autojump_clock):
    async with taking() as (stream, tasker):
        wire = [encode_frame(each) for each in (b"t1", b"fault", b"t2", b"other", b"", b"t3")]
        await sent_one_by_one(stream, *wire)
        taken = [("taker", b"t1"), ("reader", b"fault"), ("taker", b"t2"), ("reader", b"other")]
        assert tasker.found[1:] == [*taken, ("reader", b""), ("taker", b"t3")]
        assert tasker.stream._traffic.received == sum(len(frame) for _, frame in tasker.found)


async def test_a_taker_gets_no_frame_in_pieces_none_of_several_and_none_that_is_large(autojump_clock):
    async with taking() as (stream, tasker):
        whole, large = encode_frame(b"t" * 10), encode_frame(b"t" * SMALL_FRAME)
        await sent_one_by_one(stream, whole[:7], whole[7:], 2 * whole, large, whole)
        assert [who for who, _ in tasker.found[1:]] == ["reader"] * 4 + ["taker"]


async def test_a_frame_above_the_limit_ends_the_stream_whatever_a_taker_says(autojump_clock):
    async with connection_pair() as (alice, bob):
        stream = alice.open()
        await stream.send_all(encode_frame(b"first"))
        tasker = Tasker(framed(await bob.accept(), SMALL))
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(FrameError, match="1001 bytes"):
                    await tasker.read()

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(encode_frame(b"t" * 1001))
        assert tasker.found == [("reader", b"first")]


async def test_bytes_that_a_taker_used_are_held_no_more_and_their_credit_goes_back(autojump_clock):
    async with taking() as (stream, tasker):
        size = 60 * KIB  # in one message of Noise
        for _ in range(30):
            await sent_one_by_one(stream, encode_frame(b"t" * size))
        assert tasker.found[1:] == [("taker", b"t" * size)] * 30
        assert stream.state.send_credit >= INITIAL_WINDOW / 2
        assert tasker.stream._stream.connection.core.unread_bytes == 0


async def test_no_taker_is_asked_while_nobody_receives(autojump_clock):
    async with connection_pair() as (alice, bob):
        stream = alice.open()
        await stream.send_all(encode_frame(b"t1"))
        tasker = Tasker(framed(await bob.accept()))
        await trio.testing.wait_all_tasks_blocked()
        assert await tasker.stream.receive(taker=tasker.take) == b"t1"
        await sent_one_by_one(stream, encode_frame(b"t2"))
        assert tasker.found == []


def held_bytes(connection, readers):
    """Bytes that are kept for a peer: in the muxer, and in frames that are not whole."""
    return connection.core.unread_bytes + sum(reader._decoder.held for reader in readers if reader._has_place)


@asynccontextmanager
async def flooded(streams, frame_bytes, sent_bytes, large_frames=None, on_fault=None):
    """Bob reads frames from streams on which Alice sends as much of one as she may."""
    async with (
        connection_pair(limits=MANY, large_frames=large_frames, on_fault=on_fault) as (alice, bob),
        trio.open_nursery() as nursery,
    ):
        readers, whole = [], []

        async def send(stream):
            wire = memoryview(encode_frame(bytes(frame_bytes)))[:sent_bytes]
            with suppress(PeerGone):
                await stream.send_all(wire)

        async def read(reader):
            with suppress(PeerGone):
                whole.append(len(await reader.receive()))
                await reader.receive()

        opened = [alice.open() for _ in range(streams)]
        alice.flush_now()
        readers += [framed(await bob.accept()) for _ in opened]
        for stream, reader in zip(opened, readers, strict=True):
            nursery.start_soon(send, stream)
            nursery.start_soon(read, reader)
        with trio.move_on_after(1.0):  # the frames have longer
            await trio.testing.wait_all_tasks_blocked()
            yield bob, readers, whole
        nursery.cancel_scope.cancel()


async def test_what_a_connection_holds_is_bounded_whatever_frames_its_streams_begin(autojump_clock):
    for streams, size in ((25, 16 * MIB), (25, MIB), (25, SMALL_FRAME - 4)):
        async with flooded(streams, size, size) as (bob, readers, whole):
            assert not whole
            held = held_bytes(bob, readers)
            assert 2 * MIB < held <= 8 * MIB + 4 * MIB + 16 * MIB
            assert held == sum(len(reader._stream.state.unread) for reader in readers) + sum(
                reader._decoder.held for reader in readers
            )
            assert all(
                len(reader._stream.state.unread) + reader._stream.state.held <= INITIAL_WINDOW
                for reader in readers
                if not reader._has_place
            )


async def test_a_peer_that_fills_the_windows_of_all_its_streams_loses_the_connection(autojump_clock):
    faults = []
    async with flooded(60, 16 * MIB, 16 * MIB, on_fault=faults.append) as (bob, _, _):
        assert bob.closed.is_set()
        assert [type(fault) for fault in faults] == [YamuxError]
        assert bob.large_frames.bytes == 0


@pytest.mark.parametrize("size", [100 * KIB, 300 * KIB, 3 * MIB])
async def test_whole_frames_of_all_streams_get_through_however_many_begin_at_once(size, autojump_clock):
    async with flooded(20, size, size + 4) as (bob, _, whole):
        while len(whole) < 20:  # noqa: ASYNC110  # the readers are tasks of their own
            await trio.sleep(0.01)
        assert whole == [size] * 20
        assert bob.core.unread_bytes == bob.large_frames.bytes == 0


async def test_a_large_frame_waits_for_its_place_and_nobody_is_blamed_for_the_wait(autojump_clock):
    frames = LargeFrames(4 * MIB, 4 * MIB)
    async with (
        flooded(1, 3 * MIB, 2 * MIB, frames) as (_, (holder,), _),
        flooded(1, 2 * MIB, 2 * MIB + 4, frames) as (bob, (waiting,), whole),
    ):
        assert not waiting._has_place
        assert bob.core.unread_bytes <= INITIAL_WINDOW
        await holder.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert whole == [2 * MIB]
        assert frames.bytes == 0


async def test_a_large_frame_that_finds_no_place_in_its_time_ends_its_stream_without_blame(autojump_clock):
    frames = LargeFrames(MIB // 2, MIB)
    async with connection_pair(large_frames=frames) as (alice, bob), trio.open_nursery() as nursery:
        nursery.start_soon(framed(alice.open()).send, bytes(MIB))
        receiver = framed(await bob.accept())
        started = trio.current_time()
        with pytest.raises(PeerGone, match="no room for a frame of 1048576 bytes within 9 s"):
            await receiver.receive()
        assert trio.current_time() - started == pytest.approx(9.0, abs=0.1)
        nursery.cancel_scope.cancel()


async def test_a_frame_that_waits_for_a_place_ends_at_once_with_its_connection(autojump_clock):
    frames = LargeFrames(MIB // 2, MIB)
    async with connection_pair(large_frames=frames) as (alice, bob), trio.open_nursery() as nursery:
        nursery.start_soon(framed(alice.open()).send, bytes(MIB))
        receiver = framed(await bob.accept())
        started = trio.current_time()

        async def leave():
            await trio.sleep(0.5)  # the frame waits by then
            bob.close_now("it was banned")
            nursery.cancel_scope.cancel()

        nursery.start_soon(leave)
        with trio.CancelScope(shield=True), pytest.raises(PeerGone, match="it was banned"):
            await receiver.receive()
        assert trio.current_time() - started == pytest.approx(0.5, abs=0.1)


async def test_a_frame_that_is_refused_passes_by_and_the_next_one_is_read(autojump_clock):
    judged = []

    def judge(beginning, size):
        judged.append((beginning[:6], len(beginning), size))
        return Refused("no room") if size > MIB else None

    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        ours = framed(alice.open())
        sizes = (2 * MIB, 200 * KIB, 3 * MIB, 10)

        async def send():
            for size in sizes:
                await ours.send(b"header" + bytes(size - 6))

        nursery.start_soon(send)
        receiver = framed(await bob.accept())
        receiver.judge = judge
        for size in sizes:
            if size > MIB:
                with pytest.raises(Refused):
                    await receiver.receive()
                assert bob.core.unread_bytes <= INITIAL_WINDOW
                assert bob.large_frames.bytes == 0
            else:
                assert len(await receiver.receive()) == size
        assert judged[0] == (b"header", 4 * KIB + 2, 2 * MIB)


async def test_a_frame_that_its_judge_finds_faulty_ends_at_its_header(autojump_clock):
    def judge(beginning, size):
        raise MessageError("not this one")

    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        nursery.start_soon(framed(alice.open()).send, bytes(MIB))
        receiver = framed(await bob.accept())
        receiver.judge = judge
        with pytest.raises(MessageError):
            await receiver.receive()
        assert bob.core.unread_bytes <= INITIAL_WINDOW
        nursery.cancel_scope.cancel()


async def test_a_large_frame_keeps_its_place_while_it_is_in_hand(autojump_clock):
    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        ours = framed(alice.open())

        async def send():
            for _ in range(2):
                await ours.send(bytes(2 * MIB))

        nursery.start_soon(send)
        receiver = framed(await bob.accept())
        await receiver.receive()
        assert bob.large_frames.bytes == 2 * MIB
        await receiver.receive()
        assert bob.large_frames.bytes == 2 * MIB
        await receiver.aclose()
        assert bob.large_frames.bytes == 0


async def test_what_all_connections_hold_is_bounded_and_each_has_its_share(autojump_clock):
    frames = LargeFrames(32 * MIB, 4 * MIB)
    async with AsyncExitStack() as stack:
        worlds = [await stack.enter_async_context(flooded(20, 15 * MIB, 15 * MIB, frames)) for _ in range(4)]
        held = [held_bytes(bob, readers) for bob, readers, _ in worlds]
        assert frames.bytes == 30 * MIB
        assert 30 * MIB < sum(held) <= 32 * MIB + 4 * 8 * MIB
        assert max(held) <= 8 * MIB + 16 * MIB
