"""The parts of a request that get a span, out of the events of its sessions."""

from __future__ import annotations

from typing import Any

from client.gateway.telemetry.children import ChildSpan, SessionEvents, SessionSpans, SpanEvent
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


# events of a span, for requests that ask for them


def noted(*events: tuple[float, Kind, dict[str, Any]], hops: tuple[str, ...] = ()) -> list[SpanEvent]:
    session = SessionEvents(hops)
    found = [session.take(Event(at, kind, data)) for at, kind, data in events]
    return [event for event in found if event is not None]


def test_every_step_is_an_event_with_the_hops_that_it_took():
    step = {
        "step": 3, "position": 17, "tokens": 1, "seconds": 0.1, "hops": [[0.04, 0.03], [0.05, 0.02]],
        "sent": 64, "received": 65,
    }  # fmt: skip
    (event,) = noted((5.0, "opened", {"hops": HOPS, "codec": "fp32", "seconds": 0.3}), (6.0, "step", step))
    assert (event.name, event.at) == ("raceme.step", 6.0)
    assert event.attributes == {
        "raceme.step": 3,
        "raceme.position": 17,
        "raceme.tokens": 1,
        "raceme.seconds": 0.1,
        "raceme.hops": ("a 0:10", "b 10:30"),
        "raceme.held_seconds": (0.04, 0.05),
        "raceme.computed_seconds": (0.03, 0.02),
        "raceme.sent_bytes": 64,
        "raceme.received_bytes": 65,
    }


def test_the_hops_of_a_session_that_was_open_before_are_known():
    (event,) = noted((1.0, "step", {"tokens": 1, "seconds": 0.1, "hops": []}), hops=("a 0:30",))
    assert event.attributes["raceme.hops"] == ("a 0:30",)


def test_every_fault_and_what_mends_it_is_an_event():
    events = noted(
        (2.0, "fault", fault("b", "gone")),
        (2.1, "rerouted", rerouted("c")),
        (2.2, "relayed", {"sender": "a", "peer": "c"}),
        (2.3, "replayed", {"sender": "a", "peer": "c", "start": 0, "stop": 41, "bytes": 99}),
        (2.5, "recovered", {"seconds": 0.5, "replay_seconds": 0.2}),
        (2.6, "step", {"tokens": 1, "seconds": 0.1, "hops": []}),
        (3.0, "ended", {}),
    )
    assert [(event.name, event.at) for event in events] == [
        ("raceme.fault", 2.0),
        ("raceme.rerouted", 2.1),
        ("raceme.relayed", 2.2),
        ("raceme.replayed", 2.3),
        ("raceme.recovered", 2.5),
        ("raceme.step", 2.6),
    ]
    assert events[0].attributes == {"raceme.peer": "b", "raceme.why": "gone", "raceme.error": "x"}
    assert events[1].attributes["raceme.opened_peers"] == ("c",)
    assert events[3].attributes["raceme.stop"] == 41
    assert events[4].attributes == {"raceme.seconds": 0.5, "raceme.replay_seconds": 0.2}
    assert events[5].attributes["raceme.hops"] == ("a 0:10", "b 10:30")  # of the new route
