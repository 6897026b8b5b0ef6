import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset

from node.network.libp2p_adapter import Libp2pConnection
from node.network.streams import FramedStream
from node.network.transport.multistream import HEADER, encode_lines, proposal
from node.network.transport.yamux import HEADER as YAMUX_HEADER
from node.network.transport.yamux_limits import INITIAL_WINDOW, YamuxError
from tensor_codec.errors import PeerGone, RemoteProtocolError
from tensor_codec.limits import KIB
from tests.fakes import MemoryLink, connection_pair, memory_link_pair


async def opened(alice, bob):
    """A stream as Alice and as Bob have it; b"." was sent."""
    ours = alice.open()
    await ours.send_all(b".")
    return ours, await bob.accept()


async def receive_exactly(stream, size):
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more
        data += more
    return data


async def test_bytes_go_both_ways_at_once_whatever_their_number(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours, theirs = await opened(alice, bob)
        payload = bytes(range(256)) * 8000  # eight windows

        async def send(stream):
            await stream.send_all(payload)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, ours)
            nursery.start_soon(send, theirs)
            assert await receive_exactly(theirs, 1 + len(payload)) == b"." + payload
            assert await receive_exactly(ours, len(payload)) == payload
        assert await ours.receive_some(1) == b""
        assert await theirs.receive_some(1) == b""


async def test_many_streams_share_a_connection_without_mixing(autojump_clock):
    async with connection_pair() as (alice, bob):

        async def echo(stream):
            while data := await stream.receive_some(1000):
                await stream.send_all(data)
            await stream.send_eof()

        async def ask(number):
            stream = alice.open()
            payload = bytes([number]) * 100_000

            async with trio.open_nursery() as sending:
                sending.start_soon(stream.send_all, payload)
                assert await receive_exactly(stream, len(payload)) == payload
            await stream.aclose()

        async with trio.open_nursery() as nursery, trio.open_nursery() as asking:
            for number in range(20):
                asking.start_soon(ask, number)
            for _ in range(20):
                nursery.start_soon(echo, await bob.accept())


async def test_a_small_message_overtakes_a_long_one_of_another_stream(autojump_clock):
    links = memory_link_pair(lockstep=True)
    async with connection_pair(links=links) as (alice, bob):
        bulk, bulk_there = await opened(alice, bob)
        small, small_there = await opened(alice, bob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bulk.send_all, bytes(20 * INITIAL_WINDOW))
            await receive_exactly(bulk_there, 2 * INITIAL_WINDOW)
            await small.send_all(b"quick")
            assert await receive_exactly(small_there, 6) == b".quick"
            assert bob.core.unread_bytes <= INITIAL_WINDOW
            nursery.cancel_scope.cancel()


async def test_a_sender_whose_wait_is_cancelled_leaves_the_connection_whole(autojump_clock):
    links = memory_link_pair(lockstep=True)
    async with connection_pair(links=links) as (alice, bob):
        first, first_there = await opened(alice, bob)
        second, second_there = await opened(alice, bob)
        with trio.move_on_after(1.0):
            await first.send_all(bytes(10 * INITIAL_WINDOW))
        first.reset_now()
        await second.send_all(b"still here")
        assert await receive_exactly(second_there, 11) == b".still here"
        with pytest.raises(PeerGone):
            await receive_exactly(first_there, 10 * INITIAL_WINDOW)


async def test_when_the_link_breaks_every_waiter_is_told_and_nothing_stays(autojump_clock):
    links = memory_link_pair()
    async with connection_pair(links=links) as (alice, bob):
        ours, theirs = await opened(alice, bob)
        idle, idle_there = await opened(alice, bob)
        await receive_exactly(idle_there, 1)

        async def waits_to_read(stream):
            with pytest.raises(PeerGone):
                await stream.receive_some(1)

        async def waits_to_write(stream):
            with pytest.raises(PeerGone):
                await stream.send_all(bytes(10 * INITIAL_WINDOW))

        async with trio.open_nursery() as nursery:
            for stream in (idle, idle_there):
                nursery.start_soon(waits_to_read, stream)
            for stream in (ours, theirs):
                nursery.start_soon(waits_to_write, stream)
            await trio.testing.wait_all_tasks_blocked()
            links[0].close()
        await alice.closed.wait()
        await bob.closed.wait()
        with pytest.raises(PeerGone):
            alice.open()
        with pytest.raises(PeerGone):
            await bob.accept()


