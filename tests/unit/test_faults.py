"""Counting the faults of peers, and the bans for them."""

from __future__ import annotations

import pytest

from node.network.transport.yamux import StreamReset
from node.network.transport.yamux_limits import YamuxError
from node.runtime.faults import MAX_COUNTED, MAX_GOOD, Faults
from tensor_codec.errors import (
    BadResult,
    ForgedContent,
    FrameError,
    MessageError,
    NotAMember,
    PeerFault,
    PeerGone,
    RemoteProtocolError,
    SlowPeer,
)


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


class Account:
    """Faults with a clock that a test sets, and the bans as they came."""

    def __init__(self) -> None:
        self.now = 0.0
        self.banned: list[str] = []
        self.faults = Faults(
            clock=lambda: self.now,
            prefix_of=lambda peer: peer.partition("@")[2],
            on_ban=self.banned.append,
        )

    def charge(self, peer: str, fault: PeerFault, times: int = 1, *, bans: bool = True) -> None:
        for _ in range(times):
            self.faults.add(peer, fault, bans=bans)


@pytest.mark.parametrize(
    "fault", [FrameError("x"), MessageError("x"), RemoteProtocolError("x"), BadResult("x")]
)
def test_three_faults_of_its_own_accord_ban_a_peer_for_a_quarter_of_a_minute(fault: PeerFault):
    account = Account()
    account.charge("a@192.0.2.1/32", fault, 2)
    assert account.banned == []
    account.charge("a@192.0.2.1/32", fault)
    assert account.banned == ["a@192.0.2.1/32"]
    assert account.faults.banned_seconds("a@192.0.2.1/32") == 15
    assert account.faults.banned() == {"a@192.0.2.1/32": 15.0}
    account.now = 15.0
    assert account.faults.banned_seconds("a@192.0.2.1/32") == 0


@pytest.mark.parametrize(
    "fault", [SlowPeer("1 s"), PeerGone("gone"), NotAMember("key"), StreamReset("reset")]
)
def test_a_bad_network_bans_nobody(fault: PeerFault):
    account = Account()
    account.charge("a", fault, 100)
    assert account.faults.count("a", type(fault)) == 100
    assert account.banned == []


def test_a_fault_that_another_peer_can_have_caused_is_counted_and_bans_nobody():
    account = Account()
    account.charge("a", MessageError("not yours"), 100, bans=False)
    assert account.faults.count("a", MessageError) == 100
    assert account.banned == []


@pytest.mark.parametrize("fault", [YamuxError("window"), ForgedContent("hash")])
def test_one_broken_rule_of_the_muxer_or_one_forged_blob_bans_for_a_minute(fault):
    account = Account()
    account.charge("a", fault)
    assert account.faults.banned_seconds("a") == 60


def test_an_address_with_several_banned_ids_is_suspect_for_a_minute():
    account = Account()
    for number in range(2):
        account.charge(f"{number}@192.0.2.1/32", YamuxError("window"))
    assert not account.faults.is_suspect("192.0.2.1/32")
    account.charge("2@192.0.2.1/32", YamuxError("window"))
    assert account.faults.is_suspect("192.0.2.1/32")
    assert not account.faults.is_suspect("192.0.2.2/32")
    assert account.faults.prefix_counts() == {("192.0.2.1/32", "YamuxError"): 3}
    account.now = 60.0
    assert not account.faults.is_suspect("192.0.2.1/32")


def test_peers_without_an_address_make_no_address_suspect():
    account = Account()
    for number in range(9):
        account.charge(str(number), YamuxError("window"))
    assert not account.faults.is_suspect("")


def test_a_peer_that_worked_is_known_good_for_an_hour_or_until_its_ban():
    account = Account()
    assert not account.faults.is_good("a")
    for peer in "ab":
        account.faults.worked(peer)
    assert account.faults.is_good("a")
    account.charge("b", YamuxError("window"))
    assert not account.faults.is_good("b")
    account.faults.worked("b")
    assert not account.faults.is_good("b"), "nothing counts during a ban"
    account.now = 3601.0
    assert not account.faults.is_good("a")


def test_made_up_peers_fill_no_memory_with_good_work():
    account = Account()
    for number in range(2 * MAX_GOOD):
        account.faults.worked(str(number))
    assert not account.faults.is_good("0")
    assert account.faults.is_good(str(2 * MAX_GOOD - 1))
    assert len(account.faults._good) == MAX_GOOD
