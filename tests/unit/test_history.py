"""A talk that is full loses its oldest turns, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.generation.history import Message, MessageTooLong, fit_history

SYSTEM = {"role": "system", "content": "s" * 10}


def user(size: int) -> Message:
    return {"role": "user", "content": "u" * size}


def model(size: int) -> Message:
    return {"role": "assistant", "content": "a" * size}


def tokens_of(history: list[Message]) -> list[int]:
    """A token for each letter, and one for each message's opening."""
    return [0] * (sum(len(message["content"]) + 1 for message in history) + 1)


def test_a_talk_with_room_for_an_answer_stays_as_it_is():
    talk = [SYSTEM, user(10), model(20), user(10)]  # 11 + 11 + 21 + 11 + 1 = 55
    fitted = fit_history(talk, tokens_of, 60, 5)
    assert (fitted.history, len(fitted.ids), fitted.dropped) == (talk, 55, 0)


def test_a_full_talk_loses_its_oldest_turns_until_a_quarter_is_free_and_keeps_the_system_message():
    talk = [SYSTEM]
    for _ in range(4):
        talk += [user(9), model(9)]
    talk.append(user(9))  # 11 + 4 * 20 + 10 + 1 = 102
    fitted = fit_history(talk, tokens_of, 104, 5)
    assert fitted.history == [SYSTEM, *talk[5:]]  # 62 of at most 78
    assert (len(fitted.ids), fitted.dropped) == (62, 2)


def test_a_talk_without_a_system_message_begins_with_a_user_s():
    talk = [user(9), model(9), user(9), model(9), user(9)]
    fitted = fit_history(talk, tokens_of, 45, 5)
    assert (fitted.history, fitted.dropped) == (talk[2:], 1)


def test_the_newest_message_may_take_all_but_one_token():
    talk = [SYSTEM, user(50), model(9), user(86)]
    fitted = fit_history(talk, tokens_of, 100, 64)
    assert (fitted.history, len(fitted.ids)) == ([SYSTEM, user(86)], 99)
    with pytest.raises(MessageTooLong, match="takes 100 tokens with what goes before it, 99 are allowed"):
        fit_history([*talk[:-1], user(87)], tokens_of, 100, 64)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=9), st.integers(30, 300)
)
def test_what_is_left_fits_and_is_the_end_of_the_talk(turns, max_length):
    talk = [SYSTEM]
    for asked, said in turns:
        talk += [user(asked), model(said)]
    talk = talk[:-1]
    try:
        fitted = fit_history(talk, tokens_of, max_length, 20)
    except MessageTooLong:
        assert len(tokens_of([SYSTEM, talk[-1]])) >= max_length
        return
    assert len(fitted.ids) < max_length
    assert fitted.history == [SYSTEM, *talk[1 + 2 * fitted.dropped :]]
    assert fitted.dropped < len(turns)
