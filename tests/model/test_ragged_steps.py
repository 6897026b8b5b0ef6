"""Steps of several tokens in decode batches: the bits that each token has alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import trio
from torch import Tensor

from benchmarks.compute import ragged
from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.sites import site_shapes
from node.model.blocks.device.staging import Stage
from node.model.blocks.kv_pages import SpanCache
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import ModelFolder
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import LocalProtocolError
from tensor_codec.messages.contract import Contract, StepRange
from tests.fakes_serving import FakeCompute
from tests.lora_fixtures import random_adapter
from tests.model_fixtures import BLOCKS, FUSED, assert_close, saved

torch.set_num_threads(1)

LENGTHS = (5, 30, 1, 16, 14)
TOKENS = (4, 1, 16, 3, 5)  # of each session's step: some reach into another page
BATCHES = (1, 1, 1, 2, 1)


@pytest.fixture(scope="module", params=FUSED)
def folder(request, tmp_path_factory) -> ModelFolder:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


class Steps:
    """A step of each of these sessions, behind their prompts."""

    def __init__(self, span: Span, owners: Sequence[SpanAdapter | None]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.span, self.owners = span, owners
        self.pool = span.new_arena(1000)
        self.prompts, self.steps = (
            [
                torch.randn(batch, tokens, span.hidden_size, generator=generator)
                for batch, tokens in zip(BATCHES, counts, strict=True)
            ]
            for counts in (LENGTHS, TOKENS)
        )

    def opened(self) -> list[SpanCache]:
        caches = []
        for prompt, owner in zip(self.prompts, self.owners, strict=True):
            caches.append(cache := self.pool.open(len(prompt), 64))
            self.span.forward(prompt, cache, 0, adapter=owner)
        return caches

    def together(self) -> list[Tensor]:
        """The answers of one batch, each [batch, tokens, hidden_size]."""
        caches = self.opened()
        for cache, tokens in zip(caches, TOKENS, strict=True):
            cache.reserve(cache.length + tokens)
        rows = torch.cat([step.flatten(0, 1) for step in self.steps])
        found = self.span.decode(rows, caches, 0, BLOCKS, adapters=self.owners, tokens=TOKENS)
        sizes = [batch * tokens for batch, tokens in zip(BATCHES, TOKENS, strict=True)]
        return [
            part.view(step.shape) for part, step in zip(torch.split(found, sizes), self.steps, strict=True)
        ]

    def one_by_one(self) -> list[Tensor]:
        """The same, each token in a batch of its own."""
        found = []
        for cache, step, owner in zip(self.opened(), self.steps, self.owners, strict=True):
            answers = []
            for token in step.unbind(1):
                cache.reserve(cache.length + 1)
                answers.append(self.span.decode(token, [cache], 0, BLOCKS, adapters=[owner]))
                cache.length += 1
            found.append(torch.stack(answers, 1))
        return found


def owners_of(span: Span) -> tuple[SpanAdapter | None, ...]:
    one, two = (random_adapter(site_shapes(span), seed, rank=3 + seed) for seed in (1, 2))
    return (None, one, one, two, None)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_token_has_the_same_bits_alone_with_others_of_its_session_and_in_a_batch(
    folder, quantize, adapters
):
    span = load_span(folder, 0, BLOCKS, quantize=quantize)
    steps = Steps(span, owners_of(span) if adapters else (None,) * len(TOKENS))
    for got, expected in zip(steps.together(), steps.one_by_one(), strict=True):
        assert torch.equal(got, expected)


def test_torchs_own_operations_take_several_tokens_too(folder, monkeypatch):
    span = load_span(folder, 0, BLOCKS)
    steps = Steps(span, (None,) * len(TOKENS))
    expected = steps.one_by_one()
    monkeypatch.setattr(type(span._fused), "_compiled", lambda self, hidden: False)
    for got, each in zip(steps.together(), expected, strict=True):
        assert_close(got, each)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_device_takes_several_tokens_too(folder, graphs):
    ours, theirs = (load_span(folder, 0, BLOCKS) for _ in range(2))
    assert ours._fused is not None
    ours._fused.on_device = ours._fused.steps
    if graphs:
        ours._fused.steps.new_capture = lambda: lambda run: run
    expected = Steps(theirs, (None,) * len(TOKENS)).one_by_one()
    for got, each in zip(Steps(ours, (None,) * len(TOKENS)).together(), expected, strict=True):
        assert_close(got, each)


def test_the_librarys_blocks_do_not_take_several_tokens_and_say_so(tmp_path):
    span = load_span(saved("gemma2", tmp_path), 0, 2)
    cache = span.new_cache(1, 8)
    cache.reserve(2)
    assert not span.fused
    with pytest.raises(LocalProtocolError, match="several positions"):
        span.decode(torch.zeros(2, span.hidden_size), [cache], 0, 2, tokens=[2])


RUNS = ((0, BLOCKS), (2, BLOCKS), (0, 3))
# Of each session: the tokens of its steps, and how many of them are taken back before the next one.
DRAFTS = (
    ((3, 1), (4, 3), (16, 9), (1, 0)),
    ((1, 0), (1, 0), (1, 0), (1, 0)),
    ((2, 2), (5, 0), (3, 1), (2, 1)),
)


class Sessions:
    """Sessions at one engine that send these drafts, and take some tokens of each back."""

    def __init__(self, span: Span) -> None:
        self.engine = Engine(span, FakeCompute(1.0), Rates(1.0, 1.0), clock=trio.current_time)
        pool, generator = span.new_arena(400), torch.Generator().manual_seed(1)
        self.hidden = [torch.randn(1, 64, span.hidden_size, generator=generator) for _ in RUNS]
        self.caches = [pool.open(1, 64) for _ in RUNS]
        self.contracts = [
            Contract(bytes([number]) * 16, *run, 1, 64, span.hidden_size, "fp32", 2048)
            for number, run in enumerate(RUNS)
        ]
        self.answers: dict[int, list[Tensor]] = {number: [] for number in range(len(RUNS))}

    async def step(self, number: int, tokens: int, taken_back: int) -> None:
        """Another draft is another token: its hidden states follow from the round."""
        first, answers = self.caches[number].length, self.answers[number]
        given = self.hidden[number][:, first : first + tokens] + len(answers)
        answer = await self.engine.step(
            str(number), self.contracts[number], self.caches[number],
            StepRange(first, tokens), encode_hidden(given, "fp32"), whole=True,
        )  # fmt: skip
        answers.append(decode_hidden(answer.body, self.contracts[number]))
        self.caches[number].cut(first + tokens - taken_back)

    async def run(self, *, together: bool) -> list[Tensor]:
        """All answers, of all sessions' steps at once or one after the other."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.engine.run)
            for number in range(len(RUNS)):
                await self.step(number, 7 + number, 0)
            for drafts in zip(*DRAFTS, strict=True):
                async with trio.open_nursery() as at_once:
                    for number, draft in enumerate(drafts):
                        if together:
                            at_once.start_soon(self.step, number, *draft)
                        else:
                            await self.step(number, *draft)
            nursery.cancel_scope.cancel()
        return [answer for number in range(len(RUNS)) for answer in self.answers[number]]


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
async def test_drafts_that_are_taken_back_change_nothing_beside_others(
    variant: str, tmp_path: Path, autojump_clock: trio.testing.MockClock
):
    folder = saved(variant, tmp_path)
    beside, alone, staged = (load_span(folder, 0, BLOCKS) for _ in range(3))
    staged.new_stage = lambda: Stage(torch.device("cpu"), torch.float32)
    if staged._fused is not None:
        staged._fused.on_device = staged._fused.steps
    expected = await Sessions(alone).run(together=False)
    for got, each in zip(await Sessions(beside).run(together=True), expected, strict=True):
        if beside.fused:
            assert torch.equal(got, each)
        else:
            assert_close(got, each)
    for got, each in zip(await Sessions(staged).run(together=True), expected, strict=True):
        assert_close(got, each)


def test_the_benchmark_times_each_batch_in_one_and_apart(tmp_path: Path):
    folder, file = saved("llama", tmp_path), tmp_path / "rows.json"
    words = ["--model", str(folder.path), "--quantize", "none", "--context", "20", "--rounds", "1"]
    assert ragged.main([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["tokens"] for row in rows[: len(ragged.ALONE)]] == [[count] for count in ragged.ALONE]
    assert [tuple(row["tokens"]) for row in rows[len(ragged.ALONE) :]] == list(ragged.BATCHES)
    assert all(row["ms"] > 0 and row["apart_ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1.0
