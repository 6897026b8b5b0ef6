"""The steps of a GPU, computed on a CPU by what replaces their kernels, next to the compiled steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.prefix import KeyValues, SpanPrefix
from node.model.adapters.sites import site_shapes
from node.model.blocks.device import causal, staging, steps
from node.model.blocks.device.causal import attended
from node.model.blocks.kv_pages import SpanCache
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import ModelFolder
from tests.lora_fixtures import random_adapter
from tests.model_fixtures import BLOCKS, FUSED, assert_close, saved

torch.set_num_threads(1)

TOLERANCE = {"none": 5e-6, "int8": 1e-4}  # of the largest value: rows are rounded to 16 bits next to int8


@pytest.fixture(scope="module", params=FUSED)
def folder(request, tmp_path_factory) -> ModelFolder:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def as_on_a_device(span: Span) -> Span:
    """The span computes as on a GPU from now on."""
    assert span._fused is not None
    span._fused.on_device = span._fused.steps
    return span


def both(
    folder: ModelFolder, quantize: str = "none", dtype: torch.dtype = torch.float32
) -> tuple[Span, Span]:
    ours, theirs = (load_span(folder, 0, BLOCKS, dtype=dtype, quantize=quantize) for _ in range(2))
    return as_on_a_device(ours), theirs


def poisoned(span: Span, tokens: int = 800) -> tuple[Span, list[SpanCache]]:
    """A page pool in which other sessions have left NaN everywhere but in nobody's page."""
    pool = span.new_arena(tokens, dtype=span.dtype)
    for store in (*pool.keys, *pool.values):
        store[: pool.nobodys_page * pool.page_tokens].fill_(float("nan"))
    return span, [pool.open(1, 128) for _ in range(4)]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_prefills_and_decode_steps_are_the_compiled_ones(folder, quantize):
    ours, theirs = both(folder, quantize)
    generator = torch.Generator().manual_seed(1)
    mine, other = (span.new_cache(2, 64, span.dtype) for span in (ours, theirs))
    position = 0
    for tokens in (9, 1, 4, 1, 1, 12, 17):
        hidden = torch.randn(2, tokens, ours.hidden_size, generator=generator)
        got = ours.forward(hidden, mine, position, 2, 5)
        assert_close(got, theirs.forward(hidden, other, position, 2, 5), TOLERANCE[quantize])
        position += tokens


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_rows_of_any_lengths_are_the_compiled_ones_whatever_others_left_in_their_pages(folder, quantize):
    sides = [poisoned(span) for span in both(folder, quantize)]
    generator = torch.Generator().manual_seed(2)
    span = sides[0][0]
    for number, length in enumerate((7, 1, 33, 70)):
        hidden = torch.randn(1, length, span.hidden_size, generator=generator)
        for side, caches in sides:
            side.forward(hidden, caches[number], 0)
    for _ in range(4):
        rows = torch.randn(4, span.hidden_size, generator=generator)
        answers = []
        for side, caches in sides:
            for cache in caches:
                cache.reserve(cache.length + 1)
            answers.append(side.decode(rows, caches, 0, BLOCKS))
            for cache in caches:
                cache.length += 1
        assert_close(answers[0], answers[1], TOLERANCE[quantize])


def test_sixteen_bits_differ_by_their_rounding(folder):
    ours, exact = (load_span(folder, 0, BLOCKS) for _ in range(2))
    ours = as_on_a_device(Span(ours.model.to(torch.bfloat16), ours.architecture, 0, BLOCKS))
    generator = torch.Generator().manual_seed(3)
    mine, other = ours.new_cache(1, 64), exact.new_cache(1, 64)
    position = 0
    for tokens in (20, 1, 5, 1):
        hidden = torch.randn(1, tokens, ours.hidden_size, generator=generator)
        got, expected = ours.forward(hidden, mine, position), exact.forward(hidden, other, position)
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).norm() / expected.norm() < 0.03
        position += tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> ModelFolder:
    return saved("llama", tmp_path_factory.mktemp("plain"))


