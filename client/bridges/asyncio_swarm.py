"""A swarm for an asyncio program: trio runs in a thread of its own, and each call crosses once.

asyncio is named here alone; any loop will do, uvloop too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from client.api import ConversationLike, SessionLike, SwarmLike
from client.bridges import trio_thread
from client.bridges.proxy import proxy_of
from client.bridges.trio_thread import Call, Queue, TrioThread, held

if TYPE_CHECKING:
    from client.config import ClientConfig

log = logging.getLogger("raceme")

T = TypeVar("T")
V = TypeVar("V")

HANDLES = {"conversation": ConversationLike, "session": SessionLike, "open_session": SessionLike}


@asynccontextmanager
async def open_bridge(
    config: ClientConfig, open_swarm: Callable[[ClientConfig], AbstractAsyncContextManager[Any]]
) -> AsyncIterator[SwarmLike]:
    """The asyncio side of `connect`.  Raises ConfigError, as `open_swarm` does.

    open_swarm: `client.swarm.open_swarm`, which runs in the trio thread.
    A call that the end of the `async with` overtakes, or that comes after it, raises RuntimeError.
    Leaving takes up to LEAVE_SECONDS and END_SECONDS.
    """
    portal: AsyncioPortal[Any] = AsyncioPortal()
    swarm = await portal.enter(partial(open_swarm, config))
    try:
        yield cast(SwarmLike, proxy_of(swarm, SwarmLike, portal, HANDLES))
    finally:
        await portal.leave()


class AsyncioPortal(Generic[V]):
    """The asyncio side of a `TrioThread`.

    Belongs to the asyncio loop that runs when it is made.  `enter`, then `call`, `iterate` and `hold`
    from any number of tasks, then `leave`.  A call that ends early waits until its task in trio has ended.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()  # it is open, or it has ended
        self._thread: TrioThread[V] = TrioThread(self._loop.call_soon_threadsafe, self._news)

    async def enter(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> V:
        """Start the thread and enter `async with open_value()` in it; its value.  Raises its errors."""
        self._thread.start(open_value)
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            with suppress(Exception):  # the cancellation counts, not the error of the opening
                await self.leave()
            raise
        if self._thread.value is None:
            await self.leave()
            raise RuntimeError("the trio thread has ended without saying why")
        return self._thread.value

    async def leave(self) -> None:
        """Close the context manager and wait for the thread.  Raises the error of an early end."""
        self._thread.leave()
        try:
            async with asyncio.timeout(trio_thread.LEAVE_SECONDS + trio_thread.END_SECONDS):
                while not self._thread.has_ended:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            log.warning("the swarm's thread does not end; it is left running")
            return
        self._thread.join()

    async def call(
        self, function: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None
    ) -> T:
        """See `Portal.call`."""
        news = asyncio.Event()
        call = self._start(function, news)
        try:
            await _until_over(call, news)
        except BaseException:
            call.drop(undo)
            await self._cancel(call, news)
            raise
        return call.result()

    async def iterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The items that `items` yields in trio.  Leave early under `aclosing`, so that `items` is closed."""
        queue: Queue[T] = Queue()
        news = asyncio.Event()
        post = partial(self._loop.call_soon_threadsafe, news.set)
        call = self._start(partial(queue.fill, items, post), news)
        try:
            while True:
                while queue.items:
                    item = queue.items.popleft()
                    if queue.was_full:
                        self.soon(queue.make_room)
                    yield item
                if call.over:
                    break
                news.clear()
                await news.wait()
        finally:
            await self._cancel(call, news)
        call.result()

    @asynccontextmanager
    async def hold(
        self, manager: AbstractAsyncContextManager[T], wrap: Callable[[T], Any]
    ) -> AsyncIterator[Any]:
        """`wrap` of the manager's value in trio, until the end of the block."""
        async with aclosing(self.iterate(held(manager))) as values:
            yield wrap(await anext(values))

    def soon(self, function: Callable[[], object]) -> bool:
        """See `TrioThread.soon`."""
        return self._thread.soon(function)

    def _start(self, function: Callable[[], Awaitable[T]], news: asyncio.Event) -> Call[T]:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this swarm belongs to another event loop")
        call = Call(function, news)
        self._thread.begin(call)
        return call

    async def _cancel(self, call: Call[T], news: asyncio.Event) -> None:
        """End a call without a caller, and wait for its cleanup."""
        if not call.over and self._thread.cancel(call):
            await _until_over(call, news)


async def _until_over(call: Call[T], news: asyncio.Event) -> None:
    while not call.over:
        news.clear()
        await news.wait()
