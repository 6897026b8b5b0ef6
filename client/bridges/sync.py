"""A swarm for scripts and notebooks: trio runs in a thread of its own, and each call blocks its caller."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import trio

from client.api import ConversationLike, SyncSession, SyncSwarm
from client.bridges import trio_thread
from client.bridges.proxy import Proxy, proxy_of
from client.bridges.trio_thread import Call, Queue, TrioThread, held

if TYPE_CHECKING:
    from types import TracebackType

    from client.config import ClientConfig

log = logging.getLogger("raceme")

T = TypeVar("T")
V = TypeVar("V")

HANDLES = {"conversation": ConversationLike, "session": SyncSession, "open_session": SyncSession}
CLOSE_SECONDS = 3.0  # for a generation that is abandoned: the end of its session takes up to 2


def open_sync(
    config: ClientConfig, open_swarm: Callable[[ClientConfig], AbstractAsyncContextManager[Any]]
) -> SyncSwarm:
    """The blocking side of `connect_sync`.  Raises ConfigError, as `open_swarm` does.

    open_swarm: `client.swarm.open_swarm`, which runs in the trio thread.
    The swarm is left by `close`, by the end of the `with`, or at the end of the program.
    """
    portal: BlockingPortal[Any] = BlockingPortal()
    swarm = portal.enter(partial(open_swarm, config))
    return cast(SyncSwarm, proxy_of(swarm, SyncSwarm, portal, HANDLES, SwarmHandle))


class SwarmHandle(Proxy):
    """A swarm that is left by `close` and by the end of a `with`."""

    def run(self, function: Callable[[Any], Awaitable[T]]) -> T:
        """The result of `await function(swarm)` in the swarm's event loop, with its trio handle."""
        return cast("BlockingPortal[Any]", self._portal).call(partial(function, self._target))

    def close(self) -> None:
        """Leave the swarm; takes up to LEAVE_SECONDS and END_SECONDS."""
        cast("BlockingPortal[Any]", self._portal).leave()

    def __enter__(self) -> SwarmHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrioSide(Protocol):
    """The trio side of blocking calls: a `TrioThread`, or a `SwarmSide`."""

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in trio's thread."""

    def soon(self, function: Callable[[], object]) -> bool:
        """See `TrioThread.soon`."""

    def begin(self, call: Call[Any]) -> None:
        """See `TrioThread.begin`."""

    def cancel(self, call: Call[Any]) -> bool:
        """See `TrioThread.cancel`."""


class SwarmSide:
    """The trio side of a program's own run: the swarm was opened in it by `async with client.connect`.

    token: of the run.  nursery: of the swarm; its end ends the calls.
    """

    def __init__(self, token: trio.lowlevel.TrioToken, nursery: trio.Nursery) -> None:
        self._token = token
        self._nursery = nursery

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in trio's thread."""
        try:
            return trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            return False

    def soon(self, function: Callable[[], object]) -> bool:
        """See `TrioThread.soon`."""
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True

    def begin(self, call: Call[Any]) -> None:
        """See `TrioThread.begin`."""
        if not self.soon(partial(self._begin, call)):
            call.end()

    def cancel(self, call: Call[Any]) -> bool:
        """See `TrioThread.cancel`."""
        return self.soon(partial(call.cancel, _at_once))

    def _begin(self, call: Call[Any]) -> None:
        try:
            call.begin(self._nursery, _at_once)
        except RuntimeError:  # the swarm was left, and its nursery is closed
            call.end()


