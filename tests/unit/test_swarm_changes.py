"""The events between two views of a swarm."""

from __future__ import annotations

from dataclasses import replace

from routing.names import PeerId
from routing.view.changes import PeerChange, peer_changes
from routing.view.records import Record
from routing.view.view import Entry, SwarmView


def record(name: str, start: int = 0, stop: int = 3, **more: object) -> Record:
    given = Record(
        peer=PeerId(name), role="serve", model="m", revision="r", blocks=6, start=start, stop=stop,
        name=f"the {name}", seq=1,
    )  # fmt: skip
    return replace(given, **more)  # type: ignore[arg-type]  # by their names


def view_of(*records: Record, silent: str = "") -> SwarmView:
    entries = {each.peer: Entry(each, b"", 0.0) for each in records}
    return SwarmView("public", entries=entries, silent=frozenset(map(PeerId, silent)))


def found(before: SwarmView, after: SwarmView) -> list[tuple[str, str]]:
    return [(change.peer, change.what) for change in peer_changes(before, after)]


def test_a_peer_that_comes_or_goes_is_told_of_once_with_its_name_and_blocks():
    empty, one = view_of(), view_of(record("a"))
    assert peer_changes(empty, one) == [PeerChange(PeerId("a"), "the a", "joined", (0, 3))]
    assert peer_changes(one, empty) == [PeerChange(PeerId("a"), "the a", "left", (0, 3))]
    offline = view_of(record("a", state="offline"))
    assert found(one, offline) == [("a", "left")]


def test_a_renewed_record_is_no_event():
    assert found(view_of(record("a")), view_of(record("a", seq=2, queue=3.0, cache_tokens=5))) == []
    assert found(view_of(record("a", state="joining")), view_of(record("a", state="online"))) == []


def test_a_server_of_other_blocks_or_of_another_revision_has_moved():
    before = view_of(record("a"), record("b"))
    after = view_of(record("a", 3, 6), record("b", revision="other"))
    assert found(before, after) == [("a", "moved"), ("b", "moved")]
    assert peer_changes(before, after)[0].blocks == (3, 6)
    announced = view_of(record("a", next_start=3, next_stop=6), record("b"))
    assert found(before, announced) == []  # it may still be dropped


def test_a_peer_without_an_answer_is_silent_and_back_when_it_answers():
    good, silent = view_of(record("a"), record("b")), view_of(record("a"), record("b"), silent="b")
    assert found(good, silent) == [("b", "silent")]
    assert found(silent, silent) == []
    assert found(silent, good) == [("b", "back")]


def test_a_silent_peer_whose_record_ends_has_left_and_is_not_back():
    assert found(view_of(record("a"), silent="a"), view_of()) == [("a", "left")]


def test_a_peer_that_comes_and_does_not_answer_is_told_of_twice():
    assert found(view_of(), view_of(record("a"), silent="a")) == [("a", "joined"), ("a", "silent")]


def test_a_bootstrap_node_has_no_blocks_and_clients_are_left_out():
    way_in = Record(peer=PeerId("boot"), role="bootstrap", name="way in")
    client = Record(peer=PeerId("me"), role="client")
    assert peer_changes(view_of(), view_of(way_in, client)) == [
        PeerChange(PeerId("boot"), "way in", "joined", None)
    ]
