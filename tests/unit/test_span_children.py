"""The parts of a request that get a span, out of the events of its sessions."""

from __future__ import annotations

from typing import Any

from client.gateway.telemetry.children import ChildSpan, SessionSpans
from client.session.trace import Event, Kind

HOPS = [{"peer": "a", "blocks": [0, 10]}, {"peer": "b", "blocks": [10, 30]}]


def spans(*events: tuple[float, Kind, dict[str, Any]]) -> list[ChildSpan]:
    session = SessionSpans()
    found = [session.take(Event(at, kind, data)) for at, kind, data in events]
    return [span for span in found if span is not None]


def fault(peer: str, why: str) -> dict[str, Any]:
    return {"peer": peer, "error": "x", "why": why}


def rerouted(*opened: str, seconds: float = 0.1) -> dict[str, Any]:
    return {"why": "x", "kept": ["a"], "opened": list(opened), "hops": HOPS, "seconds": seconds}


def test_an_opened_session_is_a_span_with_its_hops():
    (span,) = spans((5.0, "opened", {"hops": HOPS, "codec": "fp32", "seconds": 0.3}))
    assert (span.name, span.began, span.ended) == ("open_chain", 4.7, 5.0)
    assert span.attributes == {"raceme.hops": ("a 0:10", "b 10:30")}


def test_a_recovery_is_one_span_however_many_faults_it_had():
    (span,) = spans(
        (1.0, "step", {"tokens": 1, "seconds": 0.1, "hops": []}),
        (2.0, "fault", fault("b", "gone")),
        (2.1, "rerouted", rerouted("c")),
        (2.2, "fault", fault("c", "slow")),
        (2.3, "rerouted", rerouted("d", "c")),
        (2.3, "replayed", {"sender": "a", "peer": "d", "start": 0, "stop": 41, "bytes": 1}),
        (2.5, "recovered", {"seconds": 0.5, "replay_seconds": 0.2}),
        (3.0, "ended", {}),
    )
    assert (span.name, span.began, span.ended, span.failed) == ("raceme.recovery", 2.0, 2.5, False)
    assert span.attributes == {
        "raceme.lost_peers": ("b", "c"),
        "raceme.why": ("gone", "slow"),
        "raceme.opened_peers": ("c", "d"),
        "raceme.reroutes": 2,
        "raceme.replayed_positions": 41,
    }


def test_a_recovery_that_the_session_does_not_survive_is_a_failed_span():
    (span,) = spans((2.0, "fault", fault("b", "gone")), (9.0, "ended", {}))
    assert (span.began, span.ended, span.failed) == (2.0, 9.0, True)


def test_a_second_recovery_knows_nothing_of_the_first():
    first, second = spans(
        (1.0, "fault", fault("b", "gone")),
        (1.1, "recovered", {"seconds": 0.1}),
        (5.0, "rerouted", rerouted("c", seconds=0.2)),
        (5.1, "recovered", {"seconds": 0.3}),
    )
    assert first.attributes["raceme.lost_peers"] == ("b",)
    assert second.attributes["raceme.lost_peers"] == ()
    assert (second.began, second.ended) == (4.8, 5.1)


def test_a_session_without_a_fault_ends_without_a_span():
    assert spans((9.0, "ended", {})) == []
