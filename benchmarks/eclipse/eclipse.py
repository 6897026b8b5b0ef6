"""Newcomers among attackers: whether they find the honest servers of a swarm, and how soon.

    python -m benchmarks eclipse --seeds 50 --jobs 2

Simulated on the real directory (see benchmarks.eclipse.world): 20 honest servers in as many public networks,
and attackers in 1 to 256 networks.  Half of their ids are near the model's key in the Kademlia table, or near
a newcomer's id.  Newcomers, a client and a server of each kind:

    one   has the address of one honest server
    most  has eight addresses, seven of them attackers'
    late  the same, and the honest server cannot be reached for the first 20 s

`found` is the share of newcomers whose view has all honest servers within 120 s and then loses none.  `lost`
is the share of honest servers whose view loses an honest one.  `table` is the share of newcomers without any
neighbour that reach an honest server by one look into the Kademlia table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

from benchmarks.eclipse.machines import Case
from benchmarks.eclipse.world import KINDS, Kind, Newcomer, Outcome, simulate
from benchmarks.lib.results import Run

HONEST = 20
CASES: Sequence[Case] = (
    Case(None, 0, 0, HONEST),
    Case("lie", 1, 64, HONEST),
    Case("lie", 16, 128, HONEST),
    Case("lie", 256, 256, HONEST),
    Case("silent", 256, 256, HONEST),
    Case("slow", 256, 256, HONEST),
    Case("crowd", 64, 64, HONEST),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and print; 1 where a newcomer with one honest address does not find every honest server."""
    flags, run = parse(arguments), Run()
    cases = [case for case in CASES if not flags.case or case.name in flags.case]
    rows = []
    print(
        "case          " + "".join(f"{kind:>6} found (s, most)" for kind in KINDS) + "   seen   lost   table"
    )
    with ProcessPoolExecutor(flags.jobs, multiprocessing.get_context("spawn")) as pool:
        for case in cases:
            seeds = range(flags.first_seed, flags.first_seed + flags.seeds)
            row = {
                "case": case.name,
                "seeds": flags.seeds,
                **summary(case, pool.map(simulate, repeat(case), seeds)),
            }
            rows.append(row)
            print(line(row), flush=True)
            run.write(flags.json, rows)  # what is there already, should the rest be interrupted
    return int(any(row[kind]["found"] < 1.0 for row in rows for kind in KINDS))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks eclipse", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=50, help="of each case (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="seeds that are simulated at once")
    parser.add_argument(
        "--case", nargs="+", choices=[case.name for case in CASES], help="these alone", metavar="CASE"
    )
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


def summary(case: Case, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """The figures of all seeds of a case."""
    all_seeds = list(outcomes)
    newcomers = [newcomer for outcome in all_seeds for newcomer in outcome.newcomers]
    lookups = [lookup for outcome in all_seeds for lookup in outcome.lookups]
    servers = [newcomer for newcomer in newcomers if newcomer.serves]
    return {
        "means": case.means,
        "prefixes": case.prefixes,
        "ids": case.ids,
        "honest": case.honest,
        **{kind: found([each for each in newcomers if each.kind == kind]) for kind in KINDS},
        "seen": share(each.seen_s is not None for each in servers),
        "seen_s_most": max((each.seen_s for each in servers if each.seen_s is not None), default=None),
        "lost": sum(each.losers for each in all_seeds) / sum(each.honest for each in all_seeds),
        "table": {
            kind: share(lookup.found for lookup in lookups if lookup.kind == kind) for kind in ("one", "most")
        },
    }


def found(newcomers: Sequence[Newcomer]) -> dict[str, Any]:
    """How many of these found all honest servers and kept them, and in what time."""
    times = sorted(each.found_s for each in newcomers if each.found_s < float("inf"))
    return {
        "newcomers": len(newcomers),
        "found": share(each.found_s < float("inf") and not each.lost for each in newcomers),
        "found_s_median": statistics.median(times) if times else None,
        "found_s_most": max(times, default=None),
        "lost_again": sum(each.lost for each in newcomers),
    }


def share(answers: Iterable[bool]) -> float:
    """Of all these, those that are true."""
    return statistics.fmean(map(float, answers))


def line(row: Mapping[str, Any]) -> str:
    """One case for people."""
    cells = "".join(kind_cell(row, kind) for kind in KINDS)
    table = ", ".join(f"{each:.2f}" for each in row["table"].values())
    return f"{row['case']:14}{cells}   {row['seen']:4.2f}  {row['lost']:5.3f}   {table}"


def kind_cell(row: Mapping[str, Any], kind: Kind) -> str:
    """The newcomers of one kind."""
    figures = row[kind]
    most = "" if figures["found_s_most"] is None else f"{figures['found_s_most']:.1f}"
    return f"{figures['found']:12.2f} ({most:>5})    "
