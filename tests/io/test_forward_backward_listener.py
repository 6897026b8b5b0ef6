"""What a node answers to forward and backward, and to whatever else comes on such a stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from node.model.blocks import parts
from node.model.blocks.forward_backward import Activations
from node.serving.forward_backward import HeldActivations
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import FrameError, MessageError, PeerGone, SlowPeer
from tensor_codec.frame import encode_frame
from tensor_codec.limits import Limits
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
from tests.fakes_forward_backward import blocks_on, gradient_of, toy_swarm, whole_numbers
from tests.fakes_serving import CLIENT, HIDDEN, FakeCompute, with_changes

RUN = Run(SpanSpec("m", "r", Blocks(0, 6), "float32"), 2, "fp32")
LIMITS = Limits()


def forward_of(hidden: Tensor, **changes) -> Forward:
    run = with_changes(RUN, batch=hidden.shape[0], **changes)
    return Forward(run, encode_hidden(hidden, run.codec))


def backward_of(hidden: Tensor, grad: Tensor, **changes) -> Backward:
    run = with_changes(RUN, batch=hidden.shape[0], **changes)
    return Backward(run, encode_hidden(hidden, run.codec), encode_hidden(grad, run.codec))


async def ask(stream, request) -> Any:  # a Tensor, or Failed
    """Send a request and read the answer."""
    await stream.send(encode_request(request))
    return await answer_to(stream, request)


async def answer_to(stream, request) -> Any:  # a Tensor, or Failed
    contract = request_contract(request, HIDDEN, LIMITS.max_step_tokens)
    frame = await stream.receive(100.0)
    assert frame is not None, "the stream was closed instead of an answer"
    message = decode_output(frame, contract)
    return decode_hidden(message.body, contract) if isinstance(message, Output) else message


HIDDEN_STATES = whole_numbers(2, 5, HIDDEN)
GRAD = whole_numbers(2, 5, HIDDEN, seed=1, most=5)


async def test_forward_and_backward_are_answered_one_after_the_other_on_one_stream(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        stream = await swarm.dial("a")
        for start, stop in [(0, 6), (2, 3), (1, 5)]:
            found = await ask(stream, forward_of(HIDDEN_STATES, start=start, stop=stop))
            assert torch.equal(found, blocks_on(HIDDEN_STATES, start, stop))
            found = await ask(stream, backward_of(HIDDEN_STATES, GRAD, start=start, stop=stop))
            assert torch.equal(found, gradient_of(HIDDEN_STATES, GRAD, start, stop))
        assert node.engine.asked == [(2, 5)] * 6
        assert node.faults == {}
        await stream.aclose()


async def test_a_backward_holds_the_activations_that_there_is_memory_for(autojump_clock, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", 20)  # two blocks of two rows of five positions
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        stream = await swarm.dial("a")
        asked = []
        rooms = [0, 40, 60]

        async def held(tokens: int, more: float) -> int:
            asked.append(tokens)
            return rooms[len(asked) - 1]

        node.listener.held = held
        for passes in (5, 4, 3):  # of three parts two run forward twice, one, none
            node.span.done.clear()
            found = await ask(stream, backward_of(HIDDEN_STATES, GRAD))
            assert torch.equal(found, gradient_of(HIDDEN_STATES, GRAD, 0, 6))
            assert len(node.span.done) == passes
        await ask(stream, forward_of(HIDDEN_STATES))
        assert asked == [5, 5, 5]  # a forward holds none
        await stream.aclose()


@pytest.mark.parametrize(
    ("most", "free", "positions"),
    [(0, 10**9, 10), (500, 10**9, 15), (500, 10**3 // 2, 15), (500, 200, 12), (10**9, 0, 10)],
)
async def test_activations_are_bounded_by_a_plan_and_by_the_memory_that_is_free_now(
    most, free, positions, autojump_clock
):
    measured = []

    def measure(base: float, per_token: float) -> Activations:
        measured.append(base)
        return Activations(base, per_token)

    kinds = [partial(measure, 80.0, 1.0), partial(measure, 40.0, 2.0)]
    held = HeldActivations(1000, most, lambda: free, FakeCompute(), lambda: kinds)
    for _ in range(2):
        assert await held.positions(10, 0.0) == positions  # of 100 bytes each
    assert await held.positions(10, 100.0) == positions // 2  # with an adapter
    assert measured == [80.0, 40.0]


async def test_the_answer_says_how_long_it_was_held_and_computed(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", seconds=0.25)
        stream = await swarm.dial("a")
        request = forward_of(HIDDEN_STATES)
        await stream.send(encode_request(request))
        frame = await stream.receive(10.0)
        output = decode_output(frame, request_contract(request, HIDDEN, 100))
        ((held, computing),) = output.timings
        assert computing == 250_000
        assert held >= 0
        await stream.aclose()


async def test_bf16_comes_and_goes_as_bf16(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", dtype="bfloat16")
        stream = await swarm.dial("a")
        found = await ask(stream, forward_of(HIDDEN_STATES, dtype="bfloat16", codec="bf16"))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, blocks_on(HIDDEN_STATES.bfloat16(), 0, 6))
        await stream.aclose()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "another revision": ({"revision": "q"}, "wrong_revision", "revision q of m was asked for, r of m is"),
    "another dtype": ({"dtype": "bfloat16"}, "wrong_revision", "dtype bfloat16 was asked for, float32 is"),
    "blocks before the span": ({"start": 0}, "wrong_revision", "blocks 0:5 were asked for, 1:5 are"),
    "blocks behind the span": ({"stop": 6}, "wrong_revision", "blocks 1:6 were asked for, 1:5 are"),
    "an adapter": ({"adapter": "x"}, "wrong_revision", "adapter x was asked for, none is"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_not_served_is_refused_and_the_stream_goes_on(what, autojump_clock):
    changes, code, words = REFUSED[what]
    async with toy_swarm() as swarm:
        node = swarm.add("a", 1, 5)
        stream = await swarm.dial("a")
        failed = await ask(stream, forward_of(HIDDEN_STATES, **({"start": 1, "stop": 5} | changes)))
        assert (failed.code, failed.message[: len(words)]) == (code, words)
        good = forward_of(HIDDEN_STATES, start=1, stop=5)
        assert torch.equal(await ask(stream, good), blocks_on(HIDDEN_STATES, 1, 5))
        assert node.faults == {}
        assert len(node.engine.asked) == 1
        await stream.aclose()


async def test_a_peer_whose_requests_are_refused_may_send_a_few_of_them_and_then_so_many_bytes_a_second(
    autojump_clock,
):
    limits = Limits(refused_compute_bytes_per_second=1000, refused_compute_bytes_burst=5000)
    async with toy_swarm(limits) as swarm:
        swarm.add("a", 1, 5)
        streams = [await swarm.dial("a"), await swarm.dial("a")]
        refused = forward_of(whole_numbers(1, 30, HIDDEN), start=0)
        size = sum(len(part) for part in encode_request(refused))
        began = trio.current_time()
        for number in range(20):
            failed = await ask(streams[number % 2], refused)
            assert failed.code == "wrong_revision"
        seconds = trio.current_time() - began
        assert seconds == pytest.approx((19 * size - 5000) / 1000, rel=0.2)
        good = forward_of(HIDDEN_STATES, start=1, stop=5)
        assert torch.equal(await ask(streams[0], good), blocks_on(HIDDEN_STATES, 1, 5))
        for stream in streams:
            await stream.aclose()


async def test_a_model_of_another_size_is_refused_by_its_revision_and_not_by_its_size(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        stream = await swarm.dial("a")
        await stream.send(encode_request(Forward(with_changes(RUN, revision="q"), bytes(2 * 28))))
        message = decode_output(
            await stream.receive(10.0), request_contract(forward_of(HIDDEN_STATES), HIDDEN, 10)
        )
        assert message.code == "wrong_revision"
        assert node.faults == {}
        await stream.aclose()


async def test_more_positions_than_the_model_has_are_refused(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a")
        stream = await swarm.dial("a")
        failed = await ask(stream, forward_of(whole_numbers(1, 513, HIDDEN)))
        assert (failed.code, failed.message) == ("refused", "513 positions were sent, the model has 512")
        await stream.aclose()


HUGE = whole_numbers(5, 512, HIDDEN)  # 2,560 positions, 2,048 are allowed
UNFIT: dict[str, tuple[Callable[[], Forward | Backward], str]] = {
    "half a row": (lambda: Forward(RUN, bytes(2 * HIDDEN * 4 + 4)), "message"),
    "nothing": (lambda: Forward(RUN, b""), "message"),
    "too many positions": (lambda: forward_of(HUGE), "message"),
    "more rows than a request may have": (
        lambda: Forward(replace(RUN, batch=4096), bytes(4096 * 16)),
        "message",
    ),
    "NaN": (lambda: Forward(RUN, raw(HIDDEN_STATES * math.nan)), "bad_values"),
    "infinity": (lambda: Forward(RUN, raw(HIDDEN_STATES + math.inf)), "bad_values"),
    "NaN in the gradient": (lambda: Backward(RUN, raw(HIDDEN_STATES), raw(GRAD * math.nan)), "bad_values"),
}


def raw(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("what", UNFIT)
async def test_what_does_not_fit_is_answered_blamed_and_ends_the_stream(what, autojump_clock):
    request, code = UNFIT[what]
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        stream = await swarm.dial("a")
        await stream.send(encode_request(request()))
        frame = await stream.receive(10.0)
        message = decode_output(frame, request_contract(forward_of(HIDDEN_STATES), HIDDEN, 10))
        assert message.code == code
        assert await stream.receive(10.0) is None
        kind = "BadResult" if code == "bad_values" else "MessageError"
        assert node.faults == {f"client {kind}": 1}
        assert node.span.done == []  # torch has computed nothing


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (encode_frame(b"garbage"), MessageError),
        (encode_frame(b""), MessageError),
        (b"\xff\xff\xff\xff", FrameError),
    ],
)
async def test_bytes_that_are_no_request_reset_the_stream_without_an_answer(bad, kind, autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        stream = await swarm.dial("a")
        await stream.send_bytes(bad)
        with pytest.raises(PeerGone):
            await stream.receive(10.0)
        assert node.faults == {f"client {kind.__name__}": 1}


async def test_a_second_request_before_the_answer_ends_the_stream(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=1)
        stream = await swarm.dial("a")
        await stream.send(encode_request(forward_of(HIDDEN_STATES)))
        failed = await ask(stream, forward_of(HIDDEN_STATES))
        assert (failed.code, node.faults) == ("protocol", {"client RemoteProtocolError": 1})
        assert await stream.receive(10.0) is None
        assert node.span.done == []


async def test_values_that_our_own_blocks_spoil_are_said_and_nobody_is_blamed(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        node.span.poison = lambda hidden: hidden * math.nan
        stream = await swarm.dial("a")
        failed = await ask(stream, forward_of(HIDDEN_STATES))
        assert (failed.code, failed.message[:26]) == ("bad_values", "forward through blocks 0:6")
        failed = await ask(stream, backward_of(HIDDEN_STATES, GRAD))
        assert (failed.code, failed.message[:27]) == ("bad_values", "backward through blocks 0:6")
        node.span.poison = lambda hidden: hidden
        assert torch.equal(await ask(stream, forward_of(HIDDEN_STATES)), blocks_on(HIDDEN_STATES, 0, 6))
        assert node.faults == {}
        await stream.aclose()


async def test_a_full_queue_refuses_and_the_stream_goes_on(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        node.engine.most = 0
        stream = await swarm.dial("a")
        failed = await ask(stream, forward_of(HIDDEN_STATES))
        assert (failed.code, failed.retry_after_seconds) == ("too_many", 1.0)
        node.engine.most = 1
        assert torch.equal(await ask(stream, forward_of(HIDDEN_STATES)), blocks_on(HIDDEN_STATES, 0, 6))
        await stream.aclose()


async def test_a_peer_may_have_so_many_streams_and_all_peers_together_so_many(autojump_clock):
    async with toy_swarm(max_compute_streams_per_peer=2, max_compute_streams=3) as swarm:
        node = swarm.add("a")
        request = forward_of(HIDDEN_STATES)
        held = [await swarm.dial("a", name) for name in ("one", "one", "two")]
        await trio.testing.wait_all_tasks_blocked()
        for name, words in (("one", "2 such streams of yours"), ("three", "3 such streams are open")):
            failed = await answer_to(await swarm.dial("a", name), request)
            assert (failed.code, failed.message[: len(words)]) == ("too_many", words)
            assert failed.retry_after_seconds
        await held[0].aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(await ask(await swarm.dial("a", "three"), request), Tensor)
        assert node.faults == {}


async def test_where_all_streams_are_taken_the_address_with_the_most_gives_one_to_another(autojump_clock):
    async with toy_swarm(max_compute_streams_per_peer=2, max_compute_streams=6) as swarm:
        node = swarm.add("a", seconds=1)
        request = forward_of(HIDDEN_STATES)
        crowd = [await swarm.dial("a", f"id {number // 2}", prefix="192.0.2.1/32") for number in range(6)]
        await trio.testing.wait_all_tasks_blocked()
        await crowd[5].send(encode_request(request))
        await trio.testing.wait_all_tasks_blocked()
        near = await swarm.dial("a", "one more", prefix="192.0.2.1/32")
        assert (await answer_to(near, request)).code == "too_many"
        others = [await swarm.dial("a", "other", prefix="198.51.100.1/32") for _ in range(2)]
        for stream in others:
            assert isinstance(await ask(stream, request), Tensor)
        assert [await stream.receive(1.0) for stream in crowd[3:5]] == [None, None], "the last that were idle"
        assert isinstance(await answer_to(crowd[5], request), Tensor)
        assert isinstance(await ask(crowd[0], request), Tensor)
        assert node.faults == {}
        for stream in (*crowd, *others, near):
            await stream.aclose()


async def test_a_stream_is_closed_when_it_says_nothing_at_first_or_later(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a")
        stream = await swarm.dial("a")
        began = trio.current_time()
        assert await stream.receive(100.0) is None
        assert trio.current_time() - began == pytest.approx(LIMITS.frame_start_seconds)
        stream = await swarm.dial("a")
        await ask(stream, forward_of(HIDDEN_STATES))
        began = trio.current_time()
        assert await stream.receive(100.0) is None
        assert trio.current_time() - began == pytest.approx(LIMITS.compute_idle_seconds)


async def test_a_frame_that_begins_while_the_stream_may_be_idle_may_go_on(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a")
        stream = await swarm.dial("a")
        request = forward_of(HIDDEN_STATES)
        frame = encode_frame(encode_request(request))
        await trio.sleep(LIMITS.frame_start_seconds - 0.5)
        await stream.send_bytes(frame[:3])
        await trio.sleep(1.0)
        await stream.send_bytes(frame[3:])
        assert torch.equal(await answer_to(stream, request), blocks_on(HIDDEN_STATES, 0, 6))
        await stream.aclose()


@pytest.mark.parametrize("leave", ["aclose", "reset"])
@pytest.mark.parametrize("after", [0.5, 1.5])
async def test_a_client_that_leaves_cancels_its_request(leave, after, autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=1)
        other = await swarm.dial("a", "other")
        stream = await swarm.dial("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, other, forward_of(HIDDEN_STATES))
            await trio.sleep(0.1)
            await stream.send(encode_request(forward_of(HIDDEN_STATES[:1])))
            await trio.sleep(after)
            await getattr(stream, leave)()
            await trio.testing.wait_all_tasks_blocked()
            assert len(node.listener._streams) == 1  # the other one
        await trio.sleep(5)
        assert node.span.done == [(2, 0, 6, False)]  # the cancelled one was never begun
        assert node.faults == {}
        await other.aclose()


async def test_a_request_behind_one_that_drips_is_blamed_as_slow(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=1000)
        ours, theirs = framed_pair()
        swarm.nursery.start_soon(swarm._handle, node, theirs)
        await ours.send(encode_request(forward_of(HIDDEN_STATES)))
        await ours._stream.send_all(b"\x00\x00")
        await trio.sleep(LIMITS.frame_start_seconds + 1)
        assert node.faults == {f"client {SlowPeer.__name__}": 1}


def framed_pair():
    from tests.fakes import memory_framed_pair

    return memory_framed_pair(peers=(CLIENT, PeerId("a")))


async def test_a_node_that_drains_finishes_what_it_has_and_takes_nothing_more(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=2)
        idle, busy = await swarm.dial("a"), await swarm.dial("a")
        await ask(idle, forward_of(HIDDEN_STATES))
        request = forward_of(HIDDEN_STATES)
        await busy.send(encode_request(request))
        await trio.sleep(0.5)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.listener.drain)
            assert await idle.receive(10.0) is None
            assert trio.current_time() == began
            assert torch.equal(await answer_to(busy, request), blocks_on(HIDDEN_STATES, 0, 6))
            assert await busy.receive(10.0) is None
        assert trio.current_time() - began < 2
        failed = await answer_to(await swarm.dial("a"), request)
        assert failed.code == "draining"
        await swarm.client_streams[-1].aclose()


async def test_draining_ends_within_its_time_whatever_is_computed(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=1000)
        stream = await swarm.dial("a")
        await stream.send(encode_request(forward_of(HIDDEN_STATES)))
        await trio.sleep(0.5)
        began = trio.current_time()
        await node.listener.drain()
        assert trio.current_time() - began == pytest.approx(LIMITS.drain_seconds)
        assert await stream.receive(10.0) is None