class BlockingCalls:
    """Blocking calls into a trio run: from any number of threads at a time, but for trio's own.

    Every wait may be ended by Ctrl-C.  A call that ends early waits until its task in trio has ended.
    """

    def __init__(self, side: TrioSide) -> None:
        self._side = side
        self._process = os.getpid()

    def call(self, function: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None) -> T:
        """See `Portal.call`."""
        news = threading.Event()
        call = Call(function, news)
        try:
            self._start(call)
            _wait(call, news)
        except BaseException:
            call.drop(undo)
            self._cancel(call, news)
            raise
        return call.result()

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """The items that `items` yields in trio.  A generator that is closed or dropped closes `items`."""
        queue: Queue[T] = Queue()
        news = threading.Event()
        call = Call(partial(queue.fill, items, news.set), news)
        thread, seconds = threading.get_ident(), math.inf
        try:
            self._start(call)
            while True:
                news.clear()
                while queue.items:
                    item = queue.items.popleft()
                    if queue.was_full:
                        self.soon(queue.make_room)
                    yield item
                    thread = threading.get_ident()
                if call.over and not queue.items:
                    break
                news.wait()
        except GeneratorExit:
            # A garbage collection closes a dropped generator in any thread, at any line.  torch's and
            # trio's threads must not wait for trio, and no other wait may be without an end.
            seconds = CLOSE_SECONDS if threading.get_ident() == thread else 0.0
            raise
        finally:
            self._cancel(call, news, seconds)
        call.result()

    @contextmanager
    def hold(self, manager: AbstractAsyncContextManager[T], wrap: Callable[[T], Any]) -> Iterator[Any]:
        """`wrap` of the manager's value in trio, until the end of the block."""
        with closing(self.iterate(held(manager))) as values:
            yield wrap(next(values))

    def soon(self, function: Callable[[], object]) -> bool:
        """See `TrioThread.soon`."""
        return self._side.soon(function)

    def _start(self, call: Call[T]) -> None:
        if self._side.is_current:
            call.end()
            raise RuntimeError("a blocking call in the swarm's own thread would wait for ever")
        if os.getpid() != self._process:
            call.end()
            raise RuntimeError("a swarm does not live on in a forked process: connect there")
        self._side.begin(call)

    def _cancel(self, call: Call[T], news: threading.Event, seconds: float = math.inf) -> None:
        """End a call without a caller, and wait up to `seconds` for its cleanup."""
        if not call.over and self._side.cancel(call) and seconds > 0:
            _wait(call, news, seconds)


class BlockingPortal(BlockingCalls, Generic[V]):
    """The blocking side of a `TrioThread`, which it starts and ends."""

    def __init__(self) -> None:
        self._news = threading.Event()  # it is open, or it has ended
        self._thread: TrioThread[V] = TrioThread(_at_once, self._news)
        super().__init__(self._thread)
        self._lock = threading.Lock()
        self._is_open = True

    def enter(self, open_value: Callable[[], AbstractAsyncContextManager[V]]) -> V:
        """Start the thread and enter `async with open_value()` in it; its value.  Raises its errors."""
        self._thread.start(open_value)
        atexit.register(self.leave)
        try:
            self._news.wait()
        except BaseException:  # Ctrl-C
            with suppress(Exception):  # the interrupt counts, not the error of the opening
                self.leave()
            raise
        if self._thread.value is None:
            self.leave()
            raise RuntimeError("the trio thread has ended without saying why")
        return self._thread.value

    def leave(self) -> None:
        """Close the context manager and wait for the thread.  A second call does nothing.

        Raises the error of an early end of the thread.
        """
        with self._lock:
            is_open, self._is_open = self._is_open, False
        if not is_open:
            return
        atexit.unregister(self.leave)
        self._thread.leave()
        deadline = time.monotonic() + trio_thread.LEAVE_SECONDS + trio_thread.END_SECONDS
        while True:
            self._news.clear()
            if self._thread.has_ended:
                break
            if not self._news.wait(deadline - time.monotonic()):
                log.warning("the swarm's thread does not end; it is left running")
                return
        self._thread.join()


def _at_once(function: Callable[[], object]) -> None:
    function()


def _wait(call: Call[T], news: threading.Event, seconds: float = math.inf) -> None:
    """Return when the call is over, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        news.clear()  # before the look: an end that comes after it sets the event again
        if call.over:
            return
        left = deadline - time.monotonic()
        if not news.wait(None if left == math.inf else max(0.0, left)):
            return
