"""Packed weights: what is kept, what is computed with it, and that no shape or address does harm."""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from torch import Tensor, nn

from node.config import ConfigError
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.architecture import architecture_of
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.checkpoint.info import TRANSPOSED, is_matrix
from node.model.weights import compiling, kernels, quantize
from node.model.weights.plans import Plan, Way, choose_plan
from node.model.weights.quantize import (
    CODES,
    PackedExperts,
    PackedLinear,
    Packing,
    SideBySide,
    cache_dtype_for,
    dequantize_rows,
    fits_int8pack,
    measured_plan,
    merge_linears,
    packing_for,
    quantize_rows,
    training_products,
)
from tests.meta_device import DEVICE, Counted
from tests.model_fixtures import BLOCKS, TINY, save_tiny

torch.set_num_threads(1)

# float32 sums of n products are wrong by at most about n * 6e-8 of the sum of absolute values; eight partial
# sums make it n / 8, and errors of either sign make it far less.
TOLERANCE = 1e-6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def displaced(tensor: Tensor, bytes_off: int) -> Tensor:
    """The same tensor at an address that is `bytes_off` bytes behind a multiple of 64."""
    memory = torch.zeros(tensor.nbytes + 128, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64 + bytes_off
    moved = memory[begin : begin + tensor.nbytes].view(torch.uint8)
    moved.copy_(tensor.contiguous().view(torch.uint8).flatten())
    return moved.view(tensor.dtype).view(tensor.shape) if bytes_off % tensor.itemsize == 0 else tensor


def random_rows(seed: int, outs: int, width: int, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if kind == torch.int8:
        codes = torch.randint(-CODES, CODES + 1, (outs, width), dtype=torch.int8, generator=seeded(seed))
        return codes, torch.rand(outs, generator=seeded(seed + 1)) + 0.01
    return torch.randn(outs, width, generator=seeded(seed)).to(kind), None


def exact(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    relative: float = TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """The product in float64, and by how much a way may miss each number.

    relative: of the sum of the absolute values of its terms.

    Where x is rounded to 16 bits each of its numbers may be wrong by half a step.
    """
    weights = dequantize_rows(weight.double(), None if scale is None else scale.double(), torch.float64)
    bias = torch.zeros(len(weight)) if bias is None else bias
    terms = x.double().abs() @ weights.abs().T + bias.abs()
    allowed = relative * terms
    if kernels.INTEGERS and weight.dtype == torch.int8:
        half_a_step = x.double().abs().amax(-1, keepdim=True) / kernels.LARGEST / 2
        allowed += 1.0001 * half_a_step * weights.abs().sum(-1)
    return x.double() @ weights.T + bias, allowed


# The kernels


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 20),
    outs=st.integers(1, 70),
    width=st.integers(1, 200),
    kind=st.sampled_from([torch.int8, torch.bfloat16]),
    with_bias=st.booleans(),
    x_off=st.sampled_from([0, 4, 20]),
    weight_off=st.sampled_from([0, 2, 6, 10]),
    seed=st.integers(0, 1000),
)
def test_any_shape_at_any_address_is_multiplied_right(
    rows, outs, width, kind, with_bias, x_off, weight_off, seed
):
    weight, scale = random_rows(seed, outs, width, kind)
    bias = torch.randn(outs, generator=seeded(seed)) if with_bias else None
    x = displaced(torch.randn(rows, width, generator=seeded(seed + 2)), x_off)
    got = kernels.Rows(displaced(weight, weight_off), scale, bias)(x)
    expected, allowed = exact(x, weight, scale, bias)
    assert got.shape == (rows, outs)
    assert ((got - expected).abs() <= allowed).all()


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize(
    ("outs", "width"), [(1, 101), (3, 101), (64, 101), (131, 101), (3, 3101), (71, 3101)]
)
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_any_size(kind, outs, width):
    weight, scale = random_rows(5, outs, width, kind)
    rows = kernels.Rows(weight, scale, torch.randn(outs, generator=seeded(1)))
    x = torch.randn(40, width, generator=seeded(2))
    alone = torch.cat([rows(x[row : row + 1]) for row in range(40)])
    for count in (*range(1, 20), 40):
        assert torch.equal(rows(x[:count]), alone[:count])
        assert torch.equal(rows(x[40 - count :]), alone[40 - count :])


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outs", [4, 5, 6, 7, 64])
def test_one_row_and_long_rows_of_weights_are_multiplied_in_streams(kind, outs):
    width = kernels.SHORT_TILE_BYTES // 4 + 5
    weight, scale = random_rows(7, outs, width, kind)
    bias = torch.randn(outs, generator=seeded(1))
    x = torch.randn(1, width, generator=seeded(2))
    expected, allowed = exact(x, weight, scale, bias)
    assert ((kernels.Rows(weight, scale, bias)(x) - expected).abs() <= allowed).all()


def test_rows_beyond_a_panel_are_computed_too():
    width = 4096
    outs = 3 * kernels.PANEL_BYTES // width + 5
    weight, scale = random_rows(6, outs, width, torch.int8)
    x = torch.randn(7, width, generator=seeded(3))
    expected, allowed = exact(x, weight, scale, None)
    assert ((kernels.Rows(weight, scale, None)(x) - expected).abs() <= allowed).all()


def test_long_rows_of_the_largest_numbers_do_not_overflow():
    width = 3 * kernels.EXACT_NUMBERS + 77
    weight = torch.full((5, width), CODES, dtype=torch.int8)
    x = torch.ones(3, width) * torch.tensor([[1.0], [-1.0], [1e-3]])
    got = kernels.Rows(weight, torch.ones(5), None)(x)
    expected, _ = exact(x, weight, torch.ones(5), None)
    assert ((got - expected).abs() <= 1e-4 * expected.abs()).all()


@pytest.mark.skipif(not kernels.INTEGERS, reason="rows are not rounded to integers here")
@pytest.mark.parametrize("width", [1, 31, 576, kernels.EXACT_NUMBERS + 5, 5632])
def test_a_sum_of_integers_is_exact_and_rounded_once(width):
    weight = torch.randint(-CODES, CODES + 1, (9, width), dtype=torch.int8, generator=seeded(7))
    codes = torch.randint(-32767, 32768, (4, width), generator=seeded(8))
    codes[:, 0] = 32767  # so that the scale is 1
    got = kernels.Rows(weight, torch.ones(9), None)(codes.float())
    scale = torch.tensor(32767.0) * torch.tensor(1 / 32767)
    assert torch.equal(got, (codes.double() @ weight.double().T).float() * scale)


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_holds_no_number_gives_none_and_leaves_the_others_alone(kind, bad):
    weight, scale = random_rows(5, 40, 100, kind)
    weight[weight == 0] = 1  # times infinity it would be NaN, which is as good
    x = torch.randn(9, 100, generator=seeded(2))
    rows = kernels.Rows(weight, scale, None)
    sound = rows(x)
    x[4, 37] = bad
    got = rows(x)
    assert not torch.isfinite(got[4]).any()
    assert torch.equal(got[[0, 1, 2, 3, 5, 6, 7, 8]], sound[[0, 1, 2, 3, 5, 6, 7, 8]])


def test_rows_of_zeros_give_the_bias():
    weight, scale = random_rows(5, 7, 100, torch.int8)
    bias = torch.randn(7, generator=seeded(1))
    assert torch.equal(kernels.Rows(weight, scale, bias)(torch.zeros(2, 100)), bias.expand(2, 7))


@pytest.mark.parametrize(
    ("cpu", "features"),
    [("haswell", "+avx,+avx2,+fma,+f16c"), ("x86-64", "+sse2"), ("skylake-avx512", "")],
    ids=["AVX2", "SSE2", "AVX-512 without VNNI"],
)
def test_other_cpus_of_the_family_compute_the_same(cpu, features, pytestconfig):
    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    if cpu == "skylake-avx512" and kernels.LANES != 16:
        pytest.skip("this CPU has no AVX-512")
    code = """
import torch
from node.model.weights import kernels
g = torch.Generator().manual_seed(0)
for outs, width in ((70, 199), (12, 64), (1, 5), (7, 3101)):
    codes = torch.randint(-127, 128, (outs, width), dtype=torch.int8, generator=g)
    scale, x = torch.rand(outs, generator=g) + 0.01, torch.randn(13, width, generator=g)
    half = torch.randn(outs, width, generator=g).bfloat16()
    for rows, weight in ((kernels.Rows(codes, scale, None), codes * scale[:, None]),
                         (kernels.Rows(half, None, None), half.float())):
        got = rows(x)
        error = (got - x @ weight.T).abs() / (x.abs() @ weight.abs().T)
        assert error.max() < 1e-4, (outs, width, weight.dtype, error.max())
        assert torch.equal(rows(x[:1]), got[:1])
print(kernels.LANES, kernels.INTEGERS)
"""
    # Compiled once for each state of the source, as the kernels of this CPU are.
    kept = pytestconfig.cache.mkdir(f"kernels-{cpu}")
    environment = {"NUMBA_CPU_NAME": cpu, "NUMBA_CACHE_DIR": str(kept), "OMP_NUM_THREADS": "1"}
    if features:
        environment["NUMBA_CPU_FEATURES"] = features
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {"haswell": "8 True", "x86-64": "8 False", "skylake-avx512": f"{kernels.LANES} True"}
    assert done.stdout.strip() == expected[cpu]


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
def test_threads_change_no_bit(kind, monkeypatch):
    monkeypatch.setattr(kernels, "SLICE_WORK", 1)
    weight, scale = random_rows(7, 300, 37, kind)
    rows = kernels.Rows(weight, scale, torch.randn(300, generator=seeded(1)))
    x = torch.randn(9, 37, generator=seeded(2))
    assert kernels.slices_for(9 * 300 * 37, 300, 3) == 3
    assert torch.equal(rows(x, threads=3), rows(x))


def test_while_another_thread_uses_the_threads_one_is_enough(monkeypatch):
    monkeypatch.setattr(kernels, "SLICE_WORK", 1)
    weight, scale = random_rows(7, 300, 37, torch.int8)
    rows = kernels.Rows(weight, scale, None)
    x = torch.randn(9, 37, generator=seeded(2))
    with kernels.team(3) as together, kernels.team(2) as another:
        assert (together, another) == (True, False)
        assert torch.equal(rows(x, threads=3), rows(x))


@pytest.mark.parametrize(
    ("products", "outs", "threads", "slices"),
    [
        (10, 4096, 8, 1),
        (1 << 24, 4096, 8, 2),
        (1 << 30, 4096, 8, 8),
        (1 << 30, 100, 8, 1),
        (1 << 30, 4096, 1, 1),
    ],
)
def test_small_products_stay_in_one_thread(products, outs, threads, slices):
    assert kernels.slices_for(products, outs, threads) == slices


def test_what_the_kernels_cannot_read_is_refused():
    weight, scale = random_rows(8, 6, 16, torch.int8)
    for bad in (weight.double(), weight.t(), weight[:, ::2]):
        with pytest.raises(ValueError, match="are allowed, not"):
            kernels.Rows(bad, scale, None)
    for bad in (scale.double(), scale[:3], torch.rand(12)[::2]):
        with pytest.raises(ValueError, match="are allowed, not"):
            kernels.Rows(weight, bad, None)
        with pytest.raises(ValueError, match="are allowed, not"):
            kernels.Rows(weight, scale, bad)
    rows = kernels.Rows(weight, scale, None)
    for x in (torch.zeros(2, 15), torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16, device="meta")):
        with pytest.raises(ValueError, match="is multiplied, not"):
            rows(x)


