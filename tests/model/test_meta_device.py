"""The whole way of a step on a device that computes nothing: no mixed devices, few launches, no waiting.

Raceme's own engine and spans run with torch's meta device in place of a GPU, from the bytes of a message to
the bytes of its answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import trio
from torch import Tensor
from torch.nn import functional

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.sites import site_shapes
from node.model.blocks import span as span_module
from node.model.blocks.forward_backward import backward, backward_in_parts, finish, forward
from node.model.blocks.kv_pages import PagePool
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.weights import experts
from node.model.weights import quantize as quantize_module
from node.model.weights.quantize import PackedExperts, PackedLinear, Packing
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates, measure_decode
from tensor_codec.codecs import encode_hidden
from tensor_codec.messages.contract import Contract, StepRange
from tests.lora_fixtures import random_adapter
from tests.meta_device import DEVICE, Counted, MixedDevices
from tests.model_fixtures import FUSED, TINY, save_tiny

T = TypeVar("T")
COUNT = 3  # blocks
MOST_LAUNCHES = 10  # a block and decode step: nine kernels, and one for the last addition
ADAPTER_LAUNCHES = 56  # of an adapter: eight at each of the seven products of a block
AROUND = 4  # launches of a step outside of its blocks


def span_of(variant: str, path: Path, quantize: str = "none", count: int = COUNT) -> Span:
    """A span in bfloat16 on the meta device."""
    save_tiny(variant, path / "model")
    span = load_span(
        open_folder(path / "model", memo=HashMemo(path / "hashes.json")), 0, count, quantize=quantize
    )
    with of_bitsandbytes(span.model):
        model = span.model.to(torch.bfloat16).to(DEVICE)
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and layer.bias is not None:  # `.to` leaves all of it as it is
            layer.bias = torch.nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)
    with Counted():  # which answers what the library's blocks read on the host
        return Span(model, span.architecture, 0, count)


@contextmanager
def of_bitsandbytes(model: Any) -> Iterator[None]:
    """Weights of bitsandbytes move by another way than those of torch: the device is none of theirs."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    kept = {
        layer: layer._parameters.pop("weight")
        for layer in model.modules()
        if isinstance(layer, Linear4bit | Linear8bitLt)
    }
    yield
    for layer, weight in kept.items():
        there = weight.data.to(DEVICE)
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.bfloat16
            weight.quant_state.to(DEVICE)
            layer.weight = Params4bit(
                there, quant_state=weight.quant_state, quant_type="nf4", bnb_quantized=True, module=layer
            )
        else:
            layer.state.CB, layer.state.SCB = layer.state.CB.to(DEVICE), layer.state.SCB.to(DEVICE)
            layer.weight = Int8Params(there, requires_grad=False, has_fp16_weights=False)


class Counting:
    """A runner that counts each batch.  batches: those that computed something."""

    def __init__(self) -> None:
        self.batches: list[Counted] = []

    is_idle = False

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
@pytest.mark.parametrize("variant", FUSED)
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


@asynccontextmanager
async def four_bits(path: Path) -> AsyncIterator[tuple[Span, Sessions, Counting]]:
    span = span_of("llama", path, "nf4")
    linears = [layer for layer in span.model.modules() if type(layer).__name__ == "Linear4bit"]
    assert len(linears) == 7 * COUNT
    assert {layer.weight.quant_state.absmax.device for layer in linears} == {DEVICE}
    assert span.fused
    async with serving(span) as (sessions, compute):
        yield span, sessions, compute


async def test_four_bits_are_four_more_products_a_block_and_a_graph(tmp_path, autojump_clock):
    async with four_bits(tmp_path) as (span, sessions, compute):
        steps = [sessions.open(batch=batch) for batch in (1, 2)]
        for tokens, step in zip((20, 3), steps, strict=True):
            await step(tokens)
        await at_once(steps)
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert_nobody_waits(counted)
        assert compute.batches[-1].launched["gemm_4bit"] == 7 * COUNT
        assert compute.batches[-1].launches <= (MOST_LAUNCHES + 5) * COUNT + AROUND
        assert recorded(span, sessions.pool) == 9


