"""Orders of rows: what a caller may say, and what travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.errors import MessageError
from tensor_codec.rows.row_order import MAX_ORDERED_ROWS, decode_rows, encode_rows, row_order


@given(st.integers(1, 40).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
def test_an_order_travels_as_two_bytes_a_row_and_comes_back(order):
    data = encode_rows(tuple(order))
    assert len(data) == 2 * len(order)
    assert data[-2:] == order[-1].to_bytes(2, "big")
    assert decode_rows(data) == tuple(order)


def test_a_row_that_is_not_there_is_refused():
    assert decode_rows(b"\0\1\0\1") == (1, 1)
    with pytest.raises(MessageError, match=r"row 2 in an order of rows, 0\.\.1 are allowed"):
        decode_rows(b"\0\1\0\2")


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_an_order_may_be_a_list_a_tuple_an_array_or_a_tensor(kind):
    assert row_order(kind([1, 1, 0]), 3) == (1, 1, 0)


def test_an_order_that_leaves_every_row_in_place_is_none():
    assert row_order([0, 1, 2], 3) == row_order(range(3), 3) == row_order([0], 1) == ()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([0, 1], r"rows is \[0, 1\], 3 numbers in 0\.\.2 are needed"),
        ([0, 1, 2, 0], "3 numbers"),
        ([0, 1, 3], r"rows is \[0, 1, 3\], 3 numbers in 0\.\.2 are needed"),
        ([0, 1, -1], "3 numbers"),
        ([0, 1, True], "rows is a list, a list of 3 whole numbers is needed"),
        ([0, 1, 2.0], "3 whole numbers"),
        (torch.tensor([0.0, 1.0, 2.0]), "3 whole numbers"),
        (torch.tensor([[0, 1, 2]]), "3 whole numbers"),
        (torch.tensor(1), "rows is a int, a list of 3 whole numbers is needed"),
        ("012", "rows is a str"),
        ({0, 1, 2}, "rows is a set"),
    ],
)
def test_an_order_that_cannot_be_says_what_is_needed(rows, why):
    with pytest.raises(ValueError, match=why):
        row_order(rows, 3)


def test_more_rows_than_a_header_takes_cannot_be_ordered():
    most = MAX_ORDERED_ROWS
    assert len(row_order([0] * most, most)) == most
    with pytest.raises(ValueError, match="1025 rows are to be ordered, 1024 at most can be"):
        row_order([0] * (most + 1), most + 1)
