"""Several gateways side by side, as docs/fleet.md has it: shares, a balancer, and no request that is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.lib.processes import LocalSwarm, free_port, local_swarm
from node.network.transport.identity import load_or_create_identity
from tests.forked import Forked

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "4096"]
UP_SECONDS = 120.0
GATEWAYS = 2
REQUESTS = 12
LONG = 60  # tokens of the answer that runs while its gateway ends


class GatewayProcess:
    """A gateway with an identity of its own."""

    def __init__(self, folder: Path, number: int, model: Path, peers: Sequence[str], identity: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"gateway-{number}.log"
        self.peer = load_or_create_identity(identity).peer_id
        command = [
            sys.executable, "-m", "client", "gateway", "--model", str(model), "--peers", *peers,
            "--port", str(port), "--identity", str(identity),
        ]  # fmt: skip
        self.process = Forked(command, os.environ, self.log)

    @property
    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", timeout=10).status_code == 200
        return False

    def wait_ready(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while not self.is_ready:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture
def identities(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"identity-{number}" for number in range(GATEWAYS)]


@pytest.fixture
def swarm(tiny_llama: Path, identities: list[Path]) -> Iterator[LocalSwarm]:
    """Two nodes that know the gateways by their ids."""
    shares = [f"{load_or_create_identity(path).peer_id}=0.45" for path in identities]
    flags = [word for share in shares for word in ("--share", share)]
    with local_swarm([str(tiny_llama), *FLAGS, *flags], spawn=Forked) as nodes:
        nodes.start_spans([(0, 3), (3, 6)])
        yield nodes


@pytest.fixture
def gateways(
    tmp_path: Path, tiny_llama: Path, swarm: LocalSwarm, identities: list[Path]
) -> Iterator[list[GatewayProcess]]:
    made = [
        GatewayProcess(tmp_path, number, tiny_llama, swarm.peers, identity)
        for number, identity in enumerate(identities)
    ]
    try:
        for gateway in made:
            gateway.wait_ready()
        yield made
    finally:
        for gateway in made:
            gateway.process.kill()
            gateway.process.wait(30)


class Balancer:
    """Sends a request to the next gateway that says it is ready; asks another where one is about to end."""

    def __init__(self, gateways: Sequence[GatewayProcess]) -> None:
        self._gateways = list(gateways)
        self._turns = itertools.count()
        self.answered: list[str] = []

    def complete(self, prompt: str, tokens: int) -> dict[str, Any]:
        first = next(self._turns)
        for turn in range(first, first + 2 * len(self._gateways)):
            gateway = self._gateways[turn % len(self._gateways)]
            if not gateway.is_ready:
                continue
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(
                    f"{gateway.url}/v1/completions",
                    json={"prompt": prompt, "max_tokens": tokens, "temperature": 0},
                    timeout=60,
                )
                if answer.status_code != 503:
                    assert answer.status_code == 200, answer.text
                    self.answered.append(gateway.url)
                    return dict(answer.json())
        raise AssertionError("no gateway takes the request")


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def test_two_gateways_share_a_swarm_and_one_is_taken_out_without_a_lost_request(
    gateways: list[GatewayProcess],
) -> None:
    balancer = Balancer(gateways)
    for gateway in gateways:
        seen = httpx.get(f"{gateway.url}/api/swarm").json()
        assert seen["me"] == gateway.peer
        assert seen["servers"]["online"] == 2
    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(lambda _: text_of(balancer.complete("the sea", 8)), range(REQUESTS)))
        assert len(set(texts)) == 1  # whichever gateway answers
        assert set(balancer.answered) == {gateway.url for gateway in gateways}

        leaving, staying = gateways
        whole = text_of(Balancer([staying]).complete("the sea", LONG))
        assert read_while_ending(leaving) == whole
        balancer.answered.clear()
        more = list(threads.map(lambda _: text_of(balancer.complete("the sea", 8)), range(REQUESTS)))
    assert set(more) == set(texts)
    assert set(balancer.answered) == {staying.url}
    assert leaving.process.wait(60) == 0


def read_while_ending(gateway: GatewayProcess) -> str:
    """The text of an answer in whose midst its gateway is told to end."""
    body = {"prompt": "the sea", "max_tokens": LONG, "temperature": 0, "stream": True}
    text, parts = "", 0
    with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk
            text += text_of(chunk)
            parts += 1
            if parts == 2:
                gateway.process.send_signal(signal.SIGTERM)
                assert not gateway.is_ready
    return text
