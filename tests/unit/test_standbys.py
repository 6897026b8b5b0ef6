"""The standbys of a session: which there are, and how much of their caches is still true."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.session.hop_state import HopState
from client.session.repair.replay_plan import HopProgress, ResumePoint, plan
from client.session.standby.standbys import AVOIDED_SECONDS, MAX_AVOIDED, MAX_CUTS, Standbys
from routing.blocks import Blocks
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.errors import PeerGone


def hop(peer: str, start: int = 0) -> HopState:
    return HopState(Hop(PeerId(peer), start, start + 3), "float32", "fp32")


def valid(standbys: Standbys, seen: int | None, length: int = 100) -> int | None:
    return standbys.checked(HopProgress(length, 0, seen, follows=True)).valid


def test_positions_below_a_step_that_the_standby_has_not_seen_count_alone():
    standbys = Standbys()
    standbys.sent(0, 0, 10)
    standbys.sent(1, 10, 1)
    assert valid(standbys, 0) is None
    standbys.sent(2, 4, 2)
    standbys.sent(3, 6, 1)
    assert valid(standbys, 1) == 4
    assert valid(standbys, None) == 4
    assert valid(standbys, 2) is None


def test_a_hop_that_was_no_standby_keeps_what_it_says():
    standbys = Standbys()
    standbys.sent(0, 0, 10)
    standbys.sent(1, 2, 1)
    progress = HopProgress(10, 0, 0)
    assert standbys.checked(progress) == progress


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), min_size=1, max_size=200), st.data())
def test_no_position_counts_that_a_later_step_has_replaced(steps, data):
    standbys, contents = Standbys(), [[]]
    for step, (back, tokens) in enumerate(steps):
        position = max(0, len(contents[-1]) - back)
        standbys.sent(step, position, tokens)
        contents.append([*contents[-1][:position], *[step] * tokens])
    seen = data.draw(st.integers(0, len(steps) - 1))
    had, now = contents[seen + 1], contents[-1]
    length = min(len(had), len(now))
    if (most := valid(standbys, seen, len(had))) is not None:
        length = min(length, most)
    assert had[:length] == now[:length]
    assert len(standbys._cuts) <= MAX_CUTS


def test_a_standby_is_no_hop_that_answers_a_step_from_memory():
    point = ResumePoint(7, [], (), 3)
    (order,) = plan([HopProgress(9, 0, 2, follows=True, valid=5)], point).orders
    assert order.length == 5


def test_a_cache_that_cannot_go_back_to_what_is_true_begins_again():
    point = ResumePoint(7, [], (), 3)
    (order,) = plan([HopProgress(7, 0, 2, cut=False, follows=True, valid=5)], point).orders
    assert order.length == 0


def test_standbys_of_no_hop_and_those_that_failed_are_left():
    standbys, route = Standbys(), [hop("A"), hop("B", 3)]
    stays, moved, failed = hop("a"), hop("c", 6), hop("b", 3)
    for each in (stays, moved, failed):
        standbys.add(each, 1)
        standbys.fed(each, 1)
    failed.fail(PeerGone("gone"), blame=False)
    assert standbys.of(Blocks(3, 6)) is None
    assert standbys.leave_others(route) == [moved, failed]
    assert moved.closed
    assert standbys.hops == [stays]
    assert standbys.epochs == {stays: 1}
    standbys.promote([stays])
    assert standbys.hops == []
    assert not stays.closed


def test_a_peer_that_failed_is_not_asked_for_a_while_and_few_are_remembered():
    standbys = Standbys()
    lost, other = hop("a"), hop("b")
    standbys.add(lost, 1)
    standbys.lost(lost, 10.0)
    standbys.lost(other, 10.0)
    assert standbys.avoided(10.0 + AVOIDED_SECONDS - 0.1) == {"a"}
    assert standbys.avoided(10.0 + AVOIDED_SECONDS) == frozenset()
    for number in range(2 * MAX_AVOIDED):
        standbys.avoid(PeerId(str(number)), 20.0)
    assert len(standbys.avoided(20.0)) == MAX_AVOIDED
