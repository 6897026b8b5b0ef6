"""Counting the faults of peers."""

from __future__ import annotations

from node.runtime.faults import MAX_COUNTED, Faults
from tensor_codec.errors import MessageError, SlowPeer


def test_faults_are_counted_by_peer_and_kind():
    faults = Faults()
    for peer, fault in (
        ("a", SlowPeer("1 s")),
        ("a", SlowPeer("2 s")),
        ("a", MessageError("x")),
        ("b", SlowPeer("3 s")),
    ):
        faults.add(peer, fault)
    assert faults.counts() == {("a", "SlowPeer"): 2, ("a", "MessageError"): 1, ("b", "SlowPeer"): 1}
    assert [faults.count("a", SlowPeer), faults.count("b", MessageError)] == [2, 0]
    assert ("b", "MessageError") not in faults.counts(), "a question counts nothing"


def test_made_up_peers_fill_no_memory_and_do_not_hide_who_is_often_at_fault():
    faults = Faults()
    for _ in range(3):
        faults.add("often", SlowPeer("late"))
    for number in range(3 * MAX_COUNTED):
        faults.add(f"made up {number}", SlowPeer("late"))
        assert number % 500 or len(faults.counts()) <= MAX_COUNTED
    faults.add("often", SlowPeer("late"))
    assert faults.count("often", SlowPeer) == 4


def test_a_known_peer_drops_nobody_when_the_count_is_full():
    faults = Faults()
    for number in range(MAX_COUNTED):
        faults.add(str(number), SlowPeer("late"))
    faults.add("0", SlowPeer("late"))
    assert len(faults.counts()) == MAX_COUNTED
