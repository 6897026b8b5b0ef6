"""Forward and backward as a client has them: over several hops, in parts, whatever fails on the way."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import trio
import trio.testing

from client.batch_parts import REQUEST_POSITIONS
from client.forward_backward import UNDER_WAY, UNDER_WAY_PER_PEER
from routing.chains.search import NoChain
from routing.names import PeerId
from tensor_codec.errors import (
    BadResult,
    Draining,
    MessageError,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
    TooManyStreams,
    WrongRevision,
)
from tensor_codec.limits import Limits
from tensor_codec.messages.forward_backward import Output, encode_output
from tests.fakes import memory_framed_pair
from tests.fakes_forward_backward import BLOCKS, ToySwarm, blocks_on, gradient_of, toy_swarm, whole_numbers
from tests.fakes_serving import CLIENT, HIDDEN

ROWS, TOKENS = 3, 4
STATES = whole_numbers(ROWS, TOKENS, HIDDEN)
GRAD = whole_numbers(ROWS, TOKENS, HIDDEN, seed=1, most=4)


def three_hops(swarm: ToySwarm, seconds: float = 0.0, replicas: str = "") -> None:
    """a, b and c in a row; for each letter in `replicas` a second one, of the same blocks, in capitals."""
    for name, start, stop in [("a", 0, 2), ("b", 2, 4), ("c", 4, 6)]:
        swarm.add(name, start, stop, seconds=seconds)
        if name in replicas:
            swarm.add(name.upper(), start, stop, seconds=seconds)
            # the first choice is the one in small letters
            swarm.nodes[name].record = replace(swarm.nodes[name].record, prefill_seconds_per_token=0.009)


def done(swarm: ToySwarm) -> dict[str, tuple[int, int]]:
    """How many passes each node has done: without and with a gradient."""
    counts = {}
    for name, node in swarm.nodes.items():
        backward = sum(with_grad for *_, with_grad in node.span.done)
        counts[name] = (len(node.span.done) - backward, backward)
    return counts


def blamed(swarm: ToySwarm) -> dict[str, float]:
    return {str(peer): count for peer, count in swarm.blame._faults.items()}


async def test_forward_and_backward_over_three_hops_are_those_of_the_whole_model(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        assert torch.equal(await client.forward(STATES, 0, BLOCKS), blocks_on(STATES, 0, BLOCKS))
        assert done(swarm) == {"a": (1, 0), "b": (1, 0), "c": (1, 0)}
        found, *_ = await client.backward(STATES, GRAD, 0, BLOCKS)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        # The last hop is not asked for a forward that nobody needs.
        assert done(swarm) == {"a": (2, 1), "b": (2, 1), "c": (1, 1)}
        assert swarm.dialled == ["a", "b", "c"]  # streams are used again
        assert all(node.faults == {} for node in swarm.nodes.values())


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (3, 4), (1, 5), (2, 6), (5, 6)])
async def test_any_run_of_blocks(start, stop, autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        assert torch.equal(await client.forward(STATES, start, stop), blocks_on(STATES, start, stop))
        found, *_ = await client.backward(STATES, GRAD, start, stop)
        assert torch.equal(found, gradient_of(STATES, GRAD, start, stop))


async def test_a_large_batch_goes_in_parts_of_whole_rows_and_comes_back_in_order(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        rows, tokens = 23, 100
        hidden, grad = whole_numbers(rows, tokens, HIDDEN), whole_numbers(rows, tokens, HIDDEN, most=2)
        client = swarm.client()
        assert torch.equal(await client.forward(hidden, 0, 6), blocks_on(hidden, 0, 6))
        small = [(2, 100), (2, 100), (1, 100)] * 4 + [(2, 100), (1, 100)]
        assert swarm.nodes["a"].engine.asked == small
        found, *_ = await client.backward(hidden, grad, 4, 6)
        assert torch.equal(found, gradient_of(hidden, grad, 4, 6))
        assert swarm.nodes["c"].engine.asked[-5:] == [(5, 100)] * 4 + [(3, 100)]
        assert swarm.nodes["b"].engine.asked == small


@pytest.mark.parametrize("tokens", [REQUEST_POSITIONS - 1, REQUEST_POSITIONS])
async def test_a_row_as_long_as_a_request_goes_alone(tokens, autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a")
        hidden = whole_numbers(2, tokens, HIDDEN)
        assert torch.equal(await swarm.client().forward(hidden, 0, 6), blocks_on(hidden, 0, 6))
        assert swarm.nodes["a"].engine.asked == [(1, tokens)] * 2


async def test_rows_that_fit_no_request_are_refused_with_the_numbers(autojump_clock):
    # 300 positions of 4 values at 4 bytes: 4,800 bytes, beside a header of 4 KiB and as much to spare.
    async with toy_swarm(max_frame_bytes=8192 + 4800) as swarm:
        node = swarm.add("a")
        client = swarm.client(codec="fp32")
        fits, longer = whole_numbers(1, 300, HIDDEN), whole_numbers(1, 301, HIDDEN)
        assert torch.equal(await client.forward(fits, 0, 6), blocks_on(fits, 0, 6))
        for call, words in [
            (client.forward(longer, 0, 6), "rows of 301 positions, 300 fit into one request of 1 x 4 values"),
            (client.backward(fits, fits, 0, 6), "rows of 300 positions, 150 fit into one request of 2 x 4"),
        ]:
            with pytest.raises(ValueError, match=words):
                await call
        # Where each hop has its own codec the same row may fit: it does at two bytes, and not at four.
        client = swarm.client()
        with pytest.raises(ValueError, match="301 positions for a float32 hop, 300 fit into one request"):
            await client.forward(longer, 0, 6)
        assert len(node.engine.asked) == 1
        assert blamed(swarm) == {}
    async with toy_swarm(max_step_tokens=64) as swarm:
        swarm.add("a")
        with pytest.raises(ValueError, match="rows of 65 positions, 64 fit into one request"):
            await swarm.client().forward(whole_numbers(1, 65, HIDDEN), 0, 6)


WRONG = {
    "no batch": (STATES[0], None, 0, 6, r"hidden is \[4, 4\], \[batch, tokens, 4\] is needed"),
    "another size": (STATES[..., :3], None, 0, 6, r"hidden is \[3, 4, 3\]"),
    "no rows": (STATES[:0], None, 0, 6, r"hidden is \[0, 4, 4\]"),
    "no positions": (STATES[:, :0], None, 0, 6, r"hidden is \[3, 0, 4\]"),
    "integers": (STATES.long(), None, 0, 6, "hidden holds torch.int64, a float dtype"),
    "NaN": (STATES / 0 * 0, None, 0, 6, "hidden holds NaN or infinity"),
    "too large for float32": (STATES.double() * 1e300, None, 0, 6, "hidden holds NaN or infinity"),
    "too long": (whole_numbers(1, 513, HIDDEN), None, 0, 6, "rows of 513 positions, the model has 512"),
    "a gradient of another shape": (STATES, GRAD[:2], 0, 6, r"grad is \[2, 4, 4\] and hidden \[3, 4, 4\]"),
    "a gradient of infinity": (STATES, GRAD + math.inf, 0, 6, "grad holds NaN or infinity"),
    "no blocks": (STATES, None, 3, 3, "blocks 3:3 of a model that has 0:6"),
    "blocks beyond the model": (STATES, None, 0, 7, "blocks 0:7 of a model"),
    "blocks before the model": (STATES, None, -1, 6, "blocks -1:6 of a model"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_cannot_be_is_an_error_of_the_caller_and_is_not_sent(what, autojump_clock):
    hidden, grad, start, stop, words = WRONG[what]
    async with toy_swarm() as swarm:
        swarm.add("a")
        client = swarm.client()
        with pytest.raises(ValueError, match=words):
            await (
                client.forward(hidden, start, stop)
                if grad is None
                else client.backward(hidden, grad, start, stop)
            )
        assert swarm.dialled == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
async def test_any_float_dtype_may_come_and_the_answer_has_that_of_the_wire(dtype, autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        given = STATES.to(dtype).requires_grad_()
        found = await swarm.client().forward(given, 0, 6)
        assert torch.equal(found, blocks_on(STATES, 0, 6))
        assert (found.dtype, found.requires_grad) == (torch.float32, False)


async def test_each_hop_has_the_codec_that_loses_nothing_of_what_it_computes(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 2)
        swarm.add("b", 2, 4, dtype="bfloat16")
        client = swarm.client()
        middle = blocks_on(STATES, 0, 2)
        found = await client.forward(STATES, 0, 4)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, blocks_on(middle.bfloat16(), 2, 4))
        found, *_ = await client.backward(STATES, GRAD, 0, 4)
        assert found.dtype == torch.float32  # of the first hop
        behind = gradient_of(middle.bfloat16(), GRAD.bfloat16(), 2, 4)
        assert torch.equal(found, gradient_of(STATES, behind.float(), 0, 2))
        assert (await swarm.client(codec="fp32").forward(STATES, 0, 4)).dtype == torch.float32


@pytest.mark.parametrize("codec", ["auto", "exact", "fast"])
async def test_training_loses_nothing_whatever_sessions_may_lose(codec, autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client(codec=codec)
        finer = STATES + 2.0**-12  # which neither bf16 nor int8o keeps
        assert torch.equal(await client.forward(finer, 0, 6), blocks_on(finer, 0, 6))
        gradient, *_ = await client.backward(finer, GRAD + 2.0**-12, 0, 6)
        assert torch.equal(gradient, gradient_of(finer, GRAD + 2.0**-12, 0, 6))


async def test_a_hop_of_another_dtype_that_replaces_one_is_asked_in_its_own_codec(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 2)
        swarm.add("b", 2, 4, dtype="bfloat16")
        client = swarm.client()
        assert (await client.forward(STATES, 0, 4)).dtype == torch.bfloat16
        swarm.add("c", 2, 4)
        await swarm.kill("b")
        found = await client.forward(STATES, 0, 4)
        assert found.dtype == torch.float32
        assert torch.equal(found, blocks_on(STATES, 0, 4))
        gradient, *_ = await client.backward(STATES, GRAD, 0, 4)
        assert torch.equal(gradient, gradient_of(STATES, GRAD, 0, 4))


@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("at", [0.5, 1.5, 2.5, 3.5, 4.5])
async def test_a_server_that_dies_at_any_moment_of_backward_is_replaced_and_the_gradient_is_the_same(
    victim, at, autojump_clock
):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1, replicas="abc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, at, swarm.kill, victim)
            found, *_ = await swarm.client().backward(STATES, GRAD, 0, BLOCKS)
            assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
            # Undisturbed it takes two forwards and three backwards; only what was lost is done again.
            # With the last seconds of it gone the dead server may not be needed any more.
            assert trio.current_time() <= 6.6
        passes = done(swarm)
        for name in {"a", "b", "c"} - {victim}:
            assert passes[name] == ({"a": 1, "b": 1, "c": 0}[name], 1)
            assert passes[name.upper()] == (0, 0)


def slow(swarm, name):
    """Let a node say that it is so slow that any two others are better."""
    node = swarm.nodes[name]
    node.record = replace(node.record, prefill_seconds_per_token=1.0)


async def test_what_replaces_a_server_makes_the_way_no_longer_than_allowed(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.most_hops = 2
        swarm.add("a", 0, 2)
        for name, start, stop in (("B", 2, 6), ("c", 2, 4), ("d", 4, 6), ("e", 2, 6)):
            swarm.add(name, start, stop, seconds=1)
        slow(swarm, "e")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 0.5, swarm.kill, "B")
            found = await swarm.client().forward(STATES, 0, BLOCKS)
        assert torch.equal(found, blocks_on(STATES, 0, BLOCKS))
        assert swarm.dialled == ["a", "B", "e"]


async def test_what_replaces_a_server_in_backward_makes_the_way_no_longer_either(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.most_hops = 2
        for name, start, stop in (("A", 0, 3), ("b", 3, 6), ("c", 0, 2), ("d", 2, 3), ("e", 0, 3)):
            swarm.add(name, start, stop, seconds=1)
        slow(swarm, "e")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 2.5, swarm.kill, "A")
            found, *_ = await swarm.client().backward(STATES, GRAD, 0, BLOCKS)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert set(swarm.dialled) == {"A", "b", "e"}


async def later(seconds, function, *args):
    await trio.sleep(seconds)
    await function(*args)


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_a_server_that_dies_in_forward_is_replaced_and_the_hops_before_it_are_not_asked_again(
    victim, autojump_clock
):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1, replicas="abc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, {"a": 0.5, "b": 1.5, "c": 2.5}[victim], swarm.kill, victim)
            found = await swarm.client().forward(STATES, 0, BLOCKS)
        assert torch.equal(found, blocks_on(STATES, 0, BLOCKS))
        expected = dict.fromkeys("abc", (1, 0)) | dict.fromkeys("ABC", (0, 0))
        assert done(swarm) == expected | {victim: (0, 0), victim.upper(): (1, 0)}
        assert blamed(swarm) == {victim: 1}


async def test_blocks_that_one_server_held_may_be_done_by_several_others(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("whole", seconds=1)
        swarm.nodes["whole"].record = replace(swarm.nodes["whole"].record, prefill_seconds_per_token=0.005)
        three_hops(swarm, seconds=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 0.5, swarm.kill, "whole")
            found, *_ = await swarm.client().backward(STATES, GRAD, 0, BLOCKS)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert done(swarm) == {"whole": (0, 0), "a": (1, 1), "b": (1, 1), "c": (0, 1)}


async def test_two_servers_that_die_one_after_the_other_are_both_replaced(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1, replicas="abc")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 2.5, swarm.kill, "c")
            nursery.start_soon(later, 4.0, swarm.kill, "a")
            found, *_ = await swarm.client().backward(STATES, GRAD, 0, BLOCKS)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert blamed(swarm) == {"a": 1, "c": 1}


async def test_a_death_that_many_requests_meet_is_one_fault(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1, replicas="a")
        hidden = whole_numbers(12, 256, HIDDEN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 0.5, swarm.kill, "a")
            found = await swarm.client().forward(hidden, 0, 2)
        assert torch.equal(found, blocks_on(hidden, 0, 2))
        assert blamed(swarm) == {"a": 1}


LIES = {
    "NaN": (lambda size: encode_output(Output(b"\x00\x00\xc0\x7f" * (size // 4))), BadResult),
    "too little": (lambda size: encode_output(Output(bytes(size - 16))), MessageError),
    "too much": (lambda size: encode_output(Output(bytes(size + 16))), MessageError),
    "garbage": (lambda size: b"garbage", MessageError),
    "nothing": (lambda size: b"", MessageError),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_server_that_lies_is_named_or_replaced(lie, autojump_clock):
    answer, kind = LIES[lie]

    async def serve(stream):
        while await stream.receive() is not None:
            await stream.send(answer(ROWS * TOKENS * HIDDEN * 4))

    async with toy_swarm() as swarm:
        three_hops(swarm)
        swarm.nodes["b"].listener = serving(swarm.nodes["b"].listener, serve)
        with pytest.raises(kind) as caught:
            await swarm.client(give_up_seconds=3).forward(STATES, 0, 6)
        assert caught.value.peer == "b"
        swarm.add("B", 2, 4)
        found = await swarm.client(give_up_seconds=3).forward(STATES, 0, 6)
        assert torch.equal(found, blocks_on(STATES, 0, 6))
        await swarm.kill("b")


class Serving:
    """Stands in for a listener, with another way to serve."""

    def __init__(self, honest, serve) -> None:
        self._honest = honest
        self.serve = serve

    def __getattr__(self, name):
        return getattr(self._honest, name)


def serving(honest, serve) -> Any:  # Any: it has all that the listener has
    return Serving(honest, serve)


async def closes(stream):
    await stream.receive()


async def resets(stream):
    await stream.receive()
    await stream.reset()


async def is_silent(stream):
    await stream.receive()
    await trio.sleep(1000)


async def does_not_speak_it(stream):
    raise RemoteProtocolError("a stream for no protocol that we speak")


@pytest.mark.parametrize(
    ("serve", "kind"),
    [(closes, PeerGone), (resets, PeerGone), (is_silent, SlowPeer), (does_not_speak_it, PeerGone)],
)
async def test_a_server_that_does_not_answer_is_named_within_the_time_for_it(serve, kind, autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        node.listener = serving(node.listener, serve)
        began = trio.current_time()
        with pytest.raises(kind) as caught:
            await swarm.client(step_seconds=2.0, give_up_seconds=7.0).forward(STATES, 0, 6)
        assert caught.value.peer == "a"
        assert trio.current_time() - began <= 7.0 + 0.5
        await swarm.kill("a")


async def test_a_refusal_is_passed_over_without_blame_for_as_long_as_it_says(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, replicas="b")
        swarm.nodes["b"].engine.most = 0
        client = swarm.client()
        assert torch.equal(await client.forward(STATES, 0, 6), blocks_on(STATES, 0, 6))
        assert done(swarm) == {"a": (1, 0), "b": (0, 0), "B": (1, 0), "c": (1, 0)}
        assert blamed(swarm) == {}
        assert swarm.blame.avoided(trio.current_time() + 0.9) == {"b"}
        assert swarm.blame.avoided(trio.current_time() + 1.1) == frozenset()


async def test_a_server_that_is_full_is_asked_again_when_there_is_no_other(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        node.engine.most = 0
        async with trio.open_nursery() as nursery:

            async def make_room():
                await trio.sleep(5)
                node.engine.most = 1

            nursery.start_soon(make_room)
            assert torch.equal(await swarm.client().forward(STATES, 0, 6), blocks_on(STATES, 0, 6))
        assert trio.current_time() < 6


def serve_other(node, **changes) -> None:
    admission = node.listener.admission
    admission.spec = replace(admission.spec, **changes)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda node: setattr(node.engine, "most", 0), TooManyStreams),
        (lambda node: node.listener.admission.drain(), Draining),
        (partial(serve_other, revision="q"), WrongRevision),
        (partial(serve_other, max_position=2), Refused),
    ],
)
async def test_a_refusal_that_stays_is_raised_when_the_time_is_up(spoil, kind, autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        spoil(node)
        with pytest.raises(kind) as refusal:
            await swarm.client(give_up_seconds=10).forward(STATES, 0, 6)
        assert type(refusal.value) is kind
        assert refusal.value.peer == "a"
        assert trio.current_time() == pytest.approx(10, abs=0.6)


async def test_blocks_that_nobody_has_are_named(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 2)
        with pytest.raises(NoChain, match="blocks 2:6 of 6 are served by nobody"):
            await swarm.client().forward(STATES, 0, 6)
        assert swarm.dialled == []


async def test_when_the_last_one_with_a_block_dies_the_call_fails_whole(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, 3.5, swarm.kill, "b")
            with pytest.raises(PeerGone) as gone:
                await swarm.client(give_up_seconds=5).backward(
                    whole_numbers(4, 200, HIDDEN), whole_numbers(4, 200, HIDDEN), 0, 6
                )
        assert gone.value.peer == "b"
        assert trio.current_time() == 8.0  # five seconds after this hop was first asked


async def test_time_to_give_up_begins_anew_with_every_hop(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=4)
        found, *_ = await swarm.client(give_up_seconds=5).backward(STATES, GRAD, 0, 6)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, 6))
        assert trio.current_time() == 20


async def test_several_requests_are_under_way_and_never_more_than_allowed(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1)
        hidden = whole_numbers(12, 256, HIDDEN)  # twelve requests
        found = await swarm.client().forward(hidden, 0, 6)
        assert torch.equal(found, blocks_on(hidden, 0, 6))
        assert trio.current_time() <= 18  # about 14 as a pipeline of three; one after the other it is 36
        waited = {name: node.engine.most_waiting for name, node in swarm.nodes.items()}
        assert waited == {"a": UNDER_WAY_PER_PEER, "b": 1, "c": 1}
        assert Limits().max_compute_streams_per_peer >= UNDER_WAY_PER_PEER


async def test_the_requests_of_many_calls_share_what_a_peer_may_have(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a", seconds=1)
        client = swarm.client()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.forward, STATES, 0, 6)
        assert node.engine.most_waiting == UNDER_WAY_PER_PEER
        assert blamed(swarm) == {}


async def test_requests_spread_over_servers_that_hold_the_same_blocks(autojump_clock):
    async with toy_swarm() as swarm:
        for name in "abcd":
            swarm.add(name, seconds=1)
        hidden = whole_numbers(32, 256, HIDDEN)  # sixteen requests
        found = await swarm.client().forward(hidden, 0, 6)
        assert torch.equal(found, blocks_on(hidden, 0, 6))
        # Answers that come at the same moment are taken in any order, so it need not be exactly even.
        assert trio.current_time() <= 6, "16 on one server"
        shares = [len(node.span.done) for node in swarm.nodes.values()]
        assert sum(shares) == 16
        assert min(shares) >= 2
        assert UNDER_WAY == 8


async def test_a_server_that_claims_to_be_fast_and_is_not_gets_less_once_that_was_seen(autojump_clock):
    async with toy_swarm() as swarm:
        honest = swarm.add("honest")
        liar = swarm.add("liar")
        liar.record = replace(liar.record, prefill_seconds_per_token=0.0001)
        client = swarm.client()
        swarm.learn(honest.peer, 1e-4)
        swarm.learn(liar.peer, 1.0)
        await client.forward(STATES, 0, 6)
        assert done(swarm) == {"honest": (1, 0), "liar": (0, 0)}


async def test_what_a_request_took_is_learnt_by_its_blocks_and_positions(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        held = [(6_000_000, 1)]

        async def serve(stream):
            while await stream.receive() is not None:
                await stream.send(encode_output(Output(bytes(ROWS * TOKENS * HIDDEN * 4), tuple(held))))

        node.listener, honest = serving(node.listener, serve), node.listener
        client = swarm.client()
        await client.forward(STATES, 1, 3)
        assert swarm.measured.prefill[PeerId("a")].seconds == pytest.approx(6 / (ROWS * TOKENS) / 2)
        held.clear()
        await client.forward(STATES, 1, 3)
        await client.backward(STATES, GRAD, 1, 3)
        assert swarm.measured.prefill[PeerId("a")].seconds == pytest.approx(6 / (ROWS * TOKENS) / 2)
        await swarm.client_streams[-1].aclose()
        node.listener = honest


async def test_a_stream_that_the_server_closed_in_the_meantime_costs_nothing(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a")
        client = swarm.client()
        for _ in range(2):
            await client.forward(STATES, 0, 6)
            await trio.sleep(60)
        await client.forward(STATES, 0, 6)
        assert swarm.dialled == ["a"] * 3
        assert blamed(swarm) == {}


async def test_a_server_that_has_left_the_view_is_not_asked(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, replicas="b")
        client = swarm.client(dtype_of=lambda peer: None if peer == "b" else "float32")
        assert torch.equal(await client.forward(STATES, 0, 6), blocks_on(STATES, 0, 6))
        assert "b" not in swarm.dialled


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the k-th step of any task but the servers'."""

    def __init__(self, k: int, scope: trio.CancelScope) -> None:
        self.left, self.scope = k, scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if "ForwardBackward." in task.name:
            if self.left == 0:
                self.scope.cancel()
            self.left -= 1


async def test_a_call_that_is_cancelled_at_any_await_leaves_nothing_behind_and_the_next_one_works(
    autojump_clock,
):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=0.01)
        client = swarm.client()
        hidden, grad = whole_numbers(4, 256, HIDDEN), whole_numbers(4, 256, HIDDEN, most=2)
        for k in range(400):
            scope, found = trio.CancelScope(), None
            instrument = CancelAt(k, scope)
            trio.lowlevel.add_instrument(instrument)
            with scope:
                found, *_ = await client.backward(hidden, grad, 0, 6)
            trio.lowlevel.remove_instrument(instrument)
            assert not +client._planned
            assert all(limiter.borrowed_tokens == 0 for limiter in client._limiters.values())
            await trio.sleep(Limits().compute_idle_seconds + 1)
            swarm.assert_idle()
            if found is not None:
                break
        assert 20 < k < 399, "the loop has come to the end of a call"
        assert torch.equal(found, gradient_of(hidden, grad, 0, 6))
        assert blamed(swarm) == {}


async def test_a_refusal_is_read_while_the_request_is_still_on_its_way(autojump_clock):
    # Over the network's own framed streams, in lockstep: nobody takes what the refusing peer does not read.
    async with toy_swarm(max_compute_streams_per_peer=0) as swarm:
        node = swarm.add("a")

        async def dial(peer):
            ours, theirs = memory_framed_pair(peers=(CLIENT, node.peer), lockstep=True)
            swarm.nursery.start_soon(swarm._handle, node, theirs)
            return ours

        with pytest.raises(TooManyStreams):
            await swarm.client(open_stream=dial, give_up_seconds=1).forward(STATES, 0, 6)
        assert trio.current_time() < 3
        assert blamed(swarm) == {}


async def test_the_same_over_the_networks_own_framed_streams(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)

        async def dial(peer):
            ours, theirs = memory_framed_pair(peers=(CLIENT, peer))
            swarm.nursery.start_soon(swarm._handle, swarm.nodes[peer], theirs)
            return ours

        client = swarm.client(open_stream=dial)
        hidden = whole_numbers(9, 256, HIDDEN)
        assert torch.equal(await client.forward(hidden, 0, 6), blocks_on(hidden, 0, 6))
        gradient, *_ = await client.backward(STATES, GRAD, 0, 6)
        assert torch.equal(gradient, gradient_of(STATES, GRAD, 0, 6))
        assert all(node.faults == {} for node in swarm.nodes.values())
