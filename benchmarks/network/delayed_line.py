"""A line with a delay and a rate between two network namespaces: real TCP at both ends, no proxy between.

Two TAP devices, one in this process's namespace and one in a namespace of its own.  A process carries
Ethernet frames from each to the other, after their time on the line and the delay.  The kernel's segments
pass whole (GSO): the carrier handles a few frames of 64 KiB in place of forty packets, and needs little of a
core.  The kernel's netem would do this too, but often it is not built in.

Linux, as root, in a network and a mount namespace of its own (`netns.command_inside`).
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.network import netns

NEAR, FAR, NAMESPACE = "10.78.0.1", "10.78.0.2", "far"
DEVICE = "line0"
TUN = Path("/dev/net/tun")
# of linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP_WITH_HEADERS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_SEGMENTS_PASS_WHOLE = 0x01 | 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
_FRAME_BYTES = 70_000  # more than any segment with its headers
_AT_ONCE = 64  # frames read from one device before the other has its turn
_EARLY_SECONDS = 0.0002  # a frame goes out this much too soon: about the time of a wake-up


def why_not() -> str | None:
    """The reason why no line can be made here, in a few words; None where it can."""
    if not TUN.exists():
        return f"there is no {TUN} here"
    return netns.why_not()


@contextmanager
def delayed_line(rtt_ms: float, mbit: float) -> Iterator[tuple[str, ...]]:
    """The line from here (address NEAR) to a new namespace (FAR); the words before a command that runs there.

    rtt_ms: there and back, half of it each way.  mbit: a second, each way.
    """
    netns.MOUNT.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "tmpfs", str(netns.MOUNT))
    _run("ip", "netns", "add", NAMESPACE)
    prefix = ("ip", "netns", "exec", NAMESPACE)
    carrier = [sys.executable, "-m", __name__, str(rtt_ms / 2e3), str(mbit * 1e6 / 8)]
    with subprocess.Popen(carrier, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "up\n":
                raise OSError("the line did not come up")
            for words, address in (((), NEAR), (prefix, FAR)):
                _run(*words, "ip", "link", "set", "lo", "up")
                _run(*words, "ip", "addr", "add", f"{address}/24", "dev", DEVICE)
                _run(*words, "ip", "link", "set", DEVICE, "up")
                # no connection begins with an earlier connection's measurements of the line
                _run(*words, "sysctl", "-qw", "net.ipv4.tcp_no_metrics_save=1")
            yield prefix
        finally:
            process.kill()


def carry(one_way_seconds: float, bytes_per_second: float) -> None:
    """Carry frames between both devices until killed.  Nothing is lost: a queue has no end."""
    near = _tap()
    netns.enter(NAMESPACE)
    far = _tap()
    print("up", flush=True)
    other = {near: far, far: near}
    free_at = dict.fromkeys(other, 0.0)  # the time from which this device's line is free
    due: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        ready, _, _ = select.select(list(other), [], [], wait)
        now = time.monotonic()
        for device in ready:
            for frame in _waiting(device):
                free_at[device] = max(now, free_at[device]) + len(frame) / bytes_per_second
                count += 1
                heapq.heappush(due, (free_at[device] + one_way_seconds, count, other[device], frame))
        now = time.monotonic()
        while due and due[0][0] <= now + _EARLY_SECONDS:
            _, _, device, frame = heapq.heappop(due)
            with contextlib.suppress(OSError):
                os.write(device, frame)


def _waiting(device: int) -> Iterator[bytes]:
    for _ in range(_AT_ONCE):
        try:
            yield os.read(device, _FRAME_BYTES)
        except OSError:  # no frame, or the device is not up yet
            return


def _tap() -> int:
    """A TAP device in this thread's namespace, as a non-blocking descriptor."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _TAP_WITH_HEADERS))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _SEGMENTS_PASS_WHOLE)
    return descriptor


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


if __name__ == "__main__":
    carry(float(sys.argv[1]), float(sys.argv[2]))
