"""When a session searches for a better chain, and when a move to it pays."""

from __future__ import annotations

import pytest

from client.session.repair.lost_time import MIN_STEPS
from client.session.repair.relocation import (
    BETTER,
    COOLDOWN_SECONDS,
    MIN_GAIN_SECONDS,
    SEARCH_SHARE,
    STEPS_AHEAD,
    Relocation,
)
from client.session.steps import StepTimes
from client.session.terms import Terms
from routing.chains.hops import Chain, Hop
from routing.names import PeerId
from tests.session_world import HIDDEN, MAX_LENGTH, WHOLE, Peers

CHAIN = Chain(tuple(Hop(PeerId(name), at, at + 2) for name, at in (("A", 0), ("B", 2), ("C", 4))), 0.6)
HELD = {"A": (0, 2), "B": (2, 4), "C": (4, 6), "b": (2, 4)}


def relocation() -> Relocation:
    return Relocation(Terms("m", "r", WHOLE, HIDDEN, 1, MAX_LENGTH, "fp32"))


def observe(moves: Relocation, *held: float, times: int = 1) -> None:
    """Steps of these seconds at each hop."""
    for _ in range(times):
        moves.observe(CHAIN.hops, StepTimes(sum(held), tuple((one, one) for one in held)), 0.6)


def left(moves: Relocation, peers: Peers, length: int = 10) -> set[str]:
    return {hop.peer for hop in moves.hops_to_leave(CHAIN, length, peers, frozenset())}


def test_no_search_before_more_was_lost_than_a_replay_costs():
    moves = relocation()
    observe(moves, 0.2, 0.2, 0.2, times=MIN_STEPS)
    assert not moves.is_search_due(10, 3, 5.0)
    observe(moves, 0.2, 2.0, 0.2)
    assert moves.is_search_due(10, 3, 5.0)


def test_no_search_for_some_time_after_a_move():
    moves = relocation()
    observe(moves, 0.2, 0.2, 0.2, times=MIN_STEPS)
    observe(moves, 0.2, 9.0, 0.2)
    moves.searched(10.0, 10.5, moves=True)
    observe(moves, 0.2, 9.0, 0.2)
    assert not moves.is_search_due(10, 3, 10.5 + COOLDOWN_SECONDS - 0.1)
    assert moves.is_search_due(10, 3, 10.5 + COOLDOWN_SECONDS)


def test_a_search_that_found_nothing_is_made_again_only_after_a_multiple_of_its_time():
    moves = relocation()
    observe(moves, 0.2, 0.2, 0.2, times=MIN_STEPS)
    observe(moves, 0.2, 9.0, 0.2)
    moves.searched(10.0, 10.1, moves=False)
    assert not moves.is_search_due(10, 3, 10.1 + 0.1 / SEARCH_SHARE - 0.01)
    assert moves.is_search_due(10, 3, 10.1 + 0.1 / SEARCH_SHARE + 0.01)


def test_a_hop_that_has_become_slow_is_left_for_another_holder_of_its_blocks():
    moves = relocation()
    observe(moves, 0.2, 2.0, 0.2, times=3)
    assert left(moves, Peers(HELD, A=0.1, B=0.1, C=0.1, b=0.1)) == {"B"}


def test_the_median_of_the_last_steps_counts_and_not_one_slow_step():
    moves = relocation()
    observe(moves, 0.2, 0.2, 0.2, times=2)
    observe(moves, 0.2, 9.0, 0.2)
    assert left(moves, Peers(HELD, A=0.1, B=0.1, C=0.1, b=0.1)) == set()


@pytest.mark.parametrize(("other", "is_left"), [(0.99, True), (1.01, False)])
def test_a_chain_that_is_not_much_better_is_not_worth_a_move(other, is_left):
    """The present chain takes 0.2 + 1 + 0.2 s; another one may take BETTER of that."""
    moves = relocation()
    observe(moves, 0.2, 1.0, 0.2, times=3)
    seconds = (BETTER * 1.4 * other - 0.4) / 2
    assert (left(moves, Peers(HELD, A=0.1, C=0.1, b=seconds), length=0) == {"B"}) == is_left


def test_a_gain_of_less_than_noise_is_none():
    for scale, is_left in ((1.2, True), (0.8, False)):
        moves = relocation()
        slow = MIN_GAIN_SECONDS * scale
        observe(moves, 1e-6, slow, 1e-6, times=3)
        peers = Peers(HELD, A=5e-7, C=5e-7, b=1e-9)
        assert (left(moves, peers, length=0) == {"B"}) == is_left


def test_a_replay_that_costs_more_than_the_steps_to_come_can_win_is_not_worth_it():
    moves = relocation()
    observe(moves, 0.2, 2.0, 0.2, times=3)
    peers = Peers(HELD, A=0.1, B=0.1, C=0.1, b=0.1)
    # Gain 1.8 s a step; a replay costs 0.15 * 0.6 s * 2/6 for each position.
    longest = int(1.8 * STEPS_AHEAD / (0.15 * 0.6 * 2 / 6))
    assert left(moves, peers, longest - 1) == {"B"}
    assert left(moves, peers, longest + 1) == set()


def test_where_no_other_peer_holds_the_blocks_the_session_stays():
    moves = relocation()
    observe(moves, 0.2, 9.0, 0.2, times=3)
    assert left(moves, Peers({name: HELD[name] for name in "ABC"}, A=0.1, B=0.1, C=0.1)) == set()
