"""`python -m client gateway` as a process over real nodes: streams, a client that goes, signals, codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from benchmarks.lib.processes import LocalSwarm, local_swarm
from tests.fault.test_operator_adapters import adapter_in
from tests.forked import Forked
from tests.model_fixtures import save_tiny, save_tiny_tokenizer

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]
UP_SECONDS = 120.0
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant: "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that can chat."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def swarm(model: Path) -> Iterator[LocalSwarm]:
    with local_swarm([str(model), *FLAGS], spawn=Forked) as swarm:
        for blocks in ("0:3", "3:6"):
            swarm.start("--blocks", blocks).wait_online()
        yield swarm


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class GatewayProcess:
    """A gateway."""

    def __init__(self, folder: Path, model: Path, peers: list[str], *flags: str) -> None:
        self.port = free_port()
        self.log = folder / f"gateway-{self.port}.log"
        command = [
            sys.executable, "-m", "client", "gateway", "--model", str(model), "--peers", *peers,
            "--port", str(self.port), *flags,
        ]  # fmt: skip
        self.process = Forked(command, os.environ, self.log)
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_ready(self, key: str = "") -> None:
        deadline = time.monotonic() + UP_SECONDS
        headers = {"authorization": f"Bearer {key}"} if key else {}
        while True:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", headers=headers).status_code == 200:
                    return
            time.sleep(0.1)

    @property
    def said(self) -> str:
        """What it has printed until now."""
        return self.log.read_text() if self.log.exists() else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def gateway(folder: Path, model: Path, swarm: LocalSwarm, *flags: str) -> Iterator[GatewayProcess]:
    made = GatewayProcess(folder, model, swarm.peers, *flags)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(30)


def chat(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hello there"}], "temperature": 0, **fields}


def events(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_gateway_streams_is_left_and_ends_with_code_0(
    tmp_path: Path, model: Path, swarm: LocalSwarm
) -> None:
    with gateway(tmp_path, model, swarm) as process:
        process.wait_ready()
        with httpx.Client(base_url=process.url, timeout=60) as web:
            (listed,) = web.get("/v1/models").json()["data"]
            assert listed["raceme"]["complete"]
            whole = web.post("/v1/chat/completions", json=chat(max_tokens=12)).json()
            streamed = web.post("/v1/chat/completions", json=chat(max_tokens=12, stream=True))
            deltas = [choice["delta"] for each in events(streamed.text) for choice in each["choices"]]
            text = "".join(delta.get("content", "") for delta in deltas)
            assert text == whole["choices"][0]["message"]["content"]
            assert streamed.text.endswith("data: [DONE]\n\n")
            again = web.post("/v1/chat/completions", json=chat(max_tokens=12)).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            traced = web.post("/v1/chat/completions", json=chat(stream=True, raceme={"trace": True}))
            hops = [each["raceme"]["hops"] for each in events(traced.text) if "raceme" in each]
            assert {peer for peer, _, _ in hops[-1]} == {node.facts["peer_id"] for node in swarm.nodes}
            assert again["choices"] == whole["choices"], "a kept conversation gives the same tokens"
            logprobs = web.post(
                "/v1/completions", json={"prompt": "ab", "logprobs": 2, "max_tokens": 3}
            ).json()
            assert all(value <= 0 for value in logprobs["choices"][0]["logprobs"]["token_logprobs"])
            given = {"prompt": "hello there", "logprobs": 1, "temperature": 0, "max_tokens": 6}
            made = web.post("/v1/completions", json=given).json()["choices"][0]
            echoed = {**given, "prompt": str(given["prompt"]) + made["text"], "echo": True, "max_tokens": 0}
            seen = web.post("/v1/completions", json=echoed).json()["choices"][0]
            assert seen["text"] == echoed["prompt"]
            assert seen["logprobs"]["token_logprobs"][0] is None
            own = made["logprobs"]["token_logprobs"]
            assert seen["logprobs"]["token_logprobs"][-len(own) :] == pytest.approx(own, abs=1e-3)
            with web.stream("POST", "/v1/chat/completions", json=chat(max_tokens=90, stream=True)) as left:
                next(left.iter_lines())
            assert web.get("/health").json() == {"status": "ok"}
            refused = web.post("/v1/chat/completions", json=chat(max_tokens=1000))
            assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert process.stop() == 0, process.said
        assert "Traceback" not in process.said


def test_keys_are_read_again_and_ctrl_c_ends_with_code_0(
    tmp_path: Path, model: Path, swarm: LocalSwarm
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann {sha256(b'one').hexdigest()}\n")
    keys.chmod(0o600)
    with gateway(tmp_path, model, swarm, "--api-key-file", str(keys)) as process:
        process.wait_ready("one")

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.get(f"{process.url}/v1/models", headers=headers).status_code

        assert (status("one"), status("two")) == (200, 401)
        keys.write_text(f"bob {sha256(b'two').hexdigest()}\n")
        process.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while status("two") != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status("one") == 401
        assert process.stop(signal.SIGINT) == 0, process.said


def test_an_incomplete_swarm_is_code_3_and_a_lazy_gateway_waits(tmp_path: Path, model: Path) -> None:
    with local_swarm([str(model), *FLAGS], spawn=Forked) as half:
        half.start("--blocks", "0:3").wait_online()
        with gateway(tmp_path, model, half, "--wait", "1") as process:
            assert process.process.wait(UP_SECONDS) == 3
            assert "3:6" in process.said
        with gateway(tmp_path, model, half, "--lazy", "--wait", "0") as process:
            deadline = time.monotonic() + UP_SECONDS
            while "waiting for the swarm" not in process.said:
                assert process.process.poll() is None, process.said
                assert time.monotonic() < deadline
                time.sleep(0.1)
            found = httpx.get(f"{process.url}/ready")
            assert (found.status_code, found.json()["missing_blocks"]) == (503, [[3, 6]])
            half.start("--blocks", "3:6").wait_online()
            process.wait_ready()
            assert process.stop() == 0


def test_a_server_that_dies_costs_no_token_and_an_adapter_is_a_model(tmp_path: Path, model: Path) -> None:
    adapter_in(tmp_path / "poems", model)
    with local_swarm([str(model), *FLAGS], spawn=Forked) as swarm:
        for blocks in ("0:3", "3:6", "3:6"):
            swarm.start("--blocks", blocks).wait_online()
        nodes = {node.facts["peer_id"]: node for node in swarm.nodes[1:]}
        with (
            gateway(tmp_path, model, swarm, "--adapter", str(tmp_path / "poems")) as process,
            httpx.Client(base_url=process.url, timeout=60) as web,
        ):
            process.wait_ready()
            text, killed = "", False
            body = chat(max_tokens=80, stream=True, raceme={"trace": True})
            with web.stream("POST", "/v1/chat/completions", json=body) as found:
                for line in found.iter_lines():
                    for each in events(line):
                        text += each["choices"][0]["delta"].get("content", "")
                        hops = [hop[0] for hop in each.get("raceme", {}).get("hops", [])]
                        if len(text) > 20 and hops and not killed:
                            killed = True
                            next(nodes[peer] for peer in hops if peer in nodes).kill()
            assert killed
            whole = web.post("/v1/chat/completions", json=chat(max_tokens=80)).json()
            assert whole["choices"][0]["message"]["content"] == text
            assert [each["id"] for each in web.get("/v1/models").json()["data"]] == ["tiny", "tiny:poems"]
            other = web.post("/v1/chat/completions", json=chat(max_tokens=80, model="tiny:poems")).json()
            assert other["model"] == "tiny:poems"
            assert other["choices"][0]["message"]["content"] != text


def test_a_port_in_use_is_code_2(tmp_path: Path, model: Path, swarm: LocalSwarm) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = GatewayProcess(tmp_path, model, swarm.peers, "--port", str(taken.getsockname()[1]))
        assert process.process.wait(UP_SECONDS) == 2
    assert "--port" in process.said
