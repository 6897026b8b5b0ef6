"""The plan of a recovery: whatever state hops are in, all come to the same position, and no work is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.session.repair.replay_plan import HopOrder, HopProgress, ResumePoint, Sent
from client.session.repair.replay_plan import plan as plan_of
from tensor_codec.messages.contract import StepRange

NEW = HopProgress()


def plan(standings, position, under_way, again=(), *, step=0, ordered=-1):
    return plan_of(standings, ResumePoint(position, under_way, again, step, ordered))


def at(length: int, kept: int = 0, step: int | None = 9, *, cut: bool = True) -> HopProgress:
    return HopProgress(length, kept, step, cut)


def sent(step: int, position: int, tokens: int = 1) -> Sent:
    return Sent(step, StepRange(position, tokens, "all"))


def test_the_hop_before_the_one_that_died_replays_and_the_one_behind_it_needs_nothing():
    found = plan([at(40), NEW, at(40)], 40, [])
    assert found.orders == (HopOrder(40, 0, 40), HopOrder(0, 40, 0), HopOrder(40, 0, 0))
    assert found.replays == ((0, 0, 40),)
    assert found.client_from == 40


def test_the_first_hop_is_fed_by_the_client():
    found = plan([NEW, at(40)], 40, [])
    assert found.orders == (HopOrder(0, 40, 0), HopOrder(40, 0, 0))
    assert (found.replays, found.client_from) == ((), 0)


def test_two_that_died_one_behind_the_other_are_fed_through_the_first_of_them():
    found = plan([at(40), NEW, NEW, at(40)], 40, [])
    assert found.replays == ((0, 0, 40),)
    assert [order.has for order in found.orders] == [0, 0, 40, 0]


def test_two_that_died_apart_are_each_fed_by_the_one_before():
    found = plan([at(40), NEW, at(40), NEW], 40, [])
    assert found.replays == ((0, 0, 40), (2, 0, 40))


def test_a_step_that_some_hops_have_computed_is_kept_and_answered_from_memory():
    found = plan([at(41, step=7), NEW, at(40, step=6)], 40, [sent(7, 40)], [7])
    assert found.orders == (HopOrder(41, 0, 40), HopOrder(0, 40, 0), HopOrder(40, 0, 0))


def test_a_step_that_nobody_waits_for_is_cut_away():
    found = plan([at(41, step=7), at(41, step=7)], 40, [sent(7, 40)], [])
    assert [order.length for order in found.orders] == [40, 40]
    assert (found.replays, found.client_from) == ((), 40)


def test_chunks_that_some_hops_have_are_computed_again_where_there_are_several():
    under_way = [sent(5, 0, 64), sent(6, 64, 64)]
    found = plan([at(128, step=6), NEW], 0, under_way, [5, 6])
    assert found.orders == (HopOrder(0, 0, 0), HopOrder(0, 0, 0))


def test_a_cut_that_has_not_reached_every_hop_is_made_up_for():
    going_back = [sent(8, 10, 3)]
    found = plan([at(13, step=8), at(40, step=7)], 10, going_back, [8])
    assert found.orders == (HopOrder(13, 10, 10), HopOrder(10, 0, 0))
    found = plan([NEW, at(40, step=7)], 10, going_back, [8])
    assert found.orders == (HopOrder(0, 10, 0), HopOrder(10, 0, 0))
    assert found.client_from == 0


def test_a_journal_that_has_lost_its_beginning_makes_its_hop_compute_that_part_again():
    found = plan([at(40), at(40, kept=16), NEW], 40, [])
    assert found.orders == (HopOrder(40, 0, 40), HopOrder(0, 0, 0), HopOrder(0, 0, 0))
    found = plan([at(40, kept=8), at(40, kept=16), NEW], 40, [])
    assert found.client_from == 0, "nobody but the client has everything"
    found = plan([at(40), at(40, kept=16), at(20)], 40, [])
    assert found.replays == ((1, 20, 40),), "what it has lost is not asked for"


def test_a_cache_that_cannot_go_back_begins_again():
    found = plan([at(41, step=7, cut=False), at(40, step=6, cut=False)], 40, [sent(7, 40)], [])
    assert [order.length for order in found.orders] == [0, 40]
    assert found.client_from == 0
    kept = plan([at(41, step=7, cut=False), at(40, step=6, cut=False)], 40, [sent(7, 40)], [7])
    assert [order.length for order in kept.orders] == [41, 40]


@st.composite
def situations(draw):
    position = draw(st.integers(0, 50))
    chunks = draw(st.lists(st.integers(1, 5), max_size=4))
    under_way, length = [], position
    for step, tokens in enumerate(chunks, 100):
        under_way.append(sent(step, length, tokens))
        length += tokens
    again = [one.step for one in under_way] if draw(st.booleans()) else []
    cuts = draw(st.booleans())
    standings = []
    for _ in range(draw(st.integers(1, 5))):
        done = draw(st.integers(0, len(under_way)))
        here = under_way[done - 1].what.position + under_way[done - 1].what.tokens if done else position
        if draw(st.booleans()):
            standings.append(HopProgress(cut=cuts))
            continue
        kept = draw(st.integers(0, here))
        standings.append(HopProgress(here, kept, 99 + done if done else 99, cuts))
    return standings, position, under_way, again


@given(situations())
def test_every_hop_comes_to_the_position_and_nobody_is_asked_for_what_he_has_not(situation):
    standings, position, under_way, again = situation
    found = plan(standings, position, under_way, again)
    lengths = [min(order.length, position) for order in found.orders]
    assert found.client_from == lengths[0]
    for index, (standing, order) in enumerate(zip(standings, found.orders, strict=True)):
        assert order.length <= standing.length
        assert standing.cut or order.length in (0, standing.length)
        if order.length > position:
            assert again == [standing.step], "only the one step that comes again may be there already"
        following = lengths[index + 1] if index + 1 < len(lengths) else None
        if following is None:
            assert (order.has, order.stop) == (0, 0)
        else:  # what follows goes out from the journal up to this hop's own length, then as it is computed
            assert order.has == following
            assert following >= lengths[index] or order.stop == lengths[index]
        if order.has < order.stop:
            assert standing.kept <= order.has


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_where_nothing_is_missing_nothing_is_done(hops):
    found = plan([at(7)] * hops, 7, [])
    assert found.replays == ()
    assert found.client_from == 7
