"""Spans of requests: their names, attributes, children and parents, by the SDK's own exporter in memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from client.gateway.requests import ActiveRequest
from client.gateway.telemetry.spans import NoSpans, OpenTelemetrySpans, caller_context, open_spans
from client.session.trace import Trace
from node.config import ConfigError

HOPS = [{"peer": "a", "blocks": [0, 10]}]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_without_an_endpoint_there_are_no_spans():
    for endpoint in (None, ""):
        assert isinstance(open_spans(endpoint), NoSpans)
    span = NoSpans().request(request())
    span.began()
    span.follow(trace := Trace())
    span.token("end")
    span.ended(200, "")
    assert trace._others == ()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://host", "http://", "nonsense"])
def test_an_endpoint_is_a_url(endpoint: str):
    with pytest.raises(ConfigError, match="a URL is needed"):
        open_spans(endpoint)


def test_where_the_packages_are_missing_the_error_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[otel\]"'):
        open_spans("http://127.0.0.1:4318")


def request(**others: Any) -> ActiveRequest:
    found = ActiveRequest("chatcmpl-1", "chat", "/v1/chat/completions", "tiny", "alice", 0.0, 64, 30)
    for name, value in others.items():
        setattr(found, name, value)
    return found


class Recorded:
    """Spans that are kept in memory."""

    def __init__(self) -> None:
        pytest.importorskip("opentelemetry.sdk", reason="the packages of raceme[otel] are not installed")
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = OpenTelemetrySpans(provider.get_tracer("test"))

    def finished(self) -> list[Any]:
        """In the order of their ends; the request's own is the last."""
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_a_request_is_one_span_with_queue_chain_prefill_and_recovery_below_it(recorded: Recorded):
    asked = request(cached_tokens=20, completion_tokens=3)
    span = recorded.spans.request(asked)
    span.began()
    trace = Trace()
    span.follow(trace)
    trace.add("opened", hops=HOPS, codec="fp32", seconds=0.0)
    span.token(None)
    trace.add("fault", peer="a", error="PeerGone: gone", why="gone")
    trace.add("rerouted", why="gone", kept=[], opened=["b"], hops=HOPS, seconds=0.0)
    trace.add("recovered", seconds=0.1, replay_seconds=0.05)
    span.token(None)
    span.token("end")
    span.ended(200, "")
    *children, whole = recorded.finished()
    assert [child.name for child in children] == ["queue", "open_chain", "prefill", "raceme.recovery"]
    assert all(child.parent.span_id == whole.context.span_id for child in children)
    assert all(whole.start_time <= child.end_time <= whole.end_time for child in children)
    assert whole.name == "chat tiny"
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.id": "chatcmpl-1",
        "raceme.cached_prompt_tokens": 20,
        "http.response.status_code": 200,
    }.items() <= whole.attributes.items()
    assert children[-1].attributes["raceme.opened_peers"] == ("b",)
    assert whole.status.is_ok


STEP = {
    "step": 0,
    "position": 0,
    "tokens": 1,
    "seconds": 0.1,
    "hops": [[0.02, 0.01]],
    "sent": 1,
    "received": 1,
}


def test_a_request_that_asks_for_a_trace_has_its_steps_and_repairs_as_events(recorded: Recorded):
    span = recorded.spans.request(request(traced=True))
    first, second = Trace(), Trace()
    first.add("opened", hops=HOPS, codec="fp32", seconds=0.0)  # by an earlier request: a kept conversation
    span.follow(first)
    span.follow(second)
    first.add("step", **STEP)
    second.add("opened", hops=HOPS, codec="fp32", seconds=0.0)
    second.add("fault", peer="a", error="PeerGone: gone", why="gone")
    second.add("rerouted", why="gone", kept=[], opened=["b"], hops=HOPS, codec="fp32", seconds=0.0)
    second.add("recovered", seconds=0.1, replay_seconds=0.05)
    span.ended(200, "")
    first.add("step", **STEP)  # of the next request
    *children, whole = recorded.finished()
    assert [child.name for child in children] == ["open_chain", "raceme.recovery"]
    assert [(event.name, event.attributes["raceme.session"]) for event in whole.events] == [
        ("raceme.step", 1),
        ("raceme.fault", 2),
        ("raceme.rerouted", 2),
        ("raceme.recovered", 2),
    ]
    assert whole.events[0].attributes["raceme.hops"] == ("a 0:10",)
    assert whole.events[0].attributes["raceme.computed_seconds"] == (0.01,)
    assert all(whole.start_time <= event.timestamp <= whole.end_time for event in whole.events)


def test_without_a_trace_a_span_has_no_events(recorded: Recorded):
    span, trace = recorded.spans.request(request()), Trace()
    span.follow(trace)
    trace.add("step", **STEP)
    span.ended(200, "")
    assert recorded.finished()[-1].events == ()


def test_after_its_end_a_request_hears_nothing_more_of_a_session_that_lives_on(recorded: Recorded):
    span, trace = recorded.spans.request(request()), Trace()
    span.follow(trace)
    span.ended(200, "client")
    trace.add("opened", hops=HOPS, codec="fp32", seconds=0.0)
    assert [each.name for each in recorded.finished()] == ["chat tiny"]
    assert recorded.finished()[0].attributes["raceme.cancelled_by"] == "client"


def test_a_request_that_fails_is_a_span_with_an_error(recorded: Recorded):
    recorded.spans.request(request()).ended(503, "")
    (whole,) = recorded.finished()
    assert not whole.status.is_ok
    assert whole.attributes["error.type"] == "503"


def test_the_caller_s_span_is_the_parent(recorded: Recorded):
    token = caller_context.set({"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
    try:
        recorded.spans.request(request()).ended(200, "")
    finally:
        caller_context.reset(token)
    (whole,) = recorded.finished()
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert f"{whole.parent.span_id:016x}" == PARENT_ID


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", f"00-{TRACE_ID}-{'0' * 16}-01"])
def test_a_header_that_is_no_trace_begins_a_new_one(recorded: Recorded, header: str):
    token = caller_context.set({"traceparent": header})
    try:
        recorded.spans.request(request()).ended(200, "")
    finally:
        caller_context.reset(token)
    (whole,) = recorded.finished()
    assert whole.parent is None
