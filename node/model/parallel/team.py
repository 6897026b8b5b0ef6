"""Rank 0's side of tensor parallelism: the processes of the other ranks, and their end.

A process at each device and not threads of one: a thread waits for Python's lock between two small kernels,
and a CUDA graph cannot record two devices (docs/decisions/ says more).  Rank 0 is the node.  It starts the
others, which live no longer than it does, and tells each what the next step is.

Every wait has an end.  A rank that ends is seen by the thread that waits for its process, and operations with
it end with an error at once.  One that hangs ends operations of a CPU after COLLECTIVE_SECONDS; on a GPU,
where nothing else would, a thread that watches the time of a step kills the ranks.  Either way the team is
lost for good: `lost` says why, and every later call raises SpanLost.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, distributed

from node.config import ConfigError
from node.model.parallel import commands
from node.model.parallel.commands import Message, packed, unpacked
from node.model.parallel.group import Ranks, join, leave
from node.model.parallel.lost import SpanLost

START_SECONDS = 180.0  # for importing torch and transformers, on a slow disk, and making a CUDA context
LOAD_SECONDS = 3600.0  # for loading what rank 0 has loaded meanwhile: 100 GB from a disk of 30 MB/s
STEP_SECONDS = 60.0  # on a GPU a step takes milliseconds, the first ones with compilers seconds
CPU_STEP_SECONDS = 1800.0  # of a large model on a slow machine; each operation has its own end
RECORD_SECONDS = 600.0  # for recording all graphs: compilers run too, the first time on a machine
ROOM_SECONDS = 60.0  # for a rank's answer when it computes nothing
END_SECONDS = 5.0  # until a rank whose pipe was closed is killed
NOTICE_SECONDS = 1.0  # after an error: a rank's sockets close a moment before its process is seen to end
WATCH_SECONDS = 0.5  # between two looks at a step's time
MAX_REPLY_BYTES = 1 << 20


@dataclass(slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


class Team:
    """The ranks 1 to n - 1 and the group of all.  Made by `open_team`; used in the torch thread, but for
    `later`.

    lost: why the ranks cannot compute any more; None while they can.
    """

    def __init__(self, group: Ranks, workers: Sequence[_Worker], on_lost: Callable[[str], None]) -> None:
        self.group = group
        self.lost: str | None = None
        self._workers = tuple(workers)
        self._on_lost = on_lost
        self._numbers = itertools.count()
        self._later: deque[Message] = deque()
        self._closing = threading.Event()
        self._ends_at: float | None = None  # of the step under way, on the monotonic clock
        for worker in self._workers:
            threading.Thread(target=self._watch, args=(worker,), daemon=True).start()
        threading.Thread(target=self._watch_steps, daemon=True).start()

    def number(self) -> int:
        """A new number for a span, a pool, rows or a graph."""
        return next(self._numbers)

    def later(self, do: str, **what: object) -> None:
        """Send a message before the next `tell`.  From any thread, and while a step runs."""
        self._later.append({"do": do, **what})

    def tell(self, do: str, **what: object) -> None:
        """Send a message to all ranks.  Raises SpanLost."""
        self._check()
        messages = []
        while self._later:
            messages.append(packed(self._later.popleft()))
        try:
            for data in (*messages, packed({"do": do, **what})):
                for worker in self._workers:
                    worker.connection.send_bytes(data)
        except OSError as error:
            self._fail(f"a rank takes no message: {error.strerror or error}")
            self._check()

    def answers(self, seconds: float) -> list[Message]:
        """The answer of each rank to the message that was told last.  Raises SpanLost."""
        until = time.monotonic() + seconds
        found = []
        for worker in self._workers:
            try:
                if not worker.connection.poll(max(0.0, until - time.monotonic())):
                    self._fail(f"rank {worker.rank} did not answer in {seconds:g} s")
                else:
                    found.append(unpacked(worker.connection.recv_bytes(MAX_REPLY_BYTES)))
            except (EOFError, OSError):
                self._fail(f"rank {worker.rank} {_ended(worker)}")
            self._check()
        return found

    def free_bytes(self) -> list[int]:
        """Memory that is free at the device of each other rank; unused memory is given back first.

        Raises SpanLost.
        """
        self.tell(commands.ROOM)
        return [int(answer["free"]) for answer in self.answers(ROOM_SECONDS)]

    def use_threads(self, threads: int) -> None:
        """Have the other ranks compute with so many threads of torch from the next step on.  As `later`."""
        self.later(commands.THREADS, threads=threads)

    @contextmanager
    def in_step(self, seconds: float | None = None) -> Iterator[None]:
        """The other ranks compute what the block computes: a fault in it leaves them out of step.

        seconds: that it may take; None: as long as a step may.  On a GPU it has been computed by the end of
        the block.  Raises SpanLost in place of any fault.
        """
        self._check()
        on_gpu = self.group.device.type == "cuda"
        self._ends_at = time.monotonic() + (seconds or (STEP_SECONDS if on_gpu else CPU_STEP_SECONDS))
        try:
            yield
            if on_gpu:
                torch.cuda.synchronize(self.group.device)  # sums that were ended leave any numbers
                self._check()
        except SpanLost:
            raise
        except Exception as error:
            self._fail(self._reason(error))
            raise SpanLost(f"{self.lost}") from error
        finally:
            self._ends_at = None

    def give(self, tensor: Tensor) -> Tensor:
        """Hidden states to all ranks, whole and on this rank's device.  Within `in_step`."""
        return self.group.from_first(tensor)

    def close(self) -> None:
        """End the other ranks.  Bounded.  From any thread, also while a step waits for a rank."""
        self._closing.set()
        sound, self.lost = self.lost is None, self.lost or "the ranks have been ended"
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            try:
                worker.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        if sound or self.group.device.type != "cuda":  # NCCL was ended by `_watch`
            leave()

    def _reason(self, error: Exception) -> str:
        """The end of a rank, where that is what an operation ran into; else the first line of its error."""
        until = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < until:
            for worker in self._workers:
                if worker.process.poll() is not None:
                    return f"rank {worker.rank} {_ended(worker)}"
            time.sleep(0.01)
        return " ".join(str(error).split("\n")[0].split()) or type(error).__name__

    def _check(self) -> None:
        if self.lost is not None:
            raise SpanLost(self.lost)

    def _fail(self, why: str) -> None:
        if self.lost is None:
            self.lost = f"tensor parallelism over {self.group.ranks} devices has ended: {why}"
            if not self._closing.is_set():
                self._on_lost(self.lost)

    def _watch(self, worker: _Worker) -> None:
        """Runs in a thread of its own: notice the end of a rank, even while nothing is computed."""
        worker.process.wait()
        if self._closing.is_set():
            return
        self._fail(f"rank {worker.rank} {_ended(worker)}")
        if self.group.device.type == "cuda":
            with suppress(Exception):  # or the GPU waits for the rank: a sum over ranks is a kernel there
                distributed.distributed_c10d._get_default_group().abort()

    def _watch_steps(self) -> None:
        """Runs in a thread of its own: end a step that takes too long."""
        while not self._closing.wait(WATCH_SECONDS):
            ends_at = self._ends_at
            if ends_at is not None and time.monotonic() > ends_at:
                self._fail("a step took too long, a rank hangs")
                for worker in self._workers:
                    worker.process.kill()  # then `_watch` sees its end, and so do sums with it
                return


