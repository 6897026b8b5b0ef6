"""Products with int8 weights on a GPU: the way by rows, its measurement, gradients, bitsandbytes' limits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from node.config import ConfigError
from node.model.cuda import available, measured, ops, torch_ops
from node.model.weights import quantize
from node.model.weights.plans import Plan
from node.model.weights.quantize import (
    Experts,
    Matrix,
    PackedLinear,
    Packing,
    await_matrices,
    check_sums,
    fill,
    plan_on_device,
    quantize_rows,
)

CPU = torch.device("cpu")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A kernel for products, on the CPU; the rows of its calls."""
    rows: list[int] = []

    def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(len(x))
        return torch_ops.int8_linear(x, weight, scale, bias)

    monkeypatch.setattr(available, "_found", {CPU: {"int8_linear": product}})
    monkeypatch.setattr(measured, "_plans", {})
    return rows


def weights(outs: int = 8, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    return quantize_rows(torch.randn(outs, width, generator=torch.Generator().manual_seed(seed)))


def on_a_device(*parts: Tensor | None) -> PackedLinear:
    """A layer that takes the ways of a device, with its tensors on the CPU."""
    weight, scale, *bias = parts
    assert weight is not None
    layer = PackedLinear(weight, scale, *bias)
    layer._is_here, layer.plan = False, quantize._first_plan(False)
    return layer


def timer(
    kernel: list[int], triton: Callable[[int], float], dequantise: Callable[[int], float]
) -> measured.Seconds:
    """Seconds of a run by the way that it takes, for each of its layers."""

    def seconds(run: measured.Run) -> float:
        before = len(kernel)
        torch_calls: list[int] = []
        original = torch_ops.int8_linear

        def noted(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            torch_calls.append(len(x))
            return original(x, weight, scale, bias)

        torch_ops.int8_linear = noted
        try:
            run()
        finally:
            torch_ops.int8_linear = original
        by_kernel = kernel[before:]
        assert not by_kernel or len(by_kernel) == len(torch_calls)  # the kernel here calls torch's
        return sum(map(triton, by_kernel)) if by_kernel else sum(map(dequantise, torch_calls))

    return seconds


# The choice


def test_the_faster_way_is_taken_for_each_number_of_rows_and_measured_once(kernel):
    seconds = timer(kernel, lambda rows: 1 + rows / 10, lambda rows: 11 + rows / 100)
    plan = measured.measured_plan([weights(), weights(seed=1)], torch.float32, seconds)
    assert [plan.way(rows) for rows in (1, 64, 100, 250, 4096)] == [
        "triton", "triton", "triton", "dequantise", "dequantise",
    ]  # fmt: skip
    measurements = len(kernel)
    assert set(kernel) == set(measured.MEASURED_ROWS)
    assert measured.measured_plan([weights(seed=2)], torch.float32, seconds) is plan
    assert len(kernel) == measurements
    assert measured.measured_plan([weights(9)], torch.float32, seconds) is not plan
    assert measured.measured_plan([weights()], torch.bfloat16, seconds) is not plan


def test_only_as_many_layers_are_read_as_a_cards_cache_cannot_keep(kernel, monkeypatch):
    monkeypatch.setattr(measured, "READ_BYTES", 3 * 8 * 16)
    seconds = timer(kernel, lambda rows: 1.0, lambda rows: 1.0)
    plan = measured.measured_plan([weights(seed=seed) for seed in range(9)], torch.float32, seconds)
    assert len(kernel) == 3 * len(measured.MEASURED_ROWS)
    assert plan == Plan(((1, "triton"),))


def test_without_the_kernel_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(available, "_found", {CPU: {"norm": torch_ops.norm}})
    never = lambda run: pytest.fail("nothing is to be measured")  # noqa: E731
    assert measured.measured_plan([weights()], torch.float32, never) == Plan(((1, "dequantise"),))


def test_a_card_without_memory_for_weights_written_out_reads_int8_and_asks_again(kernel):
    def seconds(run: measured.Run) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measured.measured_plan([weights()], torch.float32, seconds) == Plan(((1, "triton"),))
    later = timer(kernel, lambda rows: 2.0, lambda rows: 1.0)
    assert measured.measured_plan([weights()], torch.float32, later) == Plan(((1, "dequantise"),))


def test_a_card_that_records_no_launches_is_not_timed_and_serves(kernel, caplog):
    def seconds(run: measured.Run) -> float:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    assert measured.measured_plan([weights()], torch.float32, seconds) == Plan(((1, "auto"),))
    (line,) = (record.getMessage() for record in caplog.records)
    assert "8 x 16" in line
    assert "not permitted" in line


def test_a_run_is_timed_from_an_idle_device_to_an_idle_device():
    now, queued, log = 0.0, 0.0, []
    launched = iter([9.0, 3.0, 2.0, 5.0, 2.5, 4.0])  # the first replay brings the card to its speed

    def replay() -> None:
        nonlocal queued
        queued += next(launched)
        log.append("replay")

    def wait(device: torch.device) -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0
        log.append("wait")

    taken = measured.seconds_on(CPU, replay, lambda device, run: run, lambda: now, wait)
    assert taken == 2.0
    assert log == ["replay", *["wait", "replay", "wait"] * measured.RUNS]


def test_layers_of_a_span_have_the_plan_of_their_shape(kernel, monkeypatch):
    asked = []

    def plan(layers: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Plan:
        asked.append((len(layers), tuple(layers[0][0].shape), dtype))
        return Plan(((1, "triton"), (len(layers[0][0]), "dequantise")))

    monkeypatch.setattr(measured, "measured_plan", plan)
    here, there = PackedLinear(*weights()), [on_a_device(*weights(outs)) for outs in (8, 12, 8)]
    floats = on_a_device(torch.ones(4, 4, dtype=torch.bfloat16), None)
    before = here.plan, floats.plan
    plan_on_device([here, floats, nn.Linear(2, 2), *there], torch.bfloat16)
    assert asked == [(2, (8, 16), torch.bfloat16), (1, (12, 16), torch.bfloat16)]
    assert (here.plan, floats.plan) == before
    assert there[0].plan is there[2].plan
    for rows in (1, 7, 8, 12):
        there[0](torch.randn(2, rows, 16).flatten(0, 1)[:rows])
    assert kernel == [1, 7]


def test_before_it_is_measured_a_layer_takes_the_kernel_for_the_rows_of_a_step(kernel):
    layer = on_a_device(*weights())
    for rows in (1, ops.MOST_TRITON_ROWS, ops.MOST_TRITON_ROWS + 1):
        layer(torch.randn(rows, 16))
    assert kernel == [1, ops.MOST_TRITON_ROWS]


def test_a_layer_that_moves_to_a_device_takes_the_ways_of_the_device():
    layer = PackedLinear(*weights())
    layer.plan = Plan(((1, "int8pack"),))
    layer.to("cpu")
    assert layer.plan == Plan(((1, "int8pack"),))
    layer.to("meta")
    assert layer.plan == Plan(((1, "auto"),))
    assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 8)


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 3, 16), (0, 16)])
def test_the_gradient_of_a_layer_on_a_device_is_that_of_float32(kernel, dtype, shape):
    codes, scale = weights()
    layer = on_a_device(codes, scale, torch.randn(8))
    x = torch.randn(shape).to(dtype).requires_grad_()
    answer = layer(x)
    given = torch.randn(answer.shape).to(dtype)
    answer.backward(given)
    assert x.grad is not None
    expected = given.double() @ (codes.double() * scale.double()[:, None])
    assert x.grad.dtype == dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    assert torch.allclose(x.grad.double(), expected, rtol=0, atol=rounding * largest)


