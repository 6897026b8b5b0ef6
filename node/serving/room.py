"""Waiting for room in the cache: `cache` decides who may have how much, here somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from node.serving.cache import CacheBudget
from tensor_codec.errors import CacheFull


@dataclass(slots=True)
class CacheRoom:
    """A budget, and those who wait for a part of it.  wait_seconds: how long at the most."""

    budget: CacheBudget
    wait_seconds: float
    _more: trio.Event = field(default_factory=trio.Event)

    async def admit(self, session: bytes, peer: str, rows: int, max_length: int) -> None:
        """See `CacheBudget.admit`, after a bounded wait."""
        await self._when_there_is(partial(self.budget.admit, session, peer, rows, max_length))

    async def grow(self, session: bytes, length: int) -> None:
        """See `CacheBudget.grow`, after a bounded wait."""
        await self._when_there_is(partial(self.budget.grow, session, length))

    def shrink(self, session: bytes, length: int) -> None:
        """See `CacheBudget.shrink`; who waits looks again."""
        self.budget.shrink(session, length)
        self._there_is_more()

    def release(self, session: bytes) -> None:
        """See `CacheBudget.release`; who waits looks again."""
        self.budget.release(session)
        self._there_is_more()

    async def _when_there_is(self, take: Callable[[], None]) -> None:
        deadline = trio.current_time() + self.wait_seconds
        while True:
            try:
                return take()
            except CacheFull as full:
                if full.retry_after_seconds is None or trio.current_time() >= deadline:
                    raise
            with trio.move_on_at(deadline):
                await self._more.wait()

    def _there_is_more(self) -> None:
        self._more.set()
        self._more = trio.Event()
