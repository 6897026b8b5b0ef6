"""Callers that go: the nodes themselves say, by their counters, that they compute nothing more."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.gateway.http import value
from benchmarks.lib.processes import LocalSwarm, free_port, local_swarm
from tests.conformance.conftest import save_model
from tests.fault.test_gateway_process import GatewayProcess, gateway
from tests.forked import Forked

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "65536"]
GENEROUS_SECONDS = 90.0
STOP_SECONDS = 0.5  # of computing at its rate, at most, once a caller has gone
STILL_SECONDS = 1.5  # without a token, until computing counts as over
MOST_TOKENS = 3500  # of one answer: it takes many times as long as a test
LINGER = struct.pack("ii", 1, 0)  # a close that resets the connection
WITHOUT_END = {"logit_bias": {"1": -100, "2": -100}, "temperature": 0, "max_tokens": MOST_TOKENS}


def scraped(url: str, name: str) -> float:
    """A number of a scrape.  Certificates, which http:// has none of, would be read anew for each scrape."""
    return value(httpx.get(f"{url}/metrics", verify=False).text, name)


@dataclass(slots=True)
class Nodes:
    """The scrapes of a swarm's nodes."""

    swarm: LocalSwarm
    ports: list[int] = field(default_factory=list)

    def start(self, model: Path, blocks: str) -> None:
        self.ports.append(free_port())
        scrape = ("--metrics", f"127.0.0.1:{self.ports[-1]}")
        self.swarm.start(str(model), "--blocks", blocks, *scrape).wait_online()

    def sum_of(self, name: str) -> float:
        return sum(scraped(f"http://127.0.0.1:{port}", name) for port in self.ports)

    @property
    def computed(self) -> float:
        """Tokens that the nodes have computed, each of its own blocks."""
        return self.sum_of("raceme_node_tokens_total")

    def rate(self, seconds: float = 0.5) -> float:
        """Tokens per second of now."""
        before, began = self.computed, time.monotonic()
        time.sleep(seconds)
        return (self.computed - before) / (time.monotonic() - began)

    def until_still(self) -> float:
        """The count of tokens once it has stayed the same for STILL_SECONDS."""
        deadline = time.monotonic() + GENEROUS_SECONDS
        count, since = self.computed, time.monotonic()
        while time.monotonic() < since + STILL_SECONDS:
            assert time.monotonic() < deadline, "the nodes compute on"
            time.sleep(0.1)
            if (now := self.computed) != count:
                count, since = now, time.monotonic()
        return count


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path)
    return path


@pytest.fixture(scope="module")
def nodes(model: Path) -> Iterator[Nodes]:
    with local_swarm(FLAGS, spawn=Forked) as swarm:
        made = Nodes(swarm)
        for blocks in ("0:1", "1:2"):
            made.start(model, blocks)
        yield made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path, nodes: Nodes) -> Iterator[GatewayProcess]:
    with gateway(tmp_path_factory.mktemp("gateway"), model, nodes.swarm, "--max-concurrent", "4") as process:
        process.wait_ready()
        yield process


@contextlib.contextmanager
def asked(process: GatewayProcess, *, receive_bytes: int = 0, **fields: Any) -> Iterator[socket.socket]:
    """A connection on which a request was sent; it is closed with the block, if it is not before."""
    content = json.dumps({"prompt": "hello there", **WITHOUT_END, **fields}).encode()
    with socket.socket() as connection:
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(GENEROUS_SECONDS)
        connection.connect(("127.0.0.1", process.port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(content) + content
        )
        yield connection


def until(what: str, found: Any) -> None:
    deadline = time.monotonic() + GENEROUS_SECONDS
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def gauge(process: GatewayProcess, name: str) -> float:
    return scraped(process.url, name)


def check_idle(process: GatewayProcess, nodes: Nodes) -> None:
    """Nothing of a request is left, at the gateway or at a node."""
    until("the gateway holds a request", lambda: gauge(process, "raceme_gateway_active") == 0)
    assert gauge(process, "raceme_gateway_queued") == 0
    until("a node holds a session", lambda: nodes.sum_of("raceme_node_sessions") == 0)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("answers", [1, 4])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_after_a_caller_has_gone_the_nodes_compute_nothing_more(
    served: GatewayProcess, nodes: Nodes, stream: bool, answers: int, reset: bool
) -> None:
    check_idle(served, nodes)
    begun = nodes.computed
    cancelled = gauge(served, "raceme_gateway_cancelled_total")
    with asked(served, stream=stream, n=answers) as connection:
        until("nothing is computed", lambda: nodes.computed > begun + 20)
        rate = nodes.rate()
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        before = nodes.computed
        connection.close()
        after = nodes.until_still()
    # The rate is that of this machine at this moment; each node may be in the midst of a step.
    assert after - before <= STOP_SECONDS * rate + 2 * answers
    assert after - begun < len(nodes.ports) * answers * MOST_TOKENS
    assert gauge(served, "raceme_gateway_cancelled_total") == cancelled + 1
    check_idle(served, nodes)


def test_a_caller_that_goes_while_it_waits_in_the_queue_is_never_computed(
    served: GatewayProcess, nodes: Nodes
) -> None:
    check_idle(served, nodes)
    begun = nodes.computed
    with asked(served, n=4, stream=True) as first:
        until("nothing is computed", lambda: nodes.computed > begun + 20)
        with asked(served, prompt="how are you?", stream=True):
            until("nobody waits", lambda: gauge(served, "raceme_gateway_queued") == 1)
        until("somebody waits", lambda: gauge(served, "raceme_gateway_queued") == 0)
        rate, before = nodes.rate(), nodes.computed
        first.close()
        after = nodes.until_still()
    assert after - before <= STOP_SECONDS * rate + 8
    check_idle(served, nodes)


def test_a_reader_that_takes_nothing_stops_the_nodes_and_is_left(
    tmp_path: Path, model: Path, nodes: Nodes, served: GatewayProcess
) -> None:
    check_idle(served, nodes)
    begun = nodes.computed
    # Log probabilities make much of a token: the buffers on the way are full long before the answer is over.
    with asked(served, stream=True, logprobs=5, receive_bytes=4096) as connection:
        until("nothing is computed", lambda: nodes.computed > begun + 20)
        after = nodes.until_still()
        assert after - begun < len(nodes.ports) * MOST_TOKENS
        until("the reader is not left", lambda: gauge(served, "raceme_gateway_active") == 0)
        assert nodes.until_still() <= after + len(nodes.ports)  # a step that waited for its reader
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass
    check_idle(served, nodes)
    whole = httpx.post(f"{served.url}/v1/completions", json={"prompt": "hello", "max_tokens": 4}, timeout=60)
    assert whole.status_code == 200
