"""Growth in a long run is found, and noise is not taken for it."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak.growth import NOISE, Sample, growth, quarters, slope_per_minute


def samples(rss=lambda at: 500.0, tasks=lambda at: 40.0):
    return [Sample(float(at), rss(at), 30.0, tasks(at), 9.0) for at in range(600)]


def test_a_slope_is_per_minute():
    assert slope_per_minute([(0, 1.0), (30, 2.0), (60, 3.0)]) == pytest.approx(2.0)
    assert slope_per_minute([(5, 1.0)]) == 0
    assert slope_per_minute([]) == 0


def test_the_first_and_the_last_quarter_are_compared():
    assert quarters([1, 1, 5, 5, 9, 9, 3, 3]) == (1, 3)
    assert quarters([2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="no values"):
        quarters([])


def test_memory_that_grows_all_the_time_has_grown():
    found = growth(samples(rss=lambda at: 500 + at / 5), 60)
    assert found["grown"] == ["rss_mib"]
    assert found["rss_mib_per_minute"] == pytest.approx(12.0)


def test_growth_in_the_warm_up_is_none():
    assert growth(samples(rss=lambda at: 500 + min(at, 100) * 5), 101)["grown"] == []


def test_noise_is_no_growth():
    rng = random.Random(1)
    noisy = samples(lambda at: 500 + rng.uniform(-30, 30), lambda at: 40 + rng.randint(-10, 10))
    found = growth(noisy, 60)
    assert found["grown"] == []
    assert {f"{name}_per_minute" for name in NOISE} < found.keys()


def test_no_samples_have_not_grown():
    assert growth([], 60)["grown"] == []
