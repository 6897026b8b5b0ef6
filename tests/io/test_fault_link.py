"""The proxy that other tests break connections with, over real sockets of the loopback."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, closing

import pytest
import trio

from benchmarks.lib.processes import Worker
from tests.fault_link import MAX_BYTES, QUEUE_BYTES, RESET_ON_CLOSE, Wire, open_fault_link


async def echo(stream: trio.SocketStream) -> None:
    async with stream:
        try:
            async for data in stream:
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass


@asynccontextmanager
async def linked(handler=echo, **options):
    """A link to a server, and a way to connect through it."""
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(_serve, handler)
        port = listener.socket.getsockname()[1]
        async with open_fault_link(("127.0.0.1", port), **options) as link:
            with trio.fail_after(20):
                yield link
        nursery.cancel_scope.cancel()


async def _serve(handler, task_status):
    await trio.serve_tcp(handler, 0, host="127.0.0.1", task_status=task_status)


@asynccontextmanager
async def dial(port: int):
    """A connection; closed at the end, whatever became of it."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        yield stream
    finally:
        stream.socket.close()


async def until(condition) -> None:
    while not condition():  # noqa: ASYNC110  # sockets have no event for it
        await trio.sleep(0.01)


async def expect_reset(stream: trio.SocketStream) -> None:
    with pytest.raises(trio.BrokenResourceError) as raised:
        await stream.receive_some()
    assert type(raised.value.__cause__) is ConnectionResetError


async def exchange(stream: trio.SocketStream, data: bytes) -> bytes:
    """Send, and read as much back, while sending."""
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        while len(got) < len(data):
            part = await stream.receive_some()
            assert part
            got += part
    return bytes(got)


async def elapsed(stream: trio.SocketStream, data: bytes) -> float:
    began = time.perf_counter()
    assert await exchange(stream, data) == data
    return time.perf_counter() - began


# The wire alone, without sockets.


def test_a_wire_lets_bytes_take_their_turn_and_arrive_after_its_delay():
    wire = Wire(delay_seconds=0.5, bytes_per_second=100)
    assert wire.carry(bytes(100), now=10) == (11.5, bytes(100))
    assert wire.carry(bytes(50), now=10.2)[0] == 12.0  # behind the first
    assert wire.carry(bytes(100), now=20)[0] == 21.5  # long after both
    assert wire.carried == 250


def test_a_wire_has_room_while_few_bytes_wait_for_their_turn():
    wire = Wire(delay_seconds=1, bytes_per_second=1000)
    wire.carry(bytes(QUEUE_BYTES + 2000), now=0)
    assert wire.room_at == pytest.approx(2)
    assert wire.most_bytes == 1000 + QUEUE_BYTES
    assert Wire(delay_seconds=1).most_bytes == MAX_BYTES


@pytest.mark.parametrize("split", [1, 3, 7, 100])
def test_a_wire_damages_the_same_bytes_however_they_are_split(split):
    wire, sent = Wire(flip_every=10), bytes(100)
    got = b"".join(wire.carry(sent[i : i + split], 0)[1] for i in range(0, 100, split))
    assert [index for index, byte in enumerate(got) if byte] == list(range(9, 100, 10))


# Over sockets.


async def test_bytes_go_through_unchanged_and_end_as_they_ended():
    async with linked() as link, dial(link.port) as stream:
        sent = bytes(range(256)) * 4096
        assert await exchange(stream, sent) == sent
        await stream.send_eof()
        assert await stream.receive_some() == b""
        assert [wire.carried for wire in link.wires.values()] == [len(sent)] * 2


async def test_a_round_trip_takes_both_delays():
    async with linked(delay_seconds=0.05) as link, dial(link.port) as stream:
        assert await elapsed(stream, b"x") >= 0.1
        link.set()
        assert min([await elapsed(stream, b"x") for _ in range(20)]) < 0.05


async def test_bytes_take_the_time_that_the_rate_gives_them():
    async with linked(bytes_per_second=1_000_000) as link, dial(link.port) as stream:
        assert await elapsed(stream, bytes(200_000)) >= 0.2


