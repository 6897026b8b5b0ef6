"""A backward with the inputs that a forward has kept: no forward again, also if servers die in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trio

from client.forward_backward import UNDER_WAY_PER_PEER
from tests.fakes_forward_backward import (
    BLOCKS,
    ToySwarm,
    blocks_on,
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
OTHER = whole_numbers(ROWS, TOKENS, HIDDEN, seed=2, most=4)
PROMPTS = whole_numbers(BLOCKS, 2, HIDDEN, seed=3, most=5)


def three_hops(swarm: ToySwarm, seconds: float = 0.0, replicas: str = "") -> None:
    """a, b and c in a row; for each letter in `replicas` a second server of the same blocks, in capitals."""
    for name, start, stop in [("a", 0, 2), ("b", 2, 4), ("c", 4, 6)]:
        swarm.add(name, start, stop, seconds=seconds)
        if name in replicas:
            swarm.add(name.upper(), start, stop, seconds=seconds)
            swarm.nodes[name].record = replace(swarm.nodes[name].record, prefill_seconds_per_token=0.009)


def done(swarm: ToySwarm) -> dict[str, tuple[int, int]]:
    """The passes of each node: without and with a gradient."""
    counts = {}
    for name, node in swarm.nodes.items():
        backward = sum(with_grad for *_, with_grad in node.span.done)
        counts[name] = (len(node.span.done) - backward, backward)
    return counts


async def test_a_backward_of_kept_inputs_asks_for_no_forward_and_equals_the_usual_one(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        output, kept = await client.forward_kept(STATES, 0, BLOCKS)
        assert torch.equal(output, await swarm.client().forward(STATES, 0, BLOCKS))
        for node in swarm.nodes.values():
            node.span.done.clear()
        found, none, *_ = await client.backward_kept(kept, GRAD)
        assert done(swarm) == dict.fromkeys("abc", (0, 1))
        assert torch.equal(found, (await client.backward(STATES, GRAD, 0, BLOCKS)).hidden)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert none is None


async def test_kept_inputs_serve_any_number_of_backwards_until_they_are_released(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 1, 5)
        assert (kept.start, kept.stop, kept.shape) == (1, 5, (ROWS, TOKENS, HIDDEN))
        assert kept.nbytes == 3 * STATES.nbytes  # of three servers
        for grad in (GRAD, OTHER, GRAD):
            found, *_ = await client.backward_kept(kept, grad)
            assert torch.equal(found, gradient_of(STATES, grad, 1, 5))
        kept.release()
        assert kept.nbytes == 0
        with pytest.raises(ValueError, match="were released"):
            await client.backward_kept(kept, GRAD)


async def test_two_backwards_of_the_same_kept_inputs_at_one_time(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        found = {}

        async def back(name, grad):
            found[name] = (await client.backward_kept(kept, grad)).hidden

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back, "one", GRAD)
            nursery.start_soon(back, "two", OTHER)
        assert torch.equal(found["one"], gradient_of(STATES, GRAD, 0, BLOCKS))
        assert torch.equal(found["two"], gradient_of(STATES, OTHER, 0, BLOCKS))
        assert not +client._planned


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_a_server_that_dies_between_forward_and_backward_is_replaced_for_its_own_blocks(
    victim, autojump_clock
):
    async with toy_swarm() as swarm:
        three_hops(swarm, replicas="abc")
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        await swarm.kill(victim)
        for node in swarm.nodes.values():
            node.span.done.clear()
        found, *_ = await client.backward_kept(kept, GRAD)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        expected = dict.fromkeys("abc", (0, 1)) | dict.fromkeys("ABC", (0, 0))
        assert done(swarm) == expected | {victim: (0, 0), victim.upper(): (0, 1)}
        # The next backward asks the server that took its place, without a detour.
        dialled = len(swarm.dialled)
        found, *_ = await client.backward_kept(kept, OTHER)
        assert torch.equal(found, gradient_of(STATES, OTHER, 0, BLOCKS))
        assert victim not in swarm.dialled[dialled:]


async def test_servers_with_other_blocks_that_replace_one_run_forward_within_its_blocks_alone(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 3)
        swarm.add("b", 3, 6)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        assert kept.nbytes == 2 * STATES.nbytes
        await swarm.kill("b")
        swarm.add("c", 2, 5)
        swarm.add("d", 4, 6)
        for node in swarm.nodes.values():
            node.span.done.clear()
        found, *_ = await client.backward_kept(kept, GRAD)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert (done(swarm)["a"], done(swarm)["b"], done(swarm)["d"]) == ((0, 1), (0, 0), (0, 1))
        assert done(swarm)["c"] == (1, 1)
        assert kept.nbytes == 3 * STATES.nbytes


async def test_a_server_that_dies_in_a_backward_of_kept_inputs_is_replaced_too(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1, replicas="abc")
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)

        async def kill_soon():
            await trio.sleep(1.5)
            await swarm.kill("b")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_soon)
            found, *_ = await client.backward_kept(kept, GRAD)
        assert torch.equal(found, gradient_of(STATES, GRAD, 0, BLOCKS))
        assert done(swarm)["B"] == (0, 1)


async def test_rows_of_a_large_batch_keep_their_order(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=0.1)
        hidden, grad = whole_numbers(23, 100, HIDDEN), whole_numbers(23, 100, HIDDEN, seed=1, most=2)
        client = swarm.client()
        output, kept = await client.forward_kept(hidden, 0, BLOCKS)
        assert torch.equal(output, blocks_on(hidden, 0, BLOCKS))
        found, *_ = await client.backward_kept(kept, grad)
        assert torch.equal(found, gradient_of(hidden, grad, 0, BLOCKS))


async def test_a_gradient_of_another_shape_is_refused_with_both_shapes(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm)
        client = swarm.client()
        _, kept = await client.forward_kept(STATES, 0, BLOCKS)
        with pytest.raises(ValueError, match=r"grad is \[2, 4, 4\] and hidden \[3, 4, 4\]"):
            await client.backward_kept(kept, GRAD[:2])


async def test_kept_inputs_have_the_prompts_of_their_forward(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, replicas="b")
        client = swarm.client()
        output, kept = await client.forward_kept(STATES, 0, BLOCKS, PROMPTS)
        assert torch.equal(output, prompted(STATES, PROMPTS, 0, BLOCKS))
        await swarm.kill("b")
        found, own, *_ = await client.backward_kept(kept, GRAD)
        expected = prompted_gradients(STATES, GRAD, PROMPTS, 0, BLOCKS)
        assert torch.equal(found, expected[0])
        assert torch.equal(own, expected[1])


async def test_two_calls_at_one_time_share_the_pipeline_and_exceed_no_bound(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1)
        client = swarm.client()
        hidden, grad = whole_numbers(2, 500, HIDDEN), whole_numbers(2, 500, HIDDEN, seed=1, most=2)

        async def step() -> None:
            _, kept = await client.forward_kept(hidden, 0, BLOCKS)
            assert torch.equal((await client.backward_kept(kept, grad)).hidden, gradients)

        gradients = gradient_of(hidden, grad, 0, BLOCKS)
        began = trio.current_time()
        await step()
        alone = trio.current_time() - began
        # Two requests over three hops, there and back: the second one is a hop behind the first.
        assert alone == pytest.approx(8)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step)
            nursery.start_soon(step)
        together = trio.current_time() - began
        assert together < 1.6 * alone
        assert {node.engine.most_waiting for node in swarm.nodes.values()} <= {1, 2, UNDER_WAY_PER_PEER}


async def test_a_batch_keeps_all_servers_of_a_chain_busy(autojump_clock):
    async with toy_swarm() as swarm:
        three_hops(swarm, seconds=1)
        client = swarm.client()
        hidden, grad = whole_numbers(8, 128, HIDDEN), whole_numbers(8, 128, HIDDEN, seed=1, most=2)
        began = trio.current_time()
        _, kept = await client.forward_kept(hidden, 0, BLOCKS)
        # Eight requests, each a hop after the one before it; two large ones would take as long for each.
        assert trio.current_time() - began == pytest.approx(8 + 2)
        found, *_ = await client.backward_kept(kept, grad)
        assert trio.current_time() - began == pytest.approx(2 * (8 + 2))
        assert torch.equal(found, gradient_of(hidden, grad, 0, BLOCKS))
        assert {rows for node in swarm.nodes.values() for rows, _ in node.engine.asked} == {1}


async def test_a_batch_for_one_server_goes_in_large_requests(autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        await swarm.client().forward(whole_numbers(8, 128, HIDDEN), 0, BLOCKS)
        assert node.engine.asked == [(4, 128)] * 2
