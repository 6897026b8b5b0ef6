"""A gateway's counters: what a request, a rejection and a scrape leave in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as read

from client.gateway.telemetry.metrics import GatewayMetrics, ScrapedGateway
from client.metrics import families as of

CHAT = "/v1/chat/completions"
FACTS: dict[str, Any] = {"servers": {"online": 3}, "peers": [], "models": []}
GATEWAY = ScrapedGateway(active=2, queued=1, ready=True, model="tiny", revision="r1", facts=FACTS)


@dataclass
class Request:
    route: str = CHAT
    prompt_tokens: int = 30
    cached_tokens: int = 20
    completion_tokens: int = 3
    queued_seconds: float = 0.2


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def scrape(metrics: GatewayMetrics) -> dict[str, float]:
    _, body = metrics.scrape(GATEWAY, "")
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in read(body.decode())
        for sample in family.samples
        if sample.value
    }


def test_a_request_with_three_tokens_is_one_first_token_and_two_further_ones():
    clock = Clock()
    metrics, request = GatewayMetrics(clock), Request()
    metrics.request_began(request)
    clock.now += 0.4
    metrics.first_token(request)
    for _ in range(2):
        clock.now += 0.03
        metrics.token(request)
    clock.now += 0.01
    metrics.ended(request, 200)
    found, labels = scrape(metrics), f"{{'route': '{CHAT}'}}"
    assert found[f"raceme_gateway_time_to_first_token_seconds_count{labels}"] == 1
    assert round(found[f"raceme_gateway_time_to_first_token_seconds_sum{labels}"], 6) == 0.4
    assert found[f"raceme_gateway_time_per_output_token_seconds_count{labels}"] == 2
    assert round(found[f"raceme_gateway_time_per_output_token_seconds_sum{labels}"], 6) == 0.06
    assert round(found[f"raceme_gateway_request_seconds_sum{labels}"], 6) == 0.47
    assert found["raceme_gateway_prompt_tokens_total"] == 30
    assert found["raceme_gateway_cached_prompt_tokens_total"] == 20
    assert found["raceme_gateway_generated_tokens_total"] == 3
    assert found["raceme_gateway_queue_seconds_sum"] == 0.2
    assert not any("cancelled" in name for name in found)


def test_a_request_that_ends_without_a_token_leaves_nothing_behind():
    metrics, request = GatewayMetrics(Clock()), Request(completion_tokens=0)
    metrics.request_began(request)
    metrics.ended(request, 503)
    metrics.ended(Request(completion_tokens=0), 429)  # it never began
    found = scrape(metrics)
    assert found[f"raceme_gateway_request_seconds_count{{'route': '{CHAT}'}}"] == 1
    assert not any("first_token" in name for name in found)
    assert not metrics._running, "nothing is kept of a request that is over"


def test_every_answer_counts_once_under_its_route_and_status():
    metrics = GatewayMetrics(Clock())
    for path in (CHAT, CHAT, "/v1/models/tiny", "/api/swarm", "/", "/assets/a.js", "/ready", "/x"):
        metrics.answered(path, 200)
    metrics.answered(CHAT, 429)
    found = {name: value for name, value in scrape(metrics).items() if "requests_total" in name}
    routes = {CHAT: 2, "/v1/models/{id}": 1, "/api": 1, "page": 2, "/ready": 1, "other": 1}
    assert found == {
        **{
            f"raceme_gateway_requests_total{{'route': '{route}', 'status': '200'}}": count
            for route, count in routes.items()
        },
        f"raceme_gateway_requests_total{{'route': '{CHAT}', 'status': '429'}}": 1,
    }


def test_the_time_that_a_caller_has_measured_to_the_first_token_counts():
    metrics, request = GatewayMetrics(Clock()), Request()
    metrics.request_began(request)
    metrics.first_token(request, 1.5)
    assert scrape(metrics)[f"raceme_gateway_time_to_first_token_seconds_sum{{'route': '{CHAT}'}}"] == 1.5


def test_every_label_comes_from_a_closed_set():
    metrics = GatewayMetrics(Clock())
    for route in ("/v1/models", "/etc/passwd", "/" + "x" * 5000):
        metrics.answered(route, 200)
    metrics.answered("/v1/models", 7)
    for reason in (*of.REASONS, "because", "key\n"):
        metrics.rejected(reason)
    cancelled = Request()
    for by in (*of.CANCELLED_BY, "the moon"):
        metrics.request_began(cancelled)
        metrics.ended(cancelled, 499, by)
    found = scrape(metrics)
    assert found["raceme_gateway_requests_total{'route': 'other', 'status': '200'}"] == 2
    assert found["raceme_gateway_requests_total{'route': '/v1/models', 'status': 'other'}"] == 1
    assert found["raceme_gateway_rejected_total{'reason': 'other'}"] == 3
    assert sum(value for name, value in found.items() if "cancelled" in name) == 4
    assert not any("moon" in name or "passwd" in name for name in found)


def test_a_scrape_has_the_gateway_s_present_and_its_swarm():
    found = scrape(GatewayMetrics(Clock()))
    assert found["raceme_gateway_active"] == 2
    assert found["raceme_gateway_queued"] == 1
    assert found["raceme_gateway_ready"] == 1
    assert found["raceme_swarm_servers{'state': 'online'}"] == 3
    assert any(name.startswith("raceme_build_info") and "'role': 'gateway'" in name for name in found)
