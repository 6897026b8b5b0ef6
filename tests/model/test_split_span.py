"""A span over several devices: the numbers of one device, whatever blocks a session uses and after moves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.prefix import KeyValues, SpanPrefix, why_no_prefix
from node.model.adapters.sites import site_shapes
from node.model.blocks.forward_backward import (
    backward,
    backward_in_parts,
    finish,
    forward,
    kinds_of_blocks,
    measure_activations,
)
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.parallel import split as split_module
from node.model.parallel.split import ELSEWHERE, Part, SplitSpan, load_split
from tensor_codec.errors import LocalProtocolError
from tests.lora_fixtures import random_adapter
from tests.meta_device import DEVICE, Counted
from tests.model_fixtures import BLOCKS, save_tiny

torch.set_num_threads(1)

CPU = (torch.device("cpu"), torch.device("cpu"))  # two devices as far as a span knows
PLACES = [0, 0, 1, 1, 1, 0]  # a device may have two runs, after a move


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "bloom", "lfm2", "mixtral"])
def folder(request, tmp_path_factory) -> ModelFolder:
    path: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def hidden_of(span: Any, rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, span.hidden_size, generator=torch.Generator().manual_seed(seed))


def answers(span: Span) -> list[torch.Tensor]:
    """Prefill in chunks, a session of a part of the blocks, ragged decodes, a cut, other rows, gradients."""
    pool: Any = span.new_arena(512)
    span.record(pool)
    whole, part = pool.open(2, 64), pool.open(1, 64)
    hidden = hidden_of(span, 2, 12)
    found = [span.forward(hidden[:, :7], whole, 0), span.forward(hidden[:, 7:], whole, 7)]
    found.append(span.forward(hidden[:1, :3], part, 0, 1, BLOCKS - 1))
    for cache in (whole, part):
        cache.reserve(cache.length + 1)
    found.append(span.decode(hidden[[0, 1, 0], 3], [whole, part], 1, BLOCKS - 1))
    if span.fused:
        whole.reserve(whole.length + 3)
        found.append(
            span.decode(hidden[0, [0, 1, 2, 3, 4, 5, 0]], [whole, part], 1, BLOCKS - 1, tokens=[3, 1])
        )
    if span.can_cut:
        whole.select([1, 1])
        whole.cut(5)
        found.append(span.forward(hidden[:, :2], whole, 5, prompts=hidden_of(span, BLOCKS, 7)))
    found.append(forward(span, hidden, 0, BLOCKS))
    found.append(backward(span, hidden, hidden, 1, BLOCKS))
    run = backward_in_parts(span, hidden, hidden, 0, BLOCKS, hidden_of(span, BLOCKS, 2), most=100)
    found += [each for each in finish(run) if each is not None]
    return found


def assert_equal(split: Span, one: Span) -> None:
    for got, expected in zip(answers(split), answers(one), strict=True):
        assert torch.equal(got, expected)


def test_a_split_span_computes_what_one_device_computes(folder):
    split = load_split(folder, 0, PLACES, CPU)
    assert [(part.place, part.span.start, part.span.stop) for part in split.parts] == [
        (0, 0, 2),
        (1, 2, 5),
        (0, 5, 6),
    ]
    assert_equal(split, load_span(folder, 0, BLOCKS))


def test_after_a_move_it_still_does(folder):
    split = load_split(folder, 0, PLACES[:4], CPU).part(1, 4)
    split = split.joined([load_split(folder, 0, [1], CPU), load_split(folder, 4, [1, 0], CPU)])
    assert isinstance(split, SplitSpan)
    assert_equal(split, load_span(folder, 0, BLOCKS))


def test_int8_weights_split_too(folder):
    how: dict[str, Any] = {"quantize": "int8"}
    split, one = load_split(folder, 0, PLACES, CPU, **how), load_span(folder, 0, BLOCKS, **how)
    for got, expected in zip(answers(split), answers(one), strict=True):
        assert torch.allclose(got, expected, atol=1e-4)


def test_the_stores_of_a_block_lie_at_its_device_alone(folder):
    split = load_split(folder, 0, PLACES, CPU)
    pool, one = split.new_arena(64), load_span(folder, 0, BLOCKS).new_arena(64)
    assert pool.nbytes == one.nbytes
    for place, own in enumerate(pool.pools):
        assert [index for index, shape in enumerate(own.shapes) if shape not in (None, ELSEWHERE)] == [
            block for block in range(BLOCKS) if PLACES[block] == place and split.shapes[block] is not None
        ]


def test_sessions_go_on_while_the_span_moves(tmp_path):
    save_tiny("llama", tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    split, one = load_split(folder, 0, PLACES[:4], CPU), load_span(folder, 0, 4)
    hidden, found = hidden_of(one, 1, 6), []
    for span, more in ((split, load_split(folder, 4, [1], CPU)), (one, load_span(folder, 4, 5))):
        pool = span.new_arena(128)
        cache = pool.open(1, 32)
        span.forward(hidden[:, :4], cache, 0, 2, 4)
        moved: Any = span.part(2, 4).joined([more])
        pool.hold(moved.start, moved.shapes)
        found.append(moved.forward(hidden[:, 4:], cache, 4, 2, 4))
    assert torch.equal(*found)


def test_blocks_that_are_left_leave_no_weights(tmp_path):
    save_tiny("llama", tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    split = load_split(folder, 0, PLACES[:4], CPU)
    answers_of = split.forward(hidden_of(split, 1, 3), split.new_cache(1, 8), 0)
    left = weakref.ref(split.architecture.blocks_of(split.model)[0])
    split = split.part(2, 4)
    del answers_of
    gc.collect()
    assert left() is None


def test_a_gap_is_refused_and_so_is_a_step_that_does_not_continue(tmp_path):
    save_tiny("llama", tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    split = load_split(folder, 0, [0, 1], CPU)
    with pytest.raises(LocalProtocolError, match="do not make one span"):
        split.joined([load_split(folder, 3, [0], CPU)])
    with pytest.raises(LocalProtocolError, match="does not continue"):
        split.forward(hidden_of(split, 1, 1), split.new_cache(1, 8), 3)


def test_kinds_of_blocks_are_found_at_all_devices(folder):
    split, one = load_split(folder, 0, PLACES, CPU), load_span(folder, 0, BLOCKS)
    assert kinds_of_blocks(split) == kinds_of_blocks(one)


def half_on_meta(name: str, path: Path) -> SplitSpan:
    """The first three blocks on the CPU, the others on a device that computes nothing."""
    save_tiny(name, path / "model")
    folder = open_folder(path / "model", memo=HashMemo(path / "hashes.json"))
    later = load_span(folder, 3, BLOCKS)
    there = Span(later.model.to(DEVICE), later.architecture, 3, BLOCKS)
    return SplitSpan([Part(0, load_span(folder, 0, 3)), Part(1, there)], (torch.device("cpu"), DEVICE))


@pytest.mark.parametrize(
    "name", ["olmo2", "bloom", "gemma2"]
)  # compiled kernels take adapters on a CPU alone
def test_what_a_session_brings_goes_to_the_device_of_each_block(name, tmp_path):
    """Low-rank matrices, prompts, prefixes, gradients: no operation mixes devices."""
    split = half_on_meta(name, tmp_path)
    adapter = random_adapter(site_shapes(split), 1)
    pool = split.new_arena(256)
    with Counted():
        split.record(pool)
        one, two = pool.open(1, 64), pool.open(2, 64)
        hidden = hidden_of(split, 2, 9)
        answer = split.forward(hidden[:1], one, 0, prompts=hidden_of(split, BLOCKS, 2), adapter=adapter)
        assert answer.device == DEVICE
        split.forward(hidden[:, :4], two, 0)
        for cache in (one, two):
            cache.reserve(cache.length + 1)
        rows = torch.cat([hidden[:1, 0], hidden[:, 1]])
        assert split.decode(rows, [one, two], 0, BLOCKS, adapters=[adapter, None]).device == DEVICE
        frozen = AdaptedSpan(split, adapter)
        forward(frozen, hidden, 0, BLOCKS)
        backward(frozen, hidden, hidden, 1, BLOCKS)
        for block in kinds_of_blocks(split):
            measure_activations(split, block)
        trained = AdaptedSpan(split, adapter, trains=True)
        run = backward_in_parts(trained, hidden, hidden, 0, BLOCKS, hidden_of(split, BLOCKS, 2), most=100)
        assert finish(run).hidden.shape == hidden.shape
        assert set(trained.gradients) == set(range(BLOCKS))
        values = next(shape for shape in split.shapes if shape is not None)
        if why_no_prefix(split.config) is None and values.key_dim:
            width = values.key_heads * values.key_dim
            prefix = SpanPrefix("p", {n: KeyValues(*torch.randn(2, 3, width)) for n in range(BLOCKS)})
            three = pool.open(1, 64)
            three.begin_with(prefix)
            split.forward(hidden[:1], three, 0)
            run = backward_in_parts(
                AdaptedSpan(split, prefix, trains=True), hidden, hidden, 0, BLOCKS, most=100
            )
            assert finish(run).hidden.shape == hidden.shape


def test_kernels_of_a_part_are_launched_on_its_device(monkeypatch, tmp_path):
    """Triton and graphs take the thread's own device, wherever the tensors are."""
    split, current, seen = half_on_meta("olmo2", tmp_path), list[torch.device](), list[torch.device]()

    @contextmanager
    def launching_on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def checked(device: torch.device, function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            assert current[-1:] == [device]
            seen.append(device)
            return function(*args, **named)

        return call

    monkeypatch.setattr(split_module, "launching_on", launching_on)
    for part in split.parts:
        own, view = part.span, part.span._view
        for name in ("forward", "decode", "record"):
            monkeypatch.setattr(own, name, checked(own.device, getattr(own, name)))

        def checked_view(*run: int, device: torch.device = own.device, view: Any = view) -> Any:
            model, entry = view(*run)
            return checked(device, model), entry

        monkeypatch.setattr(own, "_view", checked_view)
    pool = split.new_arena(64)
    for run in ((0, BLOCKS), (3, BLOCKS), (0, 3)):
        del seen[:]
        hidden, cache = hidden_of(split, 1, 4), pool.open(1, 16)
        with Counted():
            split.record(pool)
            split.forward(hidden[:, :3], cache, 0, *run)
            cache.reserve(4)
            split.decode(hidden[:, 3], [cache], *run)
            forward(split, hidden, *run)
        here = [
            part.span.device for part in split.parts if part.span.start < run[1] and run[0] < part.span.stop
        ]
        assert set(here) <= set(seen)
        assert len(seen) >= 2 + 3 * len(here)
    assert current == []
