"""A swarm of real processes: what only processes show."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lib.processes import LocalSwarm, local_swarm
from node.model.checkpoint.folder import ModelFolder
from tests.forked import Forked, forked_run
from tests.processes import line_of, python, running

pytestmark = pytest.mark.process

TTL_SECONDS = 60.0
PROMPT = "The three most important things about a good garden are"


def answer(*words: object) -> dict[str, Any]:
    """The JSON that a command prints; it must succeed."""
    done = forked_run(*words)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Poll a condition; the seconds it took.  Fails after `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "swarm.key"
    assert forked_run("node", "new-swarm-key", path).returncode == 0
    return path


@pytest.fixture
def swarm(key: Path) -> Iterator[LocalSwarm]:
    with local_swarm(
        [
            "--threads",
            "1",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--swarm-key",
            str(key),
            "--cache-tokens",
            "4096",
        ],
        spawn=Forked,
    ) as swarm:
        yield swarm


@pytest.mark.real_model
def test_three_nodes_give_the_tokens_of_the_whole_model_and_show_what_they_serve(
    swarm: LocalSwarm, key: Path, builtin_model: ModelFolder
) -> None:
    first = swarm.start("--blocks", "0:10", "--name", "one")
    first.wait_online()
    for blocks in ("10:20", "20:30"):
        swarm.start("--blocks", blocks)
    for node in swarm.nodes:
        node.wait_online()
    join = ["--peers", *swarm.peers, "--swarm-key", key]

    whole = AutoModelForCausalLM.from_pretrained(builtin_model.path)
    found = answer("client", "generate", *join, "--json", "--max-new-tokens", "12", "--threads", "1", PROMPT)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(builtin_model.path)(PROMPT, return_tensors="pt")["input_ids"]
    expected = whole.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert found["tokens"] == expected[0, ids.shape[1] :].tolist()
    assert [hop["blocks"] for hop in found["route"]] == [[0, 10], [10, 20], [20, 30]]

    talk = forked_run(
        *("client", "chat", *join, "--max-new-tokens", "24", "--threads", "1"),
        text="What is the capital of France?\nAnd of Italy?\n",
    )
    assert talk.returncode == 0, talk.stderr
    assert "Paris" in talk.stdout
    assert talk.stderr.count("tokens/s") == 2  # two turns, each with its speed

    status = answer("node", "status", "--json", *join)
    assert {peer["peer"] for peer in status["peers"]} == {n.facts["peer_id"] for n in swarm.nodes}
    (model,) = status["models"]
    assert model["coverage"] == [1] * 30
    assert model["complete"]


def test_the_view_follows_who_leaves_and_who_dies_and_the_client_names_the_hole(
    key: Path, tiny_llama: Path, builtin_model: ModelFolder, tmp_path: Path
) -> None:
    with local_swarm(
        ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"],
        ["--record-ttl", str(TTL_SECONDS), "--swarm-key", str(key)],
        spawn=Forked,
    ) as swarm:
        bootstrap = swarm.start("bootstrap")
        bootstrap.wait_online()
        late = [swarm.start(str(tiny_llama), "--blocks", blocks) for blocks in ("0:2", "2:4")]
        for node in late:
            node.wait_online()
        join = ["--peers", *swarm.peers, "--swarm-key", str(key)]
        generate = [
            "client",
            "generate",
            *join,
            "--model",
            str(tiny_llama),
            "--json",
            "--max-new-tokens",
            "3",
        ]

        # A client that asks too early waits for the last node, and not much longer.
        output, said = tmp_path / "output", tmp_path / "said"
        waiting = Forked(python(*generate, "--wait", "60", "hello"), os.environ, output, said)
        try:
            wait_until(lambda: said.exists() and "waiting up to 60 s" in said.read_text(), 60)
            assert "blocks 4:6 of 6 are served by nobody" in said.read_text()
            last = swarm.start(str(tiny_llama), "--blocks", "4:6")
            last.wait_online()
            assert waiting.wait(60) == 0, said.read_text()
        finally:
            waiting.kill()
        assert len(json.loads(output.read_text())["tokens"]) == 3

        def holes() -> list[list[int]]:
            status = answer("node", "status", "--json", *join)
            return [hole for model in status["models"] for hole in model["holes"]]

        assert holes() == []
        other = forked_run("client", "generate", *join, "--wait", "0.5", "hello")  # the built-in model
        assert other.returncode == 3
        assert "the swarm serves tiny-llama" in other.stderr
        late[0].process.send_signal(signal.SIGTERM)
        assert late[0].process.wait(30) == 0
        assert holes() == [[0, 2]]  # it said good-bye: no TTL to wait for

        last.kill()
        # It does not answer: no TTL to wait for either.
        wait_until(lambda: holes() == [[0, 2], [4, 6]], TTL_SECONDS / 2)

        refused = forked_run(*generate, "--wait", "0.5", "hello")
        assert refused.returncode == 3
        assert "blocks 0:2, 4:6 of 6 are served by nobody" in refused.stderr
        assert "Traceback" not in refused.stderr

        assert late[1].stop() == 0
        assert bootstrap.stop() == 0


def test_a_wrong_or_missing_key_is_refused_with_one_line(key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    assert forked_run("node", "new-swarm-key", other).returncode == 0
    with local_swarm(network=["--swarm-key", str(key)], spawn=Forked) as swarm:
        swarm.start("bootstrap").wait_online()
        for stranger in (["--swarm-key", str(other)], []):
            began = time.monotonic()
            refused = forked_run("node", "status", "--peers", *swarm.peers, *stranger)
            assert refused.returncode == 2
            assert "swarm key" in refused.stderr
            assert len(refused.stderr.strip().splitlines()) == 1
            assert time.monotonic() - began < 30
        assert forked_run("node", "status", "--peers", *swarm.peers, "--swarm-key", key).returncode == 0


def test_ctrl_c_ends_a_waiting_client_without_a_traceback(tiny_llama: Path) -> None:
    with local_swarm(spawn=Forked) as swarm:
        swarm.start("bootstrap").wait_online()
        words = ["client", "generate", "--model", str(tiny_llama), "--peers", *swarm.peers, "hello"]
        with running(python(*words)) as waiting:
            line_of(waiting, "waiting up to 30 s")  # the first client to read a model says so before
            waiting.send_signal(signal.SIGINT)
            out, errors = waiting.communicate(timeout=30)
            assert (waiting.returncode, out, errors) == (130, "", "")
