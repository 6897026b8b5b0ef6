"""While a device computes, the engine reads what waits; and a time is that of computing, not of launching."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
import trio.lowlevel
from torch import Tensor

from node.serving.executor import engine as engine_module
from node.serving.executor.batcher import BatchPolicy
from node.serving.executor.engine import Answer, Engine
from node.serving.executor.rates import Rates
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import BadResult
from tensor_codec.messages.contract import Contract, StepRange
from tests.fakes_serving import HIDDEN, FakeCache, FakeCompute, FakeSpan, some_hidden, whole_model


class DeviceSpan(FakeSpan):
    """Its answers are on a device.  answer: the last one's values."""

    def decode(self, hidden: Tensor, *args: Any, **how: Any) -> Tensor:
        """See `FakeSpan.decode`."""
        self.answer = super().decode(hidden, *args, **how)
        return self.answer.to("meta")


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The number of steps whose bodies were read, each time."""
    found: list[int] = []
    read = engine_module._decoded

    def noted(steps: Any, settled: Any) -> Any:
        found.append(len(steps))
        return read(steps, settled)

    monkeypatch.setattr(engine_module, "_decoded", noted)
    return found


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch, looks: int, rows: int = 2) -> AsyncIterator[Engine]:
    """An engine over a device that is ready when it was looked at so many times."""
    span: Any = DeviceSpan(0, 4)

    class Slow:
        def __init__(self, there: Tensor) -> None:
            assert there.device.type == "meta"
            self.left, self.there = looks, span.answer

        @property
        def is_here(self) -> bool:
            self.left -= 1
            return self.left < 0

        def wait(self) -> Tensor:
            return self.there

    monkeypatch.setattr(engine_module, "Coming", Slow)
    policy = BatchPolicy(max_rows=rows)
    engine = Engine(span, FakeCompute(1.0), Rates(1.0, 1.0), clock=trio.current_time, policy=policy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


class One:
    """A session; its answer, or why there was none."""

    def __init__(self, engine: Engine, number: int, codec: str = "fp32") -> None:
        self.engine, self.name = engine, f"peer {number}"
        self.contract = Contract(bytes([number]) * 16, 0, 4, 1, 64, HIDDEN, codec, 2048)
        self.cache, self.hidden = FakeCache(1, 64), some_hidden(64, 1, number)
        self.answer: Answer | BadResult | None = None

    async def step(self) -> None:
        begin = self.cache.length
        body = encode_hidden(self.hidden[:, begin : begin + 1], self.contract.codec)
        what = StepRange(begin, 1, "all")
        try:
            self.answer = await self.engine.step(
                self.name, self.contract, self.cache, what, body, whole=False
            )
        except BadResult as bad:
            self.answer = bad

    def check(self) -> None:
        assert isinstance(self.answer, Answer)
        right = whole_model(self.hidden[:, : self.cache.length], 0, 4)[:, -1:]
        assert torch.equal(decode_hidden(self.answer.body, self.contract), right)


async def at_once(ones: list[One]) -> None:
    async with trio.open_nursery() as nursery:
        for one in ones:
            nursery.start_soon(one.step)


@pytest.mark.parametrize("looks", [0, 1, 9])
async def test_steps_that_wait_are_read_while_the_device_computes(looks, reads, monkeypatch, autojump_clock):
    async with running(monkeypatch, looks) as engine:
        ones = [One(engine, number) for number in range(1, 6)]
        for _ in range(3):
            del reads[:]
            await at_once(ones)
            for one in ones:
                one.check()
            assert reads == ([2, 3] if looks else [2, 2, 1]), "each body once"
            assert engine._ahead == {}


async def test_steps_of_several_codecs_that_were_read_or_not_share_a_batch(monkeypatch, autojump_clock):
    async with running(monkeypatch, 9, rows=3) as engine:
        ones = [One(engine, number, codec) for number, codec in enumerate(["fp32", "bf16"] * 3, 1)]
        read = engine_module._read_ahead
        monkeypatch.setattr(
            engine_module, "_read_ahead", lambda of, own: len(of._ahead) < 2 and read(of, [*own, 4])
        )
        for _ in range(3):
            await at_once(ones)
        for one in ones:
            assert isinstance(one.answer, Answer)
        for one in ones[::2]:
            one.check()


async def test_a_step_that_was_read_and_cancelled_leaves_nothing(monkeypatch, autojump_clock):
    async with running(monkeypatch, 9, rows=1) as engine:
        one, other = One(engine, 1), One(engine, 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.step)
            with trio.move_on_after(1.5):  # after the first batch, in the second one's turn
                await trio.lowlevel.checkpoint()
                await other.step()
        one.check()
        assert engine._ahead == {}
        await other.step()
        other.check()


async def test_a_step_that_was_read_and_is_no_number_is_refused_alone(monkeypatch, autojump_clock):
    async with running(monkeypatch, 9) as engine:
        ones = [One(engine, number) for number in range(1, 5)]
        ones[3].hidden[:] = float("inf")
        monkeypatch.setattr(
            f"{__name__}.encode_hidden",
            lambda hidden, codec: bytes(hidden.contiguous().view(torch.uint8).numpy().data),
        )
        await at_once(ones)
        for one in ones[:3]:
            one.check()
        assert isinstance(ones[3].answer, BadResult)


async def test_the_time_of_a_chunk_ends_when_the_device_has_computed_it(monkeypatch, autojump_clock):
    waited: list[str] = []
    monkeypatch.setattr(engine_module, "synchronize", lambda device: waited.append(str(device)))
    engine = Engine(FakeSpan(0, 4), FakeCompute(1.0), Rates(1.0, 1.0), clock=trio.current_time)
    contract, cache = Contract(bytes(16), 0, 4, 1, 1024, HIDDEN, "fp32", 2048), FakeCache(1, 1024)
    body = encode_hidden(some_hidden(600), "fp32")

    def work(span: Any) -> Any:
        yield
        yield
        return b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await engine.step("a", contract, cache, StepRange(0, 600, "last"), body, whole=False)
        assert waited == ["cpu", "cpu"], "the third one's answer was encoded"
        await engine.stateless("a", 1, 8, [(0, 1), (1, 2), (2, 4)], work)
        assert waited == ["cpu"] * 4
        nursery.cancel_scope.cancel()
