"""Servers that fail in the midst of a generation: its pause, and its tokens.

    python -m benchmarks recovery --runs 20
    python -m benchmarks recovery --mode halfopen --kill-at middle
    python -m benchmarks recovery --tokens 300 --kill-every 60
    python -m benchmarks recovery --copies 1 --give-up 10
    python -m benchmarks recovery --fault-rate 0 1e-4 1e-3 1e-2 --tokens 128 1024
    python -m benchmarks recovery --mode clients --runs 50
    python -m benchmarks recovery --mode slow --times 10 --runs 5
    python -m benchmarks recovery --adapter-rank 16 --runs 20

Real processes: a bootstrap node and two servers for each span, one torch thread in each.  The client
is this process.  Every run strikes a server of the chain in use once, at a random moment of one
token's time.  Afterwards everything is mended, and the next run has a new client, without knowledge of
faults.  The tokens are compared with those of the whole model in one process; with --adapter-rank with
those of a generation before the fault.  Then every run has another adapter (LoRA, bfloat16, at all
linears), which the server that takes over does not have yet.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import psutil
import trio

from benchmarks.lib.processes import Spawn, Worker, equal_spans, spawn
from benchmarks.lib.results import Run
from benchmarks.network.adapter_opening import random_content, shapes_of
from benchmarks.recovery.fault_rates import fault_rates
from benchmarks.recovery.lost_clients import lost_clients
from benchmarks.recovery.replicas import FAULTS, Replica, ReplicatedSwarm, Slowdown, kill, replicated_swarm
from benchmarks.recovery.watched import (
    WARM_UP_TOKENS,
    Strike,
    Watched,
    fresh_client,
    peers_in_use,
    percentile,
    prompt_ids,
    trace_figures,
    undisturbed,
    until_followed,
    until_known,
    watch,
)
from client.generation.conversation import Conversation
from node.config import ConfigError
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve
from tensor_codec.adapters import AdapterContent
from tests.netlab.lab import Lab, cannot
from tests.netlab.namespaces import command_inside

PREFILL_TOKENS = 300
SOCKETS_GONE_SECONDS = 60.0
Result = dict[str, Any]  # Any: JSON
Reference = Callable[[argparse.Namespace], tuple[list[int], list[int]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a token differs or is missing, 2 if this machine cannot run it."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    flags = parse(words)
    if flags.mode == "halfopen" and not flags.inside:
        if (reason := cannot(homes=False, lines=False)) is not None:
            print(f"error: --mode halfopen needs network namespaces: {reason}", file=sys.stderr)
            return 2
        inside = command_inside("benchmarks", ["recovery", *words, "--inside"])
        os.execvp(inside[0], inside)
    run = Run()
    try:
        result = measure(flags)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(result)
    run.write(flags.json, result)
    return 0 if result["ok"] else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks recovery", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--mode", choices=(*FAULTS, "slow", "clients"), default="kill", help="what fails, and how"
    )
    parser.add_argument(
        "--kill-at",
        choices=("first", "middle", "last", "prefill", "random"),
        help="the token after which the fault comes, or the prompt's time (random; middle if slow)",
    )
    parser.add_argument(
        "--times", type=float, default=10.0, help="of --mode slow: how much slower it becomes (%(default)g)"
    )
    parser.add_argument("--hop", type=int, help="of the chain, from 0 (default: a random one)")
    parser.add_argument("--kill-every", type=int, metavar="K", help="strike again after every K tokens")
    parser.add_argument(
        "--fault-rate",
        type=float,
        nargs="+",
        metavar="P",
        help="the chance that a server in use is killed in a step; compared with a new start at the prompt",
    )
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", help="new ones (64; 256 if slow)")
    parser.add_argument("--prompt-tokens", type=int, help="(32; 300 in prefill, 512 for --mode clients)")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--servers", type=int, default=3, help="hops, with equal spans (%(default)s)")
    parser.add_argument("--copies", type=int, default=2, help="servers of each span (%(default)s)")
    parser.add_argument(
        "--give-up",
        type=float,
        default=120.0,
        help="seconds that the client may take for a token (%(default)s)",
    )
    parser.add_argument("--at-once", type=int, default=10, help="of --mode clients (%(default)s)")
    parser.add_argument(
        "--limit",
        type=float,
        default=180.0,
        help="seconds for one generation with --fault-rate (%(default)s)",
    )
    parser.add_argument(
        "--adapter-rank", type=int, metavar="R", help="generate with a random adapter (LoRA) of this rank"
    )
    parser.add_argument("--standby", action="store_true", help="every hop has a standby before the fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    slow = flags.mode == "slow"  # half of the tokens measure the speed before, half the speed after
    flags.kill_at = flags.kill_at or ("middle" if slow else "random")
    flags.tokens = flags.tokens or [256 if slow else 64]
    return flags


def reference(flags: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The prompt, and the tokens of the whole model in one process."""
    tokens = flags.prompt_tokens or (PREFILL_TOKENS if flags.kill_at == "prefill" else 32)
    model = [] if flags.model is None else ["--model", flags.model]
    common = ["--dtype", "float32", "--threads", "1"]
    with closing(
        Worker("benchmarks.decode.reference", [*model, *common], {"OMP_NUM_THREADS": "1"})
    ) as worker:
        ids = prompt_ids(flags.model, tokens)
        return ids, worker.ask({"ids": ids, "tokens": flags.tokens[0]})["tokens"]