def test_adapters_and_rows_without_one_share_a_step(llama):
    ours, theirs = both(llama)
    one, two = (random_adapter(site_shapes(ours), seed, rank=4) for seed in (1, 2))
    owners: list[SpanAdapter | None] = [None, one, one, two]
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randn(1, length, ours.hidden_size, generator=generator) for length in (5, 21, 3, 9)]
    rows = torch.randn(4, ours.hidden_size, generator=generator)

    def decoded(span: Span, own: list[SpanAdapter | None]) -> Tensor:
        pool = span.new_arena(400)
        caches = [pool.open(1, 64) for _ in own]
        for cache, prompt, adapter in zip(caches, prompts, own, strict=True):
            half = prompt.shape[1] // 2
            span.forward(prompt[:, :half], cache, 0, adapter=adapter)
            span.forward(prompt[:, half:], cache, half, adapter=adapter)
            cache.reserve(cache.length + 1)
        return span.decode(rows, caches, 0, BLOCKS, adapters=own)

    got = decoded(ours, owners)
    assert_close(got, decoded(theirs, owners), 1e-5)
    without = decoded(ours, [None] * 4)
    assert torch.equal(got[0], without[0])
    assert not torch.allclose(got[1:], without[1:], atol=1e-2)


def test_a_prefix_lies_in_front_of_every_row(llama):
    generator = torch.Generator().manual_seed(5)
    ours, theirs = both(llama)
    width = ours.shapes[0].key_heads * ours.shapes[0].key_dim
    blocks = {
        block: KeyValues(*(torch.randn(3, width, generator=generator) for _ in range(2)))
        for block in range(BLOCKS)
    }
    prompt = torch.randn(2, 20, ours.hidden_size, generator=generator)
    answers = []
    for span in (ours, theirs):
        cache = span.new_arena(400).open(2, 64)
        cache.begin_with(SpanPrefix("p", blocks))
        answers.append(
            torch.cat([span.forward(prompt[:, :11], cache, 0), span.forward(prompt[:, 11:], cache, 11)], 1)
        )
        cache.reserve(21)
        answers.append(span.decode(prompt[:, 0], [cache], 0, BLOCKS)[:, None])
    assert_close(answers[0], answers[2])
    assert_close(answers[1], answers[3])


def test_deep_prompts_are_added_in_front_of_each_block(llama):
    ours, theirs = both(llama)
    generator = torch.Generator().manual_seed(6)
    prompts = torch.randn(BLOCKS, 3, ours.hidden_size, generator=generator)
    hidden = torch.randn(2, 7, ours.hidden_size, generator=generator)
    got, expected = (
        span.forward(hidden, span.new_cache(2, 32), 0, prompts=prompts) for span in (ours, theirs)
    )
    assert_close(got, expected)