async def test_a_long_fat_link_holds_what_is_under_way():
    async with linked(delay_seconds=0.1, bytes_per_second=10_000_000) as link, dial(link.port) as stream:
        seconds = await elapsed(stream, bytes(1_000_000))  # 0.1 s of sending, twice a delay of 0.1 s
        assert 0.3 <= seconds < 3  # and not both delays for each of its pieces


async def test_a_receiver_that_does_not_read_holds_up_the_sender():
    async def deaf(stream):
        await trio.sleep_forever()

    async with linked(deaf) as link, dial(link.port) as stream:
        with trio.move_on_after(0.5) as scope:
            await stream.send_all(bytes(64 * 1024 * 1024))
        assert scope.cancelled_caught
        assert link.wires["there"].carried <= 3 * MAX_BYTES


async def test_connections_share_the_wire():
    async with linked(bytes_per_second=1_000_000) as link, dial(link.port) as one, dial(link.port) as two:
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for stream in (one, two):
                nursery.start_soon(exchange, stream, bytes(100_000))
        assert time.perf_counter() - began >= 0.2


async def test_a_cut_resets_both_ends_at_once_and_every_new_connection_until_it_is_healed():
    served = []

    async def note(stream):
        served.append(stream)
        async with stream:
            await expect_reset(stream)

    async with linked(note) as link:
        async with dial(link.port) as stream:
            await until(lambda: served)
            link.cut()
            await expect_reset(stream)
        async with dial(link.port) as stream:
            await expect_reset(stream)
        assert len(served) == 1
        await until(lambda: not link.connections)
        link.heal()
        async with dial(link.port):
            await until(lambda: len(served) == 2)
            link.cut()
            await until(lambda: not link.connections)


async def test_a_stall_keeps_bytes_and_connections_until_it_is_healed():
    async with linked() as link, dial(link.port) as stream:
        assert await exchange(stream, b"before") == b"before"
        link.stall()
        await stream.send_all(b"within")
        async with dial(link.port) as late:
            with trio.move_on_after(0.1) as scope:
                await stream.receive_some()
            assert scope.cancelled_caught
            link.heal()
            assert await stream.receive_some() == b"within"
            assert await exchange(late, b"late") == b"late"


async def test_a_flipped_bit_is_the_only_damage():
    async with linked() as link, dial(link.port) as stream:
        link.flip(1000)
        got = await exchange(stream, bytes(10_000))
        assert sum(got) in range(21)  # there and back: a byte that is flipped twice is as it was
        link.heal()
        assert await exchange(stream, b"whole") == b"whole"


async def test_a_half_closed_connection_goes_on_the_other_way():
    greeted = []

    async def talk(stream):
        greeted.append(await stream.receive_some())
        assert await stream.receive_some() == b""
        await stream.send_all(b"still here")

    async with linked(talk) as link, dial(link.port) as stream:
        await stream.send_all(b"hello")
        await until(lambda: greeted)
        link.half_close("there")
        assert await stream.receive_some() == b"still here"
        assert greeted == [b"hello"]


async def test_an_end_that_breaks_breaks_the_other():
    async def slam(stream):
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, RESET_ON_CLOSE)
        stream.socket.close()

    async with linked(slam) as link, dial(link.port) as stream:
        await expect_reset(stream)


async def test_a_target_that_is_not_there_resets_the_caller():
    async with open_fault_link(("127.0.0.1", 1)) as link, dial(link.port) as stream:
        await expect_reset(stream)


@pytest.fixture
def proxy():
    """Asks a process with links, and closes it."""
    with closing(Worker("tests.fault_link", [], {})) as worker:
        yield lambda **question: worker.ask(question)
    assert worker.process.returncode == 0


async def test_one_process_serves_the_links_of_others(proxy):
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(_serve, echo)
        target = ["127.0.0.1", listener.socket.getsockname()[1]]
        ports = [proxy(do="open", target=target)["port"] for _ in range(2)]
        assert proxy(do="set", delay_seconds=0.05) == {}
        async with dial(ports[1]) as stream:
            assert await elapsed(stream, b"four") >= 0.1
            assert proxy(do="count") == [
                {"connections": 0, "there": 0, "back": 0},
                {"connections": 1, "there": 4, "back": 4},
            ]
            assert proxy(do="cut", link=1) == {}
            await expect_reset(stream)
        nursery.cancel_scope.cancel()
