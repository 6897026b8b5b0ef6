"""The head for many generations: generations that wait for logits at one moment share a batch.

A head reads its whole matrix, whether for one hidden state or for eight: 113 MB and 7 ms for one and
10 ms for eight with SmolLM2-135M in float32 on one core (1.4 and 3.9 ms where only the likeliest token is
wanted, see node/model/weights/argmax_head.py).  The batch is assembled as late as possible, when the torch
thread takes it; no generation waits for others.  Of the generations that wait one has the batch computed, and
wakes those that it answered: a batch costs one way into the thread and back, and not each row of it.

One generation alone, whose likeliest token is found within INLINE_SECONDS, has it computed in the event
loop's own thread: the way into the torch thread and back takes 0.1 to 0.4 ms of a token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, Protocol, TypeVar

import outcome
import torch
import trio
from torch import Tensor

from node.runtime.compute_thread import Runner

T = TypeVar("T")

# Beyond this number a row gets hardly cheaper, and the first rows would only come back later.
MAX_ROWS = 8
# An event loop that is kept for so long still answers pings in time; with a large head it would not.
INLINE_SECONDS = 0.003
TIMED = 8  # the shortest of so many heads is the usual one: others were interrupted


class Head(Protocol):
    """The part of `node.model.embed_and_head.EmbedAndHead` that makes logits."""

    @property
    def finds_best(self) -> bool:
        """Whether any thread may call `best_of` at any time."""

    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        """Norm and head: [rows, tokens, hidden] -> float32 [rows, tokens, vocabulary].

        best_only: the place of the largest logit is wanted alone; others may be -inf.
        """

    def best_of(self, hidden: Tensor) -> int:
        """The place of the first largest logit after one hidden state float32 [1, 1, hidden]."""

    def bests_of(self, hidden: Tensor) -> list[int]:
        """The same of each row [rows, 1, hidden]; where `finds_best`."""


class HeadBatches:
    """Norm and head of a model, for all generations of a process.

    Promises, checked by tests/io/test_head_batches.py:
      * each caller gets the answer to its own hidden state, in the order of asking;
      * an error of one caller, or its cancellation, reaches no other caller;
      * nothing is computed in the event loop's thread but a likeliest token, and that only where heads have
        been quick and no second generation is under way.
    """

    def __init__(
        self,
        local_model: Head,
        compute: Runner,
        max_rows: int = MAX_ROWS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """max_rows: hidden states in one batch."""
        self._local_model = local_model
        self._compute = compute
        self._max_rows = max_rows
        self._clock = clock
        self._waiting: deque[_Request[object]] = deque()  # filled here, emptied in the torch thread
        self._asked: list[_Request[object]] = []  # those without an answer, the oldest first
        self._is_computing = False  # one of them has a batch computed
        self._seconds: deque[float] = deque(maxlen=TIMED)  # of the last heads of one row, for the best alone
        self._generations = 0

    @contextmanager
    def generation(self) -> Iterator[None]:
        """A generation is under way, and will want the head soon."""
        self._generations += 1
        try:
            yield
        finally:
            self._generations -= 1

    async def pick(
        self,
        read: Callable[[], Tensor],
        pick: Callable[[Tensor], T],
        best: Callable[[int], T] | None = None,
    ) -> T:
        """pick(logits float32 [vocabulary]) after the last position of read() [1, tokens, hidden].

        best: where the place of the largest logit is all that is needed: called with it in place of `pick`.
        All run in the torch thread, or here, see above; an error of any is raised here.
        """
        if best is not None and self._is_quick():
            return best(self._best_of(read()))
        request: _Request[T] = _Request(read, pick, best)
        # No await in between: the first waiting caller is the first in the thread's queue.
        self._waiting.append(request)  # type: ignore[arg-type]  # the type of its answer stays its own
        self._asked.append(request)  # type: ignore[arg-type]
        try:
            while request.answer is None:
                if self._is_computing:
                    await request.wait()
                else:
                    await self._have_computed()
        finally:
            if request.answer is None:
                request.drop()
                self._settle()
        return request.answer.unwrap()

    async def bests(self, hidden: Tensor) -> list[int] | None:
        """The place of the largest logit after each position of float32 [1, tokens, hidden].

        None where each position is to be asked for by itself: its logits could differ in a batch.
        """
        if not self._local_model.finds_best:
            return None
        return await self._compute.run(self._local_model.bests_of, hidden[0, :, None])

    async def _have_computed(self) -> None:
        """Have one batch computed, of those who wait by then, and wake them."""
        self._is_computing = True
        try:
            await self._compute.run(self._compute_batch)
        finally:
            self._is_computing = False
            self._settle()

    def _settle(self) -> None:
        """Wake those that have their answers, and the oldest of the others where nobody computes for them."""
        asked, self._asked = self._asked, []
        for request in asked:
            if request.answer is not None:
                request.wake()
            elif request.is_wanted:
                self._asked.append(request)
        if self._asked and not self._is_computing:
            self._asked[0].wake()

    def _is_quick(self) -> bool:
        """Whether one likeliest token may be computed in the event loop's thread now."""
        alone = self._generations < 2 and not self._waiting and self._local_model.finds_best
        return alone and bool(self._seconds) and min(self._seconds) <= INLINE_SECONDS

    def _best_of(self, hidden: Tensor) -> int:
        began = self._clock()
        place = self._local_model.best_of(hidden)
        self._seconds.append(self._clock() - began)
        return place

    def _compute_batch(self) -> None:
        """Answer the requests that have waited longest."""
        batch: list[_Request[object]] = []
        rows: list[Tensor] = []
        while self._waiting and len(rows) < self._max_rows:
            request = self._waiting.popleft()
            if not request.is_wanted:
                continue
            hidden = outcome.capture(request.read)
            if isinstance(hidden, outcome.Error):
                request.settle(hidden)
            else:
                batch.append(request)
                rows.append(hidden.unwrap()[:, -1:])
        if not batch:
            return None
        # The head knows no positions, so rows of several sessions make one batch: [rows, 1, hidden].
        best_only = all(request.best is not None for request in batch)
        if best_only and len(batch) == 1:
            return batch[0].settle_best(outcome.capture(self._best_of, rows[0]))
        if best_only and self._local_model.finds_best:
            found = outcome.capture(self._local_model.bests_of, torch.cat(rows))
            if isinstance(found, outcome.Error):  # as below
                return _fail(batch, found.error)
            for request, place in zip(batch, found.unwrap(), strict=True):
                request.settle_best(outcome.Value(place))
            return None
        logits = outcome.capture(partial(self._local_model.head, torch.cat(rows), best_only=best_only))
        if isinstance(logits, outcome.Error):  # our own bug; it fails the whole batch
            return _fail(batch, logits.error)
        for request, row in zip(batch, logits.unwrap()[:, -1], strict=True):
            if request.best is None:
                request.settle(outcome.capture(request.pick, row))
            else:
                request.settle_best(outcome.Value(int(row.numpy().argmax())))
        return None


