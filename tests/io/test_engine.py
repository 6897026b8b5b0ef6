"""The engine over a span that computes with small integers: what runs together, and what a fault touches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import outcome
import pytest
import torch
import trio
import trio.testing

from node.model.adapters.low_rank import LowRank, SpanAdapter
from node.model.blocks import parts
from node.serving.executor.batcher import Batcher
from node.serving.executor.engine import Answer, Engine, NotFinite, Packing, StepOwner
from node.serving.executor.jobs import Job, Kind
from node.serving.executor.lone_steps import LOOP_SECONDS
from node.serving.executor.rates import Rates
from node.serving.forward_backward import ForwardBackwardListener, Work
from node.serving.span_admission import SpanAdmission
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import BadResult, TooManyStreams
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract, StepRange
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL, Backward, Forward, Run, encode_request
from tensor_codec.span_spec import SpanSpec
from tests.fakes_forward_backward import ToySpan, blocks_on, gradient_of, whole_numbers
from tests.fakes_serving import (
    HIDDEN,
    FakeCache,
    FakeCompute,
    FakeSpan,
    some_hidden,
    stream_pair,
    until,
    whole_model,
)


class One:
    """A session at the engine, and what it has sent so far."""

    def __init__(
        self,
        engine: Engine,
        peer: str,
        seed: int,
        *,
        start: int = 0,
        stop: int = 4,
        batch: int = 1,
        adapter: SpanAdapter | None = None,
    ):
        self.engine, self.peer, self.adapter = engine, peer, adapter
        self.contract = Contract(bytes([seed]) * 16, start, stop, batch, 1024, HIDDEN, "fp32", 2048)
        self.cache = FakeCache(batch, 1024)
        self.hidden = some_hidden(1024, batch, seed)
        self.steps = 0
        self.packing = Packing()

    async def step(self, tokens: int = 1, *, poison: bool = False, reply="all") -> Answer:
        begin = self.cache.length
        given = self.hidden[:, begin : begin + tokens].clone()
        body = bytearray(encode_hidden(given, "int8o" if self.packing.given else "fp32"))
        if poison:
            body[:4] = b"\x80" * 4 if self.packing.given else b"\x00\x00\xc0\x7f"
        if self.packing.given and not poison:  # what is left of it
            self.hidden[:, begin : begin + tokens] = decode_hidden(body, self.contract, packed=True)
        what = StepRange(begin, tokens, reply)
        self.steps += 1
        return await self.engine.step(
            self.peer, self.contract, self.cache, what, memoryview(body), whole=False, adapter=self.adapter,
            packing=self.packing,
        )  # fmt: skip

    def check(self, answer: Answer | Exception) -> None:
        """Whether the last positions are what the blocks make of everything so far."""
        assert isinstance(answer, Answer)
        got = decode_hidden(answer.body, self.contract)
        length = self.cache.length
        given = self.hidden[:, :length]
        right = whole_model(given, self.contract.start, self.contract.stop, self.adapter)
        assert torch.equal(got, right[:, length - got.shape[1] :])


@asynccontextmanager
async def running(limits: Limits | None = None, seconds: float = 1.0):
    """An engine whose batches take `seconds` each, on trio's clock."""
    span = FakeSpan(0, 4)
    engine = Engine(span, FakeCompute(seconds), Rates(1.0, 1.0), limits, clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


async def all_at_once(ones: Sequence[One], **options) -> dict[int, Answer | Exception]:
    answers: dict[int, Answer | Exception] = {}

    async def one(index: int) -> None:
        try:
            answers[index] = await ones[index].step(**options.get(str(index), {}))
        except (BadResult, TooManyStreams) as error:
            answers[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(ones)):
            nursery.start_soon(one, index)
    return answers


async def test_decode_steps_of_all_sessions_run_as_one_batch_whatever_blocks_they_use(autojump_clock):
    async with running() as engine:
        ones = [
            One(engine, "a", 0),
            One(engine, "b", 1, start=1, stop=3),
            One(engine, "c", 2, start=2, batch=3),
            One(engine, "d", 3, stop=1),
        ]
        for one in ones:
            one.check(await one.step(5))
        for _ in range(3):
            began = trio.current_time()
            answers = await all_at_once(ones)
            assert trio.current_time() - began == 1.0  # one batch, and no look for another one after it
            for index, one in enumerate(ones):
                one.check(answers[index])


async def test_an_answer_that_a_session_keeps_is_all_that_it_keeps_of_its_batch(autojump_clock):
    async with running() as engine:
        ones = [One(engine, str(number), number, batch=1 + number % 2) for number in range(4)]
        for one in ones:
            await one.step(2)
        for answer in (await all_at_once(ones)).values():
            assert isinstance(answer, Answer)
            memory = memoryview(answer.body).obj
            assert memoryview(memory).nbytes == len(answer.body)


def adapter_of(name: str, rank: int) -> SpanAdapter:
    """For all blocks; its values are a quarter of a block's."""
    low = LowRank(torch.zeros(rank, 20), torch.zeros(5, rank), 1.0)
    return SpanAdapter(name, {block: {"q": low} for block in range(4)})


async def test_sessions_with_adapters_decode_in_one_batch_each_adapter_s_next_to_each_other(autojump_clock):
    one, two = adapter_of("one", 1), adapter_of("two", 2)
    async with running() as engine:
        ones = [
            One(engine, "a", 0, adapter=one),
            One(engine, "b", 1, start=1, stop=3),
            One(engine, "c", 2, start=2, batch=3, adapter=two),
            One(engine, "d", 3, stop=1, adapter=one),
            One(engine, "e", 4, adapter=two),
            One(engine, "f", 5, adapter=one),
        ]
        for session in ones:
            session.check(await session.step(5))
        for _ in range(2):
            engine.span.batches.clear()
            began = trio.current_time()
            answers = await all_at_once(ones)
            assert trio.current_time() - began == 1.0, "one batch"
            for index, session in enumerate(ones):
                session.check(answers[index])
            for owners in engine.span.batches:
                runs = [name for name, _ in itertools.groupby(owners)]
                assert len(runs) == len(set(owners)), "each adapter's rows next to each other"
                assert None not in runs[1:], "after those without one"


async def test_a_job_with_an_adapter_weighs_more_by_its_values(autojump_clock, monkeypatch):
    submitted: list[Job] = []
    submit = Batcher.submit

    def note(self: Batcher, job: Job, now: float) -> None:
        submitted.append(job)
        submit(self, job, now)

    def work(span: FakeSpan):
        yield from ()
        return b""

    monkeypatch.setattr(Batcher, "submit", note)
    async with running() as engine:
        await One(engine, "a", 0).step(3)
        await One(engine, "b", 1, adapter=adapter_of("one", 1)).step(3)
        await One(engine, "c", 2, start=1, stop=3, adapter=adapter_of("two", 2)).step()
        await engine.stateless("d", 1, 1, [(0, 4)], work, adapter=adapter_of("one", 4))
    found = [(job.weight, job.adapter) for job in submitted]
    assert found == [(1, ""), (1.25, "one"), (1.5, "two"), (2, "one")]


async def test_a_long_step_is_computed_in_chunks_between_which_others_decode(autojump_clock):
    async with running() as engine:
        long, short = One(engine, "a", 0), One(engine, "b", 1)
        await short.step(2)
        done: list[str] = []

        async def prefill() -> None:
            long.check(await long.step(900))
            done.append("prefill")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefill)
            await trio.sleep(0.5)
            for _ in range(3):
                short.check(await short.step())
                done.append("decode")
        assert done[:3] == ["decode"] * 3
        assert done[3] == "prefill"
        assert 1 < max(tokens for _, tokens, *_ in engine.span.steps) <= 256


