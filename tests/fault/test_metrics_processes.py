"""Scrapes of real processes: a bootstrap node, nodes that serve, and a gateway that has answered."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import pytest

from benchmarks.gateway.http import value
from benchmarks.lib.processes import LocalSwarm, free_port, local_swarm
from tests.forked import Forked, forked_run
from tests.model_fixtures import save_tiny, save_tiny_tokenizer
from tests.scrapes import GATEWAY_FAMILIES, NODE_FAMILIES, families_of
from tests.unit.test_promtool import PROMTOOL, promtool

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]
UP_SECONDS = 120.0


class Setting(NamedTuple):
    swarm: LocalSwarm
    bootstrap: str
    nodes: list[str]
    gateway: str


def wait_for(url: str) -> None:
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"{url} does not answer with 200"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("metrics")
    model = folder / "tiny"
    save_tiny("llama", model)
    save_tiny_tokenizer(model)
    ports = [free_port() for _ in range(4)]
    with local_swarm([str(model), *FLAGS], spawn=Forked) as swarm:
        swarm.start("bootstrap", "--metrics", f"127.0.0.1:{ports[0]}").wait_online()
        for port, blocks in zip(ports[1:], ("0:3", "3:6"), strict=False):
            swarm.start("--blocks", blocks, "--metrics", f"127.0.0.1:{port}").wait_online()
        command = [
            sys.executable, "-m", "client", "gateway", "--model", str(model), "--peers", *swarm.peers,
            "--port", str(ports[3]), "--threads", "1",
        ]  # fmt: skip
        gateway = Forked(command, os.environ, folder / "gateway.log")
        try:
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            wait_for(f"{urls[3]}/ready")
            yield Setting(swarm, urls[0], urls[1:3], urls[3])
        finally:
            gateway.send_signal(signal.SIGTERM)
            gateway.wait(60)


def scrape(url: str) -> str:
    answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def ours(page: str) -> set[str]:
    return {name for name in families_of(page) if name.startswith("raceme_")}


def test_after_a_completion_every_scrape_shows_its_tokens(setting: Setting) -> None:
    before = [value(scrape(node), "raceme_node_tokens_total") for node in setting.nodes]
    body = {"prompt": [3, 4, 5, 6], "max_tokens": 5, "temperature": 0, "logit_bias": {"0": -100}}
    answer = httpx.post(f"{setting.gateway}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["usage"]["completion_tokens"]
    after = [value(scrape(node), "raceme_node_tokens_total") for node in setting.nodes]
    assert [late - early for early, late in zip(before, after, strict=True)] == [4 + tokens - 1] * 2
    page = scrape(setting.gateway)
    assert value(page, "raceme_gateway_generated_tokens_total") == tokens
    assert value(page, "raceme_gateway_prompt_tokens_total") == 4
    assert value(page, "raceme_gateway_time_to_first_token_seconds_count") == 1
    assert value(page, "raceme_client_step_seconds_count") >= tokens
    assert value(page, "raceme_swarm_server_up") == 2
    assert value(page, "raceme_swarm_blocks_missing") == 0
    assert 'raceme_gateway_requests_total{route="/v1/completions",status="200"} 1.0' in page


def test_a_node_s_scrape_has_its_metrics_and_a_gateway_s_no_others(setting: Setting) -> None:
    for node in setting.nodes:
        assert ours(scrape(node)) == {family.shown for family in NODE_FAMILIES}
    assert ours(scrape(setting.gateway)) <= {family.shown for family in GATEWAY_FAMILIES}
    assert ours(scrape(setting.bootstrap)) < {family.shown for family in NODE_FAMILIES}


def test_health_says_the_state(setting: Setting) -> None:
    health = httpx.get(f"{setting.nodes[1]}/health").json()
    assert (health["status"], health["state"], health["blocks"]) == ("ok", "online", [3, 6])
    assert httpx.get(f"{setting.bootstrap}/health").json()["role"] == "bootstrap"


def test_openmetrics_where_it_is_asked_for(setting: Setting) -> None:
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    for url in (setting.nodes[0], setting.gateway):
        answer = httpx.get(f"{url}/metrics", headers=accept)
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool: make test-metrics brings it")
def test_promtool_objects_to_no_scrape(setting: Setting) -> None:
    for url in (setting.bootstrap, *setting.nodes, setting.gateway):
        assert promtool("check", "metrics", given=scrape(url)) == ""


def test_a_port_in_use_is_one_line_and_code_2(setting: Setting) -> None:
    port = setting.nodes[0].rpartition(":")[2]
    done = forked_run("node", "bootstrap", "--metrics", f"127.0.0.1:{port}", seconds=60)
    assert done.returncode == 2
    assert f"--metrics 127.0.0.1:{port}: cannot listen there" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
