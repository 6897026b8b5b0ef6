"""A trio event loop in a thread of its own: the trio side of every bridge.

    caller's thread                              trio's thread
    a call               -- run_sync_soon -->    a task in the nursery of the calls
                         <-- post --             its result or its exception
    a generator          -- run_sync_soon -->    a task that iterates `Swarm.generate`
                         <-- post --             each token, through a queue of TOKENS_AHEAD

A portal (`client.bridges.asyncio_swarm`, `client.bridges.sync`) is the caller's side.  Any end of a call
there (a cancellation, a closed generator, Ctrl-C, the end of the `with`) cancels its task here.

The crossing uses only the two calls that the loops have for it: see decision 0001 for the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Generic, Protocol, TypeVar

import outcome
import trio

from node.runtime.nurseries import background_nursery

T = TypeVar("T")
V = TypeVar("V")

TOKENS_AHEAD = 8  # tokens of one generation that wait for their consumer
LEAVE_SECONDS = 10.0  # for the trio side to close its sessions and connections, each with its own deadline
END_SECONDS = 1.0  # for cancelled tasks to unwind


class News(Protocol):
    """An event that a portal waits for: asyncio.Event or threading.Event."""

    def set(self) -> None:
        """Wake the waiting side."""


class TrioThread(Generic[V]):
    """A trio run in a thread of its own that holds one context manager open.

    post: has a function called on the caller's side; raises RuntimeError where that side has ended.
    news: set, on the caller's side, when the context manager is open and when the thread ends.
    `value`, `has_ended` and `begin` are for the caller's side, the methods below them run in trio.
    """

    def __init__(self, post: Callable[[Callable[[], object]], object], news: News) -> None:
        self._post_to_caller = post
        self._news = news
        self._left = False
        self.has_ended = False  # changed on the caller's side alone
        # Changed in trio's thread alone:
        self.value: V | None = None  # None: not open yet
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()  # around everything
        self._leaving = trio.Event()
        self._is_over = False  # trio takes no task any more
        self._nursery: trio.Nursery | None = None  # of the calls; None: none are taken
        self._outcome: outcome.Outcome[None] | None = None

    def start(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> None:
        """Start the thread, which enters `open_value()`."""
        self._thread = threading.Thread(target=self._run, args=(open_value,), name="raceme-trio", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in trio's thread, where it must not wait for that thread."""
        return threading.current_thread() is self._thread

    def soon(self, function: Callable[[], object]) -> bool:
        """Call `function` in trio, without waiting for it.  False: trio has ended."""
        if self._token is None:
            return False
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True

    def begin(self, call: Call[T]) -> None:
        """Start a call; it is over at once where trio has ended."""
        if not self.soon(lambda: self._begin(call)):
            call.end()

    def cancel(self, call: Call[T]) -> bool:
        """Have a call cancelled, begun or not.  False: trio has ended."""
        return self.soon(lambda: call.cancel(self._post))

    def leave(self) -> None:
        """Have the context manager closed; does not wait for it."""
        self._left = True
        self.soon(self._leave)  # where there is no token yet, trio looks at _left

    def join(self) -> None:
        """Wait for the thread, which has ended.  Raises the error of an early end."""
        self._thread.join()
        if self._outcome is not None:
            self._outcome.unwrap()

    # The code below runs in trio's thread.

    def _run(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> None:
        self._outcome = outcome.capture(trio.run, self._main, open_value)
        self._post(self._end)

    def _end(self) -> None:
        """Runs on the caller's side."""
        self.has_ended = True
        self._news.set()

    async def _main(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._left:
            self._is_over = True
            return
        try:
            with self._scope:
                async with open_value() as value, background_nursery() as nursery:
                    self.value, self._nursery = value, nursery
                    self._post(self._news.set)
                    try:
                        await self._leaving.wait()
                    finally:
                        self._nursery = None
        finally:
            self._is_over = True

    def _leave(self) -> None:
        if self._nursery is None:
            self._scope.cancel()  # still being opened, or already closing
        self._leaving.set()
        if not self._is_over:
            trio.lowlevel.spawn_system_task(self._cancel_later)

    async def _cancel_later(self) -> None:
        await trio.sleep(LEAVE_SECONDS)
        self._scope.cancel()

    def _begin(self, call: Call[T]) -> None:
        if self._nursery is None:
            self._post(call.end)
        else:
            call.begin(self._nursery, self._post)

    def _post(self, function: Callable[[], object]) -> None:
        try:
            self._post_to_caller(function)
        except RuntimeError:  # the caller's loop was closed without leaving
            self._scope.cancel()


class Call(Generic[T]):
    """One call on its way through trio.  news: set at its end, and before by a queue."""

    def __init__(self, function: Callable[[], Awaitable[T]], news: News) -> None:
        self._function = function
        self._outcome: outcome.Outcome[T] | None = None
        self._news = news
        self._scope = trio.CancelScope()
        self._has_begun = False  # changed in trio's thread alone
        self._undo: Callable[[T], object] | None = None  # of a caller that has gone
        self.over = False

    def begin(self, nursery: trio.Nursery, post: Callable[[Callable[[], object]], None]) -> None:
        """Runs in trio: start the task that waits for the function."""
        self._has_begun = True
        nursery.start_soon(self._run, post)

    def cancel(self, post: Callable[[Callable[[], object]], None]) -> None:
        """Runs in trio."""
        self._scope.cancel()
        if not self._has_begun:  # an interrupt came before `TrioThread.begin`
            post(self.end)

    async def _run(self, post: Callable[[Callable[[], object]], None]) -> None:
        try:
            with self._scope:
                self._outcome = outcome.Value(await self._function())
        except Exception as error:  # noqa: BLE001  raised again by `result`, where the caller is
            self._outcome = outcome.Error(error)
        finally:
            post(self.end)

    def end(self) -> None:
        """Runs on the caller's side."""
        self.over = True
        self._take_back()
        self._news.set()

    def drop(self, undo: Callable[[T], object] | None) -> None:
        """The caller has gone: `undo` takes the result, where there is one by the end of the call."""
        self._undo = undo
        if self.over:
            self._take_back()

    def _take_back(self) -> None:
        if self._undo is not None and isinstance(self._outcome, outcome.Value):
            self._undo(self._outcome.value)

    def result(self) -> T:
        """The function's result; raises the function's error, or RuntimeError if it was cut short."""
        if self._outcome is None:
            raise RuntimeError("the swarm was left, or has failed, before this call could end")
        return self._outcome.unwrap()


class Queue(Generic[T]):
    """Items from trio to the caller.  A deque needs no lock where one thread appends and one takes."""

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


async def held(manager: AbstractAsyncContextManager[T]) -> AsyncGenerator[T, None]:
    """Runs in trio: the value of a context manager, which ends when this generator is closed."""
    async with manager as value:
        yield value
        await trio.sleep_forever()


class Portal(Protocol):
    """A caller's side, as proxies use it: its answers are awaited under asyncio, and plain in `sync`."""

    def call(
        self,
        function: Callable[[], Awaitable[Any]],
        undo: Callable[[Any], object] | None = None,
    ) -> Any:  # Any: the function's result
        """The result of `await function()` in trio.  undo: takes a result whose caller has gone meanwhile."""

    def iterate(self, items: AsyncGenerator[Any, None]) -> Any:
        """The items that `items` yields in trio, as a generator of the caller's kind."""

    def hold(self, manager: AbstractAsyncContextManager[Any], wrap: Callable[[Any], Any]) -> Any:
        """A context manager of the caller's kind around one of trio; gives `wrap` of its value."""

    def soon(self, function: Callable[[], object]) -> bool:
        """See `TrioThread.soon`."""
