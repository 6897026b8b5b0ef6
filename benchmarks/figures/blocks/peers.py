"""The block about llama.cpp and transformers next to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.figures.tables import Figures, markdown_table, with_note
from benchmarks.peers.contenders import KINDS


def peers_block(figures: Figures) -> str:
    """Each row, and where it is one of ours its share of the peer's."""
    runs = [run for kind in KINDS for run in figures[f"peers-{kind}"]]
    rows = [
        (
            run["name"] + (f", {run['clients']} clients" if run["clients"] > 1 else ""),
            [
                f"{run['threads']} + {run['client_threads']}" if run["servers"] else f"{run['threads']}",
                f"{run['steps_per_s']:.1f}",
                f"{run['aggregate_tokens_per_s']:.0f}",
                f"{run['ttft_ms']:.0f}",
                *shares(run),
            ],
        )
        for run in runs
    ]
    head = [
        "threads", "steps/s of a client", "new tokens/s of all", "first token, ms",
        "speed, of the peer's (aim)", "first token, of the peer's",
    ]  # fmt: skip
    return with_note(markdown_table(head, rows), *runs)


def shares(run: Mapping[str, Any]) -> list[str]:  # Any: JSON
    """Two cells, empty for a row without a peer."""
    if run["ratio_to_peer"] is None:
        return ["", ""]
    return [f"{run['ratio_to_peer']:.2f} ({run['wanted_ratio']:.2f})", f"{run['ttft_ratio_to_peer']:.2f}"]
