"""Blocks about servers and clients that fail in the midst of a generation."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.tables import Figures, column, markdown_table, with_note, yes

RECOVERIES = {"kill": "killed", "freeze": "frozen", "drain": "asked to leave"}
FAULTS = (  # number of the fault, name of the result, its words
    (1, "kill", "killed at a random token"),
    (1, "prefill", "killed while it computes a prompt of 300 tokens"),
    (1, "kill-every", "one of a span after the other killed, every 60 tokens of 300"),
    (3, "halfopen", "link down without a reset"),
    (4, "freeze", "frozen"),
    (5, "slow", "ten times slower"),
    (32, "drain", "asked to leave"),
)


def recovery_block(figures: Figures) -> str:
    """A server that fails in the midst of a generation, by the kind of failure."""
    runs = [figures[f"recovery-{mode}"] for mode in RECOVERIES]
    rows = [
        ("runs", column(runs, "{runs}")),
        ("tokens equal", [yes(run["tokens_equal"]) for run in runs]),
        ("a token without a failure, s", column(runs, "{typical_step_s_p50:.3f}")),
        ("gap, s (p95)", column(runs, "{gap_s_p50:.3f} ({gap_s_p95:.3f})")),
        ("until the client noticed, s", [seconds(run["detect_s_p50"]) for run in runs]),
        ("replay, s", [seconds(run["replay_s_p50"]) for run in runs]),
    ]
    return with_note(markdown_table([f"server {how}" for how in RECOVERIES.values()], rows), *runs)


def adapter_recovery_block(figures: Figures) -> str:
    """A killed server, with an adapter that the server in its place has to get first, and without one."""
    runs = [figures["recovery-adapter-none"], figures["recovery-adapter"]]
    rows = [
        ("runs", column(runs, "{runs}")),
        ("tokens equal", [yes(run["tokens_equal"]) for run in runs]),
        ("a token without a failure, s", column(runs, "{typical_step_s_p50:.3f}")),
        ("gap, s (p95)", column(runs, "{gap_s_p50:.3f} ({gap_s_p95:.3f})")),
    ]
    heads = ["server killed", f"the same with an adapter, r{runs[1]['adapter_rank']} at all linears"]
    return with_note(markdown_table(heads, rows), *runs)


def faults_block(figures: Figures) -> str:
    """Every measured failure of a server, by the number of its fault."""
    runs = [figures[f"recovery-{name}"] for _, name, _ in FAULTS]
    rows = [
        (
            f"{number}: {words}",
            [
                f"{run['runs']}",
                yes(run["tokens_equal"]),
                f"{run['gap_s_p50']:.3f} ({run['gap_s_p95']:.3f})",
                seconds(run["typical_step_s_p50"]),
                more_of(run),
            ],
        )
        for (number, _, words), run in zip(FAULTS, runs, strict=True)
    ]
    head = ["runs", "tokens equal", "gap, s (p95)", "a token, s", "besides"]
    return with_note(markdown_table(head, rows), *runs)


def more_of(run: Any) -> str:
    """A figure that only this kind of failure has."""
    if run["mode"] == "halfopen":
        return f"last socket gone after {run['sockets_gone_s_p50']:.1f} s"
    if run["mode"] == "slow":
        return (
            f"left in {run['left']} of {run['runs']} runs, after {run['steps_until_left_most']} steps at"
            " most;"
            f" {run['speed_ratio_p50']:.2f} of the speed from then on, the replay included"
            f" (least {run['speed_ratio_least']:.2f})"
        )
    if run["kill_at"].startswith("every"):
        return f"{sum(row['kills'] for row in run['rows'])} kills"
    return ""


def no_replacement_block(figures: Figures) -> str:
    """A server that is killed while no other server has its blocks (fault 2)."""
    run = figures["recovery-no-copy"]
    rows = [
        ("runs", [f"{run['runs']}"]),
        ("generations that ended with an error", [f"{sum(bool(row['error']) for row in run['rows'])}"]),
        ("the error after the call, s", [seconds(run["error_s_p50"])]),
    ]
    return with_note(markdown_table(["no copy, a call of 10 seconds"], rows), run)


def lost_clients_block(figures: Figures) -> str:
    """Clients that are killed, and their remains at the servers (fault 9)."""
    run = figures["recovery-clients"]
    killed = ", ".join(f"{number} in {phase}" for phase, number in sorted(run["killed_in"].items()))
    rows = [
        (f"clients killed, {run['at_once']} at a time", [killed]),
        ("descriptors of each server: before", [_numbers(run["descriptors_before"])]),
        ("... at most", [_numbers(run["descriptors_most"])]),
        ("... as before again, after the last kill, s", [seconds(run["descriptors_back_s"])]),
        ("sessions left after 5 seconds", [_numbers(run["sessions_left"])]),
        ("cache tokens left", [_numbers(run["cache_tokens_left"])]),
    ]
    return with_note(markdown_table(["servers"], rows), run)


def fault_rates_block(figures: Figures) -> str:
    """Steps per second against the chance that a server is killed in a step."""
    run = figures["recovery-rates"]
    by: dict[tuple[int, float], dict[str, Any]] = {}
    for row in run["rows"]:
        by.setdefault((row["tokens"], row["fault_rate"]), {})[row["method"]] = row
    rows = [
        (
            f"{tokens:,} ({cells['ours']['runs']} generations)",
            [f"{rate:g}", _cell(cells["ours"]), _cell(cells.get("restart", cells["ours"]))],
        )
        for (tokens, rate), cells in by.items()
    ]
    return with_note(markdown_table(["chance in a step", "Raceme", "starting over at each fault"], rows), run)


def seconds(value: float | None) -> str:
    """Seconds in a cell; nothing where there is no figure."""
    return "" if value is None else f"{value:.3f}"


def _cell(row: Any) -> str:
    kills = f"{row['kills']} kill{'s' * (row['kills'] != 1)}"
    if not row["finished"]:
        return f"none finished in {row['seconds'] / row['runs']:.0f} s ({kills})"
    return f"{row['steps_per_s']:.1f} ({kills})"


def _numbers(values: Any) -> str:
    return ", ".join(map(str, values))
