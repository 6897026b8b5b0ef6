"""Spans made of blocks that are in memory: the same numbers as loaded whole, and no memory for the others."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from node.model.blocks.forward_backward import backward
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.weights.plans import Plan
from node.model.weights.quantize import PackedLinear
from tensor_codec.errors import LocalProtocolError
from tests.model_fixtures import BLOCKS, TINY, save_tiny

torch.set_num_threads(1)

TOKENS = 12
QUANTIZED = ("llama", "qwen3", "mixtral", "gpt2")


def saved(name: str, path: Path) -> ModelFolder:
    save_tiny(name, path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request, tmp_path_factory) -> ModelFolder:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def moved(folder: ModelFolder, start: int, stop: int, **how: Any) -> Span:
    """The blocks [start, stop) as a node comes to hold them that held 1:4 before."""
    kept = load_span(folder, 1, 4, **how).part(max(1, start), min(4, stop))
    missing = [block for block in range(start, stop) if not kept.start <= block < kept.stop]
    return kept.joined([load_span(folder, block, block + 1, **how) for block in missing])


def answers(span: Span) -> list[torch.Tensor]:
    """What a session of two rows gets, another one for a part of the blocks, and a batch of both."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, TOKENS, span.hidden_size, generator=generator)
    pool = span.new_arena(512)
    whole, part = pool.open(2, 64), pool.open(1, 64)
    runs = [(whole, hidden, span.start, span.stop), (part, hidden[:1, :5], span.start + 1, span.stop)]
    found = [span.forward(given[:, :-2], cache, 0, first, last) for cache, given, first, last in runs]
    found += [
        span.forward(given[:, -2:], cache, cache.length, first, last) for cache, given, first, last in runs
    ]
    for cache in (whole, part):
        cache.reserve(cache.length + 1)
    found.append(span.decode(hidden[[0, 1, 0], 3], [whole, part], span.start + 1, span.stop))
    found.append(backward(span, hidden, hidden, span.start, span.stop))
    return found


def assert_equal(one: Span, two: Span) -> None:
    assert (one.start, one.stop, one.shapes) == (two.start, two.stop, two.shapes)
    assert (one.fused, one.dtype, one.nbytes) == (two.fused, two.dtype, two.nbytes)
    for got, expected in zip(answers(one), answers(two), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("window", [(2, 5), (0, BLOCKS)])
def test_a_span_of_kept_and_of_new_blocks_is_the_span_loaded_whole(folder, window):
    assert_equal(moved(folder, *window), load_span(folder, *window))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_so_it_is_with_quantised_weights(name, quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("node.model.weights.quantize.measured_plan", lambda *_: Plan(((1, "compiled"),)))
    folder = saved(name, tmp_path)
    one, two = (load(folder, 2, 6, quantize=quantize) for load in (moved, load_span))
    if quantize == "int8":
        assert any(isinstance(module, PackedLinear) for module in one.model.modules())
    assert_equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_it_is_in_other_dtypes(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("node.model.weights.quantize.measured_plan", lambda *_: Plan(((1, "compiled"),)))
    folder = saved("llama", tmp_path)
    assert_equal(moved(folder, 2, 6, dtype=dtype), load_span(folder, 2, 6, dtype=dtype))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_no_weight_is_copied(folder, quantize):
    span, fresh = (load_span(folder, *window, quantize=quantize) for window in ((1, 4), (4, 6)))
    weights = {tensor.data_ptr() for one in (span, fresh) for tensor in one.model.state_dict().values()}
    whole = span.part(2, 4).joined([fresh])
    assert {tensor.data_ptr() for tensor in whole.model.state_dict().values()} <= weights


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_of_the_blocks_that_are_left_nothing_stays_in_memory(folder, quantize):
    gc.freeze()  # so that the collection below visits nothing that was here before
    span = load_span(folder, 0, 4, quantize=quantize)
    answers(span)  # views, angles, compiled kernels: all that computing leaves behind
    blocks = list(
        span.model.get_submodule(span.architecture.container)
        .get_submodule(span.architecture.blocks)
        .children()
    )
    left = [weakref.ref(each) for block in blocks[:2] for each in (*block.modules(), *block.parameters())]
    left += [weakref.ref(block) for block in (span._fused.blocks[:2] if span._fused else ())]
    kept = [weakref.ref(each) for block in blocks[2:] for each in (*block.modules(), *block.parameters())]
    before = span.nbytes
    span = span.part(2, 4)
    answers(span)
    del blocks
    gc.collect()
    assert [each for each in left if each() is not None] == []
    assert None not in [each() for each in kept]
    assert span.nbytes < 0.7 * before


def test_only_neighbours_make_one_span(tmp_path):
    folder = saved("llama", tmp_path)
    one = load_span(folder, 0, 2)
    for other in (
        load_span(folder, 3, 4),
        load_span(folder, 1, 3),
        load_span(folder, 2, 3, dtype=torch.float16),
    ):
        with pytest.raises(LocalProtocolError, match="do not make one span"):
            one.joined([other])
    with pytest.raises(LocalProtocolError, match=r"blocks 1:3 are not within 0:2"):
        one.part(1, 3)


def test_a_part_of_a_part_is_a_part(tmp_path):
    folder = saved("llama", tmp_path)
    assert_equal(load_span(folder, 0, 6).part(1, 6).part(2, 4), load_span(folder, 2, 4))
