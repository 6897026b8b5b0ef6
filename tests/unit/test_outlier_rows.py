"""int8o: what a row keeps, that a second encoding changes nothing, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensor_codec.codecs import decode_rows, encode_hidden
from tensor_codec.errors import BadResult
from tensor_codec.messages.contract import outliers_of, vector_bytes
from tensor_codec.rows.outlier_rows import FEW_ROWS, LEAST_SCALE, pack_rows, unpack_rows

WIDTHS = (1, 2, 15, 16, 33, 64, 128, 200)


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows of values of any size, with outliers, ties and zeros."""
    width = draw(st.sampled_from(WIDTHS))
    seed = draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(draw(st.integers(1, 4)), width, generator=generator)
    values *= 10.0 ** draw(st.integers(-42, 36))
    for _ in range(draw(st.integers(0, 12))):
        at = draw(st.integers(0, width - 1))
        values[:, at] *= draw(st.sampled_from([0.0, 1.0, -1e3, 1e4, 127.0, 2.0**-30]))
    if draw(st.booleans()):  # few different values: ties between outliers and the others
        values = (values / values.abs().max().clamp(min=1e-30) * 3).round() * draw(st.floats(1e-20, 1e20))
    return torch.nan_to_num(values.clamp(-1e38, 1e38))


@given(rows())
def test_a_row_has_the_bytes_that_both_sides_expect(values: torch.Tensor) -> None:
    assert pack_rows(values).shape == (len(values), vector_bytes("int8o", values.shape[1]))


@settings(max_examples=300)
@given(rows())
def test_a_value_is_within_half_a_step_and_an_outlier_within_one_part_in_256(values: torch.Tensor) -> None:
    found, count = unpack_rows(pack_rows(values), values.shape[1]), outliers_of(values.shape[1])
    ordered = values.abs().sort(dim=1, descending=True).values
    largest = ordered[:, count : count + 1] if count < values.shape[1] else torch.zeros(len(values), 1)
    step = (largest * (1 + 2**-7) / 127).double()
    error = (found.double() - values.double()).abs()
    allowed = torch.maximum(0.76 * step, values.double().abs() * 2**-8) + 128 * LEAST_SCALE
    assert (error <= allowed).all()


@settings(max_examples=500)
@given(rows())
def test_a_second_encoding_changes_nothing(values: torch.Tensor) -> None:
    once = unpack_rows(pack_rows(values), values.shape[1])
    assert torch.equal(unpack_rows(pack_rows(once), values.shape[1]), once)


@settings(max_examples=300)
@given(rows())
def test_few_rows_are_packed_as_many_are(values: torch.Tensor) -> None:
    many = pack_rows(values.repeat(FEW_ROWS + 1, 1))
    few = np.concatenate([pack_rows(row[None]) for row in values])
    width = values.shape[1]
    found, expected = unpack_rows(few, width), unpack_rows(many[: len(values)], width)
    # Of equal values another one may be kept apart.
    differs = (found != expected).sum(1)
    ties = [len(row) - len(row.abs().unique()) for row in values]
    assert all(count <= 2 * tie for count, tie in zip(differs.tolist(), ties, strict=True))
    assert torch.equal(
        unpack_rows(pack_rows(expected.repeat(FEW_ROWS + 1, 1))[: len(values)], width), expected
    )
    again = torch.cat([unpack_rows(pack_rows(row[None]), width) for row in expected])
    assert torch.equal(again, expected)  # what went out with many comes again alone


def test_the_eight_largest_values_of_a_row_are_kept_apart() -> None:
    values = torch.linspace(-1, 1, 576)[None]
    places = torch.tensor([0, 5, 100, 101, 300, 400, 574, 575])
    values[0, places] = torch.tensor([24_064.0, -98_304.0, 512, 640, -768, 1024, 2048, 4096])
    found = unpack_rows(pack_rows(values), 576)
    assert torch.equal(found[0, places], values[0, places])  # each is one of bfloat16
    assert (found - values).abs().max() <= 0.5 / 127 * 1.01


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("at", [0, 63])
def test_what_bfloat16_cannot_hold_does_not_leave(bad: float, at: int) -> None:
    values = torch.ones(2, 64)
    values[1, at] = bad
    for repeated in (1, FEW_ROWS):
        with pytest.raises(BadResult, match="computed"):
            encode_hidden(values.repeat(repeated, 1)[None], "int8o")


HIDDEN = 64  # 4 outliers: codes 0:64, places 64:72, outliers 72:80, scale 80:84


def changed(at: int, new: bytes) -> bytes:
    values = torch.linspace(1, 2, HIDDEN)[None]
    body = bytearray(encode_hidden(values[None], "int8o"))
    body[at : at + len(new)] = new
    return bytes(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (changed(0, b"\x80"), "code -128"),
        (changed(63, b"\x01"), "a code at the place of an outlier"),
        (changed(70, b"\x40\x00"), "an outlier at place 64, a row has 64"),
        (changed(70, b"\xff\xff"), "an outlier at place 65535"),
        (changed(70, b"\x3e\x00"), "whose places do not ascend"),  # twice
        (changed(64, b"\x3d\x00"), "whose places do not ascend"),
        (changed(72, b"\xc0\x7f"), "NaN or infinity"),
        (changed(78, b"\x80\xff"), "NaN or infinity"),
        (changed(80, np.float32("nan").tobytes()), "NaN or infinity"),
        (changed(80, np.float32("inf").tobytes()), "NaN or infinity"),
        (changed(80, np.float32(-1).tobytes()), "a scale below 0"),
        (changed(80, np.float32(3e38).tobytes()), "NaN or infinity"),
    ],
)
def test_bytes_that_no_encoding_gives_are_refused_with_what_was_found(body: bytes, message: str) -> None:
    with pytest.raises(BadResult, match=message):
        decode_rows(body, "int8o", HIDDEN)


@given(st.binary(max_size=400), st.sampled_from(WIDTHS))
def test_of_any_bytes_come_finite_values_or_a_bad_result(data: bytes, width: int) -> None:
    row = vector_bytes("int8o", width)
    body = data[: len(data) // row * row]
    try:
        found = decode_rows(body, "int8o", width)
    except BadResult:
        return
    assert found.shape == (len(body) // row, width)
    assert torch.isfinite(found).all()


def test_a_row_of_a_real_model_takes_about_half_of_bfloat16_s_bytes() -> None:
    assert vector_bytes("int8o", 576) == 612
    assert vector_bytes("int8o", 4096) == 4132
    assert vector_bytes("int8o", 1 << 17) == (1 << 17) + 8 * 6 + 4  # places of four bytes
