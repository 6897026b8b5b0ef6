"""`Trace(on_event=...)`: a program hears of each event at its moment."""

from __future__ import annotations

import logging

import pytest

from client.session.trace import Event, Trace


def test_each_event_is_told_at_once_and_in_order():
    heard: list[Event] = []
    trace = Trace(on_event=heard.append)
    trace.add("opened", hops=[])
    assert [event.kind for event in heard] == ["opened"]
    trace.add("fault", peer="x", error="gone")
    assert heard == list(trace.events)
    assert heard[1].data["peer"] == "x"


def test_further_listeners_come_and_go():
    first: list[Event] = []
    second: list[Event] = []
    trace = Trace()
    trace.add("opened")
    trace.listen(first.append)
    trace.listen(second.append)
    trace.add("step")
    trace.unlisten(first.append)
    trace.unlisten(print)  # never listened
    trace.add("ended")
    assert [event.kind for event in first] == ["step"]
    assert [event.kind for event in second] == ["step", "ended"]


def test_the_error_of_a_listener_is_logged_once_and_nobody_else_is_disturbed(
    caplog: pytest.LogCaptureFixture,
):
    heard: list[str] = []

    def broken(event: Event) -> None:
        heard.append(f"broken {event.kind}")
        raise KeyError("of the program")

    for trace in (Trace(on_event=broken), Trace()):
        heard.clear()
        caplog.clear()
        if trace.on_event is None:
            trace.listen(broken)
        trace.listen(lambda event: heard.append(event.kind))
        with caplog.at_level(logging.ERROR):
            trace.add("step")
            trace.add("ended")
        assert heard == ["broken step", "step", "ended"]
        assert len(caplog.records) == 1
        assert "of the program" in caplog.text
        assert trace.counts == {"step": 1, "ended": 1}


def test_without_a_listener_nothing_is_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trace, "_tell", None)
    Trace().add("step")
