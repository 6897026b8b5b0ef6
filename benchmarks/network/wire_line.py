"""Bytes one way across a delayed line: our host's connection, and raw TCP over that line in turn.

The first transfer has a new connection.  TCP's slow start and the growth of our windows are part of the time;
the making of the connection is not.  The time ends with the receiver's answer that it has all bytes.  A
second transfer follows at once, and a third one after a pause, in which TCP may forget the line.
"""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from node.network.host import open_host
from node.network.streams import FramedStream
from node.network.transport.identity import load_or_create_identity
from routing.names import PeerId
from tensor_codec.limits import KIB, MIB
from tests.netlab.lab import Lab
from tests.netlab.topology import Line

SINK = "/raceme/bench-sink/1"
FRAME_BYTES = 1 * MIB
READ_BYTES = 256 * KIB
SECONDS = 60  # for one transfer
PAUSES = (
    0.0,
    0.0,
    3.0,
)  # seconds before each transfer of a connection: the last one is of a chat's next prompt
PREFIXES = ("", "second_", "paused_")  # of their figures
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")  # of the network namespace of whoever reads it
RAW_PORT = 4002
_SIZE = struct.Struct(">Q")  # header of a transfer over raw TCP


def measure(rtt_ms: float, mbit: float, mib: int, rounds: int, control: str | None) -> dict[str, object]:
    """The figures of one line, each first transfer on a new connection, and others on that connection.

    rtt_ms: there and back.  mbit: a second, each way.  rounds: that count; one before them does not.
    control: the system's congestion control at both ends; None: as this machine has it.
    Runs in a namespace of its own (`tests.netlab.namespaces.command_inside`).
    """
    size = mib * MIB
    ours: list[list[float]] = []
    raw: list[list[float]] = []
    with Lab(here=True) as lab:
        far = lab.public("far", Line(rtt_ms / 2, mbit)).ip4
        at_the_far_end = lab.enter("far")
        if control is not None:
            CONTROL.write_text(control)
            lab.run("far", ["sh", "-c", 'printf %s "$1" > "$2"', "sh", control, str(CONTROL)])
        control = CONTROL.read_text().strip()
        with (
            _server(at_the_far_end, "ours", far) as (peer, address),
            _server(at_the_far_end, "raw", far),
        ):
            for number in range(rounds + 1):
                ours.append(trio.run(_over_our_host, PeerId(peer), address, size))
                raw.append(_over_raw_tcp(far, size))
                print(f"round {number} of {rounds}", file=sys.stderr)
    figures: dict[str, object] = {
        "rtt_ms": rtt_ms,
        "mbit": mbit,
        "mib": mib,
        "rounds": rounds,
        "congestion_control": control,
    }
    for index, prefix in enumerate(PREFIXES):
        figures |= _compared(prefix, [each[index] for each in ours[1:]], [each[index] for each in raw[1:]])
    return figures


def _compared(prefix: str, ours: Sequence[float], raw: Sequence[float]) -> dict[str, object]:
    """Medians, their ratio, and least and most, of seconds."""
    figures: dict[str, object] = {}
    for name, seconds in (("transfer", ours), ("raw_tcp", raw)):
        figures[f"{prefix}{name}_ms"] = round(statistics.median(seconds) * 1e3, 1)
        figures[f"{prefix}{name}_ms_least_most"] = [round(bound(seconds) * 1e3, 1) for bound in (min, max)]
    figures[f"{prefix}ratio"] = round(statistics.median(ours) / statistics.median(raw), 3)
    return figures


async def _over_our_host(peer: PeerId, address: str, size: int) -> list[float]:
    """Seconds of the transfers on a connection of a new host."""
    async with open_host(identity=load_or_create_identity(None), listen=[]) as host:
        frames = await host.open_stream(peer, [address], SINK, seconds=10)
        frame = bytes(FRAME_BYTES)
        found = []
        for pause in PAUSES:
            await trio.sleep(pause)
            started = time.perf_counter()
            with trio.fail_after(SECONDS):
                for _ in range(size // FRAME_BYTES):
                    await frames.send(frame)
                await frames.send(b"")
                await frames.receive()
            found.append(time.perf_counter() - started)
        await frames.aclose()
    return found


def _over_raw_tcp(host: str, size: int) -> list[float]:
    """Seconds of the transfers on a new connection."""
    found = []
    with socket.create_connection((host, RAW_PORT), timeout=SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = _SIZE.pack(size) + bytes(size)
        for pause in PAUSES:
            time.sleep(pause)
            started = time.perf_counter()
            connection.sendall(data)
            if connection.recv(1) != b".":
                raise OSError("the receiver's end is gone")
            found.append(time.perf_counter() - started)
    return found


def serve(kind: str, host: str) -> None:
    """Take all bytes at an IP address of this machine and answer after the last one, until killed."""
    if kind == "ours":
        trio.run(_serve_our_host, host)
        return
    with socket.create_server((host, RAW_PORT)) as listener:
        print("up", "up", flush=True)
        memory = memoryview(bytearray(READ_BYTES))
        while True:
            connection, _ = listener.accept()
            with connection:
                while head := connection.recv(_SIZE.size, socket.MSG_WAITALL):
                    (left,) = _SIZE.unpack(head)
                    while left:
                        left -= connection.recv_into(memory[: min(left, READ_BYTES)])
                    connection.sendall(b".")


async def _serve_our_host(ip: str) -> None:
    async with open_host(identity=load_or_create_identity(None), listen=[f"/ip4/{ip}/tcp/0"]) as host:
        host.handle(SINK, _sink)
        print(host.peer_id, host.addresses[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def _sink(frames: FramedStream) -> None:
    while (frame := await frames.receive()) is not None:
        if not frame:
            await frames.send(b"")


@contextmanager
def _server(prefix: Sequence[str], kind: str, ip: str) -> Iterator[tuple[str, str]]:
    """A receiver's process at the line's far end; the two words of its first answer."""
    command = [*prefix, sys.executable, "-m", "benchmarks.network.wire_line", kind, ip]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first, second = process.stdout.readline().split()
            yield first, second
        finally:
            process.kill()


if __name__ == "__main__":
    serve(*sys.argv[1:])
