"""Our own block of llama's family against the library's, in every way that leads through it."""

from __future__ import annotations

import mmap
from itertools import pairwise
from typing import Any, cast

import numba
import numpy as np
import pytest
import torch

from node.model.blocks.span import Span, load_span
from node.model.checkpoint.architecture import ARCHITECTURES
from node.model.checkpoint.folder import ModelFolder
from node.model.weights import arena, decode_kernels, kernels
from node.model.weights import low_rank_kernel as kernel
from node.model.weights.panels import panel_kernels
from node.model.weights.plans import Plan
from tests.lora_fixtures import random_adapter
from tests.model_fixtures import BLOCKS, FUSED, TINY, assert_close, saved

torch.set_num_threads(1)

TOLERANCE = 5e-6  # relative to the largest value: sums are taken in another order


@pytest.fixture(scope="module", params=FUSED)
def folder(request, tmp_path_factory) -> ModelFolder:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def library(span: Span) -> Span:
    """The same blocks, through the library."""
    span._fused = None
    return span


def test_the_table_names_the_family_and_only_these_blocks_are_ours(folder):
    assert tuple(sorted(name for name, row in ARCHITECTURES.items() if row.fused)) == tuple(sorted(FUSED))
    assert load_span(folder, 1, 4).fused


@pytest.mark.parametrize("variant", sorted(set(TINY) - set(FUSED))[:4])
def test_other_blocks_are_the_librarys(variant, tmp_path):
    assert not load_span(saved(variant, tmp_path), 0, 2).fused


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "dynamic",
    "factor": 2.0, "rope_theta": 10000.0}}])  # fmt: skip
def test_what_is_not_known_to_be_equal_is_left_to_the_library(changes, tmp_path):
    assert not load_span(saved("llama", tmp_path, **changes), 0, 2).fused


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_gives_what_the_librarys_block_gives(folder, quantize, dtype):
    ours = load_span(folder, 1, BLOCKS, dtype=dtype, quantize=quantize)
    theirs = library(load_span(folder, 1, BLOCKS, dtype=dtype, quantize=quantize))
    assert ours.dtype == theirs.dtype
    # Beside int8 rows are rounded to 16 bits, and one that differs in its last bit may round otherwise.
    tolerance = TOLERANCE if quantize == "none" else 1e-4
    generator = torch.Generator().manual_seed(1)
    caches = [(ours.new_cache(2, 64, ours.dtype), theirs.new_cache(2, 64, ours.dtype))]
    position = 0
    for tokens in (9, 1, 4, 1, 1, 12):
        hidden = torch.randn(2, tokens, ours.hidden_size, generator=generator)
        got = ours.forward(hidden, caches[0][0], position, 2, 5)
        expected = theirs.forward(hidden, caches[0][1], position, 2, 5)
        if ours.dtype == torch.float32:
            assert_close(got, expected, tolerance)
        else:
            assert ((got - expected).float().norm() / expected.float().norm()) < 0.02
        position += tokens


def test_the_compiled_step_and_torchs_own_give_the_same(folder, monkeypatch):
    span = load_span(folder, 0, BLOCKS)
    arenas = [span.new_arena(400), span.new_arena(400)]
    generator = torch.Generator().manual_seed(2)
    both: list[list] = [[], []]
    for length in (7, 1, 20):
        hidden = torch.randn(1, length, span.hidden_size, generator=generator)
        for pool, caches in zip(arenas, both, strict=True):
            cache = pool.open(1, 64)
            span.forward(hidden, cache, 0)
            caches.append(cache)
    for _ in range(4):
        rows = torch.randn(3, span.hidden_size, generator=generator)
        answers = []
        for caches, compiled in zip(both, (True, False), strict=True):
            for cache in caches:
                cache.reserve(cache.length + 1)
            with monkeypatch.context() as patch:
                if not compiled:
                    patch.setattr(type(span._fused), "_compiled", lambda self, hidden: False)
                answers.append(span.decode(rows, caches, 0, BLOCKS))
            for cache in caches:
                cache.length += 1
        assert_close(answers[0], answers[1])


