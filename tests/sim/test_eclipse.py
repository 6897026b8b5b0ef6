"""Seeds of newcomers among attackers, and proof that the simulation can fail."""

from __future__ import annotations

import math
from unittest import mock

import pytest

from benchmarks.eclipse.eclipse import summary
from benchmarks.eclipse.machines import Case
from benchmarks.eclipse.world import KINDS, Lookup, Newcomer, Outcome, simulate
from node.network.directory.visits import VISIT_SECONDS

HONEST = 8
SOON_SECONDS = 1.0


@pytest.mark.parametrize(
    "case",
    [
        Case("lie", 1, 24, HONEST),
        Case("lie", 48, 48, HONEST),
        Case("silent", 48, 48, HONEST),
    ],
    ids=lambda case: case.name,
)
def test_a_newcomer_with_one_honest_bootstrap_peer_among_attackers_finds_every_honest_server(case: Case):
    outcome = simulate(case, 1)
    for newcomer in outcome.newcomers:
        assert newcomer.found_s < (VISIT_SECONDS * 2 if newcomer.kind == "late" else SOON_SECONDS), newcomer
        assert not newcomer.lost, newcomer
        if newcomer.serves and newcomer.kind != "late":
            assert newcomer.seen_s is not None, newcomer
    assert outcome.losers == 0


def test_without_visits_a_newcomer_whose_honest_bootstrap_peer_was_away_finds_nobody():
    async def stay(*_: object) -> None:
        """No visits."""

    with mock.patch("node.network.directory.directory.visit_strangers", stay):
        outcome = simulate(Case("lie", 48, 48, HONEST), 1)
    late = [newcomer for newcomer in outcome.newcomers if newcomer.kind == "late"]
    assert any(newcomer.found_s == math.inf for newcomer in late)


def test_a_case_s_figures_are_those_of_all_its_seeds():
    found = [Newcomer(kind, False, 1.0) for kind in KINDS]
    lost = [Newcomer(kind, True, 3.0, lost=kind == "late", seen_s=5.0) for kind in KINDS]
    never = [Newcomer("late", True)]
    outcomes = [
        Outcome([*found, *lost], [Lookup("one", True, 1.0), Lookup("most", False, 1.0)], losers=1, honest=10),
        Outcome(never, [Lookup("one", True, 1.0), Lookup("most", True, 1.0)], losers=0, honest=10),
    ]
    row = summary(Case("lie", 16, 64, 10), outcomes)
    assert (row["means"], row["prefixes"], row["ids"], row["honest"]) == ("lie", 16, 64, 10)
    assert row["one"] == {
        "newcomers": 2,
        "found": 1.0,
        "found_s_median": 2.0,
        "found_s_most": 3.0,
        "lost_again": 0,
    }
    assert row["late"]["found"] == pytest.approx(1 / 3)
    assert (row["seen"], row["seen_s_most"]) == (0.75, 5.0)
    assert row["lost"] == 0.05
    assert row["table"] == {"one": 1.0, "most": 0.5}
