"""A client's session as a state machine: what is sent to whom, whatever happens to the hops."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from client.chains.avoided_peers import busy_seconds
from client.session.actions import (
    Answered,
    Ask,
    Blame,
    Carry,
    Closed,
    Deliver,
    Late,
    Leave,
    Located,
    Lost,
    Move,
    Moving,
    Note,
    Observe,
    Postpone,
    Reordering,
    Repair,
    Reported,
    Send,
    StepsGivenUp,
    StopSwitching,
    Unanswered,
)
from client.session.core import NEXT, State
from client.session.hop_state import HopState
from client.session.route_state import LATE_SECONDS, REFUSED_SECONDS
from routing.chains.hops import NoChain
from routing.names import PeerId
from tensor_codec.errors import CacheFull, LocalProtocolError, MessageError, PeerGone, Refused, SlowPeer
from tensor_codec.messages.contract import StepRange
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import Here, Opened, Result
from tests.session_world import (
    HELD,
    HIDDEN,
    MAX_LENGTH,
    ROW,
    Peers,
    agree,
    answer_to,
    change_route,
    new_session,
    sound_session,
    submitted,
)


def kinds(actions):
    return [type(action) for action in actions]


def hops(session):
    return "".join(hop.hop.peer for hop in session.route.hops)


def taken(session, pending, now):
    """The caller takes an answer that is there."""
    session.take(pending, pending.result)
    return session.measure(pending, pending.result, now)


def collected(session, pending, now=2.0):
    """The step is answered by the last hop and taken by the caller."""
    (delivered,) = session.receive(Answered(session.route.hops[-1], answer_to(session, pending)), now)
    assert delivered == Deliver(pending)
    return taken(session, pending, now)


# A step is sent only while the route is sound, and again, once, after every change of the route.


def test_a_step_goes_to_the_first_hop_of_a_sound_route():
    session = sound_session()
    pending, send = session.submit(StepRange(0, 3), bytes(3 * ROW), 1.0)
    assert send == Send(pending, session.route.hops[0], bulk=False)
    assert hops(session) == "ABC"


def test_the_time_of_a_step_is_a_measure_of_the_hops_where_its_caller_has_waited_for_most_of_it():
    """A program that computes between two tokens keeps its own process from reading the answer."""
    for awaited, is_measure in ((1.0, True), (2.4, True), (2.6, False)):
        session = sound_session()
        pending = submitted(session)
        pending.wait(awaited)
        session.receive(Answered(session.route.hops[-1], answer_to(session, pending)), 4.0)
        times, action = taken(session, pending, now=9.0)
        assert times.total == 4.0 - pending.began
        assert isinstance(action, Observe) is is_measure
        assert bool(session.relocation.lost_time.recent) is is_measure


def test_a_step_before_the_route_is_sound_is_sent_once_it_is():
    session = new_session()
    pending, send = session.submit(StepRange(0, 1), bytes(ROW), 1.0)
    assert send is None
    assert change_route(session, 2.0) == [Send(pending, session.route.hops[0], bulk=False)]


def test_after_a_change_of_the_route_every_step_without_an_answer_goes_out_again_in_order():
    session = sound_session()
    first, second, third = (submitted(session, tokens=2) for _ in range(3))
    session.receive(Answered(session.route.hops[2], answer_to(session, first)), 2.0)
    session.receive(Lost(session.route.hops[1], PeerGone("gone")), 3.0)
    actions = change_route(session, 4.0)
    sent = [action.pending for action in actions if isinstance(action, Send)]
    assert sent == [second, third]
    assert hops(session) == "AbC"


def test_a_step_that_is_answered_while_the_route_is_changed_goes_out_again_too():
    """Not every hop of the new route may have seen it."""
    session = sound_session()
    first, second = submitted(session), submitted(session)
    old = session.route.hops[2]
    session.receive(Lost(session.route.hops[0], PeerGone("gone")), 2.0)
    session.begin_switch()
    line_up, _ = session.route.line_up(session.route.choose(), session.steps.resume_point().position)
    made = agree(session, line_up)
    session.take_over(line_up, made, 0.0)
    late = answer_to(session, first, epoch=session.route.epoch - 1)
    assert session.receive(Answered(old, late), 3.0) == [Deliver(first)]
    sent = [action.pending for action in session.send_again(4.0) if isinstance(action, Send)]
    assert sent == [first, second]


def test_steps_behind_a_replay_do_not_travel_with_single_tokens_until_the_replay_is_known_to_be_over():
    session = sound_session()
    collected(session, submitted(session, tokens=4))
    session.receive(Lost(session.route.hops[1], PeerGone("gone")), 3.0)
    change_route(session, 4.0)
    assert session.route.refilling
    pending, send = session.submit(StepRange(4, 1), bytes(ROW), 5.0)
    assert send is not None
    assert send.bulk
    collected(session, pending)
    assert session.submit(StepRange(5, 1), bytes(ROW), 6.0)[1].bulk is False


def test_a_long_step_and_those_that_follow_it_travel_apart_from_single_tokens():
    session = sound_session()
    long = 16 * 1024 // ROW + 1
    assert session.submit(StepRange(0, long), bytes(long * ROW), 1.0)[1].bulk
    assert session.submit(StepRange(long, 1), bytes(ROW), 1.0)[1].bulk
    assert not sound_session().submit(StepRange(0, long - 1), bytes((long - 1) * ROW), 1.0)[1].bulk


# An answer is delivered at most once, in the order and the size that were asked for.


def test_an_answer_is_delivered_once():
    session = sound_session()
    pending = submitted(session)
    event = Answered(session.route.hops[2], answer_to(session, pending))
    assert session.receive(event, 2.0) == [Deliver(pending)]
    assert session.receive(event, 2.0) == []


@pytest.mark.parametrize(("position", "tokens"), [(0, 2), (1, 3), (0, 4), (0, 0)])
def test_an_answer_for_other_positions_is_an_error(position, tokens):
    session = sound_session()
    pending = submitted(session, tokens=3)
    wrong = Result(pending.step, position, bytes(tokens * ROW))
    with pytest.raises(MessageError, match="3 from 0 on were asked for"):
        session.receive(Answered(session.route.hops[2], wrong), 2.0)
    assert pending.result is None


def test_a_replay_is_no_answer_to_the_step_whose_number_it_has():
    session = sound_session()
    submitted(session)
    replay = Result(0, 0, bytes(ROW), replay=True)
    assert session.receive(Answered(session.route.hops[2], replay), 2.0) == []


def test_what_a_step_shows_is_noted_for_later_choices_only_if_it_had_the_hops_to_itself():
    session = sound_session()
    _, action = collected(session, submitted(session))
    assert action == Observe(session.route.chain.hops, [1e-5] * 3, 1.0)
    first, second = submitted(session), submitted(session)
    for pending in (first, second):
        session.receive(Answered(session.route.hops[2], answer_to(session, pending)), 2.0)
    assert taken(session, first, 3.0)[1] is None
    assert isinstance(taken(session, second, 3.0)[1], Observe)
    _, action = collected(session, submitted(session, tokens=2))
    assert action is None


# What was given up never meets what comes later.


def test_steps_that_were_given_up_make_the_route_change_before_others_are_sent():
    session = sound_session()
    given_up = submitted(session)
    assert session.receive(StepsGivenUp(), 2.0) == [Repair("steps were given up")]
    assert given_up.given_up
    assert session.before_step(0, 3.0) == Repair("steps were given up")
    other, send = session.submit(StepRange(0, 1), bytes(ROW), 3.0)
    assert send is None
    epoch = session.route.epoch
    sent = [action.pending for action in change_route(session, 4.0) if isinstance(action, Send)]
    assert sent == [other]
    assert session.route.epoch > epoch
    assert session.receive(Answered(session.route.hops[2], Result(given_up.step, 0, bytes(ROW))), 5.0) == []


def test_where_all_steps_are_answered_there_is_nothing_to_give_up():
    session = sound_session()
    pending = submitted(session)
    session.receive(Answered(session.route.hops[2], answer_to(session, pending)), 2.0)
    assert session.receive(StepsGivenUp(), 2.0) == []
    assert session.state is State.SOUND


def test_going_back_where_the_caches_cannot_makes_the_route_change_first():
    session = sound_session(cut=False)
    collected(session, submitted(session, tokens=4))
    assert session.before_step(4, 3.0) is None
    assert session.before_step(2, 3.0) == Repair("going back")
    assert session.state is State.BROKEN
    assert session.steps.length == 2


@pytest.mark.parametrize(("cut", "position"), [(True, 2), (False, 0)])
def test_going_back_where_the_caches_can_changes_nothing(cut, position):
    session = sound_session(cut=cut)
    collected(session, submitted(session, tokens=4))
    assert session.before_step(position, 3.0) is None
    assert (session.state, session.steps.length) == (State.SOUND, position)


# The epoch grows, and nothing of an older one is carried on.


def relayed():
    """A session whose second hop cannot reach the third one."""
    session = sound_session()
    session.receive(Reported(session.route.hops[1], Failed("cannot_push", "no way", peer="C")), 1.0)
    assert session.state is State.BROKEN
    change_route(session, 2.0)
    assert [hop.relay for hop in session.route.hops] == [False, True, False]
    assert [hop.fed for hop in session.route.hops] == [True, False, True]
    return session


def test_what_a_hop_cannot_send_on_is_carried_to_the_next_one():
    session = relayed()
    pending = submitted(session)
    (carry,) = session.receive(Answered(session.route.hops[1], answer_to(session, pending)), 3.0)
    assert isinstance(carry, Carry)
    assert carry.hop is session.route.hops[2]
    assert (carry.step.step, carry.step.reply, carry.step.epoch) == (0, "all", session.route.epoch)
    times, _ = collected(session, pending, 4.0)
    assert len(times.hops) == 6, "the times of the hops before and after"


def test_nothing_of_an_older_epoch_is_carried_and_nothing_without_a_body():
    session = relayed()
    pending = submitted(session)
    old = answer_to(session, pending, epoch=session.route.epoch - 1)
    assert session.receive(Answered(session.route.hops[1], old), 3.0) == []
    empty = Result(pending.step, 0, b"", epoch=session.route.epoch)
    assert session.receive(Answered(session.route.hops[1], empty), 3.0) == []


def test_a_replay_that_has_to_be_carried_stays_a_replay():
    session = relayed()
    replay = Result(7, 0, bytes(2 * ROW), epoch=session.route.epoch, replay=True, rope_length=9)
    (carry,) = session.receive(Answered(session.route.hops[1], replay), 3.0)
    assert (carry.step.reply, carry.step.rope_length) == ("replay", 9)


def test_a_carried_step_has_the_output_of_the_hop_before():
    session = relayed()
    pending = submitted(session)
    result = answer_to(session, pending)
    (carry,) = session.receive(Answered(session.route.hops[1], result), 3.0)
    assert (carry.step.position, carry.step.body) == (result.position, result.body)
    replay = Result(0, 0, bytes(2 * ROW), epoch=session.route.epoch)
    collected(session, pending, 4.0)
    (carry,) = session.receive(Answered(session.route.hops[1], replay), 5.0)
    assert carry.step.reply == "none", "nobody waits for it"


# What a change of the route notes in the trace.


def places(*text):
    return [{"peer": each[0], "blocks": [int(each[1]), int(each[2])]} for each in text]


def switched(session, seconds):
    """The refill and the notes of a change of the route, whose hops all agree."""
    session.begin_switch()
    line_up, _ = session.route.line_up(session.route.choose(), session.steps.resume_point().position)
    return session.take_over(line_up, agree(session, line_up), seconds)


def test_an_opening_is_noted_with_its_hops_and_needs_no_refill():
    opened = Note("opened", {"hops": places("A02", "B24", "C46"), "codec": "fp32", "seconds": 0.5})
    assert switched(new_session(), 0.5) == (None, [opened])


@pytest.mark.parametrize("positions", [1, 4])
def test_a_replaced_hop_is_noted_with_the_replay_that_it_gets(positions):
    session = sound_session()
    collected(session, submitted(session, tokens=positions))
    session.receive(Lost(session.route.hops[1], PeerGone("gone")), 3.0)
    refill, notes = switched(session, 0.25)
    rerouted = {"why": "gone", "kept": ["A", "C"], "opened": ["b"], "hops": places("A02", "b24", "C46")}
    replayed = {"sender": "A", "peer": "b", "start": 0, "stop": positions, "bytes": positions * ROW}
    assert notes == [
        Note("rerouted", {**rerouted, "codec": "fp32", "seconds": 0.25}),
        Note("replayed", replayed),
    ]
    assert [(hop.hop.peer, order.has, order.stop) for hop, order in refill.orders] == [
        ("A", 0, positions),
        ("b", positions, 0),
        ("C", 0, 0),
    ]
    assert (refill.client_from, refill.position, refill.bulk) == (positions, positions, ())


def test_a_replay_from_the_client_has_a_stream_of_its_own_to_the_first_hop():
    session = sound_session()
    collected(session, submitted(session, tokens=4))
    session.receive(Lost(session.route.hops[0], PeerGone("gone")), 3.0)
    refill, _ = switched(session, 0.25)
    assert (refill.client_from, [hop.hop.peer for hop in refill.bulk]) == (0, ["a"])


def test_hops_that_cannot_reach_each_other_are_noted_once():
    session = sound_session()
    session.receive(Reported(session.route.hops[1], Failed("cannot_push", "no way", peer="C")), 1.0)
    _, notes = switched(session, 0.25)
    assert notes[0] == Note("relayed", {"sender": "B", "peer": "C"})
    session.end_switch(2.0, None, done=True)
    session.receive(Lost(session.route.hops[0], PeerGone("gone")), 3.0)
    assert all(note.kind != "relayed" for note in switched(session, 0.25)[1])


def test_a_better_chain_is_another_one():
    session = new_session(peers := Peers(HELD))
    first = session.route.choose()
    assert session.route.instead_of(first) is None
    peers.seconds["a"] = 0.1  # it has become known meanwhile that A is busy
    better = session.route.instead_of(first)
    assert better is not None
    assert [hop.peer for hop in better.hops] == ["a", "B", "C"]


def test_faults_refusals_and_ends_are_noted_with_their_peer_and_reason():
    reports = [
        (Failed("protocol", "no"), "RemoteProtocolError: no", "bad", "no", True),
        (Failed("ended", "idle"), "idle", "gone", "idle", False),
        (Failed("cache_full", "full", 2.0, step=0), "CacheFull: full", "refused", "B refused a step", False),
    ]
    for failed, error, kind, why, blamed in reports:
        session = sound_session()
        hop = session.route.hops[1]
        actions = session.receive(Reported(hop, failed), 2.0)
        assert actions[0] == Note("fault", {"peer": "B", "error": error, "why": kind})
        assert Repair(why) in actions
        assert hop.blamed == blamed
    session = sound_session()
    (note, *leaves, _, repair) = session.receive(Closed(), 2.0)
    assert (note, repair, kinds(leaves)) == (Note("ended"), Repair("closed"), [Leave] * 3)


# Rows that change their order.


def able(session, *peers):
    """These hops have said that they can reorder rows."""
    for hop in session.route.hops:
        if hop.hop.peer in peers:
            hop.opened(Opened(push=True, rows=True))


def test_hops_that_cannot_reorder_rows_are_left_before_the_first_order_and_not_chosen_again():
    session = sound_session()
    able(session, "A", "C")
    actions = session.receive(Reordering(), 2.0)
    assert [action.peer for action in actions if isinstance(action, Postpone)] == ["B"]
    assert kinds(actions).count(Repair) == 1
    assert "B cannot reorder the rows" in str(session.last_error)
    assert session.state is State.BROKEN
    pending, send = session.submit(StepRange(1, 1, rows=(1, 0)), bytes(ROW), 3.0)
    assert send is None
    (*_, sent) = change_route(session, 4.0)
    assert isinstance(sent, Send)
    assert (hops(session), sent.pending) == ("AbC", pending)
    assert "B" not in {hop.peer for hop in session.route.choose(last_resort=True).hops}


def test_a_new_hop_that_cannot_reorder_rows_is_refused_where_steps_reorder_them():
    session = sound_session()
    unable, *_ = session.route.hops
    session.route.check(unable)
    able(session, "B", "C")
    session.receive(Reordering(), 2.0)
    with pytest.raises(Refused, match="A cannot reorder the rows"):
        session.route.check(unable)
    session.route.check(session.route.hops[1])


def test_where_all_hops_can_reorder_rows_nothing_happens():
    session = sound_session()
    able(session, "A", "B", "C")
    assert session.receive(Reordering(), 2.0) == []
    assert session.state is State.SOUND


def test_an_order_is_carried_with_its_step():
    session = relayed()
    what = StepRange(0, 1, rows=(1, 0))
    pending, _ = session.submit(what, bytes(ROW), 2.5)
    (carry,) = session.receive(Answered(session.route.hops[1], answer_to(session, pending)), 3.0)
    assert carry.step.rows == (1, 0)


def test_the_step_that_comes_after_a_replay_is_named_where_steps_reorder_rows():
    for reorders in (False, True):
        session = sound_session()
        collected(session, submitted(session, tokens=4))
        able(session, "A", "B", "C")
        if reorders:
            session.receive(Reordering(), 2.0)
        session.receive(Lost(session.route.hops[1], PeerGone("gone")), 3.0)
        session.begin_switch()
        line_up, _ = session.route.line_up(session.route.choose(), session.steps.resume_point().position)
        refill, _ = session.take_over(line_up, agree(session, line_up), 0.0)
        assert refill.step == (1 if reorders else None)


# A disturbance in the middle of a change starts another change.


@pytest.mark.parametrize("at", ["before the hops agree", "before the steps go out", "at the end"])
def test_a_hop_that_dies_in_the_middle_of_a_change_starts_another(at):
    session = sound_session()
    pending = submitted(session)
    session.receive(Lost(session.route.hops[1], PeerGone("gone")), 2.0)
    session.begin_switch()
    line_up, _ = session.route.line_up(session.route.choose(), session.steps.resume_point().position)
    victim = session.route.hops[0]
    if at == "before the hops agree":
        actions = session.receive(Lost(victim, PeerGone("gone")), 3.0)
    made = agree(session, line_up)
    session.take_over(line_up, made, 0.0)
    if at == "before the steps go out":
        actions = session.receive(Lost(victim, PeerGone("gone")), 3.0)
    session.send_again(3.0)
    if at == "at the end":
        actions = session.receive(Lost(victim, PeerGone("gone")), 3.0)
    assert StopSwitching() in actions
    session.end_switch(4.0, None, done=True)
    assert session.state is State.BROKEN
    sent = [action.pending for action in change_route(session, 5.0) if isinstance(action, Send)]
    assert (hops(session), sent) == ("abC", [pending])


def test_a_change_that_was_not_done_leaves_the_route_broken_with_its_reason():
    session = new_session()
    session.begin_switch()
    session.end_switch(1.0, SlowPeer("too slow"), done=False)
    assert session.state is State.BROKEN
    assert str(session.last_error) == "too slow"


def test_every_state_has_a_place_in_the_table_and_none_follows_the_last_one():
    assert NEXT.keys() == set(State)
    assert NEXT[State.CLOSED] == frozenset()
    session = sound_session()
    with pytest.raises(LocalProtocolError, match="SOUND becomes SWITCHING"):
        session.begin_switch()


def test_a_new_route_says_how_long_it_was_broken_at_the_next_answer():
    session = sound_session()
    collected(session, submitted(session, tokens=2))
    pending = submitted(session)
    session.receive(Lost(session.route.hops[1], PeerGone("gone")), 10.0)
    change_route(session, 12.0)
    _, note = collected(session, pending, 15.0)
    assert note == Note("recovered", {"seconds": 5.0, "replay_seconds": 3.0})
    assert isinstance(collected(session, submitted(session), 16.0)[1], Observe)


# A hop that failed serves no further route, and is blamed once.


def test_a_hop_that_failed_is_blamed_once_and_left():
    session = sound_session()
    lost = session.route.hops[1]
    error = PeerGone("gone")
    actions = session.receive(Lost(lost, error), 2.0)
    assert kinds(actions) == [Note, Blame, Repair, StopSwitching]
    assert error.peer == "B"
    assert session.receive(Lost(lost, PeerGone("again")), 2.0) == []
    assert Leave(lost) in change_route(session, 3.0)
    assert lost not in session.route.opened
    assert not lost.alive


def blame(actions):
    return {action.peer: action.share for action in actions if isinstance(action, Blame)}


WRONG_INPUT = Failed("bad_values", "received hidden states hold NaN", peer="A")


def test_of_a_hop_and_the_neighbour_that_it_reports_each_gets_half_of_the_blame():
    session = sound_session()
    a, b, _ = session.route.hops
    assert blame(session.receive(Reported(b, WRONG_INPUT), 2.0)) == {"A": 0.5, "B": 0.5}
    assert (a.alive, b.alive, a.blamed, b.blamed) == (False, False, True, True)
    change_route(session, 3.0)
    assert hops(session) == "abC"


def test_two_hops_of_which_one_reported_the_other_are_not_neighbours_again():
    for only, expected in ("a", "aBC"), ("b", "AbC"):
        peers = Peers({**{name: HELD[name] for name in "ABC"}, only: HELD[only]})
        session = sound_session(peers)
        session.receive(Reported(session.route.hops[1], WRONG_INPUT), 2.0)
        change_route(session, 3.0)
        assert hops(session) == expected
    session = sound_session(Peers({name: HELD[name] for name in "ABC"}))
    session.receive(Reported(session.route.hops[1], WRONG_INPUT), 2.0)
    change_route(session, 3.0)
    assert hops(session) == "ABC", "there are no others"
    assert session.route.hops[0].relay, "and the client sees what one sends to the other"


def test_a_hop_that_reports_a_second_neighbour_is_at_fault_itself_in_other_sessions_too():
    peers = Peers(HELD)
    session = sound_session(peers)
    session.receive(Reported(session.route.hops[1], WRONG_INPUT), 2.0)
    peers.held = {PeerId(name): HELD[name] for name in "aBCbc"}
    session = sound_session(peers)
    assert hops(session) == "aBC"
    a, b, _ = session.route.hops
    assert blame(session.receive(Reported(b, replace(WRONG_INPUT, peer="a")), 2.0)) == {"B": 1.0}
    assert (a.alive, b.alive) == (True, False)
    assert "has reported" not in str(session.last_error)
    change_route(session, 3.0)
    assert hops(session) == "abC"


@pytest.mark.parametrize("code", ["bad_values", "message", "protocol", "cannot_push"])
def test_a_hop_that_reports_a_peer_that_it_was_not_told_of_is_at_fault(code):
    for who, other in ((0, "C"), (1, "C" if code != "cannot_push" else "A"), (2, "a"), (2, "nobody")):
        session = sound_session()
        hop = session.route.hops[who]
        assert blame(session.receive(Reported(hop, Failed(code, "no", peer=other)), 2.0)) == {hop.hop.peer: 1}
        assert [each.alive for each in session.route.hops].count(False) == 1


def test_a_hop_that_cannot_push_once_is_not_blamed_and_one_that_says_so_of_all_is():
    session = sound_session()
    a, *_ = session.route.hops
    told = Failed("cannot_push", "gone", step=0, peer="B")
    assert blame(session.receive(Reported(a, told), 2.0)) == {}
    assert blame(session.receive(Reported(a, told), 2.0)) == {}, "other steps were on their way"
    change_route(session, 3.0)
    assert (hops(session), a.relay) == ("ABC", True)
    assert blame(session.receive(Reported(a, told), 4.0)) == {"A": 1.0}, "it pushes to nobody now"
    change_route(session, 5.0)
    assert hops(session) == "aBC"


def test_reports_of_a_peer_that_then_fails_before_our_eyes_are_not_held_against_anybody():
    session = sound_session()
    a, b, _ = session.route.hops
    session.receive(Reported(a, Failed("cannot_push", "gone", step=0, peer="B")), 2.0)
    assert blame(session.receive(Lost(b, PeerGone("gone")), 2.1)) == {"B": 1.0}
    change_route(session, 3.0)
    assert hops(session) == "AbC"
    assert blame(session.receive(Reported(a, Failed("cannot_push", "gone", step=0, peer="b")), 4.0)) == {}


def test_a_hop_that_ends_every_session_is_blamed_after_some():
    session = sound_session(Peers({name: HELD[name] for name in "ABC"}))
    for _ in range(2):
        assert blame(session.receive(Reported(session.route.hops[1], Failed("ended", "idle")), 2.0)) == {}
        change_route(session, 3.0)
    assert blame(session.receive(Reported(session.route.hops[1], Failed("ended", "idle")), 4.0)) == {"B": 1.0}
    change_route(session, 5.0)
    step = submitted(session)
    collected(session, step)
    assert blame(session.receive(Reported(session.route.hops[1], Failed("ended", "idle")), 6.0)) == {}


def test_what_a_hop_gives_to_be_carried_on_must_be_of_all_positions_of_the_step():
    session = sound_session()
    a = session.route.hops[0]
    session.receive(Reported(a, Failed("cannot_push", "gone", step=0, peer="B")), 2.0)
    change_route(session, 3.0)
    pending = submitted(session, tokens=3)
    wrong = Result(pending.step, 1, bytes(2 * ROW), epoch=session.route.epoch)
    with pytest.raises(MessageError, match="2 positions from 1 on"):
        session.receive(Answered(a, wrong), 4.0)
    right = Result(pending.step, 0, bytes(3 * ROW), epoch=session.route.epoch)
    assert kinds(session.receive(Answered(a, right), 4.0)) == [Carry]


def test_a_refused_step_postpones_the_peer_and_changes_the_route():
    session = sound_session()
    hop = session.route.hops[1]
    actions = session.receive(Reported(hop, Failed("cache_full", "full", 2.0, step=0)), 2.0)
    assert Postpone(PeerId("B"), 2.0) in actions
    assert isinstance(session.last_error, CacheFull)
    assert hop.alive
    change = session.route.choose()
    assert [hop.peer for hop in change.hops] == ["A", "b", "C"]


def test_a_hop_that_is_about_to_go_is_left_between_two_steps_if_there_is_another():
    session = sound_session()
    session.receive(Reported(session.route.hops[2], Failed("leaving", "draining")), 2.0)
    assert session.state is State.SOUND
    assert session.before_step(0, 3.0) == Move("draining")
    assert session.receive(Moving("draining"), 3.0) == [Repair("draining")]
    session = sound_session(Peers({"A": (0, 6)}))
    session.receive(Reported(session.route.hops[0], Failed("leaving", "draining")), 2.0)
    assert session.receive(Moving("draining"), 3.0) == []
    assert session.state is State.SOUND


# Silence


def test_hops_are_asked_for_a_late_step_and_the_silent_one_is_given_up():
    session = sound_session()
    pending = submitted(session, now=0.0)
    assert pending.watch.look_at == 0.25
    asked = session.receive(Late(pending), 0.25)
    assert asked == [Ask(hop) for hop in session.route.hops]
    a, b, c = session.route.hops
    for hop in (a, b, c):
        hop.ask(0.25)
    for hop in (a, c):
        assert session.receive(Located(hop, Here(0, 0)), 0.3) == []
    assert pending.watch.look_at == 1.0
    actions = session.receive(Late(pending), 1.0)
    assert [action.peer for action in actions if isinstance(action, Blame)] == ["B"]
    assert session.state is State.BROKEN


def test_a_hop_that_says_nothing_in_a_replay_is_given_up():
    session = sound_session()
    a, b, _ = session.route.hops
    a.ask(1.0)
    actions = session.receive(Unanswered(session.route.hops, 2.0), 3.0)
    assert [action.peer for action in actions if isinstance(action, Blame)] == ["A"]
    assert b.alive


def test_a_hop_that_is_busy_for_too_long_is_left_only_where_another_peer_can_take_over():
    for peers, state in ((Peers(HELD), State.BROKEN), (Peers({"A": (0, 6)}), State.SOUND)):
        session = sound_session(peers)
        session.relocation.lost_time.recent.extend([0.1] * 8)
        pending = submitted(session, now=0.0)
        first = session.route.hops[0]
        postponed = []
        for now in (0.25, 1.0, 1.25, 2.5):
            for action in session.receive(Late(pending), now):
                if isinstance(action, Postpone):
                    postponed.append(action.seconds)
                if isinstance(action, Ask):
                    action.hop.ask(now)
                    session.receive(Located(action.hop, Here(0, 1)), now)
        assert session.state is state
        assert first.leaving == (state is State.BROKEN)
        assert first.alive
        assert postponed == ([busy_seconds(1.5)] if first.leaving else [])


def test_why_there_is_no_route_names_what_went_wrong_last_or_who_is_waited_for():
    session = sound_session(Peers({"A": (0, 6)}))
    session.receive(Lost(session.route.hops[0], PeerGone("A is gone")), 2.0)
    why = session.route.why_none(session.last_error, [])
    assert isinstance(why, NoChain)
    assert "A is gone" in str(why)
    late = sound_session().route.why_none(None, [PeerId("B")])
    assert isinstance(late, SlowPeer)
    assert late.peer == "B"
    refused = CacheFull("full", 2.0)
    assert session.route.why_none(refused, []) is refused


def test_new_hops_that_have_not_answered_either_when_another_refused_are_not_asked_next():
    session = new_session()
    session.begin_switch()
    line_up, _ = session.route.line_up(session.route.choose(), 0)
    late = session.route.postpone_late({PeerId("B"), PeerId("b")}, line_up, LATE_SECONDS)
    assert late == [Postpone(PeerId("B"), REFUSED_SECONDS)]
    assert session.route.postpone_late({PeerId("B")}, line_up, 0.9 * LATE_SECONDS) == []
    session = sound_session()
    session.receive(Lost(session.route.hops[0], PeerGone("gone")), 1.0)
    line_up, _ = session.route.line_up(session.route.choose(), 0)
    assert session.route.postpone_late({PeerId("B")}, line_up, LATE_SECONDS) == [], "it has the session"


# The end


def test_after_the_end_nothing_is_sent():
    session = sound_session()
    pending = submitted(session)
    actions = session.receive(Closed(), 2.0)
    assert kinds(actions) == [Note, Leave, Leave, Leave, StopSwitching, Repair]
    assert session.receive(Closed(), 2.0) == []
    assert session.submit(StepRange(1, 1), bytes(ROW), 3.0)[1] is None
    assert session.receive(Lost(session.route.hops[0], PeerGone("gone")), 3.0) == []
    session.end_switch(3.0, None, done=True)
    assert session.state is State.CLOSED
    assert pending.result is None


class SessionOverBadHops(RuleBasedStateMachine):
    """A session and hops that die, refuse, are silent and come back, in any order of events.

    Each hop keeps the steps that it was sent; the last one answers them late, twice, or never.
    """

    @initialize(seed=st.integers(0, 2**32), codec=st.sampled_from(["fp32", "auto"]))
    def begin(self, seed: int, codec: str) -> None:
        self.random = random.Random(seed)
        self.peers = Peers(HELD)
        self.peers.dtypes = dict.fromkeys("ABC", "bfloat16")
        self.session = new_session(self.peers, codec=codec)
        self.now = 0.0
        self.in_air: list[tuple[int, int, StepRange]] = []  # epoch, step
        self.delivered: list[int] = []
        self.given_up: set[int] = set()
        self.failed: set[HopState] = set()
        self.epochs: list[int] = []
        self.closed = False

    def _sent(self, send: Send | None) -> None:
        if send is None:
            return
        assert self.session.state in (State.SOUND, State.SWITCHING), "a step was sent over a broken route"
        assert send.hop is self.session.route.hops[0]
        assert send.pending.step not in self.given_up, "a step that nobody waits for was sent"
        self.in_air.append((self.session.route.epoch, send.pending.step, send.pending.what))

    def _did(self, actions: list) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._sent(action)
            elif isinstance(action, Deliver):
                assert action.pending.step not in self.delivered, "delivered twice"
                assert action.pending.step not in self.given_up
                self.delivered.append(action.pending.step)
            elif isinstance(action, Leave):
                assert not action.hop.alive
            elif isinstance(action, Blame):
                pass

    @rule(seconds=st.floats(0.0, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: not self.closed and len(self.session.steps.pending) < 4)
    @rule(tokens=st.integers(1, 3), back=st.integers(0, 2))
    def caller_submits(self, tokens: int, back: int) -> None:
        session = self.session
        pending = list(session.steps.pending.values())
        if pending:
            position = pending[-1].what.position + pending[-1].what.tokens
        else:
            position = max(0, session.steps.length - back)
            session.before_step(position, self.now)
        if position + tokens <= MAX_LENGTH:
            _, send = session.submit(StepRange(position, tokens), bytes(tokens * ROW), self.now)
            self._sent(send)

    @precondition(lambda self: self.in_air and self.session.route.hops)
    @rule(again=st.booleans())
    def last_hop_answers(self, again: bool) -> None:
        at = self.random.randrange(len(self.in_air))
        epoch, step, what = self.in_air[at] if again else self.in_air.pop(at)
        row = self.session.route.contracts.in_epoch(epoch).row_bytes
        result = Result(step, what.position, bytes(what.tokens * row), ((1, 1),) * 3, epoch=epoch)
        self._did(self.session.receive(Answered(self.session.route.hops[-1], result), self.now))

    @precondition(lambda self: self.session.steps.pending)
    @rule()
    def caller_collects(self) -> None:
        pending = next(iter(self.session.steps.pending.values()))
        if pending.result is not None:
            taken(self.session, pending, self.now)
            assert self.session.steps.length == pending.what.position + pending.what.tokens

    @rule()
    def caller_gives_up(self) -> None:
        lost = [p.step for p in self.session.steps.pending.values() if p.result is None]
        self._did(self.session.receive(StepsGivenUp(), self.now))
        self.given_up.update(lost)
        assert not lost or self.session.state is not State.SOUND

    @precondition(lambda self: self.session.route.opened)
    @rule(what=st.sampled_from(["lost", "refused", "leaving", "cannot_push", "neighbour"]))
    def hop_is_bad(self, what: str) -> None:
        hop = self.random.choice(self.session.route.opened)
        if what == "lost":
            actions = self.session.receive(Lost(hop, PeerGone("gone")), self.now)
            assert hop not in self.failed or actions == [], "one fault, noted twice"
            self.failed.add(hop)
        elif what == "refused":
            actions = self.session.receive(Reported(hop, Failed("cache_full", "full", 2.0, step=0)), self.now)
        elif what == "leaving":
            actions = self.session.receive(Reported(hop, Failed("leaving", "drain")), self.now)
        else:
            code, peer = ("cannot_push", "b") if what == "cannot_push" else ("protocol", "c")
            actions = self.session.receive(Reported(hop, Failed(code, "no way", peer=peer)), self.now)
            self.failed.update(each for each in self.session.route.opened if not each.alive)
        self._did(actions)

    @precondition(lambda self: self.session.steps.pending and self.session.route.hops)
    @rule(answers=st.lists(st.booleans(), min_size=3, max_size=3))
    def step_is_late(self, answers: list[bool]) -> None:
        pending = next(iter(self.session.steps.pending.values()))
        self.now = max(self.now, min(pending.watch.look_at, self.now + 60))
        if self.session.state is State.SOUND and pending.result is None:
            asked = self.session.receive(Late(pending), self.now)
            assert pending.watch.look_at > self.now, (
                "it is looked at again and again without any time passing"
            )
            self._did(asked)
            for action, answer in zip(asked, answers, strict=False):
                if isinstance(action, Ask):
                    action.hop.ask(self.now)
                    if answer:
                        self.session.receive(Located(action.hop, Here(0, 1, pending.step)), self.now)
            self.failed.update(each for each in self.session.route.opened if not each.alive)

    @precondition(lambda self: self.session.state in (State.OPENING, State.BROKEN))
    @rule(disturbed=st.sampled_from([None, None, "before", "after"]))
    def route_is_changed(self, disturbed: str | None) -> None:
        session = self.session
        try:
            chain = session.route.choose(last_resort=True)
        except NoChain:
            return
        session.begin_switch()
        line_up, actions = session.route.line_up(chain, session.steps.resume_point().position)
        self._did(actions)
        assert line_up.epoch > max(self.epochs, default=0), "an epoch came twice"
        self.epochs.append(line_up.epoch)
        if disturbed == "before":
            disturbed = None
            if session.route.opened:
                disturbed = "before"
                self._did(
                    session.receive(
                        Lost(self.random.choice(session.route.opened), PeerGone("gone")), self.now
                    )
                )
                self.failed.update(each for each in session.route.opened if not each.alive)
        made = agree(session, line_up) if session.state is State.SWITCHING else []
        if made:
            assert all(hop.alive and hop not in self.failed for hop in made), "a dead hop serves again"
            session.take_over(line_up, made, 0.0)
            if disturbed == "after":
                self._did(session.receive(Lost(self.random.choice(made), PeerGone("gone")), self.now))
                self.failed.update(each for each in made if not each.alive)
            else:
                waiting = [p.step for p in session.steps.pending.values() if p.result is None]
                sends = session.send_again(self.now)
                self._did(sends)
                assert [a.pending.step for a in sends if isinstance(a, Send)] == waiting
        session.end_switch(self.now, None, done=bool(made) and disturbed != "after")
        assert session.state is not State.SOUND or (made and disturbed != "after")

    @rule()
    def session_is_closed(self) -> None:
        if self.random.random() < 0.1:
            self.closed = True
            self._did(self.session.receive(Closed(), self.now))

    @invariant()
    def the_route_covers_all_blocks_without_a_gap(self) -> None:
        if hasattr(self, "session") and self.session.route.hops:
            reached = 0
            for hop in self.session.route.hops:
                assert hop.hop.start == reached
                reached = hop.hop.stop
            assert reached == self.session.terms.run.stop

    @invariant()
    def a_sound_route_has_no_dead_hop(self) -> None:
        if hasattr(self, "session") and self.session.state is State.SOUND:
            assert all(hop.alive for hop in self.session.route.hops)

    @invariant()
    def the_codec_loses_nothing_of_what_the_hops_send(self) -> None:
        session = getattr(self, "session", None)
        if session is None or session.terms.codec != "auto" or session.state is not State.SOUND:
            return
        exact = any(hop.dtype == "float32" for hop in session.route.hops)
        assert not exact or session.route.contracts.current.codec == "fp32"

    @invariant()
    def after_the_end_nothing_happens(self) -> None:
        if getattr(self, "closed", False):
            assert self.session.state is State.CLOSED
            assert self.session.submit(StepRange(0, 1), bytes(4 * HIDDEN), self.now)[1] is None
            self.session.steps.pending.clear()


TestSessionOverBadHops = SessionOverBadHops.TestCase
TestSessionOverBadHops.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