@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.float32, "int8"), (torch.bfloat16, "none"), (torch.float32, "none")]
)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(folder, dtype, quantize):
    span = load_span(folder, 0, BLOCKS, dtype=dtype, quantize=quantize)
    if span.dtype != torch.float32:
        pytest.skip("computed by torch on this CPU")
    generator = torch.Generator().manual_seed(3)
    pool = span.new_arena(600)
    lengths = (5, 30, 1, 16)
    prompts = [torch.randn(1, length, span.hidden_size, generator=generator) for length in lengths]
    rows = torch.randn(4, span.hidden_size, generator=generator)

    def opened() -> list:
        caches = []
        for prompt in prompts:
            cache = pool.open(1, 64)
            span.forward(prompt, cache, 0)
            cache.reserve(cache.length + 1)
            caches.append(cache)
        return caches

    together = span.decode(rows, opened(), 0, BLOCKS)
    alone = torch.cat([span.decode(rows[i : i + 1], [cache], 0, BLOCKS) for i, cache in enumerate(opened())])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("dtype", "quantize", "cached"),
    [
        (torch.float32, "none", torch.float32),
        (torch.float32, "int8", torch.bfloat16),
        (torch.bfloat16, "none", torch.bfloat16),
    ],
)
def test_a_cache_in_bfloat16_gives_nearly_the_same(folder, dtype, quantize, cached, monkeypatch):
    span = load_span(folder, 0, BLOCKS, dtype=dtype, quantize=quantize)
    assert span.new_arena(64).dtype == cached
    generator = torch.Generator().manual_seed(9)
    prompt, rows = (torch.randn(1, n, span.hidden_size, generator=generator) for n in (21, 3))
    answers = []
    for kept, compiled in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(type(span._fused), "_compiled", lambda self, hidden: False)
            cache = span.new_cache(1, 64, kept)
            got = [span.forward(prompt[:, :16], cache, 0), span.forward(prompt[:, 16:], cache, 16)]
            for i in range(3):
                cache.reserve(cache.length + 1)
                got.append(span.decode(rows[:, i], [cache], 0, BLOCKS)[:, None])
                cache.length += 1
        assert span.dtype == got[-1].dtype
        answers.append(torch.cat(got, 1))
    if span.dtype == torch.float32:
        assert 0 < (answers[1] - answers[0]).norm() < 0.02 * answers[0].norm()
        assert_close(answers[2], answers[1], 1e-3)


def test_float32_steps_of_several_tokens_go_where_they_are_fastest(folder, monkeypatch):
    calls = []
    span = load_span(folder, 0, BLOCKS)
    fused = span._fused
    assert fused is not None

    def note(name: str) -> None:
        own = getattr(fused, name)

        def noted(*each: object) -> object:
            calls.append(name)
            return own(*each)

        monkeypatch.setattr(fused, name, noted)

    note("_compiled_block")
    note("_torch_block")
    hidden = torch.randn(1, 12, span.hidden_size, generator=torch.Generator().manual_seed(6))
    answers = []
    for way in ("compiled", "dequantise"):
        plan = Plan(((1, "compiled"), (8, way)))
        monkeypatch.setattr(fused, "_ways", fused._ways._replace(float_plan=plan))
        cache = span.new_cache(1, 64)
        answers.append([span.forward(hidden[:, :2], cache, 0), span.forward(hidden[:, 2:], cache, 2)])
    assert calls == ["_compiled_block"] * 3 * BLOCKS + ["_torch_block"] * BLOCKS
    assert torch.equal(answers[0][0], answers[1][0])
    assert_close(answers[0][1], answers[1][1], TOLERANCE)


@pytest.mark.parametrize(
    ("quantize", "dtype"), [("none", torch.float32), ("int8", torch.float32), ("none", torch.bfloat16)]
)
def test_steps_of_many_rows_have_the_same_bits_over_panels(folder, quantize, dtype):
    span = load_span(folder, 0, BLOCKS, quantize=quantize, dtype=dtype)
    fused = span._fused
    assert fused is not None
    hidden = torch.randn(1, 40, span.hidden_size, generator=torch.Generator().manual_seed(8))
    answers = []
    for least in (1, 1000):
        fused._ways = fused._ways._replace(many_rows=least)
        answers.append(span.forward(hidden, span.new_cache(1, 64), 0))
    if fused.kept is not None and panel_kernels.is_exact(fused.kept):
        assert torch.equal(answers[0], answers[1])
    else:  # rows rounded to bfloat16
        assert 0 < (answers[1] - answers[0]).norm() < 0.01 * answers[1].norm()


@pytest.mark.parametrize("product_of", [kernels.product_of, panel_kernels.product_of])
def test_several_threads_change_no_bit_of_a_block(product_of):
    dtype = torch.int8
    generator = torch.Generator().manual_seed(4)
    rows, width, inner, head = 64, 512, 1024, 64
    matrices = [
        (
            torch.randint(-127, 128, (outs, ins), dtype=dtype, generator=generator),
            torch.rand(outs, generator=generator) / 1000,
            None,
        )
        for outs, ins in ((1024, width), (width, 512), (2 * inner, width), (width, inner))
    ]
    qkv_at, out_at, gate_up_at, down_at = (decode_kernels.addresses_of(*matrix) for matrix in matrices)
    for matrix in (qkv_at, out_at, gate_up_at, down_at):
        matrix[3] = product_of(dtype).address
    norm, empty = np.ones(width, np.float32), np.empty(0, np.float32)
    angles = torch.rand(8, head, generator=generator).numpy()
    places, slots = np.zeros(rows, np.int64), np.arange(rows)
    hidden = torch.randn(rows, width, generator=generator).numpy()
    shapes = dict.fromkeys(decode_kernels.SITES, (width, 256)) | {
        "q_proj": (width, 512), "o_proj": (512, width), "down_proj": (inner, width),
        "gate_proj": (width, inner), "up_proj": (width, inner),
    }  # fmt: skip
    adapter = random_adapter({0: shapes}, 1)
    low = [*kernel.head(1), adapter.table_at(decode_kernels.SITES, kernel), 5, 40]
    updates = np.array(low, np.int64)
    answers = []
    for threads in (None, 2):
        before, after = decode_kernels.halves(dtype, together=threads is not None)
        keys, values = (np.zeros((rows, 4, head), np.float32) for _ in range(2))
        store = np.array([keys.ctypes.data, values.ctypes.data, 4, head, 4])
        qkv, residual = np.zeros((rows, 1024), np.float32), hidden.copy()
        with kernels.team(threads or 1) as together:
            assert together == (threads is not None)
            before(
                0, 1, threads, qkv_at, norm, 1e-5, residual, qkv, 8, store, places, slots, angles, angles,
                True, empty, empty, updates.ctypes.data, 0,
            )  # fmt: skip
            after(
                0, 1, threads, out_at, norm, 1e-5, gate_up_at, down_at, inner, qkv[:, :512].copy(), residual,
                updates.ctypes.data, 0,
            )  # fmt: skip
        answers.append((qkv, keys, values, residual))
    for one, many in zip(*answers, strict=True):
        assert np.array_equal(one, many)
        assert np.abs(one).sum() > 0
    assert (numba.threading_layer(), torch.get_num_threads()) == ("workqueue", 1), "torch keeps its own"


