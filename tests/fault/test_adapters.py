"""A guest's adapter over real node processes: the same tokens and gradients, also where a hop is killed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import trio

import client
from benchmarks.lib.processes import local_swarm
from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.blobs import read_lora
from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.sites import site_shapes
from node.model.blocks.forward_backward import backward_in_parts, finish, forward
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from tensor_codec.adapters import AdapterContent, AdapterManifest, LoraSite
from tests.forked import Forked

pytestmark = pytest.mark.process

TOLERANCE = 5e-6  # relative to the largest value: sums of other numbers of rows
FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return open_folder(tiny_llama, memo=HashMemo(tmp_path_factory.mktemp("hashes") / "hashes.json"))


@pytest.fixture(scope="module")
def whole(folder: ModelFolder) -> Span:
    return load_span(folder, 0, 6)


def random_content(revision: str, whole: Span, rank: int = 4, seed: int = 0) -> AdapterContent:
    """An adapter of all blocks and sites, large enough to change tokens."""
    generator = np.random.default_rng(seed)
    tables, blobs = [], []
    for _, sites in sorted(site_shapes(whole).items()):
        tables.append(tuple(LoraSite(name, rank, 0.5) for name in sites))
        parts = [generator.normal(0, 0.2, rank * (ins + outs)) for ins, outs in sites.values()]
        blobs.append(np.concatenate(parts).astype("<f4").tobytes())
    return AdapterContent(AdapterManifest(revision, "fp32", tuple(tables)), tuple(blobs))


def in_process(own: AdapterContent, whole: Span) -> SpanAdapter:
    shapes = site_shapes(whole)
    blocks = {
        block: read_lora(own.manifest.blocks[block], shapes[block], "fp32", own.blobs[block])
        for block in shapes
    }
    return SpanAdapter(own.id, blocks)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


async def tokens(handle: Any, adapter: Any, count: int = 12, kill: Any = None, at: int = 4) -> list[int]:
    found: list[int] = []
    async for token in handle.generate(
        PROMPT, max_new_tokens=count, adapter=adapter, stop_token_ids=[], do_sample=False
    ):
        found.append(token.id)
        if kill is not None and len(found) == at:
            kill()
    return found


def new_adapter(handle: Any) -> Any:
    torch.manual_seed(1)
    return client.new_adapter({"r": 2, "target_modules": ["q_proj", "down_proj"]}, handle, dtype="bf16")


def hidden_and_grad(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, grad = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(step))
    return hidden, grad


async def trained_under_trio(handle: Any) -> str:
    """The id of an adapter after two steps; of asyncio's handles too."""
    adapter = new_adapter(handle)
    trainer = client.train(handle, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.01))
    for number in range(2):
        hidden, grad = hidden_and_grad(number)
        async with trainer.step() as step:
            await step.forward(hidden)
            await step.backward(grad)
    found: str = adapter.content().id
    return found


async def trained_under_asyncio(model: Path, peers: Any) -> str:
    async with client.connect(str(model), peers=peers) as handle:
        return await trained_under_trio(handle)


def trained_blocking(handle: Any) -> str:
    adapter = new_adapter(handle)
    trainer = client.train_sync(handle, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.01))
    for number in range(2):
        hidden, grad = hidden_and_grad(number)
        with trainer.step() as step:
            step.forward(hidden)
            step.backward(grad)
    found: str = adapter.content().id
    return found


async def test_tokens_with_an_adapter_stay_the_same_where_a_hop_is_killed(
    tiny_llama: Path, folder: ModelFolder, whole: Span
) -> None:
    own = random_content(folder.revision, whole)
    with local_swarm([str(tiny_llama), *FLAGS], spawn=Forked) as swarm:
        nodes = [swarm.start("--blocks", "0:2")]
        nodes[0].wait_online()
        nodes += [swarm.start("--blocks", blocks) for blocks in ("2:4", "2:4", "4:6")]
        for node in nodes:
            node.wait_online()
        async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
            plain = await tokens(handle, None)
            undisturbed = await tokens(handle, own)
            assert undisturbed != plain
            hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
            expected = forward(cast(Any, AdaptedSpan(whole, in_process(own, whole))), hidden, 0, 6)
            async with handle.session(max_length=16, adapter=own) as session:
                parts = [
                    await session.step(hidden[:, :5]),
                    *[await session.step(hidden[:, i : i + 1]) for i in range(5, 9)],
                ]
                chain = [hop.peer for hop in session.chain.hops]
            found = torch.cat([part for part in parts if part is not None], 1)
            assert error(found, expected) <= 10 * TOLERANCE

            victim = next(node for node in nodes[1:3] if node.facts["peer_id"] in chain)
            assert await tokens(handle, own, kill=victim.kill) == undisturbed
        others = [node for node in nodes if node is not victim]
        assert [node.stop() for node in others] == [0, 0, 0]


async def test_gradients_of_an_adapter_have_the_same_bits_where_a_server_is_killed(
    tiny_llama: Path, folder: ModelFolder, whole: Span
) -> None:
    """Steps of training under trio, under asyncio and in a blocking program make the same adapter, too."""
    own = random_content(folder.revision, whole)
    hidden, grad = torch.randn(2, 9, 100, 32, generator=torch.Generator().manual_seed(0))
    with local_swarm([str(tiny_llama), *FLAGS], spawn=Forked) as swarm:
        nodes = [swarm.start("--blocks", "0:3")]
        nodes[0].wait_online()
        nodes += [swarm.start("--blocks", "3:6") for _ in range(2)]
        for node in nodes:
            node.wait_online()
        async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
            _, kept = await handle.forward_kept(hidden, adapter=own)
            undisturbed = await handle.gradients(kept, grad)
            assert undisturbed.adapter is not None

            trained = AdaptedSpan(whole, in_process(own, whole), trains=True)
            expected = finish(backward_in_parts(cast(Any, trained), hidden, grad, 0, 6))
            assert error(undisturbed.hidden, expected.hidden) <= TOLERANCE
            for block, values in undisturbed.adapter.items():
                sites = own.manifest.blocks[block]
                flat = [each.flatten() for site in sites for each in trained.gradients[block][site.name]]
                assert error(values, torch.cat(flat)) <= 10 * TOLERANCE

            output, kept = await handle.forward_kept(hidden, adapter=own)
            used = {each.hop.peer for part in kept.parts() for each in part.inputs}
            victim = next(node for node in nodes[1:] if node.facts["peer_id"] in used)
            victim.kill()
            found = await handle.gradients(kept, grad)
            assert torch.equal(found.hidden, undisturbed.hidden)
            assert found.adapter is not None
            assert all(torch.equal(found.adapter[block], undisturbed.adapter[block]) for block in range(6))
            assert torch.equal(output, await handle.forward(hidden, adapter=own))

            with client.connect_sync(str(tiny_llama), peers=swarm.peers) as blocking:
                kinds = [
                    await trained_under_trio(handle),
                    await trio.to_thread.run_sync(
                        asyncio.run, trained_under_asyncio(tiny_llama, swarm.peers)
                    ),
                    await trio.to_thread.run_sync(trained_blocking, blocking),
                ]
            assert kinds[0] != new_adapter(handle).content().id
            assert kinds[1:] == kinds[:1] * 2
        others = [node for node in nodes if node is not victim]
        assert [node.stop() for node in others] == [0, 0]
