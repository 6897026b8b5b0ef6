"""GET /metrics of a gateway: what requests leave in it, whom it is shown, and nothing of a prompt."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from client.gateway.settings import GatewaySettings
from client.gateway.telemetry.metrics import GatewayMetrics
from client.gateway.telemetry.spans import caller_context
from client.session.trace import Trace
from tests.asgi_client import Exchange, ask
from tests.asyncio_clock import run
from tests.fakes_gateway import FakeSwarm, gateway_of, hole, tiny_tokenizer
from tests.scrapes import GATEWAY_FAMILIES, families_of

COMPLETIONS = "/v1/completions"
SECRET = "hello world"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def asked(swarm: FakeSwarm, *requests: tuple[str, str, Any, dict[str, str]], **more: Any) -> list[Exchange]:
    """The answers to requests (method, path, body, headers), one after the other."""

    async def main() -> list[Exchange]:
        async with gateway_of(swarm, **{"metrics": GatewayMetrics(), **more}) as (_, app):
            return [
                await ask(app, method, path, body, headers=headers)
                for method, path, body, headers in requests
            ]

    return run(main)


def post(body: Any, **headers: str) -> tuple[str, str, Any, dict[str, str]]:
    return "POST", COMPLETIONS, body, headers


SCRAPE = ("GET", "/metrics", None, dict[str, str]())


def value(scrape: str, sample: str) -> float:
    (found,) = re.findall(rf"^{re.escape(sample)} (\S+)$", scrape, re.MULTILINE)
    return float(found)


def test_a_scrape_counts_requests_tokens_and_refusals(tokenizer):
    answers = asked(
        FakeSwarm(tokenizer),
        post({"prompt": SECRET, "max_tokens": 3, "temperature": 0}),
        post({"prompt": SECRET, "max_tokens": "many"}),
        ("GET", "/v1/models/unknown", None, {}),
        ("GET", "/nowhere", None, {}),
        SCRAPE,
    )
    assert [each.status for each in answers] == [200, 400, 404, 404, 200]
    scrape = answers[-1].body.decode()
    usage = answers[0].json()["usage"]
    label = f'{{route="{COMPLETIONS}"}}'
    assert value(scrape, "raceme_gateway_generated_tokens_total") == usage["completion_tokens"] > 1
    assert value(scrape, "raceme_gateway_prompt_tokens_total") == usage["prompt_tokens"]
    assert value(scrape, f"raceme_gateway_time_to_first_token_seconds_count{label}") == 1
    assert (
        value(scrape, f"raceme_gateway_time_per_output_token_seconds_count{label}")
        == usage["completion_tokens"] - 1
    )
    counted = 'raceme_gateway_requests_total{{route="{}",status="{}"}}'
    for route, status in ((COMPLETIONS, 200), (COMPLETIONS, 400), ("/v1/models/{id}", 404), ("other", 404)):
        assert value(scrape, counted.format(route, status)) == 1
    assert value(scrape, "raceme_gateway_active") == 0
    assert value(scrape, "raceme_gateway_ready") == 1
    assert SECRET not in scrape
    known = {family.shown for family in GATEWAY_FAMILIES}
    assert {name for name in families_of(scrape) if name.startswith("raceme")} <= known


def test_a_hole_and_a_draining_gateway_are_not_ready(tokenizer):
    (answer,) = asked(FakeSwarm(tokenizer, seen=hole()), SCRAPE)
    scrape = answer.body.decode()
    assert value(scrape, "raceme_gateway_ready") == 0
    assert re.search(r"^raceme_swarm_blocks_missing\{.*\} [1-9]", scrape, re.MULTILINE)


def test_openmetrics_where_the_header_asks_for_it(tokenizer):
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    (answer,) = asked(FakeSwarm(tokenizer), ("GET", "/metrics", None, accept))
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")


def test_without_metrics_the_path_does_not_exist(tokenizer):
    async def main() -> Exchange:
        async with gateway_of(FakeSwarm(tokenizer)) as (_, app):
            return await ask(app, "GET", "/metrics")

    assert run(main).status == 404


@pytest.mark.parametrize(("access", "status"), [("open", 200), ("key", 401)])
def test_with_keys_a_scrape_needs_one_unless_it_is_open(tokenizer, tmp_path: Path, access, status):
    keys = tmp_path / "keys"
    keys.write_text(f"ann {sha256(b'sk-ann').hexdigest()}\n")
    keys.chmod(0o600)
    shown = {"authorization": "Bearer sk-ann"}
    settings = GatewaySettings(key_file=keys, metrics=access)
    without, with_key = asked(
        FakeSwarm(tokenizer), SCRAPE, ("GET", "/metrics", None, shown), settings=settings
    )
    assert (without.status, with_key.status) == (status, 200)
    if status == 401:
        scrape = with_key.body.decode()
        assert value(scrape, 'raceme_gateway_rejected_total{reason="key"}') == 1


class Span:
    """Notes what it is told."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def began(self) -> None:
        self.said.append("began")

    def follow(self, trace: Trace) -> None:
        self.said.append("follow")

    def leave(self, trace: Trace) -> None:
        self.said.append("leave")

    def token(self, finish_reason: str | None) -> None:
        self.said.append(finish_reason)

    def ended(self, status: int, cancelled_by: str) -> None:
        self.said.append((status, cancelled_by))


class Spans:
    def __init__(self) -> None:
        self.said: list[Any] = []

    def request(self, request: Any) -> Span:
        self.said += [request.route, dict(caller_context.get())]
        return Span(self.said)

    def close(self) -> None:
        """Nothing is open."""


def test_the_span_of_a_request_is_told_of_its_parts_and_its_caller(tokenizer):
    spans = Spans()
    (answer,) = asked(
        FakeSwarm(tokenizer),
        post({"prompt": SECRET, "max_tokens": 2}, traceparent=TRACEPARENT),
        spans=spans,
    )
    assert answer.status == 200
    assert spans.said == [
        COMPLETIONS, {"traceparent": TRACEPARENT}, "began", "follow", None, "length", "leave", (200, ""),
    ]  # fmt: skip