def test_a_span_s_matrices_lie_in_the_order_in_which_a_step_reads_them(folder, monkeypatch):
    monkeypatch.setattr(arena, "HUGE_BYTES", mmap.PAGESIZE)  # the model is tiny
    span = load_span(folder, 0, 4)
    weights = [cast(Any, each).weight for block in cast(Any, span)._fused.blocks for each in block.matrices]
    for one, two in pairwise(weights):
        assert one.data_ptr() + one.nbytes == two.data_ptr()
    attention = cast(Any, span.model).layers[0].self_attn
    assert attention.o_proj.weight.data_ptr() == weights[1].data_ptr(), "nothing is kept twice"


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_blocks_in_one_call_have_the_bits_of_blocks_in_three_calls_each(folder, quantize, monkeypatch):
    span = load_span(folder, 1, BLOCKS, quantize=quantize)
    pool = span.new_arena(64)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randn(1, 5, span.hidden_size, generator=generator)
    row = torch.randn(1, span.hidden_size, generator=generator)
    answers = []
    for calls in ("one", "three"):
        monkeypatch.setattr("node.model.blocks.fused._is_divided", lambda *_, calls=calls: calls == "three")
        with monkeypatch.context() as patch:
            forbidden = "_by_halves" if calls == "one" else "Tables"
            patch.setattr(f"node.model.blocks.fused.{forbidden}", None)
            cast(Any, span)._fused._tables = None
            cache = pool.open(1, 16)
            span.forward(prompt, cache, 0)
            cache.reserve(6)
            answers.append(span.decode(row, [cache], 2, BLOCKS - 1))
    assert torch.equal(*answers)


@pytest.mark.parametrize(("quantize", "cached"), [("none", torch.float32), ("int8", torch.bfloat16)])
def test_rows_computed_alone_and_in_place_have_the_bits_of_decode(folder, quantize, cached):
    span = load_span(folder, 1, BLOCKS, quantize=quantize)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randn(1, length, span.hidden_size, generator=generator) for length in (5, 14)]
    steps = [torch.randn(span.hidden_size, generator=generator) for _ in range(8)]
    answers: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for in_place, found in answers.items():
        pools = [span.new_arena(256, dtype=cached) for _ in range(2)]
        caches = [pools[0].open(1, 64), pools[0].open(1, 64), pools[1].open(1, 64)]
        for cache, prompt in zip(caches, [*prompts, prompts[0]], strict=True):
            span.forward(prompt, cache, 0, 2, BLOCKS)
        for number, step in enumerate(steps):  # the rows take new pages on the way
            if number == 4:
                pools[0].hold(0, (None, *pools[0].shapes))  # the stores have other numbers
            for cache in caches:
                cache.reserve(cache.length + 1)
                if in_place:
                    values = step.numpy().copy()
                    span.decode_row(values, cache, 2, BLOCKS)
                    found.append(torch.from_numpy(values))
                else:
                    found.append(span.decode(step[None], [cache], 2, BLOCKS)[0])
                cache.length += 1
    assert all(map(torch.equal, answers[True], answers[False]))


def test_a_row_alone_goes_on_behind_the_first_table_of_angles(folder, monkeypatch):
    monkeypatch.setattr("node.model.blocks.fused._FIRST_ANGLES", 8)
    span = load_span(folder, 0, BLOCKS, quantize="int8")
    row = torch.randn(span.hidden_size, generator=torch.Generator().manual_seed(8))
    caches = [span.new_cache(1, 64) for _ in range(2)]
    for _ in range(20):
        for cache in caches:
            cache.reserve(cache.length + 1)
        values = row.numpy().copy()
        span.decode_row(values, caches[0], 0, BLOCKS)
        other = span.decode(row[None], [caches[1]], 0, BLOCKS)[0]
        assert torch.equal(torch.from_numpy(values), other)
        for cache in caches:
            cache.length += 1
