"""Memory that ends in the middle of a batch: those concerned are refused, others answered, the node lives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from node import devices
from node.serving.executor import engine as engine_module
from node.serving.executor.engine import Answer, Engine
from node.serving.executor.out_of_memory import LEAST_TOKENS, OutOfMemory, or_refused
from node.serving.executor.rates import Rates
from node.serving.forward_backward import ForwardBackwardListener
from node.serving.span_admission import SpanAdmission
from node.serving.training.tapes import TapeBudget, Tapes
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import CacheFull, Refused, TooManyStreams
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract, StepRange
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import (
    COMPUTE_PROTOCOL,
    Backward,
    Forward,
    Output,
    Run,
    decode_output,
    encode_request,
)
from tensor_codec.span_spec import SpanSpec
from tests.fakes_forward_backward import ToySpan, blocks_on, whole_numbers
from tests.fakes_serving import (
    HIDDEN,
    FakeCache,
    FakeCompute,
    FakeSpan,
    continued,
    conversation_of,
    generated,
    some_hidden,
    stream_pair,
    swarm,
    whole_model,
)

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


class TightSpan(FakeSpan):
    """A span that may find no memory.  full: whether it does, by rows and tokens.  passes: computed sizes."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.full: Callable[[Tensor], bool] = lambda hidden: False
        self.error: BaseException = ERRORS[0]
        self.passes: list[tuple[int, ...]] = []
        self.toy = ToySpan(start, stop)

    def _check(self, hidden: Tensor) -> None:
        self.passes.append(tuple(hidden.shape[:-1]))
        if self.full(hidden):
            raise self.error

    def forward(self, hidden: Tensor, *args: Any, **how: Any) -> Tensor:
        """See `FakeSpan.forward`."""
        if hidden.shape[1] > 1:  # decode goes through here too
            self._check(hidden)
        return super().forward(hidden, *args, **how)

    def decode(self, hidden: Tensor, *args: Any, **how: Any) -> Tensor:
        """See `FakeSpan.decode`."""
        self._check(hidden)
        return super().decode(hidden, *args, **how)

    def _view(self, start: int, stop: int) -> Any:
        model, entry = self.toy._view(start, stop)

        def checked(**given: Any) -> Any:
            self._check(given["inputs_embeds"])
            return model(**given)

        return checked, entry


class One:
    """A session at the engine.  seed: of its hidden states, which are all `seed` where `equal`."""

    def __init__(self, engine: Engine, name: str, seed: int, *, batch: int = 1) -> None:
        self.engine, self.name = engine, name
        self.contract = Contract(bytes([seed]) * 16, 0, 4, batch, 1024, HIDDEN, "fp32", 2048)
        self.cache = FakeCache(batch, 1024)
        self.hidden = some_hidden(1024, batch, seed)
        self.answers: list[Answer | Refused] = []

    async def step(self, tokens: int = 1) -> None:
        """Ask for the next positions, and keep the answer or the refusal."""
        begin = self.cache.length
        body = encode_hidden(self.hidden[:, begin : begin + tokens], "fp32")
        what = StepRange(begin, tokens, "all")
        try:
            answer = await self.engine.step(self.name, self.contract, self.cache, what, body, whole=False)
        except Refused as refusal:
            self.answers.append(refusal)
        else:
            self.answers.append(answer)

    @property
    def refusals(self) -> list[Refused]:
        """So far."""
        return [each for each in self.answers if isinstance(each, Refused)]

    def check(self) -> None:
        """The last answer is what the blocks make of everything so far."""
        answer, length = self.answers[-1], self.cache.length
        assert isinstance(answer, Answer), answer
        got = decode_hidden(answer.body, self.contract)
        right = whole_model(self.hidden[:, :length], 0, 4)
        assert torch.equal(got, right[:, length - got.shape[1] :])


@asynccontextmanager
async def running(**how: Any) -> Any:
    """(engine, span); each batch takes a second."""
    span: Any = TightSpan(0, 4)  # its parts would be plain ones, and nobody asks for any
    engine = Engine(span, FakeCompute(1.0), Rates(1.0, 1.0), clock=trio.current_time, **how)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield engine, span
        nursery.cancel_scope.cancel()


async def together(ones: list[One], tokens: int = 1) -> None:
    async with trio.open_nursery() as nursery:
        for one in ones:
            nursery.start_soon(one.step, tokens)


async def test_a_batch_without_memory_runs_in_smaller_ones_and_every_session_is_answered(autojump_clock):
    async with running() as (engine, span):
        ones = [One(engine, f"peer {index}", index, batch=1 + index % 2) for index in range(10)]
        await together(ones)
        span.full = lambda hidden: hidden.shape[0] > 3
        span.passes.clear()
        await together(ones)
        for one in ones:
            one.check()
        sizes = [rows for (rows,) in span.passes]
        assert sizes[0] == 15
        assert sum(size for size in sizes if size <= 3) == 15  # each row once


