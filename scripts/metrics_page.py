"""Writes the tables of docs/metrics.md: every metric of nodes, clients and gateways.

    python scripts/metrics_page.py

The text between the tables is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from client.metrics.families import CLIENT_FAMILIES, GATEWAY_FAMILIES  # noqa: E402
from node.monitor.metrics.families import (  # noqa: E402
    NODE_FAMILIES,
    SERVER_FAMILIES,
    SWARM_FAMILIES,
    Family,
)

PAGE = ROOT / "docs" / "metrics.md"
TABLES: dict[str, Sequence[Family]] = {
    "node": NODE_FAMILIES,
    "swarm": SWARM_FAMILIES,
    "servers": SERVER_FAMILIES,
    "client": CLIENT_FAMILIES,
    "gateway": GATEWAY_FAMILIES,
}


def main() -> int:
    """Write the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))
    return 0


def with_tables(page: str) -> str:
    """The page with each table as the code has it.  Raises ValueError where a table has no place."""
    for name, families in TABLES.items():
        place = re.compile(rf"(<!-- metrics: {name} -->\n).*?(<!-- /metrics -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no place for the table {name!r}")
        table = table_of(families)
        page = place.sub(lambda found, table=table: found[1] + table + found[2], page)  # type: ignore[misc]
    return page


def table_of(families: Sequence[Family]) -> str:
    """A row for each metric."""
    lines = ["| metric | type | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    for each in families:
        labels = "; ".join(f"`{name}`: {values}" for name, values in each.labels.items())
        lines.append(f"| `{each.shown}` | {each.kind} | {each.unit} | {labels} | {each.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
