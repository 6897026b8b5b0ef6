"""Triton's kernels in Triton's interpreter against torch in float64: every shape, and the edges of each tile.

They need TRITON_INTERPRET=1 and Triton, which `make test-triton` brings; elsewhere they are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.cuda import available, ops, torch_ops
from node.model.weights.plans import Plan
from node.model.weights.quantize import PackedLinear
from tests.model_fixtures import save_tiny

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is asked for with `make test-triton`", allow_module_level=True)
pytest.importorskip("triton", reason="`make test-triton` brings Triton")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value: sums in another order in float32, one rounding of the answer in 16 bits, or a few.
# The interpreter cuts a number off where it makes a bfloat16 of it, so bfloat16 has twice its rounding.
ONCE = {torch.float32: 2e-6, torch.bfloat16: 7.9e-3, torch.float16: 5.2e-4}
OFTEN = {torch.float32: 4e-6, torch.bfloat16: 3.2e-2, torch.float16: 2.1e-3}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(dtype)


def folder_of(variant: str, path: Path) -> ModelFolder:
    if not (path / "model").exists():
        save_tiny(variant, path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert (got.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


@pytest.fixture(autouse=True)
def no_kernel_is_given_up() -> Iterator[None]:
    """Else torch's own operation would be what a test sees."""
    from node.model.cuda import probe

    yield
    assert ops.usable(CPU)
    assert set(available._found[CPU]) == set(probe.KERNELS)


# Products


def codes_and_scales(outs: int, width: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (outs, width), dtype=torch.int8, generator=seeded(1))
    return codes, torch.rand(outs, generator=seeded(2)) / 100


def product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    answer = x.double() @ (codes.double() * scale.double()[:, None]).T
    return answer if bias is None else answer + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "outs", "width"),
    [(1, 1, 1), (1, 64, 1024), (2, 65, 1025), (16, 7, 128), (17, 130, 1100), (33, 64, 127), (65, 129, 65)],
)
def test_a_product_of_any_shape_is_right(dtype, rows, outs, width):
    codes, scale = codes_and_scales(outs, width)
    x = randn(rows, width, dtype=dtype)
    bias = randn(outs, seed=3, dtype=dtype) if rows % 2 else None
    got = ops.int8_linear(x, codes, scale, bias, "triton")
    assert got.dtype == dtype
    assert_close(got, product(x, codes, scale, bias), ONCE[dtype])


@pytest.mark.parametrize("width", [1024, 5000])
def test_a_sum_in_parts_is_right_again_and_again(width):
    codes, scale = codes_and_scales(40, width)
    x = randn(3, width, dtype=torch.bfloat16)
    answers = [ops.int8_linear(x, codes, scale, None, "triton") for _ in range(3)]
    assert_close(answers[0], product(x, codes, scale, None), ONCE[torch.bfloat16])
    assert torch.equal(answers[0], answers[1])  # the counts are zeros again
    assert torch.equal(answers[0], answers[2])


def test_a_split_has_no_more_parts_than_work():
    from node.model.cuda import product as kernel

    assert kernel.splits_for(1, 100, 132) == 1
    assert kernel.splits_for(64, 4096, 132) == 8  # the whole of 4,096 values in parts of 512
    assert kernel.splits_for(448, 4096, 132) == 2
    assert kernel.splits_for(1000, 4096, 132) == 1
    assert kernel.splits_for(1, 1 << 20, 132) == kernel.MOST_SPLITS


def test_both_ways_of_a_product_agree_and_no_rows_are_no_work():
    codes, scale = codes_and_scales(33, 257)
    x = randn(5, 257)
    one, other = (ops.int8_linear(x, codes, scale, None, way) for way in ("triton", "dequantise"))
    assert_close(one, other, ONCE[torch.float32])
    assert ops.int8_linear(x[:0], codes, scale).shape == (0, 33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 32, 64, 256, 257])
def test_every_tile_is_right_for_its_last_row_and_the_row_after_it(dtype, rows):
    codes, scale = codes_and_scales(72, 272)
    x = randn(rows, 272, dtype=dtype)
    assert_close(
        ops.int8_linear(x, codes, scale, None, "triton"), product(x, codes, scale, None), ONCE[dtype]
    )


