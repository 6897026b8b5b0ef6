"""Nodes that choose their blocks themselves, and move when others die.  Real processes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from benchmarks.recovery.watched import watch
from client.config import ClientConfig
from client.swarm import open_swarm
from routing.blocks import coverage
from routing.view.view import SwarmView
from tests.forked import Forked
from tests.model_fixtures import BLOCKS, VOCAB, save_tiny_tokenizer

pytestmark = pytest.mark.process

log = logging.getLogger(__name__)

TTL_SECONDS = 6.0
GRACE_SECONDS = 40.0  # beyond the TTL, until a killed node's blocks are served again on a busy machine
FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "8192"]
FLAGS += ["--balance-quality", "0"]  # nothing but holes
PROMPT = [5, 9, 3, 17, 11, 8]
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that never ends by itself."""
    path = tmp_path_factory.mktemp("models") / "endless-llama"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture
def swarm() -> Iterator[LocalSwarm]:
    network = ["--record-ttl", str(TTL_SECONDS)]
    with local_swarm(FLAGS, network, {"OMP_NUM_THREADS": "1"}, Forked) as found:
        found.start("bootstrap").wait_online()
        yield found


def expected(model: Path) -> list[int]:
    whole = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([PROMPT])
    out = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    found: list[int] = out[0, len(PROMPT) :].tolist()
    return found


def blocks_of(node: NodeProcess) -> tuple[int, int]:
    """What it serves by now: the ready-file is written again when it has moved."""
    start, stop = json.loads(node.ready_file.read_text())["blocks"]
    return start, stop


def held(nodes: list[NodeProcess]) -> list[int]:
    """How many of these nodes hold each block."""
    counts = [0] * BLOCKS
    for node in nodes:
        for block in range(*blocks_of(node)):
            counts[block] += 1
    return counts


def served(view: SwarmView) -> tuple[int, ...]:
    (key,) = {(record.revision, record.blocks) for record in view.records() if record.role == "serve"}
    return coverage(view.spans(*key), BLOCKS)


async def test_blocks_of_a_killed_node_are_served_again_by_one_that_moves_and_no_token_is_lost(
    swarm: LocalSwarm, model: Path
) -> None:
    nodes: list[NodeProcess] = []
    for number in (2, 2, 2, 2):
        nodes.append(swarm.start(str(model), "--num-blocks", str(number)))
        nodes[-1].wait_online()
        assert held(nodes).count(0) == max(0, BLOCKS - 2 * len(nodes)), "covered as soon as there is room"
    counts = held(nodes)
    victim = next(node for node in nodes if 1 in {counts[block] for block in range(*blocks_of(node))})
    others = [node for node in nodes if node is not victim]
    before = [blocks_of(node) for node in others]
    timing: dict[str, Any] = {}

    config = ClientConfig((*swarm.peers,), str(model), threads=1, give_up_seconds=60, wait_seconds=60)
    async with open_swarm(config) as client, trio.open_nursery() as nursery:
        while 0 in served(client.view()):  # noqa: ASYNC110
            await trio.sleep(0.05)

        async def until_served_again() -> None:
            while 0 not in served(client.view()):  # noqa: ASYNC110
                await trio.sleep(0.02)
            while 0 in served(client.view()):  # noqa: ASYNC110
                await trio.sleep(0.02)
            timing["served_again"] = time.monotonic() - timing["killed_at"]

        async def kill(number: int) -> None:
            if number == 10:
                timing["killed_at"] = time.monotonic()
                victim.kill()
                nursery.start_soon(until_served_again)

        conversation = client.conversation(len(PROMPT) + TOKENS)
        watched = await watch(client, conversation, PROMPT, TOKENS, kill)
        conversation.close()
    assert (watched.error, watched.tokens) == (None, expected(model))
    assert timing["served_again"] < TTL_SECONDS + GRACE_SECONDS
    assert sum(one != two for one, two in zip(before, map(blocks_of, others), strict=True)) == 1
    log.info("served again after %.1f s, longest token %.1f s", timing["served_again"], max(watched.seconds))


async def test_a_node_told_to_end_while_it_moves_ends_politely(swarm: LocalSwarm, model: Path) -> None:
    first = swarm.start(str(model), "--blocks", "0:3")
    first.wait_online()
    spare = swarm.start(str(model), "--num-blocks", "3")
    lost = swarm.start(str(model), "--blocks", "3:6")
    lost.wait_online()
    spare.wait_online()
    third = swarm.start(str(model), "--blocks", f"{blocks_of(spare)[0]}:{blocks_of(spare)[1]}")
    third.wait_online()
    lost.kill()
    with trio.fail_after(TTL_SECONDS + GRACE_SECONDS):
        while "about to move" not in spare.tail(50) and blocks_of(spare) != (3, 6):  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert spare.stop() == 0
