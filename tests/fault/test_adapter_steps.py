"""Twenty steps of training an adapter over real nodes, five of which are killed: no bit is another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import torch
import trio
from torch import Tensor
from torch.nn import functional

import client
from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from tests.forked import Forked
from tests.plain_lora import PlainLora

pytestmark = pytest.mark.process

STEPS, DEATHS = 20, 5
SPANS = ("0:2", "2:4", "4:6")
FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Trained = tuple[list[Tensor], list[Tensor]]  # the losses of the steps, and the adapter's values at the end


@pytest.fixture
def swarm(tiny_llama: Path) -> Iterator[LocalSwarm]:
    """Two servers of each third, and a directory that stays."""
    with local_swarm([str(tiny_llama), *FLAGS], spawn=Forked) as swarm:
        swarm.start("bootstrap").wait_online()
        for blocks in SPANS * 2:
            swarm.start("--blocks", blocks)
        for node in swarm.nodes:
            node.wait_online()
        yield swarm


def batch(step: int) -> Tensor:
    return torch.randint(3, 90, (4, 19), generator=torch.Generator().manual_seed(step))


@dataclass
class Deaths:
    """Kills servers in use at random moments of random steps, and starts another one in the place of each."""

    swarm: LocalSwarm
    random: Random
    step_seconds: float
    steps: list[int] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = sorted(self.random.sample(range(1, STEPS), DEATHS))

    async def victim(self, handle: Any, step: int) -> NodeProcess | None:
        """The server that dies in this step, once all others are online; None for a step without a death."""
        if step not in self.steps:
            return None
        living = [node for node in self.swarm.nodes if node.process.poll() is None]
        for node in living:
            await trio.to_thread.run_sync(node.wait_online)
        nodes = {node.facts["peer_id"]: node for node in living}
        hops = [hop for hop in (await handle.route()).hops if hop.peer in nodes]
        return nodes[self.random.choice(hops).peer]

    async def kill(self, node: NodeProcess, handle: Any) -> None:
        record = handle.view().get(node.facts["peer_id"])
        await trio.sleep(self.random.random() * self.step_seconds)
        await trio.to_thread.run_sync(node.kill)
        self.killed.append(node.facts["peer_id"])
        self.swarm.start("--blocks", f"{record.start}:{record.stop}")


async def trained(handle: Any, whole: Any, deaths: Deaths | None = None) -> Trained:
    torch.manual_seed(4)
    adapter = client.new_adapter(CONFIG, handle, dtype="fp32")
    trainer = client.train(handle, adapter, torch.optim.AdamW(adapter.parameters(), lr=0.02))
    losses = []
    for number in range(STEPS):
        ids = batch(number)
        victim = None if deaths is None else await deaths.victim(handle, number)
        async with trio.open_nursery() as nursery:
            if deaths is not None and victim is not None:
                nursery.start_soon(deaths.kill, victim, handle)
            async with trainer.step() as step:
                output = (await step.forward(whole.model.embed_tokens(ids))).requires_grad_()
                logits = whole.lm_head(whole.model.norm(output))[:, :-1]
                loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                await step.backward(torch.autograd.grad(loss, output)[0])
        losses.append(loss.detach())
    assert trainer.steps == STEPS
    return losses, [each.detach().clone() for each in adapter.parameters()]


def trained_in_one_process(handle: Any, whole: Any) -> Trained:
    torch.manual_seed(4)
    plain = PlainLora(whole, client.new_adapter(CONFIG, handle, dtype="fp32"))
    optimizer, losses = torch.optim.AdamW(plain.parameters(), lr=0.02), []
    for number in range(STEPS):
        loss = plain(batch(number), labels=batch(number)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [each.detach() for each in plain.parameters()]


async def test_five_deaths_in_twenty_steps_change_no_bit_of_losses_and_adapter(
    swarm: LocalSwarm, tiny_llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
        begin = trio.current_time()
        losses, values = await trained(handle, whole)
        deaths = Deaths(swarm, Random(7), (trio.current_time() - begin) / STEPS)
    async with client.connect(str(tiny_llama), peers=swarm.peers) as handle:
        mine, own = await trained(handle, whole, deaths)
        assert set(deaths.killed) & cast(Any, handle).blame._faults.keys()  # some died while they were asked
        expected, theirs = trained_in_one_process(handle, whole)
    assert len(set(deaths.killed)) == DEATHS
    assert all(torch.equal(*pair) for pair in zip(losses, mine, strict=True))
    assert all(torch.equal(*pair) for pair in zip(values, own, strict=True))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, theirs, rtol=0, atol=1e-6)
