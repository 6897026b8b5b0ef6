"""Pictures of what `benchmarks swarm` has measured.

    python -m benchmarks swarm_plots docs/figures/swarm-*.json --out docs

From the files that --json wrote: the share of the bound by rule and number of servers, and, of the runs
with --clients, how long a token takes at which load.  Needs matplotlib: pip install '.[plots]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "ours": "#1b6ca8",
    "petals": "#d1495b",
    "petals-join": "#edae49",
    "equal": "#8d96a3",
    "random": "#c9ada7",
}
TITLES = {"llama-405b": "126 blocks, held a few times each", "llama-70b": "80 blocks, room for many copies"}
SETTINGS = ("model", "servers", "seeds", "churn", "lost", "liars", "partition", "noise", "clients", "load")
Row = dict[str, Any]  # Any: JSON


def rows_of(files: Sequence[Path]) -> list[Row]:
    """One for each rule of each run, with the run's settings in it."""
    rows = []
    for file in files:
        run = json.loads(file.read_text())
        settings = {key: run[key] for key in SETTINGS}
        rows += [{**settings, **rule} for rule in run.get("rules", [run])]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, draw, write; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks swarm_plots", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", type=Path, nargs="+", help="that `benchmarks swarm --json` wrote")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    flags = parser.parse_args(arguments)
    rows = rows_of(flags.files)
    rest = [r for r in rows if not (r["churn"] or r["lost"] or r["noise"] or r["partition"] or r["clients"])]
    if rest:
        draw_shares(rest, flags.out / "swarm-share.png")
    served = [row for row in rows if "latency_p95_s" in row and not row["liars"]]
    if served:
        draw_latencies(served, flags.out / "swarm-latency.png")
    return 0


def draw_shares(rows: Sequence[Row], file: Path) -> None:
    """Capacity over its bound at rest: the mean of the seeds, and down to the worst of them."""
    from matplotlib import pyplot

    models = [model for model in TITLES if any(row["model"] == model for row in rows)]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4.6 * len(models), 3.6), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        sizes = sorted({row["servers"] for row in mine})
        rules = [rule for rule in COLOURS if any(row["rule"] == rule for row in mine)]
        width = 0.8 / len(rules)
        for place, rule in enumerate(rules):
            found = {row["servers"]: row for row in mine if row["rule"] == rule}
            there = [size for size in sizes if size in found]
            at = [sizes.index(size) + (place + 0.5) * width - 0.4 for size in there]
            setup = [found[size]["share_of_bound_mean"] for size in there]
            down = [found[size]["share_of_bound_mean"] - found[size]["share_of_bound_min"] for size in there]
            nothing = [0.0] * len(there)
            axis.bar(at, setup, width * 0.92, color=COLOURS[rule], label=rule)
            axis.errorbar(at, setup, yerr=[down, nothing], fmt="none", ecolor="#333333", elinewidth=0.9)
        axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axis.set_xlabel("servers")
        axis.set_ylim(0, 1.02)
        axis.set_title(f"{model}: {TITLES[model]}", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("capacity / bound\n(line: down to the worst seed)", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    _write(figure, file)


def draw_latencies(rows: Sequence[Row], file: Path) -> None:
    """Seconds for a token, half of the sessions and 95 % of them, by the load that is asked for."""
    from matplotlib import pyplot

    cases = sorted({(row["model"], row["servers"]) for row in rows})
    figure, axes = pyplot.subplots(
        1, len(cases), figsize=(4.6 * len(cases), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (model, servers) in zip(axes[0], cases, strict=True):
        for rule in ("ours", "petals", "equal"):
            mine = sorted(
                (r for r in rows if (r["model"], r["servers"], r["rule"]) == (model, servers, rule)),
                key=lambda row: row["load"],
            )
            if not mine:
                continue
            loads = [row["load"] for row in mine]
            for key, line in (("latency_p50_s", "--"), ("latency_p95_s", "-")):
                label = f"{rule}, {key[8:11]}"
                axis.plot(
                    loads, [row[key] for row in mine], line, marker="o", color=COLOURS[rule], label=label
                )
        best = {row["load"]: row["latency_p95_s"] / row["latency_ratio_p95"] for row in rows
                if (row["model"], row["servers"], row["rule"]) == (model, servers, "ours")}  # fmt: skip
        axis.plot(sorted(best), [best[load] for load in sorted(best)], "k:", label="all-seeing, p95")
        axis.set_xlabel("tokens asked for / capacity of that placement")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.set_title(f"{model}, {servers} servers", fontsize=9)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("seconds for a token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    _write(figure, file)


def _write(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    print(file)
