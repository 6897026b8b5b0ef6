"""Prompt lookup against the plainest search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.speculation.lookup import FARTHEST, LONGEST, SHORTEST, NgramIndex, Proposal

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def looked_up(text: list[int], most: int) -> Proposal:
    """The same by a search through the whole text."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        for place in range(len(text) - 1, size - 1, -1):
            if text[place - size : place] == text[len(text) - size :]:
                found = list(text)
                while len(found) < len(text) + most:
                    found.append(found[place + len(found) - len(text)])
                pairs = zip(reversed(text[:place]), reversed(text), strict=False)
                matched = next((at for at, (a, b) in enumerate(pairs) if a != b), place)
                return Proposal(tuple(found[len(text) :]), min(matched, FARTHEST))
    return Proposal()


@given(TEXTS, st.integers(1, 20))
def test_a_proposal_follows_the_longest_end_that_occurred_before_at_its_last_place(text, most):
    index = NgramIndex()
    index.extend(text)
    assert index.propose(most) == looked_up(text, most)


@given(TEXTS, st.data())
def test_tokens_one_by_one_and_in_pieces_make_the_same_index(text, data):
    one, other = NgramIndex(), NgramIndex()
    one.extend(text)
    rest = text
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        other.extend(rest[:cut])
        rest = rest[cut:]
    assert one == other


@given(TEXTS)
def test_a_token_costs_a_few_entries_whatever_the_length(text):
    index = NgramIndex()
    index.extend(text)
    assert len(index._places) <= (LONGEST - SHORTEST + 1) * len(text)


def test_nothing_is_proposed_without_a_repetition_or_where_nothing_is_asked_for():
    index = NgramIndex()
    index.extend(range(10))
    assert index.propose(5) == Proposal()
    index.extend([3, 4])
    assert index.propose(0) == Proposal()
    assert index.propose(3) == Proposal((5, 6, 7), 2)


def test_a_run_that_goes_on_is_proposed_to_any_length():
    index = NgramIndex()
    index.extend([1, 2, 3, 1, 2, 3, 1, 2])
    assert index.propose(7).tokens == (3, 1, 2, 3, 1, 2, 3)
