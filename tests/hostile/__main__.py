"""python -m tests.hostile: attack real nodes, and see whether others notice.

    python -m tests.hostile --list
    python -m tests.hostile where_flood giant_backward --seconds 4
    python -m tests.hostile --all --json docs/figures/hostile.json

Each attack has a swarm of its own on the loopback: a node (or a few), an honest client that decodes for
ever, a newcomer each second, and one attacker.  Then a process that only burns as much CPU as the attacker
did takes its place: the honest client's speed beside the attack is compared with its speed beside the
burner.  Exit code 1 where an attack hurts others.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes

from benchmarks.lib.results import Run
from tests.hostile.attacks import ATTACKS
from tests.hostile.campaign import Setting, run_all
from tests.hostile.places import LOCAL, PUBLIC, can_go_inside, command_inside, take_public_places

PROGRAM = "tests.hostile"
COLUMNS = ("honest_share", "p95_ratio", "newcomers_in", "rss_within_bound", "nothing_left")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run attacks; 1 where one of them hurts others."""
    return run_attacks(arguments, "python -m tests.hostile")


def run_attacks(arguments: Sequence[str] | None, usage: str) -> int:
    """The same, as a part of another program too, with its usage in the help."""
    flags = parse(arguments, usage)
    if flags.list:
        print(listing())
        return 0
    if not (flags.inside or flags.local) and can_go_inside():
        words = sys.argv[1:] if arguments is None else list(arguments)
        command = command_inside(PROGRAM, [*words, "--inside"])
        os.execvp(command[0], command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nodes and peers end with us
    if flags.inside:
        take_public_places()
    places = PUBLIC if flags.inside else LOCAL
    if flags.one_address:
        places = replace(places, attacker=(places.honest,))
    attacks = [ATTACKS[name] for name in (ATTACKS if flags.all else flags.attacks)]
    run, rows = Run(PROGRAM), []
    folder = Path(flags.logs or tempfile.mkdtemp(prefix="raceme-hostile-"))
    folder.mkdir(parents=True, exist_ok=True)
    for row in run_all(attacks, Setting(flags.seconds, places, folder)):
        print(told(row.values), flush=True)
        rows.append({**row.values, "addresses": addresses_of(flags)})
        run.write(flags.json, rows)
    hurt = [row["attack"] for row in rows if not row["passed"]]
    print(f"{len(rows) - len(hurt)} of {len(rows)} attacks hurt nobody else; logs in {folder}")
    return bool(hurt)


def parse(arguments: Sequence[str] | None, usage: str = "python -m tests.hostile") -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=usage,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="names; --list prints them")
    parser.add_argument("--all", action="store_true", help="every attack, about a minute each")
    parser.add_argument("--list", action="store_true", help="print the attacks, and do nothing")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase (%(default)s)")
    parser.add_argument(
        "--local", action="store_true",
        help="all addresses in 127.0.0.0/8, with looser limits than those of the internet (default: those"
        " of the internet, in a network namespace, where one can be made)",
    )  # fmt: skip
    parser.add_argument(
        "--one-address", action="store_true", help="the attacker shares the address of the honest peers"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write the rows here, after each attack")
    parser.add_argument("--logs", metavar="FOLDER", help="of the nodes and the peers (default: a new one)")
    flags = parser.parse_args(arguments)
    if unknown := [name for name in flags.attacks if name not in ATTACKS]:
        parser.error(f"no attack has the name {', '.join(unknown)}; --list prints them")
    if not (flags.attacks or flags.all or flags.list):
        parser.error("name attacks, or --all, or --list")
    return flags


def addresses_of(flags: argparse.Namespace) -> str:
    """Where the peers of a run are, in words."""
    return ("public" if flags.inside else "local") + (", one for all" if flags.one_address else "")


def listing() -> str:
    """The attacks, a line each."""
    width = max(map(len, ATTACKS))
    return "\n".join(f"{name:{width}}  {attack.what}" for name, attack in ATTACKS.items())


def told(values: dict[str, Any]) -> str:
    """A row in words."""
    if "honest_share" not in values:
        return f"{values['attack']}: {'; '.join(values['failed'])}"
    shown = ", ".join(f"{name} {values[name]}" for name in COLUMNS)
    more = (
        f"tokens/s {values['tokens_per_s_before']} / {values['tokens_per_s_during']} /"
        f" {values['tokens_per_s_left']}, burner {values['tokens_per_s_burner']};"
        f" newcomers {values['newcomers']}, median {values['newcomer_s_p50']} s;"
        f" RSS {values['rss_before_mib']} / {values['rss_most_mib']} / {values['rss_after_mib']} MiB;"
        f" lag p99 {values['lag_p99_ms']} ms; attacker's CPU {values['attacker_cpu_share']};"
        f" other programs took {values['others_during']:.0%} of the cores, beside the burner"
        f" {values['others_burner']:.0%}"
    )
    verdict = "held" if values["passed"] else "HURT: " + "; ".join(values["failed"])
    return f"{values['attack']}: {shown}\n    {more}\n    got {values['got']}\n    {verdict}"


if __name__ == "__main__":
    sys.exit(main())
