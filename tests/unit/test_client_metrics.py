"""Counters and histograms out of the events of sessions."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.metrics import families as of
from client.metrics.sessions import SessionMetrics
from client.session.actions import fault_note
from client.session.trace import Event, Kind
from node.monitor.metrics.families import Sheet
from routing.names import PeerId
from tensor_codec.errors import (
    BadResult,
    CacheFull,
    Draining,
    FrameError,
    NotAMember,
    PeerFault,
    PeerGone,
    Refused,
    SlowPeer,
)


def event(kind: Kind, **data: Any) -> Event:
    return Event(0.0, kind, data)


def step(tokens: int, seconds: float, *held: float) -> Event:
    return event("step", tokens=tokens, seconds=seconds, hops=[(each, each / 2) for each in held])


def values(metrics: SessionMetrics) -> dict[str, float]:
    sheet = Sheet()
    metrics.put(sheet)
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(sheet.text(is_open=False))
        for sample in family.samples
        if sample.value
    }


def test_every_step_fault_reroute_and_recovery_counts_once_whatever_session_it_is_of():
    metrics = SessionMetrics()
    one, two = metrics.listener(), metrics.listener()
    for listen in (one, two):
        listen(event("opened", hops=[], codec="fp32", seconds=0.3))
        listen(step(40, 0.2, 0.1, 0.1))
        listen(step(1, 0.02, 0.004, 0.012))
    one(event("fault", peer="a", error="gone", why="gone"))
    one(event("rerouted", why="the connection broke", kept=[], opened=["b"], hops=[], seconds=0.04))
    one(event("replayed", sender="c", peer="b", start=0, stop=41, bytes=1000))
    one(event("recovered", seconds=0.11, replay_seconds=0.05))
    two(event("relayed", sender="a", peer="b"))
    two(event("ended"))
    found = values(metrics)
    assert found["raceme_client_sessions_opened_total"] == 2
    assert found["raceme_client_open_seconds_sum"] == pytest.approx(0.6)
    assert found["raceme_client_step_seconds_count{'kind': 'decode'}"] == 2
    assert found["raceme_client_step_seconds_sum{'kind': 'prefill'}"] == pytest.approx(0.4)
    assert found["raceme_client_hop_held_seconds_sum{'hop': '1'}"] == pytest.approx(0.024)
    assert found["raceme_client_hop_held_seconds_count{'hop': '0'}"] == 2
    assert found["raceme_client_faults_total{'why': 'gone'}"] == 1
    assert found["raceme_client_reroutes_total{'why': 'gone'}"] == 1
    assert found["raceme_client_recovery_seconds_sum"] == pytest.approx(0.11)
    assert found["raceme_client_replayed_bytes_total"] == 1000
    assert found["raceme_client_relayed_total"] == 1


def rerouted(why: str) -> Event:
    return event("rerouted", why=why, kept=[], opened=[], hops=[], seconds=0.0)


def test_a_reroute_counts_under_the_last_fault_of_its_session_or_the_reason_of_a_move():
    metrics = SessionMetrics()
    one, two = metrics.listener(), metrics.listener()
    one(event("fault", peer="a", error="", why="refused"))
    one(event("fault", peer="a", error="", why="slow"))
    two(rerouted("draining"))
    one(rerouted("step 3 takes longer"))
    one(rerouted("going back"))
    two(rerouted("slow"))
    assert metrics.reroutes == {"slow": 2, "draining": 1, "moved": 1}
    assert metrics.faults == {"refused": 1, "slow": 1}


def test_hops_beyond_the_eighth_count_as_the_eighth():
    metrics = SessionMetrics()
    metrics.listener()(step(1, 1.0, *[0.1] * 12))
    assert [each.count for each in metrics.held] == [1] * 7 + [5]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (PeerGone("x"), "gone"),
        (SlowPeer("x"), "slow"),
        (BadResult("x"), "bad"),
        (FrameError("x"), "bad"),
        (NotAMember("x"), "bad"),
        (Draining("x"), "draining"),
        (CacheFull("x"), "refused"),
    ],
)
def test_a_fault_says_why_in_one_of_five_words(error: PeerFault | Refused, why: str):
    note = fault_note(PeerId("a"), error)
    assert note.data == {"peer": "a", "error": "x", "why": why}
    assert why in of.WHY
