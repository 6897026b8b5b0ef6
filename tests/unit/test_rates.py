"""How fast a node says that it is: measured, kept, and corrected by what it serves."""

from __future__ import annotations

import json
import logging
import math
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.serving.executor import rates as module
from node.serving.executor.rates import (
    MAX_KEPT,
    Rates,
    RatesFile,
    device_name,
    measure_decode,
    measure_rates,
    rates_at_start,
    rates_key,
)
from routing.names import Revision

KEY = "r/cpu/float32/none/1 threads/1"


# What is served corrects what was measured.


def test_a_batchs_whole_time_counts_for_each_of_its_steps():
    alone, together = Rates(0.001, 0.0001), Rates(0.001, 0.0001)
    for _ in range(200):
        alone.observe(1, 10, 0.02, decode=True)
        together.observe(16, 10, 0.02, decode=True)
    assert alone.decode_seconds_per_block == pytest.approx(0.002)
    assert together.decode_seconds_per_block == pytest.approx(0.002)
    assert alone.alone == pytest.approx(0.002)
    assert together.alone == 0.001  # of that, sixteen rows say nothing
    assert alone.prefill_seconds_per_block_token == 0.0001


def test_a_batch_that_is_faster_than_one_row_was_says_that_one_row_is_faster_too():
    rates = Rates(0.002, 0.0001)
    for _ in range(200):
        rates.observe(8, 10, 0.01, decode=True)
    assert rates.alone == pytest.approx(0.001)


def test_an_idle_node_returns_to_what_a_step_takes_alone_and_a_busy_one_does_not():
    rates = Rates(0.001, 0.0001)
    for _ in range(200):
        rates.observe(16, 10, 0.04, decode=True)
    busy = rates.decode_seconds_per_block
    assert busy == pytest.approx(0.004)
    assert not rates.relax()
    assert rates.decode_seconds_per_block == busy  # it has just served
    assert rates.relax()
    for _ in range(20):
        rates.relax()
    assert rates.decode_seconds_per_block == pytest.approx(0.001, rel=1e-3)
    rates.observe(16, 10, 0.04, decode=True)
    rates.relax()
    assert rates.decode_seconds_per_block > 0.001 * 1.2


def test_what_an_idle_node_measures_replaces_what_it_believed_at_start():
    rates = Rates(0.006, 0.0001)
    rates.measured(0.001)
    rates.relax()
    assert (rates.decode_seconds_per_block, rates.alone) == (0.001, 0.001)


def test_steps_that_were_served_outweigh_a_measurement_that_says_about_the_same():
    rates = Rates(0.001, 0.0001)
    for _ in range(200):
        rates.observe(1, 10, 0.014, decode=True)  # caches of real lengths
    learnt = rates.alone
    assert learnt == pytest.approx(0.0014)
    rates.measured(0.001)
    assert rates.alone == rates.decode_seconds_per_block == learnt
    rates.measured(0.0005)  # the machine was busy then
    assert rates.alone == rates.decode_seconds_per_block == 0.0005
    rates.measured(0.0006)
    assert rates.alone == 0.0006  # nothing was served since


def test_prefills_go_by_the_token_and_short_ones_count_for_less_or_not_at_all():
    whole, short, tiny = (Rates(0.001, 0.001) for _ in range(3))
    tiny.observe(15, 10, 15 * 10 * 0.002, decode=False)  # a decode step takes as long
    assert tiny.prefill_seconds_per_block_token == 0.001
    whole.observe(256, 10, 256 * 10 * 0.002, decode=False)
    short.observe(16, 10, 16 * 10 * 0.002, decode=False)
    assert whole.prefill_seconds_per_block_token == pytest.approx(0.0011)
    assert short.prefill_seconds_per_block_token == pytest.approx(0.001025)
    assert whole.decode_seconds_per_block == 0.001


def test_one_batch_that_the_machine_slept_through_spoils_nothing():
    rates = Rates(0.001, 0.0001)
    rates.observe(1, 10, 600.0, decode=True)
    rates.observe(256, 10, 600.0, decode=False)
    assert rates.decode_seconds_per_block <= 0.0013 + 1e-12
    assert rates.prefill_seconds_per_block_token <= 0.00013 + 1e-12


@given(
    st.lists(
        st.tuples(st.integers(1, 4096), st.integers(1, 200), st.floats(1e-7, 1e4), st.booleans()), max_size=50
    )
)
def test_figures_stay_positive_whatever_is_served(batches):
    rates = Rates(0.001, 0.0001)
    for rows_tokens, blocks, seconds, decode in batches:
        rates.observe(rows_tokens, blocks, seconds, decode)
        rates.relax()
        for figure in (rates.decode_seconds_per_block, rates.prefill_seconds_per_block_token, rates.alone):
            assert 0 < figure < math.inf


