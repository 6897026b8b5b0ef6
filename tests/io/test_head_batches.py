"""Many generations that share a head: merged where they wait together, and none the wiser for it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from client.generation.conversation import Conversation
from client.generation.head_batches import INLINE_SECONDS, MAX_ROWS, TIMED, HeadBatches
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.embed_and_head import load_embed_and_head
from node.runtime.compute_thread import ComputeThread, open_compute_thread
from tensor_codec.errors import BadResult
from tensor_codec.limits import Limits
from tests.fakes_serving import HIDDEN, FakeCompute, FakeEmbedAndHead, generated, some_hidden, swarm
from tests.model_fixtures import save_tiny

torch.set_num_threads(1)


class CountingEnds(FakeEmbedAndHead):
    """Knows how many rows each call of its head had."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[int] = []

    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        """[rows, 1, hidden] -> logits [rows, 1, vocabulary]."""
        self.heads.append(hidden.shape[0])
        return super().head(hidden)


def best(logits: Tensor) -> int:
    assert logits.dim() == 1
    return int(logits.argmax())


def own_answer(index: int) -> int:
    return best(FakeEmbedAndHead().head(some_hidden(1, seed=index))[0, -1])


class Busy:
    """Keeps a torch thread occupied until `let_go`, so that what is asked meanwhile waits."""

    def __init__(self, compute: ComputeThread) -> None:
        self._compute = compute
        self._gate = threading.Event()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Occupy it."""
        task_status.started()
        await self._compute.run(self._gate.wait, 10)

    def let_go(self) -> None:
        """The thread may go on."""
        self._gate.set()


async def ask_all(heads: HeadBatches, compute: ComputeThread, count: int) -> dict[int, int]:
    """The results of `count` callers that all wait before the torch thread is free."""
    found: dict[int, int] = {}

    async def one(index: int) -> None:
        found[index] = await heads.pick(partial(some_hidden, 1, seed=index), best)

    async with trio.open_nursery() as nursery:
        busy = Busy(compute)
        await nursery.start(busy.run)
        for index in range(count):
            nursery.start_soon(one, index)
        await trio.testing.wait_all_tasks_blocked()
        busy.let_go()
    return found


@pytest.mark.parametrize("count", [1, 2, MAX_ROWS])
async def test_those_who_wait_together_are_one_batch_and_each_gets_its_own_answer(count):
    ends = CountingEnds()
    async with open_compute_thread() as compute:
        found = await ask_all(HeadBatches(ends, compute), compute, count)
    assert found == {index: own_answer(index) for index in range(count)}
    assert len(set(found.values())) > 1 or count == 1
    assert ends.heads == [count]


async def test_more_than_a_batch_holds_go_on_in_the_next_one():
    ends = CountingEnds()
    async with open_compute_thread() as compute:
        found = await ask_all(HeadBatches(ends, compute), compute, 2 * MAX_ROWS + 3)
    assert found == {index: own_answer(index) for index in range(2 * MAX_ROWS + 3)}
    assert ends.heads == [MAX_ROWS, MAX_ROWS, 3]


async def test_who_asks_alone_is_not_kept_waiting_for_others():
    ends = CountingEnds()
    async with open_compute_thread() as compute:
        heads = HeadBatches(ends, compute)
        for index in range(3):
            assert await heads.pick(partial(some_hidden, 1, seed=index), best) == own_answer(index)
    assert ends.heads == [1, 1, 1]


async def test_the_last_position_counts_and_codecs_may_differ():
    ends = CountingEnds()

    def several() -> Tensor:
        return torch.cat([some_hidden(3, seed=9), some_hidden(1, seed=1)], 1)

    def as_bfloat16() -> Tensor:
        return torch.ones(1, 1, HIDDEN, dtype=torch.bfloat16)

    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        heads, busy, found = HeadBatches(ends, compute), Busy(compute), {}

        async def one(name, read):
            found[name] = await heads.pick(read, best)

        await nursery.start(busy.run)
        nursery.start_soon(one, "several", several)
        nursery.start_soon(one, "bf16", as_bfloat16)
        await trio.testing.wait_all_tasks_blocked()
        busy.let_go()
    assert found == {"several": own_answer(1), "bf16": HIDDEN}
    assert ends.heads == [2]


@pytest.mark.parametrize("where", ["read", "pick"])
async def test_an_error_of_one_is_nobody_elses(where):
    ends, bad = CountingEnds(), BadResult("NaN")

    def fail(*args):
        raise bad

    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        heads, busy, found = HeadBatches(ends, compute), Busy(compute), {}

        async def one(index):
            found[index] = await heads.pick(partial(some_hidden, 1, seed=index), best)

        async def wrong():
            with pytest.raises(BadResult) as caught:
                await heads.pick(
                    fail if where == "read" else partial(some_hidden, 1), fail if where == "pick" else best
                )
            assert caught.value is bad
            found["wrong"] = None

        await nursery.start(busy.run)
        nursery.start_soon(one, 1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wrong)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(one, 2)
        await trio.testing.wait_all_tasks_blocked()
        busy.let_go()
    assert found == {1: own_answer(1), 2: own_answer(2), "wrong": None}
    assert ends.heads == [2 if where == "read" else 3]


async def test_an_error_of_the_head_itself_comes_to_all_and_the_next_ones_are_answered(monkeypatch):
    ends, found = CountingEnds(), []

    async def one(index):
        with pytest.raises(ZeroDivisionError):
            await heads.pick(partial(some_hidden, 1, seed=index), best)
        found.append(index)

    async with open_compute_thread() as compute:
        heads = HeadBatches(ends, compute)
        monkeypatch.setattr(ends, "head", lambda hidden, best_only: 1 // 0)
        async with trio.open_nursery() as nursery:
            busy = Busy(compute)
            await nursery.start(busy.run)
            for index in range(3):
                nursery.start_soon(one, index)
            await trio.testing.wait_all_tasks_blocked()
            busy.let_go()
        assert sorted(found) == [0, 1, 2]
        monkeypatch.undo()
        assert await heads.pick(partial(some_hidden, 1, seed=5), best) == own_answer(5)


async def test_only_a_batch_of_those_who_want_the_best_alone_is_computed_so():
    asked = []

    class ToldEnds(CountingEnds):
        def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
            asked.append(best_only)
            return super().head(hidden)

    async with open_compute_thread() as compute:
        heads = HeadBatches(ToldEnds(), compute)
        for wishes in ((True, True), (True, False), (False,)):
            busy = Busy(compute)
            async with trio.open_nursery() as nursery:
                await nursery.start(busy.run)
                for index, wish in enumerate(wishes):
                    read = partial(some_hidden, 1, seed=index)
                    nursery.start_soon(partial(heads.pick, read, best, int if wish else None))
                await trio.testing.wait_all_tasks_blocked()
                busy.let_go()
    assert asked == [True, False, False]


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_one_that_is_cancelled_while_it_waits_is_left_out(victim):
    ends, found, read = CountingEnds(), {}, []
    scopes = [trio.CancelScope() for _ in range(3)]

    async def one(index):
        def hidden() -> Tensor:
            read.append(index)
            return some_hidden(1, seed=index)

        with scopes[index]:
            found[index] = await heads.pick(hidden, best)

    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        heads, busy = HeadBatches(ends, compute), Busy(compute)
        await nursery.start(busy.run)
        for index in range(3):
            nursery.start_soon(one, index)
            await trio.testing.wait_all_tasks_blocked()
        scopes[victim].cancel()
        await trio.testing.wait_all_tasks_blocked()
        busy.let_go()
    others = [index for index in range(3) if index != victim]
    assert found == {index: own_answer(index) for index in others}
    assert read == others
    assert ends.heads == [2]


async def test_one_that_is_cancelled_while_it_is_computed_costs_the_others_nothing():
    found, computing, gate = {}, threading.Event(), threading.Event()
    scope = trio.CancelScope()

    class SlowEnds(CountingEnds):
        def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
            computing.set()
            gate.wait(10)
            return super().head(hidden)

    async def one(index, scope):
        with scope:
            found[index] = await heads.pick(partial(some_hidden, 1, seed=index), best)

    async with open_compute_thread() as compute, trio.open_nursery() as nursery:
        ends = SlowEnds()
        heads, busy = HeadBatches(ends, compute), Busy(compute)
        await nursery.start(busy.run)
        nursery.start_soon(one, 0, scope)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(one, 1, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        busy.let_go()
        await trio.to_thread.run_sync(computing.wait, 10)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert found == {}
        gate.set()
    assert scope.cancelled_caught
    assert found == {1: own_answer(1)}
    assert ends.heads == [2]


async def test_sixteen_generations_at_once_are_those_of_the_whole_model(autojump_clock):
    blocks, new = 6, 5
    prompts = [[(3 * index + k) % 26 for k in range(index % 7 + 1)] for index in range(16)]
    found: dict[int, list[int]] = {}

    async with swarm(Limits(max_sessions_per_peer=16)) as world:
        chain = world.add_chain(0, 3, blocks)
        ends, compute = CountingEnds(), FakeCompute(0.001)
        heads = HeadBatches(ends, compute)

        async def one(index):
            async def open_chain(*, max_length, **_):
                return await world.open(chain, max_length=max_length)

            conversation = Conversation(
                local_model=ends, compute=compute, heads=heads, open_chain=open_chain,
                worked=lambda session: None, max_length=64, give_up_seconds=60.0,
            )  # fmt: skip
            tokens = list(prompts[index])
            for _ in range(new):
                tokens.append(await conversation.logits_after(tokens, best))
            conversation.close()
            found[index] = tokens[len(prompts[index]) :]

        async with trio.open_nursery() as nursery:
            for index in range(16):
                nursery.start_soon(one, index)
    assert found == {index: generated(prompt, new, blocks) for index, prompt in enumerate(prompts)}
    assert sum(ends.heads) == 16 * new
    assert max(ends.heads) == MAX_ROWS


# One of each way in which the library's heads differ: soft caps, scales, positions, projections.
@pytest.mark.parametrize(
    "variant", ["llama", "gemma2", "gemma3_text", "bloom", "gpt2", "opt", "mpt", "granite", "cohere2", "lfm2"]
)
def test_a_head_gives_each_of_the_rows_that_are_merged_what_it_would_get_alone(variant, tmp_path):
    save_tiny(variant, tmp_path / "model", max_shard_size="10MB")
    ends = load_embed_and_head(open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")))
    rows = torch.randn(11, 1, ends.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    alone = torch.cat([ends.head(row[None]) for row in rows])
    together = ends.head(rows)
    # Other shapes are other matrix products: float32 with a sum of 32 values.
    assert (together - alone).abs().max() <= 2e-6 * alone.abs().max()
    assert torch.equal(together.argmax(-1), alone.argmax(-1))


class TimedEnds(CountingEnds):
    """Each head takes `seconds` of a clock of its own.  threads: in which heads were computed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.now = seconds, 0.0
        self.threads: list[int] = []

    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        self.now += self.seconds
        self.threads.append(threading.get_ident())
        return super().head(hidden)


