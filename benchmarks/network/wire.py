"""The wire alone: frames between two processes on loopback, our stack and py-libp2p's own.

    python -m benchmarks wire [--rounds N] [--bulk-mib N] [--json FILE]
    python -m benchmarks wire --rtt-ms 160 --mbit 1000 [--transfers N] [--control NAME] [--json FILE]

Prints the median, p10 and p90 of round trips of one frame, MB/s of frames one way, and the round trip of
a small message while bulk goes the same way on its connection.

With `--rtt-ms` it prints JSON in place of that: the time of 8 MiB one way over a line with this delay and
rate, on fresh connections of our host and of raw TCP in turn, and after a pause
(benchmarks/network/wire_line.py), between two network namespaces (tests/netlab).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

from benchmarks.lib.results import Run
from benchmarks.network.wire_line import measure as measure_line
from node.network.host import Host, open_host
from node.network.streams import FramedStream
from node.network.transport.identity import load_or_create_identity
from routing.names import PeerId
from tensor_codec.frame import FrameDecoder, encode_frame
from tensor_codec.limits import KIB, MIB
from tests.netlab.lab import cannot
from tests.netlab.namespaces import command_inside

TRANSFER_MIB = 8
ECHO, SINK = "/raceme/bench-echo/1", "/raceme/bench-sink/1"
LISTEN = "/ip4/127.0.0.1/tcp/0"
SIZES = (1 * KIB, 4 * KIB, 64 * KIB)
BULK_FRAME = 1 * MIB


class Frames(Protocol):
    """The interface through which both stacks are measured."""

    async def send(self, frame: bytes) -> None:
        """Send a frame."""

    async def receive(self) -> bytearray | None:
        """The next frame, None at the end."""


class StockFrames:
    """Frames over a stream of py-libp2p's, read in large pieces."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(16 * MIB)
        self._ready: list[bytearray] = []

    async def send(self, frame: bytes) -> None:
        """Send a frame."""
        await self._stream.write(encode_frame(frame))

    async def receive(self) -> bytearray | None:
        """The next frame, None at the end."""
        from libp2p.network.stream.exceptions import StreamEOF, StreamReset

        while not self._ready:
            try:
                data = await self._stream.read(256 * KIB)
            except (StreamEOF, StreamReset):
                return None
            self._ready += self._decoder.feed(data)
        return self._ready.pop(0)


async def echo(frames: Frames) -> None:
    """Send every frame back."""
    while (frame := await frames.receive()) is not None:
        await frames.send(bytes(frame))


async def sink(frames: Frames) -> None:
    """Take every frame; answer an empty one with an empty one."""
    while (frame := await frames.receive()) is not None:
        if not frame:
            await frames.send(b"")


Open = Callable[[str], Awaitable[Frames]]


@asynccontextmanager
async def ours(peer: str, address: str) -> AsyncIterator[Open]:
    """Our stack as a client."""
    async with open_host(identity=load_or_create_identity(None), listen=[]) as host:

        async def open_stream(protocol: str) -> FramedStream:
            return await host.open_stream(PeerId(peer), [address], protocol, seconds=5)

        yield open_stream


@asynccontextmanager
async def stock(peer: str, address: str) -> AsyncIterator[Open]:
    """py-libp2p's stack as a client."""
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import PeerInfo
    from multiaddr import Multiaddr

    host = stock_host()
    async with host.run([]):
        await host.connect(PeerInfo(ID.from_base58(peer), [Multiaddr(address)]))

        async def open_stream(protocol: str) -> StockFrames:
            return StockFrames(await host.new_stream(ID.from_base58(peer), [protocol]))

        yield open_stream


def stock_host() -> Any:
    """py-libp2p in its usual form: TCP, Noise, Yamux."""
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport

    key_pair = create_new_key_pair()
    noise = Transport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=key_pair, sec_opt={PROTOCOL_ID: noise})


async def serve(stack: str) -> None:
    """Answer until standard input ends."""

    async def until_told() -> None:
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)

    if stack == "ours":
        host: Host
        async with open_host(identity=load_or_create_identity(None), listen=[LISTEN]) as host:
            host.handle(ECHO, echo)
            host.handle(SINK, sink)
            print(host.peer_id, host.addresses[0], flush=True)
            await until_told()
    else:
        from multiaddr import Multiaddr

        stock_server = stock_host()
        async with stock_server.run([Multiaddr(LISTEN)]):
            stock_server.set_stream_handler(ECHO, lambda stream: echo(StockFrames(stream)))
            stock_server.set_stream_handler(SINK, lambda stream: sink(StockFrames(stream)))
            address = str(stock_server.get_addrs()[0]).partition("/p2p/")[0]
            print(stock_server.get_id().to_base58(), address, flush=True)
            await until_told()