async def test_only_the_positions_that_are_wanted_come_back_of_a_chunked_step(autojump_clock):
    async with running() as engine:
        one = One(engine, "a", 0)
        answer = await one.step(600, reply="last")
        assert len(answer.body) == HIDDEN * 4
        one.check(answer)
        assert bytes((await one.step(300, reply="none")).body) == b""
        one.check(await one.step(100))


async def test_a_step_that_holds_nan_fails_alone_and_the_others_of_its_batch_are_right(autojump_clock):
    async with running() as engine:
        ones = [One(engine, name, seed) for seed, name in enumerate("abc")]
        for one in ones:
            await one.step(3)
        answers = await all_at_once(ones, **{"1": {"poison": True}})
        assert isinstance(answers[1], BadResult)
        assert not isinstance(answers[1], NotFinite)
        for index in (0, 2):
            ones[index].check(answers[index])
        assert ones[1].cache.length == 3
        ones[1].check(await ones[1].step())
        with pytest.raises(BadResult):
            await ones[1].step(40, poison=True)


async def test_what_becomes_nan_in_computing_is_told_to_its_own_session_only(autojump_clock):
    async with running() as engine:
        ones = [One(engine, name, seed) for seed, name in enumerate("abc")]

        def poison(hidden: torch.Tensor) -> torch.Tensor:
            bad = torch.tensor(float("nan"))
            target = whole_model(ones[1].hidden[:, :1], 0, 4)
            return torch.where((hidden == target).all(-1, keepdim=True), bad, hidden)

        engine.span.poison = poison
        answers = await all_at_once(ones)
        assert isinstance(answers[1], NotFinite)
        for index in (0, 2):
            ones[index].check(answers[index])


