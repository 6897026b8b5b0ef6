"""A swarm for an asyncio program: trio runs in a thread of its own, and each call crosses once.

    asyncio thread                               trio thread
    await swarm.route()     -- run_sync_soon -->  a task in the nursery of the calls
                        <-- call_soon_threadsafe --  its result or its exception
    swarm.generate(...)     -- run_sync_soon -->  a task that iterates `Swarm.generate`
                        <-- call_soon_threadsafe --  each token, through a queue of TOKENS_AHEAD

Whatever ends a call on the asyncio side (a cancellation, a closed generator, the end of the `async
with`) cancels its task on the trio side and waits until that has ended, so nothing is left behind.

The way across is made of the two calls that the loops have for it and of nothing else.  There and
back takes 120-180 us on two busy cores, under asyncio as under uvloop; through anyio's blocking
portal it was 2.5 times as long, and the queue would still have been ours to write.  A token on its
way back costs 25-40 us.

asyncio is named here alone; any loop will do, uvloop too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar, Unpack

import outcome
import trio

from node.tasks import background_nursery

if TYPE_CHECKING:
    from torch import Tensor

    from client.connect import ClientConfig, Swarm
    from client.generate import Token
    from client.generation_config import Settings
    from client.options import Sampling
    from client.retry import Context
    from client.session import Session, StepTimes
    from client.trace import Trace
    from node.model.ends import Ends
    from node.model.info import ModelInfo
    from routing.hops import Chain
    from routing.swarm import SwarmView
    from tensor_codec.messages import Reply

log = logging.getLogger("raceme")

T = TypeVar("T")
V = TypeVar("V")

TOKENS_AHEAD = 8  # of one generation, that its consumer has not taken yet
LEAVE_SECONDS = 10.0  # for the trio side to say its goodbyes, which have deadlines of their own
END_SECONDS = 1.0  # for what is cancelled then to unwind


@asynccontextmanager
async def open_bridge(
    config: ClientConfig,
    open_swarm: Callable[[ClientConfig], AbstractAsyncContextManager[Swarm]] | None = None,
) -> AsyncIterator[BridgedSwarm]:
    """The asyncio side of `connect`.  Raises what `open_swarm` raises: ConfigError.

    open_swarm: runs in the trio thread; by default `client.connect.open_swarm`.
    Leaving takes LEAVE_SECONDS and END_SECONDS at the most.
    """
    if open_swarm is None:
        from client.connect import open_swarm as open_real_swarm

        open_swarm = open_real_swarm
    thread: TrioThread[BridgedSwarm] = TrioThread()
    swarm = await thread.enter(partial(_open_bridged, open_swarm(config), thread))
    try:
        yield swarm
    finally:
        await thread.leave()


@asynccontextmanager
async def _open_bridged(
    opened: AbstractAsyncContextManager[Swarm], thread: TrioThread[BridgedSwarm]
) -> AsyncIterator[BridgedSwarm]:
    async with opened as swarm, background_nursery() as nursery:
        bridged = BridgedSwarm(swarm, thread)
        nursery.start_soon(bridged._follow_view)
        yield bridged


class BridgedSwarm:
    """A swarm that runs in a trio thread.  Made by `open_bridge`.

    Each method does what that of `client.connect.Swarm` does, and raises the same.  A call that
    the end of the `async with` overtakes, or that comes after it, raises RuntimeError.
    """

    def __init__(self, swarm: Swarm, thread: TrioThread[BridgedSwarm]) -> None:
        self._swarm = swarm
        self._thread = thread
        self._view = swarm.view()

    @property
    def config(self) -> ClientConfig:
        """How the swarm was joined."""
        return self._swarm.config

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._swarm.info

    @property
    def ends(self) -> Ends:
        """The model's embeddings, head and tokenizer: plain functions, to be called from here."""
        return self._swarm.ends

    def view(self) -> SwarmView:
        """See `Swarm.view`."""
        return self._view

    async def changed(self, since: SwarmView) -> None:
        """See `Swarm.changed`."""

        async def changed() -> None:
            await self._swarm.changed(since)
            self._view = self._swarm.view()

        await self._thread.call(changed)

    async def route(self) -> Chain:
        """See `Swarm.route`."""
        return await self._thread.call(self._swarm.route)

    async def chains(self, most: int) -> list[Chain]:
        """See `Swarm.chains`."""
        return await self._thread.call(partial(self._swarm.chains, most))

    def generate(
        self,
        prompt: Any,  # Any: text, or token ids in whatever holds them
        *,
        max_new_tokens: SupportsIndex | None = None,
        stop: str | Iterable[str] | None = (),
        context: BridgedConversation | None = None,
        trace: Trace | None = None,
        generation_config: Any = None,  # Any: transformers' GenerationConfig is untyped
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Token, None]:
        """See `Swarm.generate`.  At most TOKENS_AHEAD tokens wait for a consumer that is slow."""
        # The call itself only checks and tokenizes; what needs trio begins with the first token.
        tokens = self._swarm.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            context=context._context if context is not None else None,
            trace=trace,
            generation_config=generation_config,
            **sampling,
        )
        return self._thread.iterate(tokens)

    def settings(
        self,
        prompt: Any,  # Any: text, or token ids in whatever holds them
        *,
        max_new_tokens: SupportsIndex | None = None,
        stop: str | Iterable[str] | None = (),
        context: BridgedConversation | None = None,
        generation_config: Any = None,  # Any: transformers' GenerationConfig is untyped
        **sampling: Unpack[Sampling],
    ) -> Settings:
        """See `Swarm.settings`."""
        return self._swarm.settings(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            context=context._context if context is not None else None,
            generation_config=generation_config,
            **sampling,
        )

    def usual_length(self, batch: int = 1) -> int:
        """See `Swarm.usual_length`."""
        return self._swarm.usual_length(batch)

    def conversation(
        self, max_length: int | None = None, *, trace: Trace | None = None
    ) -> BridgedConversation:
        """See `Swarm.conversation`."""
        return BridgedConversation(self._swarm.conversation(max_length, trace=trace), self._thread)

    async def forward(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Swarm.forward`."""
        return await self._thread.call(partial(self._swarm.forward, hidden, start=start, stop=stop))

    async def backward(
        self, hidden: Tensor, grad: Tensor, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """See `Swarm.backward`."""
        return await self._thread.call(partial(self._swarm.backward, hidden, grad, start=start, stop=stop))

    @asynccontextmanager
    async def session(
        self, *, batch: int = 1, max_length: int | None = None
    ) -> AsyncIterator[BridgedSession]:
        """See `Swarm.session`."""

        async def held() -> AsyncGenerator[Session, None]:
            async with self._swarm.session(batch=batch, max_length=max_length) as session:
                yield session
                await trio.sleep_forever()

        async with aclosing(self._thread.iterate(held())) as sessions:
            yield BridgedSession(await anext(sessions), self._thread)

    async def _follow_view(self) -> None:
        """Runs in trio: keep the view where `view` can take it without crossing."""
        while True:
            self._view = self._swarm.view()
            await self._swarm.changed(self._view)


class BridgedConversation:
    """For `generate(context=...)`.  Made by `BridgedSwarm.conversation`."""

    def __init__(self, context: Context, thread: TrioThread[BridgedSwarm]) -> None:
        self._context = context
        self._thread = thread

    @property
    def trace(self) -> Trace:
        """What happened to its session."""
        return self._context.trace

    def close(self) -> None:
        """End the session; returns at once."""
        self._thread.soon(self._context.close)


class BridgedSession:
    """A session for hidden states.  Made by `BridgedSwarm.session`."""

    def __init__(self, session: Session, thread: TrioThread[BridgedSwarm]) -> None:
        self._session = session
        self._thread = thread

    @property
    def chain(self) -> Chain:
        """The hops that it runs along."""
        return self._session.chain

    @property
    def length(self) -> int:
        """Positions in the hops' caches."""
        return self._session.length

    @property
    def times(self) -> StepTimes | None:
        """Where the time of the last step went."""
        return self._session.times

    @property
    def trace(self) -> Trace:
        """What happened to it."""
        return self._session.trace

    async def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """See `Session.step`."""
        step = partial(self._session.step, hidden, position, reply, seconds=seconds, rope_length=rope_length)
        return await self._thread.call(step)


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
