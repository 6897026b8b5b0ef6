"""The speeds of links that a client remembers, and the steps that are worth packing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.chains.link_speeds import (
    FAR_BYTES_PER_SECOND,
    LEAST_GAIN_SECONDS,
    MAX_LINKS,
    NEAR_SECONDS,
    PACK_SECONDS_PER_STEP,
    PACK_SECONDS_PER_VALUE,
    LinkSpeeds,
    least_rows,
)
from routing.names import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
TEN_MBIT = 1.25e6


def test_each_link_of_a_chain_has_its_own_speed():
    speeds = LinkSpeeds()
    speeds.learn([A, B, C], [1000, 0])
    assert (speeds.of(A, B), speeds.of(B, C), speeds.of(B, A)) == (1000, 0, 0)
    speeds.learn([A, B, C], [0, 500])  # a hop that did not time it says nothing
    assert (speeds.of(A, B), speeds.of(B, C)) == (1000, 500)


def test_a_frame_that_seems_too_fast_weighs_little_and_a_line_that_became_slow_is_soon_known():
    speeds = LinkSpeeds()
    speeds.learn([A, B], [1000])
    speeds.learn([A, B], [10**9])  # it had waited in a buffer
    assert 1000 < speeds.of(A, B) < 1500
    for _ in range(10):
        speeds.learn([A, B], [100])
    assert 90 < speeds.of(A, B) < 110


def test_the_links_that_are_remembered_are_bounded_and_the_oldest_go_first():
    speeds = LinkSpeeds()
    for number in range(MAX_LINKS + 1):
        speeds.learn([A, PeerId(str(number))], [1000])
    assert speeds.of(A, PeerId("0")) == 0
    assert speeds.of(A, PeerId("1")) == speeds.of(A, PeerId(str(MAX_LINKS))) == 1000
    assert len(speeds._seconds_per_byte) == MAX_LINKS


@pytest.mark.parametrize(
    ("hidden", "exact", "speed", "round_trip", "rows"),
    [
        (576, 4, TEN_MBIT, 0.1, 1),  # a token too waits for its bytes
        (576, 2, TEN_MBIT, 0.1, 3),  # a prompt alone
        (4096, 2, 10 * TEN_MBIT, 0.0, 4),
        (4096, 2, 125e6, 0.1, 0),  # 1 Gbit/s takes less time than the computing
        (4096, 2, 0.0, NEAR_SECONDS / 2, 0),  # nobody has timed it, and it is near
        (4096, 2, 0.0, NEAR_SECONDS, 4),
    ],
)
def test_a_step_is_packed_where_its_line_is_slower_than_the_computing(hidden, exact, speed, round_trip, rows):
    assert least_rows(exact * hidden, hidden + 36, hidden, speed, round_trip) == rows


@given(st.integers(1, 1 << 15), st.sampled_from([2, 4]), st.floats(1e3, 1e10))
def test_the_least_rows_gain_more_than_their_coding_costs_and_one_row_less_does_not(hidden, size, speed):
    packed = hidden + 4 * min(8, hidden // 16) + 4
    rows = least_rows(size * hidden, packed, hidden, speed, 0.0)
    gain = (size * hidden - packed) / speed - hidden * PACK_SECONDS_PER_VALUE
    if rows:
        assert rows * gain - PACK_SECONDS_PER_STEP >= LEAST_GAIN_SECONDS * (1 - 1e-9)
        assert (rows - 1) * gain - PACK_SECONDS_PER_STEP < LEAST_GAIN_SECONDS
    else:
        assert gain <= 0


def test_where_no_bytes_are_saved_nothing_is_packed():
    assert least_rows(8, 8, 4, 1.0, 1.0) == 0
    assert least_rows(8, 12, 4, FAR_BYTES_PER_SECOND, 1.0) == 0
