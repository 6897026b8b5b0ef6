"""Products of many rows over panels: the bits of the tiles, in any shape, and only where they are faster."""

from __future__ import annotations

from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor

from node.model.weights import kernels
from node.model.weights.panels import bfloat16_panels, integer_panels, panel_kernels

torch.set_num_threads(1)

KINDS = [kind for kind in (torch.int8, torch.bfloat16, torch.float32) if panel_kernels.is_exact(kind)]
SHAPES = [
    (16, 32, 1),
    (17, 33, 7),
    (12, 70, 33),
    (40, 35, 511),
    (13, 64, 513),
    (25, 48, 1030),
    (12, 40, 2101),
]
needs_bfloat16 = pytest.mark.skipif(not bfloat16_panels.IS_USABLE, reason="no AVX-512 BF16")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(kind: torch.dtype, outs: int, width: int) -> tuple[Tensor, Tensor | None]:
    if kind == torch.int8:
        codes = torch.randint(-127, 128, (outs, width), dtype=kind, generator=seeded(1))
        return codes, torch.rand(outs, generator=seeded(2)) + 0.01
    return torch.randn(outs, width, generator=seeded(1)).to(kind), None


def over_panels(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    out = torch.full((len(x), len(weight) + 3), 7.0)  # rows that lie further apart
    call = cast("partial[None]", kernels.kernel_for(weight.dtype)).func
    call(
        panel_kernels.product_of(weight.dtype).address, 0, weight.element_size(), x.data_ptr(),
        weight.data_ptr(), 0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        out.data_ptr(), len(x), len(weight), x.shape[1], out.shape[1], 1,
    )  # fmt: skip
    assert (out[:, len(weight) :] == 7).all()
    return out[:, : len(weight)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "outs", "width"), SHAPES)
def test_a_row_has_the_bits_of_the_tiles(kind, rows, outs, width):
    weight, scale = matrix(kind, outs, width)
    assert panel_kernels.takes(weight)
    x = torch.randn(rows, width, generator=seeded(3))
    x[5] = 0
    for bias in (None, torch.randn(outs, generator=seeded(4))):
        assert torch.equal(over_panels(x, weight, scale, bias), kernels.Rows(weight, scale, bias)(x))


@needs_bfloat16
@pytest.mark.parametrize(("rows", "outs", "width"), SHAPES)
def test_rows_are_rounded_to_bfloat16_and_summed_in_float32(rows, outs, width):
    def numbers(*shape: int) -> Tensor:  # sums of their products are exact in float32
        return torch.randint(-64, 65, shape, generator=seeded(5)).float()

    weight, bias = numbers(outs, width).bfloat16(), numbers(outs)
    kept = numbers(rows, width)
    x = torch.where(kept.abs() < 2, kept, kept + 2.0**-9)  # which rounding takes away from larger numbers
    want = kept.double() @ weight.double().t()
    assert torch.equal(over_panels(x, weight, None, bias).double(), want + bias)
    assert torch.equal(over_panels(x, weight, None, None).double(), want)


@needs_bfloat16
def test_a_rounded_row_has_the_same_bits_in_any_number_of_rows():
    weight, _ = matrix(torch.bfloat16, 70, 613)
    x = torch.randn(61, 613, generator=seeded(3))
    x[3, 5] = float("nan")
    together = over_panels(x, weight, None, None)
    for first, last in ((0, 12), (12, 31), (31, 61)):
        part = over_panels(x[first:last].contiguous(), weight, None, None)
        assert torch.equal(part.view(torch.int32), together[first:last].contiguous().view(torch.int32))
    assert torch.isnan(together[3]).all()
    assert int(torch.isnan(together).sum()) == 70
    want = x.double() @ weight.double().t()
    rest = [row for row in range(61) if row != 3]
    assert (together[rest] - want[rest]).norm() < 2**-8 * want[rest].norm()


def test_the_largest_numbers_do_not_overflow_and_a_row_without_numbers_leaves_others_alone():
    weight = torch.full((40, 3000), 127, dtype=torch.int8)
    x = torch.ones(14, 3000)
    x[3], x[4, 7] = -1, float("nan")
    got = over_panels(x, weight, torch.ones(40), None)
    assert torch.isnan(got[4]).all()
    rest = [row for row in range(14) if row != 4]
    assert torch.equal(got[rest], kernels.Rows(weight, torch.ones(40), None)(x[rest]))
    assert ((got[rest].abs() - 127 * 3000).abs() < 10).all()


def test_what_panels_cannot_take_is_refused():
    assert not panel_kernels.takes(torch.empty(integer_panels.OUTS - 1, 64, device="meta"))
    assert not panel_kernels.takes(torch.empty(64, kernels.EXACT_WIDTH + 1, device="meta"))
    weight, scale = matrix(torch.int8, 64, 32)
    with pytest.raises(MemoryError):
        over_panels(torch.ones(2, 32), weight, scale, None)


def test_products_that_differ_or_are_slower_are_not_used(monkeypatch, caplog):
    class Wrong:
        address = panel_kernels.product_of(torch.bfloat16).address  # reads other weights than int8

    monkeypatch.setattr(panel_kernels, "MEASURED_ROWS", (16,))
    monkeypatch.setattr(panel_kernels, "product_of", lambda dtype: Wrong)
    assert panel_kernels.least_rows.__wrapped__(torch.float32) == panel_kernels.NEVER
    assert "differ on this CPU" in caplog.text
    monkeypatch.setattr(panel_kernels, "product_of", kernels.product_of)
    ticks = iter(float(number * number) for number in range(100))  # each call seems slower than the last
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert panel_kernels.least_rows.__wrapped__(torch.float32) == panel_kernels.NEVER
