"""A batch whose sessions begin at several blocks, brought to a device by one copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trio
from numpy.typing import NDArray

from node.model.blocks.device.staging import Stage
from node.model.blocks.span import Span, load_span
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.messages.contract import Contract, StepRange
from tests.fakes_serving import FakeCompute
from tests.model_fixtures import BLOCKS, saved

torch.set_num_threads(1)

CPU = torch.device("cpu")
RUNS = ((0, BLOCKS), (2, BLOCKS), (0, 3), (4, 5))


def spans(variant: str, path: Path, graphs: bool) -> tuple[Span, Span]:
    """One that brings steps to a device, which is the CPU here, and one of the CPU."""
    folder = saved(variant, path)
    staged, plain = (load_span(folder, 0, BLOCKS) for _ in range(2))
    staged.new_stage = lambda: Stage(CPU, torch.float32)
    if staged._fused is not None:
        staged._fused.on_device = steps = staged._fused.steps
        if graphs:
            steps.new_capture = lambda: lambda run: run
    return staged, plain


async def answers(span: Span, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Three tokens of sessions with these prompts, all of them in the same batches."""
    engine = Engine(span, FakeCompute(1.0), Rates(1.0, 1.0), clock=trio.current_time)
    pool, generator, found = span.new_arena(400), torch.Generator().manual_seed(1), []
    prompts = [torch.randn(1 + n % 2, length + 3, span.hidden_size, generator=generator)
               for n, length in enumerate(lengths)]  # fmt: skip
    caches = [pool.open(len(prompt), 64) for prompt in prompts]

    async def step(number: int, first: int, last: int) -> None:
        rows = prompts[number]
        contract = Contract(
            bytes([number]) * 16, *RUNS[number], len(rows), 64, span.hidden_size, "fp32", 2048
        )
        body, what = encode_hidden(rows[:, first:last], "fp32"), StepRange(first, last - first)
        answer = await engine.step(str(number), contract, caches[number], what, body, whole=True)
        found.append((number, first, decode_hidden(answer.body, contract)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        for number, length in enumerate(lengths):
            await step(number, 0, length)
        for token in range(3):
            async with trio.open_nursery() as together:
                for number, length in enumerate(lengths):
                    together.start_soon(step, number, length + token, length + token + 1)
        nursery.cancel_scope.cancel()
    return [hidden for _, _, hidden in sorted(found, key=lambda each: each[:2])]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
async def test_our_own_blocks(variant, graphs, tmp_path, autojump_clock):
    await check(variant, tmp_path, graphs=graphs)


@pytest.mark.parametrize("variant", ["gemma2", "bloom", "lfm2", "llama4_text", "gpt_oss"])
async def test_blocks_of_the_library(variant, tmp_path, autojump_clock):
    await check(variant, tmp_path, graphs=False)


async def check(variant: str, path: Path, *, graphs: bool) -> None:
    staged, plain = spans(variant, path, graphs)
    planned: list[int] = []
    plan = staged.planned

    def noted(*args, **how):
        planned.append(args[2])
        return plan(*args, **how)

    staged.planned = noted
    for got, expected in zip(
        await answers(staged, (9, 4, 20, 1)), await answers(plain, (9, 4, 20, 1)), strict=True
    ):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert set(planned) >= {0, 2, 3, 4, 5}, "each run of blocks"


def test_parts_of_any_sizes_arrive_as_they_were():
    stage = Stage(torch.device("meta"), torch.bfloat16)
    sizes = [(3, 5), (0,), (17,), (1, 1)]
    numbers = [stage.add(np.zeros(size, np.int64)) for size in sizes]
    more = stage.add_bytes(13, lambda content: content.zero_())
    hidden = stage.send(torch.zeros(4, 6))
    assert (hidden.shape, hidden.dtype, hidden.device.type) == ((4, 6), torch.bfloat16, "meta")
    assert [tuple(stage[number].shape) for number in numbers] == sizes
    assert {stage[number].dtype for number in numbers} == {torch.int64}
    assert stage[more].shape == (13,)


def test_values_of_a_stage_are_those_that_were_added():
    stage, generator = Stage(CPU, torch.float32), np.random.default_rng(1)
    arrays = [generator.integers(-(2**62), 2**62, size) for size in ((3, 5), (7,), (1, 2))]
    # as on a device: an array's bytes among others

    def added(array: NDArray[np.int64]) -> int:
        def write(content: torch.Tensor) -> None:
            content.view(torch.int64).numpy()[:] = array.ravel()

        return stage.add_bytes(array.nbytes, write)

    parts = [added(each) for each in arrays]
    hidden = torch.randn(2, 3)
    assert torch.equal(stage.send(hidden), hidden)
    for part, each in zip(parts, arrays, strict=True):
        assert (stage[part].view(torch.int64).numpy() == each.ravel()).all()
