"""A few jobs at once, of which a late one holds up no other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Turns:
    """Turns for jobs that peers can hold up.

    at_once: jobs that have a turn.  late_seconds: a job that takes longer goes on without its turn.
    """

    def __init__(self, at_once: int, late_seconds: float) -> None:
        self._limiter = trio.CapacityLimiter(at_once)
        self._late_seconds = late_seconds

    async def run(self, job: Callable[[], Awaitable[object]]) -> None:
        """Wait for a turn and do the job."""
        holder = object()
        await self._limiter.acquire_on_behalf_of(holder)
        holds = True

        def release() -> None:
            nonlocal holds
            if holds:
                holds = False
                self._limiter.release_on_behalf_of(holder)

        async def release_late() -> None:
            await trio.sleep(self._late_seconds)
            release()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(release_late)
                await job()
                nursery.cancel_scope.cancel()
        finally:
            release()