@pytest.mark.parametrize("width", [256, 1040])
def test_the_least_code_and_scales_of_any_sign_are_right(width):
    codes, scale = codes_and_scales(66, width)
    codes[::3], scale[1::3], scale[2::3] = -128, 0.0, -scale[2::3]
    x = randn(3, width)
    got = ops.int8_linear(x, codes, scale, None, "triton")
    assert_close(got, product(x, codes, scale, None), ONCE[torch.float32])
    assert (got[:, 1::3] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy says what it computes
def test_a_row_without_numbers_harms_no_other_row():
    codes, scale = codes_and_scales(66, 1040)
    x = randn(20, 1040)
    alone = ops.int8_linear(x, codes, scale, None, "triton")
    x[3], x[18, 5] = float("nan"), float("inf")
    got = ops.int8_linear(x, codes, scale, None, "triton")
    sound = [row for row in range(20) if row not in (3, 18)]
    assert torch.equal(got[sound], alone[sound])
    assert not torch.isfinite(got[3]).any()


def test_rows_and_scales_may_lie_apart_in_memory():
    codes, scale = codes_and_scales(33, 260)
    wide, apart, bias = randn(260, 5), scale.repeat_interleave(2)[::2], randn(66, seed=3)[::2]
    x = wide.T
    got = ops.int8_linear(x, codes.T.contiguous().T, apart, bias, "triton")
    assert_close(got, product(x, codes, scale, bias), ONCE[torch.float32])


def test_sums_that_float16_cannot_hold_before_the_scale_are_right():
    codes, scale = torch.full((8, 512), 127, dtype=torch.int8), torch.full((8,), 1e-4)
    x = torch.full((2, 512), 100.0, dtype=torch.float16)
    for way in ("triton", "dequantise"):
        assert_close(ops.int8_linear(x, codes, scale, None, way), product(x, codes, scale, None), 2e-3)


# Attention


def attention(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, scale: float, window: int
) -> Tensor:
    """Row by row and head by head, in float64."""
    rows, heads, dim = q.shape
    group = heads // keys.shape[1]
    answer = torch.zeros(rows, heads, dim, dtype=torch.float64)
    for row in range(rows):
        length = int(lengths[row])
        positions = torch.arange(max(0, length - window) if window else 0, length)
        slots = pages[row].long()[positions // 16] * 16 + positions % 16
        for head in range(heads):
            k, v = (store[slots, head // group].double() for store in (keys, values))
            answer[row, head] = torch.softmax(scale * (k @ q[row, head].double()), 0) @ v
    return answer.flatten(1)


def paged(lengths: list[int], key_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Stores of keys and values with no number in every slot that no row owns, and each row's pages."""
    needed = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(needed) + 3, generator=seeded(4)).tolist()
    pages = torch.full((len(lengths), max(needed) + 1), order[-1], dtype=torch.int32)
    stores = [torch.full((len(order) * 16, key_heads, dim), float("nan"), dtype=dtype) for _ in range(2)]
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        own = [order.pop(0) for _ in range(count)]
        pages[row, :count] = torch.tensor(own)
        slots = torch.tensor(own)[torch.arange(length) // 16] * 16 + torch.arange(length) % 16
        for number, store in enumerate(stores):
            store[slots] = randn(length, key_heads, dim, dtype=dtype, seed=10 * row + number)
    return *stores, pages, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("way", [ops.paged_attention, torch_ops.paged_attention], ids=["triton", "torch"])
@pytest.mark.parametrize("window", [0, 5, 150])
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "dim"),
    [
        ([1, 15, 16, 17, 200], 4, 2, 32),
        ([1000, 1], 2, 1, 64),
        ([65, 1, 1], 3, 3, 80),
        ([33], 40, 2, 128),
        ([20, 2], 2, 2, 256),
    ],
)
def test_attention_over_pages_is_right(way, lengths, heads, key_heads, dim, window):
    dtype = DTYPES[len(lengths) % 3]
    keys, values, pages, numbers = paged(lengths, key_heads, dim, dtype)
    q = randn(len(lengths), heads, dim, dtype=dtype, seed=99)
    got = way(q, keys, values, pages, numbers, dim**-0.5, window, 16)
    assert got.dtype == dtype
    assert_close(got, attention(q, keys, values, pages, numbers, dim**-0.5, window), OFTEN[dtype])


def test_numbers_and_queries_may_lie_apart_and_stores_may_not(caplog):
    keys, values, pages, lengths = paged([40, 7], 2, 32, torch.float32)
    q = randn(2, 4, 64)[..., ::2]
    table = torch.stack([pages, pages], -1)[..., 0]
    expected = attention(q, keys, values, pages, lengths, 0.2, 0)
    got = ops.paged_attention(q, keys, values, table, torch.stack([lengths, lengths], 1)[:, 1], 0.2)
    assert_close(got, expected, ONCE[torch.float32])
    assert caplog.records == []
    apart = [torch.stack([store, store], -1)[..., 0] for store in (keys, values)]
    with pytest.raises(ValueError, match="whole slots"):
        available.kernel_of("paged_attention", CPU)(q, *apart, pages, lengths, 0.2, 0, 16)


def test_a_store_of_more_than_two_thousand_million_numbers_is_read_and_written_at_its_end():
    heads, dim, rows = 8, 128, 2
    slots = (1 << 31) // (heads * dim) + 32
    keys, values = (torch.empty(slots, heads, dim, dtype=torch.float16) for _ in range(2))
    last = slots // 16 - 1
    own = torch.arange(16) + 16 * last
    assert int(own[0]) * heads * dim >= 1 << 31
    keys[own], values[own] = (
        randn(16, heads, dim, dtype=torch.float16),
        randn(16, heads, dim, dtype=torch.float16),
    )
    qkv = randn(rows, 3 * heads * dim, dtype=torch.float16, seed=1)
    angles = randn(4, dim, dtype=torch.float16, seed=2)
    given = (qkv, heads, heads, angles, angles, torch.tensor([0, 3]))
    small = [store[own].clone() for store in (keys, values)]
    expected = ops.rope_and_write(*given, torch.tensor([3, 9]), small[0], small[1])
    got = ops.rope_and_write(*given, own[[3, 9]], keys, values)
    assert torch.equal(got, expected)
    for store, other in zip((keys, values), small, strict=True):
        assert torch.equal(store[own], other)
    pages, lengths = torch.tensor([[last], [last]]), torch.tensor([16, 9])
    far = ops.paged_attention(got, keys, values, pages, lengths, 0.1)
    near = ops.paged_attention(got, small[0], small[1], torch.zeros_like(pages), lengths, 0.1)
    assert torch.equal(far, near)


def test_scores_far_above_and_below_float32s_exponents_are_right():
    keys, values, pages, lengths = paged([50], 1, 32, torch.float32)
    keys *= 100
    q = 100 * randn(1, 2, 32)
    for scale in (1.0, -1.0):
        got = ops.paged_attention(q, keys, values, pages, lengths, scale)
        assert_close(got, attention(q, keys, values, pages, lengths, scale, 0), 1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_holds_no_numbers_harms_no_other_row():
    keys, values, pages, lengths = paged([40, 30, 20], 2, 32, torch.float32)
    q = randn(3, 4, 32)
    alone = ops.paged_attention(q, keys, values, pages, lengths, 0.2)
    q[1] = float("nan")
    keys[int(pages[1, 0]) * 16] = float("inf")
    got = ops.paged_attention(q, keys, values, pages, lengths, 0.2)
    assert torch.equal(got[[0, 2]], alone[[0, 2]])
    assert not torch.isfinite(got[1]).all()


def test_no_rows_are_no_work():
    keys, values, pages, lengths = paged([40], 2, 32, torch.float32)
    none = torch.empty(0, dtype=torch.int32)
    assert ops.paged_attention(randn(0, 4, 32), keys, values, pages[:0], lengths[:0], 0.2).shape == (0, 128)
    assert ops.add_norm(randn(0, 8), randn(0, 8), randn(8), 1e-5)[1].shape == (0, 8)
    assert ops.silu_mul(randn(0, 8)).shape == (0, 4)
    angles = randn(4, 32)
    q = ops.rope_and_write(randn(0, 8 * 32), 4, 2, angles, angles, none, none, keys, values)
    assert q.shape == (0, 4, 32)


def test_rows_that_are_padding_harm_no_other_row():
    keys, values, pages, lengths = paged([40, 1, 1], 2, 32, torch.float32)
    q = randn(3, 4, 32)
    alone = ops.paged_attention(q[:1], keys, values, pages[:1], lengths[:1], 0.2, 0, 16)
    pages[1:] = pages[0, -1]  # nobody's, which holds no numbers here
    got = ops.paged_attention(q, keys, values, pages, lengths, 0.2, 0, 16)
    assert_close(got[:1], alone, ONCE[torch.float32])


def test_the_positions_are_split_by_shapes_alone():
    from node.model.cuda.attention import parts_for

    assert parts_for(1, 8, 8192, 132) == 33
    assert parts_for(64, 8, 8192, 132) == 1
    assert parts_for(1, 8, 128, 132) == 1
    assert parts_for(1, 1, 1 << 20, 132) == 64


# What stands between


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (65, 128), (2, 4097)])
def test_a_norm_is_the_librarys(dtype, rows, width):
    hidden, addend = randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype, seed=1)
    weight = randn(width, dtype=dtype, seed=2)
    total, normed = ops.add_norm(hidden, addend, weight, 1e-5)
    assert_close(total, hidden + addend, ONCE[dtype] if dtype is torch.bfloat16 else 0.0)
    assert normed.dtype == dtype
    assert_close(normed, torch_ops.norm(hidden + addend, weight, 1e-5), ONCE[dtype] * 2)
    same, normed = ops.add_norm(hidden, None, weight, 1e-5)
    assert same is hidden
    assert_close(normed, torch_ops.norm(hidden, weight, 1e-5), ONCE[dtype] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("rows", "heads", "key_heads", "dim"), [(1, 4, 4, 32), (5, 6, 2, 80)])
def test_rotary_positions_and_the_cache_are_the_librarys(dtype, rotary, normed, rows, heads, key_heads, dim):
    qkv = randn(rows, (heads + 2 * key_heads) * dim, dtype=dtype)
    cos, sin = randn(50, dim, dtype=dtype, seed=1), randn(50, dim, dtype=dtype, seed=2)
    places = torch.randint(0, 50, (rows,), dtype=torch.int32, generator=seeded(3))
    slots = torch.randperm(20, generator=seeded(4))[:rows].int()
    norms = (randn(dim, dtype=dtype, seed=5), randn(dim, dtype=dtype, seed=6)) if normed else (None, None)
    stores = [torch.full((20, key_heads, dim), 7.0, dtype=dtype) for _ in range(4)]
    given = (qkv, heads, key_heads, cos, sin, places, slots)
    got = ops.rope_and_write(*given, stores[0], stores[1], *norms, 1e-5, rotary)
    expected = torch_ops.rope_and_write(*given, stores[2], stores[3], *norms, 1e-5, rotary)
    assert got.shape == (rows, heads, dim)
    for one, other in ((got, expected), (stores[0], stores[2])):
        assert_close(one, other, OFTEN[dtype])
    assert torch.equal(stores[1], stores[3])  # values are written as they are
    others = torch.ones(20, dtype=torch.bool)
    others[slots.long()] = False
    assert (stores[0][others] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (3, 1025), (65, 40)])
