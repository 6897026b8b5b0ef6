"""What `benchmarks decode` makes of what it has measured."""

from __future__ import annotations

import pytest

from benchmarks.decode.decode import client_rates, equal_share, parse, prompts_of


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([1, 2, 3, 4], 1.0), ([9, 2, 3, 4], 0.0), ([1, 2, 9, 4], 0.5), ([1, 2], 0.5), ([1, 2, 3, 4, 5], 0.8)],
)
def test_tokens_count_as_equal_up_to_the_first_that_differs(tokens, share):
    assert equal_share(tokens, [1, 2, 3, 4]) == share


def test_a_clients_rate_goes_over_all_rounds_and_leaves_first_tokens_out_where_told_to():
    rounds = [
        [{"seconds": [9.0, 0.5, 0.5]}, {"seconds": [1.0, 1.0, 1.0]}],
        [{"seconds": [9.0, 1.0, 2.0]}, {"seconds": [1.0, 1.0]}],
    ]
    assert client_rates(rounds, 1) == [1.0, 1.0]
    assert client_rates(rounds[:1], 1) == [2.0, 1.0]
    whole = [sum(each[client]["seconds"]) for each in rounds for client in (0,)]
    tokens = sum(len(each[0]["seconds"]) for each in rounds)
    assert client_rates(rounds, 0)[0] == tokens / sum(whole)


class Tokenizing:
    """A client that makes a token of every word."""

    def ask(self, question: dict[str, str]) -> dict[str, list[int]]:
        """The words, numbered."""
        return {"ids": list(range(len(question["text"].split())))}


@pytest.mark.parametrize(("clients", "tokens"), [(1, 32), (16, 32), (64, 32), (3, 500), (100, 1)])
def test_every_client_has_a_prompt_of_its_own_of_the_length_that_was_asked_for(clients, tokens):
    prompts = prompts_of(Tokenizing(), clients, tokens)  # type: ignore[arg-type]
    assert [len(prompt) for prompt in prompts] == [tokens] * clients
    assert len({tuple(prompt) for prompt in prompts}) == clients


def test_nothing_is_quantised_and_one_thread_is_used_unless_it_is_asked_for():
    flags = parse([])
    assert (flags.quantize, flags.threads, flags.clients, flags.dtype) == ("none", 1, 1, "float32")
