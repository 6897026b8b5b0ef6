"""Steps of a few tokens at the engine: they share decode batches, answer as asked, and count by rows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from node.monitor.metrics.meters import BatchMeters, ServingMeters
from node.serving.executor.batcher import BatchPolicy
from node.serving.executor.engine import Answer, Engine, Packing
from node.serving.executor.rates import Rates
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import BadResult, CacheFull
from tensor_codec.messages.contract import Contract, StepRange
from tests.fakes_serving import HIDDEN, FakeCache, FakeCompute, FakeSpan, some_hidden, whole_model

FEW = BatchPolicy().decode_tokens
Given = Answer | BadResult | CacheFull


class One:
    """A session of blocks [start, 4), with a prompt of 3 tokens in its cache."""

    def __init__(
        self,
        engine: Engine,
        number: int,
        *,
        start: int = 0,
        batch: int = 1,
        length: int = 3,
        codec: str = "fp32",
    ) -> None:
        self.engine, self.name = engine, f"peer {number}"
        self.contract = Contract(bytes([number]) * 16, start, 4, batch, 64, HIDDEN, codec, 2048)
        self.cache, self.hidden = FakeCache(batch, 64), some_hidden(64, batch, number)
        self.packing = Packing()
        if length:
            FakeSpan(0, 4).forward(self.hidden[:, :length], self.cache, 0, start, 4)

    async def step(self, tokens: int = 1, reply: Any = "all", **how: Any) -> Answer:
        """The next tokens."""
        begin = self.cache.length
        body = encode_hidden(self.hidden[:, begin : begin + tokens], self.contract.codec)
        return await self.engine.step(
            self.name, self.contract, self.cache, StepRange(begin, tokens, reply), body,
            whole=False, packing=self.packing, **how,
        )  # fmt: skip

    def check(self, answer: Given, positions: int) -> None:
        """The answer is that to the last positions of everything so far."""
        assert isinstance(answer, Answer)
        right = whole_model(self.hidden[:, : self.cache.length], self.contract.start, 4)
        expected = right[:, self.cache.length - positions :]
        assert torch.equal(decode_hidden(answer.body, self.contract), expected)


@asynccontextmanager
async def running(span: FakeSpan | None = None, **how: Any) -> AsyncIterator[Engine]:
    """An engine whose batches take a second each."""
    how = {"clock": trio.current_time} | how
    engine = Engine(span or FakeSpan(0, 4), FakeCompute(1.0), Rates(1.0, 1.0), **how)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


async def at_once(
    ones: list[One], tokens: list[int], reply: str = "all", **how: Any
) -> tuple[list[Given], float]:
    """Their steps' answers, and the seconds that all of them took."""
    answers: dict[int, Given] = {}
    began = trio.current_time()

    async def step(index: int) -> None:
        try:
            answers[index] = await ones[index].step(tokens[index], reply, **how)
        except (BadResult, CacheFull) as error:
            answers[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(ones)):
            nursery.start_soon(step, index)
    return [answers[index] for index in range(len(ones))], trio.current_time() - began


@pytest.mark.parametrize(("reply", "positions"), [("all", None), ("last", 1), ("none", 0)])
async def test_steps_of_several_tokens_share_a_batch_with_single_ones_and_answer_what_is_asked(
    reply, positions, autojump_clock
):
    async with running() as engine:
        ones = [One(engine, 1), One(engine, 2, start=2), One(engine, 3, batch=3), One(engine, 4, start=1)]
        for _ in range(2):
            tokens = [1, FEW, 5, 2]
            answers, seconds = await at_once(ones, tokens, reply)
            assert seconds == 1.0
            for one, answer, count in zip(ones, answers, tokens, strict=True):
                if positions == 0:
                    assert isinstance(answer, Answer)
                    assert bytes(answer.body) == b""
                else:
                    one.check(answer, positions or count)


async def test_after_drafts_were_taken_back_the_next_ones_are_computed_from_there(autojump_clock):
    async with running() as engine:
        ones = [One(engine, 1), One(engine, 2)]
        for taken_back in (3, 0, 4, 1):
            answers, _ = await at_once(ones, [4, 1])
            ones[0].check(answers[0], 4)
            ones[1].check(answers[1], 1)
            ones[0].cache.cut(ones[0].cache.length - taken_back)
            ones[0].hidden[:, ones[0].cache.length :] += 1  # other drafts come in their place


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("a prompt", {"length": 0}),
        ("a chunk", {"tokens": FEW + 1}),
        ("more rows than a batch has", {"batch": 13, "tokens": 5}),
        ("deep prompts", {"prompts": torch.zeros(4, 1, HIDDEN)}),
        ("a span that takes one position each", {"fused": False}),
    ],
)
async def test_what_is_no_decode_step_runs_alone_as_before(what, first, autojump_clock):
    span = FakeSpan(0, 4)
    span.fused = first.get("fused", True)
    prompts = {"prompts": first["prompts"]} if "prompts" in first else {}
    async with running(span) as engine:
        other = One(engine, 1)
        one = One(engine, 2, batch=first.get("batch", 1), length=first.get("length", 3))
        tokens = first.get("tokens", 4)

        async def both() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other.step)
                answer = await one.step(tokens, **prompts)
                one.check(answer, tokens)

        began = trio.current_time()
        await both()
        assert trio.current_time() - began >= 2.0
        assert len(span.batches) == 1, "that of the other one"


