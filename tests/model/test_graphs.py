"""The shapes of CUDA graphs, with a recording that only remembers what it was given: no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from node.model.blocks import graphs
from node.model.blocks.graphs import DecodeGraphs, Inputs, bucket, padded
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from tests.model_fixtures import save_tiny


def inputs_of(rows: int, longest: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(rows, 3, generator=generator),
        torch.randint(0, longest, (rows,), generator=generator),
        torch.arange(rows) + 7,
        torch.randint(0, 50, (rows, longest), generator=generator),
    )


def plain(hidden, places, write, read):
    """Every input has a part in it, and nothing behind a row's place or below the last row does."""
    seen = torch.arange(read.shape[1]) <= places[:, None]
    return hidden + (write + (read * seen).sum(-1))[:, None]


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.fails = fails

    def __call__(self, run, inputs):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.shapes.append(tuple(inputs.read.shape))
        return lambda: inputs.run(run)


@pytest.mark.parametrize(
    ("number", "least", "expected"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 4), (64, 64, 64), (65, 64, 128), (5, 64, 64)],
)
def test_a_bucket_is_the_next_power_of_two(number, least, expected):
    assert bucket(number, least) == expected


def test_rows_that_are_not_there_write_to_nobodys_page():
    wide = padded(inputs_of(3, 70), nobodys_slot=99)
    assert wide.hidden.shape == (4, 3)
    assert wide.read.shape == (4, 128)
    assert wide.write.tolist() == [7, 8, 9, 99]
    assert wide.places[3] == 0
    assert (wide.read[3] == 99).all()
    assert (wide.read[:, 70:] == 99).all()


def test_steps_of_one_bucket_share_a_graph_and_get_what_they_would_get_without():
    recorder = Recorder()
    steps = DecodeGraphs(99, recorder)
    for seed, (rows, longest) in enumerate([(3, 70), (4, 65), (3, 128), (4, 100), (3, 129), (3, 200)]):
        given = inputs_of(rows, longest, seed)
        assert torch.equal(steps.run(plain, (0, 4), given), given.run(plain))
    assert recorder.shapes == [(4, 128), (4, 256)], "the first of each bucket is not worth recording"
    for seed in range(2):
        given = inputs_of(3, 70, seed)
        assert torch.equal(steps.run(lambda *a: 2 * plain(*a), (1, 3), given), 2 * given.run(plain))
    assert recorder.shapes[2:] == [(4, 128)], "another run of blocks is another graph"


def test_an_answer_is_not_overwritten_by_the_next_step():
    answer = torch.zeros(4, 3)  # a graph's output lies in one place
    steps = DecodeGraphs(99, lambda run, inputs: lambda: answer.add_(1))
    given = inputs_of(4, 64)
    steps.run(plain, (0, 1), given)
    first = steps.run(plain, (0, 1), given)
    second = steps.run(plain, (0, 1), given)
    assert (second - first == 1).all()


def test_what_cannot_be_recorded_is_computed_without_graphs_from_then_on(caplog):
    recorder = Recorder(fails=True)
    steps = DecodeGraphs(99, recorder)
    for seed in range(4):
        given = inputs_of(2, 64, seed)
        assert torch.equal(steps.run(plain, (0, 4), given), given.run(plain))
        recorder.fails = seed < 1
    assert recorder.shapes == []
    assert caplog.text.count("without CUDA graphs: operation not permitted") == 1


def test_the_least_recently_used_graph_is_dropped(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    recorder = Recorder()
    steps = DecodeGraphs(99, recorder)
    for rows in (1, 1, 2, 2, 1, 4, 4, 1, 2):
        given = inputs_of(rows, 64)
        assert torch.equal(steps.run(plain, (0, 4), given), given.run(plain))
    assert [shape[0] for shape in recorder.shapes] == [1, 2, 4, 2]


def test_a_fused_step_through_graphs_is_the_step(tmp_path: Path):
    save_tiny("mistral", tmp_path / "model")
    span = load_span(open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")), 0, 4)
    fused = span._fused
    assert fused is not None
    pool = span.new_arena(512)
    lengths = np.array([9, 3, 17])
    caches = [pool.open(1, 64) for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        span.forward(torch.randn(1, int(length), span.hidden_size), cache, 0)
        cache.reserve(int(length) + 1)
    rows = np.concatenate([cache.rows for cache in caches])
    inputs = Inputs(
        torch.randn(3, span.hidden_size),
        torch.from_numpy(lengths),
        torch.from_numpy(pool.slots_of(rows, lengths)),
        torch.from_numpy(pool.slots(rows, 18)),
    )
    steps = DecodeGraphs(pool.nobodys_page * pool.page_tokens, Recorder())

    @torch.inference_mode()
    def run(hidden: torch.Tensor, *positions: torch.Tensor) -> torch.Tensor:
        places, write, read = positions
        return fused._decode_torch(hidden, pool, places, write, read, (0, 4))

    expected = span.decode(inputs.hidden, caches, 0, 4)
    for _ in range(3):
        got = steps.run(run, (0, 4), inputs)
        assert (got - expected).abs().max() <= 5e-6 * expected.abs().max()
