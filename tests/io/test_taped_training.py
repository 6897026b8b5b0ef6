"""A server keeps the graph of a forward, and the backward goes back through it: the same bits, less work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from client.request_streams import RequestStreams
from node.model.adapters.low_rank import LowRank, SpanAdapter
from node.serving.training.tapes import MAX_TAPES, TapeBudget, Tapes
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import (
    Backward,
    Forward,
    Output,
    Run,
    decode_output,
    encode_request,
    request_contract,
)
from tensor_codec.span_spec import SpanSpec
from tests.fakes_forward_backward import (
    BLOCKS,
    ToySwarm,
    gradient_of,
    prompted,
    prompted_gradients,
    toy_swarm,
    whole_numbers,
)
from tests.fakes_serving import HIDDEN

ROWS, TOKENS = 3, 4
STATES = whole_numbers(ROWS, TOKENS, HIDDEN)
GRAD = whole_numbers(ROWS, TOKENS, HIDDEN, seed=1, most=4)
PROMPTS = whole_numbers(BLOCKS, 2, HIDDEN, seed=3, most=5)
ROOM = 1 << 30


def three_hops(swarm: ToySwarm, tape_bytes: int = ROOM, spares: str = "") -> None:
    for name, start, stop in [("a", 0, 2), ("b", 2, 4), ("c", 4, 6)]:
        swarm.add(name, start, stop, tape_bytes=tape_bytes)
        if name in spares:
            swarm.add(name.upper(), start, stop, tape_bytes=tape_bytes)
            swarm.nodes[name].record = replace(swarm.nodes[name].record, prefill_seconds_per_token=0.009)


def passes(swarm: ToySwarm) -> dict[str, tuple[bool, ...]]:
    """Of each node's passes, whether with a gradient; then forgotten."""
    found = {name: tuple(done[-1] for done in node.span.done) for name, node in swarm.nodes.items()}
    for node in swarm.nodes.values():
        node.span.done.clear()
    return found


def tapes(swarm: ToySwarm) -> dict[str, int]:
    return {name: len(node.listener.tapes.budget) for name, node in swarm.nodes.items()}


