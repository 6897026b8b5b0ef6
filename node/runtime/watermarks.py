"""What a node takes on, by the descriptors and the memory that it has left.

`judge` decides and `Guard` acts: near the end of its descriptors a node accepts no connection, near its
stated bound of resident memory it admits no session, and at the bound it ends the youngest one.
"""

from __future__ import annotations

import ctypes
import logging
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import trio

from tensor_codec.limits import MIB, Limits

log = logging.getLogger("raceme")


@dataclass(frozen=True, slots=True)
class Usage:
    """One reading.  descriptors, resident (bytes): of this process.  max_descriptors: 0 for no limit."""

    descriptors: int
    max_descriptors: int
    resident: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """accepts: new inbound connections.  admits: new sessions and requests.  ends: the youngest session."""

    accepts: bool = True
    admits: bool = True
    ends: bool = False


def judge(usage: Usage, resident_bound: int | None, limits: Limits) -> Verdict:
    """What a node may take on.  resident_bound: bytes; None where none is known at this moment."""
    scarce = usage.max_descriptors and usage.descriptors >= limits.descriptor_share * usage.max_descriptors
    share = usage.resident / resident_bound if resident_bound else 0.0
    return Verdict(
        accepts=not scarce, admits=share < limits.memory_share, ends=share >= limits.memory_end_share
    )


def read_usage() -> Usage:
    """This process's usage now."""
    process = psutil.Process()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 0 if soft == resource.RLIM_INFINITY else soft
    return Usage(process.num_fds(), most, process.memory_info().rss)


class Connections(Protocol):
    """The part of `node.network.connection_table.ConnectionTable` that is guarded."""

    accepting: bool


class Sessions(Protocol):
    """The part of `node.serving.served_span.StreamDispatch` that is guarded."""

    admitting: bool

    async def give_back_memory(self) -> None:
        """Give memory that no session uses back to the system."""

    def end_youngest(self) -> bool:
        """End the session that was opened last; False where there is none."""


@dataclass(slots=True)
class Guard:
    """Reads the usage now and then, and tells connections and sessions.

    sessions: None for a node that serves none.  resident_bound: of this moment, in bytes; None while it does
    not hold (a move keeps blocks of two spans).
    """

    limits: Limits
    connections: Connections
    sessions: Sessions | None = None
    resident_bound: Callable[[], int | None] = lambda: None
    read: Callable[[], Usage] = read_usage
    _ended: int = field(default=0, init=False)  # sessions, since memory was below its bound

    async def run(self) -> None:
        """Guard until cancelled."""
        while True:
            await self.look()
            await trio.sleep(self.limits.watermark_seconds)

    async def look(self) -> None:
        """Read once, and act on it."""
        usage, bound = self.read(), self.resident_bound()
        verdict = judge(usage, bound, self.limits)
        self._accept(verdict, usage)
        if self.sessions is not None:
            await self._admit(self.sessions, verdict, usage, bound or 0)

    def _accept(self, verdict: Verdict, usage: Usage) -> None:
        if verdict.accepts != self.connections.accepting:
            self.connections.accepting = verdict.accepts
            what = f"{usage.descriptors} of {usage.max_descriptors} file descriptors are in use"
            if verdict.accepts:
                log.info("%s: connections are accepted again", what)
            else:
                log.warning("%s: no new connection is accepted (raise ulimit -n)", what)

    async def _admit(self, sessions: Sessions, verdict: Verdict, usage: Usage, bound: int) -> None:
        what = f"{usage.resident // MIB} MiB are resident, the bound is {bound // MIB} MiB"
        if verdict.admits != sessions.admitting:
            sessions.admitting = verdict.admits
            if verdict.admits:
                log.info("%s: sessions are admitted again; %d were ended", what, self._ended)
                self._ended = 0
            else:
                log.warning("%s: no new session is admitted", what)
        if not verdict.admits:
            await sessions.give_back_memory()
        if verdict.ends and sessions.end_youngest():
            if not self._ended:
                log.error("%s: the youngest sessions are ended until it is less", what)
            self._ended += 1


def trim_heap() -> None:
    """Give freed memory of the C library's heap back to the system, where that library can do so."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
