"""Forward and backward over real node processes: the same numbers as in one process, also if servers die."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import trio

import client
from benchmarks.lib.processes import local_swarm
from node.model.blocks.forward_backward import backward, backward_in_parts, finish, forward
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from tests.forked import Forked

pytestmark = pytest.mark.process

# Relative to the largest value.  Requests have other numbers of rows than the batch here, so their
# products may be summed in another order.
TOLERANCE = 5e-6
GENEROUS_SECONDS = 60.0
COMPUTES_SECONDS = 0.1  # of CPU: a server that does nothing takes a tenth of that in a minute


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    return float((got - expected).abs().max() / expected.abs().max())


async def test_a_gradient_over_two_servers_is_that_of_one_process_also_when_one_of_them_is_killed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = open_folder(tiny_llama, memo=HashMemo(tmp_path / "hashes.json"))
    whole = load_span(folder, 0, 6)
    hidden, grad = torch.randn(2, 400, 100, 32, generator=torch.Generator().manual_seed(0))
    output, gradient = forward(whole, hidden, 0, 6), backward(whole, hidden, grad, 0, 6)

    flags = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
    with local_swarm([str(tiny_llama), *flags], spawn=Forked) as swarm:
        nodes = [swarm.start("--blocks", "0:3")]
        nodes[0].wait_online()
        nodes += [swarm.start("--blocks", "3:6") for _ in range(2)]
        for node in nodes:
            node.wait_online()

        async def under_asyncio() -> torch.Tensor:
            async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
                return cast(torch.Tensor, await handle.backward(hidden[:3], grad[:3]))

        found = await trio.to_thread.run_sync(lambda: asyncio.run(under_asyncio()))
        assert error(found, gradient[:3]) <= TOLERANCE

        async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
            few = hidden[:3], grad[:3]
            assert error(await handle.forward(few[0]), output[:3]) <= TOLERANCE
            assert error(cast(torch.Tensor, await handle.backward(*few)), gradient[:3]) <= TOLERANCE
            middle = await handle.forward(few[0], start=1, stop=4)
            assert error(middle, forward(whole, few[0], 1, 4)) <= TOLERANCE

            prompts = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(1))
            prompted = forward(whole, few[0], 0, 6, prompts)
            found, kept = await handle.forward_kept(few[0], prompts=prompts)
            assert error(found, prompted) <= TOLERANCE
            expected = finish(backward_in_parts(whole, *few, 0, 6, prompts))
            for got, right in zip(await handle.backward(kept, few[1]), expected, strict=True):
                assert error(got, right) <= TOLERANCE
            async with handle.session(batch=3, max_length=100, prompts=prompts) as session:
                first, rest = await session.step(few[0][:, :3]), await session.step(few[0][:, 3:])
                assert first is not None
                assert rest is not None
                assert error(torch.cat([first, rest], 1), prompted) <= 10 * TOLERANCE

            victim, answers = nodes[2], []
            idle = victim.cpu_seconds()

            async def step() -> None:
                answers.append(cast(torch.Tensor, await handle.backward(hidden, grad)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(step)
                with trio.fail_after(GENEROUS_SECONDS):
                    while victim.cpu_seconds() < idle + COMPUTES_SECONDS:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                assert not answers
                victim.kill()
            assert error(answers[0], gradient) <= TOLERANCE
            # The time for which it is avoided may be over by now.
            assert cast(Any, handle).blame._faults.keys() == {victim.facts["peer_id"]}

        assert [node.stop() for node in nodes[:2]] == [0, 0]


async def test_the_death_of_a_server_with_a_tape_changes_no_bit_of_a_gradient(tiny_llama: Path) -> None:
    hidden, grad = torch.randn(2, 9, 100, 32, generator=torch.Generator().manual_seed(0))
    flags = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
    with local_swarm([str(tiny_llama), *flags], spawn=Forked) as swarm:
        nodes = [swarm.start("--blocks", "0:3")]
        nodes[0].wait_online()
        nodes += [swarm.start("--blocks", "3:6") for _ in range(2)]
        for node in nodes:
            node.wait_online()
        async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
            output, kept = await handle.forward_kept(hidden)
            assert all(each.tape for part in kept.parts() for each in part.inputs)
            taped = cast(torch.Tensor, await handle.backward(kept, grad))
            assert not any(each.tape for part in kept.parts() for each in part.inputs)
            assert torch.equal(cast(torch.Tensor, await handle.backward(kept, grad)), taped)

            again, kept = await handle.forward_kept(hidden)
            assert torch.equal(again, output)
            used = {each.hop.peer for part in kept.parts() for each in part.inputs}
            victim = next(node for node in nodes[1:] if node.facts["peer_id"] in used)
            victim.kill()
            assert torch.equal(cast(torch.Tensor, await handle.backward(kept, grad)), taped)
        others = [node for node in nodes if node is not victim]
        assert [node.stop() for node in others] == [0, 0]
