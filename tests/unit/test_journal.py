"""What was sent on is there byte for byte as long as the budget allows, and not a byte longer."""

from __future__ import annotations

import mmap
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tensor_codec.errors import LocalProtocolError
from tensor_codec.journal import Journal, JournalBudget

ROW = 24  # bytes of a position of one row
LENGTH = 200


def body(batch: int, position: int, tokens: int, seed: int = 0) -> bytes:
    """[batch, tokens, ROW]: every row of every position is different."""
    rows = (
        random.Random(f"{seed} {row} {at}").randbytes(ROW)
        for row in range(batch)
        for at in range(position, position + tokens)
    )
    return b"".join(rows)


@pytest.mark.parametrize("batch", [1, 3])
@given(st.lists(st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 40)), max_size=12), st.data())
def test_what_comes_out_is_what_went_in_last(batch, steps, data):
    journal, length = Journal(batch, batch * ROW, LENGTH), 0
    known: dict[int, int] = {}  # position: seed of what was put there last
    for seed, (position, tokens) in enumerate(steps):
        position, tokens = min(position, length), min(tokens, LENGTH - min(position, length))
        journal.append(position, tokens, body(batch, position, tokens, seed))
        length = position + tokens
        known = {at: s for at, s in known.items() if at < position}
        known |= dict.fromkeys(range(position, length), seed)
    assert (journal.start, journal.stop) == (0, length)
    if not length:
        return
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    expected = [body(batch, at, 1, known[at]) for at in range(start, stop)]
    by_row = [one[row * ROW : (row + 1) * ROW] for row in range(batch) for one in expected]
    assert bytes(journal.read(start, stop)) == b"".join(by_row)


def test_a_cut_forgets_what_comes_behind_it():
    journal = Journal(1, 4096, LENGTH)
    journal.append(0, 50, bytes(range(200)) + bytes(50 * 4096 - 200))
    journal.cut(10)
    assert (journal.start, journal.stop, journal.tokens) == (0, 10, 10)
    assert bytes(journal.read(0, 1)[:200]) == bytes(range(200))
    with pytest.raises(LocalProtocolError, match="0:11 of a journal of 0:10"):
        journal.read(0, 11)
    journal.cut(0)
    assert journal.tokens == 0


def test_what_is_dropped_is_the_oldest_and_the_mark_says_so():
    journal = Journal(2, 4096, LENGTH)
    rows = body(2, 0, 150).ljust(150 * 4096, b"x")
    journal.append(0, 150, rows)
    before = bytes(journal.read(100, 150))
    journal.drop(10)
    assert journal.start == 64, "so many at once that it need not be done again at the next token"
    assert bytes(journal.read(100, 150)) == before
    journal.drop(1000)
    assert journal.start == journal.stop == 150
    journal.append(150, 1, rows[:4096])
    assert (journal.start, journal.stop) == (150, 151)
    journal.append(140, 2, rows[: 2 * 4096])
    assert (journal.start, journal.stop) == (140, 142), "a hole makes it begin anew"


@given(st.integers(1, 3 * 4096), st.integers(1, 150))
def test_what_is_not_dropped_stays_byte_for_byte_wherever_pages_of_memory_end(row_bytes, dropped):
    journal = Journal(1, row_bytes, LENGTH)
    rows = b"".join(bytes([1 + position]) * row_bytes for position in range(LENGTH))
    journal.append(0, LENGTH, rows)
    journal.drop(dropped)
    assert journal.start == max(dropped, 64)
    assert bytes(journal.read(journal.start, LENGTH)) == rows[journal.start * row_bytes :]
    journal.cut(LENGTH - 7)
    assert bytes(journal.read(journal.start, LENGTH - 7)) == rows[journal.start * row_bytes : -7 * row_bytes]


def test_a_cut_behind_the_end_promises_nothing_that_is_not_there():
    journal = Journal(1, ROW, LENGTH)
    journal.append(0, 5, body(1, 0, 5))
    journal.cut(20)
    assert (journal.start, journal.stop) == (0, 5)
    empty = Journal(1, ROW, LENGTH)  # of a session that is taken over in the middle
    empty.cut(20)
    assert (empty.start, empty.stop, empty.tokens) == (0, 0, 0)


def test_nothing_is_kept_beyond_the_sessions_length():
    with pytest.raises(LocalProtocolError, match="201 positions in a journal of 200"):
        Journal(1, ROW, LENGTH).append(200, 1, bytes(ROW))


def test_all_journals_together_hold_no_more_than_the_budget_and_the_longest_one_pays():
    budget = JournalBudget(200)
    long, short = budget.open(b"l", 1, ROW, LENGTH), budget.open(b"s", 2, 2 * ROW, LENGTH)
    budget.append(long, 0, 150, body(1, 0, 150))
    budget.append(short, 0, 20, body(2, 0, 20))
    assert budget.held == 190
    for position in range(20, 40):
        budget.append(short, position, 1, body(2, position, 1))
        assert budget.held <= 200
    assert short.start == 0
    assert long.start == 64
    budget.cut(long, 100)
    assert budget.held == long.tokens + short.tokens == 36 + 80
    budget.close(b"l")
    budget.close(b"s")
    budget.close(b"never opened")
    assert budget.held == 0