def test_rows_that_do_not_lie_together_are_put_together_first():
    weight, scale = random_rows(9, 6, 16, torch.int8)
    rows = kernels.Rows(weight, scale, None)
    x = torch.randn(16, 5, generator=seeded(4)).t()
    assert torch.equal(rows(x), rows(x.contiguous()))


def test_where_the_cache_cannot_be_used_kernels_are_compiled_each_time(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    asked = []

    def njit(signature, **options):
        def compiled(function):
            asked.append(options.get("cache", False))
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return function

        return compiled

    monkeypatch.setattr(compiling, "njit", njit)
    assert compiling.compiled(kernels._called, types.void(types.int8)) is kernels._called
    assert asked == [True, True, False]


# What is kept


def test_a_code_is_the_nearest_of_255_steps_to_the_largest_value_of_its_row():
    weight = torch.randn(30, 77, generator=seeded(1)) * torch.logspace(-6, 6, 30)[:, None]
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    assert (codes.abs().amax(1) == 127).all()
    assert ((weight - codes * scale[:, None]).abs() <= scale[:, None] * 0.5001).all()
    mirrored, _ = quantize_rows(-weight)
    assert torch.equal(mirrored, -codes)


def test_rows_of_zeros_and_of_the_smallest_numbers_survive():
    weight = torch.zeros(3, 8)
    weight[1] = 1e-45
    weight[2] = 1e38
    codes, scale = quantize_rows(weight)
    assert not codes[:2].any()
    assert (codes[2] == 127).all()
    assert torch.isfinite(dequantize_rows(codes, scale, torch.float32)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad):
    weight = torch.ones(4, 4)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_rows(weight)


def test_a_matrix_is_quantised_in_pieces_and_gives_the_same(monkeypatch):
    weight = torch.randn(50, 20, generator=seeded(2)).bfloat16()
    whole = quantize_rows(weight)
    monkeypatch.setattr(quantize, "PIECE_VALUES", 64)
    for got, expected in zip(quantize_rows(weight), whole, strict=True):
        assert torch.equal(got, expected)


def test_codes_and_scales_are_those_of_bitsandbytes():
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.randn(64, 96, generator=seeded(3)).half()
    theirs, largest, _ = int8_vectorwise_quant(weight)
    ours, scale = quantize_rows(weight)
    assert torch.allclose(largest.float(), scale * CODES, rtol=1e-6)
    assert (theirs.int() - ours.int()).abs().max() <= 1  # a value half-way between two codes
    assert (theirs != ours).float().mean() < 0.01


# Which way


def test_the_fastest_way_is_taken_for_every_number_of_rows():
    seconds: dict[Way, dict[int, float]] = {
        "compiled": {1: 1.0, 16: 16.0, 64: 64.0},
        "dequantise": {1: 11.0, 16: 18.5, 64: 42.5},
    }
    plan = choose_plan(seconds)
    assert [plan.way(rows) for rows in (1, 16, 21, 22, 64, 4096)] == [
        "compiled", "compiled", "compiled", "dequantise", "dequantise", "dequantise",
    ]  # fmt: skip
    for rows in range(1, 65):  # both are straight lines here: rows and 10.5 + rows / 2
        assert plan.way(rows) == ("compiled" if rows <= 10.5 + rows / 2 else "dequantise")


def test_one_way_needs_no_choice_and_a_tie_goes_to_the_first():
    assert choose_plan({"dequantise": {1: 1.0, 8: 2.0}}) == Plan(((1, "dequantise"),))
    even = {1: 1.0, 8: 2.0}
    assert choose_plan({"compiled": even, "dequantise": even}) == Plan(((1, "compiled"),))


def test_three_ways_may_follow_each_other():
    plan = choose_plan(
        {
            "int8pack": {1: 1.0, 16: 40.0, 64: 200.0},
            "compiled": {1: 2.0, 16: 20.0, 64: 90.0},
            "dequantise": {1: 30.0, 16: 32.0, 64: 50.0},
        }
    )
    assert [way for _, way in plan.steps] == ["int8pack", "compiled", "dequantise"]
    assert plan.way(1) == "int8pack"
    assert plan.way(16) == "compiled"
    assert plan.way(64) == "dequantise"


def test_a_plan_is_measured_once_for_layers_of_a_kind(monkeypatch):
    monkeypatch.setattr(quantize, "_plans", {})
    timed = []

    def note(part, way, dtype):
        timed.append((way, part.out_features))
        return {1: len(timed)}

    monkeypatch.setattr(quantize, "_timed", note)
    linear = PackedLinear(*random_rows(1, 4096, 512, torch.int8))
    plan = measured_plan(linear, torch.float32)
    assert measured_plan(linear, torch.float32) is plan
    assert timed == [("compiled", 2048), ("dequantise", 2048)]  # a part, as large as a million weights
    assert plan == Plan(((1, "compiled"),))


def test_the_ways_are_really_timed(monkeypatch):
    monkeypatch.setattr(quantize, "MEASURED_ROWS", (1, 2))
    monkeypatch.setattr(quantize, "LEAST_MEASURED", 0)
    monkeypatch.setattr(quantize, "_plans", {})
    plan = measured_plan(PackedLinear(*random_rows(1, 8, 8, torch.int8)), torch.float32)
    assert set(plan.steps[0]) <= {1, "compiled", "dequantise"}


def test_float32_layers_have_a_plan_too_and_small_layers_are_not_measured(monkeypatch):
    monkeypatch.setattr(quantize, "_plans", {})
    seconds = {"compiled": {1: 1.0, 256: 300.0}, "dequantise": {1: 2.0, 256: 200.0}}
    monkeypatch.setattr(quantize, "_timed", lambda part, way, dtype: seconds[way])
    large, small = torch.nn.Linear(512, 256), torch.nn.Linear(64, 64)
    assert measured_plan(large, torch.float32).way(256) == "dequantise"
    assert measured_plan(small, torch.float32) == Plan(((1, "compiled"),))
    x = torch.randn(3, 512, generator=seeded(5))
    ways = [quantize._runner(quantize._part(large, 100), way)(x) for way in ("compiled", "dequantise")]
    assert_near = torch.testing.assert_close
    assert_near(ways[0], ways[1])
    assert_near(ways[0], torch.nn.functional.linear(x, large.weight[:100]))


def test_the_compiled_way_is_left_for_a_gain_alone():
    seconds: dict[Way, dict[int, float]] = {
        "compiled": {1: 1.0, 16: 11.0, 64: 60.0}, "dequantise": {1: 9.0, 16: 10.0, 64: 40.0},
    }  # fmt: skip
    assert choose_plan(seconds, 1.2).way(16) == "compiled"
    assert choose_plan(seconds, 1.2).way(64) == choose_plan(seconds).way(16) == "dequantise"


@pytest.mark.parametrize(
    ("weight", "activations", "hardware", "ways"),
    [
        (torch.int8, torch.float32, True, ("compiled", "dequantise")),
        (torch.int8, torch.bfloat16, True, ("compiled", "int8pack", "dequantise")),
        (torch.int8, torch.bfloat16, False, ("compiled", "dequantise")),
        (torch.bfloat16, torch.bfloat16, True, ("compiled", "dequantise")),
    ],
)
def test_torchs_own_int8_product_is_tried_where_the_hardware_is_made_for_it(
    weight, activations, hardware, ways, monkeypatch
):
    monkeypatch.setattr(quantize, "has_bfloat16", lambda: hardware)
    assert quantize.ways_for(weight, activations) == ways
    monkeypatch.setattr(quantize, "kernels", lambda: None)  # where numba is not there
    assert quantize.ways_for(weight, activations) == ways[1:]


# The layer


def packed(
    kind: torch.dtype = torch.int8, outs: int = 24, width: int = 32, bias: bool = True
) -> PackedLinear:
    weight, scale = random_rows(11, outs, width, kind)
    return PackedLinear(weight, scale, torch.randn(outs, generator=seeded(12)) if bias else None)


@pytest.mark.parametrize("way", ["compiled", "dequantise", "int8pack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (0, 32)])
def test_each_way_gives_the_product_in_the_dtype_of_x(way, dtype, shape):
    linear = packed()
    linear.plan = Plan(((1, way),))
    x = torch.randn(shape, generator=seeded(13)).to(dtype)
    got = linear(x)
    relative = TOLERANCE if dtype == torch.float32 else 0.02  # a result in bfloat16 has 8 bits
    expected, allowed = exact(x, linear.weight, linear.scale, linear.bias, relative)
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 24)
    assert ((got - expected).abs() <= allowed).all()


@pytest.mark.parametrize("offset", [2, 16, 30])
def test_misaligned_activations_do_torchs_own_product_no_harm(offset):
    linear = packed(bias=False)
    linear.plan = Plan(((1, "int8pack"),))
    x = torch.randn(3, 32, generator=seeded(13)).bfloat16()
    moved = displaced(x, offset)
    assert moved.data_ptr() % 32
    assert not fits_int8pack(moved, linear.weight)
    assert torch.equal(linear(moved), linear(x))


def test_weights_that_torchs_own_product_cannot_take_are_moved_or_go_another_way():
    weight, scale = random_rows(11, 24, 32, torch.int8)
    misplaced = displaced(weight, 3)
    assert misplaced.data_ptr() % 16
    assert PackedLinear(misplaced, scale).weight.data_ptr() % 16 == 0
    odd = packed(width=30)
    odd.plan = Plan(((1, "int8pack"),))
    x = torch.randn(2, 30, generator=seeded(1)).bfloat16()
    assert not fits_int8pack(x, odd.weight)
    assert torch.isfinite(odd(x)).all()


def test_without_numba_torch_computes(monkeypatch, caplog):
    expected = packed()(torch.ones(2, 32))
    monkeypatch.setattr(quantize, "kernels", lambda: None)
    linear = packed()
    assert linear.plan == Plan(((1, "dequantise"),))
    assert torch.allclose(linear(torch.ones(2, 32)), expected, rtol=1e-4, atol=1e-4)


def test_a_numba_that_cannot_be_imported_is_named_once(monkeypatch, caplog):
    import sys

    import node.model.weights

    monkeypatch.delattr(node.model.weights, "kernels")
    monkeypatch.setitem(sys.modules, "node.model.weights.kernels", None)
    quantize.kernels.cache_clear()
    try:
        assert quantize.kernels() is None
        assert "no kernels for packed weights" in caplog.text
    finally:
        quantize.kernels.cache_clear()


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_with_products_of_bfloat16_rounds_gradients_to_it_and_nothing_else(kind, dtype, monkeypatch):
    monkeypatch.setattr(quantize, "multiplies_bfloat16", lambda: True)
    linear = packed(kind)
    gradient = torch.randn(2, 3, 24, generator=seeded(15))
    exact = gradient @ linear.dequantized(torch.float32)
    found = linear.back(gradient.to(dtype))
    assert found.dtype == dtype
    assert (found - exact).norm() / exact.norm() < 2**-8  # rounded twice: the gradient and the answer
    assert not torch.equal(found.float(), exact)


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("rounds", [True, False])
def test_only_weights_in_bfloat16_are_multiplied_in_it_and_only_in_training(kind, rounds, monkeypatch):
    monkeypatch.setattr(quantize, "multiplies_bfloat16", lambda: rounds)
    linear = packed(kind)
    x = torch.randn(4, 32, generator=seeded(14), requires_grad=True)
    usual = linear(x.detach())
    with training_products():
        without, with_gradient = linear(x.detach()), linear(x)
    assert torch.equal(without, with_gradient)
    assert without.dtype == torch.float32
    assert torch.equal(without, usual) is not (rounds and kind == torch.bfloat16)
    assert (without - usual).norm() / usual.norm() < 2**-7
    assert torch.equal(linear(x.detach()), usual)


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
def test_the_derivative_is_that_of_the_weights_that_are_kept(kind, monkeypatch):
    monkeypatch.setattr(quantize, "multiplies_bfloat16", lambda: False)
    linear = packed(kind)
    x = torch.randn(2, 3, 32, generator=seeded(14), requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    gradient = torch.randn(2, 3, 24, generator=seeded(15))
    (got,) = torch.autograd.grad(linear(x), x, gradient)
    (expected,) = torch.autograd.grad(
        nn.functional.linear(twin, linear.dequantized(torch.float32), linear.bias), twin, gradient
    )
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not linear(x.detach()).requires_grad
    with torch.no_grad():
        assert not linear(x).requires_grad


def test_a_cast_of_the_model_leaves_what_is_kept_alone():
    linear = packed()
    before = linear(torch.ones(1, 32))
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == torch.int8
    assert linear.scale.dtype == torch.float32
    linear.to(torch.float32)
    assert torch.equal(linear(torch.ones(1, 32)), before)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(torch.ones(1, 32)), before)


def test_scales_belong_to_int8_and_to_nothing_else():
    weight, scale = random_rows(1, 4, 8, torch.int8)
    for bad in ((weight, None), (weight.bfloat16(), scale), (weight.float(), None)):
        with pytest.raises(ValueError, match="int8 rows have scales"):
            PackedLinear(*bad)


def frozen_linear(outs: int, bias: bool) -> nn.Linear:
    return nn.Linear(16, outs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("kind", ["plain", torch.int8, torch.bfloat16])
def test_merged_layers_give_the_parts_side_by_side_and_share_their_memory(kind, biases):
    sizes = (6, 3, 11)
    parts: Sequence[Any]
    if kind == "plain":
        parts = [frozen_linear(size, bias) for size, bias in zip(sizes, biases, strict=True)]
    else:
        parts = [packed(kind, size, 16, bias) for size, bias in zip(sizes, biases, strict=True)]
    x = torch.randn(5, 16, generator=seeded(16))
    before = [part(x) for part in parts]
    merged: Any = merge_linears(parts)
    assert type(merged) is type(parts[0])
    assert torch.allclose(merged(x), torch.cat(before, -1), rtol=1e-6, atol=1e-6)
    assert [part.weight.untyped_storage().data_ptr() for part in parts] == [
        merged.weight.untyped_storage().data_ptr()
    ] * 3
    for part, expected in zip(parts, before, strict=True):
        assert torch.allclose(part(x), expected, rtol=1e-6, atol=1e-6)
    if kind != "plain":
        assert torch.equal(merged(x), torch.cat(before, -1))
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_layers_of_different_kinds_are_not_merged():
    plain, int8, bfloat16 = frozen_linear(4, False), packed(width=16), packed(torch.bfloat16, width=16)
    for parts in ((plain, int8), (int8, bfloat16), (int8, packed(width=20)), (nn.Identity(), nn.Identity())):
        assert merge_linears(parts) is None
    assert merge_linears([nn.Linear(16, 4), nn.Linear(16, 4)]) is None  # in training

    class Special(nn.Linear):
        """As bitsandbytes' are."""

    assert merge_linears([Special(16, 4).requires_grad_(False)] * 2) is None


# Spans


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("quantize", "dtype", "device", "hardware", "packing"),
    [
        ("none", F32, "cpu", False, Packing("plain", F32)),
        ("none", F16, "cpu", False, Packing("plain", F16)),
        ("none", BF16, "cpu", True, Packing("plain", BF16)),
        ("none", BF16, "cpu", False, Packing("bfloat16", F32)),
        ("int8", F32, "cpu", True, Packing("int8", F32)),
        ("int8", BF16, "cpu", True, Packing("int8", BF16)),
        ("int8", BF16, "cpu", False, Packing("int8", F32)),
        ("int8", F16, "cpu", True, Packing("int8", F32)),
        ("nf4", F32, "cpu", False, Packing("nf4", F32)),
        ("nf4", BF16, "cpu", True, Packing("nf4", BF16)),
        ("none", BF16, "cuda", False, Packing("plain", BF16)),
        ("int8", F16, "cuda", False, Packing("int8", F16)),
        ("llm_int8", F16, "cuda", False, Packing("llm_int8", F16)),
        ("nf4", BF16, "cuda", False, Packing("nf4", BF16)),
        ("none", F16, "mps", False, Packing("plain", F16)),
    ],
)
def test_what_is_kept_and_computed_follows_from_device_and_wish(quantize, dtype, device, hardware, packing):
    assert packing_for(quantize, dtype, device, bfloat16=hardware) == packing


@pytest.mark.parametrize(
    ("packing", "fused", "dtype"),
    [
        (Packing("plain", F32), True, F32),
        (Packing("int8", F32), True, BF16),
        (Packing("bfloat16", F32), True, BF16),
        (Packing("bfloat16", F32), False, F32),  # the library would widen the whole cache in every step
        (Packing("nf4", F32), True, F32),
        (Packing("plain", BF16), True, BF16),
        (Packing("plain", F16), False, F16),
    ],
)
def test_a_cache_is_smaller_where_matrices_are(packing, fused, dtype):
    assert cache_dtype_for("auto", packing, "cpu", fused=fused) == dtype
    assert cache_dtype_for("auto", packing, "cuda", fused=fused) == packing.dtype
    for chosen in (F32, BF16):
        name = str(chosen).removeprefix("torch.")
        assert cache_dtype_for(name, packing, "cpu", fused=fused) == chosen
        if packing.dtype != chosen:
            with pytest.raises(ConfigError, match=f"{name} is for cpu; on cuda it is in "):
                cache_dtype_for(name, packing, "cuda", fused=fused)


def test_a_quantisation_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="'int4' is not one of none, int8, nf4"):
        packing_for("int4", F32, "cpu", bfloat16=False)
    with pytest.raises(ConfigError, match="int8 works on cpu and cuda, not on mps"):
        packing_for("int8", F32, "mps", bfloat16=False)


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request, tmp_path_factory) -> ModelFolder:
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, path / "model", max_shard_size="1GB")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def with_weights(folder: ModelFolder, change) -> ModelFolder:
    """A copy of a model beside it, with each matrix of its blocks changed."""
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(folder.path, folder.path.with_name("changed"), dirs_exist_ok=True))
    file = path / "model.safetensors"
    architecture = architecture_of(folder.config["model_type"])
    tensors = load_file(file)
    for name, tensor in tensors.items():
        place = architecture.block_of(name)
        if place is not None and is_matrix(place[1], tuple(tensor.shape)):
            turned = architecture.model_type in TRANSPOSED
            tensors[name] = change(tensor.t() if turned else tensor)
            tensors[name] = (tensors[name].t() if turned else tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return open_folder(path, memo=HashMemo(path.with_name("others.json")))


def outputs(span: Span, tokens: int = 6) -> Tensor:
    cache = span.new_cache(2, 64, span.dtype)
    hidden = torch.randn(2, tokens, span.hidden_size, generator=seeded(20))
    first = span.forward(hidden[:, :-1], cache, 0)
    return torch.cat([first, span.forward(hidden[:, -1:], cache, tokens - 1)], 1).float()


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_span_in_int8_computes_what_its_rounded_weights_say(tiny):
    rounded = with_weights(tiny, lambda weight: dequantize_rows(*quantize_rows(weight), torch.float32))
    span = load_span(tiny, 0, BLOCKS, quantize="int8")
    assert span.dtype == torch.float32
    # With rows rounded to 16 bits, which norms behind the matrices (olmo2, glm4) make 2e-4.
    assert_close(outputs(span), outputs(load_span(rounded, 0, BLOCKS)), 1e-3 if kernels.INTEGERS else 1e-5)


def test_every_matrix_of_a_block_is_packed_but_for_gates_and_experts_in_one_tensor(tiny, caplog):
    span = load_span(tiny, 2, 4, quantize="int8")
    floats = {name.rpartition(".")[0] for name, each in span.model.named_parameters() if each.dim() == 2}
    together = {name for name, each in span.model.named_parameters() if each.dim() == 3}
    assert all(name.rpartition(".")[2] in ("gate", "router", "experts") for name in floats)
    kind = tiny.config["model_type"]
    together = {name for name in together if "conv" not in name}
    assert bool(together) == (kind in ("gpt_oss", "llama4_text"))
    assert ("the experts stay in float32" in caplog.text) == bool(together)
    experts = [each for each in span.model.modules() if isinstance(each, PackedExperts)]
    assert bool(experts) == (kind in ("mixtral", "qwen3_moe", "deepseek_v3"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_cpu_without_bfloat16_keeps_weights_in_it_and_computes_in_float32(name, tmp_path, monkeypatch):
    monkeypatch.setattr("node.model.blocks.span.has_bfloat16", lambda: False)
    save_tiny(name, tmp_path / "model", max_shard_size="1GB")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    rounded = with_weights(folder, lambda weight: weight.bfloat16().float())
    span = load_span(folder, 0, BLOCKS, dtype=torch.bfloat16)
    assert span.dtype == torch.float32
    assert_close(outputs(span), outputs(load_span(rounded, 0, BLOCKS)))
    assert span.nbytes < 0.6 * load_span(folder, 0, BLOCKS).nbytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> ModelFolder:
    path = tmp_path_factory.mktemp("llama")
    save_tiny("llama", path / "model", max_shard_size="1GB")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def test_bitsandbytes_int8_gets_the_same_codes(llama, monkeypatch):
    """What CUDA is given, on the CPU: slow there, and the same."""
    from bitsandbytes.nn import Linear8bitLt

    ours = load_span(llama, 0, 2, quantize="int8")
    monkeypatch.setattr(
        "node.model.blocks.span.packing_for", lambda *_, **__: Packing("llm_int8", torch.float32)
    )
    span = load_span(llama, 0, 2, quantize="int8")
    theirs = {path: each for path, each in span.model.named_modules() if isinstance(each, Linear8bitLt)}
    assert len(theirs) == 14
    for path, layer in theirs.items():
        twin = cast(Any, ours.model.get_submodule(path))
        assert layer.state.threshold == quantize.LLM_INT8_THRESHOLD
        codes = layer.weight.data if layer.state.CB is None else layer.state.CB
        assert torch.equal(codes, twin.weight)
        largest = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        assert torch.allclose(largest / CODES, twin.scale)
    assert_close(outputs(span), outputs(ours), 0.05)  # activations are rounded to 8 bits as well


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_a_product_on_a_device_is_one_operation_and_has_a_derivative(shape):
    weight, scale = random_rows(3, 12, 8, torch.int8)
    layer = PackedLinear(weight, scale, torch.randn(12))
    x = torch.randn(*shape, 8)
    expected, _ = exact(x, weight, scale, layer.bias)
    assert_close(layer._there(x).double(), expected, 1e-6)
    layer.to(DEVICE)
    there = torch.empty(*shape, 8, device=DEVICE, dtype=torch.bfloat16)
    with Counted() as counted, torch.inference_mode():
        answer = layer(there)
    assert (answer.shape, answer.dtype) == ((*shape, 12), torch.bfloat16)
    assert counted.launched == {"int8_linear": 1}
    there.requires_grad_()
    (found,) = torch.autograd.grad(layer(there).sum(), there)
    assert (found.shape, found.dtype) == (there.shape, torch.bfloat16)


@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32)])
def test_what_is_computed_on_a_device_may_be_written_into(shape):
    layer = PackedLinear(*quantize_rows(torch.randn(8, 32)))
    layer._is_here = False
    leaf = torch.randn(shape, requires_grad=True)
    answer = layer(leaf)
    answer += 1
    answer.sum().backward()
    assert torch.allclose(leaf.grad, layer.back(torch.ones_like(answer)))


