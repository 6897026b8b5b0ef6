"""Whom a node meets in its local network, and when again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from node.network.directory.visits import Meeting
from node.network.lan.announcement import write_announcement
from node.network.lan.lan_peers import AGAIN_SECONDS, KEEP_SECONDS, SOON_SECONDS, SOON_TRIES, LanPeers
from node.network.transport.identity import identity_of
from routing.names import PeerId
from tensor_codec.limits import Limits
from tests.fakes import ALICE, BOB

LIMITS = Limits()
HOME = "/ip4/192.168.1.11/tcp/31330"
ELSEWHERE = "/ip4/192.168.1.77/tcp/31330"


def announced(peer: PeerId = BOB.peer_id, address: str = HOME) -> bytes:
    return write_announcement(peer, "public", [address])


def peers(limits: Limits = LIMITS) -> LanPeers:
    return LanPeers(ALICE.peer_id, "public", limits, 0.0)


def invented(count: int) -> Sequence[PeerId]:
    return [identity_of(number.to_bytes(32, "big")).peer_id for number in range(1, count + 1)]


def meetings(known: LanPeers, outcome: Meeting, seconds: float, *, announcing: float = 1e9) -> list[float]:
    """When BOB is met, who announces himself again and again; each meeting ends at once in this way."""
    now, again, found = 0.0, 0.0, list[float]()
    while now < seconds:
        if now >= again:
            known.hear(announced(), now)
            again = now + announcing
        if known.due(now) and known.begin(BOB.peer_id, now) is not None:
            found.append(now)
            known.met(BOB.peer_id, outcome, now)
        now = min(again, now + max(0.001, known.seconds_left(now)))
    return found


def test_a_silent_peer_is_met_again_after_pauses_that_grow_to_a_minute():
    found = meetings(peers(), "silent", 300)
    pauses = [round(later - sooner) for sooner, later in pairwise(found)]
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, AGAIN_SECONDS, AGAIN_SECONDS]


def test_announcements_again_and_again_bring_no_meeting_forward():
    assert meetings(peers(), "silent", 300, announcing=0.5) == meetings(peers(), "silent", 300)


def test_a_peer_that_is_starting_is_met_again_at_once_for_a_while_and_then_rarely():
    found = meetings(peers(), "starting", 120)
    assert found[SOON_TRIES] < (SOON_TRIES + 1) * SOON_SECONDS
    assert len(found) < 2 * SOON_TRIES


def test_a_known_peer_is_looked_for_once_a_minute_and_reported_once():
    known = peers()
    known.hear(announced(), 0.0)
    assert known.due(0.0) == [BOB.peer_id]
    assert known.met(BOB.peer_id, "known", 0.0)
    assert known.due(AGAIN_SECONDS - 1) == []
    assert known.due(AGAIN_SECONDS) == [BOB.peer_id]
    assert not known.met(BOB.peer_id, "known", AGAIN_SECONDS)


def test_a_peer_with_another_address_is_met_at_once_there():
    known = peers()
    known.hear(announced(), 0.0)
    known.met(BOB.peer_id, "known", 0.0)
    known.hear(announced(address=ELSEWHERE), 1.0)
    assert known.due(1.0) == [BOB.peer_id]
    found = known.begin(BOB.peer_id, 1.0)
    assert found is not None
    assert found.addresses == (ELSEWHERE,)
    assert not known.met(BOB.peer_id, "known", 1.0), "one line of the log for each peer"


def test_a_meeting_under_way_is_not_begun_again():
    known = peers()
    known.hear(announced(), 0.0)
    assert known.begin(BOB.peer_id, 0.0) is not None
    known.hear(announced(address=ELSEWHERE), 1.0)
    assert known.due(100.0) == []
    assert known.seconds_left(100.0) == math.inf


def test_a_peer_is_forgotten_some_time_after_its_last_announcement():
    known = peers()
    known.hear(announced(), 0.0)
    known.hear(announced(), 10.0)
    assert known.due(KEEP_SECONDS) == [BOB.peer_id]
    assert known.due(KEEP_SECONDS + 10) == []
    assert known.seconds_left(KEEP_SECONDS + 10) == math.inf


def test_a_node_does_not_meet_itself():
    known = peers()
    known.hear(announced(ALICE.peer_id), 0.0)
    assert known.due(0.0) == []


def test_invented_ids_are_met_at_lan_dials_per_second_after_lan_dials_burst_and_newcomers_come_first():
    known = peers()
    for peer in invented(LIMITS.lan_dials_burst + 10):
        known.hear(announced(peer), 0.0)
    for peer in known.due(0.0)[: LIMITS.lan_dials_burst]:
        assert known.begin(peer, 0.0) is not None
        known.met(peer, "silent", 0.0)
    assert known.begin(known.due(0.0)[0], 0.0) is None
    assert known.seconds_left(0.0) == 1 / LIMITS.lan_dials_per_second
    known.hear(announced(), 60.0)
    assert BOB.peer_id in known.due(60.0)[:11], "the others of the flood that were not met yet, and BOB"


def test_max_lan_peers_are_remembered():
    known = peers(Limits(max_lan_peers=2))
    first, *others = invented(3)
    for number, peer in enumerate((first, *others)):
        known.hear(announced(peer), float(number))
    assert known.due(3.0) == others
    assert not known.met(first, "known", 3.0)