@pytest.mark.parametrize("error", ERRORS, ids=str)
async def test_a_step_that_finds_no_memory_alone_is_refused_and_its_session_goes_on(error, autojump_clock):
    async with running() as (engine, span):
        ones = [One(engine, f"peer {index}", index) for index in range(5)]
        await together(ones)
        unlucky = ones[3].hidden[0, 1]
        span.error, span.full = error, lambda hidden: bool((hidden == unlucky).all(-1).any())
        await together(ones)
        for one in ones:
            if one is not ones[3]:
                one.check()
        (refusal,) = ones[3].refusals
        assert isinstance(refusal, CacheFull)
        assert refusal.retry_after_seconds == Limits().memory_retry_seconds
        assert "memory" in str(refusal)
        assert ones[3].cache.length == 1
        span.full = lambda hidden: False
        await ones[3].step()
        ones[3].check()


async def test_a_chunk_without_memory_is_computed_in_smaller_ones(autojump_clock):
    async with running() as (engine, span):
        one = One(engine, "a", 1)
        span.full = lambda hidden: hidden.shape[-2] > 50
        await one.step(300)
        one.check()
        assert max(tokens for _, tokens in span.passes) == 256
        done = [tokens for _, tokens in span.passes if tokens <= 50]
        assert sum(done) == 300


async def test_a_prefill_that_finds_no_memory_at_all_is_refused_and_comes_again(autojump_clock):
    async with running() as (engine, span):
        one, other = One(engine, "a", 1), One(engine, "b", 2)
        span.full = lambda hidden: hidden.ndim == 3 and hidden.shape[1] > 1
        await together([one], 300)
        assert isinstance(one.answers[0], CacheFull)
        assert min(tokens for _, tokens in span.passes) >= LEAST_TOKENS // 2
        assert engine.batcher.waiting == 0
        await other.step()
        other.check()
        span.full = lambda hidden: False
        one.cache.cut(0)  # as the session does before the step comes again
        await one.step(300)
        one.check()


async def test_a_session_that_cannot_go_back_ends_and_nothing_is_computed_twice(autojump_clock):
    async with running() as (engine, span):
        span.can_cut = span.repeats = False
        ones = [One(engine, f"peer {index}", index) for index in range(4)]
        await together(ones)
        span.passes.clear()
        span.full = lambda hidden: True
        await together(ones)
        assert span.passes == [(4,)]
        for one in ones:
            (refusal,) = one.refusals
            assert refusal.code == "too_many"


async def test_a_session_that_cannot_go_back_goes_on_where_its_step_can_be_repeated(autojump_clock):
    async with running() as (engine, span):
        span.can_cut = False
        ones = [One(engine, f"peer {index}", index) for index in range(5)]
        await together(ones)
        span.full = lambda hidden: hidden.shape[0] > 2
        await together(ones)
        for one in ones:
            one.check()
        span.full = lambda hidden: True
        await together(ones)
        assert [type(one.refusals[0]) for one in ones] == [CacheFull] * 5
        span.full = lambda hidden: False
        await together(ones)
        for one in ones:
            one.check()


async def test_a_later_chunk_without_memory_ends_a_session_that_cannot_go_back(autojump_clock):
    async with running() as (engine, span):
        span.can_cut = False
        one = One(engine, "a", 1)
        span.full = lambda hidden: len(span.passes) > 1 and hidden.shape[1] > 1
        await one.step(300)
        assert one.cache.length == 256, "the first chunk is in the cache"
        assert [each.code for each in one.refusals] == ["too_many"]


async def test_a_batch_that_found_no_memory_says_nothing_about_the_node_s_speed(autojump_clock):
    async with running() as (engine, span):
        one = One(engine, "a", 0)
        await one.step()
        known = engine.rates.decode_seconds_per_block, engine.rates.alone
        span.full = lambda hidden: True
        for _ in range(5):
            await one.step()
        assert (engine.rates.decode_seconds_per_block, engine.rates.alone) == known
        assert len(one.refusals) == 5


async def test_an_idle_node_that_finds_no_memory_for_a_measurement_keeps_its_figures(autojump_clock):
    def forward(*args: Any, **how: Any) -> Tensor:
        raise ERRORS[0]

    async with running() as (engine, span):
        engine.rates.measured(0.01)
        span.forward = forward
        await engine.measure_again()
        assert engine.rates.alone == 0.01


async def test_another_fault_of_ours_is_not_taken_for_a_lack_of_memory(autojump_clock):
    async def fail() -> None:
        async with running() as (engine, span):
            span.error, span.full = RuntimeError("an illegal memory access was encountered"), lambda _: True
            await One(engine, "a", 0).step()

    with pytest.raises(ExceptionGroup) as caught:
        await fail()
    assert caught.group_contains(RuntimeError, match="illegal memory access", depth=1)


async def test_unused_memory_goes_back_to_the_device_before_the_next_attempt(monkeypatch, autojump_clock):
    emptied: list[int] = []
    async with running() as (engine, span):
        monkeypatch.setattr(engine_module, "empty_cache", lambda: emptied.append(len(span.passes)))
        span.full = lambda hidden: hidden.shape[0] > 1
        await together([One(engine, f"peer {index}", index) for index in range(2)])
    assert emptied == [1]


