"""Blocks of figures in documents, written out of results.

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; nothing in it is written by
hand.  Outside of blocks a document has no measured figure: `typed_figures` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from benchmarks.figures.blocks import compute, decode, gateway, hf, hostile, network, peers, recovery, swarm
from benchmarks.figures.tables import Figures, NotMeasured

DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/compared-with-petals.md",
    "docs/faults.md",
)
WITH_LIMITS = {"docs/faults.md"}  # documents whose typed numbers are limits and promises
BLOCKS: Mapping[str, Callable[[Figures], str]] = {
    "demo": decode.demo_block,
    "beside-petals": decode.beside_petals_block,
    "decode": decode.decode_block,
    "decode-int8": decode.decode_int8_block,
    "flood": decode.flood_block,
    "startup": decode.startup_block,
    "black-holed": decode.black_holed_block,
    "recovery": recovery.recovery_block,
    "recovery-adapter": recovery.adapter_recovery_block,
    "faults": recovery.faults_block,
    "no-replacement": recovery.no_replacement_block,
    "lost-clients": recovery.lost_clients_block,
    "fault-rates": recovery.fault_rates_block,
    "hostile": hostile.hostile_block,
    "soak": hostile.soak_block,
    "eclipse": hostile.eclipse_block,
    "peers": peers.peers_block,
    "hf": hf.hf_block,
    "wan": network.wan_block,
    "wan-codecs": network.wan_codecs_block,
    "wan-bulk": network.wan_bulk_block,
    "wan-speculate": network.wan_speculate_block,
    "wire": network.wire_block,
    "wire-line": network.wire_line_block,
    "reach": network.reach_block,
    "executor": compute.executor_block,
    "ragged": compute.ragged_block,
    "prefill": compute.prefill_block,
    "loop-lag": compute.loop_lag_block,
    "quality": compute.quality_block,
    "quality-codecs": compute.quality_codecs_block,
    "journal": compute.journal_block,
    "scrape": gateway.scrape_block,
    "gateway": gateway.gateway_block,
    "backward": compute.backward_block,
    "training": compute.training_block,
    "adapters": compute.adapters_block,
    "swarm-placement": swarm.placement_block,
    "swarm-moves": swarm.moves_block,
    "swarm-churn": swarm.churn_block,
    "swarm-clients": swarm.clients_block,
    "swarm-liars": swarm.liars_block,
    "swarm-decisions": swarm.decisions_block,
    "routing": swarm.routing_block,
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
