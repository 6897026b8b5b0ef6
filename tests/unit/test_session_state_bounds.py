"""What a hop's session does not take: calls out of turn are our own bug, steps after its end the peer's."""

from __future__ import annotations

import pytest

from node.serving.sessions.state import Compute, ServerSession, State
from tensor_codec.errors import LocalProtocolError, RemoteProtocolError
from tensor_codec.messages.contract import StepRange

MOST = 12
STEP = StepRange(0, 4)


def computing() -> ServerSession:
    session = ServerSession(MOST)
    session.receive(1, STEP)
    return session


def test_while_a_step_is_computed_no_other_call_is_taken():
    for call in (
        lambda session: session.receive(2, StepRange(4, 1)),
        lambda session: session.replay(STEP),
        lambda session: session.resume(0),
    ):
        session = computing()
        with pytest.raises(LocalProtocolError):
            call(session)
        assert (session.state, session.length, session.last) == (State.COMPUTING, 0, None)


def test_an_answer_without_a_step_is_our_own_bug():
    for call in (ServerSession.computed, ServerSession.dropped):
        session = ServerSession(MOST)
        with pytest.raises(LocalProtocolError):
            call(session, Compute(1, STEP, None))
        assert (session.state, session.length, session.last) == (State.OPEN, 0, None)


def test_after_its_end_a_session_takes_neither_steps_nor_replays_and_is_not_resumed():
    session = ServerSession(MOST)
    session.close()
    with pytest.raises(RemoteProtocolError, match="step 1 after the session was closed"):
        session.receive(1, STEP)
    with pytest.raises(RemoteProtocolError, match="a replay after the session was closed"):
        session.replay(STEP)
    with pytest.raises(LocalProtocolError):
        session.resume(0)


def test_a_replay_goes_up_to_the_length_that_was_agreed_and_not_beyond():
    session = ServerSession(MOST)
    session.computed(session.replay(StepRange(0, MOST - 1)))
    session.computed(session.replay(StepRange(MOST - 1, 1)))
    assert (session.length, session.last, session.state) == (MOST, None, State.OPEN)
    with pytest.raises(RemoteProtocolError, match="a replay of 1 positions from 12 on does not continue"):
        session.replay(StepRange(MOST, 1))
    assert session.state is State.CLOSED


def test_a_replay_that_was_dropped_may_come_again():
    session = ServerSession(MOST)
    part = session.replay(STEP)
    session.dropped(part)
    assert (session.length, session.state) == (0, State.OPEN)
    session.computed(session.replay(STEP))
    assert session.length == 4


@pytest.mark.parametrize("can_cut", [True, False])
def test_every_model_goes_back_to_nothing(can_cut):
    session = ServerSession(MOST, can_cut=can_cut)
    first = session.receive(1, STEP)
    assert isinstance(first, Compute)
    session.computed(first)
    again = session.receive(2, StepRange(0, 2))
    assert again == Compute(2, StepRange(0, 2), 0)
    assert isinstance(again, Compute)
    session.computed(again)
    session.resume(0)
    assert (session.length, session.last) == (0, None)


def test_what_is_refused_is_said_with_its_numbers():
    for call, says in (
        (lambda session: session.receive(1, StepRange(4, 1)), r"step 1 \(.*\) after step 1 \("),
        (lambda session: session.receive(2, StepRange(5, 1)), "step 2 is for position 5, the cache holds 4"),
        (
            lambda session: session.receive(2, StepRange(4, 9)),
            "step 2 is for 9 positions from 4 on, the .* for 12",
        ),
        (lambda session: session.resume(5), "the session is to go on from 5, the cache holds 4"),
    ):
        session = ServerSession(MOST)
        first = session.receive(1, STEP)
        assert isinstance(first, Compute)
        session.computed(first)
        with pytest.raises(RemoteProtocolError, match=says):
            call(session)
        assert session.state is State.CLOSED
