"""What a node holds, written into a file once a second: for measurements, and for programs that watch a node.

The file holds one JSON object, whole at every moment; it is replaced, so it does not grow.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import psutil
import trio

from node.runtime.files import write_atomically

TICK_SECONDS = 0.01
EVERY_SECONDS = 1.0

log = logging.getLogger(__name__)


class HeldStreams(Protocol):
    """The part of `node.network.transport.yamux.Yamux` that is counted."""

    @property
    def streams(self) -> int:
        """Open streams."""


class HeldConnection(Protocol):
    """The part of `node.network.transport.connection.Connection` that is counted."""

    @property
    def core(self) -> HeldStreams:
        """Its streams."""


async def write_vitals(
    file: Path, connections: Callable[[], Iterable[HeldConnection]], sessions: Callable[[], int]
) -> None:
    """Write the file until cancelled.  A file that cannot be written is logged once, and tried again.

    connections: the present ones.  sessions: the number that is open.
    """
    told = False
    while True:
        lags = await _lags(EVERY_SECONDS)
        try:
            content = json.dumps(vitals(list(connections()), sessions(), lags)).encode()
            write_atomically(file, content, durable=False)
        except OSError as error:
            if not told:
                log.warning("cannot write the vitals file %s: %s", file, error.strerror)
            told = True


def vitals(connections: list[HeldConnection], sessions: int, lags: list[float]) -> dict[str, object]:
    """The values of one moment.  lags: of the event loop's wake-ups since the last moment, in seconds."""
    process = psutil.Process()
    return {
        "at": time.monotonic(),
        "rss": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "connections": len(connections),
        "streams": sum(each.core.streams for each in connections),
        "sessions": sessions,
        "lags_ms": [round(lag * 1000, 1) for lag in lags],
    }


async def _lags(seconds: float) -> list[float]:
    """The lateness of each wake-up of a ticker, in seconds."""
    found = []
    end = trio.current_time() + seconds
    while (due := trio.current_time() + TICK_SECONDS) < end:
        await trio.sleep_until(due)
        found.append(trio.current_time() - due)
    return found
