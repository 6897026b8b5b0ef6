"""Figures of the documents: measured into docs/figures, written into tables, drawn as pictures.

    python -m benchmarks figures                         # tables and pictures out of the files
    python -m benchmarks figures --measure               # the usual results first: minutes
    python -m benchmarks figures --measure executor wan  # these results first

The figures of Petals (docs/figures/petals.json) are of another machine: of these only shares are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.figures.documents import DOCUMENTS, with_figures
from benchmarks.figures.measurements import LONG, MEASUREMENTS, SIMULATED, USUAL, measure, read_figures
from benchmarks.figures.pictures import PICTURES
from benchmarks.lib.results import ROOT


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure where asked, then write documents and pictures; 1 if a measurement failed."""
    flags = parse(arguments)
    failed = [name for name in flags.measure or [] if measure(name, flags.rounds)]
    if failed:
        print(f"error: these failed, and nothing is written: {', '.join(failed)}")
        return 1
    figures = read_figures()
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(with_figures(document.read_text(), figures))
    for name, draw in PICTURES.items():
        (ROOT / name).write_text(draw(figures))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `measure` becomes a list of known names, or None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks figures",
        description=(__doc__ or "").split("\n")[0],
        epilog=(
            f"usual: {', '.join(USUAL)}; by name: {', '.join(LONG)}; simulated, hours: {', '.join(SIMULATED)}"
        ),
    )
    parser.add_argument(
        "--measure",
        nargs="*",
        metavar="NAME",
        help="run the commands of these results first; of the usual ones where none is named",
    )
    parser.add_argument("--rounds", type=int, help="of each way of decoding (as `benchmarks decode` has it)")
    flags = parser.parse_args(arguments)
    if flags.measure == []:
        flags.measure = list(USUAL)
    if unknown := sorted(set(flags.measure or []) - set(MEASUREMENTS)):
        parser.error(f"no result has the name {', '.join(unknown)}")
    return flags
