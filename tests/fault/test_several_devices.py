"""Nodes over several devices as real processes: their tokens, and the end of a rank or of rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trio
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from benchmarks.recovery.watched import peers_in_use, until_known, watch
from client.config import ClientConfig
from client.swarm import open_swarm
from node.model.checkpoint.folder import ModelFolder
from tests.forked import Forked, forked_run
from tests.model_fixtures import VOCAB, save_tiny_tokenizer

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--cache-tokens", "1024"]
PARALLEL = ("--device", "cpu", "--tensor-parallel", "2")
PROMPT = "The capital of France is"
TOKENS = 40
LOST_LINE = "error: tensor parallelism over 2 devices has ended: rank 1 was ended by SIGKILL"


@pytest.fixture
def swarm() -> Iterator[LocalSwarm]:
    with local_swarm(FLAGS, ["--record-ttl", "6"], spawn=Forked) as swarm:
        yield swarm


def ranks_of(node: NodeProcess) -> list[psutil.Process]:
    """The processes of a node's other ranks."""
    found = psutil.Process(node.process.pid).children(recursive=True)
    return [each for each in found if "node.model.parallel.worker" in each.cmdline()]


def until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def assert_left(node: NodeProcess) -> None:
    """It ends by itself, with one line that says why."""
    assert node.process.wait(60) == 2, node.tail(60)
    assert LOST_LINE in node.tail()
    assert "Traceback" not in node.log.read_text()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that never ends by itself."""
    path = tmp_path_factory.mktemp("models") / "endless-llama"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    save_tiny_tokenizer(path)
    return path


def prompt(tokens: int) -> list[int]:
    return torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


def expected(model: Path, ids: list[int]) -> list[int]:
    """What the whole model makes of a prompt, in this process."""
    whole, given = AutoModelForCausalLM.from_pretrained(model), torch.tensor([ids])
    out = whole.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False)
    found: list[int] = out[0, len(ids) :].tolist()
    assert len(set(found)) > TOKENS / 5  # a wrong cache would show
    return found


def generated(swarm: LocalSwarm, *flags: str) -> Any:
    words = ["--peers", *swarm.peers, "--json", "--threads", "1", "--max-new-tokens", "12", *flags]
    done = forked_run("client", "generate", *words, PROMPT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.real_model
def test_three_ranks_and_two_devices_in_turn_give_the_tokens_of_the_whole_model(
    swarm: LocalSwarm, builtin_model: ModelFolder
) -> None:
    divided = swarm.start("--blocks", "0:18", "--device", "cpu", "--tensor-parallel", "3")
    divided.wait_online()
    swarm.start("--blocks", "18:30", "--device", "cpu,cpu").wait_online()
    assert len(ranks_of(divided)) == 2
    whole = AutoModelForCausalLM.from_pretrained(builtin_model.path)
    ids = AutoTokenizer.from_pretrained(builtin_model.path)(PROMPT, return_tensors="pt")["input_ids"]
    expected = whole.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    found = generated(swarm)
    assert found["tokens"] == expected[0, ids.shape[1] :].tolist()
    assert [hop["blocks"] for hop in found["route"]] == [[0, 18], [18, 30]]
    processes = ranks_of(divided)
    assert divided.stop() == 0
    until_gone(processes)


async def test_a_rank_killed_in_the_midst_of_a_generation_costs_no_token(
    swarm: LocalSwarm, endless: Path
) -> None:
    """The client goes on elsewhere; the node says why, leaves the swarm and ends by itself."""
    model = str(endless)
    divided = swarm.start(model, "--blocks", "0:6", *PARALLEL)
    divided.wait_online()
    ids = prompt(8)
    async with open_swarm(ClientConfig((divided.address,), model, threads=1)) as client:
        conversation = client.conversation(len(ids) + TOKENS)

        async def before(number: int) -> None:
            if number == 4:
                spare = swarm.start(model, "--blocks", "0:6", "--device", "cpu")
                await trio.to_thread.run_sync(spare.wait_online)
                peer = spare.facts["peer_id"]
                await until_known(client, lambda view: view.get(peer) is not None)
            if number == 10:
                assert peers_in_use(conversation) == [divided.facts["peer_id"]]
                (rank,) = ranks_of(divided)
                rank.kill()

        with trio.fail_after(240):
            watched = await watch(client, conversation, ids, TOKENS, before)
        conversation.close()
    assert (watched.error, watched.tokens) == (None, expected(endless, ids))
    assert_left(divided)


async def test_without_another_server_the_client_hears_of_it_and_nothing_hangs(
    swarm: LocalSwarm, endless: Path
) -> None:
    model = str(endless)
    swarm.start("bootstrap").wait_online()
    divided = swarm.start(model, "--blocks", "0:6", *PARALLEL)
    divided.wait_online()
    ids = prompt(8)
    config = ClientConfig(tuple(swarm.peers), model, threads=1, wait_seconds=3.0, give_up_seconds=6.0)
    async with open_swarm(config) as client:
        conversation = client.conversation(len(ids) + TOKENS)

        async def before(number: int) -> None:
            if number == 10:
                ranks_of(divided)[0].kill()

        with trio.fail_after(120):
            watched = await watch(client, conversation, ids, TOKENS, before)
        conversation.close()
    assert watched.error is not None
    assert watched.tokens == expected(endless, ids)[: len(watched.tokens)]
    assert_left(divided)


def test_an_idle_node_whose_rank_ends_leaves_and_says_why(swarm: LocalSwarm, endless: Path) -> None:
    divided = swarm.start(str(endless), "--blocks", "0:6", *PARALLEL)
    divided.wait_online()
    ranks_of(divided)[0].kill()
    assert_left(divided)


def test_no_rank_outlives_a_node_that_is_killed(swarm: LocalSwarm, endless: Path) -> None:
    divided = swarm.start(str(endless), "--blocks", "0:6", "--device", "cpu", "--tensor-parallel", "4")
    divided.wait_online()
    processes = ranks_of(divided)
    assert len(processes) == 3
    divided.kill()
    until_gone(processes)


def test_a_signal_during_the_start_of_the_ranks_ends_all(swarm: LocalSwarm, endless: Path) -> None:
    divided = swarm.start(str(endless), "--blocks", "0:6", *PARALLEL)
    until = time.monotonic() + 60
    while not (processes := ranks_of(divided)):
        assert time.monotonic() < until, divided.tail()
        time.sleep(0.01)
    divided.stop()
    until_gone(processes)
    assert "Traceback" not in divided.log.read_text()