class Recording:
    """A capture that replays by computing again.  sizes: rows and pages of each graph."""

    def __init__(self) -> None:
        self.graphs = self.replays = 0

    def __call__(self):
        return self.record

    def record(self, run):
        run()
        self.graphs += 1

        def replay() -> Tensor:
            self.replays += 1
            return run()

        return replay


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Tables of pages begin with two."""
    monkeypatch.setattr(staging, "FIRST_PAGES", 2)
    monkeypatch.setattr(steps, "FIRST_PAGES", 2)


def test_a_step_through_graphs_is_the_step_and_a_longer_table_is_another_graph(folder, narrow):
    ours, theirs = both(folder)
    recording = Recording()
    ours._fused.steps.new_capture = lambda: recording.record
    sides = [(span, span.new_arena(1000)) for span in (ours, theirs)]
    opened = [[pool.open(1, 120) for _ in range(3)] for _, pool in sides]
    generator = torch.Generator().manual_seed(7)
    for number, length in enumerate((20, 3, 28)):
        hidden = torch.randn(1, length, ours.hidden_size, generator=generator)
        for (span, _), caches in zip(sides, opened, strict=True):
            span.forward(hidden, caches[number], 0)
    for _ in range(10):  # the longest row needs a third page on the way
        rows = torch.randn(3, ours.hidden_size, generator=generator)
        answers = []
        for (span, _), caches in zip(sides, opened, strict=True):
            for cache in caches:
                cache.reserve(cache.length + 1)
            answers.append(span.decode(rows, caches, 0, BLOCKS))
            for cache in caches:
                cache.length += 1
        assert_close(answers[0], answers[1])
    assert recording.graphs == 2
    assert recording.replays == 8, "but for the first step of either width"


def test_graphs_are_recorded_at_start_and_touch_no_session(llama):
    ours, theirs = both(llama)
    recording = Recording()
    own = ours._fused.steps
    own.new_capture = lambda: recording.record
    pool = ours.new_arena(200)
    cache, other = pool.open(1, 64), theirs.new_arena(200).open(1, 64)
    prompt = torch.randn(1, 10, ours.hidden_size, generator=torch.Generator().manual_seed(8))
    ours.forward(prompt, cache, 0)
    theirs.forward(prompt, other, 0)
    before = [store[: pool.nobodys_page * 16].clone() for store in (*pool.keys, *pool.values)]
    ours.record(pool)
    assert recording.graphs == 9
    now = (*pool.keys, *pool.values)
    assert all(torch.equal(store[: len(old)], old) for store, old in zip(now, before, strict=True))
    for each in (cache, other):
        each.reserve(11)
    got = ours.decode(prompt[:, 0], [cache], 0, BLOCKS)
    assert recording.replays == 1, "the first step of a session has its graph"
    assert_close(got, theirs.decode(prompt[:, 0], [other], 0, BLOCKS))


def test_more_rows_than_a_graph_has_are_computed_without_one(llama, monkeypatch):
    monkeypatch.setattr(steps, "MAX_ROWS", 2)
    ours, theirs = both(llama)
    recording = Recording()
    ours._fused.steps.new_capture = lambda: recording.record
    rows = torch.randn(3, 1, ours.hidden_size, generator=torch.Generator().manual_seed(9))
    for _ in range(3):
        got, expected = (span.forward(rows, span.new_cache(3, 16), 0) for span in (ours, theirs))
        assert_close(got, expected)
    assert recording.graphs == 0


@pytest.mark.parametrize("window", [0, 1, 5, 16, 40])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 30), (7, 7), (7, 30), (16, 17), (30, 30)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_of_last_positions_is_softmax_over_what_each_sees(tokens, length, key_heads, window):
    generator = torch.Generator().manual_seed(10)
    q = torch.randn(2, tokens, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, length, key_heads, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    got = attended(q, k, v, 0.3, window)
    wide = [each.repeat_interleave(4 // key_heads, 2) for each in (k, v)]
    scores = 0.3 * torch.einsum("bthd,blhd->bhtl", q, wide[0])
    distance = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    expected = torch.einsum("bhtl,blhd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), wide[1])
    assert_close(got, expected.flatten(2), 1e-12)


def test_attention_behind_the_first_chunk_has_no_mask_where_flash_takes_it(monkeypatch):
    given: list[dict[str, object]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        given.append(options | {"heads": k.shape[1]})
        return q

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(causal, "_by_flash", lambda *tensors: True)
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 12, 2, 16)
    attended(q, k, k, 1.0)
    attended(q, k[:, :4], k[:, :4], 1.0)
    (late, first) = given
    assert (late["enable_gqa"], late["heads"], late["is_causal"]) == (True, 2, False)
    assert type(late["attn_mask"]).__name__ == "CausalBias"
    assert (first["enable_gqa"], first["is_causal"], first["attn_mask"]) == (True, True, None)


@pytest.mark.parametrize(("tokens", "length"), [(4, 12), (12, 12), (1, 12)])
def test_flash_is_asked_about_what_it_will_compute(monkeypatch, tokens, length):
    def takes(
        parameters: tuple[Any, ...],
    ) -> bool:  # as torch does: `is_causal` is for as many queries as keys
        q, k, _, _, _, is_causal, _ = parameters
        return not is_causal or q.shape[2] == k.shape[2]

    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *parameters: parameters)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", takes)
    q, k = (SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, each, 8)) for each in (tokens, length))
    assert causal._by_flash(*cast(Any, (q, k, k)))


def test_angles_grow_with_a_session_and_graphs_of_the_old_ones_go(llama, monkeypatch):
    monkeypatch.setattr(steps, "MOST_FIRST_ANGLES", 16)
    ours, theirs = both(llama)
    recording = Recording()
    own = ours._fused.steps
    own.new_capture = lambda: recording.record
    pool, other = ours.new_arena(200), theirs.new_arena(200)
    caches = pool.open(1, 100), other.open(1, 100)
    hidden = torch.randn(1, 40, ours.hidden_size, generator=torch.Generator().manual_seed(11))
    for position in range(40):
        row = hidden[:, position : position + 1]
        got, expected = (
            span.forward(row, cache, position) for span, cache in zip((ours, theirs), caches, strict=True)
        )
        assert_close(got, expected)
    assert own._angles is not None
    assert len(own._angles[0]) == 64
    assert recording.graphs == 3, "for 16, 32 and 64 positions"
    assert np.isfinite(own._angles[0].numpy()).all()
