"""An asyncio loop whose clock jumps to the next timer when nothing else can happen: waits cost no time.

What trio's `autojump_clock` is for tests under trio.  No thread may have to wake the loop.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


MOST_SECONDS = 100_000.0  # of one test


class Deadlock(Exception):
    """Nothing will ever happen: a test waits for something that nobody does."""


class _Selector(selectors.DefaultSelector):
    loop: JumpingLoop

    def select(self, timeout=None):
        found = super().select(0)
        if not found and timeout is None:
            raise Deadlock
        if not found and timeout > 0:
            self.loop.jump(timeout)
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    """The loop."""

    def __init__(self) -> None:
        self._now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds
        if self._now > MOST_SECONDS:
            raise Deadlock


def run(function: Callable[[], Awaitable[T]]) -> T:
    """Run an asyncio function; afterwards no task is left, and nobody has complained to the loop."""
    complaints: list[dict] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        result = await function()
        for _ in range(3):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"left running: {left}"
        return result

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        result = runner.run(main())
    assert not complaints, complaints
    return result