def measure(flags: argparse.Namespace, spawn: Spawn = spawn, reference: Reference = reference) -> Result:
    """Start the swarm by `spawn`, run the mode of the flags, and gather the figures.  Raises ConfigError.

    reference: gives the prompt and its right tokens.
    """
    folder = resolve(flags.model, cache_dir=cache_dir())
    spans = equal_spans(read_info(folder).blocks, flags.servers)
    copies = 1 if flags.mode == "clients" else flags.copies
    common = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "8192"]
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(here=True)) if flags.mode == "halfopen" else None
        replicas = stack.enter_context(
            replicated_swarm(spans, copies, model=flags.model, flags=common, lab=lab, spawn=spawn)
        )
        if flags.mode == "clients":
            return lost_clients(flags, replicas)
        if flags.fault_rate is not None:
            return trio.run(fault_rates, flags, replicas)
        ids, expected = reference(flags)
        once = killed_again_and_again if flags.kill_every else struck_once
        rows = [trio.run(once, flags, replicas, run, ids, expected) for run in range(flags.runs)]
    return summary(flags, rows)


async def struck_once(
    flags: argparse.Namespace, replicas: ReplicatedSwarm, run: int, ids: list[int], expected: list[int]
) -> Result:
    """One generation with one fault in it; then everything is mended."""
    rng = random.Random(flags.seed * 1_000_003 + run)
    number = strike_number(flags.kill_at, flags.tokens[0], rng)
    with closing(Slowdown(flags.times)) as slowdown:
        fault = slowdown if flags.mode == "slow" else FAULTS[flags.mode]
        strike = Strike(replicas, fault, rng, flags.hop)
        async with fresh_client(flags.model, replicas, flags.give_up, standby=flags.standby) as swarm:
            adapter = None if flags.adapter_rank is None else await new_adapter(flags, run)
            tokens = WARM_UP_TOKENS if adapter is None else flags.tokens[0]
            usual = await undisturbed(swarm, ids, adapter, tokens)
            expected = expected if adapter is None else usual.tokens
            step, first = usual.typical, usual.seconds[0]
            conversation = swarm.conversation(len(ids) + flags.tokens[0], adapter=adapter)

            async with trio.open_nursery() as nursery:

                async def before(asked: int) -> None:
                    if asked == number:
                        if flags.standby and number:
                            await until_followed(conversation)
                        nursery.start_soon(strike, conversation, rng.random() * (step if number else first))

                watched = await watch(swarm, conversation, ids, flags.tokens[0], before)
            row = row_of(flags, run, number, strike, watched, first, conversation)
            row |= {
                "error": watched.error,
                "error_s": watched.error_seconds,
                "tokens_equal": watched.tokens == expected,
            }
            conversation.close()
    if flags.mode == "halfopen" and strike.victim is not None:
        row["sockets_gone_s"] = await trio.to_thread.run_sync(sockets_gone, replicas, strike)
    await trio.to_thread.run_sync(replicas.mend)
    print(f"run {run + 1} of {flags.runs}: {json.dumps(row)}", file=sys.stderr)
    return row


async def new_adapter(flags: argparse.Namespace, run: int) -> AdapterContent:
    """A random adapter of a run."""
    folder = resolve(flags.model, cache_dir=cache_dir())
    shapes = await trio.to_thread.run_sync(shapes_of, folder)
    return random_content(folder.revision, shapes, flags.adapter_rank, flags.seed * 1_000_003 + run)