async def test_a_backward_after_its_forward_computes_nothing_again(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        output, kept = await client.forward_kept(STATES, 0, BLOCKS)
        assert passes(swarm) == dict.fromkeys("abc", (True,))
        assert tapes(swarm) == dict.fromkeys("abc", 1)
        found = (await client.backward_kept(kept, GRAD)).hidden
        assert passes(swarm) == dict.fromkeys("abc", ())
        assert tapes(swarm) == dict.fromkeys("abc", 0)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert torch.equal(output, await client.forward(STATES, 0, BLOCKS))
        assert passes(swarm) == dict.fromkeys("abc", (False,))
        assert tapes(swarm) == dict.fromkeys("abc", 0)  # no backward follows


async def test_the_gradient_alone_is_sent_where_the_server_has_the_tape(autojump_clock, monkeypatch):
    async with toy_swarm() as swarm:
        swarm.add("a", tape_bytes=ROOM)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        sizes: list[int] = []
        exchange = client._streams.ask

        async def counted(peer: PeerId, asked: Any) -> Output:
            sizes.append(sum(len(part) for part in asked.parts[1:]))
            return await exchange(peer, asked)

        monkeypatch.setattr(RequestStreams, "ask", lambda self, *given: counted(*given))
        await client.backward_kept(kept, GRAD)
        await client.backward_kept(kept, GRAD)  # without the tape: hidden states too
        assert sizes == [GRAD.nbytes, STATES.nbytes + GRAD.nbytes]


async def test_a_backward_of_hidden_states_goes_forward_once_at_each_server(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        found = (await swarm.client().backward(STATES, GRAD, 0, BLOCKS)).hidden
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert passes(swarm) == dict.fromkeys("abc", (True,))
        assert tapes(swarm) == dict.fromkeys("abc", 0)


async def test_a_second_backward_of_the_same_forward_is_computed_again(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        first = await client.backward_kept(kept, GRAD)
        passes(swarm)
        second = await client.backward_kept(kept, GRAD)
        assert torch.equal(first.hidden, second.hidden)
        assert passes(swarm) == dict.fromkeys("abc", (True,))


async def test_two_backwards_of_one_forward_at_a_time_are_both_right(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", seconds=1, tape_bytes=ROOM)
        client, found = swarm.client(), []
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)

        async def back() -> None:
            found.append((await client.backward_kept(kept, GRAD)).hidden)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back)
            nursery.start_soon(back)
        assert all(torch.equal(each, gradient_of(STATES, GRAD, 0, BLOCKS)) for each in found)
        assert len(found) == 2
        assert swarm.blame.avoided(trio.current_time()) == frozenset()


async def test_a_tape_that_was_dropped_costs_a_forward_and_no_blame(autojump_clock):
    async with toy_swarm(tape_idle_seconds=30.0) as swarm:
        three_hops(swarm)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        passes(swarm)
        await trio.sleep(29)
        assert tapes(swarm) == dict.fromkeys("abc", 1)
        await trio.sleep(2)
        assert tapes(swarm) == dict.fromkeys("abc", 0)
        dialled = len(swarm.dialled)
        found = (await client.backward_kept(kept, GRAD)).hidden
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert passes(swarm) == dict.fromkeys("abc", (True,))
        assert swarm.blame.avoided(trio.current_time()) == frozenset()
        assert set(swarm.dialled[dialled:]) <= set("abc")
        assert all(node.faults == {} for node in swarm.nodes.values())


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_the_death_of_a_server_with_a_tape_costs_its_own_forward_alone(victim, autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, spares=victim)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        await swarm.kill(victim)
        passes(swarm)
        found = (await client.backward_kept(kept, GRAD)).hidden
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert passes(swarm) == dict.fromkeys("abc", ()) | {victim.upper(): (True,)}


async def test_deep_prompts_get_their_gradient_from_the_tape(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        output, kept = await client.forward_kept(STATES, 0, BLOCKS, PROMPTS)
        assert torch.equal(output, prompted(STATES, PROMPTS, 0, BLOCKS))
        passes(swarm)
        found = await client.backward_kept(kept, GRAD)
        expected = prompted_gradients(STATES, GRAD, PROMPTS, 0, BLOCKS)
        assert torch.equal(found.hidden, expected[0])
        assert found.prompts is not None
        assert torch.equal(found.prompts, expected[1])
        assert passes(swarm) == dict.fromkeys("abc", ())


async def test_where_the_memory_has_no_room_for_all_tapes_the_oldest_are_computed_again(autojump_clock):
    hidden = whole_numbers(8, 128, HIDDEN)
    grad = whole_numbers(8, 128, HIDDEN, seed=1, most=4)
    one = 128 * 2 * 100  # bytes of a row's tape
    async with toy_swarm() as swarm:
        for name, start, stop in [("a", 0, 2), ("b", 2, 4), ("c", 4, 6)]:
            swarm.add(name, start, stop, tape_bytes=0 if name == "b" else 128 * 1024 * 5)
        assert one < 128 * 1024 == 2 * 64 * 1024  # the graphs of two blocks take more here
        client = swarm.client()
        _, kept = await client.forward_kept(hidden, 0, BLOCKS)
        assert tapes(swarm) == {"a": 5, "b": 0, "c": 5}
        passes(swarm)
        found = (await client.backward_kept(kept, grad)).hidden
        assert torch.equal(found, gradient_of(hidden, grad, 0, BLOCKS))
        assert {name: len(each) for name, each in passes(swarm).items()} == {"a": 3, "b": 8, "c": 3}


# At the door


TAPE = bytes(range(16))
RUN = Run(SpanSpec("m", "r", Blocks(0, 6), "float32"), ROWS, "fp32", tape=TAPE)
FORWARD = Forward(RUN, encode_hidden(STATES, "fp32"))
BACKWARD = Backward(RUN, b"", encode_hidden(GRAD, "fp32"))


async def ask(stream: Any, request: Forward | Backward) -> Output | Failed:
    await stream.send(encode_request(request))
    frame = await stream.receive(100.0)
    assert frame is not None, "the stream was closed instead of an answer"
    return decode_output(frame, request_contract(request, HIDDEN, 2048), request.run.prompts)


def gradient_in(answer: Output | Failed) -> Tensor:
    assert isinstance(answer, Output)
    return decode_hidden(answer.body, request_contract(BACKWARD, HIDDEN, 2048))


async def test_the_answer_says_whether_the_tape_is_kept(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", tape_bytes=ROOM)
        swarm.add("b")
        for name, taped in (("a", True), ("b", False)):
            stream = await swarm.dial(name)
            answer = await ask(stream, FORWARD)
            assert isinstance(answer, Output)
            assert answer.taped is taped
            plain = await ask(stream, replace(FORWARD, run=replace(RUN, tape=b"")))
            assert isinstance(plain, Output)
            assert not plain.taped
            assert bytes(plain.body) == bytes(answer.body)
            await stream.aclose()


async def test_a_tape_counts_the_copies_of_its_adapter_and_the_inputs_that_they_keep(autojump_clock):
    async def activations(tokens: int) -> float:
        return 1e6

    low = LowRank(torch.zeros(2, 8), torch.zeros(6, 2), 1.0)
    adapter = SpanAdapter("f" * 64, {block: {"q_proj": low} for block in range(6)})
    kept = Tapes(TapeBudget(ROOM, 30.0), activations, lambda: ROOM)
    contract, sizes = request_contract(FORWARD, HIDDEN, 2048), []
    for own in (None, adapter):
        async with kept.tape_for("a", "", FORWARD, contract, own) as tape:
            assert tape is not None
            sizes.append(tape.size)
    copies = 4 * 6 * 2 * (8 + 6)
    assert sizes[1] - sizes[0] == copies + 6 * ROWS * TOKENS * 4 * (8 + 2)


async def test_a_tape_that_is_not_there_is_a_refusal_and_the_stream_goes_on(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", tape_bytes=ROOM)
        stream, other = await swarm.dial("a"), await swarm.dial("a", "somebody else")
        assert isinstance(await ask(stream, FORWARD), Output)
        for asker, request in (
            (stream, replace(BACKWARD, run=replace(RUN, tape=bytes(16)))),
            (other, BACKWARD),
        ):
            answer = await ask(asker, request)
            assert isinstance(answer, Failed)
            assert answer.code == "no_tape"
        assert torch.equal(gradient_in(await ask(stream, BACKWARD)), gradient_of(STATES, GRAD, 0, 6))
        assert node.faults == {}
        await stream.aclose()
        await other.aclose()


@pytest.mark.parametrize(
    ("changes", "grad"),
    [
        ({"batch": 1}, GRAD),
        ({}, GRAD[:, :3]),
        ({"prompts": 1}, GRAD),
        ({"spec": SpanSpec("m", "r", Blocks(0, 5), "float32")}, GRAD),
    ],
)
async def test_a_backward_that_does_not_fit_to_its_tape_is_a_fault_with_the_numbers(
    changes, grad, autojump_clock
):
    async with toy_swarm() as swarm:
        node = swarm.add("a", tape_bytes=ROOM)
        stream = await swarm.dial("a")
        assert isinstance(await ask(stream, FORWARD), Output)
        answer = await ask(stream, Backward(replace(RUN, **changes), b"", encode_hidden(grad, "fp32")))
        assert isinstance(answer, Failed)
        assert answer.code == "message"
        assert "tape of another forward" in answer.message
        assert node.span.done == [(ROWS, 0, 6, True)]
        assert sum(node.faults.values()) == 1


async def test_a_gradient_with_nan_is_refused_and_the_tape_is_gone(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", tape_bytes=ROOM)
        stream = await swarm.dial("a")
        assert isinstance(await ask(stream, FORWARD), Output)
        bad = bytearray(encode_hidden(GRAD, "fp32"))
        bad[:4] = b"\xff\xff\xff\x7f"
        answer = await ask(stream, replace(BACKWARD, grad=bytes(bad)))
        assert isinstance(answer, Failed)
        assert answer.code == "bad_values"
        assert len(node.listener.tapes.budget) == 0


async def test_a_forward_with_values_that_must_not_leave_keeps_no_tape(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", tape_bytes=ROOM)
        node.span.poison = lambda hidden: hidden * torch.inf
        stream = await swarm.dial("a")
        answer = await ask(stream, FORWARD)
        assert isinstance(answer, Failed)
        assert len(node.listener.tapes.budget) == 0
        await stream.aclose()


async def test_a_client_that_leaves_during_its_forward_keeps_no_memory(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=5, tape_bytes=ROOM)
        stream = await swarm.dial("a")
        await stream.send(encode_request(FORWARD))
        await trio.sleep(1)
        assert node.listener.tapes.budget.used > 0
        await stream.reset()
        await trio.sleep(1)
        assert node.listener.tapes.budget.used == 0


async def test_a_refused_backward_leaves_the_tape_for_the_next_one(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", tape_bytes=ROOM)
        stream = await swarm.dial("a")
        assert isinstance(await ask(stream, FORWARD), Output)
        node.engine.most = 0
        answer = await ask(stream, BACKWARD)
        assert isinstance(answer, Failed)
        assert answer.code == "too_many"
        node.engine.most = 16
        assert torch.equal(gradient_in(await ask(stream, BACKWARD)), gradient_of(STATES, GRAD, 0, 6))
        assert node.span.done == [(ROWS, 0, 6, True)]
        await stream.aclose()


async def test_many_short_tapes_count_as_a_part_of_the_memory_each(autojump_clock):
    async with toy_swarm(max_compute_streams=8) as swarm:
        node = swarm.add("a", tape_bytes=ROOM)
        stream = await swarm.dial("a")
        for number in range(MAX_TAPES + 3):
            tape = number.to_bytes(16, "big")
            assert isinstance(await ask(stream, replace(FORWARD, run=replace(RUN, tape=tape))), Output)
        assert len(node.listener.tapes.budget) == MAX_TAPES
        await stream.aclose()
