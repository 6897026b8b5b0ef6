"""Which hops of a session get another stream, and when."""

from __future__ import annotations

import pytest

from client.session.hop_state import HopState
from client.session.repair.ways import MAX_MOVES, Ways
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.errors import BadResult, CacheFull, PeerFault, PeerGone, Refused, SlowPeer

GONE = PeerGone("the stream broke")


def hop(name: str) -> HopState:
    return HopState(Hop(PeerId(name), 0, 3), "float32", "fp32")


class Relayed:
    """A hop that is reached through a relay.  direct: a direct connection is there."""

    def __init__(self) -> None:
        self.hop, self.ways, self.direct = hop("a"), Ways(), False
        self.ways.add(self.hop, lambda: self.direct)


def test_a_hop_moves_once_a_direct_connection_is_there():
    one = Relayed()
    assert not one.ways.is_move_due([one.hop])
    assert not one.ways.wants(one.hop)
    one.direct = True
    assert one.ways.is_move_due([one.hop, hop("other")])
    assert one.ways.wants(one.hop)
    one.ways.moved(one.hop)
    assert not one.ways.wants(one.hop)


def test_a_hop_that_never_ran_through_a_relay_is_lost_with_its_stream():
    ways, direct = Ways(), hop("a")
    assert not ways.is_move_due([direct])
    assert not ways.broke(direct, GONE)
    assert not ways.wants(direct)


def test_a_hop_whose_stream_breaks_has_one_try():
    one = Relayed()
    assert one.ways.broke(one.hop, GONE)
    assert one.ways.broke(one.hop, GONE), "its sender has seen the same break"
    assert one.ways.wants(one.hop)
    assert not one.ways.stays(one.hop)
    assert not one.ways.broke(one.hop, GONE)
    assert not one.ways.wants(one.hop)


def test_a_hop_whose_better_way_cannot_be_taken_stays_where_it_is():
    one = Relayed()
    one.direct = True
    assert one.ways.is_move_due([one.hop])
    assert one.ways.stays(one.hop)
    assert not one.ways.wants(one.hop)
    assert one.ways.broke(one.hop, GONE), "its old stream may still be saved"


@pytest.mark.parametrize(
    "fault", [SlowPeer("slow"), BadResult("bad"), PeerFault("other"), CacheFull("full", 1)]
)
def test_another_fault_than_a_broken_stream_is_no_matter_of_the_way(fault: PeerFault | Refused):
    one = Relayed()
    assert not one.ways.broke(one.hop, fault)


def test_a_hop_that_was_given_up_gets_no_other_stream():
    one = Relayed()
    one.hop.fail(SlowPeer("silent"), blame=True)
    assert not one.ways.broke(one.hop, GONE)


def test_a_hop_moves_max_moves_times():
    one = Relayed()
    one.direct = True
    for _ in range(MAX_MOVES):
        assert one.ways.is_move_due([one.hop])
        one.ways.moved(one.hop)
    assert not one.ways.is_move_due([one.hop])
    assert not one.ways.broke(one.hop, GONE)


def test_a_hop_that_the_session_left_is_forgotten():
    one = Relayed()
    other = hop("b")
    one.ways.add(other, lambda: True)
    one.ways.keep([other, hop("c")])
    assert list(one.ways.known) == [other]