def strike_number(when: str, tokens: int, rng: random.Random) -> int:
    """The number of the token at the fault's time; 0 is the prompt's."""
    numbers = {"first": 1, "middle": tokens // 2, "last": tokens - 1, "prefill": 0}
    return numbers[when] if when in numbers else rng.randrange(1, tokens)


def row_of(
    flags: argparse.Namespace,
    run: int,
    number: int,
    strike: Strike,
    watched: Watched,
    first: float,
    conversation: Conversation,
) -> Result:
    """The figures of a run."""
    whole = watched.error is None and len(watched.tokens) > number
    span = None if strike.victim is None else list(strike.victim.span)
    return {
        "run": run,
        "mode": flags.mode,
        "token": number,
        "blocks": span,
        "gap_s": watched.gap(strike.at, first) if whole else None,
        "largest_gap_s": max(watched.seconds[1:]) if whole else None,
        "typical_step_s": watched.typical if whole else None,
        "first_token_s": first,
        "relay": getattr(conversation.session, "relay", None),
        **trace_figures(conversation, strike.at),
        **(slow_figures(strike, watched) if flags.mode == "slow" and whole else {}),
    }


def slow_figures(strike: Strike, watched: Watched) -> Result:
    """The tokens until a slow server was left, and its cost: the speed from then on over the speed before."""
    assert strike.victim is not None
    assert strike.victim.peer is not None
    before, behind = watched.speeds(strike.at)
    return {
        "steps_until_left": watched.steps_with(strike.victim.peer, strike.at),
        "tokens_per_s_before": before,
        "tokens_per_s": behind,
        "speed_ratio": behind / before,
    }


def sockets_gone(replicas: ReplicatedSwarm, strike: Strike) -> float | None:
    """Seconds from a strike until no other process has a connection to the victim's address; None: never."""
    assert strike.victim is not None
    link = strike.victim.link
    assert link is not None
    nodes = [replica.node for replica in replicas.replicas if replica is not strike.victim]
    pids = [os.getpid(), *(node.process.pid for node in [*nodes, replicas.bootstrap])]
    while (waited := time.perf_counter() - strike.at) < SOCKETS_GONE_SECONDS:
        if not any(connected(pid, link.address) for pid in pids):
            return waited
        time.sleep(0.25)  # a look reads every connection of every process
    return None


def connected(pid: int, address: str) -> bool:
    """Whether a process has a connection to an address."""
    return any(
        connection.status == psutil.CONN_ESTABLISHED and connection.raddr and connection.raddr.ip == address
        for connection in psutil.Process(pid).net_connections("tcp")
    )


async def killed_again_and_again(
    flags: argparse.Namespace, replicas: ReplicatedSwarm, run: int, ids: list[int], expected: list[int]
) -> Result:
    """One generation, in which one span's server in use is killed after every K tokens, then the other."""
    rng = random.Random(flags.seed * 1_000_003 + run)
    hop = rng.randrange(flags.servers) if flags.hop is None else flags.hop
    strikes: list[tuple[int, Replica]] = []
    async with fresh_client(flags.model, replicas) as swarm:
        await undisturbed(swarm, ids)
        conversation = swarm.conversation(len(ids) + flags.tokens[0])

        async def before(asked: int) -> None:
            if asked == 0 or asked % flags.kill_every:
                return
            victim = replicas.of(peers_in_use(conversation)[hop])
            others = replicas.others(victim)
            await until_known(swarm, lambda view: any(other.known(view) for other in others))
            strikes.append((asked, victim))
            kill(victim)

        with replicas.supervised():
            watched = await watch(swarm, conversation, ids, flags.tokens[0], before)
        conversation.close()
    await trio.to_thread.run_sync(replicas.mend)
    return {
        "run": run,
        "hop": hop,
        "kills": len(strikes),
        "servers_killed": len({victim.peer for _, victim in strikes}),
        "gaps_s": [watched.seconds[at] - watched.typical for at, _ in strikes if at < len(watched.seconds)],
        "tokens_lost": flags.tokens[0] - len(watched.tokens),
        "error": watched.error,
        "tokens_equal": watched.tokens == expected,
    }


def summary(flags: argparse.Namespace, rows: list[Result]) -> Result:
    """The figures of all runs."""
    result: Result = {
        "mode": flags.mode,
        "kill_at": f"every {flags.kill_every}" if flags.kill_every else flags.kill_at,
        "servers": flags.servers,
        "copies": flags.copies,
        "tokens": flags.tokens[0],
        "adapter_rank": flags.adapter_rank,
        "standby": flags.standby,
        "runs": len(rows),
        "tokens_equal": all(row["tokens_equal"] for row in rows),
    }
    gaps = [gap for row in rows for gap in row.get("gaps_s", [row.get("gap_s")])]
    result |= {"gap_s_p50": percentile(gaps, 0.5), "gap_s_p95": percentile(gaps, 0.95)}
    for name in (
        "largest_gap_s",
        "typical_step_s",
        "error_s",
        "detect_s",
        "replay_s",
        "recovered_s",
        "sockets_gone_s",
        "replayed",
    ):
        result[f"{name}_p50"] = percentile([row.get(name) for row in rows], 0.5)
    if flags.mode == "slow":
        result["times"], steps = flags.times, [row.get("steps_until_left") for row in rows]
        result |= {
            "left": sum(each is not None for each in steps),
            "steps_until_left_most": percentile(steps, 1),
        }
        ratios = [row.get("speed_ratio") for row in rows]
        result |= {"speed_ratio_p50": percentile(ratios, 0.5), "speed_ratio_least": percentile(ratios, 0)}
    ended = flags.copies == 1 and all(row.get("error") for row in rows)  # nobody can replace a lone server
    return result | {"ok": result["tokens_equal"] or ended, "rows": rows}


def report(result: Result) -> None:
    """One figure a line, one row a line."""
    for key, value in result.items():
        if key == "rows":
            for row in value:
                print("   ", ", ".join(f"{name} {_short(item)}" for name, item in row.items()))
        else:
            print(f"  {key:22} {_short(value)}")


def _short(value: object) -> str:
    if isinstance(value, list):
        return "[" + " ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