def _ended(worker: _Worker) -> str:
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(1.0)
    code = worker.process.returncode
    if code is None:
        return "closed its pipe"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def open_team(
    devices: Sequence[str], *, threads: int = 1, on_lost: Callable[[str], None] = lambda _: None
) -> Team:
    """Start a process for each device but the first, which is this process's, and meet them.

    threads: of torch, in each.  on_lost: called once, from another thread, with the reason why the ranks
    cannot compute any more.  Runs in the torch thread.  Raises ConfigError.
    """
    _prefer_loopback()
    folder = Path(tempfile.mkdtemp(prefix="raceme-ranks-"))
    workers: list[_Worker] = []
    try:
        for rank in range(1, len(devices)):
            workers.append(_started(rank))
            first = {
                "do": commands.START, "rank": rank, "ranks": len(devices), "device": devices[rank],
                "threads": threads, "meeting": str(folder / "meeting"),
            }  # fmt: skip
            workers[-1].connection.send_bytes(packed(first))
        until = time.monotonic() + START_SECONDS
        for worker in workers:
            _await_start(worker, until)
        group = join(0, len(devices), torch.device(devices[0]), folder / "meeting")
        for worker in workers:  # one that has not met all others yet still reads the file
            _await_start(worker, until)
    except (OSError, RuntimeError, ConfigError) as error:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        leave()
        raise ConfigError(f"the {len(devices)} ranks do not start: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Team(group, workers, on_lost)


def _started(rank: int) -> _Worker:
    ours, theirs = Pipe()
    root = str(Path(__file__).resolve().parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "node.model.parallel.worker", str(theirs.fileno())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    theirs.close()  # so that the pipe ends when the process does
    return _Worker(rank, process, ours)


def _await_start(worker: _Worker, until: float) -> None:
    """Return when a rank is ready to meet the others, or has met them.  Raises ConfigError."""
    try:
        if worker.connection.poll(max(0.0, until - time.monotonic())):
            worker.connection.recv_bytes(MAX_REPLY_BYTES)
            return
    except (EOFError, OSError):
        raise ConfigError(f"rank {worker.rank} {_ended(worker)}") from None
    raise ConfigError(f"rank {worker.rank} was not ready within {START_SECONDS:g} s")


def _prefer_loopback() -> None:
    """Let gloo meet over the loopback interface: all ranks are of this machine.

    It would take the interface of the host's name, which may have no address, or be open to others.
    """
    import psutil

    for name in ("lo", "lo0"):
        if name in psutil.net_if_addrs():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