async def test_llm_int8_waits_for_its_outliers_inside_our_own_blocks_and_without_graphs(
    tmp_path, autojump_clock, monkeypatch
):
    import bitsandbytes

    def product(a: Tensor, b: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        """Its own looks for outliers too, and has no shape on this device."""
        bool((a.abs() >= state.threshold).any())
        return functional.linear(a, state.CB.to(a.dtype), bias)

    monkeypatch.setattr(bitsandbytes, "matmul", product)
    monkeypatch.setattr(
        quantize_module, "packing_for", lambda *args, **how: Packing("llm_int8", torch.float32)
    )
    monkeypatch.setattr(span_module, "packing_for", quantize_module.packing_for)
    span = span_of("llama", tmp_path, "int8")
    assert span.fused
    async with serving(span) as (sessions, compute):
        step = sessions.open()
        await step(5)
        await step()
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert len(counted.waits) == 7 * COUNT
        assert compute.batches[-1].launched["paged_attention"] == COUNT
        assert recorded(span, sessions.pool) == 0


def recorded(span: Span, pool: PagePool) -> int:
    """Graphs that a device would record."""
    own, found = span._fused.steps, list[Tensor]()

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        found.append(run())
        return lambda: found[-1]

    own.new_capture = lambda: capture
    span.record(pool)
    return len(found)


async def test_a_prefills_chunk_is_one_copy_each_way(tmp_path, autojump_clock):
    async with serving(span_of("mistral", tmp_path)) as (sessions, compute):
        for batch in (1, 2):
            step = sessions.open(batch=batch)
            for tokens in (20, 33, 1, 7):
                await step(tokens)
            await trio.sleep(10)  # beside a session that decodes chunks would be short
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
        assert (counted.to_device, counted.to_host) == (1, 1)
        assert_nobody_waits(counted)
        del compute.batches[:]
        far = [sessions.open(0, 1), sessions.open(2, 3)]
        await at_once(far)
        assert (compute.batches[0].to_device, compute.batches[0].to_host) == (1, 1)
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
            most = MOST_LAUNCHES + ADAPTER_LAUNCHES * 2
            assert counted.launches <= most * COUNT + AROUND


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


EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v3"}  # int8 experts are layers of their own
MASKS = 2  # of full attention and of a window
MOST_LIBRARY_LAUNCHES = 140  # a block, and for each session where sessions are computed one after the other


# A step of the library's blocks: what it does to masks and experts is its own.
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("variant", sorted(set(TINY) - set(FUSED)))
async def test_a_step_of_the_librarys_blocks_is_one_copy_each_way_and_nobody_waits(
    variant, quantize, tmp_path, autojump_clock
):
    span = span_of(variant, tmp_path, quantize)
    assert not span.fused
    async with serving(span) as (sessions, compute):
        steps = [sessions.open(), sessions.open(batch=2), sessions.open(1, 3)]
        for tokens, step in zip((20, 3, 9), steps, strict=True):
            await step(tokens)
            await step(4)
        for _ in range(2):
            await at_once(steps)
        assert len(compute.batches) == 8
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert_nobody_waits(counted)
            turns = len(steps) if span.architecture.merge == "never" else 1
            assert counted.launches <= MOST_LIBRARY_LAUNCHES * COUNT * turns


async def test_angles_of_several_lengths_come_with_the_same_copy(tmp_path, autojump_clock, monkeypatch):
    name, settings = TINY["llama"]
    by_length = {
        "rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16,
    }  # fmt: skip
    monkeypatch.setitem(TINY, "by_length", (name, settings | {"rope_parameters": by_length}))
    span = span_of("by_length", tmp_path)
    assert not span.fused
    async with serving(span) as (sessions, compute):
        steps = [sessions.open(), sessions.open(batch=2), sessions.open(1, 3)]
        for tokens, step in zip((20, 3, 9), steps, strict=True):
            await step(tokens)
        await at_once(steps)
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1)
            assert_nobody_waits(counted)


@pytest.mark.parametrize("variant", sorted(EXPERTS))
async def test_many_rows_wait_once_for_the_choice_of_experts(variant, tmp_path, autojump_clock, monkeypatch):
    span = span_of(variant, tmp_path, "int8")
    monkeypatch.setattr(experts, "GATHERED_VALUES", 0)
    layers = sum(isinstance(layer, PackedExperts) for layer in span.model.modules())
    async with serving(span) as (sessions, compute):
        step = sessions.open()
        for tokens in (30, 1):
            await step(tokens)
        for counted in compute.batches:
            assert (counted.to_device, counted.to_host) == (1, 1 + layers)
            assert_nobody_waits(counted)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("variant", sorted(TINY))
def test_training_mixes_no_devices_and_waits_for_no_block(variant, quantize, tmp_path):
    span = span_of(variant, tmp_path, quantize)
    hidden, grad = (torch.randn(2, 9, span.hidden_size) for _ in range(2))
    prompts = torch.randn(1, 4, span.hidden_size)
    adapter = random_adapter(site_shapes(span), 1)
    with Counted() as counted:
        assert forward(span, hidden, 0, COUNT).device == DEVICE
        assert backward(span, hidden, grad, 0, COUNT).device == DEVICE
    sorted_once = sum(isinstance(layer, PackedExperts) for layer in span.model.modules())  # with gradients
    assert (counted.to_device, counted.to_host) == (3, sorted_once)
    # Once in each of the two passes the library reads whether rows are packed, for each kind of mask.
    assert len(counted.waits) <= 2 * MASKS
    with Counted() as counted:  # prompts and adapters join each block alike: one shows it
        answer = finish(backward_in_parts(span, hidden, grad, 0, 1, prompts))
        assert answer.prompts is not None
        if adapter.blocks[0]:
            finish(backward_in_parts(AdaptedSpan(span, adapter, trains=True), hidden, grad, 0, 1))
    assert counted.launches > 0


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