def test_layers_of_bitsandbytes_on_a_device_stand_side_by_side_unmerged():
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for kind in (Linear4bit, Linear8bitLt):
        parts = [kind(16, outs, bias=False, device="meta").requires_grad_(False) for outs in (4, 8)]
        merged = merge_linears(parts)
        assert isinstance(merged, SideBySide)
        assert list(merged.parts) == parts
        here = [kind(16, 4, bias=False).requires_grad_(False) for _ in range(2)]
        assert merge_linears(here) is None, "the library computes them on a CPU"
    ones = [nn.Linear(3, outs) for outs in (2, 5)]
    x = torch.randn(4, 3)
    assert torch.equal(SideBySide(ones)(x), torch.cat([each(x) for each in ones], -1))


def test_nf4_is_bitsandbytes_four_bits(llama):
    from bitsandbytes.nn import Linear4bit

    span = load_span(llama, 0, 2, quantize="nf4")
    assert sum(isinstance(each, Linear4bit) for each in span.model.modules()) == 14
    plain = load_span(llama, 0, 2)
    assert_close(outputs(span), outputs(plain), 0.3)
    assert span.nbytes < 0.25 * plain.nbytes


def test_a_span_in_int8_takes_a_quarter_of_the_memory(llama):
    plain, span = load_span(llama, 0, 3), load_span(llama, 0, 3, quantize="int8")
    scales = sum(each.scale.nbytes for each in span.model.modules() if isinstance(each, PackedLinear))
    matrices = sum(each.numel() for each in plain.model.parameters() if each.dim() == 2)
    rest = sum(each.nbytes for each in plain.model.parameters() if each.dim() == 1)
    assert span.nbytes - rest - scales == matrices + plain.nbytes - 4 * matrices - rest


