"""Blocks about attacks, and about what grows in a long run."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.tables import Figures, markdown_table, with_note, yes

SOAKED = {"rss_mib": "MiB resident", "descriptors": "descriptors", "tasks": "tasks", "threads": "threads"}


def hostile_block(figures: Figures) -> str:
    """Each attack, and what honest peers noticed of it."""
    runs = figures["hostile"]
    rows = [(f"`{run['attack']}`", cells(run)) for run in runs]
    head = [
        "share of the honest speed", "p95, times", "newcomers in", "slowest, s", "MiB before, most, after",
        "loop lag p99, ms", "within bound", "nothing left",
    ]  # fmt: skip
    return with_note(markdown_table(head, rows), *runs)


def cells(run: Any) -> list[str]:
    """One attack.  An attack whose own processes failed says so."""
    if "honest_share" not in run:
        return [f"not measured: {'; '.join(run['failed'])}", *[""] * 7]
    memory = (run["rss_before_mib"], run["rss_most_mib"], run["rss_after_mib"])
    return [
        number(run["honest_share"], ".2f"),
        number(run["p95_ratio"], ".2f"),
        number(run["newcomers_in"], ".2f"),
        number(run["newcomer_s_most"], ".2f"),
        ", ".join(f"{size:,.0f}" for size in memory),
        number(run["lag_p99_ms"], ".0f"),
        yes(run["rss_within_bound"]),
        yes(run["nothing_left"]),
    ]


def eclipse_block(figures: Figures) -> str:
    """Of newcomers among attackers, those that find every honest server, and the slowest one's seconds."""
    runs = figures["eclipse"]
    rows = [(eclipse_name(run), eclipse_cells(run)) for run in runs]
    head = [
        "1 address, honest", "8 addresses, 7 hostile", "the same, the honest one away for 20 s",
        "seen by all", "honest views with a loss", "table alone: 1, 8 addresses",
    ]  # fmt: skip
    return with_note(markdown_table(head, rows), *runs)


def eclipse_name(run: Any) -> str:
    """The attackers of a case."""
    if run["means"] is None:
        return "none"
    return f"{run['means']}: {run['ids']} ids in {run['prefixes']} network{'s' * (run['prefixes'] > 1)}"


def eclipse_cells(run: Any) -> list[str]:
    """One case: shares, and the longest time in seconds."""
    kinds = [run[kind] for kind in ("one", "most", "late")]
    return [
        *(f"{kind['found']:.2f} ({number(kind['found_s_most'], '.1f')})" for kind in kinds),
        f"{run['seen']:.2f} ({number(run['seen_s_most'], '.1f')})",
        f"{run['lost']:.3f}",
        ", ".join(f"{found:.2f}" for found in run["table"].values()),
    ]


def soak_block(figures: Figures) -> str:
    """What steady processes hold at the beginning and at the end of a long run."""
    run = figures["soak"]
    rows = [
        (
            row["who"],
            [
                f"{row[f'{name}_first']:,.0f}, {row[f'{name}_last']:,.0f} ({row[f'{name}_per_minute']:+.2f})"
                for name in SOAKED
            ],
        )
        for row in run["servers"]
    ]
    head = [f"{words}: first, last (a minute)" for words in SOAKED.values()]
    table = markdown_table(head, rows)
    words = (
        f"{run['minutes']:g} minutes, {run['restarts']} restarts of other servers,"
        f" {run['killed_clients']} killed processes of clients."
    )
    return with_note(f"{table}\n\n{words}", run)


def number(value: float | None, form: str) -> str:
    """A figure in a cell; nothing where there is none."""
    return "" if value is None else f"{value:{form}}"
