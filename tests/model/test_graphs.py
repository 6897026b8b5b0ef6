"""The graphs of decode steps, with a recording that only remembers what it was given: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from node.model.blocks import graphs
from node.model.blocks.device.staging import NOBODY, Inputs, Layout, Rows, bucket, to_device
from node.model.blocks.graphs import DecodeGraphs, lacks_memory

WIDTH, PAGE, NOBODYS_PAGE = 3, 16, 9
CPU = torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def plain(inputs: Inputs) -> Tensor:
    """Every input has a part in it."""
    own = inputs.places + 7 * inputs.slots + 11 * inputs.lengths + 13 * inputs.pages.sum(-1)
    return inputs.hidden + own[:, None]


class Step:
    """A step of some rows, and what is expected of it."""

    def __init__(self, count: int, pages: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        lengths = generator.integers(0, pages * PAGE, count)
        self.rows = Rows(lengths, lengths + 100, generator.integers(0, 9, (count, pages)))
        self.hidden = torch.from_numpy(generator.standard_normal((count, WIDTH)).astype(np.float32))
        self.layout = Layout(bucket(count), bucket(pages, 4), WIDTH, torch.float32)
        wide = np.full((count, self.layout.pages), NOBODYS_PAGE)
        wide[:, :pages] = self.rows.pages
        own = lengths + 7 * (lengths + 100) + 11 * (lengths + 1) + 13 * wide.sum(-1)
        self.expected = self.hidden + torch.from_numpy(own.astype(np.float32))[:, None]

    def fill(self, content: Tensor) -> None:
        to_device(self.rows, self.layout, self.hidden, content, NOBODYS_PAGE, PAGE)

    def blank(self, content: Tensor) -> None:
        to_device(NOBODY, self.layout, self.hidden[:0], content, NOBODYS_PAGE, PAGE)

    def through(
        self, steps: DecodeGraphs, run: tuple[int, int] = (0, 4), compute: Callable[[Inputs], Tensor] = plain
    ) -> Tensor:
        return steps.run(run, self.layout, compute, self.fill)[: len(self.hidden)]


class Recorder:
    """made: how often graphs began to share memory.  recorded: runs of steps that were recorded."""

    def __init__(self) -> None:
        self.made = self.recorded = self.replayed = 0
        self.error: Exception | None = None

    def __call__(self):
        self.made += 1
        return self.record

    def record(self, run):
        if self.error is not None:
            raise self.error
        run()
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return run()

        return replay


def test_rows_that_are_not_there_see_and_write_nobodys_page_alone():
    step = Step(3, 2)
    content = torch.full((step.layout.nbytes,), 255, dtype=torch.uint8)
    step.fill(content)
    wide = step.layout.inputs(content)
    assert wide.hidden.shape == (4, WIDTH)
    assert wide.pages.shape == (4, 4)
    assert wide.slots.tolist() == [*step.rows.slots.tolist(), NOBODYS_PAGE * PAGE]
    assert (wide.places.tolist()[3], wide.lengths.tolist()[3], wide.hidden[3].tolist()) == (
        0,
        1,
        [0.0] * WIDTH,
    )
    assert (wide.pages[3] == NOBODYS_PAGE).all()
    assert (wide.pages[:, 2:] == NOBODYS_PAGE).all()
    assert (wide.lengths[:3] == wide.places[:3] + 1).all()
    assert all(
        each.data_ptr() % 16 == content.data_ptr() % 16 for each in (wide.hidden, wide.pages, wide.slots)
    )


def test_steps_of_any_lengths_share_the_graph_of_their_rows():
    recorder = Recorder()
    steps = DecodeGraphs(CPU, recorder)
    for seed, (rows, pages) in enumerate([(3, 1), (4, 4), (3, 2), (4, 3), (3, 5), (3, 8)]):
        step = Step(rows, pages, seed)
        assert torch.equal(step.through(steps), step.expected)
    assert (recorder.recorded, recorder.replayed) == (2, 4), (
        "of one width, and of twice that; not at first sight"
    )
    twice = Step(3, 1)
    for _ in range(2):
        got = twice.through(steps, (1, 3), lambda inputs: 2 * plain(inputs))
        assert torch.equal(got, 2 * twice.expected)
    assert (recorder.recorded, recorder.made) == (3, 1), "another run of blocks, in the same memory"


def test_graphs_that_were_recorded_before_serve_the_first_step():
    recorder = Recorder()
    steps = DecodeGraphs(CPU, recorder)
    seen: list[Inputs] = []

    def compute(inputs: Inputs) -> Tensor:
        seen.append(inputs)
        return plain(inputs)

    step = Step(3, 2)
    assert steps.record((0, 4), step.layout, compute, step.blank)
    assert (seen[0].slots == NOBODYS_PAGE * PAGE).all()
    assert torch.equal(step.through(steps, compute=compute), step.expected)
    assert (recorder.recorded, recorder.replayed) == (1, 1)


def test_an_answer_is_not_overwritten_by_the_next_step():
    answer = torch.zeros(4, WIDTH)  # a graph's output lies in one place
    steps = DecodeGraphs(CPU, lambda: lambda run: lambda: answer.add_(1))
    step = Step(4, 1)
    step.through(steps)
    first, second = step.through(steps), step.through(steps)
    assert (second - first == 1).all()


def test_what_cannot_be_recorded_is_computed_without_graphs_from_then_on(caplog):
    recorder = Recorder()
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    steps = DecodeGraphs(CPU, recorder)
    for seed in range(4):
        step = Step(2, 1, seed)
        assert torch.equal(step.through(steps), step.expected)
        recorder.error = recorder.error if seed < 1 else None
    assert recorder.recorded == 0
    assert caplog.text.count("without CUDA graphs: operation not permitted") == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lack_of_memory_says_nothing_about_graphs(wrapped, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "USES_AFTER_NO_MEMORY", 3)
    recorder = Recorder()
    steps = DecodeGraphs(CPU, recorder)
    one, two = Step(2, 1), Step(4, 1)
    two.through(steps)
    recorder.error = OUT_OF_MEMORY
    if wrapped:  # a recording that is broken off ends in an error of its own
        recorder.error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
        recorder.error.__context__ = OUT_OF_MEMORY
    for _ in range(2):
        assert torch.equal(one.through(steps), one.expected)
    recorder.error = None
    assert torch.equal(two.through(steps), two.expected)
    assert recorder.recorded == 1, "of other rows at once"
    for _ in range(6):
        assert torch.equal(one.through(steps), one.expected)
    assert recorder.recorded == 2, "of these rows after a while"
    assert "without CUDA graphs" not in caplog.text


def test_a_step_that_lacks_memory_says_so():
    steps = DecodeGraphs(CPU, Recorder())

    def compute(inputs: Inputs) -> Tensor:
        raise OUT_OF_MEMORY

    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            Step(2, 1).through(steps, compute=compute)
    assert lacks_memory(OUT_OF_MEMORY)
    assert not lacks_memory(RuntimeError("operation not permitted when stream is capturing"))


def test_the_least_recently_used_graph_is_dropped_and_cleared_graphs_share_no_memory(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graphs, "USES_AFTER_DROPPING", 0)
    recorder = Recorder()
    steps = DecodeGraphs(CPU, recorder)
    for rows in (1, 1, 2, 2, 1, 4, 4, 1, 2, 2):
        step = Step(rows, 1)
        assert torch.equal(step.through(steps), step.expected)
    assert (recorder.recorded, recorder.made) == (4, 1)
    steps.clear()
    Step(1, 1).through(steps)
    assert (recorder.recorded, recorder.made) == (5, 2), "memory of graphs that are gone is taken by no other"


def test_more_runs_of_blocks_than_graphs_do_not_record_at_every_step(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 4)
    recorder = Recorder()
    steps = DecodeGraphs(CPU, recorder)
    step, uses = Step(2, 1), 200
    for _ in range(uses):
        for start in range(6):  # more than there is place for, in turn
            assert torch.equal(step.through(steps, (start, 9)), step.expected)
    assert recorder.recorded < 0.05 * 6 * uses
