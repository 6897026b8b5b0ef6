"""Nurseries for things that live as long as an `async with` block, and the way out of all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
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


def run(main: Callable[[], Awaitable[None]]) -> None:
    """`trio.run` for a command line: its final error is raised without the groups of nurseries.

    Ctrl-C is KeyboardInterrupt, even with other errors next to it.  Trio raises it in the main task alone,
    at a checkpoint: in the task of a library, or in an import, it could be lost.  Of errors of one type the
    first is raised; a mixture stays a group.
    """
    try:
        trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        errors = _leaves(group)
        if any(isinstance(error, KeyboardInterrupt) for error in errors):
            raise KeyboardInterrupt from None
        if len({type(error) for error in errors}) == 1:
            raise errors[0] from None
        raise


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