async def test_a_cancelled_step_leaves_no_trace_in_the_queue_and_is_not_begun(autojump_clock):
    async with running() as engine:
        first, second = One(engine, "a", 0), One(engine, "b", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.step, 200)
            await trio.sleep(0.5)
            with trio.move_on_after(0.1) as patience:
                await second.step()
            assert patience.cancelled_caught
            assert engine.batcher.waiting == 1
        assert engine.batcher.waiting == 0
        assert engine._works == {}
        assert sum(tokens for _, tokens, *_ in engine.span.steps) == 200
        second.check(await second.step())


async def test_stateless_work_is_answered_and_its_faults_are_its_own(autojump_clock):
    async with running() as engine:

        def good(span: FakeSpan):
            yield
            return bytes([span.stop])

        def bad(span: FakeSpan):
            yield
            raise BadResult("no")

        answer = await engine.stateless("a", 2, 3, [(0, 2), (2, 4)], good)
        assert bytes(answer.body) == b"\x04"
        with pytest.raises(BadResult, match="no"):
            await engine.stateless("a", 2, 3, [(0, 2), (2, 4)], bad)
        one = One(engine, "a", 0)
        one.check(await one.step(2))
        assert engine.batcher.waiting == 0


class Parts:
    """Requests of six parts; what ran, in order."""

    PARTS = ((0, 1), (1, 2), (2, 3), (3, 4), (2, 3), (1, 2))

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ran: list[str] = []

    async def request(self, name: str) -> None:
        def work(span: FakeSpan):
            for _ in self.PARTS[1:]:
                self.ran.append(name)
                yield
            self.ran.append(name)
            return b""

        await self.engine.stateless(name, 1, 1, self.PARTS, work)

    async def decode(self, one: One, steps: int) -> list[float]:
        """Steps one after the other; how long each of them took."""
        seconds = []
        for _ in range(steps):
            began = trio.current_time()
            one.check(await one.step())
            self.ran.append("decode")
            seconds.append(trio.current_time() - began)
        return seconds