def test_a_gate_is_the_librarys(dtype, rows, inner):
    gate_up = 5 * randn(rows, 2 * inner, dtype=dtype)
    assert_close(ops.silu_mul(gate_up), torch_ops.silu_mul(gate_up), ONCE[dtype] * 2)


# The first use of each kernel


def test_each_kernel_is_right_in_the_size_in_which_it_is_tried_first():
    from node.model.cuda import probe

    assert probe.wrong_on(CPU) == {}
    assert set(probe.KERNELS) == {name for name, _ in probe._examples(CPU)}


@pytest.mark.parametrize("name", ["int8_linear", "norm", "rope_and_write", "paged_attention"])
def test_a_kernel_with_wrong_numbers_or_none_is_found_at_its_first_use(monkeypatch, name):
    from node.model.cuda import probe

    right = probe.KERNELS[name]
    for spoil in (lambda x: 1.1 * x, lambda x: torch.full_like(x, float("nan")), lambda x: x[:1]):
        wrong = {**probe.KERNELS, name: lambda *given, spoil=spoil: spoil(right(*given))}
        monkeypatch.setattr(probe, "KERNELS", wrong)
        assert probe.wrong_on(CPU) == {name: "its numbers are wrong"}


def test_a_kernel_that_does_not_compile_is_left_out_and_the_others_are_not(monkeypatch):
    from node.model.cuda import probe

    def fails(*given: object) -> object:
        raise RuntimeError("first line\nPassManager::run failed")

    monkeypatch.setattr(probe, "KERNELS", {**probe.KERNELS, "silu_mul": fails})
    assert probe.wrong_on(CPU) == {"silu_mul": "PassManager::run failed"}
    monkeypatch.setattr(probe, "KERNELS", dict.fromkeys(probe.KERNELS, fails))
    with pytest.raises(RuntimeError, match="PassManager"):
        probe.wrong_on(CPU)


# All together


def test_prefills_and_steps_of_an_int8_block_are_those_of_the_compiled_one(tmp_path):
    ours, theirs = (load_span(folder_of("llama", tmp_path), 0, 1, quantize="int8") for _ in range(2))
    assert ours._fused is not None
    for block in ours._fused.blocks:
        for matrix in block.matrices:
            assert isinstance(matrix, PackedLinear)
            matrix._is_here, matrix.plan = False, Plan(((1, "triton"),))
    ours._fused.on_device = ours._fused.steps
    mine, other = ours.new_cache(2, 64), theirs.new_cache(2, 64)
    position = 0
    for tokens in (18, 1, 3):
        hidden = randn(2, tokens, ours.hidden_size, seed=tokens)
        got, expected = ours.forward(hidden, mine, position), theirs.forward(hidden, other, position)
        assert_close(got, expected, 1e-4)  # the compiled kernels round rows to 16 bits
        position += tokens
