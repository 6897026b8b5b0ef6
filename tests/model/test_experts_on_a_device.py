"""Experts in int8 as a device computes them, next to the way of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from node.model.weights import experts as of_experts
from node.model.weights.experts import chosen, sorted_by_expert
from node.model.weights.quantize import (
    Experts,
    Matrix,
    PackedExperts,
    PackedLinear,
    _packed_linear,
    quantize_rows,
)

HIDDEN, INNER, COUNT = 24, 16, 5
CPU = torch.device("cpu")


def some(kind: str = "int8") -> PackedExperts:
    generator = torch.Generator().manual_seed(1)

    def matrices(outs: int, ins: int) -> dict[int, Matrix]:
        made = (torch.randn(outs, ins, generator=generator) * 0.3 for _ in range(COUNT))
        return {
            number: Matrix(*quantize_rows(each)) if kind == "int8" else Matrix(each.bfloat16(), None)
            for number, each in enumerate(made)
        }

    experts = Experts(matrices(INNER, HIDDEN), matrices(INNER, HIDDEN), matrices(HIDDEN, INNER))
    return PackedExperts(
        experts, nn.functional.silu, lambda matrix, bias: _packed_linear(matrix, bias, torch.float32, CPU)
    )


def choice(rows: int, k: int, *, absent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and each row's experts with their weights; of experts that are not there too."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(COUNT, generator=generator)[:k] for _ in range(rows)])
    if absent:
        index[::2, -1] = COUNT
    return x, index, torch.rand(rows, k, generator=generator)


def exact(layer: PackedExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """In float64, row by row."""
    answer = torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for place, expert in enumerate(index[row].tolist()):
            if expert < COUNT:
                both, down = (each[expert].dequantized(torch.float64) for each in (layer.gate_up, layer.down))
                gate, up = (both @ x[row].double()).chunk(2)
                own = down @ (nn.functional.silu(gate) * up)
                answer[row] += weights[row, place].double() * own
    return answer


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (1, 3), (2, 2), (9, 2), (40, 5)])
@pytest.mark.parametrize("most", [0, 1 << 40])
def test_both_ways_are_the_sum_of_each_rows_experts(most, rows, k, absent, monkeypatch):
    monkeypatch.setattr(of_experts, "GATHERED_VALUES", most)
    layer, given = some(), choice(rows, k, absent=absent)
    assert_close(layer.on_device(*given), exact(layer, *given), 1e-4)


@pytest.mark.parametrize("most", [0, 1 << 40])
def test_sixteen_bits_differ_by_their_rounding(most, monkeypatch):
    monkeypatch.setattr(of_experts, "GATHERED_VALUES", most)
    layer, (x, index, weights) = some(), choice(9, 2)
    got = layer.on_device(x.bfloat16(), index, weights.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got, exact(layer, x, index, weights), 0.03)


def test_the_experts_of_few_rows_are_taken_by_index_and_those_of_many_are_sorted(monkeypatch):
    layer = some()
    one = HIDDEN * INNER * 3
    monkeypatch.setattr(of_experts, "GATHERED_VALUES", 4 * one)
    called: list[str] = []

    def noted(name: str, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Any) -> Tensor:
            called.append(name)
            return own(*given)

        return call

    monkeypatch.setattr(of_experts, "chosen", noted("chosen", chosen))
    monkeypatch.setattr(of_experts, "sorted_by_expert", noted("sorted_by_expert", sorted_by_expert))
    layer.on_device(*choice(2, 2))
    layer.on_device(*choice(3, 2))
    assert called == ["chosen", "sorted_by_expert"]


def test_layers_share_the_memory_of_the_matrix_of_all_experts():
    layer, given = some(), choice(3, 2)
    before = layer(*given)
    layer.on_device(*given)
    assert layer._stacked is not None
    for stacked, layers in zip(layer._stacked, (layer.gate_up, layer.down), strict=True):
        for number, own in enumerate(layers):
            assert isinstance(own, PackedLinear)
            assert own.weight.data_ptr() == stacked.weight[number].data_ptr()
    assert torch.equal(layer(*given), before), "the way of the CPU is what it was"


def test_rows_have_a_gradient():
    layer, (x, index, weights) = some(), choice(7, 2, absent=True)
    found = []
    for compute in (layer.on_device, layer.forward):
        leaf = x.clone().requires_grad_()
        compute(leaf, index, weights).square().sum().backward()
        found.append(leaf.grad)
    assert found[0] is not None
    assert_close(found[0], found[1].double(), 1e-3)


def test_matrices_without_codes_are_layers_of_their_own(monkeypatch):
    layer, given = some("bfloat16"), choice(3, 2)
    assert layer._in_one_tensor(CPU) is None
    assert_close(layer.on_device(*given), exact(layer, *given), 1e-5)


def test_no_row_is_no_fault():
    layer = some()
    x, index, weights = choice(1, 2)
    assert layer.on_device(x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)
