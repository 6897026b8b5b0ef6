"""A trio event loop in a thread of its own, and calls that cross into it once."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import outcome
import trio

from node.runtime.nurseries import background_nursery

if TYPE_CHECKING:
    pass

log = logging.getLogger("raceme")

T = TypeVar("T")
V = TypeVar("V")

TOKENS_AHEAD = 8  # of one generation, that its consumer has not taken yet
LEAVE_SECONDS = 10.0  # for the trio side to say its goodbyes, which have deadlines of their own
END_SECONDS = 1.0  # for what is cancelled then to unwind


class TrioThread(Generic[V]):
    """A trio run in a thread of its own that holds one context manager open, and the ways into it.

    Belongs to the asyncio loop that runs when it is made.  `enter`, then `call` and `iterate` from
    any number of tasks, then `leave`.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Changed in the loop's thread alone:
        self._news = asyncio.Event()  # it is open, or it has ended
        self._left = False
        self._ended = False
        # Changed in trio's thread alone:
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()  # around everything
        self._leaving = trio.Event()
        self._value: V | None = None  # None: not open yet
        self._nursery: trio.Nursery | None = None  # of the calls; None: none are taken
        self._outcome: outcome.Outcome[None] | None = None

    async def enter(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> V:
        """Start the thread; what `async with open_value()` gives in it.  Raises what that raises."""
        self._thread = threading.Thread(target=self._run, args=(open_value,), name="raceme-trio", daemon=True)
        self._thread.start()
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            with suppress(Exception):  # we were cancelled, whatever became of the opening
                await self.leave()
            raise
        if self._value is None:
            await self.leave()
            raise RuntimeError("the trio thread has ended without saying why")
        return self._value

    async def leave(self) -> None:
        """Close the context manager and wait for the thread.  Raises what ended it before its time."""
        self._left = True
        self.soon(self._leave)  # where there is no token yet, trio looks at _left
        try:
            async with asyncio.timeout(LEAVE_SECONDS + END_SECONDS):
                while not self._ended:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            log.warning("the swarm's thread does not end; it is left behind")
            return
        self._thread.join()
        if self._outcome is not None:
            self._outcome.unwrap()

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """The result of `await function()` in trio."""
        call = self._start(function)
        try:
            await call.until_over()
        finally:
            await self._cancel(call)
        return call.result()

    async def iterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What `items` yields in trio.  Leave it early under `aclosing`: `items` is closed then."""
        queue: _Queue[T] = _Queue()
        news = asyncio.Event()
        call = self._start(partial(queue.fill, items, partial(self._post, news.set)), news)
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
            await self._cancel(call)
        call.result()

    def soon(self, function: Callable[[], object]) -> bool:
        """Call `function` in trio, without waiting for it.  False: trio has ended."""
        if self._token is None:
            return False
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True

    def _start(self, function: Callable[[], Awaitable[T]], news: asyncio.Event | None = None) -> _Call[T]:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this swarm belongs to another event loop")
        call = _Call(function, news or asyncio.Event())
        if not self.soon(partial(self._begin, call)):
            call.end()
        return call

    async def _cancel(self, call: _Call[T]) -> None:
        """End a call that nobody waits for any more, and wait until it has cleaned up."""
        if not call.over and self.soon(call.scope.cancel):
            await call.until_over()

    # What follows runs in trio's thread.

    def _run(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> None:
        self._outcome = outcome.capture(trio.run, self._main, open_value)
        self._post(self._end)

    def _end(self) -> None:
        """Runs in the loop."""
        self._ended = True
        self._news.set()

    async def _main(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._left:
            return
        with self._scope:
            async with open_value() as value, background_nursery() as nursery:
                self._value, self._nursery = value, nursery
                self._post(self._news.set)
                try:
                    await self._leaving.wait()
                finally:
                    self._nursery = None

    def _leave(self) -> None:
        if self._nursery is None:
            self._scope.cancel()  # still being opened, or already closing
        self._leaving.set()
        self._scope.deadline = trio.current_time() + LEAVE_SECONDS

    def _begin(self, call: _Call[T]) -> None:
        if self._nursery is None:
            self._post(call.end)
        else:
            self._nursery.start_soon(call.run, self._post)

    def _post(self, function: Callable[[], object]) -> None:
        """Call `function` in the loop."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop was closed without leaving: nobody is there any more
            self._scope.cancel()


class _Call(Generic[T]):
    """One call on its way through trio.  news: set at its end, and before for whoever wants to."""

    def __init__(self, function: Callable[[], Awaitable[T]], news: asyncio.Event) -> None:
        self._function = function
        self._outcome: outcome.Outcome[T] | None = None
        self._news = news
        self.scope = trio.CancelScope()
        self.over = False

    async def run(self, post: Callable[[Callable[[], object]], None]) -> None:
        """Runs in trio: wait for the function and say when it is over."""
        try:
            with self.scope:
                self._outcome = outcome.Value(await self._function())
        except Exception as error:  # noqa: BLE001  raised again by `result`, where the caller is
            self._outcome = outcome.Error(error)
        finally:
            post(self.end)

    def end(self) -> None:
        """Runs in the loop."""
        self.over = True
        self._news.set()

    async def until_over(self) -> None:
        """Return when `run` has ended."""
        while not self.over:
            self._news.clear()
            await self._news.wait()

    def result(self) -> T:
        """What the function returned; raises what it raised, RuntimeError when it was cut short."""
        if self._outcome is None:
            raise RuntimeError("the swarm was left, or has failed, before this call could end")
        return self._outcome.unwrap()


class _Queue(Generic[T]):
    """Items from trio to asyncio.  A deque needs no lock where one thread appends and one takes."""

    def __init__(self) -> None:
        self.items: deque[T] = deque()
        self._room = trio.Event()

    @property
    def was_full(self) -> bool:
        """Whether the item just taken may be what `fill` waits for.

        To be asked after taking: `fill` may append between a look at the length and the taking.
        """
        return len(self.items) >= TOKENS_AHEAD - 1

    async def fill(self, items: AsyncGenerator[T, None], tell: Callable[[], object]) -> None:
        """Runs in trio: append all of `items`, `tell` after each, wait while TOKENS_AHEAD are not taken."""
        async with aclosing(items):
            async for item in items:
                self.items.append(item)
                tell()
                while len(self.items) >= TOKENS_AHEAD:
                    self._room = trio.Event()
                    await self._room.wait()

    def make_room(self) -> None:
        """Runs in trio."""
        self._room.set()