def test_a_small_gradient_of_float16_is_not_lost_to_small_scales(kernel):
    codes = torch.full((4, 4), 127, dtype=torch.int8)
    layer = on_a_device(codes, torch.full((4,), 1e-4))
    x = torch.ones(1, 4, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.full((1, 4), 2e-5, dtype=torch.float16))  # times a scale: below float16's least
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full_like(x, 4 * 2e-5 * 127e-4), rtol=0.1)


# bitsandbytes' float16


def test_int8_weights_with_sums_beyond_float16_are_refused_for_bitsandbytes():
    codes = torch.full((2, 100), -128, dtype=torch.int8)
    check_sums(Matrix(codes, torch.tensor([0.0, -0.8])), torch.tensor([3.0, 1.0]))  # 6 * 100 * 128 * 0.8
    with pytest.raises(ConfigError, match=r"may be 69120 here.*65504 at most; --quantize int8"):
        check_sums(Matrix(codes, torch.tensor([0.1, -0.9])), None)
    with pytest.raises(ConfigError, match="may be 66440"):
        check_sums(Matrix(codes, torch.tensor([0.1, -0.8])), torch.tensor([0.0, -5000.0]))


def test_loading_for_bitsandbytes_names_the_layer_with_such_weights():
    model = nn.Sequential(nn.Linear(100, 2, bias=False), nn.Linear(100, 2, bias=False))
    small, large = (
        Matrix(torch.full((2, 100), 127, dtype=torch.int8), torch.full((2,), s)) for s in (0.1, 1)
    )
    matrices: dict[str, Matrix | Experts] = {"0": small, "1": large}
    await_matrices(model, matrices)
    with pytest.raises(ConfigError, match=r"^1: a sum of llm_int8 may be 76200 here"):
        fill(model, matrices, Packing("llm_int8", torch.bfloat16), CPU)


def test_the_sums_of_real_weights_are_far_from_float16s_end():
    codes, scale = quantize_rows(0.02 * torch.randn(4, 14336))
    check_sums(Matrix(codes, scale), None)
