"""The edges of frames, headers and journals: the last value that is taken, and the first that is not."""

from __future__ import annotations

import numpy as np
import pytest

from tensor_codec.errors import LocalProtocolError, MessageError
from tensor_codec.frame import encode_frame
from tensor_codec.header import Header, pack_header, split_message
from tensor_codec.journal import Journal, JournalBudget
from tensor_codec.limits import MAX_HEADER_BYTES

ROW = 5  # bytes of one position of one row: no multiple of a word


def rows(batch: int, tokens: int, first: int = 0) -> bytes:
    """[batch, tokens, ROW]: each row of each position is another one."""
    return b"".join(bytes([16 * row + first + at]) * ROW for row in range(batch) for at in range(tokens))


def test_a_frame_that_its_prefix_cannot_announce_is_our_own_bug():
    endless = np.broadcast_to(np.uint8(0), (1 << 32,)).data  # takes one byte of memory
    with pytest.raises(LocalProtocolError, match="4294967296 bytes, where 4294967295 are allowed"):
        encode_frame([endless])


def test_a_header_of_exactly_4_kib_is_packed():
    packed = pack_header({"k": bytes(MAX_HEADER_BYTES - 6)})
    assert len(packed) == 2 + MAX_HEADER_BYTES
    with pytest.raises(LocalProtocolError):
        pack_header({"k": bytes(MAX_HEADER_BYTES - 5)})


def test_a_message_of_a_length_alone_has_a_header_of_no_bytes_and_that_is_no_map():
    with pytest.raises(MessageError, match="the header is not msgpack"):
        split_message(b"\x00\x00")
    with pytest.raises(MessageError, match="1 bytes has no header"):
        split_message(b"\x00")


def test_what_stands_for_an_absent_field_never_replaces_one_that_is_there():
    there = Header({"integer": 7, "flag": False, "items": [1]})
    assert there.integer("integer", 0, 9, absent=3) == 7
    assert there.flag("flag", absent=True) is False
    assert there.items("items", 2, absent=True) == [1]
    nothing = Header({})
    assert nothing.integer("integer", 0, 9, absent=3) == 3
    assert nothing.flag("flag", absent=True) is True
    assert nothing.items("items", 2, absent=True) == []
    for read in (
        lambda: nothing.integer("x", 0, 9),
        lambda: nothing.flag("x"),
        lambda: nothing.items("x", 2),
    ):
        with pytest.raises(MessageError, match="x is None"):
            read()


def test_text_has_at_most_256_characters_where_nobody_says_otherwise():
    assert Header({"x": "a" * 256}).text("x") == "a" * 256
    with pytest.raises(MessageError, match="x is str of 257, printable text of at most 256"):
        Header({"x": "a" * 257}).text("x")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a" * 40, repr("a" * 40)),
        ("a" * 41, "str of 41"),
        (b"a" * 41, "bytes of 41"),
        ([1] * 41, "list of 41"),
        ([10**9] * 40, repr([10**9] * 40)[:80]),
        (10**99, "1" + "0" * 79),
        (None, "None"),
    ],
)
def test_a_message_shows_a_short_value_and_says_the_size_of_a_long_one(value, found):
    with pytest.raises(MessageError) as caught:
        Header({"x": value}).integer("x", 0, 1)
    assert str(caught.value) == f"x is {found}, an integer in 0..1 is allowed"


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_of_any_size_come_out_in_the_order_in_which_they_went_in(batch):
    journal = Journal(batch, batch * ROW, 10)
    journal.append(0, 4, rows(batch, 4))
    journal.append(4, 1, rows(batch, 1, first=4))
    assert bytes(journal.read(0, 5)) == rows(batch, 5)
    assert bytes(journal.read(3, 4)) == rows(batch, 1, first=3)


def test_what_lies_in_memory_as_it_is_asked_for_is_not_copied():
    one_row, three_rows = Journal(1, ROW, 10), Journal(3, 3 * ROW, 10)
    one_row.append(0, 4, rows(1, 4))
    three_rows.append(0, 4, rows(3, 4))
    assert isinstance(one_row.read(0, 4), memoryview)
    assert isinstance(three_rows.read(2, 3), memoryview)


def test_a_journal_gives_no_run_of_no_positions():
    journal = Journal(1, ROW, 10)
    journal.append(0, 4, rows(1, 4))
    with pytest.raises(LocalProtocolError, match="2:2 of a journal of 0:4"):
        journal.read(2, 2)


def test_positions_that_go_out_again_have_the_rope_length_of_the_last_time():
    journal = Journal(1, ROW, 20)
    journal.append(0, 5, rows(1, 5))
    assert list(journal.parts(0, 5, 100)) == [(0, 5, 0)]
    journal.append(5, 5, rows(1, 5), 1)
    journal.append(3, 7, rows(1, 7), 1)
    assert list(journal.parts(0, 10, 100)) == [(0, 3, 0), (3, 10, 1)]
    journal.append(0, 10, rows(1, 10), 9)
    assert list(journal.parts(0, 10, 100)) == [(0, 10, 9)]
    journal.append(0, 10, rows(1, 10), 0)
    assert list(journal.parts(0, 10, 4)) == [(0, 4, 0), (4, 8, 0), (8, 10, 0)]


def test_a_journal_that_is_dropped_twice_keeps_the_rest_byte_for_byte():
    journal = Journal(1, 4096, 200)
    values = b"".join(bytes([position]) * 4096 for position in range(200))
    journal.append(0, 200, values)
    journal.drop(64)
    journal.drop(64)
    assert journal.start == 128
    assert bytes(journal.read(128, 200)) == values[128 * 4096 :]


def test_a_budget_passes_the_rope_length_on():
    budget = JournalBudget(50)
    journal = budget.open(b"s", 1, ROW, 20)
    budget.append(journal, 0, 5, rows(1, 5))
    assert list(journal.parts(0, 5, 100)) == [(0, 5, 0)]
    budget.append(journal, 5, 5, rows(1, 5), 7)
    assert list(journal.parts(0, 10, 100)) == [(0, 5, 0), (5, 10, 7)]


def test_a_budget_that_is_just_full_drops_nothing():
    budget = JournalBudget(10)
    journal = budget.open(b"s", 1, ROW, 20)
    budget.append(journal, 0, 10, rows(1, 10))
    assert (journal.start, journal.stop, budget.held) == (0, 10, 10)
    budget.append(journal, 10, 1, rows(1, 1))
    assert budget.held <= 10


def test_a_budget_of_pinned_journals_is_exceeded_rather_than_broken():
    budget = JournalBudget(10)
    pinned = budget.open(b"p", 1, ROW, 20)
    pinned.pinned = True
    budget.append(pinned, 0, 15, rows(1, 15))
    empty = budget.open(b"e", 1, ROW, 20)
    budget.append(pinned, 15, 1, rows(1, 1))
    assert (pinned.start, pinned.stop, empty.tokens, budget.held) == (0, 16, 0, 16)
