"""The memory for tapes goes to those who train, and is shared by prefix and by peer where it is scarce."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.serving.training.tapes import KeptTape, TapeBudget
from tensor_codec.blocks import Blocks
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.forward_backward import Run
from tensor_codec.span_spec import SpanSpec

HOME, CROWD = "192.0.2.1/32", "198.51.100.1/32"
RUN = Run(SpanSpec("m", "r", Blocks(2, 5), "float32"), 2, "fp32")
CONTRACT = Contract(b"", 2, 5, 2, 8, 4, "fp32", 64)


def tape(peer: str = "a", number: int = 0, size: int = 10, *, prefix: str = "", since: float = 0) -> KeptTape:
    run = replace(RUN, tape=bytes([number]) * 16)
    return KeptTape(peer, run, CONTRACT, size, prefix, since)


def kept(budget: TapeBudget, *tapes: KeptTape) -> list[KeptTape]:
    """All these tapes, open and then kept, one after the other."""
    for each in tapes:
        assert budget.open(each)
        budget.keep(each)
    return list(tapes)


def here(budget: TapeBudget, tapes: list[KeptTape]) -> list[bool]:
    """Whether each is there."""
    return [budget._tapes.get((each.peer, each.id)) is each for each in tapes]


def test_a_tape_is_taken_once_and_by_its_own_peer():
    budget = TapeBudget(100, 30)
    (one,) = kept(budget, tape("a", 1))
    assert budget.take("b", one.id) is None
    assert budget.take("a", bytes(16)) is None
    assert budget.take("a", one.id) is one
    assert budget.take("a", one.id) is None  # busy
    budget.close(one)
    budget.close(one)
    assert (budget.used, len(budget), budget.take("a", one.id)) == (0, 0, None)


def test_a_tape_is_not_taken_before_its_forward_is_done():
    budget = TapeBudget(100, 30)
    one = tape("a", 1)
    assert budget.open(one)
    assert budget.take("a", one.id) is None
    budget.keep(one)
    assert budget.take("a", one.id) is one


def test_one_peer_may_have_all_and_its_oldest_tape_goes_first():
    budget = TapeBudget(100, 30)
    tapes = kept(budget, *(tape("a", number) for number in range(10)))
    assert here(budget, tapes) == [True] * 10
    kept(budget, tape("a", 10, 15))
    assert here(budget, tapes) == [False] * 2 + [True] * 8


def test_a_tape_larger_than_the_memory_or_than_what_may_go_drops_nothing():
    budget = TapeBudget(100, 30)
    tapes = kept(budget, tape("a", 1, 60, prefix=CROWD), tape("b", 1, 40, prefix=HOME))
    assert not budget.open(tape("a", 2, 101, prefix=CROWD))
    # a would hold more than b then, so it may drop its own one alone, and 70 need more.
    assert not budget.open(tape("a", 2, 70, prefix=CROWD))
    assert here(budget, tapes) == [True, True]
    assert budget.open(tape("a", 2, 60, prefix=CROWD))
    assert here(budget, tapes) == [False, True]


def test_a_tape_that_is_computed_with_is_never_dropped():
    budget = TapeBudget(100, 30)
    one, two = kept(budget, tape("a", 1, 50), tape("a", 2, 50))
    assert budget.take("a", one.id) is one
    kept(budget, tape("a", 3, 50))
    assert here(budget, [one, two]) == [True, False]
    budget.drop_all()
    budget.drop_idle(1000)
    assert here(budget, [one]) == [True]
    assert not budget.open(tape("a", 4, 60))


def test_the_largest_prefix_gives_way_and_in_it_the_largest_peer_with_its_oldest():
    budget = TapeBudget(100, 30)
    tapes = kept(
        budget,
        tape("id 1", 1, 20, prefix=CROWD),
        tape("id 2", 2, 20, prefix=CROWD),
        tape("id 2", 3, 20, prefix=CROWD),
        tape("me", 4, 10, prefix=HOME),
        tape("id 3", 5, 30, prefix=CROWD),
    )
    kept(budget, tape("me", 6, 20, prefix=HOME))
    assert here(budget, tapes) == [True, False, True, True, True]
    kept(budget, tape("me", 7, 20, prefix=HOME))
    assert here(budget, tapes) == [True, False, True, True, False]
    # Half each: from now on everybody drops tapes of their own.
    assert not budget.open(tape("id 4", 8, 60, prefix=CROWD))
    kept(budget, tape("me", 9, 10, prefix=HOME))
    assert here(budget, tapes) == [True, False, True, True, False]
    kept(budget, tape("me", 10, 10, prefix=HOME))
    assert here(budget, tapes) == [True, False, True, False, False]


def test_peers_of_one_prefix_share_as_prefixes_do():
    budget = TapeBudget(100, 30)
    tapes = kept(budget, *(tape("a", number, 20, prefix=HOME) for number in range(5)))
    kept(budget, tape("b", 9, 20, prefix=HOME))
    kept(budget, tape("b", 10, 20, prefix=HOME))
    assert here(budget, tapes) == [False, False, True, True, True]
    kept(budget, tape("b", 11, 20, prefix=HOME))  # 60 to 60 at most: b's own goes
    assert here(budget, tapes) == [False, False, True, True, True]


def test_a_forward_that_comes_again_has_a_new_tape_unless_the_first_one_is_busy():
    budget = TapeBudget(100, 30)
    first, again = tape("a", 1, 60), tape("a", 1, 80)
    assert budget.open(first)
    assert not budget.open(again)
    budget.keep(first)
    assert budget.open(again)
    assert budget.used == 80


def test_tapes_are_dropped_when_their_peer_was_silent_for_the_idle_time():
    budget = TapeBudget(100, 30)
    one, two, other = kept(budget, tape("a", 1), tape("a", 2), tape("b", 3))
    budget.touch("a", 20)
    assert budget.next_idle() == 30
    budget.drop_idle(30)
    assert here(budget, [one, two, other]) == [True, True, False]
    assert budget.next_idle() == 50
    budget.drop_idle(50)
    assert (len(budget), budget.next_idle()) == (0, math.inf)


def test_tapes_of_blocks_that_are_served_no_longer_are_dropped():
    budget = TapeBudget(100, 30)
    (one,) = kept(budget, tape("a", 1))
    budget.drop_outside(Blocks(2, 5))
    assert here(budget, [one]) == [True]
    budget.drop_outside(Blocks(3, 6))
    assert here(budget, [one]) == [False]


@pytest.mark.parametrize(
    ("changes", "tokens", "fits"),
    [
        ({}, 8, True),
        ({"codec": "bf16"}, 8, True),
        ({"spec": replace(RUN.spec, blocks=Blocks(3, 5))}, 8, False),
        ({"spec": replace(RUN.spec, adapter="another")}, 8, False),
        ({"batch": 1}, 8, False),
        ({"prompts": 1}, 8, False),
        ({}, 7, False),
    ],
)
def test_a_backward_fits_to_the_forward_of_the_same_blocks_adapter_rows_tokens_and_prompts(
    changes, tokens, fits
):
    assert tape().fits(replace(RUN, **changes), replace(CONTRACT, max_length=tokens)) is fits


ASKS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.integers(0, 5),
        st.integers(1, 60),
        st.sampled_from(["keep", "busy", "take"]),
    ),
    max_size=40,
)
PREFIXES = {"a": HOME, "b": HOME, "c": CROWD, "d": ""}


@given(ASKS)
def test_the_memory_is_never_exceeded_and_nobody_loses_to_one_that_holds_more(asks):
    budget = TapeBudget(100, 30)
    for peer, number, size, what in asks:
        new = tape(peer, number, size, prefix=PREFIXES[peer])
        before = list(budget._tapes.values())
        if what == "take":
            budget.take(peer, new.id)
            continue
        done = budget.open(new)
        assert budget.used <= 100
        gone = [each for each in before if budget._tapes.get((each.peer, each.id)) is not each]
        assert done or not gone
        assert not any(each.busy for each in gone)
        for each in gone:
            if each.peer == peer:
                continue
            same = each.party == new.party
            holds = sum(
                one.size for one in before if (one.peer == each.peer if same else one.party == each.party)
            )
            mine = sum(
                one.size
                for one in before
                if one not in gone and (one.peer == peer if same else one.party == new.party)
            )
            assert holds > mine
        if done and what == "keep":
            budget.keep(new)
