"""Int8 weights in stripes: the bits of rows, whatever the shape, and a span that keeps all of them so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.weights import kernels
from node.model.weights.panels import stripes
from node.model.weights.panels.order import STRIPES, has_whole_stripes, put_in_stripes, rows_of, striped
from node.model.weights.quantize import PackedLinear, merge_linears, move_weights, ordered
from tests.model_fixtures import _LLAMA, TINY, save_tiny

torch.set_num_threads(1)

stripes.offer()
multiplied = pytest.mark.skipif(not kernels.IN_STRIPES, reason="this CPU has no instructions for bytes")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(outs: int, width: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (outs, width), dtype=torch.int8, generator=seeded(1))
    return codes, torch.rand(outs, generator=seeded(2)) + 0.01


def both(outs: int, width: int, bias: Tensor | None = None) -> tuple[kernels.Rows, kernels.Rows]:
    codes, scale = matrix(outs, width)
    return kernels.Rows(codes, scale, bias), kernels.Rows(put_in_stripes(codes.clone()), scale, bias)


@pytest.mark.parametrize(("outs", "width"), [(32, 4), (64, 76), (96, 1024)])
def test_rows_come_back_out_of_stripes_and_parts_of_them_too(outs, width):
    codes, _ = matrix(outs, width)
    kept = put_in_stripes(codes.clone())
    assert kept.dtype == STRIPES
    assert kept.shape == codes.shape
    assert torch.equal(rows_of(kept), codes)
    assert torch.equal(rows_of(kept[32:]), codes[32:])


def test_a_stripe_holds_four_numbers_of_each_output_in_turn():
    codes, _ = matrix(64, 12)
    kept = put_in_stripes(codes.clone()).view(torch.int8).flatten()
    for out, k in ((0, 0), (5, 3), (31, 11), (32, 0), (40, 6)):
        stripe, place = divmod(out, 32)
        assert kept[stripe * 32 * 12 + k // 4 * 128 + place * 4 + k % 4] == codes[out, k]


@multiplied
@pytest.mark.parametrize(("outs", "width"), [(32, 4), (64, 36), (96, 1036), (32, 3100)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_has_the_bits_of_rows_alone_and_in_a_batch_of_any_size(outs, width, with_bias):
    rows, kept = both(outs, width, torch.randn(outs, generator=seeded(4)) if with_bias else None)
    x = torch.randn(40, width, generator=seeded(3))
    x[5] = 0
    expected = rows(x)
    for count in (0, *range(1, 26), 40):
        assert torch.equal(kept(x[:count]), expected[:count])
        assert torch.equal(kept(x[40 - count :]), expected[40 - count :])


@multiplied
@pytest.mark.parametrize("count", [1, 14])
def test_the_largest_numbers_do_not_overflow_and_a_row_without_numbers_leaves_others_alone(count):
    width = kernels.EXACT_WIDTH
    codes = torch.full((32, width), 127, dtype=torch.int8)
    codes[1] = -127
    rows = kernels.Rows(codes, torch.ones(32), None)
    kept = kernels.Rows(put_in_stripes(codes.clone()), torch.ones(32), None)
    x = torch.ones(count, width)
    x[-1] = -1
    assert torch.equal(kept(x), rows(x))
    assert ((kept(x).abs() - 127 * width).abs() < 50).all()
    x[-1, 7] = float("nan")
    assert torch.isnan(kept(x)[-1]).all()
    assert torch.equal(kept(x)[:-1], rows(x)[:-1])


@multiplied
def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(kernels, "SLICE_WORK", 1)
    rows, kept = both(320, 36)
    x = torch.randn(9, 36, generator=seeded(2))
    assert kernels.slices_for(9 * 320 * 36, 320, 3) == 3
    assert torch.equal(kept(x, threads=3), rows(x))


@multiplied
def test_stripes_that_the_kernels_cannot_read_are_refused():
    for outs, width in ((31, 4), (32, 6)):
        with pytest.raises(ValueError, match="are allowed, not"):
            kernels.Rows(torch.zeros(outs, width, dtype=STRIPES), torch.ones(outs), None)
    with pytest.raises(ValueError, match="are allowed, not"):
        kernels.Rows(torch.zeros(32, 4, dtype=STRIPES), None, None)


def test_only_whole_stripes_of_all_layers_are_put_into_order(monkeypatch):
    codes, others = matrix(64, 8)[0], torch.zeros(48, 8, dtype=torch.int8)
    assert not has_whole_stripes([])
    assert not has_whole_stripes([codes, others])
    assert not has_whole_stripes([torch.zeros(32, 6, dtype=torch.int8)])
    assert ordered(torch.cat, [codes, others]) is torch.cat
    assert ordered(torch.cat, [codes.float()]) is torch.cat
    monkeypatch.setattr(kernels, "IN_STRIPES", False)
    assert ordered(torch.cat, [codes]) is torch.cat
    monkeypatch.setattr(kernels, "IN_STRIPES", True)
    assert ordered(torch.cat, [codes])([codes, codes]).dtype == STRIPES


@multiplied
def test_layers_in_stripes_compute_as_before_and_share_the_memory_of_a_merged_one():
    codes, scale = matrix(96, 64)
    parts = [PackedLinear(codes[:32].clone(), scale[:32]), PackedLinear(codes[32:].clone(), scale[32:])]
    before = PackedLinear(codes, scale)
    alone = PackedLinear(codes.clone(), scale)
    merged = merge_linears(parts, striped(torch.cat))
    move_weights(alone, striped(torch.cat))
    assert isinstance(merged, PackedLinear)
    assert parts[1].weight.data_ptr() == merged.weight.data_ptr() + 32 * 64
    x = torch.randn(3, 64, generator=seeded(3))
    gradient = torch.randn(3, 96, generator=seeded(5))
    for layer in (merged, alone):
        assert layer.weight.dtype == STRIPES
        assert torch.equal(layer(x), before(x))
        assert torch.equal(layer.dequantized(torch.float32), before.dequantized(torch.float32))
        assert torch.equal(layer.back(gradient), before.back(gradient))
        assert torch.equal(layer(x.bfloat16()), before(x.bfloat16()))
    assert torch.equal(torch.cat([part(x) for part in parts], 1), before(x))
    assert merged.to("meta").weight.dtype == torch.int8, "other devices take rows"


@multiplied
def test_a_span_gives_the_bits_that_it_gives_with_weights_in_rows(monkeypatch, tmp_path):
    wide = _LLAMA | {"hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setitem(TINY, "llama", ("LlamaForCausalLM", wide))
    save_tiny("llama", tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))

    def opened() -> Span:
        return load_span(folder, 0, 2, quantize="int8")

    def answers(span: Span) -> list[Tensor]:
        pool = span.new_arena(64, 32)
        caches = [pool.open(1, 32) for _ in range(3)]
        prompt, rows = torch.randn(1, 9, 64, generator=seeded(1)), torch.randn(3, 64, generator=seeded(2))
        found = [span.forward(prompt[:, : 9 - number], cache, 0) for number, cache in enumerate(caches)]
        for cache in caches:
            cache.reserve(cache.length + 1)
        return [*found, span.decode(rows, caches, 0, 2)]

    kept = opened()
    packed = [each for each in kept.model.modules() if isinstance(each, PackedLinear)]
    assert packed
    assert {each.weight.dtype for each in packed} == {STRIPES}
    monkeypatch.setattr(kernels, "IN_STRIPES", False)
    for one, other in zip(answers(kept), answers(opened()), strict=True):
        assert torch.equal(one, other)
