"""Backward with an adapter: servers add its gradients up, and each counts once, whatever fails."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import trio
from torch import Tensor

import client.batch_parts
from client.adapters.upload import AdapterUploads, AdapterUse
from client.forward_backward import UNDER_WAY_PER_PEER, ForwardBackward, Gradients
from node.model.blocks.forward_backward import finish
from node.serving.adapters.listener import AdapterListener
from node.serving.adapters.sums import SpanSums
from node.serving.executor.engine import Answer
from node.serving.forward_backward import Work
from routing.names import PeerId
from routing.view.view import SwarmView
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden
from tensor_codec.errors import PeerFault, PeerGone, Refused
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL, Backward, Forward, Run, encode_request
from tensor_codec.messages.gradients import Collect, Summed, decode_gradients, encode_collect
from tensor_codec.span_spec import SpanSpec
from tests.adapter_fixtures import a_desk, content
from tests.fakes_forward_backward import (
    BLOCKS,
    ToyEngine,
    ToyNode,
    ToySpan,
    ToySwarm,
    blocks_on,
    gradient_of,
    whole_numbers,
)
from tests.fakes_serving import CLIENT, HIDDEN, FakeCompute, FakeStream, stream_pair, until

OWN = content(1)
ROWS, TOKENS = 6, 4
STATES = whole_numbers(ROWS, TOKENS, HIDDEN)
GRAD = whole_numbers(ROWS, TOKENS, HIDDEN, seed=1, most=4)
SHAPES = {block: {"q_proj": (HIDDEN, HIDDEN)} for block in range(BLOCKS)}
Pair = tuple[Tensor, Tensor]


def pair_of(hidden: Tensor, grad: Tensor, block: int) -> Pair:
    """A gradient of A and B of a block, with its input and the gradient at its output: not whole numbers."""
    a = (hidden.sum((0, 1)) * (block + 1)).reshape(1, HIDDEN) / 3
    b = (grad.sum((0, 1)) * (block + 1)).reshape(HIDDEN, 1) / 7
    return a, b


def gradients_at(hidden: Tensor, grad: Tensor, start: int, stop: int) -> dict[int, dict[str, Pair]]:
    """Those of blocks [start, stop), by the input of the first and the gradient at the output of the last."""
    found = {}
    for block in range(start, stop):
        given = blocks_on(hidden, start, block)
        after = blocks_on(given, block, block + 1)
        above = gradient_of(after, grad, block + 1, stop) if block + 1 < stop else grad
        found[block] = {"q_proj": pair_of(given, above, block)}
    return found


class LearningEngine(ToyEngine):
    """Gives gradients to requests that name a sum.

    lose: of each request, whether its answer is lost.  learns: whether gradients are added.
    """

    lose: Callable[[], bool] = staticmethod(lambda: False)
    learns = True

    async def stateless(
        self,
        peer: str,
        rows: int,
        tokens: int,
        parts: Sequence[tuple[int, int]],
        work: Callable[[ToySpan], Generator[None, None, Buffer]],
        *,
        prefix: str = "",
        adapter: object = None,
    ) -> Answer:
        """As `ToyEngine.stateless`."""
        own = cast(Work, work)
        request, contract = own.request, own.contract
        plain = replace(own, adapter=None, take=None)

        def compute(span: Any) -> Generator[None, None, Buffer]:
            body: Buffer = finish(plain(span))
            if self.learns and own.take is not None and isinstance(request, Backward):
                hidden, grad = decode_hidden(request.hidden, contract), decode_hidden(request.grad, contract)
                own.take(gradients_at(hidden, grad, contract.start, contract.stop))
            return body
            yield

        answer = await super().stateless(peer, rows, tokens, parts, compute, prefix=prefix)
        if self.lose():
            raise PeerGone("the answer is lost")
        return answer


class LearningSwarm(ToySwarm):
    """Nodes that take adapters and sum their gradients."""

    def learner(
        self, name: str, start: int, stop: int, *, seconds: float = 0.0, sum_capacity: int = 1 << 20
    ) -> ToyNode:
        """A node like those of `add`."""
        node = self.add(name, start, stop, seconds=seconds)
        desk = a_desk(self.limits, blocks=BLOCKS, sum_capacity=sum_capacity)
        shapes = {block: SHAPES[block] for block in range(start, stop)}
        compute = FakeCompute()
        node.engine = node.listener.engine = LearningEngine(node.span, FakeCompute(seconds))
        node.listener.admission.adapters = desk.store
        node.listener.sums = SpanSums(desk.sums, desk.store, lambda: shapes, compute)
        self.takers[name] = AdapterListener(
            node.listener.admission, desk, lambda: shapes, compute, self.limits, node.listener.faults
        )
        return node

    @property
    def takers(self) -> dict[str, AdapterListener]:
        """By the names of their nodes."""
        return self.__dict__.setdefault("_takers", {})

    async def dial_adapter(self, to: str) -> FakeStream:
        """A stream for adapters."""
        await trio.lowlevel.checkpoint()
        if not self.nodes[to].alive:
            raise PeerGone(f"{to} cannot be reached")
        ours, theirs = stream_pair(CLIENT, PeerId(to), ADAPTER_PROTOCOL, self.limits)
        self.nodes[to].streams.append(theirs)

        async def serve() -> None:
            try:
                await self.takers[to].serve(theirs)
                await theirs.aclose()
            except PeerFault:
                await theirs.reset()

        self.nursery.start_soon(serve)
        return ours

    def use(self, own: Any = OWN) -> AdapterUse:
        """The adapter for a call."""
        info: Any = SimpleNamespace(revision="r", blocks=BLOCKS)
        found = AdapterUploads(self.limits, info, self.dial_adapter).use_of(own, SwarmView("", entries={}))
        assert found is not None
        return found

    def trainer(self, **changes: Any) -> ForwardBackward:
        """A client."""
        return self.client(**changes)


@asynccontextmanager
async def learning(**limits: Any) -> AsyncIterator[LearningSwarm]:
    async with trio.open_nursery() as nursery:
        swarm = LearningSwarm(nursery, replace(Limits(), **limits))
        yield swarm
        with trio.move_on_after(60):
            await until(lambda: not any(node.handlers for node in swarm.nodes.values() if node.alive))
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.batch_parts, "REQUEST_POSITIONS", TOKENS)  # a row each


def three_hops(swarm: LearningSwarm) -> None:
    for name, start in (("a", 0), ("b", 2), ("c", 4)):
        swarm.learner(name, start, start + 2)


def exact() -> dict[int, Tensor]:
    """The sum over the rows, rounded to float32 once."""
    total: dict[int, Tensor] = {}
    for row in range(ROWS):
        own = gradients_at(STATES[row : row + 1], GRAD[row : row + 1], 0, BLOCKS)
        for block, sites in own.items():
            flat = torch.cat([each.flatten() for each in sites["q_proj"]]).double()
            total[block] = total[block] + flat if block in total else flat
    return {block: values.float() for block, values in total.items()}


def same(found: Mapping[int, Tensor] | None, wanted: Mapping[int, Tensor]) -> bool:
    assert found is not None
    return found.keys() == wanted.keys() and all(torch.equal(found[block], wanted[block]) for block in wanted)


async def backward(swarm: LearningSwarm, **changes: Any) -> Gradients:
    return await swarm.trainer(**changes).backward(STATES, GRAD, 0, BLOCKS, adapter=swarm.use())


def open_sums(swarm: LearningSwarm) -> int:
    return sum(len(each.desk.sums._sums) for name, each in swarm.takers.items() if swarm.nodes[name].alive)


async def test_the_gradients_of_all_rows_come_summed_and_the_sums_are_gone(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        found = await backward(swarm)
        assert torch.equal(found.hidden, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert same(found.adapter, exact())
        assert all(each.dtype == torch.float32 for each in (found.adapter or {}).values())
        assert open_sums(swarm) == 0


async def test_kept_inputs_carry_their_adapter(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        trainer = swarm.trainer()
        output, kept = await trainer.forward_kept(STATES, 0, BLOCKS, adapter=swarm.use())
        assert torch.equal(output, blocks_on(STATES, 0, BLOCKS))
        for _ in range(2):
            assert same((await trainer.backward_kept(kept, GRAD)).adapter, exact())


async def test_step_after_step_needs_no_more_streams_than_a_server_allows(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        trainer, begin = swarm.trainer(), trio.current_time()
        for _ in range(3 * swarm.limits.max_compute_streams_per_peer):
            await trainer.backward(STATES, GRAD, 0, BLOCKS, adapter=swarm.use())
        assert trio.current_time() == begin  # no server has refused a stream
        assert max(Counter(swarm.dialled).values()) <= UNDER_WAY_PER_PEER


async def test_a_backward_without_an_adapter_asks_for_no_sum(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        found = await swarm.trainer().backward(STATES, GRAD, 0, BLOCKS)
        assert found.adapter is None
        assert open_sums(swarm) == 0


async def test_replicas_share_the_requests_and_the_total_has_the_same_bits(autojump_clock: object) -> None:
    async with learning() as swarm:
        for name in "abc":
            swarm.learner(name, 0, BLOCKS, seconds=1.0)
        found = await backward(swarm)
        assert same(found.adapter, exact())
        assert sum(bool(node.span.done) for node in swarm.nodes.values()) > 1


async def test_a_server_that_dies_before_its_sum_is_collected_takes_nothing_with_it(
    autojump_clock: object,
) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        swarm.learner("spare", 2, 4, seconds=1.0)
        trainer = swarm.trainer()
        streams = trainer._streams
        collect, killed = type(streams).collect, False

        async def after_a_death(
            self: Any, peer: PeerId, asked: Collect, size: int
        ) -> tuple[frozenset[int], bytes]:
            nonlocal killed
            if not killed and peer == "b":
                killed = True
                await swarm.kill("b")
            return await collect(self, peer, asked, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(streams), "collect", after_a_death)
            found = await trainer.backward(STATES, GRAD, 0, BLOCKS, adapter=swarm.use())
        assert killed
        assert same(found.adapter, exact())
        assert torch.equal(found.hidden, gradient_of(STATES, GRAD, 0, BLOCKS))


@pytest.mark.parametrize("seed", range(6))
async def test_lost_answers_and_deaths_at_any_time_change_no_bit(seed: int, autojump_clock: object) -> None:
    chance = random.Random(seed)
    async with learning() as swarm:
        for name, start, stop in (
            ("a", 0, 2),
            ("A", 0, 3),
            ("b", 2, 4),
            ("B", 2, 6),
            ("c", 4, 6),
            ("C", 3, 6),
        ):
            node = swarm.learner(name, start, stop, seconds=0.1)
            cast(Any, node.engine).lose = lambda: chance.random() < 0.1

        async def kill_some() -> None:
            for name in chance.sample("abc", 2):
                await trio.sleep(chance.random() * 2)
                await swarm.kill(name)

        swarm.nursery.start_soon(kill_some)
        found = await backward(swarm, give_up_seconds=600.0)
        assert same(found.adapter, exact())
        assert torch.equal(found.hidden, gradient_of(STATES, GRAD, 0, BLOCKS))


async def test_a_server_that_has_forgotten_the_adapter_gets_it_again(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        trainer, use = swarm.trainer(), swarm.use()
        await trainer.forward(STATES, 0, BLOCKS, adapter=use)
        swarm.takers["b"].desk.store.drop(CLIENT, OWN.id)
        found = await trainer.backward(STATES, GRAD, 0, BLOCKS, adapter=use)
        assert same(found.adapter, exact())
        assert swarm.blame.avoided(trio.current_time()) == frozenset()


async def test_a_server_without_room_for_a_sum_is_left_for_one_that_has_room(autojump_clock: object) -> None:
    async with learning() as swarm:
        swarm.learner("small", 0, BLOCKS, sum_capacity=4 * 192)  # of its peer 192: no sum of 384
        swarm.learner("large", 0, BLOCKS, seconds=5.0)
        found = await backward(swarm)
        assert same(found.adapter, exact())
        assert [bool(each) for each in swarm.nodes["small"].span.done] == []


def request(name: bytes = bytes(16), number: int = 0, **spec: Any) -> list[Buffer]:
    asked = SpanSpec("m", "r", Blocks(0, BLOCKS), "float32", OWN.id)
    from tensor_codec.codecs import encode_hidden

    body = encode_hidden(STATES[:1], "fp32"), encode_hidden(GRAD[:1], "fp32")
    run = Run(replace(asked, **spec), 1, "fp32", summed=Summed(name, number))
    return encode_request(Backward(run, *body))


async def test_a_request_that_comes_twice_is_added_once(autojump_clock: object) -> None:
    async with learning() as swarm:
        swarm.learner("a", 0, BLOCKS)
        await swarm.use().bring(PeerId("a"), SpanSpec("m", "r", Blocks(0, BLOCKS), "float32"))
        stream = await swarm.dial("a")
        for _ in range(2):
            await stream.send(request())
            assert await stream.receive(100) is not None
        await stream.send(encode_collect(Collect(bytes(16), "fp32")))
        size = 4 * 2 * HIDDEN * BLOCKS
        part: Any = decode_gradients(await stream.receive(100) or b"", 0, size)
        own = gradients_at(STATES[:1], GRAD[:1], 0, BLOCKS)
        flat = torch.cat([each.flatten() for sites in own.values() for each in sites["q_proj"]])
        assert part.numbers == frozenset({0})
        assert torch.equal(torch.frombuffer(bytearray(part.data), dtype=torch.float32), flat)
        await stream.send(encode_collect(Collect(bytes(16), "fp32")))
        said: Any = decode_gradients(await stream.receive(100) or b"", 0, size)
        assert (said.code, said.message.startswith("no such sum")) == ("refused", True)


async def test_a_sum_without_a_request_is_refused(autojump_clock: object) -> None:
    async with learning() as swarm:
        node = swarm.learner("a", 0, BLOCKS)
        cast(Any, node.engine).lose = lambda: True
        cast(Any, node.engine).learns = False
        await swarm.use().bring(PeerId("a"), SpanSpec("m", "r", Blocks(0, BLOCKS), "float32"))
        stream = await swarm.dial("a")
        await stream.send(request())
        with pytest.raises(PeerGone):
            await stream.receive(100)
        assert open_sums(swarm) == 1  # begun, and without a gradient
        stream = await swarm.dial("a")
        await stream.send(encode_collect(Collect(bytes(16), "fp32")))
        said: Any = decode_gradients(await stream.receive(100) or b"", 0, 4)
        assert said.message.startswith("no such sum")


async def test_a_long_sum_travels_in_frames_that_are_made_one_after_the_other(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensor_codec.messages import gradients

    monkeypatch.setattr(gradients, "GRADIENT_PIECE_BYTES", 4 * HIDDEN)
    async with learning() as swarm:
        three_hops(swarm)
        assert same((await backward(swarm)).adapter, exact())
        assert open_sums(swarm) == 0


async def test_a_sum_of_an_adapter_that_is_not_here_is_refused_and_nothing_is_computed(
    autojump_clock: object,
) -> None:
    async with learning() as swarm:
        node = swarm.learner("a", 0, BLOCKS)
        stream = await swarm.dial("a")
        await stream.send(request())
        said: Any = decode_gradients(await stream.receive(100) or b"", 0, 0)
        assert said.code == "no_adapter"
        assert node.span.done == []
        assert open_sums(swarm) == 0


async def test_forward_with_an_adapter_needs_no_sum(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        output = await swarm.trainer().forward(STATES, 0, BLOCKS, adapter=swarm.use())
        assert torch.equal(output, blocks_on(STATES, 0, BLOCKS))
        assert open_sums(swarm) == 0


async def test_a_failure_that_stays_is_an_error_and_never_a_part_of_the_sum(autojump_clock: object) -> None:
    async with learning() as swarm:
        three_hops(swarm)
        cast(Any, swarm.nodes["b"].engine).lose = lambda: True
        with pytest.raises((PeerFault, Refused)):
            await backward(swarm, give_up_seconds=10.0)


def test_a_forward_names_no_sum() -> None:
    assert b"sum" not in b"".join(
        encode_request(Forward(Run(SpanSpec("m", "r", Blocks(0, 1), "float32", OWN.id), 1, "fp32"), b""))
    )
    assert COMPUTE_PROTOCOL