async def test_decode_steps_run_between_the_parts_of_a_backward_and_wait_for_one_part_at_most(autojump_clock):
    async with running() as engine:
        log, one = Parts(engine), One(engine, "honest", 0)
        await one.step(2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.request, "trainer")
            await trio.sleep(0.5)
            seconds = await log.decode(one, 4)
        assert max(seconds) <= 2.0  # a part, and the step itself
        last_decode = max(i for i, name in enumerate(log.ran) if name == "decode")
        assert log.ran.count("trainer") == len(Parts.PARTS)
        assert log.ran[last_decode + 1 :]  # the request was still under way


async def test_a_request_that_has_begun_ends_before_another_one_begins(autojump_clock):
    async with running() as engine:
        log = Parts(engine)
        async with trio.open_nursery() as nursery:
            for name in ("one", "two", "three"):
                nursery.start_soon(log.request, name)
        orders = [name for name, before in zip(log.ran, ["", *log.ran], strict=False) if name != before]
        assert sorted(orders) == ["one", "three", "two"]
        assert len(log.ran) == 3 * len(Parts.PARTS)


async def test_a_backward_in_parts_has_the_gradient_of_a_whole_one(autojump_clock, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", 2 * 2 * 5)  # two blocks of two rows of five tokens
    hidden, grad = whole_numbers(2, 5, HIDDEN), whole_numbers(2, 5, HIDDEN, seed=1, most=3)
    contract = Contract(bytes(16), 0, 5, 2, 5, HIDDEN, "fp32", 2048)
    run = Run(SpanSpec("m", "r", Blocks(0, 5), "float32"), 2, "fp32")
    bodies = bytes(encode_hidden(hidden, "fp32")), bytes(encode_hidden(grad, "fp32"))
    span: Any = ToySpan(0, 5)  # steps need other methods
    engine = Engine(span, FakeCompute(1.0), Rates(1.0, 1.0), clock=trio.current_time)
    runs = parts.forward_parts(10, 0, 5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        for request, right in (
            (Forward(run, bodies[0]), blocks_on(hidden, 0, 5)),
            (Backward(run, *bodies), gradient_of(hidden, grad, 0, 5)),
        ):
            span.done.clear()
            work = Work(request, contract)
            answer = await engine.stateless("a", 2, 5, work.parts, work)
            assert torch.equal(decode_hidden(answer.body, contract), right)
            forwards = [(start, stop) for _, start, stop, _ in span.done]
            assert forwards == (work.parts if isinstance(request, Forward) else [*runs[:-1], *runs[::-1]])
            assert len(work.parts) == (3 if isinstance(request, Forward) else 8)
        nursery.cancel_scope.cancel()


async def test_no_further_part_of_a_cancelled_request_runs(autojump_clock):
    async with running() as engine:
        log = Parts(engine)
        with trio.move_on_after(2.5):
            await log.request("gone")
        ran = len(log.ran)
        await trio.sleep(20)
        assert 0 < len(log.ran) <= ran + 1 < len(Parts.PARTS)
        assert engine.batcher.waiting == 0
        await log.request("another")
        assert log.ran[-len(Parts.PARTS) :] == ["another"] * len(Parts.PARTS)


class BothSpan(FakeSpan):
    """Blocks for sessions and for requests without one.  ran: "step" or "part", in the order of computing."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.toy = ToySpan(start, stop)
        self.ran: list[str] = []

    def decode(self, *args: Any, **how: Any) -> torch.Tensor:
        self.ran.append("step")
        return super().decode(*args, **how)

    def _view(self, start: int, stop: int) -> Any:
        self.ran.append("part")
        return self.toy._view(start, stop)


async def test_steps_run_between_the_parts_of_a_giant_backward_until_its_client_leaves(autojump_clock):
    span: Any = BothSpan(0, 4)  # its parts would be plain ones, and nobody asks for any
    limits = Limits(max_compute_seconds=1e6)
    engine = Engine(span, FakeCompute(0.1), Rates(0.1, 1e-5), limits, clock=trio.current_time)
    spec = SpanSpec("m", "r", Blocks(0, 4), "float32", hidden=HIDDEN, max_position=4096)
    listener = ForwardBackwardListener(SpanAdmission(spec), engine, limits)
    hidden = whole_numbers(1, 2048, HIDDEN)
    body = encode_hidden(hidden, "fp32")
    frame = encode_request(Backward(Run(replace(spec, hidden=0, max_position=0), 1, "fp32"), body, body))
    one = One(engine, "honest", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        for leaves in (False, True):
            ours, theirs = stream_pair(PeerId("trainer"), PeerId("a"), COMPUTE_PROTOCOL, limits)
            span.ran.clear()
            one.check(await one.step())
            async with trio.open_nursery() as serving:
                serving.start_soon(listener.serve, theirs)
                await ours.send(frame)
                worst, left = 0.0, 0  # left: parts that had begun when the client left
                await until(lambda: "part" in span.ran)
                first = len(span.ran)
                for _ in range(12):
                    began = trio.current_time()
                    one.check(await one.step())
                    worst = max(worst, trio.current_time() - began)
                    if leaves and not left:
                        await ours.reset()
                        await trio.testing.wait_all_tasks_blocked()  # the listener knows it
                        left = span.ran.count("part")
                assert worst <= 0.2 + 1e-6, "a part, and the step itself"
                parts = [index for index, what in enumerate(span.ran) if what == "part"]
                if not leaves:
                    assert await ours.receive(100.0) is not None
                    await ours.aclose()
            if leaves:
                parts = [index for index, what in enumerate(span.ran) if what == "part"]
                assert len(parts) == left <= 2, "what had begun when its client left, and no more"
                assert engine.batcher.waiting == 0
            else:
                later = [index for index in parts if index > first]
                assert later
                assert all(span.ran[index - 1] == "step" for index in later), "steps between them"
        nursery.cancel_scope.cancel()


async def test_a_step_that_waited_too_long_is_refused_and_never_begun(autojump_clock):
    async with running(Limits(step_wait_seconds=2.5), seconds=2.0) as engine:
        first, late = One(engine, "a", 0), One(engine, "b", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.step, 200)
            await trio.sleep(0.1)
            with pytest.raises(TooManyStreams, match=r"waited 2\.5 s") as refusal:
                await late.step(200)
        assert refusal.value.retry_after_seconds is not None
        assert late.cache.length == 0
        assert [tokens for _, tokens, *_ in engine.span.steps] == [200]
        assert engine.batcher.waiting == 0
        late.check(await late.step(200))


async def test_a_step_that_has_begun_goes_on_after_its_time_to_begin(autojump_clock):
    async with running(Limits(step_wait_seconds=2.5), seconds=2.0) as engine:
        long = One(engine, "a", 0)
        long.check(await long.step(1000))  # four chunks of two seconds each


async def test_a_queue_that_is_full_refuses_and_what_was_queued_is_answered(autojump_clock):
    async with running(Limits(max_waiting_steps_per_peer=2)) as engine:
        ones = [One(engine, "a", seed) for seed in range(3)]
        answers = await all_at_once(ones)
        refused = [index for index, answer in answers.items() if isinstance(answer, TooManyStreams)]
        assert len(refused) == 1
        for index in {0, 1, 2}.difference(refused):
            ones[index].check(answers[index])


# --- int8o ---


async def test_steps_that_come_or_go_on_packed_share_a_batch_with_the_others(autojump_clock):
    async with running() as engine:
        ones = [One(engine, str(number), number, batch=1 + number) for number in range(3)]
        ones[0].packing = Packing(given=True)
        ones[1].packing = Packing(given=True, onward=True)
        for _ in range(2):
            began = trio.current_time()
            answers = await all_at_once(ones)
            assert trio.current_time() - began == 1.0
            assert [answer.packed is None for _, answer in sorted(answers.items())] == [True, False, True]
            ones[0].check(answers[0])
            ones[2].check(answers[2])
            kept = decode_hidden(answers[1].body, ones[1].contract)
            assert torch.equal(decode_hidden(answers[1].packed, ones[1].contract, packed=True), kept)


@pytest.mark.parametrize("tokens", [1, 3])
async def test_a_packed_step_that_no_encoding_gives_fails_alone(tokens, autojump_clock):
    async with running() as engine:
        ones = [One(engine, str(number), number) for number in range(2)]
        ones[0].packing = Packing(given=True)
        answers = await all_at_once(ones, **{"0": {"tokens": tokens, "poison": True}})
        assert isinstance(answers[0], BadResult)
        assert "code -128" in str(answers[0])
        ones[1].check(answers[1])
        assert ones[0].cache.length == 0


@pytest.mark.parametrize("tokens", [1, 3])
async def test_outputs_beyond_the_range_of_int8o_are_the_span_s_own_fault(tokens, autojump_clock):
    async with running() as engine:
        engine.span.poison = lambda hidden: hidden * 0 + torch.finfo(torch.float32).max
        one = One(engine, "a", 0)
        one.packing = Packing(onward=True)
        with pytest.raises(NotFinite):
            await one.step(tokens)


class Begun(One):
    """A session whose single steps have no task."""

    async def step(self, tokens: int = 1, *, poison: bool = False, reply="all") -> Answer:
        if tokens > 1:
            return await super().step(tokens)
        results: list[outcome.Outcome[Answer]] = []
        begin = self.cache.length
        body = bytearray(encode_hidden(self.hidden[:, begin : begin + 1].clone(), "fp32"))
        if poison:
            body[:4] = b"\x00\x00\xc0\x7f"
        owner = StepOwner(self.peer, "", self.cache, self.adapter)
        what = StepRange(begin, 1, reply)
        self.engine.begin(owner, self.contract, what, memoryview(body), results.append, whole=False)
        while not results:
            await trio.lowlevel.checkpoint()
        return results[0].unwrap()


@asynccontextmanager
async def short_steps(limits: Limits | None = None):
    """An engine whose steps are so short that one that is alone is computed at once."""
    span = FakeSpan(0, 4)
    span.in_any_thread = True
    engine = Engine(span, FakeCompute(), Rates(1e-4, 1e-5), limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


def batches_through_the_queue(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the queue gives from now on."""
    sizes: list[int] = []
    take = Batcher.next

    def counted(batcher: Batcher, now: float):
        batch = take(batcher, now)
        sizes.extend([len(batch)] if batch else [])
        return batch

    monkeypatch.setattr(Batcher, "next", counted)
    return sizes


async def test_a_step_that_is_alone_is_computed_in_the_callers_thread_without_a_queue(monkeypatch):
    async with short_steps() as engine:
        one = Begun(engine, "a", 0)
        one.check(await one.step(3))
        sizes = batches_through_the_queue(engine, monkeypatch)
        learnt = engine.rates.alone
        for _ in range(3):
            await trio.sleep(2 * LOOP_SECONDS)
            one.check(await one.step())
        assert not sizes
        assert engine.rates.alone != learnt
        assert engine.waits.queue(engine._clock()) == 0
        assert engine.batcher._peers.by_name["a"].compute_seconds > 0


async def test_steps_of_several_sessions_share_batches_however_short_they_are(monkeypatch):
    async with short_steps() as engine:
        ones = [Begun(engine, "a", number) for number in range(3)]
        for one in ones:
            await one.step(2)
        sizes = batches_through_the_queue(engine, monkeypatch)
        for _ in range(3):
            for index, answer in (await all_at_once(ones)).items():
                ones[index].check(answer)
        assert len(sizes) == 3
        assert min(sizes) >= 2  # the session that was last may be the first again, and alone


@pytest.mark.parametrize("why", ["slow", "another thread", "the thread is busy", "a chore waits", "two rows"])
async def test_a_step_that_may_not_be_computed_at_once_goes_through_the_queue(why, monkeypatch):
    async with short_steps() as engine:
        one = Begun(engine, "a", 0, batch=2 if why == "two rows" else 1)
        one.check(await one.step(2))
        sizes = batches_through_the_queue(engine, monkeypatch)
        if why == "slow":
            engine.rates.alone = 0.01
        elif why == "another thread":
            engine.span.in_any_thread = False
        elif why == "the thread is busy":
            monkeypatch.setattr(FakeCompute, "is_idle", False)
        elif why == "a chore waits":
            engine.before_next(lambda: None)
        await trio.sleep(2 * LOOP_SECONDS)
        one.check(await one.step())
        assert sizes == [1]


async def test_a_value_that_is_not_finite_fails_its_step_alone_where_it_is_computed_at_once():
    async with short_steps() as engine:
        one = Begun(engine, "a", 0)
        await one.step(2)
        with pytest.raises(BadResult, match="received"):
            await one.step(poison=True)
        await trio.sleep(2 * LOOP_SECONDS)
        one.check(await one.step())
        engine.span.poison = lambda hidden: hidden / 0
        with pytest.raises(NotFinite, match="computed"):
            await one.step()


def ways_into_the_thread(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The functions that the torch thread is given from now on."""
    given: list[object] = []
    run = FakeCompute.run

    async def counted(compute: FakeCompute, function, *args):
        given.append(function)
        return await run(compute, function, *args)

    monkeypatch.setattr(FakeCompute, "run", counted)
    return given


async def test_a_short_batch_of_several_sessions_is_computed_by_the_loop_s_thread(monkeypatch):
    async with short_steps() as engine:
        ones = [Begun(engine, peer, number) for peer in "ab" for number in range(2)]
        for one in ones:
            await one.step(2)
        sizes, given = batches_through_the_queue(engine, monkeypatch), ways_into_the_thread(monkeypatch)
        for _ in range(3):
            for index, answer in (await all_at_once(ones)).items():
                ones[index].check(answer)
        assert given == []
        assert max(sizes) > 1
        assert engine.waits.queue(engine._clock()) >= 0


@pytest.mark.parametrize(
    "why",
    ["long", "another thread", "the thread is busy", "a chore waits", "an adapter", "a prompt", "packed"],
)
async def test_a_batch_that_is_long_or_needs_more_than_our_kernels_is_for_the_torch_thread(why, monkeypatch):
    async with short_steps() as engine:
        ones: list[One] = [Begun(engine, "a", number) for number in range(3)]
        for one in ones:
            await one.step(2)
        given = ways_into_the_thread(monkeypatch)
        if why == "long":
            engine.batcher.costs.of[Kind.DECODE].per_block = 0.01
        elif why == "another thread":
            engine.span.in_any_thread = False
        elif why == "the thread is busy":
            monkeypatch.setattr(FakeCompute, "is_idle", False)
        elif why == "a chore waits":
            engine.before_next(lambda: None)
        elif why == "an adapter":
            ones[1].adapter = adapter_of("one", 1)
        elif why == "packed":
            ones[1] = One(engine, "a", 9)
            ones[1].packing = Packing(onward=True)
        tokens = [1, 40 if why == "a prompt" else 1, 1]
        async with trio.open_nursery() as nursery:
            for one, count in zip(ones, tokens, strict=True):
                nursery.start_soon(one.step, count)
        assert given


async def test_a_value_that_is_not_finite_fails_its_step_alone_in_a_short_batch():
    async with short_steps() as engine:
        ones = [Begun(engine, "a", number) for number in range(3)]
        for one in ones:
            await one.step(2)
        found: dict[int, Answer | Exception] = {}

        async def step(index: int) -> None:
            try:
                found[index] = await ones[index].step(poison=index == 1)
            except BadResult as error:
                found[index] = error

        async with trio.open_nursery() as nursery:
            for index in range(3):
                nursery.start_soon(step, index)
        assert str(found[1]) == "received hidden states hold NaN or infinity"
        for index in (0, 2):
            ones[index].check(found[index])