@pytest.mark.parametrize(
    ("seconds", "generations", "best_only", "is_inline"),
    [
        (INLINE_SECONDS, 1, True, True),
        (2 * INLINE_SECONDS, 1, True, False),
        (INLINE_SECONDS, 2, True, False),
        (INLINE_SECONDS, 1, False, False),
    ],
)
async def test_only_a_quick_search_for_the_best_of_one_generation_is_made_in_the_event_loop(
    seconds, generations, best_only, is_inline
):
    ends = TimedEnds(seconds)
    async with open_compute_thread() as compute:
        heads = HeadBatches(ends, compute, clock=lambda: ends.now)
        with ExitStack() as stack:
            for _ in range(generations):
                stack.enter_context(heads.generation())
            for index in range(3):
                read = partial(some_hidden, 1, seed=index)
                assert await heads.pick(read, best, int if best_only else None) == own_answer(index)
    here = [thread == threading.get_ident() for thread in ends.threads]
    assert here == [False, is_inline, is_inline]  # the first one is timed


async def test_a_head_that_became_slow_goes_back_into_the_torch_thread():
    ends = TimedEnds(INLINE_SECONDS)
    async with open_compute_thread() as compute:
        heads = HeadBatches(ends, compute, clock=lambda: ends.now)
        for index in range(2 * TIMED):
            await heads.pick(partial(some_hidden, 1, seed=index), best, int)
            ends.seconds = 2 * INLINE_SECONDS
    here = [thread == threading.get_ident() for thread in ends.threads]
    assert here == [False] + TIMED * [True] + (TIMED - 1) * [False]


