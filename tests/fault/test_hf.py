"""A transformers model over real node processes: servers die, and tokens and losses stay the same."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import client
from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from client.hf import from_swarm
from tests.forked import Forked

pytestmark = pytest.mark.process

IDS = torch.arange(3, 12)[None]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def servers(tiny_llama: Path) -> Iterator[LocalSwarm]:
    """Two servers of each half."""
    flags = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]
    with local_swarm([str(tiny_llama), *flags], spawn=Forked) as swarm:
        swarm.start("--blocks", "0:3").wait_online()
        for blocks in ("0:3", "3:6", "3:6"):
            swarm.start("--blocks", blocks)
        for node in swarm.nodes:
            node.wait_online()
        yield swarm


def server_in_use(servers: LocalSwarm, peers: Collection[str], blocks: str) -> NodeProcess:
    """A server of this half that one of these chains goes through."""
    begin = 0 if blocks == "first" else 2
    return next(node for node in servers.nodes[begin : begin + 2] if node.facts["peer_id"] in peers)


def test_twenty_steps_of_prompt_tuning_have_the_same_losses_when_a_server_dies_in_the_middle(
    servers: LocalSwarm, tiny_llama: Path
) -> None:
    batch = torch.randint(3, 90, (4, 19), generator=torch.Generator().manual_seed(0))

    def train(swarm: client.SyncSwarm, kill: int | None) -> list[float]:
        torch.manual_seed(1)
        model = from_swarm(swarm, tuning_mode="ptune", pre_seq_len=4)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
        losses = []
        for step in range(20):
            loss = model(batch, labels=batch).loss
            if step == kill:  # between forward and backward
                peers = {hop.peer for hop in swarm.route().hops}
                server_in_use(servers, peers, "last").kill()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    with client.connect_sync(str(tiny_llama), peers=servers.peers) as swarm:
        undisturbed = train(swarm, None)
        assert train(swarm, 10) == undisturbed
    assert undisturbed[-1] < undisturbed[0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}], ids=["greedy", "beams"])
def test_a_server_killed_in_the_midst_of_generate_costs_no_token(
    servers: LocalSwarm, tiny_llama: Path, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    local = AutoModelForCausalLM.from_pretrained(tiny_llama)
    steps = threading.Semaphore(0)

    def count(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        steps.release()
        return torch.zeros(len(ids), dtype=torch.bool)

    with client.connect_sync(str(tiny_llama), peers=servers.peers) as swarm:
        model, found = from_swarm(swarm), list[torch.Tensor]()

        def generate() -> None:
            found.append(
                model.generate(IDS, max_new_tokens=48, stopping_criteria=[count], **GREEDY, **options)
            )

        peers = {hop.peer for hop in swarm.route().hops}
        thread = threading.Thread(target=generate)
        thread.start()
        for _ in range(12):
            assert steps.acquire(timeout=60)
        server_in_use(servers, peers, "first").kill()
        for _ in range(12):
            assert steps.acquire(timeout=60)
        server_in_use(servers, peers, "last").kill()
        thread.join(120)
    assert torch.equal(found[0], local.generate(IDS, max_new_tokens=48, **GREEDY, **options))
