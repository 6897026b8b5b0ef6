"""Nodes behind NAT in a lab: circuits, hole punching, a relay's cost, the time until a node is of use.

    python -m benchmarks reach
    python -m benchmarks reach --rounds 10 --one-way-ms 40

Linux with network namespaces, as root or as any user that may make them; else the exit code is 2.  Peers are
processes without a model, on hosts of their own, behind routers of a kind.  Every round has new peers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lib.processes import ROOT
from benchmarks.lib.results import Run
from benchmarks.reach.hosts import Peer
from tests.netlab.lab import Lab, cannot
from tests.netlab.namespaces import LabError
from tests.netlab.rules import Kind
from tests.netlab.topology import Line

PAIRS: Sequence[tuple[Kind, Kind]] = (
    ("cone", "cone"),
    ("cone", "firewall"),
    ("firewall", "firewall"),
    ("rejecting", "rejecting"),
)
PUNCH_SECONDS = 8.0  # all tries of a punch take 5 s
KNOWN_SECONDS = 60.0  # of many homes that start at once
STEP_BYTES = 4096
ECHOES = 200
BULK_MIB = 128
RELAY_MBIT = 100_000  # no bound: the relay's processor is measured
TRANSFER_RTT_MS, TRANSFER_MBIT = 160.0, 1000.0
Figures = dict[str, Any]  # Any: JSON


class Punch(NamedTuple):
    """circuit_ms: until two homes have a circuit.  punched_ms: until a direct connection; None for none."""

    circuit_ms: float
    punched_ms: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 2 where no lab can be made."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reach", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=10, help="punches of each pair (%(default)s)")
    parser.add_argument(
        "--one-way-ms", type=float, default=40.0, help="of the line of each home (%(default)g)"
    )
    parser.add_argument("--starts", type=int, default=3, help="of a node behind NAT (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    if flags.rounds < 1 or flags.starts < 1 or flags.one_way_ms < 0:
        print("error: --rounds and --starts must be 1 or more, --one-way-ms 0 or more", file=sys.stderr)
        return 2
    if (reason := cannot()) is not None:
        print(f"error: no lab can be made here: {reason}", file=sys.stderr)
        return 2
    run = Run()
    figures: Figures = {"one_way_ms": flags.one_way_ms, "rounds": flags.rounds, "starts": flags.starts}
    for part in (
        punches_of_all_pairs(flags.rounds, flags.one_way_ms),
        cost_of_a_relay(),
        starts(flags.starts),
        {"transfer_ratio": transfer_ratio()},
    ):
        figures |= part
    for name, value in figures.items():
        print(f"  {name:24} {json.dumps(value)}")
    run.write(flags.json, figures)
    return 0


# --- circuits and punches ---


def punches_of_all_pairs(rounds: int, one_way_ms: float) -> Figures:
    """circuit_ms, punched_ms: medians of two homes of the kind cone, from the dial on.

    punch_success: the share of all punches that worked; punches: of each pair, that number of `rounds`.
    """
    found = {f"{one}-{other}": punches(one, other, rounds, one_way_ms) for one, other in PAIRS}
    cones = found["cone-cone"]
    worked = {pair: sum(each.punched_ms is not None for each in several) for pair, several in found.items()}
    return {
        "circuit_ms": statistics.median(each.circuit_ms for each in cones),
        "punched_ms": _median([each.punched_ms for each in cones]),
        "punch_success": sum(worked.values()) / (rounds * len(PAIRS)),
        "punches": worked,
        "punched_pairs_ms": {
            pair: _median([each.punched_ms for each in several]) for pair, several in found.items()
        },
    }


def punches(one: Kind, other: Kind, rounds: int, one_way_ms: float) -> list[Punch]:
    """Two new homes for each round, all at one relay; they punch one after the other."""
    with Lab() as lab:
        lab.public("p1")
        lab.public("p2")
        relay = Peer(lab, "p1")
        Peer(lab, "p2", [relay.address])  # a second one to ask for the own address
        pairs = []
        for number in range(rounds):
            for name, kind in ((f"a{number}x", one), (f"b{number}x", other)):
                lab.home(name, kind, line=Line(one_way_ms), ipv6=False)
            both = [Peer(lab, f"{side}{number}x1", [relay.address], wait=False) for side in "ab"]
            pairs.append(both)
        for peer in [peer for both in pairs for peer in both]:
            peer.take_part()
        for target, _ in pairs:
            relay.do("until_relays", peer=target.peer, count=2, seconds=KNOWN_SECONDS)
        found = []
        for target, dialler in pairs:
            found.append(punch(relay, target, dialler))
            _report({"pair": f"{one}-{other}", **found[-1]._asdict()})
        return found


def punch(relay: Peer, target: Peer, dialler: Peer) -> Punch:
    """One dial through the relay, and the punch that follows."""
    dialler.do("echo", peer=relay.peer, size=1, rounds=1)  # the connection to the relay is there
    began = time.perf_counter()
    circuit = dialler.do("through", relay=relay.peer, peer=target.peer)["seconds"]
    punched = None
    with suppress(LabError):
        dialler.do("until_direct", peer=target.peer, seconds=PUNCH_SECONDS)
        punched = (time.perf_counter() - began) * 1e3
    return Punch(circuit * 1e3, punched)


# --- the relay ---


def cost_of_a_relay() -> Figures:
    """relayed_extra_ms: of a step through the relay beyond a step on the same lines without one, medians.

    relay_mb_s: MB per second of the relay's processor.  circuit_mib: by which its memory grew meanwhile.
    """
    with Lab() as lab:
        for name in ("p1", "p2"):
            lab.public(name)
        for name in ("a", "b"):
            lab.home(name, "symmetric", ipv6=False)  # nothing punches it
        relay = Peer(lab, "p1", flags=["--relay-mbit", str(RELAY_MBIT)])
        public = Peer(lab, "p2", [relay.address])
        target, dialler = (Peer(lab, name, [relay.address]) for name in ("a1", "b1"))
        relay.do("until_relays", peer=target.peer, count=2, seconds=KNOWN_SECONDS)
        dialler.do("echo", peer=relay.peer, size=1, rounds=1)
        dialler.do("connect", peer=public.peer)
        dialler.do("through", relay=relay.peer, peer=target.peer)
        seconds = {
            peer: statistics.median(dialler.do("echo", peer=peer, size=STEP_BYTES, rounds=ECHOES)["seconds"])
            for peer in (public.peer, target.peer)
        }
        before, held_mib = relay.cpu_seconds(), relay.rss_mib()
        took = dialler.do("bulk", peer=target.peer, mib=BULK_MIB, seconds=120.0)["seconds"]
        used = relay.cpu_seconds() - before
        if dialler.do("way", peer=target.peer)["way"] != "circuit":
            raise LabError("two symmetric homes have a direct connection: nothing was relayed")
        return {
            "relayed_extra_ms": (seconds[target.peer] - seconds[public.peer]) * 1e3,
            "relay_mb_s": BULK_MIB * 2**20 / 1e6 / used,
            "relayed_mb_s": BULK_MIB * 2**20 / 1e6 / took,
            "circuit_mib": relay.rss_mib() - held_mib,
        }


# --- a node's start ---


def starts(count: int) -> Figures:
    """Medians of the starts of a node behind NAT.

    reach_known_s: from its being online until its record says whether it can be reached.  usable_s: from the
    start of its process until a peer of another home has a connection to it.
    """
    several = [_report(start()) for _ in range(count)]
    return {name: statistics.median(each[name] for each in several) for name in several[0]}


def start() -> dict[str, float]:
    """One start, in a new lab."""
    with Lab() as lab:
        for name in ("p1", "p2", "p3"):
            lab.public(name)
        lab.home("a", "cone", ipv6=False)
        lab.home("b", "cone", ipv6=False)
        relay = Peer(lab, "p1")
        for name in ("p2", "p3"):
            Peer(lab, name, [relay.address])
        dialler = Peer(lab, "b1", [relay.address])
        dialler.tell({"do": "until_usable", "name": "late", "seconds": KNOWN_SECONDS})
        late = Peer(lab, "a1", [relay.address], ["--name", "late"])
        online_at = time.time()
        known = relay.do("until_reach", peer=late.peer, seconds=KNOWN_SECONDS)
        usable = dialler.hear()
        if "error" in usable:
            raise LabError(f"b1: {usable['error']}")
        return {
            "reach_known_s": max(0.0, known["at"] - online_at),
            "usable_s": usable["at"] - late.started_at,
        }


# --- a transfer ---


def transfer_ratio() -> float:
    """The time of 8 MiB on a new connection over a long line, over that of raw TCP: `benchmarks wire`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wire.json"
        words = ["--rtt-ms", str(TRANSFER_RTT_MS), "--mbit", str(TRANSFER_MBIT), "--json", str(file)]
        command = [sys.executable, "-m", "benchmarks", "wire", *words]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(file.read_text())["ratio"])


def _report(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), file=sys.stderr)
    return row


def _median(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


if __name__ == "__main__":
    sys.exit(main())
