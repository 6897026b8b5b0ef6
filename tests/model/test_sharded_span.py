"""A span that two processes compute together: the numbers of one device, in every kind of step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from node.config import ConfigError
from node.model.blocks.forward_backward import (
    Tape,
    backward,
    backward_in_parts,
    finish,
    forward,
    kinds_of_blocks,
    measure_activations,
)
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.parallel.shard import FAMILIES
from node.model.parallel.sharded import ShardedSpan, load_sharded
from node.model.parallel.team import Team, open_team
from node.model.parallel.worker import _use_threads
from node.model.weights.plans import Plan
from node.model.weights.quantize import multiplies_bfloat16
from tests.model_fixtures import BLOCKS, TINY, save_tiny

torch.set_num_threads(1)

GRADIENTS = {"backward", "gradient", "of prompts", "back through the tape"}


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = open_team(["cpu", "cpu"])
    yield team
    team.close()


def saved(name: str, path: Path) -> ModelFolder:
    save_tiny(name, path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> ModelFolder:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def hidden_of(span: Any, rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, span.hidden_size, generator=torch.Generator().manual_seed(seed))


def answers(span: Span) -> dict[str, torch.Tensor]:
    """Prefill in chunks, a session of a part of the blocks, ragged decodes, a cut, other rows, gradients."""
    pool: Any = span.new_arena(512)
    span.record(pool)
    whole, part = pool.open(2, 64), pool.open(1, 64)
    hidden = hidden_of(span, 2, 12)
    found = {"prefill": span.forward(hidden[:, :7], whole, 0), "chunk": span.forward(hidden[:, 7:], whole, 7)}
    found["part"] = span.forward(hidden[:1, :3], part, 0, 1, BLOCKS - 1)
    for step in range(3):
        for cache in (whole, part):
            cache.reserve(cache.length + 1)
        found[f"decode {step}"] = span.decode(hidden[[0, 1, 0], step], [whole, part], 1, BLOCKS - 1)
        for cache in (whole, part):
            cache.length += 1
    if span.fused:
        for cache, tokens in ((whole, 3), (part, 1)):
            cache.reserve(cache.length + tokens)
        rows = hidden[0, [0, 1, 2, 3, 4, 5, 0]]
        found["several tokens"] = span.decode(rows, [whole, part], 1, BLOCKS - 1, tokens=[3, 1])
    whole.select([1, 1])
    whole.cut(5)
    part.close()
    found["cut"] = span.forward(hidden[:, :2], whole, 5, prompts=hidden_of(span, BLOCKS, 7))
    other = pool.open(1, 16)
    found["after a close"] = span.forward(hidden[:1, :5], other, 0)
    found["forward"] = forward(span, hidden, 0, BLOCKS)
    found["backward"] = backward(span, hidden, hidden, 1, BLOCKS)
    run = backward_in_parts(span, hidden, hidden, 0, BLOCKS, hidden_of(span, BLOCKS, 2), most=100)
    gradients = finish(run)
    assert gradients.prompts is not None
    tape = Tape()
    found |= {"gradient": gradients.hidden, "of prompts": gradients.prompts}
    found["taped"] = finish(tape.forward_in_parts(span, hidden, 0, BLOCKS, most=50))
    found["back through the tape"] = finish(tape.backward_in_parts(hidden)).hidden
    return found


def assert_close(sharded: Span, one: Span, relative: float, of_gradients: float = 0) -> None:
    expected = answers(one)
    for name, got in answers(sharded).items():
        error = (got - expected[name]).norm() / expected[name].norm()
        most = max(relative, of_gradients) if name in GRADIENTS else relative
        assert error < most, f"{name}: {error:g}"


def test_two_ranks_compute_what_one_device_computes(team, folder):
    assert_close(load_sharded(team, folder, 0, BLOCKS), load_span(folder, 0, BLOCKS), 1e-5)


def test_after_a_move_they_still_do(team, folder):
    sharded = load_sharded(team, folder, 0, 4).part(1, 4)
    sharded = sharded.joined([load_sharded(team, folder, 0, 1), load_sharded(team, folder, 4, BLOCKS)])
    assert isinstance(sharded, ShardedSpan)
    assert_close(sharded, load_span(folder, 0, BLOCKS), 1e-5)


@pytest.fixture
def plain_products(monkeypatch) -> None:
    """Products without rounded activations, so that what is left is the order of sums."""
    monkeypatch.setattr("node.model.weights.quantize.measured_plan", lambda *_: Plan(((1, "dequantise"),)))


@pytest.mark.usefixtures("plain_products")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_int8_shards_have_the_codes_of_one_device(team, name, tmp_path):
    folder = saved(name, tmp_path)
    sharded = load_sharded(team, folder, 0, BLOCKS, quantize="int8")
    of_gradients = 2e-2 if multiplies_bfloat16() else 0  # rounded there: see PackedLinear.back
    assert_close(sharded, load_span(folder, 0, BLOCKS, quantize="int8"), 2e-4, of_gradients)
    whole, own = (
        span.architecture.blocks_of(span.model)[0].mlp
        for span in (load_span(folder, 0, 1, quantize="int8"), sharded)
    )
    first, last = 0, own.down_proj.linear.weight.shape[1]
    assert torch.equal(own.down_proj.linear.weight, whole.down_proj.weight[:, first:last])
    assert torch.equal(own.down_proj.linear.scale, whole.down_proj.scale)
    assert torch.equal(own.gate_proj.weight, whole.gate_proj.weight[first:last])


def test_bfloat16_weights_are_divided_too(team, tmp_path):
    folder = saved("llama", tmp_path)
    sharded = load_sharded(team, folder, 0, BLOCKS, dtype=torch.bfloat16)
    assert_close(sharded, load_span(folder, 0, BLOCKS, dtype=torch.bfloat16), 2e-2)


def test_each_rank_has_half_of_the_matrices_and_half_of_the_keys(team, tmp_path):
    folder = saved("llama", tmp_path)
    sharded, one = load_sharded(team, folder, 0, BLOCKS), load_span(folder, 0, BLOCKS)
    assert sharded.nbytes < 0.55 * one.nbytes
    assert 2 * sharded.new_arena(64).nbytes == one.new_arena(64).nbytes


def test_activations_can_be_measured_and_blocks_told_apart(team, folder):
    sharded, one = load_sharded(team, folder, 0, BLOCKS), load_span(folder, 0, BLOCKS)
    assert kinds_of_blocks(sharded) == kinds_of_blocks(one)
    assert 0 < measure_activations(sharded, 0).base < measure_activations(one, 0).base


def test_what_is_dropped_here_is_dropped_there(team, tmp_path):
    folder = saved("llama", tmp_path)
    for _ in range(3):
        sharded = load_sharded(team, folder, 0, 2)
        cache = sharded.new_cache(1, 8)
        sharded.forward(hidden_of(sharded, 1, 4), cache, 0)
        hidden = hidden_of(sharded, 1, 4)
        tape = Tape()
        finish(tape.forward_in_parts(sharded, hidden, 0, 2))
        del tape, sharded, cache
    gc.collect()
    pending = [message["kind"] for message in team._later if message["do"] == "forget"]
    assert {"span", "pool", "graph"} <= set(pending)


def test_ranks_take_the_number_of_threads_with_their_next_step(team, tmp_path):
    folder = saved("llama", tmp_path)
    sharded = load_sharded(team, folder, 0, BLOCKS)
    team.use_threads(2)
    assert_close(sharded, load_span(folder, 0, BLOCKS), 1e-5)
    assert not any(message["do"] == "threads" for message in team._later)
    team.use_threads(1)
    _use_threads({"threads": 2})
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_fault_at_one_rank_while_loading_leaves_the_team_sound(team, tmp_path):
    folder = saved("llama", tmp_path)
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:64])
    with pytest.raises(ConfigError):
        load_sharded(team, folder, 0, 2)
    assert_close(
        load_sharded(team, saved("llama", tmp_path / "sound"), 0, BLOCKS),
        load_span(saved("llama", tmp_path / "again"), 0, BLOCKS),
        1e-5,
    )


def test_a_number_of_ranks_that_is_not_possible_is_refused(team, tmp_path):
    folder = saved("llama", tmp_path)
    odd = dict(folder.config) | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    assert TINY["llama"]
    from dataclasses import replace

    with pytest.raises(ConfigError, match="among 2 ranks: the number of ranks can be 3"):
        load_sharded(team, replace(folder, config=odd | {"hidden_size": 24}), 0, 2)