async def test_an_error_in_the_event_loop_is_that_caller_s_own():
    async with open_compute_thread() as compute:
        heads = HeadBatches(CountingEnds(), compute, clock=lambda: 0.0)
        await heads.pick(partial(some_hidden, 1), best, int)

        def spoilt() -> Tensor:
            raise BadResult("NaN")

        with pytest.raises(BadResult):
            await heads.pick(spoilt, best, int)
        assert await heads.pick(partial(some_hidden, 1, seed=3), best, int) == own_answer(3)


async def test_a_batch_goes_into_the_torch_thread_once_whoever_is_cancelled():
    ends, found, ways = CountingEnds(), {}, []
    scopes = [trio.CancelScope() for _ in range(2 * MAX_ROWS)]

    async with open_compute_thread() as compute, trio.open_nursery() as nursery:

        class Counted:
            is_idle = False

            async def run(self, function, *args):
                ways.append(function)
                return await compute.run(function, *args)

        heads, busy = HeadBatches(ends, Counted()), Busy(compute)

        async def one(index):
            with scopes[index]:
                found[index] = await heads.pick(partial(some_hidden, 1, seed=index), best, int)

        await nursery.start(busy.run)
        for index in range(2 * MAX_ROWS):
            nursery.start_soon(one, index)
            await trio.testing.wait_all_tasks_blocked()
        assert len(ways) == 1
        scopes[0].cancel()  # the one that has the batch computed: another takes its place
        scopes[3].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert len(ways) == 2
        busy.let_go()
    assert found == {index: own_answer(index) for index in range(2 * MAX_ROWS) if index not in (0, 3)}
    assert ends.heads == [MAX_ROWS, MAX_ROWS - 2]
    assert len(ways) == 3
