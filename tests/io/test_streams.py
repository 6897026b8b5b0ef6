import pytest
import trio
import trio.testing

from node.network.streams import FramedStream, Traffic
from tensor_codec.errors import FrameError, LocalProtocolError, PeerGone, SlowPeer
from tensor_codec.frame import encode_frame
from tensor_codec.limits import Limits
from tests.fakes import ALICE, BOB, connection_pair, memory_framed_pair

SMALL = Limits(max_frame_bytes=1000)


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
