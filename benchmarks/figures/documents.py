"""Blocks of figures in documents, written out of results.

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; nothing in it is written by
hand.  Outside of blocks a document has no measured figure: `typed_figures` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from benchmarks.figures import (
    compute_blocks,
    decode_blocks,
    hf_blocks,
    network_blocks,
    recovery_blocks,
    swarm_blocks,
)
from benchmarks.figures.tables import Figures, NotMeasured

DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/compared-with-petals.md",
    "docs/faults.md",
)
WITH_LIMITS = {"docs/faults.md"}  # documents whose typed numbers are limits and promises
BLOCKS: Mapping[str, Callable[[Figures], str]] = {
    "demo": decode_blocks.demo_block,
    "beside-petals": decode_blocks.beside_petals_block,
    "decode": decode_blocks.decode_block,
    "decode-int8": decode_blocks.decode_int8_block,
    "flood": decode_blocks.flood_block,
    "startup": decode_blocks.startup_block,
    "black-holed": decode_blocks.black_holed_block,
    "recovery": recovery_blocks.recovery_block,
    "faults": recovery_blocks.faults_block,
    "no-replacement": recovery_blocks.no_replacement_block,
    "lost-clients": recovery_blocks.lost_clients_block,
    "fault-rates": recovery_blocks.fault_rates_block,
    "hf": hf_blocks.hf_block,
    "wan": network_blocks.wan_block,
    "wan-bulk": network_blocks.wan_bulk_block,
    "wire": network_blocks.wire_block,
    "wire-line": network_blocks.wire_line_block,
    "executor": compute_blocks.executor_block,
    "loop-lag": compute_blocks.loop_lag_block,
    "quality": compute_blocks.quality_block,
    "journal": compute_blocks.journal_block,
    "backward": compute_blocks.backward_block,
    "swarm-placement": swarm_blocks.placement_block,
    "swarm-moves": swarm_blocks.moves_block,
    "swarm-churn": swarm_blocks.churn_block,
    "swarm-clients": swarm_blocks.clients_block,
    "swarm-liars": swarm_blocks.liars_block,
    "swarm-decisions": swarm_blocks.decisions_block,
    "routing": swarm_blocks.routing_block,
}
NUMBER = re.compile(r"[+-]?\d[\d,.]*(\s?\([^)]*\))?")
BEGIN, END = r"(<!-- figures: ([\w-]+) -->)", r"(<!-- end of figures -->)"

UNITS = "ms|us|s|minutes?|seconds?|hours?|tokens/s|steps/s|[MG]B/s|Mbit/s|[KMG]iB|[kMG]B|bytes|%"
FIGURE = re.compile(rf"(?<![\w.-])\d[\d,.]*\s?(?:{UNITS})(?![\w/])")


def with_figures(document: str, figures: Figures) -> str:
    """The document with its blocks made anew.  KeyError for a block of no known name.

    A block without a file of its result names the command to measure it.
    """

    def block(found: re.Match[str]) -> str:
        make = BLOCKS[found[2]]
        try:
            text = make(figures)
        except NotMeasured as missing:
            text = f"Not measured yet: `python -m benchmarks figures --measure {missing.name}` does it."
        return f"{found[1]}\n{text}\n{found[3]}"

    return re.sub(rf"{BEGIN}\n.*?{END}", block, document, flags=re.DOTALL)


def typed_figures(document: str) -> list[str]:
    """Typed figures: a number with a unit in a sentence, or a cell that is a number.

    Left out are blocks, code, and paragraphs that cite a source (a paper, or a file of results).
    """
    text = re.sub(rf"{BEGIN}\n.*?{END}", "", document, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("    ") or "](https://arxiv.org/" in paragraph or "](figures/" in paragraph:
            continue
        plain = re.sub(r"`[^`]*`", "", paragraph)
        found += FIGURE.findall(plain)
        cells = [cell for line in plain.splitlines() if line.startswith("|") for cell in line.split("|")]
        found += [
            cell.strip() for cell in cells if re.fullmatch(r"\s*[+-]?\d[\d,.]*(\s?\([^)]*\))?\s*", cell)
        ]
    return found