async def test_bytes_that_came_before_the_connection_ended_can_still_be_read(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours, theirs = await opened(alice, bob)
        await ours.send_all(b"last words")
        await trio.testing.wait_all_tasks_blocked()
        await alice.close()
        await bob.closed.wait()
        assert await receive_exactly(theirs, 11) == b".last words"
        with pytest.raises(PeerGone):
            await theirs.receive_some(1)


async def test_a_peer_that_ignores_its_window_loses_the_connection_and_is_named(autojump_clock):
    faults = []
    async with connection_pair(on_fault=faults.append) as (alice, bob):
        ours, _ = await opened(alice, bob)
        ours.state.send_credit = 100 * INITIAL_WINDOW  # Alice lies to herself
        with pytest.raises(PeerGone):
            await ours.send_all(bytes(50 * INITIAL_WINDOW))
        await bob.closed.wait()
        assert bob.core.unread_bytes <= INITIAL_WINDOW
    assert [type(fault) for fault in faults] == [YamuxError]


async def test_random_bytes_inside_the_channel_cost_the_connection_and_nothing_else(autojump_clock):
    faults = []
    async with connection_pair(on_fault=faults.append) as (alice, bob):
        await trio.testing.wait_all_tasks_blocked()
        await alice.channel.send(YAMUX_HEADER.pack(9, 9, 9, 9, 9))
        await bob.closed.wait()
        assert isinstance(faults[0], YamuxError)


async def test_a_changed_byte_on_the_wire_costs_the_connection(autojump_clock):
    faults = []
    links = memory_link_pair()
    async with connection_pair(links=links, on_fault=faults.append) as (alice, bob):
        await trio.testing.wait_all_tasks_blocked()
        sealed = bytearray(alice.channel.seal(b"x" * 100))
        sealed[50] ^= 1
        await links[0].send(memoryview(bytes(sealed)))
        await bob.closed.wait()
    assert isinstance(faults[0], RemoteProtocolError)
    assert "not sealed" in str(faults[0])


async def test_a_proposed_protocol_costs_no_round_trip_and_its_answer_is_not_taken_for_data(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours = alice.open()
        ours.propose("/test/1")
        await ours.send_all(b"question")
        theirs = await bob.accept()
        asked = proposal("/test/1")
        assert await receive_exactly(theirs, len(asked) + 8) == asked + b"question"
        for byte in asked:
            await theirs.send_all(bytes([byte]))
        await theirs.send_all(b"answer")
        assert await receive_exactly(ours, 6) == b"answer"


async def test_a_peer_that_does_not_speak_the_protocol_is_found_out_by_the_first_read(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours = alice.open()
        ours.propose("/test/1")
        await ours.send_all(b"question")
        theirs = await bob.accept()
        await theirs.send_all(encode_lines(HEADER, "na"))
        with pytest.raises(RemoteProtocolError, match="does not speak /test/1"):
            await receive_exactly(ours, 1)


async def test_a_protocol_is_proposed_even_where_the_peer_speaks_first(autojump_clock):
    async with connection_pair() as (alice, bob):
        ours = alice.open()
        ours.propose("/test/1")

        async def answer():
            theirs = await bob.accept()
            await receive_exactly(theirs, len(proposal("/test/1")))
            await theirs.send_all(proposal("/test/1") + b"hello")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.fail_after(5):
                assert await receive_exactly(ours, 5) == b"hello"


async def test_streams_look_to_libp2p_like_its_own(autojump_clock):
    async with connection_pair() as connections:
        alice, bob = (Libp2pConnection(each, 64 * KIB) for each in connections)
        ours = await alice.open_stream()
        await ours.write(b"hello")
        theirs = await bob.accept_stream()
        assert await theirs.read(2) == b"he"
        assert await theirs.read() == b"llo"
        await ours.close_write()
        with pytest.raises(MuxedStreamEOF):
            await theirs.read(1)
        await theirs.write(b"bye")
        assert await ours.read(100) == b"bye"
        await theirs.reset()
        with pytest.raises(MuxedStreamReset):
            await ours.read(1)
        with pytest.raises(MuxedStreamReset):
            await theirs.write(b"x")
        assert ours.is_closed()
        assert theirs.is_closed()
        async with await alice.open_stream() as stream:
            await stream.write(b"x")
        await alice.close()
        with pytest.raises(MuxedConnUnavailable):
            await alice.open_stream()


async def test_a_stream_of_libp2p_s_ends_when_the_peer_has_sent_more_than_it_may_carry(autojump_clock):
    async with connection_pair() as connections:
        alice, bob = (Libp2pConnection(each, 1000) for each in connections)
        ours = await alice.open_stream()
        await ours.write(bytes(1000))
        theirs = await bob.accept_stream()
        assert len(await theirs.read()) == 1000
        await ours.write(b"x")
        with pytest.raises(MuxedStreamReset, match="more than such a stream may carry"):
            await theirs.read(5)
        with pytest.raises(MuxedStreamReset):
            await ours.read(1)


async def test_a_read_full_of_frames_without_data_lets_others_run(autojump_clock):
    turns = []

    async def count_turns():
        while True:
            turns.append(1)
            await trio.lowlevel.checkpoint()

    async with connection_pair() as (alice, bob), trio.open_nursery() as nursery:
        ours, _ = await opened(alice, bob)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(count_turns)
        received = []
        receive_some = bob.core.receive_some

        def receive(data, now):
            received.append(len(turns))
            return receive_some(data, now)

        bob.core.receive_some = receive
        await alice.channel.send(YAMUX_HEADER.pack(0, 1, 0, ours.state.id, 1) * 3000)
        while len(received) < 3000 // 256:
            await trio.lowlevel.checkpoint()
        assert len(set(received)) > 4  # others ran between any two parts, in trio's random order
        assert not bob.closed.is_set()
        nursery.cancel_scope.cancel()


async def test_streams_that_ended_are_forgotten(autojump_clock):
    async with connection_pair() as (alice, bob):
        for _ in range(200):
            ours, theirs = await opened(alice, bob)
            await ours.aclose()
            await theirs.aclose()
            await trio.sleep(0.1)
        assert alice.core.streams == bob.core.streams == 0
        assert len(alice._streams) < 30
        assert len(bob._streams) < 30


class PacedLink(MemoryLink):
    """Reads at most 1 KiB, each after as many seconds as it takes at `pace` bytes per second."""

    pace = 100_000.0

    async def receive_into(self, buffer: memoryview) -> int:
        count = await super().receive_into(buffer[:1024])
        await trio.sleep(count / self.pace)
        return count


@pytest.mark.parametrize("pace", [1e5, 1e7])
async def test_a_long_message_tells_the_speed_of_its_way_and_short_ones_leave_it(pace, autojump_clock):
    first, second = trio.testing.memory_stream_pair()
    links = MemoryLink(first), PacedLink(second)
    async with connection_pair(links=links) as (alice, bob):
        links[1].pace = pace
        ours, theirs = await opened(alice, bob)
        for size, found in ((1, 0), (6 * 1024, 0), (40 * 1024, pytest.approx(pace, rel=0.05))):
            await ours.send_all(bytes(size))
            await receive_exactly(theirs, size)
            assert FramedStream(theirs, bob.peer, "test").speed == found
        await ours.send_all(bytes(100))
        await receive_exactly(theirs, 100)
        assert FramedStream(theirs, bob.peer, "test").speed == pytest.approx(pace, rel=0.05)
        assert FramedStream(first, bob.peer, "test").speed == 0
