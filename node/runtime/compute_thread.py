"""One thread for torch, and the only way from trio into it.

Torch computes in a thread so that the event loop answers while a block computes.  It is always one thread
because OpenMP keeps a team of workers for every thread that ever called it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import outcome
import trio

T = TypeVar("T")

JOIN_SECONDS = 30.0
HURRIED_JOIN_SECONDS = 1.0


class Runner(Protocol):
    """Runs functions one after another, first come, first served: in a node a `ComputeThread`."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Return function(*args); its exceptions are raised here."""

    @property
    def is_idle(self) -> bool:
        """Whether no function runs or waits, and none can begin before the caller awaits something.

        For callers in the event loop's thread: they may do then what else runs here alone.
        """


class ComputeThread:
    """Runs functions one after another in a thread of its own, first come, first served.

    A cancelled caller gets control back at once.  Its waiting function is not run, and the result of its
    running function is dropped.
    """

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._busy = 0  # functions that wait or run; of the event loop's thread alone

    @property
    def is_idle(self) -> bool:
        """See Runner."""
        return not self._busy

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Return function(*args), computed in the thread; its exceptions are raised here."""
        job = _Job(function, args, trio.lowlevel.current_task())
        self._busy += 1
        self._jobs.put(job)

        def abort(_: Callable[[], object]) -> trio.lowlevel.Abort:
            job.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        # Any: trio does not carry the type of a rescheduled task's value
        result: Any = await trio.lowlevel.wait_task_rescheduled(abort)
        return result  # type: ignore[no-any-return]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.task is not None:  # else the caller was cancelled during the wait
                job.result = outcome.capture(job.function, *job.args)
            try:
                self._token.run_sync_soon(self._deliver, job)
            except trio.RunFinishedError:
                return
            del job  # or an idle thread would keep the last session's cache alive

    def _deliver(self, job: _Job) -> None:
        self._busy -= 1
        job.deliver()


class _Job:
    __slots__ = ("args", "function", "result", "task")

    def __init__(
        self, function: Callable[..., object], args: tuple[object, ...], task: trio.lowlevel.Task
    ) -> None:
        self.function = function
        self.args = args
        self.task: trio.lowlevel.Task | None = task
        self.result: outcome.Outcome[object] | None = None

    def deliver(self) -> None:
        if self.task is not None and self.result is not None:
            trio.lowlevel.reschedule(self.task, self.result)


@asynccontextmanager
async def open_compute_thread(name: str = "torch") -> AsyncIterator[ComputeThread]:
    """A compute thread for the time of the block.

    At the end of the block the running function (a step, not a generation) is finished and the thread is
    joined.  A cancelled or interrupted block does not wait for a long import or a download: the thread then
    ends by itself.
    """
    compute = ComputeThread(trio.lowlevel.current_trio_token())
    thread = threading.Thread(target=compute._work, name=name, daemon=True)
    thread.start()
    seconds = JOIN_SECONDS
    try:
        yield compute
    except BaseException as error:
        if not isinstance(error, Exception):  # a cancellation, Ctrl-C, or a group with one of them
            seconds = HURRIED_JOIN_SECONDS
        raise
    finally:
        compute._jobs.put(None)
        with trio.CancelScope(shield=True), trio.move_on_after(seconds):
            await trio.to_thread.run_sync(thread.join, abandon_on_cancel=True)
