"""A line with a delay and a rate: frames between two TAP devices, each in a namespace of its own.

The kernel's segments pass whole (GSO): the carrier handles a few frames of 64 KiB in place of forty packets,
and needs little of a core.  TCP is the kernel's own at both ends.  The kernel's netem would do this too, but
often it is not built in.

The process of a line: `python -m tests.netlab.line PID DEVICE PID DEVICE MILLISECONDS MBIT QUEUE_MS`.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import select
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.netlab.namespaces import enter
from tests.netlab.topology import Line

TUN = Path("/dev/net/tun")
# of linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP_WITH_HEADERS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_SEGMENTS_PASS_WHOLE = 0x01 | 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
_FRAME_BYTES = 70_000  # more than any segment with its headers
_AT_ONCE = 64  # frames read from one device before the other has its turn
_EARLY_SECONDS = 0.0002  # a frame goes out this much too soon: about the time of a wake-up


@dataclass(slots=True)
class Direction:
    """One direction of a line: when each frame arrives.  Pure."""

    line: Line
    _free_at: float = 0.0  # the time from which the line is free

    def arrival(self, now: float, size: int) -> float | None:
        """The arrival of a frame of `size` bytes that is sent now; None where the queue is full."""
        begin = max(now, self._free_at)
        if begin - now > self.line.queue_ms / 1e3:
            return None
        self._free_at = begin + size * 8 / (self.line.mbit * 1e6)
        return self._free_at + self.line.milliseconds / 1e3


def carry(devices: tuple[int, int], line: Line) -> None:
    """Carry frames between both devices until killed."""
    other = dict(zip(devices, reversed(devices), strict=True))
    directions = {device: Direction(line) for device in devices}
    due: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        ready, _, _ = select.select(devices, [], [], wait)
        now = time.monotonic()
        for device in ready:
            for frame in _waiting(device):
                arrival = directions[device].arrival(now, len(frame))
                if arrival is not None:
                    count += 1
                    heapq.heappush(due, (arrival, count, other[device], frame))
        now = time.monotonic()
        while due and due[0][0] <= now + _EARLY_SECONDS:
            _, _, device, frame = heapq.heappop(due)
            with contextlib.suppress(OSError):  # its device is down
                os.write(device, frame)


def _waiting(device: int) -> Iterator[bytes]:
    for _ in range(_AT_ONCE):
        try:
            yield os.read(device, _FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:  # the device is down
            time.sleep(0.01)
            return


def _tap(name: str) -> int:
    """A TAP device in this process's namespace, as a non-blocking descriptor."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITH_HEADERS))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _SEGMENTS_PASS_WHOLE)
    return descriptor


def main(words: list[str]) -> None:
    """The process of a line."""
    devices = []
    for pid, name in (words[0:2], words[2:4]):
        enter(int(pid), ("net",))
        devices.append(_tap(name))
    milliseconds, mbit, queue_ms = map(float, words[4:])
    print("up", flush=True)  # noqa: T201  the word that the lab waits for
    carry((devices[0], devices[1]), Line(milliseconds, mbit, queue_ms))


if __name__ == "__main__":
    main(sys.argv[1:])
