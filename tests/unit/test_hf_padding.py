"""Masks of a transformers call become the left padding of each row, or an error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.hf.padding import check_cached, check_positions, padding_of, positions, to_back, to_front


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(each) for each in row] for row in rows])


def test_no_mask_and_a_mask_of_ones_are_no_padding():
    assert padding_of(None, 2, 3, 4) is None
    assert padding_of(torch.ones(2, 7, dtype=torch.long), 2, 3, 4) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_zeros_in_front_are_the_padding_of_a_row(dtype):
    assert padding_of(mask("0011", "1111", "0001").to(dtype), 3, 0, 4).tolist() == [2, 0, 3]


def test_zeros_behind_a_row_count_for_nothing():
    assert padding_of(mask("1100", "1111"), 2, 0, 4) is None
    assert padding_of(mask("0110", "1111"), 2, 0, 4).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given_mask", "words"),
    [
        (mask("1011", "1111"), "holes"),
        (mask("0101", "1111"), "holes"),
        (mask("0000", "1111"), "row 0 without a token"),
        (mask("111", "111"), r"\[2, 3\], \[2, 4\] is needed"),
        (mask("1111"), r"\[1, 4\], \[2, 4\] is needed"),
        (torch.ones(2, 1, 4, 4), "4 dimensions"),
        (torch.ones(4), "1 dimensions"),
        ([[1, 1, 1, 1]], "list"),
    ],
)
def test_any_other_mask_is_refused_in_one_line(given_mask, words):
    with pytest.raises(ValueError, match=words) as caught:
        padding_of(given_mask, 2, 0, 4)
    assert "\n" not in str(caught.value)


def test_padding_behind_a_row_is_refused_where_a_cache_goes_on():
    check_cached(None)
    check_cached(mask("0111", "1111"))
    with pytest.raises(ValueError, match="pad on the left"):
        check_cached(mask("1110", "1111"))


def test_positions_are_those_of_each_rows_tokens():
    pads = torch.tensor([2, 0])
    assert positions(pads, 2, 0, 4).tolist() == [[-2, -1, 0, 1], [0, 1, 2, 3]]
    assert positions(None, 2, 3, 2).tolist() == [[3, 4], [3, 4]]
    check_positions(None, pads, 2, 0, 4)
    check_positions(torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]), pads, 2, 0, 4)  # the library's own
    check_positions(torch.arange(4)[None], None, 2, 0, 4)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.arange(4)[None] + 1, "packed"),
        (torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]), "packed"),
        (torch.arange(3)[None], r"\[1, 3\], \[2, 4\] is needed"),
        (torch.zeros(3, 2, 4, dtype=torch.long), "is needed"),
    ],
)
def test_other_positions_are_refused(ids, words):
    with pytest.raises(ValueError, match=words):
        check_positions(ids, None, 2, 0, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 2))
def test_rows_go_to_the_front_and_back_again(pads, prefix):
    tokens, hidden = 6, 3
    pad = torch.tensor(pads)
    states = torch.arange(len(pads) * (prefix + tokens) * hidden, dtype=torch.float32)
    states = states.view(len(pads), prefix + tokens, hidden)
    turned = to_front(states, pad, prefix)
    assert torch.equal(to_back(turned, pad, prefix), states)
    for row, one in enumerate(pads):
        assert torch.equal(turned[row, :prefix], states[row, :prefix])
        assert torch.equal(turned[row, prefix : prefix + tokens - one], states[row, prefix + one :])