class _Request(Generic[T]):
    """One caller's hidden state and its answer, which is set in the torch thread.

    is_wanted: until its caller is cancelled.
    """

    __slots__ = ("_news", "answer", "best", "is_wanted", "pick", "read")

    def __init__(
        self, read: Callable[[], Tensor], pick: Callable[[Tensor], T], best: Callable[[int], T] | None
    ) -> None:
        self.read = read
        self.pick = pick
        self.best = best
        self.answer: outcome.Outcome[T] | None = None
        self.is_wanted = True
        self._news: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until its caller is to look again."""
        self._news = trio.Event()
        await self._news.wait()

    def wake(self) -> None:
        """Its caller is to look again, if it waits.  In the event loop's thread."""
        if self._news is not None:
            self._news.set()

    def settle(self, answer: outcome.Outcome[T]) -> None:
        """The answer, or the error in its place."""
        self.answer = answer

    def settle_best(self, place: outcome.Outcome[int]) -> None:
        """The place of the largest logit, or the error in its place."""
        assert self.best is not None
        if isinstance(place, outcome.Error):
            self.answer = place
        else:
            self.answer = outcome.capture(self.best, place.unwrap())

    def drop(self) -> None:
        """Nobody waits for the answer any more."""
        self.is_wanted = False


def _fail(batch: Sequence[_Request[object]], error: BaseException) -> None:
    for request in batch:
        request.settle(outcome.Error(error))