def changed(llama: ModelFolder, tmp_path: Path, change) -> ModelFolder:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(llama.path, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return open_folder(path, memo=HashMemo(tmp_path / "hashes.json"))


def test_what_is_wrong_with_a_matrix_is_said_when_quantising_too(llama, tmp_path):
    def missing(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def narrow(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)

    def homeless(tensors):
        tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2, 2)

    def poisoned(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")

    def without_scales(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)

    for number, (change, fault) in enumerate(
        (
            (missing, r"tensor layers.1.mlp.up_proj.weight of blocks 0:3 is missing"),
            (narrow, r"layers.1.mlp.up_proj.weight .* 40x32, the config asks for 48x32"),
            (homeless, r"layers.1.mlp.extra.weight .* has no place in the model"),
            (poisoned, r"layers.1.mlp.up_proj.weight: NaN or infinity"),
            (without_scales, r"int8 tensor layers.1.mlp.up_proj.weight has no 48 float32 scales"),
        )
    ):
        folder = changed(llama, tmp_path / str(number), change)
        with pytest.raises(ConfigError, match=fault):
            load_span(folder, 0, 3, quantize="int8")


def test_experts_of_different_sizes_or_with_a_gap_are_refused(tmp_path):
    save_tiny("mixtral", tmp_path / "mixtral", max_shard_size="1GB")
    mixtral = open_folder(tmp_path / "mixtral", memo=HashMemo(tmp_path / "hashes.json"))

    def gap(tensors):
        del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]

    def small(tensors):
        tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"] = torch.zeros(40, 32)

    for number, change in enumerate((gap, small)):
        folder = changed(mixtral, tmp_path / str(number), change)
        with pytest.raises(ConfigError, match=r"layers.0.mlp.experts.weight .* the config asks for 4x96x32"):
            load_span(folder, 0, 1, quantize="int8")


def test_progress_tells_how_much_has_been_quantised(llama):
    seen = []
    load_span(llama, 0, 2, quantize="int8", progress=lambda *facts: seen.append(facts))
    quantising = [(done, total) for what, done, total in seen if what.startswith("quantising")]
    assert quantising[-1][0] == quantising[-1][1] > 0
    assert quantising == sorted(quantising)


def test_a_folder_says_whether_it_is_quantised(llama):
    assert llama.quantize == "none"
    assert replace(llama, config={**llama.config, "raceme_quantize": "int8"}).quantize == "int8"
    assert json.loads((llama.path / "config.json").read_text()).get("raceme_quantize") is None