async def test_a_token_that_is_no_number_fails_its_own_step_alone(autojump_clock):
    async with running() as engine:
        ones = [One(engine, number) for number in range(1, 4)]
        body = bytearray(encode_hidden(ones[1].hidden[:, 3:7], "fp32"))
        body[2 * HIDDEN * 4 :][:4] = b"\x00\x00\xc0\x7f"
        whole = ones[1].hidden[0, 3:7].clone()
        ones[1].hidden[0, 5, 0] = float("inf")  # the third of its four
        answers: list[Given] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                f"{__name__}.encode_hidden",
                lambda hidden, codec: bytes(hidden.contiguous().view(torch.uint8).numpy().data),
            )
            answers, _ = await at_once(ones, [2, 4, 3])
        ones[0].check(answers[0], 2)
        assert isinstance(answers[1], BadResult)
        ones[2].check(answers[2], 3)
        assert ones[1].cache.length == 3
        ones[1].hidden[0, 3:7] = whole
        ones[1].check(await ones[1].step(4), 4)


async def test_drafts_that_come_or_go_on_in_int8o_share_the_batch(autojump_clock):
    async with running() as engine:
        ones = [One(engine, 1), One(engine, 2)]
        ones[0].packing = Packing(onward=True)
        answers, seconds = await at_once(ones, [4, 2])
        assert seconds == 1.0
        ones[1].check(answers[1], 2)
        assert isinstance(answers[0], Answer)
        assert answers[0].packed is not None
        packed = decode_hidden(bytearray(answers[0].packed), ones[0].contract, packed=True)
        assert torch.equal(packed, decode_hidden(answers[0].body, ones[0].contract))


class TightSpan(FakeSpan):
    """It finds memory for no more than these rows.  passes: the rows of each attempt."""

    device, dtype = torch.device("cpu"), torch.float32
    most = 1000

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.passes: list[int] = []

    def decode(self, hidden: Tensor, *args: Any, **how: Any) -> Tensor:
        """See `FakeSpan.decode`."""
        self.passes.append(len(hidden))
        if len(hidden) > self.most:
            raise torch.OutOfMemoryError
        return super().decode(hidden, *args, **how)


async def test_where_memory_ends_steps_of_several_tokens_run_in_smaller_batches_and_are_never_split(
    autojump_clock,
):
    span = TightSpan(0, 4)
    async with running(span) as engine:
        ones = [One(engine, number, batch=1 + number % 2) for number in range(1, 6)]
        tokens = [1, 4, 2, 7, 1]  # rows: 2, 4, 4, 7, 2
        span.most = 6
        answers, _ = await at_once(ones, tokens)
        assert span.passes[0] == 19
        for index in (0, 1, 2, 4):
            ones[index].check(answers[index], tokens[index])
        assert isinstance(answers[3], CacheFull)
        assert ones[3].cache.length == 3
        span.most = 1000
        ones[3].check(await ones[3].step(7), 7)


class SlowSpan(FakeSpan):
    """A batch takes 8 seconds.  spent: by all of them."""

    spent = 0.0

    def decode(self, *args: Any, **how: Any) -> Tensor:
        """See `FakeSpan.decode`."""
        self.spent += 8.0
        return super().decode(*args, **how)


async def test_a_step_of_several_tokens_says_nothing_about_the_time_of_a_single_one(autojump_clock):
    meters, span = BatchMeters(), SlowSpan(0, 4)
    async with running(span, clock=lambda: span.spent, meters=ServingMeters(batches=meters)) as engine:
        one = One(engine, 1)
        for _ in range(3):
            await one.step(4)
        assert engine.rates.alone == 1.0, "of a block: 8 s for four of them"
        assert engine.rates.decode_seconds_per_block > 1.0, "what the next session sees beside it"
        assert engine.rates.prefill_seconds_per_block_token == 1.0
        assert engine.batcher.costs.single == pytest.approx(1.0)
        await one.step()
        assert engine.rates.alone > 1.0
        assert engine.batcher.costs.single > 1.1
    assert (meters.rows["decode"].count, meters.rows["decode"].total) == (4, 13)
    assert meters.rows["prefill"].count == 0
