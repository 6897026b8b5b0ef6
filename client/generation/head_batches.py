"""The head for many generations: those that wait for logits at the same time get them together.

A head reads its whole matrix, whether for one hidden state or for eight: 113 MB and 7 ms for one and
10 ms for eight with SmolLM2-135M in float32 on one core (1.4 and 3.9 where only the likeliest token is
wanted, see node/model/weights/argmax_head.py).  What is merged is decided as late
as can be, when the torch thread takes up the next batch; nobody waits for others to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import outcome
import torch
from torch import Tensor

from node.model.embed_and_head import EmbedAndHead
from node.runtime.compute_thread import ComputeThread

T = TypeVar("T")

# Beyond these a row gets hardly cheaper, and the first ones of more would only come back later.
MAX_ROWS = 8


class HeadBatches:
    """Norm and head of a model, for all generations of a process.

    Promises, checked by tests/io/test_head_batches.py:
      * everybody gets the answer to his own hidden state, in the order of asking;
      * an error of one, or its cancellation, is nobody else's.
    """

    def __init__(self, local_model: EmbedAndHead, compute: ComputeThread, most_rows: int = MAX_ROWS) -> None:
        """most_rows: hidden states in one batch."""
        self._local_model = local_model
        self._compute = compute
        self._most_rows = most_rows
        self._waiting: deque[_Asked[object]] = deque()  # filled here, emptied in the torch thread

    async def pick(
        self, read: Callable[[], Tensor], pick: Callable[[Tensor], T], *, best_only: bool = False
    ) -> T:
        """pick(logits float32 [vocabulary]) after the last position of read() [1, tokens, hidden].

        best_only: `pick` wants to know which is the largest and no more; others may be -inf.
        Both run in the torch thread; what either raises is raised here.
        """
        asked: _Asked[T] = _Asked(read, pick, best_only)
        # No await in between: whoever is first among those that wait is first in the thread's queue.
        self._waiting.append(asked)  # type: ignore[arg-type]  # what it picks is its own affair
        try:
            return await self._compute.run(self._answer, asked)
        finally:
            asked.wanted = False

    def _answer(self, asked: _Asked[T]) -> T:
        """Runs in the torch thread: the answer, which the batch of somebody before may have brought."""
        if asked.answer is None:
            self._compute_batch()
        assert asked.answer is not None
        return asked.answer.unwrap()

    def _compute_batch(self) -> None:
        """Answer those who have waited longest."""
        batch: list[_Asked[object]] = []
        rows: list[Tensor] = []
        while self._waiting and len(rows) < self._most_rows:
            asked = self._waiting.popleft()
            if not asked.wanted:
                continue
            hidden = outcome.capture(asked.read)
            if isinstance(hidden, outcome.Error):
                asked.answer = hidden
                continue
            batch.append(asked)
            rows.append(hidden.unwrap()[:, -1:])
        if not batch:
            return
        # The head knows no positions, so rows of different sessions go beside each other: [rows, 1, hidden].
        best_only = all(asked.best_only for asked in batch)
        logits = outcome.capture(partial(self._local_model.head, torch.cat(rows), best_only=best_only))
        if isinstance(logits, outcome.Error):  # our own bug, and as much the one's as the other's
            for asked in batch:
                asked.answer = outcome.Error(logits.error)
            return
        for asked, row in zip(batch, logits.unwrap()[:, -1], strict=True):
            asked.answer = outcome.capture(asked.pick, row)


class _Asked(Generic[T]):
    """One who waits.  answer: set in the torch thread; wanted: until its caller has it or is cancelled."""

    __slots__ = ("answer", "best_only", "pick", "read", "wanted")

    def __init__(self, read: Callable[[], Tensor], pick: Callable[[Tensor], T], best_only: bool) -> None:
        self.read = read
        self.pick = pick
        self.best_only = best_only
        self.answer: outcome.Outcome[T] | None = None
        self.wanted = True