def test_a_budget_of_nothing_keeps_nothing():
    budget = JournalBudget(0)
    journal = budget.open(b"s", 1, ROW, LENGTH)
    budget.append(journal, 0, 5, body(1, 0, 5))
    assert (journal.start, journal.stop, budget.held) == (5, 5, 0)
    with pytest.raises(LocalProtocolError, match="already"):
        budget.open(b"s", 1, ROW, LENGTH)


def test_what_is_pinned_stays_and_others_pay():
    budget = JournalBudget(200)
    long, short = budget.open(b"l", 1, ROW, LENGTH), budget.open(b"s", 1, ROW, LENGTH)
    budget.append(long, 0, 150, body(1, 0, 150))
    long.pinned = True
    for position in range(100):
        budget.append(short, position, 1, body(1, position, 1))
        assert budget.held <= 200
    assert bytes(long.read(0, 150)) == body(1, 0, 150)
    long.pinned = False
    budget.append(short, 100, 60, body(1, 100, 60))
    assert long.start


def test_what_is_forgotten_takes_no_memory():
    journal, megabyte = Journal(1, 1 << 20, 64), bytes(1 << 20)
    before = _resident()
    for position in range(64):
        journal.append(position, 1, b"x" * (1 << 20))
    assert _resident() - before > 60 << 20
    journal.drop(64)
    assert _resident() - before < 8 << 20
    for position in range(32):
        journal.append(position, 1, megabyte)
    journal.append(40, 1, megabyte)  # a hole: it begins anew
    assert _resident() - before < 8 << 20


@given(st.integers(1, 3 * 4096), st.integers(0, LENGTH))
def test_of_memory_that_is_given_back_the_rest_stays(row_bytes, read):
    journal = Journal(1, row_bytes, LENGTH)
    rows = b"".join(bytes([1 + position]) * row_bytes for position in range(LENGTH))
    journal.append(0, LENGTH, rows)
    journal.give_back(read)
    whole = bytes(journal.read(0, LENGTH))
    assert whole[read * row_bytes :] == rows[read * row_bytes :]
    assert whole.count(0) == read * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE


def _resident() -> int:
    """Bytes of memory that this process takes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(0, 3)), max_size=12), st.data())
def test_each_position_keeps_the_length_with_which_it_went_out(steps, data):
    journal, length = Journal(1, ROW, LENGTH), 0
    known: list[int] = []
    for position, tokens, rope_length in steps:
        position = min(position, length)
        if data.draw(st.booleans()):
            journal.cut(position)
        journal.append(position, tokens, body(1, position, tokens), rope_length)
        known[position:] = [rope_length] * tokens
        length = position + tokens
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    most = data.draw(st.integers(1, 20))
    parts = list(journal.parts(start, stop, most))
    assert [at for first, end, _ in parts for at in range(first, end)] == list(range(start, stop))
    assert [rope for first, end, rope in parts for _ in range(first, end)] == known[start:stop]
    assert all(0 < end - first <= most for first, end, _ in parts)


def test_a_journal_in_another_codec_takes_the_place_of_the_old_one():
    budget = JournalBudget(10)
    old, other = budget.open(b"a", 1, ROW, LENGTH), budget.open(b"b", 1, ROW, LENGTH)
    budget.append(old, 0, 6, body(1, 0, 6))
    wider = Journal(1, 2 * ROW, LENGTH)
    wider.append(2, 4, bytes(2 * ROW * 4))
    budget.replace(b"a", wider)
    assert budget.held == 4
    budget.append(other, 0, 8, body(1, 0, 8))  # together more than 10: the longest gives way
    assert (wider.tokens, budget.held) == (4, 4)
    budget.close(b"a")
    assert budget.held == 0


POSITIONS, TOKENS = st.integers(0, 100), st.integers(1, 5) | st.just(70)


class JournalAndOrders(RuleBasedStateMachine):
    """A journal beside a plain list of positions, each a list of its rows, which every order moves.

    An order that was not final is taken back by going on from a copy of the list of before it.
    """

    BATCH = 3

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(self.BATCH, self.BATCH * ROW, LENGTH)
        self.known: list[list[bytes]] = []
        self.before_order: list[list[bytes]] | None = None  # where the last step's order is not final
        self.step = 0

    @rule(position=POSITIONS, tokens=TOKENS, order=st.none() | st.permutations([0, 1, 2]))
    def step_with_a_permutation(self, position, tokens, order) -> None:
        self._go_on(position, tokens, order)

    @rule(position=POSITIONS, tokens=TOKENS, order=st.tuples(*[st.integers(0, 2)] * 3))
    def step_that_repeats_rows(self, position, tokens, order) -> None:
        self._go_on(position, tokens, order)

    def _go_on(self, position: int, tokens: int, order) -> None:
        position = min(position, len(self.known))
        tokens = min(tokens, LENGTH - position)
        del self.known[position:]
        self.journal.cut(position)
        self.before_order = None
        if order is not None:
            self.before_order = [list(rows) for rows in self.known]
            self.known = [[rows[row] for row in order] for rows in self.known]
            self.journal.reorder(position, self.step, tuple(order))
        put = body(self.BATCH, position, tokens, self.step)
        rows = [put[at : at + ROW] for at in range(0, len(put), ROW)]
        self.known += [rows[token::tokens] for token in range(tokens)]
        self.journal.append(position, tokens, put)
        self.step += 1

    @rule(length=POSITIONS)
    def cut(self, length: int) -> None:
        del self.known[length:]
        self.journal.cut(length)
        self.before_order = None

    @rule(tokens=st.integers(1, 5))
    def drop(self, tokens: int) -> None:
        if len(self.known) > 64:
            self.journal.drop(tokens)

    @precondition(lambda self: self.before_order is not None)
    @rule()
    def the_last_step_is_given_up(self) -> None:
        assert self.before_order is not None
        self.journal.take_back_orders(self.step - 1)
        self.known, self.before_order = self.before_order, None
        self.journal.cut(len(self.known))

    @precondition(lambda self: self.journal.tokens)
    @rule()
    def it_is_written_anew_in_another_codec(self) -> None:
        old = self.journal
        self.journal = Journal(self.BATCH, self.BATCH * ROW, LENGTH)
        for start, stop, _ in old.parts(old.start, old.stop, 7):
            self.journal.append(start, stop - start, old.read(start, stop, before=0))
        self.journal.adopt_orders(old)

    @invariant()
    def each_row_is_read_where_the_orders_have_put_it(self) -> None:
        start, stop = self.journal.start, self.journal.stop
        assert stop == len(self.known)
        for first in range(start, stop, 7):
            last = min(first + 7, stop)
            assert bytes(self.journal.read(first, last)) == flat(self.known[first:last])
        if self.before_order and start < len(self.before_order):
            found = self.journal.read(start, len(self.before_order), before=self.step - 1)
            assert bytes(found) == flat(self.before_order[start:])

    @invariant()
    def there_are_no_more_orders_than_positions_and_one(self) -> None:
        journal = self.journal
        positions, orders = journal.stop - journal.start, len(journal.orders)
        assert orders <= positions + 1
        assert journal.tokens == 3 * positions + journal.order_tokens * orders


def flat(positions: list[list[bytes]]) -> bytes:
    """[positions][rows] as [rows, positions]."""
    return b"".join(rows[row] for row in range(len(positions[0])) for rows in positions)


TestJournalAndOrders = JournalAndOrders.TestCase
TestJournalAndOrders.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_orders_of_rows_are_counted_and_end_with_their_positions():
    budget = JournalBudget(1000)
    journal = budget.open(b"s", 2, 2 * ROW, LENGTH)
    assert journal.order_tokens == 11, "260 bytes, where a token has 24"
    for step in range(20):
        budget.append(journal, step, 1, body(2, step, 1))
        budget.reorder(journal, step + 1, step, (1, 0))
    assert budget.held == journal.tokens == 20 * 2 + 20 * 11
    budget.append(journal, 5, 1, body(2, 5, 1))
    assert budget.held == journal.tokens == 6 * 2 + 5 * 11
    budget.cut(journal, 0)
    assert budget.held == 0
    for step in range(100):
        budget.reorder(journal, 0, step, (1, 0))
    assert (budget.held, journal.orders) == (0, [])


def test_orders_beyond_the_budget_drop_positions_as_rows_do():
    budget = JournalBudget(100)
    journal = budget.open(b"s", 2, 2 * ROW, LENGTH)
    for step in range(40):
        budget.append(journal, step, 1, body(2, step, 1))
        budget.reorder(journal, step + 1, step, (0, 0))
        assert budget.held <= 100
    assert journal.start > 0


def test_a_journal_tells_the_first_position_that_was_replaced_or_forgotten_once():
    journal = Journal(1, ROW, LENGTH)
    journal.append(0, 10, body(1, 0, 10))
    journal.append(10, 2, body(1, 10, 2))
    assert journal.take_changed() == LENGTH
    journal.append(6, 3, body(1, 6, 3, seed=1))
    journal.cut(8)
    assert journal.take_changed() == 6
    assert journal.take_changed() == LENGTH
    journal.cut(8)  # where it ends
    assert journal.take_changed() == LENGTH
    journal.cut(2)
    journal.append(2, 5, body(1, 2, 5))
    assert journal.take_changed() == 2


def test_a_journal_knows_that_rows_were_ever_reordered():
    journal = Journal(2, 2 * ROW, LENGTH)
    journal.append(0, 4, body(2, 0, 4))
    assert not journal.reordered
    journal.reorder(4, 1, (1, 0))
    journal.take_back_orders(1)
    assert journal.reordered