# Measuring.


class Clock:
    """Time that goes on only when a span computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class TimedSpan:
    """Ten blocks that take a fixed time and some for each token; the first call of all takes longer."""

    start, stop, hidden_size = 3, 13, 4

    def __init__(self, clock: Clock, fixed: float, per_token: float, first: float = 0.0) -> None:
        self.clock, self.fixed, self.per_token, self.first = clock, fixed, per_token, first
        self.steps: list[tuple[int, int]] = []

    def new_cache(self, batch: int, max_length: int) -> list[int]:
        """[length, most]."""
        return [0, max_length]

    def forward(
        self, hidden: torch.Tensor, cache: list[int], position: int, start: int, stop: int
    ) -> torch.Tensor:
        """Takes its time."""
        assert (start, stop) == (self.start, self.stop)
        assert position == cache[0]
        cache[0] += hidden.shape[1]
        assert cache[0] <= cache[1]
        self.clock.now += self.fixed + self.per_token * hidden.shape[1] + self.first
        self.first = 0.0
        self.steps.append((position, hidden.shape[1]))
        return hidden


@pytest.mark.parametrize("fixed", [1e-4, 1e-3, 0.01, 0.1])
def test_measuring_finds_the_figures_in_about_the_time_that_it_is_given(fixed, monkeypatch):
    clock = Clock(monkeypatch)
    span = TimedSpan(clock, fixed, fixed / 8, first=fixed)
    rates = measure_rates(span, 2.0)
    assert clock.now - 100.0 <= 2.3
    assert rates.decode_seconds_per_block == pytest.approx(fixed * 9 / 8 / 10)
    tokens = max(tokens for _, tokens in span.steps)
    assert rates.prefill_seconds_per_block_token == pytest.approx((fixed / tokens + fixed / 8) / 10)


def test_a_span_that_is_far_too_slow_is_measured_all_the_same(monkeypatch):
    clock = Clock(monkeypatch)
    span = TimedSpan(clock, 10.0, 1.0)
    rates = measure_rates(span, 2.0)
    assert rates.decode_seconds_per_block == pytest.approx(1.1)
    assert rates.prefill_seconds_per_block_token == pytest.approx(18 / 8 / 10)
    assert len(span.steps) == 5  # two steps, a prefill, two steps


def test_decode_steps_are_those_of_one_growing_session_and_the_first_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    span = TimedSpan(clock, 0.01, 0.0, first=5.0)
    assert measure_decode(span, 5.1) == pytest.approx(0.001)
    assert len(span.steps) >= 8
    assert all(after[0] == before[0] + 1 for before, after in pairwise(span.steps))


def test_a_gpu_s_set_up_does_not_count_however_long_it_takes(monkeypatch):
    """The first steps compile kernels and record a graph; a short look must not end with them."""
    clock = Clock(monkeypatch)
    span = TimedSpan(clock, 0.01, 0.0)
    span.device = torch.device("cuda:1")  # type: ignore[attr-defined]
    real, slow = span.forward, iter([3.0, 7.0, 2.0])

    def forward(*args: Any) -> torch.Tensor:
        clock.now += next(slow, 0.0)
        return real(*args)

    monkeypatch.setattr(span, "forward", forward)
    assert measure_decode(span, 0.1) == pytest.approx(0.001)
    assert 8 <= len(span.steps) <= 64
    assert all(after[0] == before[0] + 1 for before, after in pairwise(span.steps))


def test_a_gpu_s_prefill_is_measured_with_a_client_s_chunk(monkeypatch):
    clock = Clock(monkeypatch)
    span = TimedSpan(clock, 0.005, 1e-5)
    span.device = torch.device("cuda")  # type: ignore[attr-defined]
    rates = measure_rates(span, 2.0)
    assert max(tokens for _, tokens in span.steps) == 256
    assert rates.prefill_seconds_per_block_token == pytest.approx((0.005 / 256 + 1e-5) / 10)


def test_a_real_span_is_measured(tiny_llama, tmp_path):
    from node.model.blocks.span import load_span
    from node.model.checkpoint.folder import HashMemo, open_folder

    span = load_span(open_folder(tiny_llama, memo=HashMemo(tmp_path / "hashes.json")), 1, 4)
    rates = measure_rates(span, 0.1)
    assert 1e-7 < rates.decode_seconds_per_block < 1
    assert 1e-9 < rates.prefill_seconds_per_block_token < 1


# Keeping.


def test_figures_are_kept_from_one_start_to_the_next(tmp_path):
    path = tmp_path / "cache" / "rates.json"
    assert RatesFile(path).get(KEY) is None
    RatesFile(path).put(KEY, Rates(0.001, 0.0001))
    RatesFile(path).put("other", Rates(0.5, 0.05))
    assert RatesFile(path).get(KEY) == Rates(0.001, 0.0001)
    assert RatesFile(path).get("other") == Rates(0.5, 0.05)
    assert [file.name for file in path.parent.iterdir()] == ["rates.json"]


def test_what_is_kept_is_what_a_step_takes_alone(tmp_path):
    file, rates = RatesFile(tmp_path / "rates.json"), Rates(0.001, 0.0001)
    rates.observe(16, 10, 0.1, decode=True)
    file.put(KEY, rates)
    kept = file.get(KEY)
    assert kept is not None
    assert kept.decode_seconds_per_block == 0.001


def test_only_so_many_figures_are_kept_and_the_oldest_go_first(tmp_path):
    file = RatesFile(tmp_path / "rates.json")
    entries = {f"k{index}": {"decode": 1.0, "prefill": 1.0} for index in range(MAX_KEPT)}
    file.path.write_text(json.dumps({"format": 2, "rates": entries}))
    file.put("k0", Rates(2.0, 2.0))
    file.put("new", Rates(3.0, 3.0))
    assert len(json.loads(file.path.read_text())["rates"]) == MAX_KEPT
    assert file.get("k1") is None
    assert file.get("k0") == Rates(2.0, 2.0)
    assert file.get("new") == Rates(3.0, 3.0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"format": 2, "rates": 3}',
        b'{"format": 1, "rates": {}}',
        b'{"format": 2}',
        b" " * (module.MAX_FILE_BYTES + 1),
    ],
    ids=lambda content: str(content[:30]),
)
def test_a_damaged_file_is_ignored_with_a_line_in_the_log_and_then_replaced(content, tmp_path, caplog):
    file = RatesFile(tmp_path / "rates.json")
    file.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert file.get(KEY) is None
    assert len(caplog.messages) == 1
    assert str(file.path) in caplog.text
    file.put(KEY, Rates(0.001, 0.0001))
    assert file.get(KEY) == Rates(0.001, 0.0001)


@pytest.mark.parametrize(
    "entry",
    [None, 3, {}, {"decode": 0.1}, {"decode": 0.1, "prefill": "fast"}, {"decode": 0.1, "prefill": True}]
    + [{"decode": 0.1, "prefill": wrong} for wrong in (0.0, -1.0, math.nan, math.inf, 1e9)],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_left_out_and_the_others_stay(entry, tmp_path, caplog):
    file = RatesFile(tmp_path / "rates.json")
    good = {"decode": 0.5, "prefill": 0.25}
    file.path.write_text(json.dumps({"format": 2, "rates": {KEY: entry, "good": good}}))
    assert file.get(KEY) is None
    assert file.get("good") == Rates(0.5, 0.25)
    assert "1 of the rates" in caplog.text


def test_a_file_that_cannot_be_written_costs_a_line_in_the_log(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where a folder should be")
    file = RatesFile(tmp_path / "taken" / "rates.json")
    file.put(KEY, Rates(0.001, 0.0001))
    assert "not kept" in caplog.text
    assert file.get(KEY) is None


def test_a_second_start_only_looks_whether_the_kept_figures_are_still_right(tmp_path, monkeypatch):
    clock, file = Clock(monkeypatch), RatesFile(tmp_path / "rates.json")
    first = rates_at_start(TimedSpan(clock, 0.01, 0.001), file, KEY)
    assert clock.now > 101.0
    began, again = clock.now, TimedSpan(clock, 0.012, 0.002)
    assert rates_at_start(again, file, KEY) == first
    assert clock.now - began <= 0.25
    assert {tokens for _, tokens in again.steps} == {1}


@pytest.mark.parametrize("times", [0.2, 5.0])
def test_figures_that_are_no_longer_right_are_measured_anew(times, tmp_path, monkeypatch):
    clock, file = Clock(monkeypatch), RatesFile(tmp_path / "rates.json")
    rates_at_start(TimedSpan(clock, 0.01, 0.0), file, KEY)
    rates = rates_at_start(TimedSpan(clock, 0.01 * times, 0.0), file, KEY)
    assert rates.decode_seconds_per_block == pytest.approx(0.001 * times)
    assert file.get(KEY) == rates


def test_a_key_tells_everything_apart_that_makes_a_difference():
    first: tuple[Any, ...] = (Revision("r"), "cpu x", "float32", "none", 1, "1.0")
    other: tuple[Any, ...] = (Revision("s"), "cpu y", "bfloat16", "int8", 2, "1.1")
    keys = [rates_key(*first)]
    for index in range(len(first)):
        changed: tuple[Any, ...] = (*first[:index], other[index], *first[index + 1 :])
        keys.append(rates_key(*changed))
    assert len(set(keys)) == len(first) + 1


def test_a_device_has_a_name():
    assert device_name("cpu").startswith("cpu ")
    assert len(device_name("cpu")) > len("cpu ")
