"""Nurseries for things that live as long as an `async with` block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for background tasks, cancelled when the block ends.

    An exception that the block itself raises comes out as it is, not inside an ExceptionGroup, so
    callers can catch it by its type.  One that a background task raises is a bug: it cancels the
    block and comes out in a group, as from any nursery.
    """
    raised: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001  raised again below, outside the nursery
            raised = error
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised
