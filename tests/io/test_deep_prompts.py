"""Deep prompts: every block adds its own to its input, and they travel with the requests of their blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client.batch_parts import BatchCutter
from routing.chains.search import NoChain
from tensor_codec.limits import Limits
from tensor_codec.messages.forward_backward import Forward, Run, encode_request
from tensor_codec.span_spec import SpanSpec
from tests.fakes_forward_backward import (
    BLOCKS,
    prompted,
    prompted_gradients,
    toy_swarm,
    whole_numbers,
)
from tests.fakes_serving import HIDDEN

ROWS, TOKENS, POSITIONS = 3, 4, 2
STATES = whole_numbers(ROWS, TOKENS, HIDDEN)
GRAD = whole_numbers(ROWS, TOKENS, HIDDEN, seed=1, most=4)
PROMPTS = whole_numbers(BLOCKS, POSITIONS, HIDDEN, seed=3, most=5)


def equal(found, expected) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found[:2], expected, strict=True))


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (1, 5), (2, 3)])
async def test_prompts_are_added_at_every_block_of_every_hop_and_have_a_gradient(start, stop, autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 2)
        swarm.add("b", 2, 6)
        client, own = swarm.client(), PROMPTS[start:stop]
        output = await client.forward(STATES, start, stop, own)
        assert torch.equal(output, prompted(STATES, own, start, stop))
        found = await client.backward(STATES, GRAD, start, stop, own)
        assert equal(found, prompted_gradients(STATES, GRAD, own, start, stop))
        assert all(node.faults == {} for node in swarm.nodes.values())


async def test_the_gradient_of_prompts_is_the_float32_sum_over_the_rows_of_all_requests(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 3)
        swarm.add("b", 3, 6, dtype="bfloat16")
        hidden, grad = whole_numbers(23, 100, HIDDEN, most=3), whole_numbers(23, 100, HIDDEN, seed=1, most=2)
        client = swarm.client(codec="fp32")
        found = await client.backward(hidden, grad, 0, 3, PROMPTS[:3])
        assert equal(found, prompted_gradients(hidden, grad, PROMPTS[:3], 0, 3))
        assert len(swarm.nodes["a"].engine.asked) == 5
        found = await swarm.client().backward(hidden, grad, 3, 6, PROMPTS[3:])
        assert found.prompts.dtype == torch.float32
        assert found.hidden.dtype == torch.bfloat16


async def test_a_server_that_dies_is_replaced_with_the_prompts_of_its_blocks(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("a", 0, 3)
        swarm.add("b", 3, 6)
        swarm.add("c", 2, 5, seconds=1)
        swarm.add("d", 4, 6, seconds=1)
        client = swarm.client()
        assert torch.equal(await client.forward(STATES, 0, 6, PROMPTS), prompted(STATES, PROMPTS, 0, 6))
        await swarm.kill("b")
        found = await client.backward(STATES, GRAD, 0, 6, PROMPTS)
        assert equal(found, prompted_gradients(STATES, GRAD, PROMPTS, 0, 6))


async def test_only_servers_that_say_that_they_take_prompts_are_asked(autojump_clock):
    async with toy_swarm() as swarm:
        swarm.add("old")
        swarm.add("new", seconds=1)
        swarm.nodes["old"].record = replace(
            swarm.nodes["old"].record, prompts=False, prefill_seconds_per_token=0.001
        )
        client = swarm.client()
        await client.forward(STATES, 0, 6)
        assert swarm.dialled == ["old"]
        await client.forward(STATES, 0, 6, PROMPTS)
        assert swarm.dialled == ["old", "new"]
        del swarm.nodes["new"]
        with pytest.raises(NoChain):
            await client.forward(STATES, 0, 6, PROMPTS)


async def test_where_a_frame_has_no_room_for_all_prompts_a_hop_is_asked_for_fewer_blocks(autojump_clock):
    # Frames of 20 vectors of 4 values at 4 bytes; two rows of 4 positions leave 12: prompts of six blocks.
    async with toy_swarm(max_frame_bytes=8192 + 20 * 16) as swarm:
        node = swarm.add("a")
        client = swarm.client()
        long = whole_numbers(BLOCKS, 4, HIDDEN, seed=3, most=5)
        for prompts, requests in ((PROMPTS, 1), (long, 2)):
            node.engine.asked.clear()
            found = await client.backward(STATES[:1], GRAD[:1], 0, 6, prompts)
            assert equal(found, prompted_gradients(STATES[:1], GRAD[:1], prompts, 0, 6))
            assert len(node.engine.asked) == 2 * requests - 1  # forward but through the last blocks, and back
        with pytest.raises(ValueError, match=r"rows of 9 positions, 8 fit .* and prompts of 4 positions"):
            await swarm.client(codec="fp32").backward(
                whole_numbers(1, 9, HIDDEN), whole_numbers(1, 9, HIDDEN), 0, 6, long
            )


WRONG = {
    "too few blocks": (PROMPTS[:5], r"prompts is \[5, 2, 4\] for 6 blocks"),
    "another size": (PROMPTS[..., :3], r"prompts is \[6, 2, 3\], \[blocks, positions, 4\] is needed"),
    "no positions": (PROMPTS[:, :0], r"prompts is \[6, 0, 4\]"),
    "more positions than a row": (whole_numbers(6, 5, HIDDEN), "prompts of 5 positions for rows of 4"),
    "NaN": (PROMPTS / 0 * 0, "prompts holds NaN or infinity"),
    "integers": (PROMPTS.long(), "prompts holds torch.int64"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_prompts_that_cannot_be_are_an_error_of_the_caller_and_are_not_sent(what, autojump_clock):
    prompts, words = WRONG[what]
    async with toy_swarm() as swarm:
        swarm.add("a")
        with pytest.raises(ValueError, match=words):
            await swarm.client().forward(STATES, 0, 6, prompts)
        assert swarm.dialled == []


@pytest.mark.parametrize("extra", [-16, 16])
async def test_prompts_of_another_size_than_said_end_the_stream(extra, autojump_clock):
    async with toy_swarm() as swarm:
        node = swarm.add("a")
        stream = await swarm.dial("a")
        spec = SpanSpec("m", "r", node.listener.admission.spec.blocks, "float32")
        run = Run(spec, 1, "fp32", prompts=5)
        # Five positions, and prompts of five positions for six blocks: one vector more or less is a position.
        request = Forward(run, bytes(5 * 16), bytes(30 * 16 + extra - 5 * 16))
        await stream.send(encode_request(request))
        frame = await stream.receive(10.0)
        assert b"message" in bytes(frame)
        assert node.span.done == []
        assert node.faults == {"client MessageError": 1}


def test_prompts_get_up_to_half_of_a_frame_before_rows_are_cut_smaller() -> None:
    limits = Limits()
    frame = (limits.max_frame_bytes - 2 * limits.max_header_bytes) // (4 * 4096)  # vectors at four bytes
    info: Any = SimpleNamespace(blocks=40, hidden_size=4096, max_position=4096)
    cutter = BatchCutter(info, limits, "fp32")
    hidden = torch.zeros(64, 8, 4096)
    plain = cutter.cut(hidden, 0, 40, tensors=2)
    assert [len(each.hidden) for each in plain] == [frame // 2 // 8, 1]
    with_prompts = cutter.cut(hidden, 0, 40, prompts=torch.zeros(40, 8, 4096), tensors=2)
    rows = (frame - 320) // 2 // 8
    assert [len(each.hidden) for each in with_prompts[:-1]] == [rows] * (len(with_prompts) - 1)
    assert sum(len(each.hidden) for each in with_prompts) == 64
