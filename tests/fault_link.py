"""A link with a delay, a rate and faults: a TCP proxy between real processes.

    async with open_fault_link(("127.0.0.1", 4001), delay_seconds=0.05) as link: ...   # dial link.port
    python -m tests.fault_link                          # the same for other processes, a JSON line each

Each direction is a wire that all connections share.  Bytes take their turn on it (`n / rate` seconds)
and arrive `delay` later.  At most QUEUE_BYTES wait for their turn, as in a router: beyond these
nothing is read, so a sender feels the rate as TCP's own back pressure.

It cannot lose packets (TCP below it is loopback's), or leave a SYN unanswered.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import trio

Way = Literal["there", "back"]  # from the caller to the target, and back
WAYS: tuple[Way, Way] = ("there", "back")

CHUNK_BYTES = 16 * 1024  # read at once: a small message may wait behind that many
QUEUE_BYTES = 64 * 1024  # waiting for their turn on a wire
MAX_BYTES = 4 * 1024 * 1024  # under way on one connection, whatever delay and rate are
SOCKET_BYTES = 128 * 1024  # of a kernel buffer; less than two of loopback's 64 KiB segments would stall
TICK_SECONDS = 0.001  # of epoll, which rounds up

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: no FIN, an RST at once


@dataclass(slots=True)
class Wire:
    """One direction of a link.  Decides when bytes arrive, and which are damaged; reads no clock.

    flip_every: the lowest bit of every so many-th byte is flipped; 0 for none.
    carried: bytes so far.
    """

    delay_seconds: float = 0.0
    bytes_per_second: float = math.inf
    flip_every: int = 0
    carried: int = 0
    free_at: float = -math.inf

    def carry(self, data: bytes, now: float) -> tuple[float, bytes]:
        """The time when `data`, given to the wire now, has arrived as a whole, and the bytes that arrive."""
        self.free_at = max(now, self.free_at) + len(data) / self.bytes_per_second
        begin, self.carried = self.carried, self.carried + len(data)
        return self.free_at + self.delay_seconds, _damaged(data, begin, self.flip_every)

    @property
    def room_at(self) -> float:
        """When no more than QUEUE_BYTES wait for their turn."""
        return self.free_at - QUEUE_BYTES / self.bytes_per_second

    @property
    def most_bytes(self) -> float:
        """The most bytes that one connection has under way: on the wire, and waiting for it."""
        held = self.bytes_per_second * self.delay_seconds if self.delay_seconds else 0
        return min(held + QUEUE_BYTES, MAX_BYTES)


def _damaged(data: bytes, begin: int, every: int) -> bytes:
    """`data`, which begins at byte `begin` of a wire, with a bit flipped in every so many-th byte."""
    if not every:
        return data
    damaged = bytearray(data)
    for index in range(every - 1 - begin % every, len(data), every):
        damaged[index] ^= 1
    return bytes(damaged)


@dataclass(slots=True)
class _Flow:
    """The bytes under way on one connection in one direction.  ended: by `half_close`."""

    wire: Wire
    source: trio.socket.SocketType
    sink: trio.socket.SocketType
    under_way: int = 0
    ended: bool = False
    arrived: trio.Event = field(default_factory=trio.Event)  # renewed each time

    def has_arrived(self, size: int) -> None:
        """So many bytes are under way no more."""
        self.under_way -= size
        self.arrived.set()
        self.arrived = trio.Event()


class FaultLink:
    """Forwards connections to `target`.  Made by `open_fault_link`.

    Everything but the bytes is the caller's to change at run time, for all connections at once.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = 0  # where it listens, on 127.0.0.1
        self.wires: dict[Way, Wire] = {"there": Wire(), "back": Wire()}
        self._connections: list[dict[Way, _Flow]] = []
        self._is_cut = False
        self._running = trio.Event()
        self._running.set()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def set(self, delay_seconds: float = 0.0, bytes_per_second: float | None = None) -> None:
        """The same delay (one way) and rate for both directions; a rate of None is boundless."""
        for wire in self.wires.values():
            wire.delay_seconds = delay_seconds
            wire.bytes_per_second = bytes_per_second or math.inf

    def cut(self) -> None:
        """Reset both ends of every connection now, and each new one, until `heal`."""
        self._is_cut = True
        for flows in list(self._connections):
            _reset(flows["there"].source, flows["there"].sink)

    def stall(self) -> None:
        """Read and deliver nothing until `heal`; connections stay open, and bytes where they are."""
        if self._running.is_set():
            self._running = trio.Event()

    def flip(self, every_bytes: int) -> None:
        """Flip one bit in every so many bytes, both ways, until `heal`."""
        for wire in self.wires.values():
            wire.flip_every = every_bytes

    def heal(self) -> None:
        """No fault any more.  A connection that was cut or half closed stays so."""
        self._is_cut = False
        self._running.set()
        self.flip(0)

    def half_close(self, way: Way) -> None:
        """Send a FIN this way on every open connection now; bytes that still come are thrown away."""
        for flows in self._connections:
            flows[way].ended = True
            with contextlib.suppress(OSError):
                flows[way].sink.shutdown(socket.SHUT_WR)

    async def run(self, task_status: trio.TaskStatus[FaultLink] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a free port until cancelled; every connection is reset then."""
        with _socket() as listener:
            await listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.port = listener.getsockname()[1]
            async with trio.open_nursery() as nursery:
                task_status.started(self)
                while True:
                    caller, _ = await listener.accept()
                    nursery.start_soon(self._serve, caller)

    async def _serve(self, caller: trio.socket.SocketType) -> None:
        target = _socket()
        try:
            await self._running.wait()
            if not self._is_cut:
                await target.connect(self.target)
                await self._forward(caller, target)
        except* (OSError, trio.ClosedResourceError):
            pass  # one end broke, so both do
        finally:
            _reset(caller, target)

    async def _forward(self, caller: trio.socket.SocketType, target: trio.socket.SocketType) -> None:
        """Until both ways have ended, which closes the sockets.  Raises OSError, ClosedResourceError."""
        for sock in (caller, target):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        flows: dict[Way, _Flow] = {
            "there": _Flow(self.wires["there"], caller, target),
            "back": _Flow(self.wires["back"], target, caller),
        }
        self._connections.append(flows)
        try:
            async with trio.open_nursery() as nursery:
                for flow in flows.values():
                    send, receive = trio.open_memory_channel[tuple[float, bytes]](math.inf)
                    nursery.start_soon(self._read, flow, send)
                    nursery.start_soon(self._deliver, flow, receive)
        finally:
            self._connections.remove(flows)
        caller.close()
        target.close()

    async def _read(self, flow: _Flow, wire: trio.MemorySendChannel[tuple[float, bytes]]) -> None:
        """Give the wire the source's bytes, up to its end, as b""; never more than there is room for."""
        data = b"-"
        while data:
            while flow.under_way >= flow.wire.most_bytes:
                await flow.arrived.wait()
            await trio.sleep_until(flow.wire.room_at)
            if flow.source.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(flow.source)
            await self._running.wait()
            data = await flow.source.recv(CHUNK_BYTES)
            flow.under_way += len(data)
            wire.send_nowait(flow.wire.carry(data, trio.current_time()))

    async def _deliver(self, flow: _Flow, wire: trio.MemoryReceiveChannel[tuple[float, bytes]]) -> None:
        async for due, data in wire:
            # Of many chunks in a row it does not matter when exactly each of them comes.
            await _wait_until(due, exactly=not wire.statistics().current_buffer_used)
            await self._running.wait()
            try:
                if not data:
                    return flow.sink.shutdown(socket.SHUT_WR)
                sent = 0
                while sent < len(data) and not flow.ended:
                    sent += await flow.sink.send(data[sent:])
            except OSError:
                if not flow.ended:
                    raise
            flow.has_arrived(len(data))


def _socket() -> trio.socket.SocketType:
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)  # accepted sockets inherit them
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    return sock


