"""What people read where no chain is found: each reason is there once, with its number."""

from __future__ import annotations

import pytest

from routing.blocks import Blocks
from routing.chains.hops import NoChain

RUNS = (Blocks(0, 4), Blocks(8, 10))


def lack(**reasons: object) -> str:
    """The text of a lack of blocks 0:4 and 8:10 of 12, with these reasons."""
    error = NoChain(RUNS, 12, alone=False)
    for name, value in reasons.items():
        setattr(error, name, value)
    return str(error)


SERVED = "blocks 0:4, 8:10 of 12 are served by nobody"


def test_blocks_that_nobody_serves_are_named():
    error = NoChain(RUNS, 12, alone=False)
    assert (error.missing, error.blocks, error.alone, str(error)) == (RUNS, 12, False, SERVED)
    assert str(NoChain(RUNS, 12, alone=True)) == "no peer serves any of blocks 0:4, 8:10 of 12"


@pytest.mark.parametrize(("most", "text"), [(1, "1 hop"), (2, "2 hops"), (3, "3 hops")])
def test_a_chain_that_is_too_long_names_the_bound(most, text):
    assert (
        str(NoChain(RUNS, 12, alone=False, most_hops=most)) == f"blocks 0:4, 8:10 of 12 take more than {text}"
    )


def test_what_else_is_known_follows():
    error = NoChain(RUNS, 12, alone=False, excluded=1, instead=("a", "b"))
    assert str(error) == f"{SERVED} (1 left out after a failure); the swarm serves a, b"


@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        ({"silent": 1}, "; no answer from 1 peer that serves some of them"),
        ({"silent": 2}, "; no answer from 2 peers that serve some of them"),
        ({"constrained": 1}, "; constraints leave out 1 peer that serves some of them"),
        ({"constrained": 2}, "; constraints leave out 2 peers that serve some of them"),
        (
            {"constrained": 1, "adapter": "poems"},
            "; constraints leave out 1 peer that serves some of them; none of these keeps an adapter 'poems'",
        ),
        (
            {"asked_tokens": 9, "session_tokens": 8},
            "; a session of 9 tokens was asked for, servers of these blocks take 8 at most",
        ),
        ({"after": ValueError("it")}, "; the last that went wrong: it"),
        (
            {
                "silent": 3,
                "constrained": 4,
                "asked_tokens": 9,
                "session_tokens": 1,
                "after": ValueError("it"),
            },
            "; no answer from 3 peers that serve some of them; constraints leave out 4 peers that serve some"
            " of them; a session of 9 tokens was asked for, servers of these blocks take 1 at most"
            "; the last that went wrong: it",
        ),
    ],
)
def test_each_reason_is_told_with_its_number(reasons, text):
    assert lack(**reasons) == SERVED + text
