"""The examples do what they say, as processes: the node as a newcomer would start it, the others forked."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.lib.processes import local_swarm
from node.network.transport.membership import new_swarm_key
from tests.fault.test_processes import wait_until
from tests.forked import Forked, forked_run
from tests.processes import running

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
START_SECONDS = 90.0


@contextmanager
def node_of(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running node, output and log in one pipe; told to stop at the end, which it must do well."""
    command = [sys.executable, str(EXAMPLES / "run_a_node.py"), *arguments]
    with running(command, stderr=subprocess.STDOUT) as process:
        yield process
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest, rest


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no {pattern!r} in:\n{seen}")


@contextmanager
def forked(output: Path, name: str, *arguments: str) -> Iterator[Forked]:
    """A running example, output and log in one file; told to stop at the end, which it must do well."""
    process = Forked([sys.executable, str(EXAMPLES / name), *arguments], os.environ, output)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(START_SECONDS) == 0, output.read_text()
        assert "Traceback" not in output.read_text(), output.read_text()
    finally:
        process.kill()


def run_to_the_end(name: str, *arguments: str) -> str:
    ran = forked_run(EXAMPLES / name, *arguments, seconds=START_SECONDS)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


LOSSES = re.compile(r"loss after \d+ steps: ([\d.]+)")


def test_lora_trains_on_where_all_of_its_servers_are_replaced_in_the_middle(
    tiny_llama: Path, tmp_path: Path
) -> None:
    flags = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
    with local_swarm([str(tiny_llama), *flags], spawn=Forked) as swarm:
        swarm.start("bootstrap").wait_online()
        swarm.start_spans([(0, 3), (3, 6)])
        words = ["--peers", *swarm.peers, "--model", str(tiny_llama), "--steps", "12"]
        undisturbed = run_to_the_end("lora.py", *words, "--save", str(tmp_path / "one"))
        output = tmp_path / "output"
        command = [sys.executable, str(EXAMPLES / "lora.py"), *words, "--save", str(tmp_path / "two")]
        example = Forked(command, {**os.environ, "PYTHONUNBUFFERED": "1"}, output)
        try:
            wait_until(lambda: output.exists() and "after 1 steps" in output.read_text(), START_SECONDS)
            example.send_signal(signal.SIGSTOP)  # while others come up
            swarm.start_spans([(0, 3), (3, 6)])
            for node in swarm.nodes[1:3]:
                node.kill()
            example.send_signal(signal.SIGCONT)
            assert example.wait(START_SECONDS) == 0, output.read_text()
        finally:
            example.kill()
        losses = LOSSES.findall(output.read_text())
        assert losses == LOSSES.findall(undisturbed)
        assert len(losses) == 13
        assert float(losses[-1]) < float(losses[0])
        saved = [tmp_path / each / "adapter_model.safetensors" for each in ("one", "two")]
        assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.fixture(scope="module")
def swarm_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "swarm.key"
    new_swarm_key(path)
    return path


@pytest.fixture(scope="module")
def joining(tiny_llama: Path, swarm_key: Path) -> Iterator[list[str]]:
    """A private swarm of one node, and the options with which a client joins it."""
    with node_of(str(tiny_llama), "--swarm-key", str(swarm_key)) as node:
        address = read_until(node, r"--peers (/ip4/\S+)").group(1)
        yield ["--peers", address, "--swarm-key", str(swarm_key), "--model", str(tiny_llama)]


def test_a_node_serves_and_a_trio_program_and_a_plain_script_print_the_same_tokens(joining: list[str]):
    prompts = ("HELLO", "WORLD")
    asked = [*joining, "--max-new-tokens", "5", *prompts]
    at_once = run_to_the_end("generate_trio.py", *asked).splitlines()
    assert sorted(line[:5] for line in at_once) == ["HELLO", "WORLD"]
    assert all(len(line) > 5 for line in at_once)
    lines = run_to_the_end("generate_sync.py", *asked).splitlines()
    assert [line[:5] for line in lines] == list(prompts)
    assert sorted(lines) == sorted(at_once)


def test_a_node_says_in_one_line_what_its_operator_must_fix():
    ran = forked_run(EXAMPLES / "run_a_node.py", "--peers", "next door", seconds=START_SECONDS)
    assert ran.returncode == 1
    assert "next door" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def similarity(folder: Path, one: str, other: str) -> float:
    """The cosine of two texts' mean states after half of the blocks, by the library's own model."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    means = []
    for text in (one, other):
        with torch.no_grad():
            found = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        means.append(found[model.config.num_hidden_layers // 2][0, 1:].mean(0))
    return float(torch.nn.functional.cosine_similarity(means[0], means[1], dim=0))


def test_the_web_application_compares_texts_by_the_states_that_the_whole_model_has(
    joining: list[str], tiny_llama: Path, tmp_path: Path
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    output = tmp_path / "output"
    with forked(output, "web_app.py", *joining, "--port", str(port)) as application:

        def is_up() -> bool:
            assert application.poll() is None, output.read_text()
            return output.exists() and "Uvicorn running" in output.read_text()

        wait_until(is_up, START_SECONDS)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=START_SECONDS, trust_env=False
        ) as http:
            for _ in range(2):  # requests share the swarm
                answer = http.get("/nearest", params={"text": "HELLO", "among": ["BYE BYE", "HELLO"]})
                assert answer.status_code == 200, answer.text
                assert answer.json()["nearest"] == [
                    ["HELLO", pytest.approx(1.0, abs=2e-3)],
                    ["BYE BYE", pytest.approx(similarity(tiny_llama, "HELLO", "BYE BYE"), abs=2e-3)],
                ]
            for wrong, words in (
                ({"text": "HELLO"}, "0 texts to compare with, 1 to 15 are allowed"),
                ({"text": "HELLO", "among": ["BYE"] * 16}, "16 texts"),
                ({"text": "HELLO", "among": [""]}, "'' has 0 tokens"),
            ):
                refused = http.get("/nearest", params=wrong)
                assert refused.status_code == 400
                assert words in refused.json()["error"]
