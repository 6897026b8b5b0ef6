"""The sender's journal: outputs that were sent on, kept as long as they may have to be sent again.

A hop that replaces a dead one needs the dead hop's inputs.  Their sender keeps them: each hop for the next
one, the client for the first (docs/decisions/0003).  The journal holds encoded hidden states, byte for byte
as they went out, so a replay gives equal caches.  Where a session reorders its rows the journal keeps the
orders beside the rows, and applies them only when it is read (docs/decisions/0019).

A journal reserves its address space when its session opens, and takes memory only as it is used.  A step
costs one copy of a few KiB, no allocation, and no move of earlier bytes.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensor_codec.errors import LocalProtocolError, Refused
from tensor_codec.frame import Buffer
from tensor_codec.memory import set_aside

_DROPPED_AT_ONCE = 64  # positions: whole pages of memory, and no drop at the next token
_ORDER_BYTES = 256  # of one order of rows, besides 2 bytes a row


class RowOrder(NamedTuple):
    """Row i of the positions [0, position) became the former row rows[i], by the order of a step."""

    position: int
    step: int
    rows: NDArray[np.uint16]


class Journal:
    """Rows of hidden states for the positions [start, stop) of one session.

    start: earlier positions have been dropped.  batch: rows of each position.
    pinned: nothing is dropped, because the client counts on the positions that it was told of.
    orders: of rows, by position and by step, ascending; no two have one position, but the last two may.
    order_tokens: as many tokens take the memory of one order.
    reordered: orders of rows were ever kept here.
    """

    def __init__(self, batch: int, row_bytes: int, max_length: int) -> None:
        """row_bytes: of one position of all rows.  Raises Refused where there is no memory."""
        self.batch = batch
        self.row_bytes = row_bytes
        self.max_length = max_length
        self.start = 0
        self.stop = 0
        self.pinned = False
        self.reordered = False
        self._changed = max_length  # positions from here on were replaced or forgotten
        # (first position, rope_length from there on), ascending: one item but for models that need more.
        self._ropes: list[tuple[int, int]] = [(0, 0)]
        self.orders: list[RowOrder] = []
        self.order_tokens = -(-(_ORDER_BYTES + 2 * batch) * batch // row_bytes)  # as many take its memory
        try:
            self._memory = set_aside(row_bytes * max_length)
        except MemoryError as error:
            raise Refused(f"a journal of {max_length} positions: {error}") from None

    @property
    def tokens(self) -> int:
        """Positions times rows that are held, and what orders of rows take beside them."""
        return (self.stop - self.start) * self.batch + len(self.orders) * self.order_tokens

    def append(self, position: int, tokens: int, body: Buffer, rope_length: int = 0) -> None:
        """Keep `body` [batch, tokens, hidden], the positions from `position` on, and drop later ones.

        rope_length: of the step (see `tensor_codec.messages.contract.StepRange`).  Where positions are left
        out the journal begins anew.
        """
        if position + tokens > self.max_length:
            raise LocalProtocolError(f"{position + tokens} positions in a journal of {self.max_length}")
        if not self.start <= position <= self.stop:
            self._free(self.start, self.stop)
            self.start = position
            self.orders.clear()
        if self.orders and position < self.orders[-1].position:
            self._cut_orders(position)
        if position < self.stop:
            self._changed = min(self._changed, position)
        begin, size = position * self.row_bytes, tokens * self.row_bytes
        if tokens > 1 and self.batch > 1:
            rows = np.frombuffer(body, np.uint8).reshape(self.batch, tokens, -1)
            body = rows.transpose(1, 0, 2).tobytes()
        self._memory[begin : begin + size] = body
        self.stop = position + tokens
        if position < self._ropes[-1][0]:
            self._forget_ropes(position)
        if self._ropes[-1][1] != rope_length:
            self._forget_ropes(position)
            self._ropes.append((position, rope_length))

    def reorder(self, position: int, step: int, rows: tuple[int, ...]) -> None:
        """Row i of positions [0, position) becomes the former row rows[i]; the session goes on from there.

        step: whose order it is; all orders before it are final.
        """
        position, self.reordered = min(position, self.stop), True
        self._cut_orders(position)
        if position > self.start:
            self.orders.append(RowOrder(position, step, np.array(rows, np.uint16)))

    def take_changed(self) -> int:
        """The first position that was replaced or forgotten since this was last asked, or `max_length`."""
        changed, self._changed = self._changed, self.max_length
        return changed

    def take_back_orders(self, step: int) -> None:
        """Forget the orders of rows of this step and of later ones: nobody waits for them any more."""
        while self.orders and self.orders[-1].step >= step:
            self.orders.pop()

    def adopt_orders(self, other: Journal) -> None:
        """Take the orders of rows of a journal that holds the same positions."""
        self.orders = list(other.orders)

    def read(self, start: int, stop: int, before: int | None = None) -> Buffer:
        """The positions [start, stop): [batch, stop - start, hidden].

        As they went out, each row in the place where the orders of rows since then have put it.
        before: only by the orders of steps below this number; 0: by none; None: by all.
        """
        if not self.start <= start < stop <= self.stop:
            raise LocalProtocolError(f"positions {start}:{stop} of a journal of {self.start}:{self.stop}")
        found = memoryview(self._memory)[start * self.row_bytes : stop * self.row_bytes]
        if self.batch == 1 or (stop - start == 1 and not self.orders):
            return found
        rows = np.frombuffer(found, np.uint8).reshape(stop - start, self.batch, -1)
        if self.orders:
            rows = rows[np.arange(stop - start)[:, None], self._sources(start, stop, before)]
        return rows.transpose(1, 0, 2).tobytes()

    def _sources(self, start: int, stop: int, before: int | None) -> NDArray[np.uint16]:
        """The row that each row of the positions [start, stop) was when it went out: [positions, batch]."""
        sources = np.empty((stop - start, self.batch), np.uint16)
        order, end = np.arange(self.batch, dtype=np.uint16), stop
        for at, step, rows in reversed(self.orders):
            if at <= start:
                break
            if before is None or step < before:
                if at < end:
                    sources[at - start : end - start] = order
                    end = at
                order = rows[order]
        sources[: end - start] = order
        return sources

    def parts(self, start: int, stop: int, max_positions: int) -> Iterator[tuple[int, int, int]]:
        """[start, stop) in parts of at most `max_positions`: start, stop and rope_length of each."""
        while start < stop:
            index = bisect_right(self._ropes, start, key=lambda run: run[0]) - 1
            until = self._ropes[index + 1][0] if index + 1 < len(self._ropes) else stop
            end = min(start + max_positions, stop, until)
            yield start, end, self._ropes[index][1]
            start = end

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if length < self.stop:
            self._changed = min(self._changed, length)
        self._free(max(length, self.start), self.stop)
        self.stop = min(self.stop, length)
        self.start = min(self.start, self.stop)
        if self.orders and length < self.orders[-1].position:
            self._cut_orders(length)

    def drop(self, tokens: int) -> None:
        """Forget at least `tokens` of the oldest tokens, or all, and move `start`."""
        positions = max(-(-tokens // self.batch), _DROPPED_AT_ONCE)
        start = min(self.stop, self.start + positions)
        self._free(self.start, start)
        self.start = start
        self.orders = [order for order in self.orders if order.position > start]

    def give_back(self, stop: int) -> None:
        """Give the memory of the positions before `stop` back: they are not read again."""
        self._free(self.start, stop)

    def _cut_orders(self, position: int) -> None:
        """Make one order, over the positions before `position`, of all that reach as far or farther."""
        rows = np.arange(self.batch, dtype=np.uint16)
        step = -1
        while self.orders and self.orders[-1].position >= position:
            _, number, earlier = self.orders.pop()
            rows, step = earlier[rows], max(step, number)
        if step >= 0 and position > self.start:
            self.orders.append(RowOrder(position, step, rows))

    def _forget_ropes(self, position: int) -> None:
        while self._ropes and self._ropes[-1][0] >= position:
            self._ropes.pop()
        if not self._ropes:
            self._ropes.append((0, 0))

    def _free(self, start: int, stop: int) -> None:
        """Give the memory of these positions back, in whole pages."""
        page = mmap.PAGESIZE
        begin = -(-start * self.row_bytes // page) * page
        end = stop * self.row_bytes // page * page
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass(slots=True)
class JournalBudget:
    """The journals of a node; together they hold at most `tokens` tokens.

    Beyond that the longest journal that is not pinned loses its oldest positions.  Its session goes on; only
    a replay has to compute those positions once more (see `client.session.repair.replay_plan`).
    """

    tokens: int
    _journals: dict[Hashable, Journal] = field(default_factory=dict)
    _held: int = 0

    @property
    def held(self) -> int:
        """Tokens in all journals."""
        return self._held

    def open(self, session: Hashable, batch: int, row_bytes: int, max_length: int) -> Journal:
        """An empty journal.  Raises Refused where there is no memory."""
        if session in self._journals:
            raise LocalProtocolError("a session has a journal already")
        journal = self._journals[session] = Journal(batch, row_bytes, max_length)
        return journal

    def append(
        self, journal: Journal, position: int, tokens: int, body: Buffer, rope_length: int = 0
    ) -> None:
        """See `Journal.append`; drops positions of other journals where the budget is used up."""
        before, orders = journal.stop - journal.start, len(journal.orders)
        journal.append(position, tokens, body, rope_length)
        self._held += (journal.stop - journal.start - before) * journal.batch
        self._held += (len(journal.orders) - orders) * journal.order_tokens
        if self._held > self.tokens:
            self._make_room()

    def reorder(self, journal: Journal, position: int, step: int, rows: tuple[int, ...]) -> None:
        """See `Journal.reorder`; drops positions as `append` does."""
        before = journal.tokens
        journal.reorder(position, step, rows)
        self._held += journal.tokens - before
        if self._held > self.tokens:
            self._make_room()

    def _make_room(self) -> None:
        while self._held > self.tokens:
            loose = (one for one in self._journals.values() if not one.pinned)
            longest = max(loose, key=lambda one: one.tokens, default=None)
            if longest is None or not longest.tokens:
                break  # pinned journals do not grow
            before = longest.tokens
            longest.drop(self._held - self.tokens)
            self._held -= before - longest.tokens

    def replace(self, session: Hashable, journal: Journal) -> None:
        """Keep `journal` in place of a session's own: equal positions, in another codec."""
        self._held += journal.tokens - self._journals[session].tokens
        self._journals[session] = journal

    def cut(self, journal: Journal, length: int) -> None:
        """See `Journal.cut`."""
        before = journal.tokens
        journal.cut(length)
        self._held -= before - journal.tokens

    def close(self, session: Hashable) -> None:
        """Forget a session's journal."""
        journal = self._journals.pop(session, None)
        if journal is not None:
            self._held -= journal.tokens
