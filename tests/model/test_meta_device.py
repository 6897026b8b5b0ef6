"""The whole way of a step on a device that computes nothing: no mixed devices, few launches, no waiting.

Raceme's own engine and spans run with torch's meta device in place of a GPU, from the bytes of a message to
the bytes of its answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import trio
from torch import Tensor

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.sites import site_shapes
from node.model.blocks.forward_backward import backward, backward_in_parts, finish, forward
from node.model.blocks.kv_pages import PagePool
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.weights.quantize import PackedLinear
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates, measure_decode
from tensor_codec.codecs import encode_hidden
from tensor_codec.messages.contract import Contract, StepRange
from tests.lora_fixtures import random_adapter
from tests.meta_device import DEVICE, Counted, MixedDevices
from tests.model_fixtures import TINY, save_tiny

T = TypeVar("T")
COUNT = 3  # blocks
MOST_LAUNCHES = 10  # a block and decode step: nine kernels, and one for the last addition
AROUND = 4  # launches of a step outside of its blocks


def span_of(variant: str, path: Path, quantize: str = "none", count: int = COUNT) -> Span:
    """A span in bfloat16 on the meta device."""
    save_tiny(variant, path / "model")
    span = load_span(
        open_folder(path / "model", memo=HashMemo(path / "hashes.json")), 0, count, quantize=quantize
    )
    model = span.model.to(torch.bfloat16).to(DEVICE)
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and layer.bias is not None:  # `.to` leaves all of it as it is
            layer.bias = torch.nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)
    return Span(model, span.architecture, 0, count)


class Counting:
    """A runner that counts each batch.  batches: those that computed something."""

    def __init__(self) -> None:
        self.batches: list[Counted] = []

    async def run(self, function: Callable[..., T], *args: object) -> T:
        with Counted() as counted:
            answer = function(*args)
        if counted.launches or counted.to_host:
            self.batches.append(counted)
        await trio.sleep(1)
        return answer


class Sessions:
    """Sessions at an engine over a span."""

    def __init__(self, engine: Engine, pool: PagePool) -> None:
        self.engine, self.pool, self.count = engine, pool, 0

    def open(
        self, start: int = 0, stop: int = COUNT, *, codec: str = "bf16", batch: int = 1,
        adapter: SpanAdapter | None = None,
    ) -> Callable[..., Awaitable[None]]:  # fmt: skip
        self.count += 1
        peer = f"peer {self.count}"
        hidden = self.engine.span.hidden_size
        contract = Contract(bytes([self.count]) * 16, start, stop, batch, 128, hidden, codec, 2048)
        cache = self.pool.open(batch, 128)

        async def step(tokens: int = 1) -> None:
            body = encode_hidden(torch.randn(batch, tokens, hidden), codec)
            answer = await self.engine.step(
                peer, contract, cache, StepRange(cache.length, tokens), body, whole=False, adapter=adapter
            )
            assert len(answer.body) == len(body)

        return step


@asynccontextmanager
async def serving(span: Span) -> AsyncIterator[tuple[Sessions, Counting]]:
    compute = Counting()
    engine = Engine(span, compute, Rates(1.0, 1.0), clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield Sessions(engine, span.new_arena(1024)), compute
        nursery.cancel_scope.cancel()


async def at_once(steps) -> None:
    async with trio.open_nursery() as nursery:
        for step in steps:
            nursery.start_soon(step)


def assert_nobody_waits(counted: Counted) -> None:
    assert counted.waits == []
    assert counted.pageable == 0, "a copy that the host waits for"


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
async def test_a_decode_step_is_ten_launches_a_block_and_one_copy_each_way(
    variant, quantize, tmp_path, autojump_clock
):
    span = span_of(variant, tmp_path, quantize)
    assert span.fused
    async with serving(span) as (sessions, compute):
        steps = [
            sessions.open(codec=codec, batch=batch)
            for codec, batch in (("bf16", 1), ("fp32", 2), ("bf16", 1))
        ]
        for tokens, step in zip((20, 3, 33), steps, strict=True):
            await step(tokens)
        del compute.batches[:]
        for _ in range(3):
            await at_once(steps)
        assert len(compute.batches) == 3
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert_nobody_waits(counted)
            assert counted.launches <= MOST_LAUNCHES * COUNT + AROUND
            assert counted.launched["paged_attention"] == COUNT


async def test_a_prefills_chunk_is_one_copy_each_way(tmp_path, autojump_clock):
    async with serving(span_of("mistral", tmp_path)) as (sessions, compute):
        for batch in (1, 2):
            step = sessions.open(batch=batch)
            for tokens in (20, 33, 1, 7):
                await step(tokens)
        assert len(compute.batches) == 8
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert_nobody_waits(counted)


async def test_sessions_that_begin_and_end_at_any_blocks_share_a_batch(tmp_path, autojump_clock):
    async with serving(span_of("llama", tmp_path)) as (sessions, compute):
        steps = [
            sessions.open(*blocks, codec=codec)
            for blocks, codec in (((0, 3), "bf16"), ((1, 3), "fp32"), ((2, 3), "fp32"), ((0, 1), "bf16"))
        ]
        for tokens, step in zip((5, 1, 9, 2), steps, strict=True):
            await step(tokens)
        del compute.batches[:]
        await at_once(steps)
        (counted,) = compute.batches
        assert counted.to_host == 1
        # For each of the three runs of blocks the rows' numbers, and for two of them rows that begin there.
        assert counted.to_device <= 5
        assert_nobody_waits(counted)
        del compute.batches[:]
        far = [sessions.open(0, 1), sessions.open(2, 3)]
        await at_once(far)
        assert_nobody_waits(compute.batches[0])


async def test_an_adapter_is_brought_to_the_device_once(tmp_path, autojump_clock):
    span = span_of("llama", tmp_path)
    shapes = site_shapes(span)
    one, two = random_adapter(shapes, 1), random_adapter(shapes, 2)
    async with serving(span) as (sessions, compute):
        steps = [sessions.open(adapter=adapter) for adapter in (one, None, two, one)]
        for step in steps:
            await step(4)
            await step(4)
        del compute.batches[:]
        for _ in range(2):
            await at_once(steps)
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert_nobody_waits(counted)


async def test_a_step_that_is_a_graph_launches_nothing_else(tmp_path, autojump_clock):
    span = span_of("llama", tmp_path)
    own = span._fused.steps

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        answer = run()
        return lambda: answer

    own.new_capture = lambda: capture
    async with serving(span) as (sessions, compute):
        span.record(sessions.pool)
        steps = [sessions.open() for _ in range(3)]
        for step in steps:
            await step(5)
        del compute.batches[:]
        await at_once(steps)
        (counted,) = compute.batches
        assert (counted.to_device, counted.to_host, counted.launches) == (1, 1, 1), "the answer's own place"
        assert_nobody_waits(counted)


def test_what_is_measured_is_what_is_served(tmp_path):
    span = span_of("llama", tmp_path)
    with Counted() as counted:
        measure_decode(span, 0.0)
    steps, rest = divmod(counted.launched["paged_attention"], COUNT)
    assert (steps >= 2, rest) == (True, 0)
    assert_nobody_waits(counted)


# A step of the library's blocks: what it does to masks is its own, so launches are not bounded.
UNUSUAL = {"mixtral", "qwen3_moe", "gpt_oss"}  # they read on the host which experts are chosen


@pytest.mark.parametrize(
    "variant", sorted(set(TINY) - {"llama", "mistral", "qwen2", "qwen3", "smollm3"} - UNUSUAL)
)
async def test_blocks_of_the_library_mix_no_devices(variant, tmp_path, autojump_clock):
    span = span_of(variant, tmp_path)
    async with serving(span) as (sessions, compute):
        steps = [sessions.open(), sessions.open(batch=2), sessions.open(1, 3)]
        for tokens, step in zip((20, 3, 9), steps, strict=True):
            await step(tokens)
            await step(4)
        del compute.batches[:]
        for _ in range(2):
            await at_once(steps)
        for counted in compute.batches:
            assert counted.pageable == 0
            assert counted.to_host == 1


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2"])
def test_training_mixes_no_devices(variant, quantize, tmp_path):
    span = span_of(variant, tmp_path, quantize)
    hidden, grad = (torch.randn(2, 9, span.hidden_size) for _ in range(2))
    prompts = torch.randn(COUNT, 4, span.hidden_size)
    adapter = random_adapter(site_shapes(span), 1)
    with Counted() as counted:
        assert forward(span, hidden, 0, COUNT, prompts).device == DEVICE
        assert backward(span, hidden, grad, 0, COUNT).device == DEVICE
        answer = finish(backward_in_parts(span, hidden, grad, 0, COUNT, prompts))
        assert answer.prompts is not None
        learning = AdaptedSpan(span, adapter, trains=True)
        finish(backward_in_parts(learning, hidden, grad, 0, COUNT))
    assert counted.launches > 0  # the library reads on the host whether rows are packed: it waits


def test_the_device_refuses_what_cuda_refuses():
    with Counted() as counted:
        with pytest.raises(MixedDevices):
            torch.cat([torch.empty(2, device=DEVICE), torch.empty(2)])
        here = torch.ones(2, device=DEVICE)
        assert (here + 1).to("cpu").tolist() == [0.0, 0.0]
        bool(here[0])
        torch.ones(2).to(DEVICE)
        torch.ones(2).to(DEVICE, non_blocking=True)
    assert (counted.to_device, counted.to_host, counted.pageable) == (2, 1, 1)
    assert len(counted.waits) == 1
