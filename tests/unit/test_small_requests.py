"""A call over several servers goes in small requests, so that all servers work at the same time."""

from __future__ import annotations

import pytest
import torch

from client.batch_parts import REQUEST_POSITIONS, Part, positions_of_a_request


@pytest.mark.parametrize(
    ("positions", "hops", "size"),
    [
        (1024, 1, REQUEST_POSITIONS),
        (100_000, 1, REQUEST_POSITIONS),
        (512, 2, 128),
        (1024, 3, 128),
        (1600, 3, 200),
        (2048, 3, 256),
        (100_000, 9, 256),
    ],
)
def test_a_request_is_an_eighth_of_a_call_between_two_bounds_where_there_are_several_hops(
    positions, hops, size
):
    assert positions_of_a_request(positions, hops) == size


def part(rows: int, tokens: int, *, grad: bool = True, prompts: int | None = None) -> Part:
    hidden = torch.arange(rows * tokens * 2.0).view(rows, tokens, 2)
    own = None if prompts is None else torch.zeros(3, prompts, 2)
    return Part(hidden, 2, 5, -hidden if grad else None, own, 2)


@pytest.mark.parametrize(
    ("rows", "tokens", "positions", "cut"),
    [(4, 128, 128, [1, 1, 1, 1]), (5, 100, 256, [2, 2, 1]), (2, 300, 128, [1, 1]), (1, 10, 128, [1])],
)
def test_a_part_is_divided_by_rows_with_their_gradients(rows, tokens, positions, cut):
    whole = part(rows, tokens)
    parts = whole.divided(positions)
    assert [len(each.hidden) for each in parts] == cut
    assert torch.equal(torch.cat([each.hidden for each in parts]), whole.hidden)
    assert torch.equal(torch.cat([each.grad for each in parts if each.grad is not None]), -whole.hidden)
    assert {(each.start, each.stop, each.tensors, each.planned) for each in parts} == {(2, 5, 2, ())}
    assert all(each.grad is None for each in part(rows, tokens, grad=False).divided(positions))


@pytest.mark.parametrize(("prompts", "requests"), [(2, 4), (42, 4), (43, 1)])
def test_deep_prompts_that_are_longer_than_the_small_requests_are_not_sent_with_each_of_them(
    prompts, requests
):
    parts = part(4, 128, prompts=prompts).divided(128)
    assert len(parts) == requests
    assert all(each.prompts is not None for each in parts)