def request(kind: type[Forward] | type[Backward], hidden: Tensor) -> bytes:
    spec = SpanSpec("m", "r", Blocks(0, 4), "float32")
    body, run = encode_hidden(hidden, "fp32"), Run(spec, 1, "fp32")
    made = Forward(run, body) if kind is Forward else Backward(run, body, body)
    return b"".join(bytes(part) for part in encode_request(made))


@pytest.mark.parametrize("kind", [Forward, Backward])
async def test_a_request_that_finds_no_memory_is_refused_and_the_next_one_is_computed(kind, autojump_clock):
    limits = Limits()
    async with running(limits=limits) as (engine, span):
        spec = SpanSpec("m", "r", Blocks(0, 4), "float32", hidden=HIDDEN, max_position=4096)
        listener = ForwardBackwardListener(SpanAdmission(spec), engine, limits)
        ours, theirs = stream_pair(PeerId("trainer"), PeerId("a"), COMPUTE_PROTOCOL, limits)
        hidden, contract = whole_numbers(1, 20, HIDDEN), Contract(b"", 0, 4, 1, 20, HIDDEN, "fp32", 2048)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, theirs)
            span.full = lambda hidden: True
            await ours.send(request(kind, hidden))
            refused = decode_output(await ours.receive(), contract)
            assert isinstance(refused, Failed)
            assert (refused.code, refused.retry_after_seconds) == ("too_many", limits.memory_retry_seconds)
            span.full = lambda hidden: False
            await ours.send(request(kind, hidden))
            answer = decode_output(await ours.receive(), contract)
            assert isinstance(answer, Output)
            if kind is Forward:
                assert torch.equal(decode_hidden(answer.body, contract), blocks_on(hidden, 0, 4))
            nursery.cancel_scope.cancel()


async def test_a_tape_is_gone_after_a_backward_that_found_no_memory_and_stays_after_another_refusal(
    autojump_clock,
):
    spec = SpanSpec("m", "r", Blocks(0, 4), "float32")
    contract = Contract(b"", 0, 4, 1, 4, HIDDEN, "fp32", 2048)
    run = Run(spec, 1, "fp32", tape=bytes(8))
    body = bytes(16 * HIDDEN)
    forward, backward = Forward(run, body), Backward(run, body, body)

    async def size(tokens: int) -> float:
        return 1.0

    tapes = Tapes(TapeBudget(1 << 20, 60.0), size, lambda: 1 << 30)
    for refusal, left in ((TooManyStreams("busy"), 1), (OutOfMemory("none"), 0)):
        async with tapes.tape_for("a", "", forward, contract) as kept:
            assert kept is not None
            kept.answered = True
        with pytest.raises(TooManyStreams):
            async with tapes.tape_for("a", "", backward, contract):
                raise refusal
        assert len(tapes.budget) == left


async def test_a_swarm_generates_the_same_tokens_while_a_server_is_out_of_memory(autojump_clock):
    async with swarm() as world:
        world.add_chain(0, 2, 4)
        world.add("spare", 2, 4)
        node = world.nodes[PeerId("hop1")]
        real, count = node.span.decode, 0

        def decode(*args: Any, **how: Any) -> Tensor:
            nonlocal count
            count += 1
            if 3 <= count < 9:
                raise ERRORS[0]
            return real(*args, **how)

        node.span.decode = decode
        conversation = conversation_of(world)
        assert await continued(conversation, [1, 2, 3], 16) == generated([1, 2, 3], 16, 4)
        assert count >= 3
        assert not node.faults
        conversation.close()


async def test_a_swarm_of_one_server_waits_until_it_has_memory_again(autojump_clock):
    async with swarm() as world:
        world.add_chain(0, 4)
        span = world.nodes[PeerId("hop0")].span
        real, until = span.decode, trio.current_time() + 20

        def decode(*args: Any, **how: Any) -> Tensor:
            if trio.current_time() < until:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*args, **how)

        span.decode = decode
        conversation = conversation_of(world)
        assert await continued(conversation, [1, 2, 3], 4) == generated([1, 2, 3], 4, 4)
        assert trio.current_time() >= until
        conversation.close()


def test_a_function_without_memory_is_a_refusal_and_any_other_fault_stays_what_it_is(monkeypatch):
    def failing(error: Exception) -> None:
        raise error

    refused = or_refused(failing, "an adapter", 5.0)
    for error in ERRORS:
        with pytest.raises(OutOfMemory, match="no memory for an adapter") as caught:
            refused(error)
        assert caught.value.retry_after_seconds == 5.0
        assert (
            caught.value.__cause__ is caught.value.__context__ is None
        )  # holds nothing of what was computed
    for error in (RuntimeError("shapes do not match"), ValueError("x"), KeyError("out of memory")):
        with pytest.raises(type(error)):
            refused(error)
    assert or_refused(lambda: 3, "x", 1.0)() == 3
    assert not devices.is_out_of_memory(RuntimeError("an illegal memory access was encountered"))
