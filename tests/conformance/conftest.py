"""A real gateway over a real node, started once; `make test-conformance` installs the clients that ask it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.lib.processes import local_swarm
from tests.chat_fixtures import chat_tokenizer
from tests.processes import python

KEY = "sk-conformance"
MODEL = "tiny"
READY_SECONDS = 120.0
MAX_POSITION = 4096  # a tool is some hundred tokens, for each is a character


@dataclass(frozen=True, slots=True)
class Served:
    """The gateway.  url: without /v1.  pid: of its process."""

    url: str
    pid: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def base_url(self) -> str:
        """For clients of OpenAI's API."""
        return f"{self.url}/v1"


def save_model(path: Path, *, template: str = "hermes") -> None:
    """A random model of Llama's kind with a tokenizer of characters and a chat template with tools."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_tokenizer(template)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # of distributions that are far from equal
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conformance")
    save_model(path / "model")
    return path


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    keys = folder / "keys"
    keys.write_text(f"tests {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    keys.chmod(0o600)
    with local_swarm(["--threads", "1", "--dtype", "float32", "--device", "cpu"]) as swarm:
        node = swarm.start(str(folder / "model"), "--blocks", "0:2", "--cache-tokens", "65536")
        node.wait_online()
        words = [
            *("client", "gateway", "--peers", *swarm.peers, "--model", folder / "model"),
            *("--served-name", MODEL, "--port", "0", "--api-key-file", keys, "--threads", "1"),
            *("--cors-origin", "https://allowed.example", "--max-queued", "64"),
        ]
        log = folder / "gateway.log"
        with log.open("wb") as file:
            process = subprocess.Popen(python(*words), stdout=file, stderr=file, env=os.environ)
        try:
            yield Served(_ready(process, log), process.pid, process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.returncode == 0, log.read_text()[-2000:]
        assert "Traceback" not in log.read_text()


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the gateway says, once /ready says 200."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        said = log.read_text()
        if "listening at " in said:
            url = said.partition("listening at ")[2].partition(";")[0].strip()
            if httpx.get(f"{url}/ready", headers={"authorization": f"Bearer {KEY}"}).status_code == 200:
                return url
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def http(served: Served) -> Iterator[httpx.Client]:
    """A plain client with the key."""
    with httpx.Client(
        base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120.0
    ) as client:
        yield client


@pytest.fixture(autouse=True)
def in_clients_settings(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables by which OpenAI's clients find a server."""
    monkeypatch.setenv("OPENAI_BASE_URL", served.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