def _reset(*sockets: trio.socket.SocketType) -> None:
    """Close them with an RST.  Twice does no harm."""
    for sock in sockets:
        with contextlib.suppress(OSError):  # closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        sock.close()


async def _wait_until(deadline: float, *, exactly: bool) -> None:
    """Sleep until then and up to a tick longer; exactly: to within microseconds, busily at the end."""
    await trio.sleep_until(deadline - TICK_SECONDS if exactly else deadline)
    while trio.current_time() < deadline:  # other tasks have their turn in between
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_fault_link(
    target: tuple[str, int], delay_seconds: float = 0.0, bytes_per_second: float | None = None
) -> AsyncIterator[FaultLink]:
    """A running link to `target`; its connections are reset at the end of the block."""
    link = FaultLink(target)
    link.set(delay_seconds, bytes_per_second)
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        yield link
        nursery.cancel_scope.cancel()


async def serve_lines() -> None:
    """Answer lines on standard input until it ends.

    {"do": "open", "target": [host, port]} -> {"link": n, "port": p}.  Any other "do" names a method,
    with its arguments beside it, of link n, or without "link" of all -> {}; "count" -> for each link the
    bytes carried each way, and its connections.
    """
    links: list[FaultLink] = []
    async with trio.open_nursery() as nursery:
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            question = json.loads(line)
            if question["do"] == "open":
                links.append(FaultLink(tuple(question["target"])))
                await nursery.start(links[-1].run)
                answer: object = {"link": len(links) - 1, "port": links[-1].port}
            elif question["do"] == "count":
                answer = [{"connections": each.connections} | _carried(each) for each in links]
            else:
                answer = _do(links, question)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        nursery.cancel_scope.cancel()


def _carried(link: FaultLink) -> dict[str, int]:
    return {way: link.wires[way].carried for way in WAYS}


def _do(links: list[FaultLink], question: Mapping[str, Any]) -> dict[str, str]:  # Any: JSON
    """Change one link, or all of them."""
    faults: dict[str, Callable[..., None]] = {
        name: partial(getattr(FaultLink, name))
        for name in ("set", "cut", "stall", "flip", "heal", "half_close")
    }
    arguments = {key: value for key, value in question.items() if key not in ("do", "link")}
    for link in [links[question["link"]]] if "link" in question else links:
        faults[question["do"]](link, **arguments)
    return {}


if __name__ == "__main__":
    trio.run(serve_lines)
