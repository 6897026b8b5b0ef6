"""Placement by rule: a swarm's capacity, as a share of the bound of its hardware.

    python -m benchmarks swarm --servers 60 --model llama-405b --seeds 20 --rule all

Simulated servers on the real code of `routing` (see benchmarks.swarm.simulation): they join one after the
other, have ten minutes, and then an hour is observed, at rest or with --churn and --lost.  `share` is
capacity over its bound, all servers' rates over the blocks: at rest the value at the end of the ten
minutes, else the mean over the hour.  llama-405b has little spare capacity, llama-70b much. With --clients
sessions then use the placed servers (see benchmarks.swarm.clients) and ask for --load of their capacity.
The results are `made/asked` of their tokens, and the 95th percentile of a session's seconds for a token,
also as a ratio to the value of all-seeing clients.

`decision ms` is the time of one decision of a node, with the part that is equal for nodes with one view.
--decisions-only times each kind of decision.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lib.results import Run
from benchmarks.swarm import clients
from benchmarks.swarm.clients import Demand, capacity_of, machines_of
from benchmarks.swarm.models import MODELS, Plan
from benchmarks.swarm.outcome import Outcome, summary
from benchmarks.swarm.rules import RULES
from benchmarks.swarm.simulation import Simulation
from routing.names import PeerId
from routing.placement.cover_gaps import plan_moves
from routing.placement.rebalance import best_window, moves
from routing.placement.throughput import Holder, capacity

SHOWN = (
    ("share", "share_of_bound_mean", ".3f"),
    ("p5", "share_of_bound_p5", ".3f"),
    ("min", "share_of_bound_min", ".3f"),
    ("held once", "blocks_held_once", ".1f"),
    ("uncovered s", "uncovered_s", ".1f"),
    ("gaps by moves", "gaps_opened_by_moves", "d"),
    ("reaction s", "coverage_reaction_s_max", ".0f"),
    ("moves/server h", "moves_per_server_hour", ".3f"),
    ("blocks/h", "blocks_loaded_per_hour", ".1f"),
    ("decision ms", "decision_ms", ".2f"),
)
SHOWN_OF_CLIENTS = (
    ("seeds", "seeds_with_clients", "d"),
    ("capacity", "capacity_tokens_per_s", ".1f"),
    ("asked", "asked_tokens_per_s", ".1f"),
    ("made", "aggregate_tokens_per_s", ".1f"),
    ("made/asked", "aggregate_of_asked", ".3f"),
    ("least", "aggregate_of_asked_min", ".3f"),
    ("s/token p50", "latency_p50_s", ".2f"),
    ("p95", "latency_p95_s", ".2f"),
    ("ratio p95", "latency_ratio_p95", ".2f"),
    ("most", "latency_ratio_p95_max", ".2f"),
    ("hops", "hops_per_chain", ".1f"),
)
SHOWN_OF_LIARS = (
    ("made/honest", "aggregate_of_honest", ".3f"),
    ("least", "aggregate_of_honest_min", ".3f"),
)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks swarm", description=__doc__.split("\n")[0])
    parser.add_argument("--servers", type=int, default=60)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-405b")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--churn", type=float, default=0.0, help="share of the servers replaced per hour")
    parser.add_argument("--lost", type=float, default=0.0, help="share that crashes at once half-way")
    parser.add_argument("--liars", type=float, default=0.0, help="share that announces 100 times its speed")
    parser.add_argument("--partition", type=float, default=0.0, help="share that is cut off for ten minutes")
    parser.add_argument("--noise", type=float, default=0.0, help="by which announced rates are wrong at most")
    parser.add_argument(
        "--decisions-only", type=int, nargs="+", metavar="N", help="only time decisions among N servers"
    )
    parser.add_argument("--jobs", type=int, default=1, help="seeds that are simulated at once")
    parser.add_argument("--clients", type=int, default=0, metavar="N", help="that ask for tokens afterwards")
    parser.add_argument("--load", type=float, default=0.8, help="of the capacity, that clients ask for")
    parser.add_argument("--client-seconds", type=float, default=600.0, help="measured, after as many again")
    parser.add_argument("--rule", choices=[*RULES, "all"], default="ours")
    parser.add_argument("--load-gb-per-s", type=float, default=0.25, help="at which a server loads blocks")
    parser.add_argument("--seconds", type=float, default=3600.0, help="observed after the ten minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(words)


def plan_of(flags: argparse.Namespace, seed: int) -> Plan:
    """One run; 1,000 servers join within the ten minutes of 60 servers."""
    return Plan(
        model=MODELS[flags.model],
        servers=flags.servers,
        seed=seed,
        churn=flags.churn,
        lost=flags.lost,
        liars=flags.liars,
        partition=flags.partition,
        noise=flags.noise,
        seconds=flags.seconds,
        join_seconds=min(10.0, 600.0 / flags.servers),
        load_gb_per_s=flags.load_gb_per_s,
    )


class Result(NamedTuple):
    """The results of one seed.  clients: figures of benchmarks.swarm.clients, empty without clients."""

    servers: Outcome
    clients: dict[str, float]


def simulate(seed: int, name: str, flags: argparse.Namespace) -> Result:
    """One seed by one rule."""
    plan = plan_of(flags, seed)
    simulation = Simulation(plan, RULES[name]())
    outcome = simulation.run()
    if not flags.clients:
        return Result(outcome, {})
    blocks, machines = plan.model.blocks, machines_of(simulation.world.serving())
    honest = []
    if flags.liars:
        truthful = Simulation(replace(plan, liars=0.0), RULES[name]())
        truthful.run()
        honest = machines_of(truthful.world.serving())
    if not capacity_of(machines, blocks):
        return Result(outcome, {})  # no client can be served
    asked, seconds = flags.load * capacity_of(honest or machines, blocks), flags.client_seconds
    demand = Demand(asked, seed, flags.clients, warm_up=seconds, seconds=seconds)
    kind = "petals" if name.startswith("petals") else "ours"
    return Result(outcome, clients.measure(machines, blocks, demand, kind, honest))


def measure(flags: argparse.Namespace, name: str) -> dict[str, Any]:  # Any: JSON
    """All seeds by one rule."""
    began = time.perf_counter()
    seeds = range(flags.first_seed, flags.first_seed + flags.seeds)
    one = partial(simulate, name=name, flags=flags)
    if flags.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(flags.jobs) as pool:
            results = pool.map(one, seeds, chunksize=1)
    else:
        results = [one(seed) for seed in seeds]
    outcomes = [result.servers for result in results]
    found: dict[str, Any] = {"rule": name, **summary(plan_of(flags, 0), outcomes)}
    found["at_rest_by_seed"] = [round(outcome.at_rest, 4) for outcome in outcomes]
    found["share_by_seed"] = [round(statistics.fmean(outcome.shares), 4) for outcome in outcomes]
    if served := [result.clients for result in results if result.clients]:
        found |= {"seeds_with_clients": len(served), **clients.summary(served)}
    print(f"{name}: {flags.seeds} seeds in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def decisions(model_name: str, servers: int) -> dict[str, float]:
    """Milliseconds of each decision among randomly placed servers, and the peak memory, in MB."""
    model, rng = MODELS[model_name], random.Random(0)
    kinds = rng.choices(model.kinds, [kind.share for kind in model.kinds], k=servers)
    held = []
    for number, kind in enumerate(kinds):
        start = rng.randrange(model.blocks - kind.count + 1)
        held.append(
            Holder(PeerId(f"{number:05}"), start, start + kind.count, kind.rate * rng.uniform(0.7, 1.1))
        )
    hole = range(model.blocks // 3, model.blocks // 3 + 5)
    torn = [h for h in held if h.stop <= hole.start or h.start >= hole.stop]
    work: dict[str, Callable[[], object]] = {
        "join": lambda: best_window(held, model.blocks, 7, 300.0),
        "move": lambda: moves(held, model.blocks),
        "hole": lambda: plan_moves(torn, model.blocks),
        "capacity": lambda: capacity(held, model.blocks),
    }
    found: dict[str, float] = {"servers": servers}
    for name, decide in work.items():
        decide()
        began = time.perf_counter()
        decide()
        found[f"{name}_ms"] = round((time.perf_counter() - began) * 1000, 1)
    tracemalloc.start()
    for decide in work.values():
        decide()
    found["memory_mb"] = round(tracemalloc.get_traced_memory()[1] / 1e6, 1)
    tracemalloc.stop()
    return found


def table(rows: Sequence[dict[str, Any]], shown: Sequence[tuple[str, str, str]] = SHOWN) -> str:
    """The rules side by side."""
    lines = [f"{'rule':12}" + "".join(f"{title:>16}" for title, _, _ in shown)]
    for row in rows:
        lines.append(f"{row['rule']:12}" + "".join(f"{row[key]:>16{form}}" for _, key, form in shown))
    return "\n".join(lines)


def beside_petals(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Our share of the bound by the better one of Petals' rules, seed by seed; empty without both."""
    shares = {row["rule"]: row["share_by_seed"] for row in rows}
    theirs = [shares[name] for name in ("petals", "petals-join") if name in shares]
    if "ours" not in shares or not theirs:
        return {}
    pairs = zip(shares["ours"], map(max, zip(*theirs, strict=True)), strict=True)
    ratios = [ours / best if best else math.inf for ours, best in pairs]
    return {"of_petals_least": min(ratios), "of_petals_mean": statistics.fmean(ratios)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    flags, run = parse(arguments), Run()
    if flags.decisions_only:
        rows = [decisions(flags.model, servers) for servers in flags.decisions_only]
        print("\n".join(map(json.dumps, rows)))
        run.write(flags.json, rows)
        return 0
    names = list(RULES) if flags.rule == "all" else [flags.rule]
    rows = [measure(flags, name) for name in names]
    print(table(rows))
    beside = beside_petals(rows)
    if beside:
        least, mean = beside["of_petals_least"], beside["of_petals_mean"]
        print(f"ours by the better one of Petals' rules, seed by seed: least {least:.3f}, mean {mean:.3f}")
    served = [row for row in rows if "seeds_with_clients" in row]
    if served:
        print(table(served, SHOWN_OF_CLIENTS))
    if served and flags.liars:
        print(table(served, SHOWN_OF_LIARS))
    settings = {key: value for key, value in vars(flags).items() if key != "json"}
    figures = {**rows[0], **beside, "rules": rows} if len(rows) > 1 else rows[0]
    run.write(flags.json, {**settings, **figures})
    return 0
