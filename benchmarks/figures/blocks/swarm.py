"""Blocks about simulated swarms: placement, churn, clients, and the time of one decision.

Rows are found by their settings in all of docs/figures/swarm-*.json; the files' names do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.figures.tables import Figures, markdown_table, with_note

RULES = {
    "ours": "ours",
    "petals": "Petals",
    "petals-join": "Petals, joining only",
    "equal": "equal spans",
    "random": "random",
}
CASES = {"llama-405b": "thin", "llama-70b": "roomy"}
SETTINGS = (
    "model", "servers", "seeds", "churn", "lost", "liars", "partition", "noise", "clients", "load",
    "client_seconds", "commit",
)  # fmt: skip
STILL = {"churn": 0, "lost": 0, "liars": 0, "partition": 0, "noise": 0}
Row = dict[str, Any]  # Any: JSON


def rows_of(figures: Figures, **wanted: object) -> list[Row]:
    """A row for each rule of each run with these settings, the settings in it; by size and rule."""
    found = []
    for name, run in sorted(figures.items()):
        if name.startswith("swarm-") and isinstance(run, dict) and "share_of_bound_mean" in run:
            settings = {key: run[key] for key in SETTINGS if key in run}
            found += [{**settings, **rule, "rule": rule["rule"]} for rule in run.get("rules", [run])]
    found = [row for row in found if all(row[key] == value for key, value in wanted.items())]
    rules = list(RULES)
    return sorted(
        found,
        key=lambda row: (row["model"] != "llama-405b", row["servers"], row["load"], rules.index(row["rule"])),
    )


def simulated(table: str, rows: Sequence[Row]) -> str:
    """A table and below it the commits; simulated time is equal on all machines."""
    commits = sorted({row["commit"] for row in rows})
    return f"{table}\n\nSimulated at commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def case_name(row: Row) -> str:
    """The kind of swarm and its size."""
    return f"{CASES[row['model']]}, {row['servers']:,} servers"


def placement_block(figures: Figures) -> str:
    """Capacity over its bound at rest, by rule."""
    rows = rows_of(figures, **STILL, clients=0)
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(f"{case_name(row)} ({row['seeds']} seeds)", {})[row["rule"]] = row
    cells = [
        (
            name,
            [
                f"{by_rule[rule]['share_of_bound_mean']:.3f} ({by_rule[rule]['share_of_bound_min']:.3f})"
                if rule in by_rule
                else ""
                for rule in RULES
            ],
        )
        for name, by_rule in cases.items()
    ]
    return simulated(markdown_table(list(RULES.values()), cells), rows)


def moves_block(figures: Figures) -> str:
    """Moves of a swarm in which nobody joins and nobody leaves."""
    rows = rows_of(figures, rule="ours", clients=0, churn=0, lost=0, liars=0, partition=0)
    cells = [
        (
            case_name(row) + (f", rates announced {100 * row['noise']:.0f} % wrong" if row["noise"] else ""),
            [f"{row['moves_per_server_hour']:.3f}"],
        )
        for row in rows
    ]
    return simulated(markdown_table(["moves of a server in an hour"], cells), rows)


def churn_block(figures: Figures) -> str:
    """A swarm whose servers are replaced and crash."""
    rows = rows_of(figures, churn=0.3, lost=0.2)
    cells = [
        (
            "share of the bound, mean of the hour (least seed)",
            [f"{r['share_of_bound_mean']:.3f} ({r['share_of_bound_min']:.3f})" for r in rows],
        ),
        ("seconds with a block without a server", [f"{r['uncovered_s']:.0f}" for r in rows]),
        (
            "gaps opened by moves; blocks covered late",
            [f"{r['gaps_opened_by_moves']}; {r['coverage_late']} of {r['gaps']}" for r in rows],
        ),
        ("slowest to be covered again, s", [f"{r['coverage_restored_s_max']:.0f}" for r in rows]),
        (
            "moves of a server in an hour; blocks loaded in an hour",
            [f"{r['moves_per_server_hour']:.2f}; {r['blocks_loaded_per_hour']:.0f}" for r in rows],
        ),
    ]
    head = [f"{RULES[row['rule']]} ({row['seeds']} seeds)" for row in rows]
    return simulated(markdown_table(head, cells), rows)


def clients_block(figures: Figures) -> str:
    """Tokens and waits of clients of a swarm."""
    rows = [row for row in rows_of(figures, **STILL) if row["clients"]]
    head = ["made of asked (least seed)", "s a token, p50 and p95", "ratio of p95 (largest)"]
    cells = [
        (
            f"{case_name(r)}, {RULES[r['rule']]}, asked for {r['load']:g} ({r['seeds']} seeds,"
            f" {r['client_seconds']:g} s)",
            [
                f"{r['aggregate_of_asked']:.3f} ({r['aggregate_of_asked_min']:.3f})",
                f"{r['latency_p50_s']:.2f}, {r['latency_p95_s']:.2f}",
                f"{r['latency_ratio_p95']:.2f} ({r['latency_ratio_p95_max']:.2f})",
            ],
        )
        for r in rows
    ]
    return simulated(markdown_table(head, cells), rows)


def liars_block(figures: Figures) -> str:
    """Tokens with servers that announce a hundred times their speed, over those of an honest swarm."""
    rows = [row for row in rows_of(figures, churn=0, lost=0, partition=0, noise=0) if row["liars"]]
    cells = [
        (
            f"{case_name(r)}, {100 * r['liars']:.0f} % liars ({r['seeds']} seeds)",
            [f"{r['aggregate_of_honest']:.3f} ({r['aggregate_of_honest_min']:.3f})"],
        )
        for r in rows
    ]
    return simulated(markdown_table(["tokens, of those of the honest swarm (least seed)"], cells), rows)


def decisions_block(figures: Figures) -> str:
    """The time and the memory of one decision of a server."""
    rows = figures["swarm-decisions"]
    head = ["join, ms", "move, ms", "blocks without a server, ms", "capacity, ms", "peak, MB"]
    cells = [
        (
            f"{row['servers']:,} servers",
            [f"{row[f'{what}_ms']:.3g}" for what in ("join", "move", "hole", "capacity")]
            + [f"{row['memory_mb']:.3g}"],
        )
        for row in rows
    ]
    return with_note(markdown_table(head, cells), *rows)


def routing_block(figures: Figures) -> str:
    """The time and the memory of a client's choice of a chain."""
    rows = figures["routing"]
    head = ["after one new record, ms (p95)", "nothing kept, ms", "kept, MB"]
    cells = [
        (
            f"{row['servers']:,} servers",
            [
                f"{row['decision_ms']:.1f} ({row['decision_ms_p95']:.1f})",
                f"{row['cold_ms']:.1f}",
                f"{row['kept_mb']:.0f}",
            ],
        )
        for row in rows
    ]
    return with_note(markdown_table(head, cells), *rows)
