"""Rows in numpy: the very bytes and values of the codecs of tensors, and no NaN in or out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tensor_codec.codecs import decode_rows, encode_hidden
from tensor_codec.errors import BadResult
from tensor_codec.rows.float_rows import row_bytes, row_values

CODECS = ("fp32", "bf16")
rows = npst.arrays(np.float32, st.integers(1, 40), elements=npst.from_dtype(np.dtype(np.float32)))


@given(rows, st.sampled_from(CODECS))
def test_a_row_has_the_bytes_of_a_tensor_or_is_refused_like_it(row, codec):
    tensor = torch.from_numpy(row.copy())[None, None]
    try:
        right = bytes(encode_hidden(tensor, codec))
    except BadResult:
        with pytest.raises(BadResult):
            row_bytes(row, codec)
    else:
        assert bytes(row_bytes(row, codec)) == right


@given(st.binary(min_size=8, max_size=64), st.sampled_from(CODECS), st.integers(0, 3))
def test_bytes_have_the_values_of_a_tensor_or_are_refused_like_it(data, codec, offset):
    size = 4 if codec == "fp32" else 2
    body = memoryview(b"x" * offset + data[: len(data) // size * size])[offset:]
    try:
        right = decode_rows(body, codec, 1).float().numpy().reshape(-1)
    except BadResult:
        with pytest.raises(BadResult):
            row_values(body, codec)
    else:
        found = row_values(body, codec)
        assert found.dtype == np.float32
        assert found.tobytes() == right.tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 576, 10_000])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(codec, size, wrong):
    for place in {0, size // 2, size - 1}:
        row = np.full(size, 1e30, np.float32)
        assert bytes(row_bytes(row, codec))
        row[place] = wrong
        with pytest.raises(BadResult):
            row_bytes(row, codec)
        with pytest.raises(BadResult):
            row_values(row.tobytes(), "fp32")


@pytest.mark.parametrize("size", [1, 10_000])
def test_a_value_beyond_the_range_of_bf16_is_refused_in_bf16_alone(size):
    row = np.zeros(size, np.float32)
    row[-1] = np.finfo(np.float32).max
    with pytest.raises(BadResult, match="infinity"):
        row_bytes(row, "bf16")
    assert bytes(row_bytes(row, "fp32")) == row.tobytes()


def test_values_are_in_memory_of_their_own():
    body = bytearray(np.ones(4, np.float32).tobytes())
    found = row_values(body, "fp32")
    body[:] = bytes(16)
    assert found.tolist() == [1.0] * 4