async def round_trips(frames: Frames, size: int, rounds: int) -> list[float]:
    """Seconds of each of `rounds` round trips of one frame."""
    frame, seconds = bytes(size), []
    for _ in range(rounds):
        started = time.perf_counter()
        await frames.send(frame)
        await frames.receive()
        seconds.append(time.perf_counter() - started)
    return seconds


async def bulk(frames: Frames, size: int) -> float:
    """MB/s of `size` bytes, until the other side has all of them."""
    frame = bytes(BULK_FRAME)
    started = time.perf_counter()
    for _ in range(size // BULK_FRAME):
        await frames.send(frame)
    await frames.send(b"")
    await frames.receive()
    return size / 1e6 / (time.perf_counter() - started)


async def measure(stack: str, peer: str, address: str, rounds: int, bulk_bytes: int) -> dict[str, float]:
    """All figures of one stack."""
    figures: dict[str, float] = {}
    async with (ours if stack == "ours" else stock)(peer, address) as open_stream:
        frames = await open_stream(ECHO)
        await round_trips(frames, 1 * KIB, max(rounds // 10, 10))
        for size in SIZES:
            seconds = await round_trips(frames, size, rounds)
            figures[f"{size // KIB} KiB median us"] = statistics.median(seconds) * 1e6
            tenths = statistics.quantiles(seconds, n=10)
            figures[f"{size // KIB} KiB p10 us"] = tenths[0] * 1e6
            figures[f"{size // KIB} KiB p90 us"] = tenths[-1] * 1e6
        to_sink = await open_stream(SINK)
        await bulk(to_sink, 4 * MIB)
        figures["bulk MB/s"] = await bulk(to_sink, bulk_bytes)
        enough = trio.Event()

        async def keep_sending() -> None:
            while not enough.is_set():
                await bulk(to_sink, bulk_bytes)

        seconds = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_sending)
            await trio.sleep(0.05)
            deadline = time.perf_counter() + 2
            while time.perf_counter() < deadline:
                seconds += await round_trips(frames, 1 * KIB, 1)
            enough.set()
        figures["1 KiB median us beside bulk"] = statistics.median(seconds) * 1e6
    return figures


def over_a_line(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure transfers over a delayed line, in namespaces of our own; 2 where they cannot be made."""
    if not options.inside:
        if options.rtt_ms < 0 or options.mbit <= 0 or options.transfers < 1:
            print("error: --rtt-ms must be 0 or more, --mbit above 0, --transfers 1 or more", file=sys.stderr)
            return 2
        if (reason := cannot(homes=False)) is not None:
            print(f"error: no line with a delay can be made here: {reason}", file=sys.stderr)
            return 2
        command = command_inside("benchmarks", ["wire", *words, "--inside"])
        return subprocess.run(command, check=False).returncode
    run = Run()
    figures = measure_line(options.rtt_ms, options.mbit, TRANSFER_MIB, options.transfers, options.control)
    print(json.dumps(figures, indent=2))
    run.write(options.json, figures)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both stacks and print them next to each other; 2 where a line cannot be made here."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks wire", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2000, help="round trips of each size")
    parser.add_argument("--bulk-mib", type=int, default=256, help="MiB sent one way")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", choices=["ours", "stock"], help="measure one stack")
    parser.add_argument("--rtt-ms", type=float, help="of a line between two network namespaces")
    parser.add_argument("--mbit", type=float, default=1000.0, help="a second each way, of that line")
    parser.add_argument("--transfers", type=int, default=7, help="over that line, of each kind")
    parser.add_argument("--control", choices=["reno", "bbr"], help="TCP's congestion control, of that line")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=["ours", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.rounds < 2:
        parser.error("--rounds is at least 2: of one alone there are no tenths")
    if options.serve:
        trio.run(serve, options.serve)
        return 0
    if options.rtt_ms is not None:
        return over_a_line(options, words)
    run, results = Run(), {}
    for stack in [options.only] if options.only else ["ours", "stock"]:
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "wire", "--serve", stack],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            peer, address = server.stdout.readline().split()
            results[stack] = trio.run(measure, stack, peer, address, options.rounds, options.bulk_mib * MIB)
            server.stdin.close()
    print("".ljust(30), *(stack.rjust(10) for stack in results))
    for name in next(iter(results.values())):
        print(name.ljust(30), *(f"{figures[name]:10.0f}" for figures in results.values()))
    run.write(options.json, results)
    return 0
