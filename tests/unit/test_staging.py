"""What is brought to a device in one run of bytes; rows that are gathered together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.model.blocks.device.staging import Layout, bucket, chunk_on, numbers_on, on_device, to_device
from node.model.blocks.device.staging import Rows as StagedRows
from node.model.blocks.ragged import ragged_parts
from tests.meta_device import DEVICE, Counted

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("number", "least", "expected"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 4), (64, 64, 64), (65, 64, 128), (5, 64, 64)],
)
def test_a_bucket_is_the_next_power_of_two(number, least, expected):
    assert bucket(number, least) == expected


def test_numbers_keep_their_shapes_and_go_in_one_copy():
    arrays = [np.arange(6).reshape(2, 3), np.zeros((0, 0), np.int64), np.array([7])]
    for each, array in zip(numbers_on(CPU, *arrays), arrays, strict=True):
        assert (each.numpy() == array).all()
        assert each.shape == array.shape
    with Counted() as counted:
        there = numbers_on(DEVICE, *arrays)
    assert [tuple(each.shape) for each in there] == [(2, 3), (0, 0), (1,)]
    assert (counted.to_device, counted.pageable) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_is_one_copy_and_its_values_arrive(dtype):
    hidden = torch.randn(2, 5, 3)
    numbers = np.arange(10), np.arange(7) + 100
    got, arrays = chunk_on(CPU, dtype, hidden, *numbers)
    assert torch.equal(got, hidden.to(dtype))
    assert [each.tolist() for each in arrays] == [each.tolist() for each in numbers]
    assert all(each.dtype == torch.int32 for each in arrays)
    with Counted() as counted:
        chunk_on(DEVICE, dtype, hidden, *numbers)
        chunk_on(DEVICE, dtype, torch.empty(2, 5, 3, device=DEVICE), *numbers)
        on_device(hidden, DEVICE, dtype)
    assert (counted.to_device, counted.pageable) == (3, 0)


def test_hidden_states_of_a_device_stay_there():
    layout = Layout(4, 2, 3, torch.bfloat16)
    rows = StagedRows(np.array([3, 4]), np.array([30, 40]), np.array([[1], [2]]))
    content = torch.empty(layout.nbytes, dtype=torch.uint8, device=DEVICE)
    with Counted() as counted:
        to_device(rows, layout, torch.empty(2, 3, device=DEVICE), content, 9, 16)
    assert (counted.to_device, counted.pageable, counted.launched) == (1, 0, {"zero_": 1, "copy_": 1})


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 2000))
def test_rows_that_are_gathered_together_are_all_rows_in_order_and_few_positions(lengths, most):
    parts = ragged_parts(np.array(lengths), most)
    assert [row for first, last in parts for row in range(first, last)] == list(range(len(lengths)))
    for first, last in parts:
        assert last - first == 1 or (last - first) * (max(lengths[first:last]) + 1) <= most


def test_one_long_row_does_not_widen_all_others():
    lengths = np.full(64, 100)
    lengths[20] = 8000
    assert len(ragged_parts(lengths)) <= 3
